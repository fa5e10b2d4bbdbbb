"""`Tracker`: a dispatch mode that records the memory, the operations and the collectives of a run.

The same tracker records runs on fake tensors, for plans, and real runs, for measurements.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lumen import tree
from lumen.core import _torch_compat, rules
from lumen.core.flop_formulas import formulas
from lumen.core.nested_states import train_states
from lumen.core.primitives import ApplyCall, Gradient, GradientCall, UpdateCall
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.step import StepFn
from lumen.core.tensor_proxy import TensorProxy
from lumen.planner import comm_trace
from lumen.planner.comm_trace import CollectiveCall
from lumen.planner.memory import MemoryTracker, Moment

_FIELDS = {"params": "params", "opt_state": "optimizer"}
_NO_TRAFFIC = ("empty", "new_empty", "detach", "lift_fresh", "set_", "alias", "_unsafe_view")  # move no bytes


class Work(NamedTuple):
    """One operation: its floating-point operations at `dtype`, and the bytes that it reads and writes."""

    flops: int
    nbytes: int
    dtype: torch.dtype
    stage: str
    phase: str


class Tracker(_torch_compat.TorchDispatchMode):
    """Fills `memory`, `work` and `collectives` while it is entered.

    `is_copied` says of a collective whether the backend copies its payload in memory that torch does not show.
    """

    suits_any_gradient = True  # see `lumen.core.cached_gradient.check_inside`
    only_observes = True  # so `lm.pipeline` may call its rule around the schedule

    def __init__(self, is_copied: Callable[[CollectiveCall], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_copied = is_copied
        self._pending_work: Any = None
        self.memory = MemoryTracker()
        self.work: list[Work] = []
        self.collectives: list[CollectiveCall] = []
        self.reads: list[str] = []  # the lines that read a value of a fake tensor
        counter = FlopCounterMode(display=False, custom_mapping=formulas())
        self._formulas: Mapping[Any, Any] = counter.flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._pending_work = None
        self.memory.drop_copies(_tensors(args))
        try:
            result = func(*args, **kwargs)
        except _torch_compat.DataDependentOutputException:
            return self._substitute(func, args)
        name = func.name().partition(".")[0]
        pinned = kwargs.get("pin_memory") is True
        for tensor in _tensors(result):
            self.memory.record(tensor, name, host=pinned)
        payload = comm_trace.payload(name, args, result)
        if payload is None:
            self._record_work(func, args, kwargs, result)
        else:
            self._record_collective(name, args, result, payload)
        return result

    def _record_collective(self, name: str, args: tuple[Any, ...], result: Any, payload: list[Tensor]) -> None:
        now = self.memory.now
        self.memory.claim(payload, "communication")
        call = comm_trace.collective_call(name, args, payload, now.stage, now.phase)
        self.collectives.append(call)
        work = comm_trace.work_of(result)
        if work is not None:
            self.memory.retain(work, _tensors(args))
            self._pending_work = work  # the caller does not hold it yet
        if self._is_copied(call):
            for tensor in payload:
                self.memory.add_copy(tensor, f"copy::of {call.kind}")

    def _substitute(self, func: Any, args: tuple[Any, ...]) -> Any:
        """A substitute for an unknown value: zero, or that two tensors are equal."""
        location = _caller()
        if location is not None:
            self.reads.append(location)
        if func is torch.ops.aten.equal.default:
            return True
        if func is not _torch_compat.aten_local_scalar_dense.default:
            raise _torch_compat.DataDependentOutputException(func)
        return _zero(args[0].dtype)

    def _record_work(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        formula = self._formulas.get(func.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
        if not flops and (func.is_view or _torch_compat.operation_name(func) in _NO_TRAFFIC):
            return
        read, written = _tensors((args, kwargs)), _tensors(result)
        dtype = read[0].dtype if read else written[0].dtype if written else torch.float32
        now = self.memory.now
        self.work.append(Work(flops, sum(map(_nbytes, read + written)), dtype, now.stage, now.phase))

    # ---------------------------------------------------------------------------------------- stages and phases

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record what runs inside under the stage `name`."""
        self.memory.enter(Moment(name, "", ""))
        try:
            yield
        finally:
            self.memory.now = Moment("", "", "")

    def instrument(self, user: StepFn) -> StepFn:
        """`user` with rules that record its phases and claim gradients, params and optimizer state."""

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
        """Claim the leaves of a state by its fields; frozen params, which are buffers, with the params."""
        states = [inner for _, inner in train_states(state)]
        frozen = {id(b) for s in states for name, b in s.buffers.items() if name in s.apply_fn.frozen}
        for path, tensor in tree.named_tensors(state):
            field = path.partition("[")[0].partition(".")[0]
            category = "params" if id(tensor) in frozen else _FIELDS.get(field, "other state")
            self.memory.claim([tensor], category, [path])

    def _enter_phase(self, phase: str, module: str = "") -> None:
        self.memory.now = Moment(self.memory.now.stage, phase, module)

    def _gradient(self, next: Next, call: GradientCall) -> Gradient:
        inner = call.loss_fn

        def loss_fn(params: Any, *extras: Any) -> Any:
            for leaf in tree.tensors(params):
                if leaf.requires_grad and _torch_compat.peek_interpreter_stack() is None:
                    leaf.register_hook(self._claim_gradient)
            self._enter_phase("forward")
            try:
                return inner(params, *extras)
            finally:  # a stage of `lm.pipeline` leaves the loss function by an exception
                self._enter_phase("backward")

        loss_fn.__wrapped__ = getattr(inner, "__wrapped__", inner)  # type: ignore[attr-defined]
        loss_fn.__qualname__ = getattr(inner, "__qualname__", "loss")
        result: Gradient = next(call.replace(loss_fn=loss_fn))
        self.memory.claim(tree.tensors(result.grads), "gradients")
        self._enter_phase("between")
        return result

    def _claim_gradient(self, grad: Tensor) -> None:
        self.memory.claim([grad], "gradients")

    def _update(self, next: Next, call: UpdateCall) -> Any:
        self._enter_phase("update")
        new, opt_state = result = next(call)
        self.memory.claim(tree.tensors(new), "params")
        self.memory.claim(tree.tensors(opt_state), "optimizer")
        self._enter_phase("between")
        return result

    def _apply(self, next: Next, call: ApplyCall) -> Any:
        return next(call.replace(target=call.target.variant(("tracked", self), self._add_hooks)))

    def _add_hooks(self, module: nn.Module) -> None:
        for name, submodule in module.named_modules():
            if name:
                submodule.register_forward_pre_hook(functools.partial(self._enter_module, name))
                submodule.register_forward_hook(functools.partial(self._leave_module, name))

    def __deepcopy__(self, _memo: Any) -> Tracker:
        return self  # the hooks of a copied module report to the same tracker

    def _enter_module(self, name: str, _module: nn.Module, _args: Any) -> None:
        now = self.memory.now
        self.memory.now = now._replace(module=name)

    def _leave_module(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        now = self.memory.now
        self.memory.now = now._replace(module=name.rpartition(".")[0])
        for tensor in _tensors(output):
            if not isinstance(tensor, TensorProxy) and tensor.grad_fn is not None:  # to ask a proxy would compute it
                tensor.grad_fn.register_prehook(functools.partial(self._enter_backward, name))

    def _enter_backward(self, name: str, _grads: Any) -> None:
        """The backward pass reaches the output of module `name`."""
        self.memory.now = self.memory.now._replace(module=name)


def _zero(dtype: torch.dtype) -> Any:
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    if isinstance(values, dict):
        return [tensor for value in values.values() for tensor in _tensors(value)]
    return []


def _nbytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _caller() -> str | None:
    """The user's line that reads a value; None if Lumen reads it, where zero is fine."""
    frame = sys._getframe(3)  # past this module
    while frame.f_back is not None and "torch" in frame.f_globals.get("__name__", "").split("."):
        frame = frame.f_back
    is_lumen = frame.f_globals.get("__name__", "").startswith("lumen.")
    return None if is_lumen else f"{frame.f_code.co_filename}:{frame.f_lineno}"
