"""`HalvingSearch`: runs the rungs of a search, a group of lanes at a time, and keeps the best trials of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lumen import tree
from lumen.core.step import Step, device_of
from lumen.errors import NonFiniteError
from lumen.sinks.format import short
from lumen.train.batch_stream import BatchStream
from lumen.train.clock import Clock
from lumen.train.halving_checkpoints import HalvingCheckpoints, SearchState
from lumen.train.halving_metric import MonitoredMetric
from lumen.train.halving_result import HalvingResult, Trial
from lumen.train.halving_rungs import Rung, promoted
from lumen.train.lane_steps import LaneSteps, copy_lane, join_lanes
from lumen.train.progress import Progress


class HalvingSearch:
    """One search, by the rungs that it has, with as many lanes at once as `lanes` says.

    `initial` is anything that `ensemble.init` takes. The state of a trial is in memory once: in the lanes that run, or
    alone while it waits.
    """

    def __init__(
        self,
        steps: LaneSteps,
        initial: Any,
        rungs: Sequence[Rung],
        mode: str,
        lanes: int,
        metric: MonitoredMetric,
        stream: BatchStream,
        checkpoints: HalvingCheckpoints,
        display: Progress,
    ) -> None:
        self._steps = steps
        self._initial = initial
        self._rungs = rungs
        self._mode = mode
        self._lanes = lanes
        self._metric = metric
        self._stream = stream
        self._checkpoints = checkpoints
        self._display = display
        self._device = device_of(steps.start(initial, 0))
        self._clock = Clock()

    def run(self) -> HalvingResult:
        """Run the rungs that remain."""
        search = self._checkpoints.load(lambda trial: self._steps.start(self._initial, trial))
        self._clock.step = self._steps_of([len(metrics) for metrics in search.metrics])
        self._display.start(self._steps_of([rung.size for rung in self._rungs]), self._clock.step)
        try:
            while True:
                self._run_rung(search)
                if search.rung + 1 == len(self._rungs):
                    return self._result(search)
                search.rung += 1
                search.metrics.append({})
                search.waiting, search.best, search.begin = search.best, {}, search.end
        finally:
            self._display.stop()

    def _steps_of(self, trials: Sequence[int]) -> int:
        """The steps in which so many trials of each rung run, a group at a time."""
        return sum(rung.steps * math.ceil(n / self._lanes) for rung, n in zip(self._rungs, trials, strict=False))

    def _run_rung(self, search: SearchState) -> None:
        rung, metrics = self._rungs[search.rung], search.metrics[-1]
        entrants = sorted(search.waiting) if search.rung else range(rung.size)
        pending = [trial for trial in entrants if trial not in metrics]
        keeps_on_host = len(pending) > self._lanes or bool(metrics)
        for index in range(0, len(pending), self._lanes):
            trials = pending[index : index + self._lanes]
            self._run_lanes(search, trials, "cpu" if keeps_on_host else self._device)
            self._checkpoints.save(search)
        if all(math.isnan(value) for value in metrics.values()):
            raise NonFiniteError(
                f"{self._metric.monitor} is NaN in all {rung.size} trials at step {rung.step}: there is nothing to"
                " choose from. Try smaller learning rates, or train the first trial alone to see why."
            )
        (best, *_) = promoted(metrics, 1, self._mode)
        self._display.note(
            f"rung {search.rung + 1} of {len(self._rungs)}, step {rung.step}: {rung.size} trials, best"
            f" {self._metric.monitor} {short(metrics[best])} of trial {best}"
        )

    def _run_lanes(self, search: SearchState, trials: Sequence[int], device: Any) -> None:
        """Train some of a rung's trials to its end, and keep the states of those that may go on."""
        step, metrics = self._steps.of(len(trials)), search.metrics[-1]
        try:
            state = self._train(search, trials, step)
            numbers = self._metric.read(step, state, len(trials))
        except Exception as error:
            names = ", ".join(map(str, trials))
            error.add_note(f"raised in rung {search.rung + 1} of the search, by the trials {names}")
            raise
        search.end = self._stream.position
        metrics.update(zip(trials, numbers, strict=True))
        kept = promoted(metrics, self._rungs[search.rung].keep, self._mode)
        search.best = {trial: best for trial, best in search.best.items() if trial in kept}
        for index, trial in enumerate(trials):
            if trial in kept:
                search.best[trial] = copy_lane(state, index, device)

    def _take(self, search: SearchState, trial: int) -> Any:
        """The state with which a trial enters the rung; the search forgets it."""
        return search.waiting.pop(trial) if search.rung else self._steps.start(self._initial, trial)

    def _train(self, search: SearchState, trials: Sequence[int], step: Step) -> Any:
        state = join_lanes([self._take(search, trial) for trial in trials], self._device)
        for batch in self._stream.read(search.begin, self._rungs[search.rung].steps):
            state, metrics = step(state, batch)
            self._metric.add(metrics)
            self._clock.step += 1
            self._display.tick(self._clock)
        return state

    def _result(self, search: SearchState) -> HalvingResult:
        trials = tuple(self._trial(number, search.metrics) for number in range(self._steps.lanes.n))
        ((best, state),) = search.best.items()
        state = tree.map(lambda leaf: leaf.to(self._device), state)
        at = tuple(rung.step for rung in self._rungs)
        return HalvingResult(trials, trials[best], at, self._metric.monitor, self._mode, state, self._steps.alone)

    def _trial(self, number: int, metrics: Sequence[dict[int, float]]) -> Trial:
        own = tuple(rung[number] for rung in metrics if number in rung)
        last = len(own) - 1
        return Trial(number, self._steps.values(number), last, self._rungs[last].step, own)
