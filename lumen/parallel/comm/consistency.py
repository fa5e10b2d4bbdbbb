"""Whether the processes of a group hold the same: checked by digests, and told in words where they do not."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import platform
import re
import types
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.core import distributed, row_fields
from lumen.core.state import TrainState
from lumen.core.step import device_of
from lumen.core.versions import own_version
from lumen.errors import WorldError, printable
from lumen.parallel.comm.mesh import Mesh

_ALIKE = ("step", "seed")  # counters that every process must begin with
_FIELDS = frozenset(each.name for each in dataclasses.fields(TrainState))


def assert_same_on_all_ranks(lines: Sequence[str], group: dist.ProcessGroup, device: torch.device, what: str) -> None:
    """Raise `WorldError` on every process of `group`, naming the first difference, unless all have the same `lines`.

    Digests are compared first; the lines themselves travel only where these differ.
    """
    if distributed.is_dry_run():
        return
    digest = torch.frombuffer(bytearray(hashlib.sha256("\n".join(lines).encode()).digest()), dtype=torch.uint8)
    mine = digest.to(device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    if all(torch.equal(found[0], other) for other in found):
        return
    told: list[Any] = [None] * len(found)
    dist.all_gather_object(told, list(lines), group=group)
    raise WorldError(f"{what} differ: {_first_difference(told, group)}. Start every process with the same script.")


def _first_difference(told: Sequence[Sequence[str]], group: dist.ProcessGroup) -> str:
    for texts in itertools.zip_longest(*told, fillvalue="nothing more"):
        if len(set(texts)) > 1:
            ranks: dict[str, list[int]] = {}
            for place, text in enumerate(texts):
                ranks.setdefault(text, []).append(dist.get_global_rank(group, place))
            return "; ".join(f"{_named(who)} has {text}" for text, who in ranks.items())
    raise AssertionError("digests differ where the lines do not")


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def fingerprint_lines(state: Any, step: Any = None) -> list[str]:
    """What must be the same on every process: versions, the step's code and transforms, and the state's leaves."""
    lines = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"lumen {own_version()}"]
    if step is not None:
        code = getattr(step.user, "__code__", None)
        lines += [f"the step {step!r}", f"the step's code {_code_digest([code])}" if code else "a step without code"]
    for path, leaf in zip(tree.paths(state), tree.leaves(state), strict=True):
        if not isinstance(leaf, Tensor):
            lines.append(f"{printable(path)} = {leaf!r:.60}")
            continue
        lines.append(f"{printable(path)} of shape {tuple(leaf.shape)}, {leaf.dtype}")
        if path in _ALIKE and leaf.numel() == 1 and not distributed.is_dry_run():
            lines.append(f"{path} = {leaf.item()}")
    return lines + _models(state)


def _models(state: Any) -> list[str]:
    """The code of the modules that the state applies."""
    module = getattr(getattr(state, "apply_fn", None), "module", None)
    if module is None:
        return []
    kinds = {type(each): None for each in module.modules()}
    codes = {kind: getattr(kind.forward, "__code__", None) for kind in kinds}
    return [f"the code of {kind.__qualname__} {_code_digest([code])}" for kind, code in codes.items() if code]


def _code_digest(todo: list[types.CodeType]) -> str:
    found = hashlib.sha256()
    while todo:
        each = todo.pop()
        found.update(each.co_code + repr(each.co_names).encode())
        for constant in each.co_consts:
            if isinstance(constant, types.CodeType):
                todo.append(constant)
            else:  # a set shows its members in an order of its own in each process
                shown = sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
                found.update(repr(shown).encode())
    return found.hexdigest()[:12]


def broadcast(state: Any, group: dist.ProcessGroup) -> Any:
    """`state` with the values of the group's first process in every tensor, sent as one flat tensor for each dtype."""
    leaves, spec = tree.flatten(state)
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            kinds.setdefault((leaf.dtype, leaf.device), []).append(place)
    first = dist.get_rank(group) == 0
    for (dtype, _), places in kinds.items():
        flat = torch.cat([leaves[place].detach().reshape(-1) for place in places])
        sent = flat.view(torch.uint8)  # as bytes: Gloo does not know all dtypes
        dist.broadcast(sent, group=group, group_src=0)
        if first:  # its own tensors are what the others have received
            continue
        pieces = sent.view(dtype).split([leaves[place].numel() for place in places])
        for place, piece in zip(places, pieces, strict=True):
            leaves[place] = piece.view(leaves[place].shape).clone()
    return spec.unflatten(leaves)


def check_equal(state: Any, mesh: Mesh | None = None) -> None:
    """Raise `WorldError`, on every process, unless all hold bitwise the same params, and fields that a subclass adds.

    It compares two checksums for each leaf over the axes data and shard of `mesh`, by default over all processes, and
    names the first leaf that differs and the ranks that hold another than the first process. An `lm.row_field()` is
    left out, as each rank has its own rows; ranks that compute the same rows must hold the same ones.

    >>> import lumen as lm, torch
    >>> from lumen.parallel.comm.consistency import check_equal
    >>> check_equal(lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1)))
    """
    group = (
        mesh.group("data", "shard")
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
            f"params have come apart: {printable(name)} on {_named(ranks)} is not what rank"
            f" {dist.get_global_rank(group, 0)} holds, nor are {others} other leaves."
            " Every process must make the same updates: look for a rank-dependent branch after the gradient, a metric"
            " or random number of one rank that decides about the update, or a device that computes wrongly."
        )
    check_fields(state, group)


def check_fields(state: Any, group: dist.ProcessGroup | None, cut: Collection[int] = ()) -> None:
    """Raise `WorldError`, on every process, unless all hold the same in the fields that a subclass of a state adds.

    Of leaves that are `cut`, by their places among `lumen.tree.leaves`, each process has its own part, and so it has
    of row fields; these must be equal on ranks that compute the same rows.
    """
    if group is None:
        return
    rows = [(path, leaf) for path, leaf in row_fields.named(state) if isinstance(leaf, Tensor)]
    paths = tree.paths(state) if cut else []
    apart = {path for path, _ in rows} | {paths[place] for place in cut}
    different = _different([pair for pair in _added(state) if pair[0] not in apart], group, device_of(state))
    if different is not None:
        raise WorldError(_undeclared(state, *different[:2], group))
    copies = distributed.tp_degree() if dist.get_world_size(group) == distributed.world_size() else 1
    different = _different(rows, group, device_of(state), copies) if copies > 1 else None
    if different is not None:
        name, ranks, _ = different
        raise WorldError(
            f"state.{printable(name)} on {_named(ranks)} is not what the first rank of its tensor axis holds. Ranks"
            " along tensor compute the same rows, and must come to the same lm.row_field(): compute it from full"
            " activations, outside of the layers that lm.tensor_parallel cuts, and without random numbers of one rank."
        )


def _added(node: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """The tensors, by path, in the fields of `lm.dataclass` classes that `TrainState` does not have."""
    if _is_state(node):
        names = [name for name in type(node)._dynamic_fields_ if name not in _FIELDS]
        node = {name: getattr(node, name) for name in names}
        own = True
    else:
        own = False  # a container of states
    found: list[tuple[str, Tensor]] = []
    children = zip(tree.paths(node, is_leaf=_is_state), tree.leaves(node, is_leaf=_is_state), strict=True)
    for inner, child in children:
        if _is_state(child):
            found += _added(child, f"{path}{inner}.")
        elif own and isinstance(child, Tensor):
            found.append((path + inner, child))
    return found


def _is_state(node: Any) -> bool:
    return hasattr(type(node), "_dynamic_fields_")


def _undeclared(state: Any, name: str, ranks: Sequence[int], group: dist.ProcessGroup) -> str:
    """What is said of a field that differs; `name` is the path of its leaf."""
    first = dist.get_global_rank(group, 0)
    field = re.split(r"[.\[]", name, maxsplit=1)[0]
    kind = type(state).__name__
    return (
        f"state.{name} on {_named(ranks)} is not what rank {first} holds, and a state is the same on every rank: a"
        f" checkpoint would keep rank {first}'s, from which all would go on. If it has an entry for each row of the"
        f" batch, such as a hidden state, declare that in {kind}:\n\n    {field}: torch.Tensor = lm.row_field()\n\n"
        f"and create the state with the rows of the global batch; else make it one value of all ranks:"
        f" lm.pmean(x, 'data')."
    )


def _different(
    named: Sequence[tuple[str, Tensor]], group: dist.ProcessGroup, device: torch.device, copies: int = 0
) -> tuple[str, list[int], int] | None:
    """The first leaf that is not the same on all, on which ranks it is another, and how many such leaves follow.

    With `tp_degree` it must be the same only on as many ranks that follow each other.
    """
    if not named:
        return None
    mine = torch.stack([checksum(leaf).to(device) for _, leaf in named])
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    first = [found[rank - rank % copies if copies else 0] for rank in range(len(found))]
    different = torch.stack([(a != b).any(1) for a, b in zip(found, first, strict=True)])  # rank × leaf
    if not bool(different.any()):
        return None
    leaf = int(different.any(0).int().argmax())
    ranks = [dist.get_global_rank(group, place) for place in different[:, leaf].nonzero().flatten().tolist()]
    return named[leaf][0], ranks, int(different.any(0).sum()) - 1


def checksum(leaf: Tensor) -> Tensor:
    """Two sums over the bytes, one of them weighted by place: equal for equal bits."""
    values = leaf.detach().contiguous().view(-1).view(torch.uint8).to(torch.int64)
    place = torch.arange(values.numel(), device=values.device) % 65_521 + 1
    return torch.stack([values.sum(), (values * place).sum()])
