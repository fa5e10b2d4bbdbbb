"""One graph of a whole step: traced by `make_fx` over fake tensors, compiled by TorchInductor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from lumen import tree
from lumen.core import _torch_compat, rules
from lumen.core.donation import check_unmoved, copy_into
from lumen.core.pytree_dataclass import SIGNATURE, copy_of
from lumen.core.step import StepFn
from lumen.transforms._support.graph_segments import compile_segments
from lumen.transforms._support.input_signature import StateSignature
from lumen.transforms._support.recorded_views import relax_views


@contextmanager
def as_compiling() -> Iterator[None]:
    """`with as_compiling():` while Python is traced: `torch.compiler.is_compiling()` answers yes, as it does to Dynamo.

    Libraries ask it before they choose what a compiler cannot take, such as transformers' grouped products of experts.

    >>> with as_compiling():
    ...     torch.compiler.is_compiling()
    True
    >>> torch.compiler.is_compiling()
    False
    """
    before = torch.compiler.is_compiling()
    setattr(torch.compiler, _torch_compat.IS_COMPILING, True)
    try:
        with rules.tracing:
            yield
    finally:
        setattr(torch.compiler, _torch_compat.IS_COMPILING, before)


class CompiledGraph:
    """A step compiled for one signature of its inputs: a function from flat tensors to flat tensors.

    `options` are Inductor's; None runs the traced graph without compiling it.
    """

    def __init__(
        self, step: StepFn, state: Any, batch: Any, *, donates: bool, options: Mapping[str, Any] | None, may_split: bool
    ) -> None:
        state_leaves, self._input_state_spec = tree.flatten(state)
        batch_leaves, batch_spec = tree.flatten(batch)
        leaves = [*state_leaves, *batch_leaves]
        self._inputs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._donates = donates
        example = _distinct([leaves[i] for i in self._inputs])

        def flat(*tensors: Tensor) -> list[Tensor]:
            filled = list(leaves)
            for i, tensor in zip(self._inputs, tensors, strict=True):
                filled[i] = tensor
            old = filled[: len(state_leaves)]
            state = tree.unflatten(self._input_state_spec, old)
            with as_compiling():
                result = step(state, tree.unflatten(batch_spec, filled[len(state_leaves) :]))
            return self._plan_outputs(old, filled, result)

        self._run = _compile(flat, example, options, may_split)

    def _plan_outputs(self, old: list[Any], inputs: list[Any], result: tuple[Any, Any]) -> list[Tensor]:
        """Record where each leaf of the result comes from at run time, and return what the graph must compute."""
        new_state, metrics = result
        new, self._state_spec = tree.flatten(new_state)
        metric_leaves, self._metrics_spec = tree.flatten(metrics)
        self._signature = StateSignature(new, self._state_spec)
        input_index = {id(t): i for i, t in enumerate(inputs) if isinstance(t, Tensor)}
        if self._donates:
            check_unmoved(old, new, tree.paths(new_state))
            # A metric that is an old leaf would change when its memory is overwritten.
            metric_leaves = [
                leaf.clone() if isinstance(leaf, Tensor) and id(leaf) in input_index else leaf for leaf in metric_leaves
            ]
            copy_into([o for o in old if isinstance(o, Tensor)], [n for n in new if isinstance(n, Tensor)])
            new = [o if isinstance(o, Tensor) else n for o, n in zip(old, new, strict=True)]
        outputs: list[Tensor] = []

        def source(leaf: Any) -> tuple[str, Any]:
            if not isinstance(leaf, Tensor):
                return "constant", leaf
            if id(leaf) in input_index:
                return "input", input_index[id(leaf)]
            outputs.append(leaf)
            return "output", len(outputs) - 1

        self._state_sources = [source(leaf) for leaf in new]
        self._metric_sources = [source(leaf) for leaf in metric_leaves]
        # A donated state keeps all of its tensors, so its successor has exactly the same fields.
        self._same_fields = self._donates and self._state_spec == self._input_state_spec and self._signature.size >= 0
        return outputs

    def __call__(self, state: Any, state_leaves: list[Any], batch_leaves: list[Any]) -> tuple[Any, Any]:
        """The new state and the metrics."""
        leaves = state_leaves + batch_leaves
        outputs = self._run(leaves if len(leaves) == len(self._inputs) else [leaves[i] for i in self._inputs])
        metrics = self._metrics_spec.unflatten(_gather(self._metric_sources, leaves, outputs))
        if self._same_fields and hasattr(type(state), "_fields_"):
            new = copy_of(state)
        else:
            new = self._state_spec.unflatten(_gather(self._state_sources, leaves, outputs))
        if hasattr(type(new), "_fields_"):
            new.__dict__[SIGNATURE] = self._signature
        return new, metrics


def _gather(sources: list[tuple[str, Any]], inputs: list[Any], outputs: Any) -> list[Any]:
    return [outputs[at] if kind == "output" else inputs[at] if kind == "input" else at for kind, at in sources]


def _compile(
    flat: Callable[..., list[Tensor]], example: list[Tensor], options: Mapping[str, Any] | None, may_split: bool
) -> Callable[[list[Tensor]], Any]:
    def compile_segment(segment: GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        if options is None:
            return segment
        return _torch_compat.inductor_compile(segment, cacheable(example), options=dict(options))  # type: ignore[no-any-return]

    is_cuda_graph = options is not None and _uses_cuda_graphs(options, example)
    with torch.no_grad():
        graph = _torch_compat.record(flat, example)
        relax_views(graph)
        segments = compile_segments(graph, compile_segment) if may_split and not is_cuda_graph else None
        if segments is None:
            compiled = compile_segment(graph, example)

    def run(tensors: list[Tensor]) -> Any:
        with torch.no_grad():
            if segments is not None:
                return segments(tensors)
            if not is_cuda_graph:
                return compiled(*tensors)
            # A CUDA graph writes its outputs into the same memory at every step, so a state and metrics that are kept
            # must be copied. Without the mark, each step would be recorded as a continuation of all steps before it.
            torch.compiler.cudagraph_mark_step_begin()
            return [tensor.clone() for tensor in compiled(*tensors)]

    return run


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, each an object of its own: a tracer takes one object at two places for the same input."""
    seen: set[int] = set()
    result = []
    for tensor in tensors:
        is_repeated = id(tensor) in seen
        seen.add(id(tensor))
        result.append(tensor.detach().requires_grad_(tensor.requires_grad) if is_repeated else tensor)
    return result


def cacheable(example: list[Tensor]) -> list[Any]:
    """Fake example inputs, with which Inductor finds what an earlier process compiled."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = _torch_compat.FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    return [mode.from_tensor(tensor, static_shapes=True) for tensor in example]


def _uses_cuda_graphs(options: Mapping[str, Any], example: list[Tensor]) -> bool:
    """Whether Inductor may record the graph as a CUDA graph."""
    return bool(options.get("triton.cudagraphs")) and any(tensor.is_cuda for tensor in example)


def summary_of(error: BaseException) -> str:
    """The kind of an error, and the first line of its message.

    >>> summary_of(RuntimeError("no such kernel\\nat …"))
    'RuntimeError: no such kernel'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip().rstrip('.:')}" if lines else type(error).__name__
