"""`Validator`: the validations of a run."""

from __future__ import annotations

from collections.abc import Sequence

from lumen.train.device_feed import DeviceIterator, opened
from lumen.train.metric_merge import MetricMerger
from lumen.train.plateau import update_plateau
from lumen.train.run_context import RunContext
from lumen.train.validate import Validate, evaluate_until, params_for

HeldOut = Sequence[Sequence[tuple[str, DeviceIterator]]]


def open_held_out(validations: Sequence[Validate], run_state: object, merger: MetricMerger) -> HeldOut:
    """The sets of data of each validation by their names; what cannot be measured on is refused here."""
    return [
        [(name, opened(data, run_state, merger.group)) for name, data in validate.loaders()] for validate in validations
    ]


class Validator:
    """Measures the run's state, publishes the numbers, and updates what waits for them."""

    def __init__(
        self, run: RunContext, validations: Sequence[Validate], held_out: HeldOut, merger: MetricMerger
    ) -> None:
        self.validations = validations
        self._run = run
        self._held_out = held_out
        self._merger = merger

    def run(self, number: int) -> bool:
        """Do a validation; whether it was done, rather than cut off by a signal."""
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
        run.logger.mark()  # throughput is that of training alone
        run.schedule.validations[number].restart(run.clock)
        return True

    def _evaluate(self, number: int) -> dict[str, float] | None:
        run, validate = self._run, self.validations[number]
        state = params_for(validate, run.state)
        numbers: dict[str, float] = {}
        for name, data in self._held_out[number]:
            values = evaluate_until(
                validate.step,
                state,
                data.epoch(0),
                run.settings.step.transforms,
                self._merger,
                limit=validate.limit,
                # Several processes finish it: none can leave the collectives of an evaluation by itself.
                stop=lambda: run.stop.signal is not None,
                key=name,
            )
            if values is None:
                return None
            numbers.update({f"{name}/{key}": value for key, value in values.items()})
        return numbers

    def _update_plateau(self, numbers: dict[str, float]) -> None:
        metric = self._run.settings.plateau
        if metric in numbers or f"{metric}/0" in numbers:
            self._run.state = update_plateau(self._run.state, str(metric), numbers)
