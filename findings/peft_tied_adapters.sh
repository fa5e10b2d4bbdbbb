#!/usr/bin/env bash
# Package:  peft 0.21.2 with transformers 5.24.0 and torch 2.13.0, on a CPU.
# Input:    LoraConfig(ensure_weight_tying=True, target_modules=["embed_tokens"]) on a tiny Llama with tied embeddings, then
#           one step of SGD with a rate of 1 and gradients of 1.
# Behavior: the adapter of lm_head has transposed views of the adapter of embed_tokens as params of its own. Each number
#           belongs to two params: the optimizer updates it twice a step, momentum and weight decay included, from two
#           gradients that are never summed, and the count of trainable params is doubled.
# Output:   trainable params 96, numbers in memory 48; after a step of size 1 they have moved by 2.0
# Upstream: peft pull request 2879 (for issue 2864) shares the adapters this way; no issue about the double update was found.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1))
model = get_peft_model(base, LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))
params = [param for param in model.parameters() if param.requires_grad]
count = sum(param.numel() for param in params)
stored = sum({param.data_ptr(): param.numel() for param in params}.values())

before = [param.detach().clone() for param in params]
for param in params:
    param.grad = torch.ones_like(param)
torch.optim.SGD(params, lr=1.0).step()
[moved] = {round(float(value), 3) for old, new in zip(before, params) for value in (old - new.detach()).flatten()}

print(f"trainable params {count}, numbers in memory {stored}; after a step of size 1 they have moved by {moved}")
if (count, stored, moved) != (96, 48, 2.0):
    raise SystemExit("the behavior has changed")
PY
