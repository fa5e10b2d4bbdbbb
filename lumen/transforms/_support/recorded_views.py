"""Views in a recorded graph, which must also hold for the strides that the compiler's own rules give a tensor."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from lumen.core import _torch_compat


def relax_views(graph: GraphModule) -> None:
    """Write `reshape` for each recorded `view` of a tensor that nothing in the graph writes to.

    A recorder replaces `reshape` by the `view` that suits the strides it sees. TorchInductor then rewrites operations
    by rules that may give other strides, as for a `cat` with an empty tensor (torch 2.13), of which that view is an
    error and a reshape is a copy. A tensor that is written to keeps its views: a copy would not be written.

    >>> def function(x):
    ...     return x.reshape(3, 2), torch.zeros(4).view(2, 2).add_(1.0)
    >>> graph = _torch_compat.record(function, [torch.ones(2, 3)])
    >>> relax_views(graph)
    >>> [node.target.name() for node in graph.graph.nodes if node.name.startswith("view")]
    ['aten::reshape', 'aten::view']
    """
    origin: dict[Node, Node] = {}  # of each tensor, the node that allocated its memory
    written: set[Node] = set()
    for node in graph.graph.nodes:
        origin[node] = node
        for source, is_write in shares_memory_with(node):
            origin[node] = origin[source]
            if is_write:
                written.add(origin[source])
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.view.default and origin[node] not in written:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()


def shares_memory_with(node: Node) -> Iterator[tuple[Node, bool]]:
    """The arguments whose memory a node's result may share, and whether the node writes to them."""
    if node.target is operator.getitem:
        yield from ((source, False) for source in node.all_input_nodes)
    schema = getattr(node.target, _torch_compat.SCHEMA, None)
    if schema is None:
        return
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is None:
            continue
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        for source in value if isinstance(value, tuple | list) else (value,):
            if isinstance(source, Node):
                yield source, argument.alias_info.is_write
