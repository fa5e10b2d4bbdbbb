"""`Rewinder`: decides for one run whether it goes back to a checkpoint, and to which one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lumen.core.step import slot
from lumen.errors import RewindError
from lumen.train.history import History
from lumen.train.rewind import Rewind
from lumen.train.run_context import RunContext
from lumen.transforms._guard import guard


class Rewinder:
    """Decides for one run whether it goes back, and to which checkpoint; the same on all ranks.

    `skips` lists what was left out, as plain data: from which step the run went back to which, and the positions (epoch
    and batch) of the first batch that was left out and of the next one that was not.
    """

    def __init__(self, rewind: Rewind, run: RunContext) -> None:
        self.skips: list[dict[str, Any]] = []
        self._rewind = rewind
        self._run = run
        self._skipped = _skipped(run.state)  # at the last logging point
        self._histories: dict[int, History] = {}  # of this process's checkpoints, by step

    def is_due(self) -> bool:
        """Whether too many updates were skipped since the last call; raises `RewindError` at the limit."""
        before, self._skipped = self._skipped, _skipped(self._run.state)
        count = self._skipped - before
        if count < self._rewind.after:
            return False
        if len(self.skips) >= self._rewind.limit:
            raise RewindError(
                f"lm.guard skipped {count} updates up to step {self._run.clock.step}, and the run has gone back"
                f" {len(self.skips)} times already, which is {self._rewind!r}'s limit. Look for the cause: a learning"
                " rate that is too high, a warm-up that is too short, or bad data."
            )
        return True

    def choose(self, steps: Sequence[int]) -> int:
        """The step of the checkpoint to go back to; raises `RewindError` if none is old enough."""
        step, needed = self._run.clock.step, self._rewind.steps
        choice = max((saved for saved in steps if saved <= step - needed), default=None)
        if choice is None:
            raise RewindError(
                f"lm.guard skipped too many updates up to step {step}, and no checkpoint is {needed} steps old: there"
                f" are those of {list(steps) or 'no steps'}. Save more often, as in"
                " lm.Checkpointer(..., every=lm.Every(steps=100), keep=3), or go back less far: lm.Rewind(steps=...)."
            )
        return choice

    def went_back(self, step: int, meta: Mapping[str, Any]) -> None:
        """Note that the run went back from `step` to the checkpoint with this `meta`, now that it is loaded."""
        run, first = self._run, (meta["clock"]["epoch"], meta["clock"]["batch"])
        entry = {"from": step, "to": run.clock.step, "first": list(first), "next": [run.clock.epoch, run.clock.batch]}
        self.skips.append(entry)
        self._skipped = int(meta["rewind"]["skipped"]) if "rewind" in meta else _skipped(run.state)
        run.logger.history = copy.deepcopy(self._histories.get(run.clock.step, History(run.settings.best_metric())))
        self._histories = {saved: h for saved, h in self._histories.items() if saved <= run.clock.step}

    def saved(self) -> None:
        """Keep the history of the checkpoint that was just saved."""
        self._histories[self._run.clock.step] = copy.deepcopy(self._run.logger.history)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide alike, as plain data."""
        return {"skipped": self._skipped, "skips": list(self.skips)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._skipped, self.skips = int(state["skipped"]), list(state["skips"])


def _skipped(state: Any) -> int:
    """How many updates the guard has skipped; of several lanes, in the one that has skipped most."""
    return int(slot(state, guard.name).skipped.max())
