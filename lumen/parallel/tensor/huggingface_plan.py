"""A plan for `lm.tensor_parallel` from the one that transformers publishes with a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lumen.core.arguments import checked
from lumen.errors import HyperparameterError, ParamsError, PatternError, printable
from lumen.parallel.tensor.styles import Colwise, Region, ReplicatedParams, Rowwise, Style

# transformers' names of styles (5.24), for modules that `lm.tensor_parallel` shards.
_STYLES: Mapping[str, Style] = {
    "colwise": Colwise(),
    "colwise_gather_output": Colwise(output="replicate"),
    "colwise_rep": Colwise(output="replicate"),
    "packed_colwise": Colwise(groups=2),
    "rowwise": Rowwise(),
    "rowwise_split_input": Rowwise(input="replicate"),
    "rowwise_rep": Rowwise(input="replicate"),
    "embedding_rowwise": Rowwise(),
    "replicated_with_grad_allreduce": ReplicatedParams(),
}
_REPLICATED = {"replicate", "rep"}
_ACTIVATIONS = {"act", "act_fn", "activation_fn"}  # transformers' names, of modules that compute each feature by itself
_SHOWN = 6  # of the names in a message


@checked
def huggingface(model: nn.Module, *, vocabulary: bool = True) -> dict[str, Style]:
    """The plan of a transformers model, from its own (`base_model_tp_plan` of its config, `_tp_plan` of its class).

    Tied embeddings and heads are sharded alike; an embedding of a class of its own stays whole, as does a head tied to
    it. `vocabulary=False` leaves both whole, for a vocabulary that the axis does not divide. Modules with a `head_dim`
    become a `Region`, which checks that every rank has whole heads.

    Raises `ParamsError` for a model without a plan; `PatternError` for a plan with parts that `lm.tensor_parallel`
    cannot shard, which it names: experts that are one parameter for all, latent attention (MLA), attention sinks, and
    modules that are no linear layer or embedding.

    >>> from lumen.parallel import plans
    >>> import transformers
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    >>> net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    >>> plans.huggingface(net)["model.layers.0.mlp.down_proj"]
    Rowwise()
    """
    published = getattr(model, "_tp_plan", None)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise HyperparameterError(
            f"plans.huggingface takes a model of transformers, not {type(model).__name__}. Write a plan of your own:"
            ' lm.tensor_parallel({"*.up": Colwise(), "*.down": Rowwise()})'
        )
    if not published or len(published) == 1:
        raise ParamsError(
            f"transformers publishes no tensor-parallel plan for {type(model).__name__}. Write one:"
            ' {"*.q_proj": Colwise(), "*.o_proj": Rowwise(), …}, or see lm.parallel.plans for ready ones.'
        )
    plan: dict[str, Style] = {}
    unknown: list[str] = []
    for pattern, style in published.items():
        modules, params = _named(model, pattern)
        if style in _REPLICATED:
            continue
        unknown += [f"{name} ({style})" for name in params]
        for name in modules:
            if _suits(model.get_submodule(name), _STYLES.get(style)):
                plan[name] = _STYLES[style]
            elif isinstance(model.get_submodule(name), nn.Embedding):
                continue  # of a class of its own, which scales its vectors, say: it stays whole
            elif style not in _STYLES or any(True for _ in model.get_submodule(name).parameters()):
                unknown.append(f"{name} ({style})")
    plan, inside = _with_activations(model, plan)
    unknown += [f"{name} (inside a region)" for name in inside]
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise PatternError(
            f"the plan that transformers publishes for {type(model).__name__} has parts that lm.tensor_parallel cannot"
            f" shard: {', '.join(map(printable, unknown[:_SHOWN]))}{more}. Use lm.fsdp, or write a plan of the parts"
            " that are linear layers and embeddings."
        )
    return _with_vocabulary(model, plan, vocabulary) | dict(_regions(model, plan))


def _named(model: nn.Module, pattern: str) -> tuple[list[str], list[str]]:
    """The modules and the params that a pattern of transformers names; `*` stands for the number of a layer."""
    modules = [name for name, _ in model.named_modules() if _matches(name, pattern)]
    return modules, [name for name, _ in model.named_parameters() if _matches(name, pattern)]


def _matches(name: str, pattern: str) -> bool:
    return name.count(".") == pattern.count(".") and fnmatchcase(name, pattern)


def _suits(module: nn.Module, style: Style | None) -> bool:
    if style is None:
        return False
    if isinstance(style, ReplicatedParams):
        return not any(isinstance(child, nn.Linear | nn.Embedding) for child in module.modules())
    return isinstance(module, nn.Linear) or type(module) is nn.Embedding


def _with_activations(model: nn.Module, plan: dict[str, Style]) -> tuple[dict[str, Style], list[str]]:
    """The plan with activations that have params (xIELU), and other modules with params between sharded layers.

    Whether the latter compute on shards, so that their gradients must be summed, their place does not say.
    """
    parents = {name.rpartition(".")[0] for name, style in plan.items() if style == Colwise()}
    parents &= {name.rpartition(".")[0] for name, style in plan.items() if style == Rowwise()}
    activations: dict[str, Style] = {}
    others = []
    for parent in sorted(parents):
        for key, child in model.get_submodule(parent).named_children():
            name = f"{parent}.{key}"
            if name in plan or not any(True for _ in child.parameters()):
                continue
            if key in _ACTIVATIONS:
                activations[name] = ReplicatedParams()
            else:
                others.append(name)
    return {**plan, **activations}, others


def _with_vocabulary(model: Any, plan: dict[str, Style], vocabulary: bool) -> dict[str, Style]:
    """The plan with the embedding and the head sharded alike where they are tied, or without both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    both = [names[id(module)] for module in (embedding, head) if module is not None and id(module) in names]
    tied = len(both) == 2 and embedding.weight is head.weight
    if not vocabulary or (tied and type(embedding) is not nn.Embedding):
        return {name: style for name, style in plan.items() if name not in both}
    if tied and not plan.keys().isdisjoint(both):
        plan = {**plan, both[0]: Rowwise(), both[1]: Colwise(output="replicate")}
    return plan


def _regions(model: nn.Module, plan: Mapping[str, Style]) -> Iterator[tuple[str, Style]]:
    """The attention modules whose heads are divided."""
    for name, module in model.named_modules():
        inside = [style for key, style in plan.items() if key.startswith(f"{name}.") and name]
        if isinstance(getattr(module, "head_dim", None), int) and Colwise() in inside and name not in plan:
            yield name, Region(unit="head_dim")
