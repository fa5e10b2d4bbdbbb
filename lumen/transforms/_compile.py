"""`lm.compile`: the whole step, gradient and optimizer included, compiled into one graph.

As with `jax.jit`, the step is traced once for each structure, shape and dtype of its input, by `make_fx` over fake
tensors, and TorchInductor compiles the graph. The graph contains no Python: calling it costs a flatten and a dictionary
look-up, where `torch.compile` evaluates guards on every module and dict that the step touches.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lumen.core import _torch_compat, rules
from lumen.core.rules import Primitive
from lumen.core.step import Step, StepFn, Transform, as_step
from lumen.errors import DonatedError, GraphBreakWarning, HyperparameterError, InexactWarning, LumenError, OrderError
from lumen.transforms._compile_blocks import Blocks
from lumen.transforms._support.compiled_graph import CompiledGraph, cacheable, summary_of
from lumen.transforms._support.input_signature import GraphKey, describe_changes, sign_batch, sign_state
from lumen.transforms._support.module_patterns import Pattern
from lumen.transforms._support.python_reads import key_readers, mark_logs, value_readers
from lumen.transforms._support.unapplied import with_apply_rule

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_WARN_AT = 8
# For graphs with collectives: compute what does not need a sum while the sum is being communicated.
_OVERLAP = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["sink_waits"],
}
_PARTLY_WRITTEN = (
    "a compiled step ran out of memory while it was writing into a donated state, which may now mix old and new values."
    " Resume from a checkpoint: fit(…, resume='auto'). To find a number of microbatches that fits, run the first step"
    " without lm.compile(), with lm.accumulate('auto')."
)


class compile(Transform):
    """Compile the whole step into one graph with TorchInductor.

    `mode` and `options` are those of `torch.compile`; "reduce-overhead" uses CUDA graphs on a GPU. `backend="eager"`
    runs the traced graph without compiling it, for debugging.

    As with `jax.jit`, the step's Python runs only when it is traced: on the first call, and again when the structure,
    shape or dtype of its input changes, or a Python value that the step's function reads from its closure or its
    globals; so does one in a list, dict or set of up to 64 entries. Values behind attributes (`config.alpha`), and in
    longer containers, are constants. A step that needs a tensor's value in Python
    (`.item()`, `if loss > 3`) cannot be compiled: one `GraphBreakWarning` names the line, and the step runs uncompiled.

    With `lm.donate()` inside, new values are written into the memory of the old state. Inductor then records no CUDA
    graph, because it would copy the graph's inputs. Without `lm.donate()`, the new state and the metrics are copied out
    of the graph's memory.

    Layers that are repeated in the traced graph are compiled once each, forward, backward and in the update, unless the
    step has collectives or CUDA graphs.

    `blocks` compiles the model's repeated blocks, each kind once, instead of the whole step. Compile time then does not
    grow with the number of blocks, and everything outside of them (loss, optimizer, collectives) runs uncompiled. It is
    True for the children of the first `nn.ModuleList` or `nn.Sequential`, or a pattern as in `lm.remat`. A block that
    cannot be compiled runs uncompiled, after one `GraphBreakWarning` with the reason.

    Law: `compile()(step) == step`, to the tolerance of fused arithmetic. Dropout draws other numbers than in eager
    mode, unless `options={"fallback_random": True}`.

    >>> import lumen as lm
    >>> lm.compile(mode="reduce-overhead")
    lm.compile(mode='reduce-overhead')
    >>> lm.compile(blocks="blocks.*")
    lm.compile(blocks='blocks.*')
    """

    name = "compile"
    level = "compile"
    reason = "compile turns the whole step into one graph"

    def __init__(
        self,
        *,
        mode: str = "default",
        options: Mapping[str, Any] | None = None,
        backend: str = "inductor",
        blocks: Pattern | Literal[True] | None = None,
    ) -> None:
        if mode not in _MODES:
            raise HyperparameterError(f"compile mode {mode!r} is unknown; give one of {', '.join(map(repr, _MODES))}.")
        if backend not in ("inductor", "eager"):
            raise HyperparameterError(f"compile backend {backend!r} is unknown; give 'inductor' or 'eager'.")
        if blocks is not None and mode in ("reduce-overhead", "max-autotune"):
            raise HyperparameterError(
                f"compile(mode={mode!r}, blocks={blocks!r}): CUDA graphs need the whole step compiled. Leave blocks"
                ' out, or write mode="max-autotune-no-cudagraphs".'
            )
        self.mode = mode
        self.options = dict(options or {})
        self.backend = backend
        self.blocks = blocks

    def _canonical(self) -> Mapping[str, Any]:
        return {"options": dict(self.options) or None}

    def wrap(self, step: StepFn) -> StepFn:
        """The compiled step, surrounded by the host-side work of the transforms inside it."""
        inner = as_step(step)
        if self.blocks is None:
            return inner.with_host_hooks(_CompiledStep(inner, self))
        self._check_inside(inner.transforms)
        pattern = None if self.blocks is True else self.blocks
        blocks = Blocks(pattern, repr(self), self._compile_block, _graph_breaks)
        return rules.with_rules({Primitive.GRADIENT: blocks.gradient}, with_apply_rule(self, inner, blocks.rule))

    def _compile_block(self, function: nn.Module, example: list[Tensor]) -> Callable[..., Any]:
        """A compiled function of tensors, with its derivative."""
        _load_settings()
        compiled: Any
        if self.backend == "eager":
            compiled = _torch_compat.aot_eager(function, example)
        else:
            options = self._inductor_options()
            compiled = _torch_compat.inductor_compile(function, cacheable(example), options=options)
        return compiled  # type: ignore[no-any-return]

    def _compile_step(self, step: Step, state: Any, batch: Any, donates: bool) -> CompiledGraph:
        """The whole step, compiled for inputs like these."""
        _load_settings()
        options = None
        has_collectives = any(t.level == "parallel" for t in step.transforms)
        if self.backend != "eager":
            options = self._inductor_options(_OVERLAP if has_collectives else None)
        return CompiledGraph(step, state, batch, donates=donates, options=options, may_split=not has_collectives)

    def _inductor_options(self, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Inductor's options. Signatures include shapes and strides, so the graph need not assert them again."""
        return {"size_asserts": False, **(defaults or {}), **_torch_compat.list_mode_options(self.mode), **self.options}

    def _check_inside(self, transforms: tuple[Transform, ...]) -> None:
        for transform in transforms:
            if transform.level in ("ensemble", "dp_sgd"):
                raise OrderError(
                    f"{transform!r} runs the model under vmap, where {self!r} cannot compile blocks."
                    " Write lm.compile() to compile the whole step."
                )
            if any(getattr(transform, name, None) is not None for name in ("save", "budget")):
                raise OrderError(
                    f"{transform!r} cannot see the operations of blocks that {self!r} has compiled. Write lm.compile()"
                    " to compile the whole step, or leave it out."
                )


@cache
def _load_settings() -> None:
    """Import what a trace imports, in a thread.

    Until the next garbage collection that import keeps the frames of its callers alive, with all that they refer to,
    and a thread has none.
    """
    loading = threading.Thread(target=importlib.import_module, args=("torch._inductor.config",))
    loading.start()
    loading.join()


class _CompiledStep:
    """The compiled graphs of one step, by the signature of their input."""

    def __init__(self, step: Step, settings: compile) -> None:
        self._step = step
        self._settings = settings
        self._donates = any(t.donates for t in step.transforms)
        self._readers = [*value_readers(step.user), *key_readers(step.transforms)]
        self._graphs: dict[GraphKey, CompiledGraph] = {}
        self._broken = False

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        if self._broken:
            return self._uncompiled(state, batch)
        state_leaves, signature = sign_state(state)
        batch_leaves, batch_signature = sign_batch(batch)
        key = (signature, batch_signature, tuple([read() for read in self._readers]))
        graph = self._graphs.get(key)
        if graph is None:
            failure: Exception
            try:
                graph = self._settings._compile_step(self._step, state, batch, self._donates)
            except (LumenError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever a tracer or a compiler cannot do
                failure = error
            if graph is None:
                result = self._uncompiled(state, batch)  # raises what is an error of the step itself
                self._broken = True
                _warn_break(self._step, failure)
                return result
            if mark_logs(self._readers, key[2]):
                key = (*key[:2], tuple([read() for read in self._readers]))
            self._graphs[key] = graph
            self._warn_many(key)
        if not self._donates:
            return graph(state, state_leaves, batch_leaves)
        try:
            return graph(state, state_leaves, batch_leaves)
        except torch.OutOfMemoryError as error:
            raise DonatedError(_PARTLY_WRITTEN) from error

    def _uncompiled(self, state: Any, batch: Any) -> tuple[Any, Any]:
        inner = self._step.inner
        return self._step._traceable(state, batch) if inner is not None else self._step(state, batch)

    def _warn_many(self, key: GraphKey) -> None:
        if len(self._graphs) == _WARN_AT:
            changes = describe_changes([*self._graphs][-2], key)
            warnings.warn(
                f"{self._step.__name__} has been compiled {_WARN_AT} times, the last time for {changes}.",
                InexactWarning,
                stacklevel=3,
            )


def _graph_breaks() -> tuple[type[BaseException], ...]:
    """The errors that tracing raises where it needs the value of a tensor."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return (
        _torch_compat.DataDependentOutputException,
        _torch_compat.DynamicOutputShapeException,
        _torch_compat.UnsupportedFakeTensorException,
        GuardOnDataDependentSymNode,
    )


def _warn_break(step: Step, error: Exception) -> None:
    line = _user_line(error)
    if isinstance(error, _graph_breaks()):
        why = f"{line} needs the value of a tensor in Python ({type(error).__name__})"
        fix = (
            "Keep the value on the device: use torch.where instead of `if`, and tensor arithmetic instead of .item();"
            " or report the tensor as a metric and read it outside the step."
        )
    elif "meta" in str(error) and type(error).__name__ == "FakeTensorDeviceMismatchError":
        why = f"{line} takes a derivative in forward mode of a gradient, which torch cannot trace for each operation"
        fix = "For torch.func.hessian(f) write torch.func.jacrev(torch.func.jacrev(f)), and jacrev for jacfwd."
    else:
        why = f"{line} led to {summary_of(error)}"
        fix = "To compile the blocks of the model alone, write lm.compile(blocks=True)."
    message = f"{step.__name__} cannot be compiled: {why}. The step runs uncompiled. {fix}"
    warnings.warn(message, GraphBreakWarning, stacklevel=5)


def _user_line(error: BaseException) -> str:
    """The innermost line of the user's own code in the traceback."""
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    trace, line = error.__traceback__, "one of its lines"
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(libraries):
            line = f"{code.co_filename}:{trace.tb_lineno}, in {code.co_name},"
        trace = trace.tb_next
    return line
