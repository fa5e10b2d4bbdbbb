"""The metrics that a run is told to watch by name: a misspelled one is an error as soon as it can be known."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from lumen.errors import StepError
from lumen.train.settings import RunSettings

_OWN = ("lr", "steps_per_second", "rows_per_second", "tokens_per_second", "mfu")  # what the Runner itself publishes
_TRAIN = "train/"
_RATES = "lr/"  # of the parts of a partition, and of lanes


@dataclass(frozen=True)
class Monitor:
    """A metric by its `name`, and the `setting` that names it, as it is written.

    A plateau takes the numbers of validations alone, and of an ensemble those of its lanes, `name/0` and so on.
    """

    name: str
    setting: str
    is_plateau: bool

    def among(self, published: Collection[str]) -> bool:
        """Whether it is one of these names."""
        return self.name in published or (self.is_plateau and f"{self.name}/0" in published)

    def sources(self, validations: Sequence[str]) -> list[str]:
        """The validations that could give it."""
        return [each for each in validations if self.name.startswith(f"{each}/")]


class Monitors:
    """The metrics that one run watches, with the names of its validations."""

    def __init__(self, settings: RunSettings, validations: Sequence[str]) -> None:
        self._validations = tuple(validations)
        self._measured: set[str] = set()
        self._validated: set[str] = set()  # the names that validations have given
        # A callback of the user's own may publish any name at any time.
        self._open = settings.callbacks.may_publish()
        self._watched: list[Monitor] = []
        best = None if settings.checkpoint is None else settings.checkpoint.metric
        if best is not None:
            self._watched.append(Monitor(best[0], f"Checkpointer(best=({best[0]!r}, {best[1]!r}))", False))
        if settings.plateau is not None:
            self._watched.append(Monitor(settings.plateau, f"plateau={settings.plateau!r}", True))

    def check_before(self) -> None:
        """Raise `StepError` for a name that nothing in the run could publish."""
        for each in self._watched:
            is_own = each.name in _OWN or each.name.startswith((_TRAIN, _RATES))
            known = is_own or each.sources(self._validations)
            if not known and not self._open:
                names = ", ".join(repr(f"{name}/…") for name in self._validations) or "none, as there is no validation"
                raise StepError(
                    f"{each.setting} names no metric of this run. Names begin with that of a validation: {names}; or"
                    f" with 'train/'. Write \"val/loss\" for the metric that the evaluation step of"
                    " fit(..., validate=lm.Validate(eval_step, data)) returns as 'loss'."
                )

    def validated(self, measured: Collection[str], found: Collection[str]) -> None:
        """Note the validations that have just ended, and the names that they gave."""
        self._measured.update(measured)
        self._validated.update(found)

    def check(self, published: Collection[str]) -> None:
        """Raise `StepError` for a name that is not among those `published` so far, and should be."""
        for each in self._watched:
            names = self._validated if each.is_plateau else published
            if not each.among(names) and self._is_due(each, names):
                raise self._missing(each, names)

    def never_published(self, published: Collection[str]) -> list[str]:
        """A message for each name that a callback could have published, and none did in the whole run."""
        return [
            str(self._missing(each, published))
            for each in self._watched
            if not each.sources(self._validations) and not each.among(published)
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
            return self._measured.issuperset(sources)
        return not self._open and any(name.startswith(_TRAIN) for name in published)


def names_of(validations: Sequence[Any]) -> list[str]:
    """The names that validations publish under, one for each of their data sets."""
    return [name for each in validations for name, _ in each.loaders()]
