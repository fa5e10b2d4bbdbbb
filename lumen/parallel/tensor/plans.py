"""Ready plans for `lm.tensor_parallel`, by the module names that models are published with.

A plan is a dict; take one as it is, or change entries: `{**plans.hf_llama(), "lm_head": Colwise(output="whole")}`.

`vocabulary=True` cuts the embedding and the output layer too, which then need a vocabulary that the axis divides.
`sequence=True` gives norms, dropout and the residual stream a part of the sequence each, at the same traffic: the
length of a sequence must be one that the axis divides.
"""

from __future__ import annotations

from typing import Literal

from lumen.parallel.tensor.styles import Colwise, Region, Rowwise, SequenceParallel, Style

Given = Literal["whole", "sequence"]


def gpt(*, vocabulary: bool = False, sequence: bool = False) -> dict[str, Style]:
    """A GPT with blocks `blocks.N` of `norm_attention`, `qkv`, `project`, `norm_mlp` and `mlp` (`0` and `2`).

    Around them stand `tokens`, `positions`, `norm` and `head`, as in `examples/char_lm.py`. `qkv` gives queries, keys
    and values in this order, and the block must take the number of heads from what it is given, as
    `qkv(x).unflatten(-1, (3, -1, head_width))` does: it finds its own heads there.

    >>> gpt()["blocks.*.qkv"]
    Colwise(groups=3)
    """
    given: Given = "sequence" if sequence else "whole"
    plan: dict[str, Style] = {
        "blocks.*.qkv": Colwise(groups=3, input=given),
        "blocks.*.project": Rowwise(output=given),
        "blocks.*.mlp.0": Colwise(input=given),
        "blocks.*.mlp.2": Rowwise(output=given),
    }
    if vocabulary:
        plan |= {"tokens": Rowwise(), "head": Colwise(output="whole")}
    if sequence:
        plan |= {"blocks.0": SequenceParallel(input="whole"), "norm": SequenceParallel(output="whole")}
        plan |= {"blocks.*.norm_attention": SequenceParallel(), "blocks.*.norm_mlp": SequenceParallel()}
    return plan


def hf_llama(*, vocabulary: bool = True, sequence: bool = False) -> dict[str, Style]:
    """`transformers.LlamaForCausalLM`, and the models that share its module names (Mistral, Qwen2 …).

    The number of key and value heads must be one that the axis divides.

    >>> hf_llama()["*.self_attn.o_proj"]
    Rowwise()
    """
    given: Given = "sequence" if sequence else "whole"
    plan: dict[str, Style] = {
        "*.self_attn": Region(unit="head_dim", input=given),
        "*.self_attn.[qkv]_proj": Colwise(),
        "*.self_attn.o_proj": Rowwise(output=given),
        "*.mlp.gate_proj": Colwise(input=given),
        "*.mlp.up_proj": Colwise(input=given),
        "*.mlp.down_proj": Rowwise(output=given),
    }
    if vocabulary:
        plan |= {"model.embed_tokens": Rowwise(), "lm_head": Colwise(output="whole")}
    if sequence:
        plan |= {"model.layers.0": SequenceParallel(input="whole"), "model.norm": SequenceParallel(output="whole")}
        plan |= {"*.input_layernorm": SequenceParallel(), "*.post_attention_layernorm": SequenceParallel()}
    return plan


def hf_gpt2(*, vocabulary: bool = False, sequence: bool = False) -> dict[str, Style]:
    """`transformers.GPT2LMHeadModel`; its vocabulary of 50,257 can be cut by no axis as it is.

    >>> hf_gpt2()["*.attn"]
    Region(divide='split_size', unit='head_dim')
    """
    given: Given = "sequence" if sequence else "whole"
    plan: dict[str, Style] = {
        "*.attn": Region(divide="split_size", unit="head_dim"),
        "*.attn.c_attn": Colwise(groups=3, input=given),
        "*.attn.c_proj": Rowwise(output=given),
        "*.mlp.c_fc": Colwise(input=given),
        "*.mlp.c_proj": Rowwise(output=given),
    }
    if vocabulary:
        plan |= {"transformer.wte": Rowwise(), "lm_head": Colwise(output="whole")}
    if sequence:
        plan |= {"transformer.h.0": SequenceParallel(input="whole")}
        plan |= {"transformer.ln_f": SequenceParallel(output="whole")}
        plan |= {"transformer.h.*.ln_1": SequenceParallel(), "transformer.h.*.ln_2": SequenceParallel()}
    return plan
