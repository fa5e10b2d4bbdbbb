"""The order in which microbatches go through the stages, by `torch.distributed.pipelining`.

Its manual stages are used, and not its tracing frontend: that exports a graph for one input, in which autocast, remat
and draws of other steps have no place. A stage's module here only calls back: what runs is the user's loss function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lumen.core import distributed
from lumen.errors import HyperparameterError
from lumen.parallel.pipeline.probe import Form
from lumen.parallel.pipeline.share import PipelineGroup

ScheduleName = Literal["gpipe", "1f1b", "interleaved"]
SCHEDULES: tuple[ScheduleName, ...] = ("gpipe", "1f1b", "interleaved")


class Job(Protocol):
    """What runs on the stages of this process during one gradient."""

    def forward(self, stage: int, index: int, received: Tensor | None) -> Tensor:
        """What `stage` sends on for microbatch `index`; of the last stage, the loss, as a tensor of shape [1]."""


class CurrentJob:
    """The job that the stages of a schedule run now, and how many microbatches each has begun, which go in order."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self._begun: dict[int, int] = {}

    def start(self, job: Job | None) -> None:
        """Run `job` from now on."""
        self.job = job
        self._begun.clear()

    def next_index(self, stage: int) -> int:
        """The microbatch that `stage` begins with this call."""
        index = self._begun.get(stage, 0)
        self._begun[stage] = index + 1
        return index


class _Stage(nn.Module):
    def __init__(self, stage: int, current: CurrentJob) -> None:
        super().__init__()
        self._stage, self._current = stage, current

    def forward(self, received: Tensor) -> Tensor:
        assert self._current.job is not None
        index = self._current.next_index(self._stage)
        return self._current.job.forward(self._stage, index, received if self._stage else None)


def check_numbers(schedule: ScheduleName, microbatches: int, count: int, size: int) -> None:
    """Raise `HyperparameterError` unless `size` processes can run `count` stages on so many microbatches."""
    if schedule == "interleaved":
        if count % size or count < 2 * size:
            raise HyperparameterError(
                f'lm.pipeline(schedule="interleaved") gives each of {size} processes the same number of stages, at'
                f' least 2, and the model is split into {count}. Write stages={2 * size}, or schedule="1f1b".'
            )
        rounds = max(1, microbatches // size)
        if microbatches % rounds:
            raise HyperparameterError(
                f'lm.pipeline(schedule="interleaved") needs a number of microbatches that its {rounds} rounds divide,'
                f" and has {microbatches}. Write microbatches={size * rounds}."
            )
    elif count != size:
        raise HyperparameterError(
            f"lm.pipeline(schedule={schedule!r}) has one stage on each of {size} processes, and the model is split into"
            f' {count}. Write stages={size}, or schedule="interleaved" for several stages on each.'
        )
    if microbatches < count and schedule == "1f1b":
        raise HyperparameterError(
            f'lm.pipeline(schedule="1f1b") keeps {count} stages busy with as many microbatches, and has {microbatches}.'
            f" Write microbatches={count}, or more."
        )


class StageSchedule:
    """The stages of this process and their schedule, for activations of some `forms`."""

    def __init__(
        self,
        schedule: ScheduleName,
        microbatches: int,
        stages: Sequence[int],
        forms: Sequence[Form],
        group: PipelineGroup,
    ) -> None:
        from torch.distributed import pipelining  # loads torch.export and DTensor

        self._count = len(forms) + 1
        self._stages = stages
        self._microbatches = microbatches
        self._current = CurrentJob()

        kind = _planned_kind(pipelining.PipelineStage) if distributed.is_dry_run() else pipelining.PipelineStage

        def stage_of(stage: int) -> Any:
            before = Form((1,), torch.int64) if stage == 0 else forms[stage - 1]
            after = Form((1,), torch.float32) if stage == self._count - 1 else forms[stage]
            return kind(
                _Stage(stage, self._current),
                stage,
                self._count,
                group.device,
                input_args=(_empty(before),),
                output_args=(_empty(after),),
                group=group.group,
            )

        kinds: dict[ScheduleName, Any] = {
            "gpipe": pipelining.ScheduleGPipe,
            "1f1b": pipelining.Schedule1F1B,
            "interleaved": pipelining.ScheduleInterleaved1F1B,
        }
        built = [stage_of(stage) for stage in stages]
        loss_fn: Callable[[Tensor, Tensor], Tensor] = _total
        self._schedule = kinds[schedule](
            built if schedule == "interleaved" else built[0], microbatches, loss_fn=loss_fn, scale_grads=False
        )

    def run(self, job: Job) -> None:
        """Run `job` for each stage and microbatch, forward and backward: gradients are added to `.grad` of leaves."""
        index = torch.arange(self._microbatches)
        args = (index,) if 0 in self._stages else ()
        target = index if self._count - 1 in self._stages else None
        self._current.start(job)
        try:
            self._schedule.step(*args, target=target, losses=[])
        finally:
            self._current.start(None)


def _planned_kind(kind: type[Any]) -> type[Any]:
    """Torch's stage without its vote whether all stages know their forms, which needs the answers of others."""

    class Yes:
        def item(self) -> int:
            return 1

    class PlannedStage(kind):  # type: ignore[misc]
        def _warmup_forward_vote(self, *_args: Any, **_kwargs: Any) -> Yes:
            return Yes()

        def _warmup_backward_result(self, *_args: Any, **_kwargs: Any) -> Yes:
            return Yes()

    return PlannedStage


def _total(output: Tensor, _target: Tensor) -> Tensor:
    return output.sum()


def _empty(form: Form) -> Tensor:
    return torch.empty(form.shape, dtype=form.dtype, device="meta", requires_grad=form.dtype.is_floating_point)
