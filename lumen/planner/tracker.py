"""`Watch`: what a run does, seen where torch dispatches its operations: memory, work, and collectives.

The same watch is laid over a run on fake tensors, which is a plan, and over a real one, which is a measurement.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lumen import tree
from lumen.core import rules
from lumen.core.flops import cpu_attention
from lumen.core.primitives import ApplyCall, Gradient, GradientCall, UpdateCall
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.step import StepFn
from lumen.planner import comm_trace
from lumen.planner.comm_trace import Sent
from lumen.planner.memory import Memory, Moment

_FIELDS = {"params": "params", "opt_state": "optimizer"}
_FREE = ("empty", "new_empty", "detach", "lift_fresh", "set_", "alias", "_unsafe_view")  # move no bytes


class Work(NamedTuple):
    """One operation: its floating point operations at `dtype`, and the bytes that it reads and writes."""

    flops: int
    nbytes: int
    dtype: torch.dtype
    stage: str
    phase: str


class Watch(TorchDispatchMode):
    """Fills `memory`, `work` and `sent` while it is entered.

    `copied` are the kinds of collectives for which the backend copies what they carry, where nobody sees it.
    """

    suits_any_gradient = True  # see `lumen.core.cached_gradient.check_inside`

    def __init__(self, copied: Collection[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copied = copied
        self._going: Any = None
        self.memory = Memory()
        self.work: list[Work] = []
        self.sent: list[Sent] = []
        self.reads: list[str] = []  # where the run read a value from a tensor without one
        counter = FlopCounterMode(display=False, custom_mapping=cpu_attention())
        self._formulas: Mapping[Any, Any] = counter.flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._going = None
        if self._copied:
            self.memory.touched(_tensors(args))
        try:
            out = func(*args, **kwargs)
        except DataDependentOutputException:
            return self._unknown(func, args)
        name = func.name().partition(".")[0]
        for tensor in _tensors(out):
            self.memory.see(tensor, name)
        carried = comm_trace.payload(name, args, out)
        if carried is None:
            self._count(func, args, kwargs, out)
        else:
            self._send(name, args, out, carried)
        return out

    def _send(self, name: str, args: tuple[Any, ...], out: Any, carried: list[Tensor]) -> None:
        now = self.memory.now
        self.memory.claim(carried, "communication")
        sent = comm_trace.read(name, args, carried, now.stage, now.phase)
        self.sent.append(sent)
        work = comm_trace.work_of(out)
        if work is not None:
            self.memory.lend(work, _tensors(args))
            self._going = work  # nobody else has it before the caller does
        if sent.kind in self._copied:
            for tensor in carried:
                self.memory.copied(tensor, f"copy::of {sent.kind}")

    def _unknown(self, func: Any, args: tuple[Any, ...]) -> Any:
        """A number for one that nobody knows: zero, or that two tensors are equal."""
        place = _caller()
        if place is not None:
            self.reads.append(place)
        if func is torch.ops.aten.equal.default:
            return True
        if func is not torch.ops.aten._local_scalar_dense.default:
            raise DataDependentOutputException(func)
        return _zero(args[0].dtype)

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        formula = self._formulas.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        if not flops and (func.is_view or func._opname in _FREE):
            return
        read, written = _tensors((args, kwargs)), _tensors(out)
        dtype = read[0].dtype if read else written[0].dtype if written else torch.float32
        now = self.memory.now
        self.work.append(Work(flops, sum(map(_nbytes, read + written)), dtype, now.stage, now.phase))

    # ---------------------------------------------------------------------------------------- stages and phases

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Everything inside belongs to the stage `name`."""
        self.memory.enter(Moment(name, "", ""))
        try:
            yield
        finally:
            self.memory.now = Moment("", "", "")

    def watched(self, user: StepFn) -> StepFn:
        """The step, telling its phases, and what is gradient, state and batch."""

        @functools.wraps(user)
        def step(state: Any, batch: Any) -> tuple[Any, Any]:
            handlers: dict[Primitive, Rule] = {
                Primitive.APPLY: self._apply,
                Primitive.GRADIENT: self._gradient,
                Primitive.UPDATE: self._update,
            }
            with rules.rule_context(handlers):
                return user(state, batch)

        return step

    def claim_state(self, state: Any) -> None:
        """What the leaves of a state are for."""
        for path, tensor in tree.named_tensors(state):
            field = path.partition("[")[0].partition(".")[0]
            self.memory.claim([tensor], _FIELDS.get(field, "other state"), [path])

    def _at(self, phase: str, module: str = "") -> None:
        self.memory.now = Moment(self.memory.now.stage, phase, module)

    def _gradient(self, next: Next, call: GradientCall) -> Gradient:
        inner = call.loss_fn

        def loss_fn(params: Any, *rest: Any) -> Any:
            for leaf in tree.tensors(params):
                if leaf.requires_grad and torch._C._functorch.peek_interpreter_stack() is None:
                    leaf.register_hook(self._ready)
            self._at("forward")
            out = inner(params, *rest)
            self._at("backward")
            return out

        loss_fn.__wrapped__ = getattr(inner, "__wrapped__", inner)  # type: ignore[attr-defined]
        loss_fn.__qualname__ = getattr(inner, "__qualname__", "loss")
        answer: Gradient = next(call.replace(loss_fn=loss_fn))
        self.memory.claim(tree.tensors(answer.grads), "gradients")
        self._at("between")
        return answer

    def _ready(self, grad: Tensor) -> None:
        self.memory.claim([grad], "gradients")

    def _update(self, next: Next, call: UpdateCall) -> Any:
        self._at("update")
        new, opt_state = answer = next(call)
        self.memory.claim(tree.tensors(new), "params")
        self.memory.claim(tree.tensors(opt_state), "optimizer")
        self._at("between")
        return answer

    def _apply(self, next: Next, call: ApplyCall) -> Any:
        return next(call.replace(target=call.target.variant(("watched", self), self._hooked)))

    def _hooked(self, module: nn.Module) -> None:
        for name, each in module.named_modules():
            if name:
                each.register_forward_pre_hook(functools.partial(self._entered, name))
                each.register_forward_hook(functools.partial(self._left, name))

    def __deepcopy__(self, _memo: Any) -> Watch:
        return self  # a skeleton's copies tell the same watch

    def _entered(self, name: str, _module: nn.Module, _args: Any) -> None:
        now = self.memory.now
        self.memory.now = now._replace(module=name)

    def _left(self, name: str, _module: nn.Module, _args: Any, out: Any) -> None:
        now = self.memory.now
        self.memory.now = now._replace(module=name.rpartition(".")[0])
        for tensor in _tensors(out):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(functools.partial(self._back, name))

    def _back(self, name: str, _grads: Any) -> None:
        """The backward pass comes to where this module's output was made."""
        self.memory.now = self.memory.now._replace(module=name)


def _zero(dtype: torch.dtype) -> Any:
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for each in values for tensor in _tensors(each)]
    if isinstance(values, dict):
        return [tensor for each in values.values() for tensor in _tensors(each)]
    return []


def _nbytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _caller() -> str | None:
    """The line of the user's that reads a value; None where it is Lumen's own, which zero suits."""
    frame = sys._getframe(3)  # past this module
    while frame.f_back is not None and "torch" in frame.f_globals.get("__name__", "").split("."):
        frame = frame.f_back
    own = frame.f_globals.get("__name__", "").startswith("lumen.")
    return None if own else f"{frame.f_code.co_filename}:{frame.f_lineno}"
