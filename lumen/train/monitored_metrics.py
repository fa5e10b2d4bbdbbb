"""The metrics that a run monitors by name. A misspelled name is an error as soon as that can be known."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from lumen.errors import StepError
from lumen.train.curves import DIAGNOSTICS
from lumen.train.early_stop import EarlyStop
from lumen.train.settings import RunSettings

_RUNNER_METRICS = ("lr", "steps_per_second", "rows_per_second", "tokens_per_second", "mfu", *DIAGNOSTICS)
_TRAIN = "train/"
_RATES = "lr/"  # the learning rates of a partition's groups, and of lanes


@dataclass(frozen=True)
class Monitor:
    """A metric by its `name`, and the `setting` that names it, as the user writes it.

    A plateau takes only numbers of validations. In an ensemble it takes those of the lanes, `name/0` and so on.
    """

    name: str
    setting: str
    is_plateau: bool

    def is_among(self, published: Collection[str]) -> bool:
        """Whether it is one of these names."""
        return self.name in published or (self.is_plateau and f"{self.name}/0" in published)

    def sources(self, validations: Sequence[str]) -> list[str]:
        """The validations that could return it."""
        return [validation for validation in validations if self.name.startswith(f"{validation}/")]


class Monitors:
    """The metrics that one run monitors, with the names of its validations."""

    def __init__(self, settings: RunSettings, validations: Sequence[str]) -> None:
        self._validations = tuple(validations)
        self._finished: set[str] = set()  # the validations that have run
        self._validated: set[str] = set()  # the names that they returned
        # A user's own callback may publish any name at any time.
        self._accepts_any_name = settings.callbacks.may_publish()
        self._monitors: list[Monitor] = []
        checkpoint = settings.checkpoint
        if checkpoint is not None and checkpoint.monitor is not None:
            setting = f"Checkpointer(monitor={checkpoint.monitor!r}, mode={checkpoint.mode!r})"
            self._monitors.append(Monitor(checkpoint.monitor, setting, is_plateau=False))
        for name in settings.plateau_monitors:
            self._monitors.append(Monitor(name, f"reduce_on_plateau(monitor={name!r})", is_plateau=True))
        stops = [callback.monitor for callback in settings.callbacks if isinstance(callback, EarlyStop)]
        # While the run lasts these check themselves: a metric may come once an epoch.
        self._early_stops = [Monitor(name, f"EarlyStop(monitor={name!r})", is_plateau=False) for name in stops]

    def check_before(self) -> None:
        """Raise `StepError` for a name that nothing in the run could publish."""
        for monitor in (*self._monitors, *self._early_stops):
            is_builtin = monitor.name in _RUNNER_METRICS or monitor.name.startswith((_TRAIN, _RATES))
            if not (is_builtin or self._accepts_any_name or monitor.sources(self._validations)):
                names = ", ".join(repr(f"{name}/…") for name in self._validations) or "none, as there is no validation"
                raise StepError(
                    f"{monitor.setting} names no metric of this run. Names begin with that of a validation: {names}; or"
                    f" with 'train/'. Write \"val/loss\" for the metric that the evaluation step of"
                    " fit(..., validate=lm.Validate(eval_step, data)) returns as 'loss'."
                )

    def validated(self, validations: Collection[str], names: Collection[str]) -> None:
        """Record the validations that have just ended, and the names that they returned."""
        self._finished.update(validations)
        self._validated.update(names)

    def check(self, published: Collection[str]) -> None:
        """Raise `StepError` for a name that is not among those `published` so far, and should be."""
        for monitor in self._monitors:
            names = self._validated if monitor.is_plateau else published
            if not monitor.is_among(names) and self._is_due(monitor, names):
                raise self._missing(monitor, names)

    def never_published(self, published: Collection[str]) -> list[str]:
        """A message for each name that a callback could have published, and that no callback did publish."""
        return [
            str(self._missing(monitor, published))
            for monitor in self._monitors
            if not monitor.sources(self._validations) and not monitor.is_among(published)
        ]

    def _missing(self, monitor: Monitor, published: Collection[str]) -> StepError:
        names = ", ".join(map(repr, sorted(published))) or "nothing"
        return StepError(
            f"{monitor.setting} waits for a metric that was never published. What was: {names}. Give it one of these"
            f" names, or return {monitor.name.rpartition('/')[2]!r} from the step that is to publish it."
        )

    def _is_due(self, monitor: Monitor, published: Collection[str]) -> bool:
        sources = monitor.sources(self._validations)
        if sources:
            return self._finished.issuperset(sources)
        return not self._accepts_any_name and any(name.startswith(_TRAIN) for name in published)


def names_of(validations: Sequence[Any]) -> list[str]:
    """The names that validations publish under, one for each of their data sets."""
    return [name for validate in validations for name, _ in validate.loaders()]
