"""The rules by which microbatches, processes and rows merge the buffers of a model: torch's own, and declared ones."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from lumen.core import _torch_compat
from lumen.core.dtypes import NARROW
from lumen.errors import HyperparameterError, InexactWarning, PatternError, printable

MergeRule = Literal["sum", "mean", "max", "min", "any", "first", "gather", "sync"]
Merges = Mapping[str, MergeRule]

MEANINGS = (
    "'sum' adds up the changes, 'mean' averages by rows, 'max', 'min' and 'any' reduce over all, 'first' takes the"
    " first, 'gather' concatenates rows in order, 'sync' declares that the module synchronizes it itself"
)
SHOWN = 8


class Merge(NamedTuple):
    """The rule of one buffer; with `stepwise`, each microbatch starts from what the previous one left."""

    rule: MergeRule
    stepwise: bool = True


STATISTICS: Mapping[str, Merge] = {  # of BatchNorm and InstanceNorm
    "running_mean": Merge("mean", stepwise=False),
    "running_var": Merge("mean", stepwise=False),
    "num_batches_tracked": Merge("max", stepwise=False),
}


def merges_of(module: nn.Module, declared: Merges | None) -> dict[str, Merge]:
    """The rules of a module's buffers by name: those of torch's own modules, and those `declared` by patterns.

    Raises `HyperparameterError` for a rule that does not exist or does not suit a dtype, and `PatternError` for a
    pattern that matches no buffer, and for a buffer that two patterns give different rules.
    """
    buffers = dict(module.named_buffers())
    rules = {name: merge for name, merge in _rules_of_torch(module) if name in buffers}
    patterns: dict[str, str] = {}
    for pattern, rule in (declared or {}).items():
        names = [name for name in buffers if fnmatchcase(name, pattern)]
        _check_pattern(pattern, rule, names, buffers)
        for name in names:
            other = patterns.setdefault(name, pattern)
            if other != pattern and rules[name].rule != rule:
                raise PatternError(
                    f"merge gives the buffer {name!r} two rules: {other!r} {rules[name].rule!r} and {pattern!r}"
                    f" {rule!r}."
                )
            _check_dtype(name, buffers[name].dtype, rule)
            rules[name] = Merge(rule)
    return rules


def _check_pattern(pattern: str, rule: str, names: Collection[str], buffers: Collection[str]) -> None:
    if rule not in get_args(MergeRule):
        raise HyperparameterError(f"merge={{{pattern!r}: {rule!r}}} is no rule for a buffer: {MEANINGS}.")
    if not names:
        listed = ", ".join(map(printable, [*buffers][:SHOWN])) or "none"
        raise PatternError(
            f"merge={{{pattern!r}: {rule!r}}} matches no buffer; the model's are {listed}"
            f"{' …' if len(buffers) > SHOWN else ''}."
        )


def _check_dtype(name: str, dtype: torch.dtype, rule: MergeRule) -> None:
    instead: str | None = None
    if dtype.is_complex and rule not in ("gather", "sync"):
        instead = "'gather' or 'sync', or keep torch.view_as_real(x)"
    elif rule == "any" and dtype != torch.bool:
        instead = "'max'"
    elif rule == "mean" and not dtype.is_floating_point:
        instead = "'any'" if dtype == torch.bool else "'sum' or 'max'"
    elif rule == "sum" and dtype == torch.bool:
        instead = "'any'"
    if instead is not None:
        raise HyperparameterError(f"merge gives {name!r}, a buffer of {dtype}, the rule {rule!r}. Write {instead}.")


def check_statistics(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Warn where running statistics that will be updated are 16-bit: small changes of them are rounded away."""
    narrow = [
        name
        for name, sub in module.named_modules()
        if isinstance(sub, _torch_compat.NormBase)
        and sub.training
        and _dtype_of(buffers, f"{name}.running_mean") in NARROW
    ]
    if narrow:
        listed = ", ".join(map(repr, narrow[:SHOWN])) + (" …" if len(narrow) > SHOWN else "")
        warnings.warn(
            f"the running statistics of {listed} are in 16 bits, where a small change is rounded away: they stay up to"
            " 4% from their value with a momentum of 0.1, up to 39% with 0.01. Keep the model in float32 and compute in"
            ' 16 bits, lm.precision("bf16"); or keep these modules in float32, which take 16-bit inputs:'
            f" {f'net.get_submodule({narrow[0]!r})' if narrow[0] else 'net'}.float().",
            InexactWarning,
            stacklevel=3,
        )


def _dtype_of(buffers: Mapping[str, Tensor], name: str) -> torch.dtype | None:
    buffer = buffers.get(name.lstrip("."))
    return None if buffer is None else buffer.dtype


def _rules_of_torch(module: nn.Module) -> Iterator[tuple[str, Merge]]:
    """The rules of the buffers that torch's own modules change, by name."""
    observer = sys.modules.get("torch.ao.quantization.observer")  # whose import takes long
    for prefix, sub in module.named_modules():
        start = f"{prefix}." if prefix else ""
        if isinstance(sub, _torch_compat.NormBase):
            yield from ((start + name, merge) for name, merge in STATISTICS.items())
        elif isinstance(sub, _torch_compat.ParametrizedSpectralNorm):  # computed from params alone
            yield f"{start}_u", Merge("sync", stepwise=False)
            yield f"{start}_v", Merge("sync", stepwise=False)
        elif observer is not None and isinstance(sub, observer.MinMaxObserver | observer.PerChannelMinMaxObserver):
            averaged = observer.MovingAverageMinMaxObserver | observer.MovingAveragePerChannelMinMaxObserver
            yield f"{start}min_val", Merge("mean" if isinstance(sub, averaged) else "min")
            yield f"{start}max_val", Merge("mean" if isinstance(sub, averaged) else "max")
        for hook in _torch_compat.forward_pre_hooks(sub).values():
            if isinstance(hook, SpectralNorm):
                yield f"{start}{hook.name}_u", Merge("sync", stepwise=False)
                yield f"{start}{hook.name}_v", Merge("sync", stepwise=False)


def described(x: Tensor) -> str:
    """A buffer in messages."""
    return f"shape {tuple(x.shape)}, {x.dtype}"


def suggested(x: Tensor) -> MergeRule:
    """The rule that probably suits a buffer that has none."""
    if x.dtype == torch.bool:
        return "any"
    return "mean" if x.is_floating_point() and x.dim() else "sum"
