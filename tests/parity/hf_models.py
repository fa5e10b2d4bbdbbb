"""Tiny models of transformers, from their configurations alone, and batches for them."""

from __future__ import annotations

import torch
import transformers as hf

BYTES = 64  # the vocabulary
SIZE = 16  # of a picture's side
LABELS = 5
COMMON = {"vocab_size": BYTES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2(**changes):
    config = hf.GPT2Config(**{**COMMON, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, **changes})
    return hf.GPT2LMHeadModel(config)


def llama(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**COMMON, **sizes, **heads, **changes}))


def bert(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 32}
    return hf.BertForMaskedLM(hf.BertConfig(**{**COMMON, **sizes, "num_attention_heads": 4, **changes}))


def vit():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.ViTConfig(**sizes, image_size=SIZE, patch_size=4, num_labels=LABELS, hidden_dropout_prob=0.1)
    return hf.ViTForImageClassification(config)


def resnet():
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=LABELS, layer_type="basic"
    )
    return hf.ResNetForImageClassification(config)


def text(rows=4, time=12, generator=None):
    """Tokens of which the first row has only some: the rest is masked, and no target."""
    ids = torch.randint(3, BYTES, (rows, time), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, time // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def masked(rows=4, time=12, generator=None):
    """The same for a masked language model: a fifth of the tokens is hidden, and only those are targets."""
    batch = text(rows, time, generator)
    hidden = (torch.rand(rows, time, generator=generator) < 0.2) & (batch["attention_mask"] == 1)
    hidden[:, 0] = True
    ids = batch["input_ids"]
    return {**batch, "input_ids": ids.masked_fill(hidden, 1), "labels": ids.masked_fill(~hidden, -100)}


def pictures(rows=4, generator=None):
    values = torch.randn(rows, 3, SIZE, SIZE, generator=generator)
    return {"pixel_values": values, "labels": torch.randint(LABELS, (rows,), generator=generator)}


MODELS = {
    "gpt2": (gpt2, text),
    "llama": (llama, text),
    "bert": (bert, masked),
    "vit": (vit, pictures),
    "resnet": (resnet, pictures),
}


def batches(make, count):
    generator = torch.Generator().manual_seed(7)
    return [make(generator=generator) for _ in range(count)]
