"""Where a model is split, and the stage of each of its params.

A split point is the name of the module with which a stage begins. Params belong to stages in the order in which modules
are registered: those before the first split point to stage 0, those from there on to stage 1, and so on. This says only
where params are kept. Whether the model computes in that order is checked when it runs: see
`lumen.parallel.pipeline.split` and `lumen.parallel.pipeline.probe`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lumen.core import _torch_compat
from lumen.errors import ParamsError, PatternError, printable

Stages = int | Sequence[str] | None


def split_points_of(module: nn.Module, stages: Stages, size: int) -> tuple[str, ...]:
    """The names of the modules with which stages 1, 2, … begin; by default there are `size` stages.

    Raises `PatternError` for split points that are no modules in order, and `ParamsError` for more stages than blocks.

    >>> split_points_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 1)), 2, 2)
    ('3',)
    """
    if stages is None or isinstance(stages, int):
        return _even_split_points(module, size if stages is None else stages)
    order = [name for name, _ in module.named_modules() if name]
    positions = []
    for point in stages:
        if point not in order:
            raise PatternError(
                f"lm.pipeline(stages=...): {point!r} is no module of {type(module).__name__}; its modules are"
                f" {', '.join(map(printable, order[:12]))}{' …' if len(order) > 12 else ''}."
            )
        positions.append(order.index(point))
    if positions != sorted(set(positions)):
        raise PatternError(
            f"lm.pipeline(stages={list(stages)!r}) names modules that {type(module).__name__} registers in another"
            " order, or twice. Write each split point once, in the order of net.named_modules()."
        )
    return tuple(stages)


def _even_split_points(module: nn.Module, count: int) -> tuple[str, ...]:
    if count == 1:
        return ()
    blocks = _blocks(module)
    if count > len(blocks):
        raise ParamsError(
            f"lm.pipeline splits a model between the blocks of one nn.Sequential or nn.ModuleList, and"
            f" {type(module).__name__} has {len(blocks)} with params: too few for {count} stages. Use fewer processes"
            ' along pipeline, or name the modules with which stages begin: stages=["blocks.4", "head"].'
        )
    short, longer = divmod(len(blocks), count)
    starts = [stage * short + min(stage, longer) for stage in range(1, count)]
    return tuple(blocks[start] for start in starts)


def _blocks(module: nn.Module) -> list[str]:
    """The children with params of the model, if it is a sequence, or else of its first list or sequence that has most.

    >>> _blocks(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))
    ['0', '2']
    """
    candidates = [
        [
            f"{name}.{key}" if name else key
            for key, child in parent.named_children()
            if any(True for _ in child.parameters())
        ]
        for name, parent in module.named_modules()
        if isinstance(parent, nn.ModuleList | nn.Sequential)
    ]
    if isinstance(module, nn.Sequential):
        return candidates[0]
    return max(candidates, key=len, default=[])


def stage_of_params(module: nn.Module, split_points: Sequence[str]) -> dict[str, int]:
    """The stage of each param of `module`, also of frozen ones, by name.

    Raises `ParamsError` for a tensor that two stages have, and for a stage without params.

    >>> stage_of_params(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1)), ["1"])
    {'0.weight': 0, '1.weight': 1, '1.bias': 1}
    """
    stage = 0
    first: dict[int, tuple[str, int]] = {}
    starts = {point: index for index, point in enumerate(split_points, 1)}
    for prefix, sub in module.named_modules(remove_duplicate=False):
        stage = starts.get(prefix, stage)
        for key, param in _torch_compat.own_params(sub).items():
            if param is None:
                continue
            path = f"{prefix}.{key}" if prefix else key
            name, owner = first.setdefault(id(param), (path, stage))
            if owner != stage:
                raise ParamsError(
                    f"one tensor is {name!r} of stage {owner} and {path!r} of stage {stage}: lm.pipeline cannot split a"
                    " model between tied weights, as each tensor lives on one stage. Untie them (a head with a weight"
                    " of its own), or choose split points that leave both on one stage."
                )
    owners = dict(first.values())
    for index in range(len(split_points) + 1):
        if index not in owners.values():
            begin = f"begins at {split_points[index - 1]!r}" if index else f"ends before {split_points[0]!r}"
            raise ParamsError(f"stage {index} of lm.pipeline {begin} and has no params. Move the split point.")
    return owners
