"""An error of one process of a pipeline, raised on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from lumen import errors
from lumen.errors import LumenError, WorldError
from lumen.parallel.pipeline.share import PipelineGroup


class StageFailure(NamedTuple):
    """What a process raises, and `where`: "the backward pass of stage 1, microbatch 0"."""

    error: Exception
    where: str


class _Report(NamedTuple):
    """A failure as other processes receive it."""

    rank: int
    where: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank} failed in {self.where}, under lm.pipeline: {self.kind}: {self.text}"


def raise_any(failure: StageFailure | None, group: PipelineGroup) -> None:
    """Raise on all processes of `group` where any has a failure: its own error there, and one that names it elsewhere.

    Elsewhere a `LumenError` keeps its type, and others are a `WorldError`.
    """
    if not group.any(failure is not None):
        return
    reports: list[Any] = [None] * group.size
    dist.all_gather_object(reports, None if failure is None else _report(failure), group=group.group)
    failed = [report for report in reports if report is not None]
    if failure is None:
        _raise_again(failed)
    error = failure.error
    error.add_note(f"raised on rank {dist.get_rank()} in {failure.where}, under lm.pipeline")
    for report in failed:
        if (report.kind, report.text) != (type(error).__name__, str(error)):
            error.add_note(str(report))
    raise error


def _report(failure: StageFailure) -> _Report:
    return _Report(dist.get_rank(), failure.where, type(failure.error).__name__, str(failure.error))


def _raise_again(reports: Sequence[_Report]) -> NoReturn:
    first = reports[0]
    own = getattr(errors, first.kind, None)
    if isinstance(own, type) and issubclass(own, LumenError):
        raise own(f"{first.text}\nIt was raised on rank {first.rank} in {first.where}, under lm.pipeline.")
    raise WorldError("\n".join(map(str, reports)))
