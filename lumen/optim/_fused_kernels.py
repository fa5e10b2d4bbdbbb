"""What torch's list kernels need: leaves as aligned lists, of one dtype and device, in dense memory.

The fused CPU kernels walk memory from `data_ptr` and trust that every tensor of a leaf has the same
strides; on a transposed gradient they are silently wrong and on an expanded one they read past its end
(torch 2.13). So gradients are made contiguous here, and where params or moments are not, a rule takes its
plain lowering.

They never see 16-bit tensors: moments are wider than such params, and of torch's own 16-bit kernels one skips most of
what it is given (SGD on the CPU, torch 2.12 and 2.13). Such leaves are widened, some at a time, updated by the float32
kernel and rounded once. What a fused kernel of the installed torch does to float32 and float64 is tried out before
its first use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from lumen import tree
from lumen.core import distributed
from lumen.core._torch_compat import in_graph_capture
from lumen.core.dtypes import NARROW, wide_dtype
from lumen.errors import ParamsError
from lumen.optim._hyperparams import HParams, Hyper
from lumen.optim._numerics import absent

_AT_ONCE = 2**22  # entries that are widened at once


def columns(params: Any, *trees: Any) -> list[list[Tensor]]:
    """The leaves of `params` and of each other tree in the same order; an empty tuple gives an empty list."""
    if type(params) is dict and {*map(type, params.values())} == {Tensor}:  # several times faster than optree
        keys = [*params]
        found = [[*params.values()]]
        for other in trees:
            if type(other) is dict and [*other] == keys:
                found.append([*other.values()])
            elif absent(other):
                found.append([])
            else:
                break
        else:
            return found
    leaves, spec = tree.flatten(params)
    try:
        return [leaves, *[[] if absent(other) else spec.flatten_up_to(other) for other in trees]]
    except ValueError:
        lines = [line for other in trees if not absent(other) for line in tree.differences(params, other)]
        raise ParamsError(f"params and grads (or the optimizer's state) do not match: {'; '.join(lines)}.") from None


def allowed(leaves: list[Any]) -> bool:
    """Whether list kernels may run here: in eager mode, outside transforms and differentiation."""
    return eager() and {*map(type, leaves)} == {_plain()} and True not in [leaf.requires_grad for leaf in leaves]


def _plain() -> type[Tensor]:
    """The type of tensors that are not a subclass for some purpose: those of a plan stand for plain ones."""
    return FakeTensor if distributed.is_dry_run() else Tensor


def eager() -> bool:
    """Whether operations run as they are called: outside `torch.func`, `torch.compile` and `make_fx`."""
    return torch._C._functorch.peek_interpreter_stack() is None and not in_graph_capture()


def alike(params: Any, grads: Any) -> bool:
    """Whether both are flat dicts of plain tensors that agree leaf by leaf, none to be differentiated.

    This is the common case, seen in one pass; anything else is looked at thoroughly.
    """
    if type(params) is not dict or type(grads) is not dict or len(params) != len(grads):
        return False
    plain = _plain()
    for (name, p), (other, g) in zip(params.items(), grads.items(), strict=True):
        if (
            name != other
            or not (type(p) is type(g) is plain)
            or p.dtype != g.dtype
            or p.shape != g.shape
            or p.requires_grad
            or g.requires_grad
        ):
            return False
    return True


def usable(
    hyper: Hyper, hparams: HParams, params: list[Tensor], *moments: list[Tensor], trial: Trial | None = None
) -> bool:
    """Whether a kernel may run on these lists; if not, the caller takes its plain lowering."""
    if not params:
        return False
    first = params[0]
    if not first.is_cpu and (not first.is_cuda or hyper.has_tensors):  # tensors as a kernel's floats would sync
        return False
    if True in [value.requires_grad for value in hparams.values()]:
        return False
    if not all(map(Tensor.is_contiguous, params)):
        return False
    dtypes, sizes = [p.dtype for p in params], [*map(Tensor.numel, params)]
    for column in moments:
        if column and not (
            all(map(Tensor.is_contiguous, column))
            and ((kinds := [m.dtype for m in column]) == dtypes or _meet_in_float32(dtypes, kinds))
            and [*map(Tensor.numel, column)] == sizes
        ):
            return False
    return trial is None or trial.passed({*dtypes}, first.device)


def _meet_in_float32(params: list[torch.dtype], moments: list[torch.dtype]) -> bool:
    """Whether each moment is as wide as its param, or both are computed with in float32."""
    pairs = zip(params, moments, strict=True)
    return all(p == m or (p in NARROW and wide_dtype(m) == torch.float32) for p, m in pairs)


class Trial:
    """Whether a fused kernel of the installed torch does what it should, tried on first use for each dtype and device.

    `rules` are examples of rules whose fused lowering calls it. Two steps of each are compared with the plain lowering
    in float64.
    """

    def __init__(self, rules: Callable[[], Iterable[Any]]) -> None:
        self._rules = rules
        self._results: dict[tuple[torch.dtype, str], bool] = {}

    def passed(self, dtypes: Iterable[torch.dtype], device: torch.device) -> bool:
        """Whether the kernel may be used for leaves of all these dtypes."""
        return all(self._passed((dtype, device.type), device) for dtype in dtypes)

    def _passed(self, key: tuple[torch.dtype, str], device: torch.device) -> bool:
        result = self._results.get(key)
        if result is None:
            # A plan's tensors have no numbers, and a graph that is captured cannot wait for them.
            if distributed.is_dry_run() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                return True
            self._results[key] = result = True  # while it is tried
            try:
                with _disable_current_modes():  # whoever counts operations or memory counts the user's
                    result = all(_works(rule, wide_dtype(key[0]), device) for rule in self._rules())
            finally:
                del self._results[key]
            self._results[key] = result
        return result


def _works(rule: Any, dtype: torch.dtype, device: torch.device) -> bool:
    sizes = (1, 17, 4097)  # less than a vector of entries, one and a rest, many blocks and a rest
    exact = {str(n): torch.linspace(-1.0, 1.0, n, dtype=torch.float64, device="cpu") for n in sizes}
    grads = {name: 0.5 - p for name, p in exact.items()}
    given = {name: g.to(device, dtype) for name, g in grads.items()}
    params = {name: p.to(device, dtype, copy=True) for name, p in exact.items()}
    state, exact_state = rule.init(params), rule.init(exact)
    for _ in range(2):
        state = rule.fused(given, state, params, None)
        updates, exact_state = rule.update(grads, exact_state, exact)
        exact = {name: p + updates[name] for name, p in exact.items()}
    tolerance = math.sqrt(torch.finfo(dtype).eps)
    return all(
        torch.allclose(p.cpu().double(), exact[name], rtol=tolerance, atol=tolerance) for name, p in params.items()
    )


def foreach_usable(hyper: Hyper, hparams: HParams, params: list[Tensor], *moments: list[Tensor]) -> bool:
    """Whether an in-place foreach lowering may run and pays: on the CPU.

    It takes its scalars as Python numbers, which elsewhere would wait for the device.
    """
    return usable(hyper, hparams, params, *moments) and params[0].is_cpu


class FusedArgsCache:
    """The params and moments of one state as lists that a kernel may use, remembered with that state.

    A donated state keeps its dicts and tensors from step to step. Looking at all of them again would cost as much as a
    small kernel; that each is still the same object is seen at once.
    """

    __slots__ = ("_flat", "lists")
    _KEY = "_held"

    def __init__(self, lists: list[list[Tensor]]) -> None:
        self.lists = lists
        self._flat = [leaf for column in lists for leaf in column]

    @classmethod
    def of(cls, trial: Trial, hyper: Hyper, state: Any, params: Any, *moments: Any) -> FusedArgsCache | None:
        """What `state` remembers if it still holds, else what is found now; None where no kernel may run."""
        remembered: FusedArgsCache | None = state.__dict__.get(cls._KEY)
        if remembered is not None and remembered._holds(params, *moments):
            return remembered
        lists = columns(params, *moments)
        if not usable(hyper, state.hparams, *lists, trial=trial):
            return None
        held = state.__dict__[cls._KEY] = cls(lists)
        return held

    def _holds(self, *trees: Any) -> bool:
        found: list[Tensor] = []
        for each in trees:
            if type(each) is dict:
                found += each.values()
            elif not absent(each):
                return False
        return len(found) == len(self._flat) and all(map(is_, found, self._flat))


def aligned(params: Any, grads: Any) -> list[Tensor]:
    """The gradients in the order of the params, in memory that a kernel may walk."""
    return contiguous(columns(params, grads)[1])


def contiguous(grads: list[Tensor]) -> list[Tensor]:
    """The same gradients, in memory that a kernel may walk."""
    return grads if all(map(Tensor.is_contiguous, grads)) else [g.contiguous() for g in grads]


def batches(
    lists: Sequence[list[Tensor]], labels: Hashable | list[Any] = None
) -> Iterator[tuple[Any, Sequence[list[Tensor]]]]:
    """`lists` cut into batches of one label, dtype and device of the first list, as `(label, lists)`.

    The lists are params, grads and then moments. `labels` is one label for all, or a list of one for each leaf. For
    16-bit params a batch is a copy in float32, which is written back, but for the grads, when the next is asked for.
    """
    first = lists[0]
    keys: list[Hashable] = [(leaf.dtype, leaf.get_device()) for leaf in first]
    if isinstance(labels, list):
        keys = list(zip(keys, labels, strict=True))
    elif keys.count(keys[0]) == len(keys):
        if first[0].dtype in NARROW:
            yield from _widened(labels, lists)
        else:
            yield labels, lists
        return
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    for indices in groups.values():
        label = labels[indices[0]] if isinstance(labels, list) else labels
        batch = [[column[i] for i in indices] if column else [] for column in lists]
        if batch[0][0].dtype in NARROW:
            yield from _widened(label, batch)
        else:
            yield label, batch


def _widened(label: Any, lists: Sequence[list[Tensor]]) -> Iterator[tuple[Any, Sequence[list[Tensor]]]]:
    """`lists` in float32, some leaves at a time, and what the caller made of them, rounded, in their place."""
    for some in _portions([leaf.numel() for leaf in lists[0]]):
        part = [column[some] for column in lists]
        wide = [[leaf.to(torch.float32) for leaf in column] for column in part]
        yield label, wide
        for place, (column, made) in enumerate(zip(part, wide, strict=True)):
            changed = [(old, new) for old, new in zip(column, made, strict=True) if old is not new]
            if changed and place != 1:
                torch._foreach_copy_([old for old, _ in changed], [new for _, new in changed])


def _portions(sizes: list[int]) -> Iterator[slice]:
    """Runs of leaves with no more than `_AT_ONCE` entries together, or of one leaf."""
    begin = total = 0
    for place, size in enumerate(sizes):
        if place > begin and total + size > _AT_ONCE:
            yield slice(begin, place)
            begin, total = place, 0
        total += size
    yield slice(begin, len(sizes))


def advance(count: Tensor, skip: Tensor | None) -> Tensor:
    """Count one update in place, unless skipped; the count as a scalar that the kernels read (any dtype on the CPU)."""
    if skip is not None:
        count.add_(~skip)
    elif count.is_cpu:
        count.fill_(int(count) + 1)  # a third of the time of add_
    else:
        count.add_(1)
    return count if count.is_cpu else count.to(torch.float32)


def scalars(leaf: Tensor, lr: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`(lr, found_inf)` as the kernels read them beside `leaf`: on its device, and in float32.

    On the CPU they take a learning rate in float64. Where `found_inf` is 1 they leave everything as it is.
    """
    if leaf.is_cpu:
        return lr, None if skip is None else skip.to(torch.float32)
    device = leaf.device
    return lr.to(device, torch.float32), None if skip is None else skip.to(device, torch.float32)


def steps(leaves: list[Tensor], count: Tensor) -> list[Tensor]:
    """The number of the update once for each leaf, as the kernels read it."""
    if not leaves[0].is_cpu:
        count = count.to(leaves[0].device, torch.float32)
    return [count] * len(leaves)


def kept(old: HParams, new: HParams, skip: Tensor | None) -> HParams:
    """`new` hyperparameters, or `old` where skipped."""
    return new if skip is None or new is old else tree.select(skip, old, new)
