"""What becomes of a model's buffers where a batch is computed in parts: microbatches, processes, rows under `vmap`.

A loss function returns new buffers in `lm.Aux(buffers=...)`. A `Tracker` finds out which buffer of which module each of
them is and what it was before, so that microbatches hand them on, as a loop does, and the parts of processes are merged
by a rule.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode

from lumen import tree
from lumen.core import _torch_compat, distributed, rules
from lumen.core.dtypes import NARROW
from lumen.core.primitives import ApplyCall, Aux
from lumen.core.rules import Next
from lumen.core.wrapped_loss import WrappedLoss
from lumen.errors import HyperparameterError, InexactWarning, MergeError, PatternError, printable

MergeRule = Literal["sum", "mean", "max", "min", "any", "first", "gather", "sync"]
Merges = Mapping[str, MergeRule]

_MEANINGS = (
    "'sum' adds up the changes, 'mean' averages by rows, 'max', 'min' and 'any' are over all parts, 'first' takes the"
    " first part's, 'gather' joins rows in order, 'sync' says that the module makes it equal everywhere itself"
)
_SHOWN = 8


class Merge(NamedTuple):
    """The rule of one buffer; `stepwise` where each microbatch begins with what the one before it left."""

    rule: MergeRule
    stepwise: bool = True


STATISTICS: Mapping[str, Merge] = {  # of BatchNorm and InstanceNorm
    "running_mean": Merge("mean", stepwise=False),
    "running_var": Merge("mean", stepwise=False),
    "num_batches_tracked": Merge("max", stepwise=False),
}


def merges_of(module: nn.Module, declared: Merges | None) -> dict[str, Merge]:
    """The rules of a module's buffers by name: those of torch's own modules, and what is `declared` by patterns.

    Raises `HyperparameterError` for a rule that does not exist or does not suit a dtype, and `PatternError` for a
    pattern that matches no buffer, and for a buffer that two patterns give different rules.
    """
    buffers = dict(module.named_buffers())
    found = {name: merge for name, merge in _known(module) if name in buffers}
    said: dict[str, str] = {}
    for pattern, rule in (declared or {}).items():
        names = [name for name in buffers if fnmatchcase(name, pattern)]
        _check_pattern(pattern, rule, names, buffers)
        for name in names:
            other = said.setdefault(name, pattern)
            if other != pattern and found[name].rule != rule:
                raise PatternError(
                    f"merge gives the buffer {name!r} two rules: {other!r} {found[name].rule!r} and {pattern!r}"
                    f" {rule!r}."
                )
            _check_dtype(name, buffers[name].dtype, rule)
            found[name] = Merge(rule)
    return found


def _check_pattern(pattern: str, rule: str, names: Collection[str], buffers: Collection[str]) -> None:
    if rule not in get_args(MergeRule):
        raise HyperparameterError(f"merge={{{pattern!r}: {rule!r}}} is no rule for a buffer: {_MEANINGS}.")
    if not names:
        listed = ", ".join(map(printable, [*buffers][:_SHOWN])) or "none"
        raise PatternError(
            f"merge={{{pattern!r}: {rule!r}}} matches no buffer; the model's are {listed}"
            f"{' …' if len(buffers) > _SHOWN else ''}."
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
    """Warn where running statistics are of 16 bits and will be moved: small changes of them are rounded away."""
    narrow = [
        name
        for name, each in module.named_modules()
        if isinstance(each, _torch_compat.NormBase)
        and each.training
        and _dtype_of(buffers, f"{name}.running_mean") in NARROW
    ]
    if narrow:
        listed = ", ".join(map(repr, narrow[:_SHOWN])) + (" …" if len(narrow) > _SHOWN else "")
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


def _known(module: nn.Module) -> Iterator[tuple[str, Merge]]:
    """The buffers that modules of torch change, and how parts of a batch make that of the whole."""
    observer = sys.modules.get("torch.ao.quantization.observer")  # whose import takes long
    for prefix, each in module.named_modules():
        start = f"{prefix}." if prefix else ""
        if isinstance(each, _torch_compat.NormBase):
            yield from ((start + name, merge) for name, merge in STATISTICS.items())
        elif isinstance(each, _torch_compat.ParametrizedSpectralNorm):  # computed from params alone
            yield f"{start}_u", Merge("sync", stepwise=False)
            yield f"{start}_v", Merge("sync", stepwise=False)
        elif observer is not None and isinstance(each, observer.MinMaxObserver | observer.PerChannelMinMaxObserver):
            averaged = observer.MovingAverageMinMaxObserver | observer.MovingAveragePerChannelMinMaxObserver
            yield f"{start}min_val", Merge("mean" if isinstance(each, averaged) else "min")
            yield f"{start}max_val", Merge("mean" if isinstance(each, averaged) else "max")
        for hook in _torch_compat.forward_pre_hooks(each).values():
            if isinstance(hook, SpectralNorm):
                yield f"{start}{hook.name}_u", Merge("sync", stepwise=False)
                yield f"{start}{hook.name}_v", Merge("sync", stepwise=False)


@dataclass(slots=True)
class Origin:
    """What one leaf of `Aux.buffers` is.

    `start` is the buffer as it was before the gradient. `changed` is None where only its values could tell. `foreign`
    is what no module gave.
    """

    name: str
    start: Tensor
    merge: Merge | None = None
    changed: bool | None = None
    foreign: bool = False
    frozen: bool = False

    @property
    def is_stepwise(self) -> bool:
        """Whether a microbatch begins with what the one before it left."""
        return not (self.frozen or self.foreign) and (self.merge is None or self.merge.stepwise)


class Tracker:
    """Follows buffers through one gradient: a rule for P0 that looks on while a loss function runs.

    `held` are ids of tensors that may be returned as they are. With `marks`, a trace tells which buffers nobody wrote
    to. Inside a `vmap` over rows, `lane` is a tensor that differs between them: buffers that have a rule are tied to
    it, since an unmapped tensor cannot be changed by rows.
    """

    def __init__(self, held: Collection[int] = (), marks: bool = False) -> None:
        self.lane: Tensor | None = None
        self._marks = marks
        self.origins: list[Origin] = []
        self._held = held
        self._active = False
        self._made: dict[int, tuple[Tensor, Origin]] = {}
        self._read: dict[str, tuple[Tensor, Origin] | None] = {}
        self._carried: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self) -> None:
        """Begin a gradient: no microbatch has run yet."""
        self.origins = []
        self._carried = {}

    def watching(self, loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
        """`loss_fn`, watched for where the buffers that it returns come from."""
        if not has_aux:
            return loss_fn

        def run(*args: Any) -> Any:
            self._active = True
            try:
                out = loss_fn(*args)
                aux = out[1] if type(out) is tuple and len(out) == 2 else None
                self.origins = self._origins(aux.buffers) if isinstance(aux, Aux) and aux.buffers else []
                return out
            finally:
                self._active = False
                self._made = {}
                self._read = {}

        return WrappedLoss(loss_fn, run, lambda other: self.watching(other, has_aux))

    def apply(self, next: Next, call: ApplyCall) -> Any:
        """The rule for P0."""
        if not self._active or not call.buffers:
            return next(call)
        origins = {name: self._origin(call, name, buffer) for name, buffer in call.buffers.items()}
        given = {name: self._given(origins[name], buffer) for name, buffer in call.buffers.items()}
        outer = unwritten = _marking.unwritten
        if unwritten is None and self._marks and rules.is_tracing():  # else those of a tracker round this one
            _marking.unwritten = unwritten = {}
        try:
            out, new = next(call.replace(buffers=given))
        except RuntimeError as error:
            if self.lane is not None:
                _explain_vmap(error, origins)
            raise
        finally:
            _marking.unwritten = outer
        for name, tensor in new.items():
            origin, before = origins[name], self._made.get(id(call.buffers[name]))
            same = tensor is given[name] or (unwritten is not None and id(tensor) in unwritten)
            origin.changed = False if same and (before is None or before[1].changed is False) else None
            self._made[id(tensor)] = tensor, origin
            known = self._read.setdefault(name, (tensor, origin))
            if known is not None:  # two models may have a buffer of one name
                self._read[name] = (tensor, origin) if known[1].start is origin.start else None
        return out, new

    def carry(self, aux: Any) -> None:
        """Let the next microbatch begin with the buffers that this one has left."""
        if not self.origins or not isinstance(aux, Aux):
            return
        for origin, leaf in zip(self.origins, tree.leaves(aux.buffers), strict=True):
            if origin.is_stepwise and origin.changed is not False:
                self._carried[id(origin.start)] = origin.start, leaf

    def _origin(self, call: ApplyCall, name: str, buffer: Tensor) -> Origin:
        made = self._made.get(id(buffer))
        start = buffer if made is None else made[1].start
        return Origin(name, start, call.target.merges.get(name), frozen=name in call.target.frozen)

    def _given(self, origin: Origin, buffer: Tensor) -> Tensor:
        carried = self._carried.get(id(buffer))
        if carried is not None:
            buffer = carried[1]
        if self.lane is None or origin.merge is None:
            return buffer
        return torch.where(self.lane >= 0, buffer, buffer)

    def _origins(self, buffers: Any) -> list[Origin]:
        before = self.origins
        leaves = tree.leaves(buffers)
        found = []
        for place, leaf in enumerate(leaves):
            made = self._made.get(id(leaf))
            origin = self._unmade(buffers, place, leaf, before) if made is None else made[1]
            found.append(origin)
            old = before[place] if place < len(before) else origin
            if old.start is origin.start and old.changed is not False:  # by a microbatch before this one
                origin.changed = old.changed
        return found

    def _unmade(self, buffers: Any, place: int, leaf: Any, before: Sequence[Origin]) -> Origin:
        """The origin of a leaf that no module returned: an old one, one that the loss function made of a new one."""
        path = tree.paths(buffers)[place]
        by_name = self._read.get(path)
        if by_name is not None:
            tensor, origin = by_name
            same = leaf is origin.start or (origin.changed is False and _is_alias(leaf, tensor))
            return Origin(
                origin.name, origin.start, origin.merge, False if same else None, frozen=origin.frozen and same
            )
        return Origin(path, leaf, changed=self._is_new(place, leaf, before), foreign=True)

    def _is_new(self, place: int, leaf: Any, before: Sequence[Origin]) -> bool | None:
        """Whether what no module gave differs between parts; None for the first of some microbatches."""
        if self.lane is not None:
            return _is_mapped(leaf)
        if self._held:
            return id(leaf) not in self._held
        if not before:
            return None
        return not (place < len(before) and before[place].start is leaf) or before[place].changed is True


def _is_alias(leaf: Any, other: Tensor) -> bool:
    """Whether a tensor is the other, detached say."""
    if _torch_compat.peek_interpreter_stack() is not None or leaf.shape != other.shape:
        return False
    return bool(
        _torch_compat.storage_id(leaf.untyped_storage()) == _torch_compat.storage_id(other.untyped_storage())
        and leaf.dtype == other.dtype
    )


def _is_mapped(leaf: Any) -> bool:
    """Whether a tensor differs between the rows of the innermost `vmap`."""
    while _torch_compat.is_gradtrackingtensor(leaf):
        leaf = _torch_compat.get_unwrapped(leaf)
    return bool(_torch_compat.is_batchedtensor(leaf))


def merge_microbatches(origin: Origin, leaves: Sequence[Any], weighted: Callable[[], Tensor]) -> Any:
    """The buffer after all microbatches, of which each has left one of `leaves`."""
    if origin.frozen:
        return origin.start
    if origin.foreign:
        if origin.changed:
            raise MergeError(
                f"lm.Aux(buffers=...) has a leaf {origin.name!r} that no module returned which state.apply ran, so it"
                " is not clear how the microbatches' parts make the whole batch's. Make it a buffer of the module,"
                f" self.register_buffer({origin.name!r}, ...), or report it in metrics: lm.Sum.of(x), lm.Last(x)."
            )
        return leaves[0]
    if origin.is_stepwise:
        return leaves[-1]
    assert origin.merge is not None
    if origin.merge.rule == "mean":
        return weighted()
    return torch.stack(list(leaves)).amax(0) if origin.merge.rule == "max" else leaves[0]


def merge_rows(origin: Origin, rows: Tensor) -> Tensor:
    """The buffer of all rows from those of single ones, stacked, which all began with the same."""
    start, rule = origin.start, None if origin.merge is None else origin.merge.rule
    if origin.frozen:
        return start
    if rule == "sum":
        return start + (rows - start).sum(0, dtype=start.dtype)
    if rule == "mean":
        return start + (rows - start).mean(0)
    if rule == "gather":
        return rows.flatten(0, 1)
    if rule in ("max", "min"):
        return rows.amax(0) if rule == "max" else rows.amin(0)
    return rows.any(0) if rule == "any" else rows[0]


class Undeclared:
    """Looks for changes of buffers without a rule, and raises `MergeError` where there is one.

    On an accelerator changes are noted on the device, which is asked at the 1st, 2nd, 4th, 8th ... look: no step waits.
    """

    def __init__(self, asked: str) -> None:
        self._asked = asked
        self._looks = 0
        self._noted: dict[tuple[str, ...], Tensor] = {}

    def look(self, found: Sequence[tuple[Origin, Tensor]], rows: bool = False) -> None:
        """Look at buffers without a rule, each beside what it is now; with `rows`, beside that of each row, stacked."""
        found = [(origin, new) for origin, new in found if origin.changed is not False and new is not origin.start]
        if not found or distributed.is_dry_run():
            return
        if rules.is_tracing() or any(origin.changed for origin, _ in found):  # in a trace, what was touched is left
            raise self._error([origin for origin, _ in found if origin.changed or rules.is_tracing()])
        self._looks += 1
        if all(new.device.type == "cpu" for _, new in found):
            changed = [origin for origin, new in found if not _equal(origin.start, new, rows)]
        else:
            changed = self._changed_on_device(found, rows)
        if changed:
            raise self._error(changed)

    def _changed_on_device(self, found: Sequence[tuple[Origin, Tensor]], rows: bool) -> list[Origin]:
        """What has changed since the device was asked last; nothing where it is not asked now."""
        names = tuple(origin.name for origin, _ in found)
        beside = [_alike(origin.start, new, rows) for origin, new in found]
        if None in beside:  # another shape
            return [origin for (origin, _), pair in zip(found, beside, strict=True) if pair is None]
        old, new = (torch.cat([_bits(x) for x in side]) for side in zip(*(p for p in beside if p), strict=True))
        noted = (old != new).any() if names not in self._noted else self._noted[names] | (old != new).any()
        self._noted[names] = noted
        if self._looks & (self._looks - 1) or not self._noted.pop(names):
            return []
        now = [
            origin
            for (origin, new), pair in zip(found, beside, strict=True)
            if pair and not torch.equal(*map(_bits, pair))
        ]
        return now or [origin for origin, _ in found]  # it was another step

    def _error(self, changed: Sequence[Origin]) -> MergeError:
        listed = ", ".join(f"{each.name!r} ({_described(each.start)})" for each in changed[:_SHOWN])
        line = ", ".join(f"{each.name!r}: {_suggested(each.start)!r}" for each in changed[:_SHOWN])
        if any(each.foreign for each in changed):
            return MergeError(
                f"lm.Aux(buffers=...) has leaves that no module returned which state.apply ran: {listed}."
                f" {self._asked} does not know how the parts make the whole batch's. Make them buffers of the module,"
                " self.register_buffer(...), or report them in metrics: lm.Sum.of(x), lm.Last(x)."
            )
        return MergeError(
            f"the loss changed a buffer that has no rule, {listed}, and {self._asked} does not know how the parts make"
            f" the whole batch's. Say it where the model is taken apart: lm.pure(net, merge={{{line}}}), or"
            f" lm.TrainState.create(net, tx, merge={{{line}}}). {_MEANINGS}."
        )


def _explain_vmap(error: RuntimeError, origins: Mapping[str, Origin]) -> None:
    """Say which buffers need a rule, where one of them could not be changed in place by rows."""
    text = str(error)
    if "there exists a Tensor `other`" not in text and "match the broadcast shape" not in text:
        return
    free = [origin for origin in origins.values() if origin.merge is None and not origin.frozen]
    if free:
        raise MergeError(
            f"{text.splitlines()[0]} The model seems to change a buffer row by row that has no rule; these have none:"
            f" {', '.join(repr(each.name) for each in free[:_SHOWN])}. Say how rows make the batch's where the model is"
            f" taken apart: lm.pure(net, merge={{{free[0].name!r}: {_suggested(free[0].start)!r}}}). {_MEANINGS}."
        ) from error


def _described(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}, {x.dtype}"


def _suggested(x: Tensor) -> MergeRule:
    if x.dtype == torch.bool:
        return "any"
    return "mean" if x.is_floating_point() and x.dim() else "sum"


def _equal(old: Tensor, new: Tensor, rows: bool) -> bool:
    """Whether two buffers are equal in all bits."""
    pair = _alike(old, new, rows)
    return pair is not None and torch.equal(_bits(pair[0]), _bits(pair[1]))


def _alike(old: Tensor, new: Tensor, rows: bool) -> tuple[Tensor, Tensor] | None:
    """Two buffers of one shape and dtype, of which `new` may have `rows`; None where they are not of one."""
    if rows:  # once, where all rows are the same memory
        new = new[:1] if not new.stride(0) else new
        old = old.expand_as(new) if old.shape == new.shape[1:] else old
    return None if old.shape != new.shape or old.dtype != new.dtype else (old, new)


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


class _Marking(threading.local):
    unwritten: dict[int, Tensor] | None = None


_marking = _Marking()


def is_marking() -> bool:
    """Whether somebody asks which buffers a module does not write to."""
    return _marking.unwritten is not None


def mark_unwritten(buffer: Tensor) -> None:
    """Say so of a buffer that a module returns."""
    assert _marking.unwritten is not None
    _marking.unwritten[id(buffer)] = buffer


class touched(TorchFunctionMode):  # noqa: N801
    """`with touched(buffers) as now:` notes which of these are written to; for traces, where values cannot tell.

    A tensor counts writes to itself and its views. Not among them are those through `.data`, whose reading counts as
    writing here, and those of norms in training mode.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        super().__init__()
        self._versions = {id(each): _torch_compat.version_of(each) for each in buffers}
        self._written: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note what no version tells."""
        kwargs = kwargs or {}
        if func == _READ_DATA or (func in _NORMS and _is_training(func, args, kwargs)):
            self._written.update(map(id, (*args, *kwargs.values())))
        return func(*args, **kwargs)

    def is_same(self, given: Tensor, now: Tensor) -> bool:
        """Whether `now` is the tensor that was given, unwritten."""
        return (
            now is given and id(now) not in self._written and _torch_compat.version_of(now) == self._versions[id(now)]
        )


_READ_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_NORMS = (F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm)


def _is_training(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a norm moves its running statistics."""
    flags = [kwargs[name] for name in ("training", "use_input_stats") if name in kwargs]
    flags += [each for each in args if isinstance(each, bool)]
    return bool(flags[0]) if flags else func in (F.instance_norm, torch.instance_norm)
