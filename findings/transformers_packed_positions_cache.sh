#!/usr/bin/env bash
# Package:  transformers 5.24.0, with torch 2.13.0, on a CPU.
# Input:    a Llama (random weights, sdpa attention, training mode) is given two documents of 5 and 7 tokens in one row,
#           with position_ids that begin at 0 in each and no attention_mask, and its logits of the second document are
#           compared with those of that document alone.
# Behavior: With use_cache=False the model derives from the positions that the row is packed, and keeps attention within
#           documents. With the default, use_cache=True, it makes a cache, derives nothing, and each document attends to
#           those before it, without a word, in training too.
# Output:   largest difference to the document alone: default 6.0e-02, use_cache=True 6.0e-02, use_cache=False 2.2e-08
# Upstream: the documentation of packing (DataCollatorWithFlattening) does not mention use_cache; no issue was found.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
"$work/venv/bin/python" -W ignore - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
)
net = LlamaForCausalLM(config).train()
first, second = torch.randint(32, (1, 5)), torch.randint(32, (1, 7))
packed = torch.cat([first, second], 1)
positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
alone = net(input_ids=second).logits
apart = {}
for name, options in {"default": {}, "use_cache=True": {"use_cache": True}, "use_cache=False": {"use_cache": False}}.items():
    logits = net(input_ids=packed, position_ids=positions, **options).logits[:, 5:]
    apart[name] = float((logits - alone).abs().max())
print(", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
if min(apart["default"], apart["use_cache=True"]) < 1e-3 or apart["use_cache=False"] > 1e-6:
    raise SystemExit("the behavior has changed")
PY
