"""A recorded graph rewritten so that it can be cut anywhere between two operations.

A graph that is cut hands tensors from one part to the next. Tensors that share memory must not be handed over, because
the parts could not know that they do. So each view is copies where it is read, the result of an operation in place is
what it was written to, and a donated tensor is overwritten as soon as it was read for the last time.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from lumen.core import _torch_compat
from lumen.transforms._support.recorded_views import shares_memory_with

_Operation = type(torch.ops.aten.add.Tensor)
Key = tuple[int, int]  # a place in the order of nodes: of an original node, and behind it


def isolate_values(graph: GraphModule) -> bool:
    """Rewrite `graph` in place; False, with the graph as it was, if it has what cannot be cut."""
    if not all(map(_is_known, graph.graph.nodes)):
        return False
    _name_written(graph.graph)
    _sink_views(graph.graph)
    _replace_writes(graph.graph)
    _sink_clones(graph.graph)
    _hoist_updates(graph.graph)
    return True


def is_view(node: Node) -> bool:
    """Whether a node's result is memory of its argument, seen otherwise."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and is_view(source)
    sources = list(shares_memory_with(node))
    return bool(sources) and not any(is_write for _, is_write in sources)


def written_by(node: Node) -> Iterator[Node]:
    """The arguments whose memory a node writes to, also those that its schema does not declare (torch 2.13)."""
    yield from (source for source, is_write in shares_memory_with(node) if is_write)
    if node.op == "call_function" and _is_undeclared_writer(node.target):
        names = [argument.name for argument in _schema(node.target).arguments]
        for name, value in (*zip(names, node.args, strict=False), *node.kwargs.items()):
            if name in ("running_mean", "running_var") and isinstance(value, Node):
                yield value


def _is_undeclared_writer(target: Any) -> bool:
    return target is not operator.getitem and _torch_compat.operation_name(target).endswith("batch_norm")


def root_of(node: Node) -> Node:
    """The node that allocated the memory of a view."""
    while is_view(node):
        node = next(shares_memory_with(node))[0]
    return node


def _is_known(node: Node) -> bool:
    """Whether a node says of itself what it writes to: operations on graphs and those that change a shape do not."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op in ("placeholder", "output", "get_attr", "call_function")
    return isinstance(node.target, _Operation) and torch.Tag.inplace_view not in node.target.tags


def _schema(target: Any) -> Any:
    return getattr(target, _torch_compat.SCHEMA)


def _name_written(graph: Graph) -> None:
    """Let readers of what an operation in place returns read what it wrote to."""
    for node in list(graph.nodes):
        written = list(written_by(node))
        if len(written) == 1 and node.users and isinstance(node.meta.get("val"), torch.Tensor):
            node.replace_all_uses_with(written[0])


def _sink_views(graph: Graph) -> None:
    """Make each view anew in front of each node that reads it."""
    nodes = list(graph.nodes)
    views = {node for node in nodes if node.op == "call_function" and is_view(node)}

    def rebuilt(view: Node, copies: dict[Node, Node]) -> Node:
        if view in views and view not in copies:
            copies[view] = graph.node_copy(view, lambda source: rebuilt(source, copies))
        return copies.get(view, view)

    for node in nodes:
        if node not in views and any(source in views for source in node.all_input_nodes):
            copies: dict[Node, Node] = {}
            with graph.inserting_before(node):
                for source in node.all_input_nodes:
                    rebuilt(source, copies)
            for view, copied in copies.items():
                node.replace_input_with(view, copied)
    for view in reversed(nodes):
        if view in views:
            graph.erase_node(view)


def _replace_writes(graph: Graph) -> None:
    """Let an operation in place on a tensor that the graph allocates make a new tensor, which is read from then on."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        written = list(written_by(node))
        if len(written) != 1 or written[0] is not node.args[0]:
            continue
        root = _without_identity(written[0])
        target = None if is_view(root) or root.op != "call_function" else _functional(node, root)
        if target is None:
            continue
        node.target, node.args = target, (root, *node.args[1:])
        for user in list(root.users):
            if index[user] > index[node]:
                user.replace_input_with(root, node)


def _sink_clones(graph: Graph) -> None:
    """Copy an input right before the copy is used, as the running statistics of a layer are, not all at the start."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    writes = [(i, root_of(source)) for node, i in index.items() for source in written_by(node)]
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default):
        source = root_of(node.args[0])
        if source.op != "placeholder" or not node.users:
            continue
        first = min(node.users, key=index.__getitem__)
        if not any(root is source and index[node] < i < index[first] for i, root in writes):
            views = [node]
            while isinstance(views[-1].args[0], Node) and is_view(views[-1].args[0]):
                views.append(views[-1].args[0])
            for moved in reversed(views):
                first.prepend(moved)


def _without_identity(node: Node) -> Node:
    while node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        (node,) = node.all_input_nodes
    return node


def _functional(node: Node, root: Node) -> Any:
    """The operation that returns what `node` writes into `root`, if its result is like `root` in all but its memory."""
    target: Any = node.target
    packet = getattr(
        torch.ops.aten, _torch_compat.operation_name(target).removeprefix("aten::").removesuffix("_"), None
    )
    overload = _torch_compat.overload_name(target) or "default"
    functional = getattr(packet, overload, None)
    if functional is None or torch.Tag.nondeterministic_seeded in target.tags or "val" not in root.meta:
        return None
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    try:
        result = functional(*args, **kwargs)
    except RuntimeError:
        return None
    before = root.meta["val"]
    is_alike = (result.shape, result.stride(), result.dtype) == (before.shape, before.stride(), before.dtype)
    return functional if is_alike else None


def _hoist_updates(graph: Graph) -> None:
    """Move what ends in a new state up to where its inputs are complete.

    A step often lists all updates, then all new params, then all copies into a donated state. Here each follows the
    update it belongs to, which a compiler can then fuse, and which need not be stored.
    """
    keys: dict[Node, Key] = {}
    touched: dict[Node, Key] = {}  # the last node that reads or writes the memory of a root
    written: dict[Node, Key] = {}  # the last node that writes it
    views: list[Node] = []  # of the node that follows
    for index, node in enumerate(graph.nodes):
        keys[node] = (index, 0)
        if node.op == "call_function" and is_view(node):
            views.append(node)
            continue
        roots = [root_of(source) for source in node.all_input_nodes]
        last = max((written[root] for root in roots), default=(0, 0))
        if _is_copy_into_input(node):
            keys[node] = (max(last, touched[roots[0]])[0], index)
        elif any(written[root] == last and root.op == "call_function" and _consumes(node, root) for root in roots):
            keys[node] = (last[0], index)
        keys |= dict.fromkeys(views, keys[node])
        views = []
        for root in (*roots, node):
            touched[root] = max(keys[node], touched.get(root, (0, 0)))
        for root in (*map(root_of, written_by(node)), node):
            written[root] = max(keys[node], written.get(root, (0, 0)))
    _reorder(graph, sorted(graph.nodes, key=keys.__getitem__))


def _is_copy_into_input(node: Node) -> bool:
    if node.target is not torch.ops.aten.copy_.default or node.users:
        return False
    target = node.args[0]
    return isinstance(target, Node) and root_of(target).op == "placeholder"


def _consumes(node: Node, root: Node) -> bool:
    """Whether an elementwise operation makes a result of the size of `root`, and `root` is not needed any more."""
    if node.op != "call_function" or torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return False
    if any(True for _ in written_by(node)) or len(set(readers_of(root))) != 1:
        return False
    return bytes_of(node) <= bytes_of(root)


def readers_of(node: Node) -> Iterator[Node]:
    """The nodes that read a value, through views."""
    for user in node.users:
        if user.op == "call_function" and is_view(user):
            yield from readers_of(user)
        else:
            yield user


def bytes_of(node: Node) -> int:
    """The size of a node's result; 0 for a tuple."""
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _reorder(graph: Graph, nodes: list[Node]) -> None:
    for before, node in pairwise(nodes):
        if before.next is not node:
            before.append(node)
    graph.lint()
