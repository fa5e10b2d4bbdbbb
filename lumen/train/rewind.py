"""`lm.Rewind`: go back to a checkpoint when the guard skips updates, and continue with the data that follows."""

from __future__ import annotations

from dataclasses import dataclass

from lumen.core.arguments import checked
from lumen.core.step import Step
from lumen.errors import StepError
from lumen.optim._hyperparams import check_count
from lumen.train.checkpointer import Checkpointer
from lumen.transforms._guard import guard


@checked
@dataclass(frozen=True)
class Rewind:
    """When a run goes back, and how far: `lm.Runner(step, rewind=lm.Rewind(...))`.

    Whenever the run logs, it reads how many updates `lm.guard` has skipped since it logged last. If there are `after`
    or more, it goes back to its newest checkpoint that is at least `steps` optimizer steps old, and continues with the
    batch that is next: the batches since that checkpoint are left out. Its state, random numbers, metrics, callbacks
    and timers are those of the checkpoint, and so are the clock's `step`, `rows` and `tokens`. `epoch`, `batch` and
    `seconds` go on. What was logged after the checkpoint is removed from the history and from sinks that can be
    rewound, as when a run resumes.

    So the run equals, exactly, one that resumes from that checkpoint with data that never held those batches. Going
    back by about 100 steps and leaving out the data since is what was done for PaLM (Chowdhery et al. 2022, section
    5.1), by hand.

    Args:
        after: how many skipped updates between two logging points are too many.
        steps: how many optimizer steps the checkpoint must be old at least.
        limit: how often a run goes back at most, resumed runs included; then it raises `RewindError`.

    Raises:
        HyperparameterError: a number that is not allowed.
        StepError: the Runner has no `checkpoint`, one that keeps only the newest while `steps` asks for an older one,
            or no `lm.guard` that skips.

    >>> import lumen as lm
    >>> lm.Rewind(after=2, steps=50)
    Rewind(after=2, steps=50, limit=5)
    """

    after: int = 3
    steps: int = 100
    limit: int = 5

    def __post_init__(self) -> None:
        for name, low in (("after", 1), ("steps", 0), ("limit", 1)):
            check_count(name, getattr(self, name), low)


def checked_rewind(rewind: Rewind | None, step: Step, checkpoint: Checkpointer | None) -> Rewind | None:
    """`rewind`; raises `StepError` where a run could not go back."""
    if rewind is None:
        return None
    if not isinstance(rewind, Rewind):
        raise StepError(f"rewind={rewind!r} must be an lm.Rewind: rewind=lm.Rewind(after=3, steps=100)")
    if not any(isinstance(t, guard) and t.on_nonfinite == "skip" for t in step.transforms):
        raise StepError(
            f"{rewind!r} reads how many updates lm.guard has skipped, and this step has no guard that skips. Write"
            " lm.Runner(step, transforms=[lm.guard(spike=6.0), ...], rewind=...)."
        )
    if checkpoint is None:
        raise StepError(
            f"{rewind!r} goes back to a checkpoint, and this Runner saves none. Write lm.Runner(step,"
            ' checkpoint=lm.Checkpointer("runs/a", every=lm.Every(steps=100), keep=3), rewind=...).'
        )
    if rewind.steps and checkpoint.keep == 1:
        raise StepError(
            f"{rewind!r} goes back to a checkpoint that is {rewind.steps} steps old, and lm.Checkpointer(keep=1) keeps"
            " only the newest. Write lm.Checkpointer(..., keep=3), or lm.Rewind(steps=0)."
        )
    return rewind
