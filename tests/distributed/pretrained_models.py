"""Tiny models of transformers for tests of published weights, on the meta device and full."""

from __future__ import annotations

import torch
import transformers as hf

import lumen as lm
from tests.parity.hf_models import COMMON, bert, gpt2, llama

hf.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def mixtral():
    return hf.MixtralForCausalLM(hf.MixtralConfig(**COMMON, **SIZES, **HEADS, num_local_experts=3))


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=65, decoder_start_token_id=0, **sizes))


def classifier(labels=3):
    config = hf.BertConfig(**COMMON, **SIZES, num_attention_heads=2, num_labels=labels)
    return hf.BertForSequenceClassification(config)


def nomic():
    """Its file has query, key and value of a block in one matrix."""
    return hf.NomicBertModel(hf.NomicBertConfig(vocab_size=64, **SIZES, num_attention_heads=2))


MODELS = {
    "nomic": nomic,
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "classifier": classifier,
    "mixtral": mixtral,
    "t5": t5,
}


def on_meta(name, dtype=torch.float32, **options):
    """The model under `torch.device("meta")`, in this dtype."""
    make = MODELS[name]
    with torch.device("meta"):
        return type(make(**options))._from_config(make(**options).config, dtype=dtype)


def state_of(net, seed=5):
    return lm.TrainState.create(net, lm.optim.adam(1e-2, eps=1e-4), seed=seed)


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def differing(state, wanted):
    """The names of params and buffers that are not bitwise those of `wanted`, by name."""
    actual = {**state.params, **state.buffers}
    assert actual.keys() == wanted.keys()
    return [
        name
        for name, x in actual.items()
        if x.dtype != wanted[name].dtype or x.shape != wanted[name].shape or not torch.equal(x, wanted[name])
    ]


def step(state, batch):
    def loss_fn(params, batch):
        return state.apply(params, **batch)[0].loss

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}
