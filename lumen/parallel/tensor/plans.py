"""Ready plans for `lm.tensor_parallel`, by the module names that models are published with.

A plan is a dict; use one unchanged, or replace entries: `{**plans.hf_llama(), "lm_head": Colwise(output="replicate")}`.

`vocabulary=True` shards the embedding and the output layer too; the axis must then divide the size of the vocabulary.
`sequence=True` shards the sequence for norms, dropout and the residual stream, at the same traffic; the axis must then
divide the length of a sequence.
"""

from __future__ import annotations

from typing import Literal

from lumen.core.arguments import checked
from lumen.parallel.tensor.huggingface_plan import huggingface
from lumen.parallel.tensor.styles import Colwise, Region, Rowwise, SequenceParallel, Style

__all__ = ["gpt", "hf_gpt2", "hf_llama", "huggingface"]

Layout = Literal["replicate", "sequence"]


@checked
def gpt(*, vocabulary: bool = False, sequence: bool = False) -> dict[str, Style]:
    """A GPT with blocks `blocks.N` of `norm_attention`, `qkv`, `project`, `norm_mlp` and `mlp` (`0` and `2`).

    Its other modules are `tokens`, `positions`, `norm` and `head`, as in `examples/char_lm.py`. `qkv` returns queries,
    keys and values in this order, and the block must infer the number of heads, as
    `qkv(x).unflatten(-1, (3, -1, head_width))` does: each rank has its own heads only.

    >>> gpt()["blocks.*.qkv"]
    Colwise(groups=3)
    """
    layout: Layout = "sequence" if sequence else "replicate"
    plan: dict[str, Style] = {
        "blocks.*.qkv": Colwise(groups=3, input=layout),
        "blocks.*.project": Rowwise(output=layout),
        "blocks.*.mlp.0": Colwise(input=layout),
        "blocks.*.mlp.2": Rowwise(output=layout),
    }
    if vocabulary:
        plan |= {"tokens": Rowwise(), "head": Colwise(output="replicate")}
    if sequence:
        plan |= {"blocks.0": SequenceParallel(input="replicate"), "norm": SequenceParallel(output="replicate")}
        plan |= {"blocks.*.norm_attention": SequenceParallel(), "blocks.*.norm_mlp": SequenceParallel()}
    return plan


@checked
def hf_llama(*, vocabulary: bool = True, sequence: bool = False) -> dict[str, Style]:
    """`transformers.LlamaForCausalLM`, and the models that share its module names (Mistral, Qwen2 …).

    The axis must divide the number of key and value heads.

    >>> hf_llama()["*.self_attn.o_proj"]
    Rowwise()
    """
    layout: Layout = "sequence" if sequence else "replicate"
    plan: dict[str, Style] = {
        "*.self_attn": Region(unit="head_dim", input=layout),
        "*.self_attn.[qkv]_proj": Colwise(),
        "*.self_attn.o_proj": Rowwise(output=layout),
        "*.mlp.gate_proj": Colwise(input=layout),
        "*.mlp.up_proj": Colwise(input=layout),
        "*.mlp.down_proj": Rowwise(output=layout),
    }
    if vocabulary:
        plan |= {"model.embed_tokens": Rowwise(), "lm_head": Colwise(output="replicate")}
    if sequence:
        plan |= {
            "model.layers.0": SequenceParallel(input="replicate"),
            "model.norm": SequenceParallel(output="replicate"),
        }
        plan |= {"*.input_layernorm": SequenceParallel(), "*.post_attention_layernorm": SequenceParallel()}
    return plan


@checked
def hf_gpt2(*, vocabulary: bool = False, sequence: bool = False) -> dict[str, Style]:
    """`transformers.GPT2LMHeadModel`; no axis divides its vocabulary of 50,257.

    >>> hf_gpt2()["*.attn"]
    Region(divide='split_size', unit='head_dim')
    """
    layout: Layout = "sequence" if sequence else "replicate"
    plan: dict[str, Style] = {
        "*.attn": Region(divide="split_size", unit="head_dim"),
        "*.attn.c_attn": Colwise(groups=3, input=layout),
        "*.attn.c_proj": Rowwise(output=layout),
        "*.mlp.c_fc": Colwise(input=layout),
        "*.mlp.c_proj": Rowwise(output=layout),
    }
    if vocabulary:
        plan |= {"transformer.wte": Rowwise(), "lm_head": Colwise(output="replicate")}
    if sequence:
        plan |= {"transformer.h.0": SequenceParallel(input="replicate")}
        plan |= {"transformer.ln_f": SequenceParallel(output="replicate")}
        plan |= {"transformer.h.*.ln_1": SequenceParallel(), "transformer.h.*.ln_2": SequenceParallel()}
    return plan
