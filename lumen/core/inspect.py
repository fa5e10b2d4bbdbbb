"""`lm.inspect` shows what a step works on; `lm.check_purity` proves that it is a function."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, rules
from lumen.core.arguments import checked_first
from lumen.core.batching import add_gradients, count
from lumen.core.cached_gradient import CachedGradient
from lumen.core.device import forked_rng, module_of
from lumen.core.grad_cache import GradCache, find, name_of
from lumen.core.gradient import differentiate, normalized
from lumen.core.metrics import Mean
from lumen.core.primitives import Gradient, GradientCall
from lumen.core.rules import Next, Primitive
from lumen.core.step import StepFn, as_step, device_of
from lumen.errors import PurityError, printable


@checked_first
def inspect(step: StepFn, state: Any, batch: Any = None) -> str:
    """Print, and return, the rule stack of `step` and the leaves of `state` and `batch`.

    One line for each leaf: path, dtype, shape, device (with its sharding, for a distributed tensor) and bytes.

    >>> import lumen as lm, torch
    >>> def step(state, batch):
    ...     return state, {}
    >>> text = lm.inspect(lm.accumulate(2)(step), {"w": torch.zeros(2, 3)}, torch.zeros(4))
    lm.accumulate(2)(step)
    state: 1 tensor, 24 B
      w  float32  [2, 3]  cpu  24 B
    batch: 1 tensor, 16 B
      .  float32  [4]     cpu  16 B
    """
    lines = [repr(as_step(step)), *_table("state", state)]
    if batch is not None:
        lines += _table("batch", batch)
    text = "\n".join(lines)
    print(text)
    return text


@checked_first
def check_purity(step: StepFn, state: Any, batch: Any, *, rows: bool = False) -> None:
    """Run `step` twice on the same input, and raise `PurityError` unless it behaves as a function.

    It must leave `state` and `batch` bitwise as they were and give the same result both times. A step that draws from
    torch's global generators (dropout without `lm.seeded()`) is not pure; one that donates its state is, but
    cannot be run twice: check it without `lm.donate()`.

    With `rows`, each loss that is differentiated must be a mean over the rows of its batch, as `lm.accumulate`,
    `lm.ddp` and `lm.fsdp` take it to be: the loss of the batch is compared with that of two parts of it, weighted by
    their rows, or by the weights of an `lm.Mean`; so are the gradients. A contrastive loss, whose rows are each other's
    negatives, or the load balancing loss of a mixture of experts is no such mean. Neither is a loss through BatchNorm
    in training mode. One made by `lm.grad_cache` passes where its microbatches give the gradient of the batch, as they
    do under `lm.accumulate`. Give it the plain step, without transforms, and no dropout.

    >>> import lumen as lm, torch
    >>> lm.check_purity(lambda state, batch: (state + batch.sum(), {}), torch.zeros(()), torch.ones(3))
    >>> lm.check_purity(lambda state, batch: (state + torch.rand(()), {}), torch.zeros(()), torch.ones(3))
    Traceback (most recent call last):
        ...
    lumen.errors.PurityError: the step gave another state when it was called again with the same input. ...
    >>> def step(state, batch):
    ...     loss, _ = lm.value_and_grad(lambda w, x: (x * w).max())(state, batch)
    ...     return state, {"loss": loss}
    >>> lm.check_purity(step, torch.ones(()), torch.arange(4.0), rows=True)
    Traceback (most recent call last):
        ...
    lumen.errors.PurityError: the loss of <lambda> is no mean over the rows of its batch: it is 3 for all 4 rows, ...
    """
    arguments = (state, batch)
    before = [(path, tensor, tensor.clone()) for path, tensor in tree.named_tensors(arguments)]
    first = step(state, batch)
    for path, tensor, copy in before:
        if not _same(tensor, copy):
            raise PurityError(
                f"the step changed {_side(path)} in place. Make a changed copy instead: state.replace(...), x + 1 for"
                " x.add_(1)."
            )
    means = _Means()
    with rules.rule_context({Primitive.GRADIENT: means.rule} if rows else {}):
        second = step(state, batch)
    if tree.structure(first) != tree.structure(second):
        raise PurityError("the step returned another structure when it was called again with the same input.")
    for (path, a), (_, b) in zip(tree.named_tensors(first), tree.named_tensors(second), strict=True):
        if not _same(a, b):
            where = ("state" if path.startswith("0") else "metrics") + printable(path[1:])
            raise PurityError(
                f"the step gave another {where} when it was called again with the same input. It reads something"
                " outside its arguments: torch's global random generator (wrap it in lm.seeded(), or draw from"
                " lm.random with state.key), a global, or a module's own buffers."
            )
    if rows:
        means.check()


class _Means:
    """Whether the losses of a step are means over rows, as transforms that split a batch require."""

    def __init__(self) -> None:
        self._calls = 0
        self._error: PurityError | None = None

    def rule(self, next: Next, call: GradientCall) -> Gradient:
        if rules.is_tracing() or _torch_compat.peek_interpreter_stack() is not None:
            raise PurityError("check_purity(rows=True) compares numbers: give it the step without transforms.")
        self._calls += 1
        result: Gradient = next(call)
        if self._error is None:
            self._error = self._compared(call)
        return result

    def check(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._calls:
            raise PurityError(
                "check_purity(rows=True) found no loss: the step never calls lm.value_and_grad(loss_fn)(params, batch)."
            )

    def _compared(self, call: GradientCall) -> PurityError | None:
        size = count(call.batch)
        if size < 2:
            raise PurityError(f"check_purity(rows=True) needs a batch of at least two rows to cut; this has {size}.")
        name = getattr(call.loss_fn, "__qualname__", repr(call.loss_fn)).rpartition(".")[2]
        first = max(1, size // 3)  # of unequal sizes, so that wrong weights show too
        device = device_of(call.params)
        with forked_rng(device):
            drawn = _generators(device)
            full = _summed(call, call.batch)
            if any(not torch.equal(a, b) for a, b in zip(drawn, _generators(device), strict=True)):
                raise PurityError(
                    f"the loss of {name} draws random numbers, which differ between microbatches. Check it without"
                    " dropout: lm.check_purity(step, state.eval(), batch, rows=True)."
                )
            cache = find(call.loss_fn)
            microbatches = _microbatch_gradients(call, _in_two(call.batch, first), cache)
        grads = tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *[result.grads for result in microbatches])
        one, several = normalized(full), normalized(add_gradients(microbatches).replace(grads=grads))
        if _near(one, several, microbatches):
            return None
        differ = (
            f"it is {_loss(one):.6g} for all {size} rows, and {_loss(several):.6g} from {first} and {size - first} of"
            f" them{_grads_apart(one, several)}"
        )
        if cache is not None:
            return PurityError(
                f"{name_of(cache.encode)} does not compute each row's embeddings from that row alone, as lm.grad_cache"
                f" needs it: the loss of {cache!r}, where microbatches are encoded by themselves, is another. {differ}."
                " Does it normalize over the batch, by BatchNorm in training mode? What compares rows belongs into"
                " loss."
            )
        return PurityError(
            f"the loss of {name} is no mean over the rows of its batch: {differ}. lm.accumulate, lm.ddp and lm.fsdp"
            " would train on the second. A sum over masked tokens: return lm.Mean(total, tokens). A loss that compares"
            " rows (negatives from the batch): write it as lm.value_and_grad(lm.grad_cache(encode, loss)), which is"
            " exact under lm.accumulate, and gather rows in it by lm.all_gather under lm.ddp and lm.fsdp. Others (a"
            " balance over the batch, BatchNorm in training mode) cannot be split: see 'Losses that are no mean over"
            " rows' in the docs of accumulate."
        )


def _microbatch_gradients(call: GradientCall, batches: list[Any], cache: GradCache | None) -> list[Gradient]:
    """Summed gradients that add up to that of the batch, as a transform that splits it takes them."""
    if cache is None:
        return [_summed(call, batch) for batch in batches]
    cached = CachedGradient(cache, call)
    calls = [call.replace(batch=batch, summed=True) for batch in batches]
    for microbatch in calls:
        cached.embed(microbatch)
    result = differentiate(cached.loss_call())
    cached.receive(result.grads.embeddings)
    again = [differentiate(cached.backward_call(microbatch, index)) for index, microbatch in enumerate(calls)]
    cached.close()
    nothing = [result.replace(loss=tree.map(torch.zeros_like, result.loss), aux=None) for result in again]
    return [result.replace(grads=result.grads.params, aux=None), *nothing]


def _summed(call: GradientCall, batch: Any) -> Gradient:
    return differentiate(call.replace(summed=True, batch=batch)).replace(aux=None)


def _generators(device: torch.device) -> list[Tensor]:
    module = module_of(device)
    return [torch.get_rng_state(), *([] if module is None else [module.get_rng_state(device)])]


def _in_two(batch: Any, first: int) -> list[Any]:
    """A batch split in two, of which one has the `first` rows."""
    leaves, spec = tree.flatten(batch)
    split = [
        torch.tensor_split(x, [first])
        if isinstance(x, Tensor)
        else (np.split(x, [first]) if isinstance(x, np.ndarray) else [x] * 2)
        for x in leaves
    ]
    return [tree.unflatten(spec, column) for column in zip(*split, strict=True)]


def _loss(result: Gradient) -> float:
    loss = result.loss
    return float(loss.compute() if isinstance(loss, Mean) else loss)


def _near(one: Gradient, several: Gradient, microbatches: list[Gradient]) -> bool:
    """Whether two results are equal up to rounding, which grows with the largest of the results."""
    results = [one, *map(normalized, microbatches)]
    grads = [leaf for result in results for leaf in tree.leaves(result.grads) if leaf.numel()]
    tolerance = max((torch.finfo(leaf.dtype).eps for leaf in grads), default=0.0) ** 0.5
    largest = _largest([float(leaf.abs().max()) for leaf in grads])
    if not abs(_loss(one) - _loss(several)) <= tolerance * _largest([abs(_loss(result)) for result in results]):
        return False
    pairs = zip(tree.leaves(one.grads), tree.leaves(several.grads), strict=True)
    return all(bool(((a - b).abs() <= tolerance * largest).all()) for a, b in pairs)


def _largest(numbers: list[float]) -> float:
    """The largest finite number: a microbatch of weight zero has no loss."""
    return max(filter(math.isfinite, numbers), default=0.0)


def _grads_apart(one: Gradient, several: Gradient) -> str:
    return "" if _loss(one) != _loss(several) else ", with other gradients"


def human_bytes(count: float) -> str:
    """`count` bytes in binary units.

    >>> human_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _table(title: str, values: Any) -> list[str]:
    named = [(printable(path) or ".", t) for path, t in tree.named_tensors(values)]
    rows = [(path, _dtype(t), str(list(t.shape)), _location(t), human_bytes(_bytes(t))) for path, t in named]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    head = f"{title}: {len(rows)} tensor{'s' * (len(rows) != 1)}, {human_bytes(tree.nbytes(values))}"
    return [head, *("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _location(tensor: Tensor) -> str:
    placements = getattr(tensor, "placements", None)
    return str(tensor.device) if placements is None else f"{tensor.device} {placements}"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _side(path: str) -> str:
    return ("state" if path.startswith("0") else "batch") + printable(path[1:])
