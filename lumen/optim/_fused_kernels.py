"""Prepare leaves for torch's list kernels: aligned lists of one dtype and device, in dense memory.

The fused CPU kernels read memory consecutively from `data_ptr` and assume that every tensor of a leaf has the same
strides. With a transposed gradient they are silently wrong, and with an expanded one they read past its end
(torch 2.13). So gradients are made contiguous here, and if params or moments are not contiguous, a rule uses its
plain lowering.

The kernels never get 16-bit tensors: moments are wider than such params, and torch's 16-bit SGD kernel on the CPU skips
most entries (torch 2.12 and 2.13). Such leaves are widened, a chunk at a time, updated by the float32
kernel and rounded once. Each fused kernel of the installed torch is tested in float32 and float64 before its first use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, distributed
from lumen.core._torch_compat import make_fx_mode
from lumen.core.dtypes import NARROW, wide_dtype
from lumen.errors import ParamsError
from lumen.optim._hyperparams import HParams, Hyper
from lumen.optim._numerics import absent
from lumen.optim._quantized import Quantized

_requires_grad, _dtype, _is_cpu = attrgetter("requires_grad"), attrgetter("dtype"), attrgetter("is_cpu")
_CHUNK_SIZE = 2**22  # entries that are widened together


def columns(params: Any, *trees: Any) -> list[list[Tensor]]:
    """The leaves of `params` and of each other tree in the same order; an empty tuple gives an empty list."""
    if type(params) is dict and {*map(type, params.values())} == {Tensor}:  # several times faster than optree
        keys = [*params]
        lists = [[*params.values()]]
        for other in trees:
            if type(other) is dict and [*other] == keys:
                lists.append([*other.values()])
            elif type(other) is tuple and not other:
                lists.append([])
            else:
                break
        else:
            return lists
    leaves, spec = tree.flatten(params)
    try:
        return [leaves, *[[] if absent(other) else spec.flatten_up_to(other) for other in trees]]
    except ValueError:
        lines = [line for other in trees if not absent(other) for line in tree.differences(params, other)]
        raise ParamsError(f"params and grads (or the optimizer's state) do not match: {'; '.join(lines)}.") from None


def allowed(leaves: list[Any]) -> bool:
    """Whether list kernels may run here: in eager mode, outside transforms and differentiation."""
    kinds = {*map(type, leaves)}
    return len(kinds) == 1 and eager() and _is_plain(*kinds) and not any(map(_requires_grad, leaves))


def readable_on_host(leaves: list[Any]) -> bool:
    """Whether list kernels may run here with numbers read from the leaves, which costs nothing on the CPU."""
    return allowed(leaves) and all(map(_is_cpu, leaves))


def _is_plain(kind: type) -> bool:
    """Whether this is the type of ordinary tensors; in a dry run, fake tensors take their role."""
    return kind is Tensor or (kind is _torch_compat.FakeTensor and distributed.is_dry_run())


def eager() -> bool:
    """Whether operations run immediately: outside `torch.func`, `torch.compile` and `make_fx`."""
    return (
        _torch_compat.peek_interpreter_stack() is None and not torch.compiler.is_compiling() and make_fx_mode() is None
    )


def alike(params: Any, grads: Any) -> bool:
    """Whether both are flat dicts of plain tensors that match leaf by leaf and do not require gradients.

    This is the common case, checked in one pass; callers check anything else in detail.
    """
    if type(params) is not dict or type(grads) is not dict or len(params) != len(grads):
        return False
    kind: type[Any] = Tensor
    for (name, p), (other, g) in zip(params.items(), grads.items(), strict=True):
        if type(p) is not kind and _is_plain(type(p)):
            kind = type(p)
        if (
            name != other
            or not (type(p) is type(g) is kind)
            or p.dtype != g.dtype
            or p.shape != g.shape
            or p.requires_grad
            or g.requires_grad
        ):
            return False
    return True


def usable(
    hyper: Hyper,
    hparams: HParams,
    params: list[Tensor],
    *moments: list[Any],
    trial: Trial | None = None,
    low_bit: bool = False,
) -> bool:
    """Whether a kernel may run on these lists; if not, the caller uses its plain lowering.

    With `low_bit` the caller reads moments of fewer bits into float32 for it.
    """
    if not params:
        return False
    first = params[0]
    if not first.is_cpu and (not first.is_cuda or hyper.has_tensors):  # reading tensors as floats would synchronize
        return False
    if any(map(_requires_grad, hparams.values())):
        return False
    if not all(map(Tensor.is_contiguous, params)):
        return False
    dtypes, sizes = [*map(_dtype, params)], [*map(Tensor.numel, params)]
    for column in moments:
        if Quantized in {*map(type, column)}:
            column = [leaf.codes if isinstance(leaf, Quantized) else leaf for leaf in column]
        if column and not (
            all(map(Tensor.is_contiguous, column))
            and ((kinds := [*map(_dtype, column)]) == dtypes or _compute_in_float32(dtypes, kinds, low_bit))
            and [*map(Tensor.numel, column)] == sizes
        ):
            return False
    return trial is None or trial.passed({*dtypes}, first.device)


def _compute_in_float32(params: list[torch.dtype], moments: list[torch.dtype], low_bit: bool) -> bool:
    """Whether each moment has its param's dtype, or both are computed with in float32."""
    pairs = zip(params, moments, strict=True)
    copied = (*NARROW, torch.float32) if low_bit else NARROW
    return all(p == m or (p in copied and wide_dtype(m) == torch.float32) for p, m in pairs)


class Trial:
    """Whether a fused kernel of the installed torch is correct, tested on first use for each dtype and device.

    `rules` returns examples of rules whose fused lowering calls the kernel. Two steps of each are compared with the
    plain lowering in float64.
    """

    def __init__(self, rules: Callable[[], Iterable[Any]]) -> None:
        self._rules = rules
        self._results: dict[tuple[torch.dtype, str], bool] = {}

    def passed(self, dtypes: Iterable[torch.dtype], device: torch.device) -> bool:
        """Whether the kernel may be used for leaves of all these dtypes."""
        for dtype in dtypes:
            result = self._results.get((dtype, device.type))
            if not (self._try((dtype, device.type), device) if result is None else result):
                return False
        return True

    def _try(self, key: tuple[torch.dtype, str], device: torch.device) -> bool:
        # Fake tensors have no values, and CUDA graph capture cannot synchronize to read them.
        if distributed.is_dry_run() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return True
        self._results[key] = result = True  # during the test
        try:
            with _torch_compat.disable_current_modes():  # modes that count operations must not count these
                result = all(_works(rule, wide_dtype(key[0]), device) for rule in self._rules())
        except NotImplementedError:  # this torch lacks the kernel for the device, as older ones lack Adagrad's on CUDA
            result = False
        finally:
            del self._results[key]
        self._results[key] = result
        return result


def _works(rule: Any, dtype: torch.dtype, device: torch.device) -> bool:
    sizes = (1, 17, 4097)  # less than one SIMD vector, one and a remainder, many blocks and a remainder
    exact = {str(n): torch.linspace(-1.0, 1.0, n, dtype=torch.float64, device="cpu") for n in sizes}
    grads = {name: 0.5 - p for name, p in exact.items()}
    device_grads = {name: g.to(device, dtype) for name, g in grads.items()}
    params = {name: p.to(device, dtype, copy=True) for name, p in exact.items()}
    state, exact_state = rule.init(params), rule.init(exact)
    for _ in range(2):
        state = rule.fused(device_grads, state, params, None)
        updates, exact_state = rule.update(grads, exact_state, exact)
        exact = {name: p + updates[name] for name, p in exact.items()}
    tolerance = math.sqrt(torch.finfo(dtype).eps)
    return all(
        torch.allclose(p.cpu().double(), exact[name], rtol=tolerance, atol=tolerance) for name, p in params.items()
    )


def foreach_usable(
    hyper: Hyper, hparams: HParams, params: list[Tensor], *moments: list[Any], low_bit: bool = False
) -> bool:
    """Whether an in-place foreach lowering may run and is worthwhile: on the CPU.

    Its scalars are Python numbers, and reading them would synchronize with an accelerator.
    """
    return usable(hyper, hparams, params, *moments, low_bit=low_bit) and params[0].is_cpu


class FusedArgsCache:
    """The params and moments of one state as lists for a kernel, cached on that state.

    A donated state keeps its dicts and tensors from step to step. Checking all of them again would cost as much as a
    small kernel; comparing identities is cheap.
    """

    __slots__ = ("_flat", "lists")
    _KEY = "_fused_args"

    def __init__(self, lists: list[list[Tensor]]) -> None:
        self.lists = lists
        self._flat = [*chain.from_iterable(lists)]

    @classmethod
    def of(
        cls, trial: Trial, hyper: Hyper, state: Any, params: Any, *moments: Any, low_bit: bool = False
    ) -> FusedArgsCache | None:
        """The cache of `state` if it is still valid, or a new one; None if no kernel may run."""
        cached: FusedArgsCache | None = state.__dict__.get(cls._KEY)
        if cached is not None and cached._matches(params, *moments):
            return cached
        lists = columns(params, *moments)
        if not usable(hyper, state.hparams, *lists, trial=trial, low_bit=low_bit):
            return None
        cache = state.__dict__[cls._KEY] = cls(lists)
        return cache

    def _matches(self, *trees: Any) -> bool:
        leaves: list[Tensor] = []
        for values in trees:
            if type(values) is dict:
                leaves += values.values()
            elif type(values) is not tuple or values:
                return False
        return len(leaves) == len(self._flat) and all(map(is_, leaves, self._flat))


def aligned(params: Any, grads: Any) -> list[Tensor]:
    """The gradients in the order of the params, contiguous in memory."""
    leaves = columns(params, grads)[1]
    return leaves if all(map(Tensor.is_contiguous, leaves)) else [g.contiguous() for g in leaves]


def contiguous(grads: list[Tensor]) -> list[Tensor]:
    """The same gradients, contiguous in memory."""
    return grads if all(map(Tensor.is_contiguous, grads)) else [g.contiguous() for g in grads]


def batches(
    lists: Sequence[list[Tensor]], labels: Hashable | list[Any] = None
) -> Iterator[tuple[Any, Sequence[list[Tensor]]]]:
    """`lists` in batches with one label, dtype and device (of the first list), as `(label, lists)`.

    The lists are params, grads and then moments. `labels` is one label for all, or a list with one label per leaf. For
    16-bit params a batch is a float32 copy. When the next batch is requested, it is written back, except for the grads.
    """
    first = lists[0]
    keys: list[Hashable] = [*zip(map(_dtype, first), map(Tensor.get_device, first), strict=True)]
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
    """`lists` in float32, a chunk of leaves at a time; the caller's changes are rounded and written back."""
    for chunk in _chunks([leaf.numel() for leaf in lists[0]]):
        narrow = [column[chunk] for column in lists]
        wide = [[leaf.to(torch.float32) for leaf in column] for column in narrow]
        yield label, wide
        for index, (column, wide_column) in enumerate(zip(narrow, wide, strict=True)):
            changed = [(old, new) for old, new in zip(column, wide_column, strict=True) if old is not new]
            if changed and index != 1:
                _torch_compat.foreach_copy_([old for old, _ in changed], [new for _, new in changed])


def _chunks(sizes: list[int]) -> Iterator[slice]:
    """Slices of consecutive leaves with no more than `_CHUNK_SIZE` entries in total, or of one leaf."""
    begin = total = 0
    for index, size in enumerate(sizes):
        if index > begin and total + size > _CHUNK_SIZE:
            yield slice(begin, index)
            begin, total = index, 0
        total += size
    yield slice(begin, len(sizes))


def scalar_arguments(hyper: Hyper, state: Any) -> tuple[tuple[float, ...], Tensor, HParams]:
    """The hyperparameters but the learning rate as numbers; that rate; and the `hparams` of the next state."""
    hparams = state.hparams
    numbers = hyper.numbers(hparams) if hyper.has_tensors else hyper.constants
    lr, hparams = (hparams["lr"], hparams) if hyper.schedule is None else hyper.eager_lr(state.count, hparams)
    return numbers, lr, hparams


def advance(count: Tensor, skip: Tensor | None) -> Tensor:
    """Count one update in place, unless skipped, and return the count as the kernels need it.

    On the CPU they read any dtype.
    """
    if skip is not None:
        count.add_(~skip)
    elif count.is_cpu:
        count.fill_(int(count) + 1)  # takes a third of the time of add_
    else:
        count.add_(1)
    return count if count.is_cpu else count.to(torch.float32)


def scalars(leaf: Tensor, lr: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`(lr, found_inf)` as the kernels need them for `leaf`: on its device, in float32.

    On the CPU they accept a learning rate in float64. If `found_inf` is 1, they change nothing.
    """
    if leaf.is_cpu:
        return lr, None if skip is None else skip.to(torch.float32)
    device = leaf.device
    return lr.to(device, torch.float32), None if skip is None else skip.to(device, torch.float32)


def steps(leaves: list[Tensor], count: Tensor) -> list[Tensor]:
    """The update count, repeated for each leaf, as the kernels need it."""
    if not leaves[0].is_cpu:
        count = count.to(leaves[0].device, torch.float32)
    return [count] * len(leaves)


def select_hparams(old: HParams, new: HParams, skip: Tensor | None) -> HParams:
    """The `new` hyperparameters, or the `old` ones where the update is skipped."""
    return new if skip is None or new is old else tree.select(skip, old, new)
