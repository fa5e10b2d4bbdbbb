"""Checks that the ranks of a group have the same code, state and params, and names the first difference."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import itertools
import platform
import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumen import tree
from lumen.core import distributed, row_fields
from lumen.core.arguments import checked_first
from lumen.core.closures import codes_of
from lumen.core.dtypes import as_bytes
from lumen.core.state import TrainState
from lumen.core.step import device_of
from lumen.core.versions import own_version
from lumen.errors import WorldError, printable
from lumen.parallel.comm.mesh import Mesh

_COUNTERS = ("step", "seed")  # which every rank must start with
_FIELDS = frozenset(field.name for field in dataclasses.fields(TrainState))


def assert_same_on_all_ranks(lines: Sequence[str], group: dist.ProcessGroup, device: torch.device, what: str) -> None:
    """Raise `WorldError` on every rank of `group`, naming the first difference, unless all have the same `lines`.

    Digests are compared first. The lines themselves are sent only where the digests differ.
    """
    if distributed.is_dry_run():
        return
    digest = torch.frombuffer(bytearray(hashlib.sha256("\n".join(lines).encode()).digest()), dtype=torch.uint8)
    own_digest = digest.to(device)
    digests = [torch.empty_like(own_digest) for _ in range(dist.get_world_size(group))]
    dist.all_gather(digests, own_digest, group=group)
    if all(torch.equal(digests[0], other) for other in digests):
        return
    all_lines: list[Any] = [None] * len(digests)
    dist.all_gather_object(all_lines, list(lines), group=group)
    raise WorldError(f"{what} differ: {_first_difference(all_lines, group)}. Start every process with the same script.")


def _first_difference(all_lines: Sequence[Sequence[str]], group: dist.ProcessGroup) -> str:
    for texts in itertools.zip_longest(*all_lines, fillvalue="nothing more"):
        if len(set(texts)) > 1:
            ranks: dict[str, list[int]] = {}
            for index, text in enumerate(texts):
                ranks.setdefault(text, []).append(dist.get_global_rank(group, index))
            return "; ".join(f"{_named(holders)} has {text}" for text, holders in ranks.items())
    raise AssertionError("digests differ where the lines do not")


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def fingerprint_lines(state: Any, step: Any = None) -> list[str]:
    """What must be equal on all ranks: versions, the step's code and transforms, and the state's leaves."""
    lines = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"lumen {own_version()}"]
    if step is not None:
        code = getattr(step.user, "__code__", None)
        lines += [f"the step {step!r}", f"the step's code {_code_digest([code])}" if code else "a step without code"]
    for path, leaf in zip(tree.paths(state), tree.leaves(state), strict=True):
        if not isinstance(leaf, Tensor):
            lines.append(f"{printable(path)} = {leaf!r:.60}")
            continue
        lines.append(f"{printable(path)} of shape {tuple(leaf.shape)}, {leaf.dtype}")
        if path in _COUNTERS and leaf.numel() == 1 and not distributed.is_dry_run():
            lines.append(f"{path} = {leaf.item()}")
    return lines + _models(state)


def _models(state: Any) -> list[str]:
    """The code of the modules that the state applies."""
    module = getattr(getattr(state, "apply_fn", None), "module", None)
    if module is None:
        return []
    classes = {type(module_): None for module_ in module.modules()}
    codes = {cls: getattr(cls.forward, "__code__", None) for cls in classes}
    return [f"the code of {cls.__qualname__} {_code_digest([code])}" for cls, code in codes.items() if code]


def _code_digest(codes: list[types.CodeType]) -> str:
    digest = hashlib.sha256()
    for code in itertools.chain.from_iterable(map(codes_of, codes)):
        digest.update(code.co_code + repr(code.co_names).encode())
        for constant in code.co_consts:
            if not isinstance(constant, types.CodeType):  # the order of a set's members differs between processes
                text = sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
                digest.update(repr(text).encode())
    return digest.hexdigest()[:12]


def settings_lines(value: Any, path: str, visited: set[int] | None = None) -> Iterator[str]:
    """The numbers, texts and functions in an optimizer, each with its path: it has no repr that shows them.

    >>> import lumen as lm
    >>> [line for line in settings_lines(lm.optim.sgd(0.1, momentum=0.5), "tx") if ".momentum =" in line]
    ['tx.init_fn.hyper._constants.momentum = 0.5']
    """
    visited = set() if visited is None else visited
    if value is None or isinstance(value, bool | int | float | str):
        yield f"{path} = {printable(repr(value))[:60]}"
    elif isinstance(value, Tensor):
        yield f"{path} = {value.tolist() if value.numel() == 1 else tuple(value.shape)}"
    elif id(value) not in visited:
        visited.add(id(value))
        if isinstance(value, type | types.FunctionType | types.MethodType):
            yield f"{path} is {value.__qualname__}"
        for name, inner in _content(value):
            yield from settings_lines(inner, f"{path}.{name}" if name else path, visited)


def _content(value: Any) -> Iterable[tuple[str, Any]]:
    """What an object, a function or a container has in it, by name."""
    if isinstance(value, Mapping):
        return [(str(key), inner) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return [(str(index), inner) for index, inner in enumerate(value)]
    if isinstance(value, functools.partial):
        return [("", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, types.MethodType):
        return [("", value.__self__)]
    if isinstance(value, types.FunctionType):
        return [*inspect.getclosurevars(value).nonlocals.items(), ("defaults", value.__defaults__ or ())]
    return [] if isinstance(value, type | types.ModuleType | nn.Module) else [*getattr(value, "__dict__", {}).items()]


def broadcast(state: Any, group: dist.ProcessGroup) -> Any:
    """`state` with the first rank's values in every tensor, sent as one flat tensor for each dtype."""
    leaves, spec = tree.flatten(state)
    by_kind: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            by_kind.setdefault((leaf.dtype, leaf.device), []).append(index)
    first = dist.get_rank(group) == 0
    for (dtype, _), indices in by_kind.items():
        flat = torch.cat([leaves[index].detach().reshape(-1) for index in indices])
        bytes_ = flat.view(torch.uint8)  # as bytes: Gloo does not support all dtypes
        dist.broadcast(bytes_, group=group, group_src=0)
        if first:  # it has these values already
            continue
        blocks = bytes_.view(dtype).split([leaves[index].numel() for index in indices])
        for index, block in zip(indices, blocks, strict=True):
            leaves[index] = block.view(leaves[index].shape).clone()
    return spec.unflatten(leaves)


@checked_first
def check_equal(state: Any, mesh: Mesh | None = None) -> None:
    """Raise `WorldError`, on every rank, unless all have bitwise equal params and equal fields added by a subclass.

    It compares two checksums for each leaf over the axes data and shard of `mesh`, by default over all ranks. The error
    names the first leaf that differs, and the ranks where it differs from the first rank's. An `lm.row_field()` is
    skipped, as each rank has its own rows. Ranks that compute the same rows must have equal ones.

    >>> import lumen as lm, torch
    >>> from lumen.parallel.comm.consistency import check_equal
    >>> check_equal(lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1)))
    """
    group = (
        mesh.group("data", "shard", "context")
        if mesh is not None
        else (dist.group.WORLD if distributed.is_distributed() else None)
    )
    if group is None or distributed.is_dry_run():
        return
    compared = getattr(state, "params", state)
    rows = {path for path, _ in row_fields.named(compared)}
    params = [pair for pair in tree.named_tensors(compared) if pair[0] not in rows]
    different = _different(params, group, device_of(state))
    if different is not None:
        name, ranks, others = different
        raise WorldError(
            f"params have diverged: {printable(name)} on {_named(ranks)} differs from that of rank"
            f" {dist.get_global_rank(group, 0)}, and so do {others} other leaves."
            " Every process must make the same updates: look for a rank-dependent branch after the gradient, a metric"
            " or random number of one rank that decides about the update, or a device that computes wrongly."
        )
    check_fields(state, group)


def check_fields(state: Any, group: dist.ProcessGroup | None, sharded: Collection[int] = ()) -> None:
    """Raise `WorldError`, on every rank, unless all have equal values in slots and in fields that a subclass adds.

    `sharded` are the indices, among `lumen.tree.leaves`, of leaves of which each rank has its own shard. Row fields
    differ as well, but must be equal on ranks that compute the same rows.
    """
    if group is None:
        return
    rows = [(path, leaf) for path, leaf in row_fields.named(state) if isinstance(leaf, Tensor)]
    paths = tree.paths(state) if sharded else []
    skipped = {path for path, _ in rows} | {paths[index] for index in sharded}
    different = _different([pair for pair in _added(state) if pair[0] not in skipped], group, device_of(state))
    if different is not None:
        raise WorldError(_undeclared(state, *different[:2], group))
    copies = distributed.row_replicas() if dist.get_world_size(group) == distributed.world_size() else 1
    different = _different(rows, group, device_of(state), copies) if copies > 1 else None
    if different is not None:
        name, ranks, _ = different
        raise WorldError(
            f"state.{printable(name)} on {_named(ranks)} differs from that of the first rank of its tensor axis. Ranks"
            " along tensor compute the same rows, and must come to the same lm.row_field(): compute it from full"
            " activations, outside of the layers that lm.tensor_parallel cuts, and without random numbers of one rank."
        )


def _added(node: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """The tensors, by path, in slots, and in the fields of `lm.dataclass` classes that `TrainState` does not have."""
    in_slots: list[tuple[str, Tensor]] = []
    if _is_state(node):
        if getattr(node, "slots", None):
            in_slots = [(path + inner, leaf) for inner, leaf in tree.named_tensors(node) if inner.startswith("slots[")]
        names = [name for name in type(node)._dynamic_fields_ if name not in _FIELDS]
        node = {name: getattr(node, name) for name in names}
        is_state = True
    else:
        is_state = False  # a container of states
    tensors: list[tuple[str, Tensor]] = []
    children = zip(tree.paths(node, is_leaf=_is_state), tree.leaves(node, is_leaf=_is_state), strict=True)
    for inner, child in children:
        if _is_state(child):
            tensors += _added(child, f"{path}{inner}.")
        elif is_state and isinstance(child, Tensor):
            tensors.append((path + inner, child))
    return tensors + in_slots


def _is_state(node: Any) -> bool:
    return hasattr(type(node), "_dynamic_fields_")


def _undeclared(state: Any, name: str, ranks: Sequence[int], group: dist.ProcessGroup) -> str:
    """The message for a slot or field that differs; `name` is the path of its leaf."""
    first = dist.get_global_rank(group, 0)
    field = re.split(r"[.\[]", name, maxsplit=1)[0]
    kind = type(state).__name__
    differs = (
        f"state.{name} on {_named(ranks)} differs from that of rank {first}, and a state must be the same on every"
        f" rank: a checkpoint saves rank {first}'s, and all ranks would resume from that."
    )
    if field == "slots":
        return (
            f"{differs} If this slot has an entry for each param, declare that in the lm.dataclass of the slot:\n\n"
            "    params: dict[str, torch.Tensor] = lm.extend.param_field()\n\n"
            "Otherwise make it one value for all ranks: lm.pmean(x, 'data')."
        )
    return (
        f"{differs} If it has an entry for each"
        f" row of the batch, such as a hidden state, declare that in {kind}:\n\n"
        f"    {field}: torch.Tensor = lm.row_field()\n\n"
        f"and create the state with the rows of the global batch. Otherwise make it one value for all ranks:"
        f" lm.pmean(x, 'data')."
    )


def _different(
    named: Sequence[tuple[str, Tensor]], group: dist.ProcessGroup, device: torch.device, copies: int = 0
) -> tuple[str, list[int], int] | None:
    """The first leaf that is not equal on all ranks, the ranks where it differs, and how many such leaves follow.

    With `copies` it must be equal only on groups of so many consecutive ranks.
    """
    if not named:
        return None
    own_sums = torch.stack([checksum(leaf).to(device) for _, leaf in named])
    all_sums = [torch.empty_like(own_sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_sums, own_sums, group=group)
    first = [all_sums[rank - rank % copies if copies else 0] for rank in range(len(all_sums))]
    different = torch.stack([(a != b).any(1) for a, b in zip(all_sums, first, strict=True)])  # rank × leaf
    if not bool(different.any()):
        return None
    leaf = int(different.any(0).int().argmax())
    ranks = [dist.get_global_rank(group, index) for index in different[:, leaf].nonzero().flatten().tolist()]
    return named[leaf][0], ranks, int(different.any(0).sum()) - 1


def checksum(leaf: Tensor) -> Tensor:
    """Two sums over the bytes, one of them weighted by position: equal for equal bits."""
    values = as_bytes(leaf).to(torch.int64)
    weights = torch.arange(values.numel(), device=values.device) % 65_521 + 1
    return torch.stack([values.sum(), (values * weights).sum()])
