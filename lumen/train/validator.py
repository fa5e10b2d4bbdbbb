"""`Validator`: the validations of a run."""

from __future__ import annotations

from collections.abc import Sequence

from lumen.train.device_feed import DeviceIterator, open_batches
from lumen.train.metric_merge import MetricMerger
from lumen.train.plateau import update_plateau
from lumen.train.run_context import RunContext
from lumen.train.validate import Validate, evaluate_until, params_for

ValidationSets = Sequence[Sequence[tuple[str, DeviceIterator]]]


def open_validation_sets(validations: Sequence[Validate], run_state: object, merger: MetricMerger) -> ValidationSets:
    """The data sets of each validation with their names; raises `BatchError` for data that cannot be used."""
    return [
        [(name, open_batches(data, run_state, merger.group)) for name, data in validate.loaders()]
        for validate in validations
    ]


class Validator:
    """Evaluates the run's state, publishes the numbers, and reports them to plateaus and callbacks."""

    def __init__(
        self, run: RunContext, validations: Sequence[Validate], data: ValidationSets, merger: MetricMerger
    ) -> None:
        self.validations = validations
        self._run = run
        self._data = data
        self._merger = merger

    def run(self, number: int) -> bool:
        """Run a validation; returns False if a signal interrupted it."""
        run, validate = self._run, self.validations[number]
        numbers = self._evaluate(number)
        if numbers is None:
            return False
        run.publish(numbers)
        self._update_plateau(numbers)
        run.callback("on_validate")
        run.monitors.validated([name for name, _ in validate.loaders()], numbers)
        run.monitors.check(run.logger.newest)
        run.stop.sync_requests()
        run.clock_updater.read()
        run.logger.throughput.restart()  # throughput measures training only
        run.schedule.validations[number].restart(run.clock)
        return True

    def _evaluate(self, number: int) -> dict[str, float] | None:
        run, validate = self._run, self.validations[number]
        state = params_for(validate, run.state)
        numbers: dict[str, float] = {}
        for name, data in self._data[number]:
            values = evaluate_until(
                validate.step,
                state,
                data.epoch(0),
                run.settings.step.transforms,
                self._merger,
                limit=validate.limit,
                # Several processes always finish it: none can leave the collectives of an evaluation alone.
                stop=lambda: run.stop.signal is not None,
                key=name,
            )
            if values is None:
                return None
            numbers.update({f"{name}/{key}": value for key, value in values.items()})
        return numbers

    def _update_plateau(self, numbers: dict[str, float]) -> None:
        for monitor in self._run.settings.plateau_monitors:
            if monitor in numbers or f"{monitor}/0" in numbers:
                self._run.state = update_plateau(self._run.state, monitor, numbers)
