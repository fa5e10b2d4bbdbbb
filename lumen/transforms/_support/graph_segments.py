"""A recorded step cut into its repeated parts and what lies between them, each kind of part compiled once.

The trace of a deep model lists the operations of one layer again and again: forward, backward, and in the update of the
optimizer. A compiler that is handed the whole list compiles all of them. Here runs of equal stretches of the list are
found in the traced graph itself, so it does not matter how the model is written. Stretches that compute the same
function of their inputs share one compiled function.
"""

from __future__ import annotations

import bisect
import copy
import operator
from collections.abc import Callable, Hashable, Mapping
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from lumen.core import _torch_compat
from lumen.transforms._support.tandem_repeats import Repeat, find_repeats, may_repeat
from lumen.transforms._support.value_graph import bytes_of, is_view, isolate_values, readers_of, root_of, written_by

CompileFn = Callable[[GraphModule, list[Any]], Callable[..., Any]]

# Results of these are stored by a compiled graph too, so it costs nothing to cut behind them.
_STORED = ("mm", "bmm", "convolution", "convolution_backward", "attention", "attention_for_cpu")


class Segment(NamedTuple):
    """One part of the graph, with the nodes that it reads and those that others read of it."""

    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]
    kind: Hashable
    """Equal for parts that compute the same function of their inputs."""

    @classmethod
    def of(cls, nodes: list[Node]) -> Segment:
        """The part with these nodes."""
        inside = set(nodes)
        sources = (source for node in nodes for source in node.all_input_nodes if source not in inside)
        inputs = list(dict.fromkeys(sources))
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        positions: dict[Node, Hashable] = {node: ("input", i) for i, node in enumerate(inputs)}
        positions |= {node: i for i, node in enumerate(nodes)}
        read = tuple([_kind(node.meta.get("val")) for node in inputs])
        return cls(nodes, inputs, outputs, (read, tuple([_token(node, positions.__getitem__) for node in nodes])))

    def module(self, graph: GraphModule) -> GraphModule:
        """The part as a graph of its own: a function of its inputs that returns its outputs."""
        result = Graph()
        copies = {node: result.placeholder(f"input_{i}") for i, node in enumerate(self.inputs)}
        for node in self.nodes:
            copies[node] = result.node_copy(node, copies.__getitem__)
        result.output([copies[node] for node in self.outputs])
        return GraphModule(graph, result)

    def example(self) -> list[Any]:
        """Fake inputs."""
        return [node.meta["val"] for node in self.inputs]


class Call(NamedTuple):
    """One call at run time: a function, the values it takes, where its results go, and the values not needed again."""

    function: Callable[..., Any]
    inputs: list[int]
    outputs: list[int]
    last_used: list[int]


def compile_segments(graph: GraphModule, compile_fn: CompileFn) -> Callable[[list[Tensor]], list[Any]] | None:
    """`graph` as a sequence of compiled parts; None if it has no repeated ones, or cannot be cut.

    `compile_fn(part, example)` compiles one part for fake inputs.
    """
    if not may_repeat(len(graph.graph.nodes)):
        return None
    graph = GraphModule(graph, copy.deepcopy(graph.graph))
    if not isolate_values(graph):
        return None
    body, tail = _body_and_tail(graph.graph)
    repeats = find_repeats(_tokens(body), _CutCost(body))
    segments = _segments(body, repeats) if repeats else None
    return None if segments is None else _Calls(graph, segments, tail, compile_fn)


def _body_and_tail(graph: Graph) -> tuple[list[Node], list[Node]]:
    """The operations, and the views that only the graph's own outputs are."""
    body = [node for node in graph.nodes if node.op == "call_function"]
    size = len(body)
    while size and is_view(body[size - 1]):
        size -= 1
    return body[:size], body[size:]


def _tokens(body: list[Node]) -> list[int]:
    """Equal numbers for nodes with the same operation, constants, and kind of result."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(_token(node, lambda _: "node"), len(numbers)) for node in body]


def _token(node: Node, name: Callable[[Node], Hashable]) -> Hashable:
    """What a node computes; `name` says what its arguments that are nodes are."""
    return node.target, _constant(node.args, name), _constant(node.kwargs, name), _kind(node.meta.get("val"))


def _constant(value: Any, name: Callable[[Node], Hashable]) -> Hashable:
    """A hashable form of an argument, in which 1, 1.0 and True differ, and 0.0 and -0.0."""
    if isinstance(value, Node):
        return "node", name(value)
    if isinstance(value, tuple | list):
        return tuple([_constant(item, name) for item in value])
    if isinstance(value, Mapping):
        return tuple([(key, _constant(item, name)) for key, item in value.items()])
    if isinstance(value, slice):
        return "slice", *(_constant(item, name) for item in (value.start, value.stop, value.step))
    return type(value), repr(value) if isinstance(value, int | float | complex) else value


def _kind(value: Any) -> Hashable:
    """Shape, strides, dtype and device of a result."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    return type(value).__name__


class _CutCost:
    """The bytes that one kernel would have kept to itself, and that are written and read again if cut before a node."""

    def __init__(self, body: list[Node]) -> None:
        self._body = body
        index = {node: i for i, node in enumerate(body)}
        self._reads = [
            (0 if is_view(node) else bytes_of(node), [index[user] for user in readers_of(node) if user in index])
            for node in body
        ]
        self._stored = [i for i, node in enumerate(body) if _is_stored(node)]
        # Memory is allocated and written to in one part.
        self._closed: set[int] = set()
        for node, i in index.items():
            for root in map(root_of, written_by(node)):
                self._closed.update(range(index.get(root, i) + 1, i + 1))

    def __call__(self, index: int) -> float:
        if index == len(self._body):
            return 0.0
        if (
            index in self._closed
            or self._body[index].target is operator.getitem
            or (index and is_view(self._body[index - 1]))
        ):
            return inf
        at = bisect.bisect_left(self._stored, index)
        first = self._stored[at - 1] + 1 if at else 0
        last = self._stored[at] if at < len(self._stored) else len(self._body)
        return sum(size for size, reads in self._reads[first:index] if any(index <= read < last for read in reads))


def _is_stored(node: Node) -> bool:
    return node.target is not operator.getitem and _torch_compat.operation_name(node.target).endswith(_STORED)


def _segments(body: list[Node], repeats: list[Repeat]) -> list[Segment] | None:
    """The parts of the graph, in order; None if they would have to hand over memory that is written to."""
    cuts = {0, len(body)}
    for repeat in repeats:
        cuts |= set(range(repeat.start, repeat.stop + 1, repeat.period))
    node_lists = [body[start:stop] for start, stop in pairwise(sorted(cuts))]
    segment_of = {node: index for index, nodes in enumerate(node_lists) for node in nodes}
    for node in body:
        for root in map(root_of, written_by(node)):
            if root.op != "placeholder" and segment_of.get(root) != segment_of[node]:
                return None
    segments = [Segment.of(nodes) for nodes in node_lists]
    is_value = (not is_view(node) and isinstance(node.meta.get("val"), Tensor) for s in segments for node in s.outputs)
    return _with_equal_outputs(segments) if all(is_value) else None


def _with_equal_outputs(segments: list[Segment]) -> list[Segment]:
    """Parts that compute the same hand over the same results, also where no one reads them."""
    read: dict[Hashable, set[int]] = {}
    for segment in segments:
        outputs = set(segment.outputs)
        read.setdefault(segment.kind, set()).update(i for i, node in enumerate(segment.nodes) if node in outputs)
    return [segment._replace(outputs=[segment.nodes[i] for i in sorted(read[segment.kind])]) for segment in segments]


class _Calls:
    """The parts of a graph, called one after the other."""

    def __init__(self, graph: GraphModule, segments: list[Segment], tail: list[Node], compile_fn: CompileFn) -> None:
        nodes = [node for node in graph.graph.nodes if node.op in ("placeholder", "get_attr")]
        slots = {node: slot for slot, node in enumerate(nodes)}
        self._constants = [_attribute(graph, node) for node in nodes if node.op == "get_attr"]
        functions: dict[Hashable, Callable[..., Any]] = {}
        planned: list[tuple[Callable[..., Any], Segment]] = []
        for segment in segments:
            if segment.kind not in functions:
                functions[segment.kind] = compile_fn(segment.module(graph), segment.example())
            planned.append((functions[segment.kind], segment))
        if tail:
            segment = Segment.of(tail)
            planned.append((segment.module(graph), segment))
        for _, segment in planned:
            slots |= {node: slot for slot, node in enumerate(segment.outputs, len(slots))}
        (output,) = graph.graph.find_nodes(op="output")
        self._results = [slots[node] for node in output.args[0]]
        needed = set(self._results)
        self._calls: list[Call] = []
        for function, segment in reversed(planned):
            inputs, outputs = ([slots[node] for node in of] for of in (segment.inputs, segment.outputs))
            last_used = {*inputs, *outputs} - needed
            needed |= last_used
            self._calls.insert(0, Call(function, inputs, outputs, sorted(last_used)))
        self._size = len(slots)

    def __call__(self, tensors: list[Tensor]) -> list[Any]:
        values: list[Any] = [*tensors, *self._constants]
        values += [None] * (self._size - len(values))
        for function, inputs, outputs, last_used in self._calls:
            for slot, value in zip(outputs, function(*[values[slot] for slot in inputs]), strict=True):
                values[slot] = value
            for slot in last_used:
                values[slot] = None
        return [values[slot] for slot in self._results]


def _attribute(graph: GraphModule, node: Node) -> Any:
    return operator.attrgetter(str(node.target))(graph)
