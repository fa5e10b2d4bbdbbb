"""The three primitives as data: what a rule receives, and what it returns; and loss functions that a rule wraps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from torch import Tensor

from lumen.core.pytree_dataclass import dataclass as pytree_dataclass

if TYPE_CHECKING:
    from lumen.core.grad_sums import GradSums
    from lumen.core.metrics import Mean
    from lumen.errors import LossError

LossFn = Callable[..., Any]


@pytree_dataclass
class Aux:
    """What a loss function returns beside its loss: new `buffers`, and `metrics` (a dict of typed values).

    Transforms that split a batch merge both: metrics by their type, buffers by their rules (see `lm.pure`).

    >>> import lumen as lm, torch
    >>> def loss_fn(params, x):
    ...     return (x * params["w"]).mean(), lm.Aux(metrics={"largest": lm.Max.of(x)})
    >>> params = {"w": torch.tensor(3.0)}
    >>> (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(params, torch.tensor([1.0, 2.0]))
    >>> aux.metrics["largest"].compute(), grads["w"]
    (tensor(2.), tensor(1.5000))
    """

    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Optimizer(Protocol):
    """What UPDATE needs of an optimizer: see `lumen.optim.GradientTransformation`."""

    def init(self, params: Any) -> Any:
        """The optimizer's state for `params`."""

    def apply(
        self, grads: Any, state: Any, params: Any, *, skip: Tensor | None = None, donate: bool = False
    ) -> tuple[Any, Any]:
        """The next params and optimizer state."""


class Reduction(Protocol):
    """How a parallel transform reduces gradients over processes, right after the engine has computed them.

    A rule that computes one result from several calls removes it from these (`reduction=None`) and reduces the sum
    itself, so that there is one reduction for an update. `rows` is the number of rows of this process; where it is 0,
    its batch is a dummy. Where a call contains collectives (`in_backward`), all processes must make equally many calls.
    """

    rows: int
    in_backward: bool

    def register_hooks(self, live: Sequence[Tensor]) -> None:
        """Called before the backward pass with the leaves that are differentiated, in the order of params."""

    def finish(self, result: Gradient, independent: LossError | None = None) -> Gradient:
        """The summed result of all processes, from this one's.

        `independent` is raised, on every process, where no process's loss depends on the params.
        """

    def max_over_ranks(self, number: int) -> int:
        """The largest `number` of all processes."""

    def zero_weight_call(self, call: GradientCall) -> GradientCall:
        """`call` with weight zero, for a process that has run out of microbatches before the others."""


class Norms(Protocol):
    """The L2 norms of some leaves."""

    def of(self, leaves: list[Any]) -> Tensor | None:
        """The norms as a vector, if they are those of `leaves` in their current version."""


@dataclass(slots=True)
class _Call:
    """Base of calls and results. By convention never changed, but not frozen: that would triple their cost."""

    _fields: ClassVar[Callable[[Any], tuple[Any, ...]]]  # the values of an instance, by one call into C

    def __init_subclass__(cls) -> None:
        if cls.__slots__:  # not yet on the class that the decorator makes this one of
            cls._fields = attrgetter(*cls.__slots__)

    def replace(self, **changes: Any) -> Self:
        """A changed copy."""
        kind = type(self)
        new = kind(*kind._fields(self))
        for name, value in changes.items():
            setattr(new, name, value)
        return new


@dataclass(slots=True)
class ApplyCall(_Call):
    """APPLY: run the module `target` on `args`, `kwargs`. Result: `(out, new_buffers)`."""

    target: Any
    params: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(slots=True)
class GradientCall(_Call):
    """GRADIENT: differentiate `loss_fn(params, batch, *extras)` in `params`. Result: `Gradient`.

    With `summed`, the result's loss and grads are sums over the batch, with the loss's weight beside them, so that
    the results for microbatches add up to the result for the batch. A `reduction` makes the result that of all
    processes before the engine returns it, and requires `summed`.
    """

    loss_fn: LossFn
    params: Any
    batch: Any
    extras: tuple[Any, ...] = ()
    has_aux: bool = False
    summed: bool = False
    engine: str = "auto"
    reduction: Reduction | None = None
    grad_sums: GradSums | None = None


@dataclass(slots=True)
class Gradient(_Call):
    """The result of GRADIENT.

    `loss` is what the user's function returned (a `Mean` or a scalar); when summed, always a `Mean` whose total is
    what `grads` are the gradients of, with `scalar` recording which of the two it was. `is_global` marks the result of
    all processes; otherwise it covers the rows of this process alone.
    """

    loss: Mean | Tensor
    grads: Any
    aux: Any = None
    scalar: bool = False
    rows: int | None = None
    is_global: bool = False


@dataclass(slots=True)
class UpdateCall(_Call):
    """UPDATE: move `params` by `grads`. Result: `(params, opt_state)`.

    `skip` is None or a boolean scalar tensor: where true, params and optimizer state stay as they are. `norms` are of
    leaves that an outer rule has seen: ask it for those of `grads`, which it has if the leaves are unchanged.
    """

    tx: Any
    grads: Any
    opt_state: Any
    params: Any
    skip: Tensor | None = None
    donate: bool = False
    norms: Norms | None = None

    def skipping(self, bad: Tensor) -> Self:
        """The call skipped where `bad` is true as well as where it was."""
        return self.replace(skip=bad if self.skip is None else bad | self.skip)


class WrappedLoss:
    """`run`, which calls `loss_fn`; `again(other)` is the same transform around another function.

    An object and no function with attributes: `functools.wraps` would copy these to a wrapper that does more.
    """

    def __init__(self, loss_fn: LossFn, run: LossFn, again: Callable[[LossFn], LossFn]) -> None:
        self.__wrapped__ = loss_fn
        self.__qualname__ = getattr(loss_fn, "__qualname__", "loss")
        self._run = run
        self._again = again

    def __call__(self, *args: Any) -> Any:
        """What `run` returns."""
        return self._run(*args)

    def around(self, other: LossFn) -> LossFn:
        """`other` with everything around it that is around the user's loss function."""
        return self._again(rewrapped(self.__wrapped__, other))


def rewrapped(loss_fn: LossFn, other: LossFn) -> LossFn:
    """`other` in the place of the function at the core of `loss_fn`."""
    return loss_fn.around(other) if isinstance(loss_fn, WrappedLoss) else other


def unwrapped(loss_fn: LossFn) -> LossFn:
    """The function at the core of `loss_fn`, as far as it can be replaced."""
    while isinstance(loss_fn, WrappedLoss):
        loss_fn = loss_fn.__wrapped__
    return loss_fn


def user_loss(loss_fn: Any) -> Any:
    """The user's own loss function, inside of wrappers of any kind: by its code losses are told apart."""
    while hasattr(loss_fn, "__wrapped__"):
        loss_fn = loss_fn.__wrapped__
    return loss_fn
