"""`lm.EarlyStop`: end a run when a metric has stopped improving."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from lumen.checkpoint import json_tree
from lumen.core.arguments import checked
from lumen.errors import HyperparameterError, InexactWarning, StepError
from lumen.optim._hyperparams import check_count, check_scalar
from lumen.train.callbacks import Callback, CallbackContext


@checked
class EarlyStop(Callback):
    """Ends the run once the metric `monitor` has not improved for `patience` reports.

    A report is a number that is published under the name `monitor` ("val/loss", "train/loss"). It is an improvement if
    it is better than the best so far by more than `min_delta`. The other conditions are checked first, and end the run
    at once. The decisions are those of Lightning's `EarlyStopping`. Checkpoints save the best report and the counters;
    a run that begins at step 0 begins with new ones.

    Args:
        monitor: the name of the metric, as it is published.
        mode: whether smaller ("min") or larger ("max") is better.
        patience: how many reports without improvement end the run.
        min_delta: by how much a report must be better than the best to count as an improvement.
        threshold: end the run as soon as the metric is better than this.
        divergence: end the run as soon as the metric is worse than this.
        check_finite: end the run as soon as the metric is NaN or infinite. Without it, NaN is no improvement.

    Raises:
        HyperparameterError: a value outside its range.
        StepError: no metric of that name is published: before the first step where nothing could publish it, and else
            by the first validation. If the run ends before there could be one, this is an `InexactWarning`.

    >>> import lumen as lm
    >>> stop = lm.EarlyStop(monitor="val/loss", patience=2)
    >>> for loss in (1.0, 0.5, 0.6, 0.5):
    ...     stop.on_log(lm.CallbackContext(lm.train.clock.Clock(), None, {"val/loss": loss}, stop=print))
    val/loss has not improved on 0.5 for 2 reports
    """

    def __init__(
        self,
        monitor: str,
        *,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        threshold: float | None = None,
        divergence: float | None = None,
        check_finite: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise HyperparameterError(f"mode={mode!r} is unknown; give 'min' or 'max'.")
        check_count("patience", patience, low=1)
        check_scalar("min_delta", min_delta, schedule=False)
        for name, value in (("threshold", threshold), ("divergence", divergence)):
            if value is not None:
                check_scalar(name, value, low=-math.inf, schedule=False)
        self.monitor = monitor
        self.mode = mode
        self.patience = patience
        self.min_delta = min_delta
        self.threshold = threshold
        self.divergence = divergence
        self.check_finite = check_finite
        self._reset()

    def __repr__(self) -> str:
        return f"lm.EarlyStop(monitor={self.monitor!r}, mode={self.mode!r}, patience={self.patience})"

    def on_start(self, view: CallbackContext) -> None:
        """Reset the counters for a new run; a resumed run keeps them."""
        if view.clock.step == 0:
            self._reset()
        self._stopped = False
        self._published.clear()

    def on_log(self, view: CallbackContext) -> None:
        """Read a report of the metric."""
        if self.monitor in view.metrics:
            if not self._stopped:  # numbers that are published while the run ends decide nothing
                self._report(float(view.metrics[self.monitor]), view)
            return
        # Only a name's second report: another callback may publish the metric between two of them.
        is_missing = not self._reports and self.monitor not in view.per_epoch
        if is_missing and any(self._has_same_source(name) for name in self._published & view.metrics.keys()):
            raise self._missing()
        self._published.update(view.metrics)

    def on_validate(self, view: CallbackContext) -> None:
        """Check that the validation returned the metric, if it should have."""
        self._published.update(view.metrics)
        is_missing = not self._reports and self.monitor not in view.per_epoch
        if is_missing and any(map(self._has_same_source, self._published)):
            raise self._missing()

    def on_end(self, view: CallbackContext) -> None:
        """Warn that the metric was never published; an error would lose the run's result."""
        if not self._reports:
            warnings.warn(str(self._missing()), InexactWarning, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """The best report, the number of reports without improvement since then, and the number of all reports."""
        return {"best": json_tree.number(self._best), "bad": self._bad, "reports": self._reports}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._best, self._bad, self._reports = float(state["best"]), state["bad"], state["reports"]

    def _reset(self) -> None:
        self._best = math.inf if self.mode == "min" else -math.inf
        self._bad = 0
        self._reports = 0
        self._stopped = False
        self._published: set[str] = set()

    def _report(self, value: float, view: CallbackContext) -> None:
        self._reports += 1
        reason = self._check_limits(value) or self._check_patience(value)
        if reason:
            self._stopped = True
            view.stop(reason)

    def _check_limits(self, value: float) -> str:
        if self.check_finite and not math.isfinite(value):
            return f"{self.monitor} is {value}, not finite; the best was {self._best:g}"
        if self.threshold is not None and self._is_better(value, self.threshold):
            return f"{self.monitor} is {value:g}, better than the threshold {self.threshold:g}"
        if self.divergence is not None and self._is_better(self.divergence, value):
            return f"{self.monitor} is {value:g}, worse than {self.divergence:g}: it diverges"
        return ""

    def _check_patience(self, value: float) -> str:
        margin = self.min_delta if self.mode == "min" else -self.min_delta
        if self._is_better(value + margin, self._best):
            self._best, self._bad = value, 0
            return ""
        self._bad += 1
        if self._bad < self.patience:
            return ""
        return f"{self.monitor} has not improved on {self._best:g} for {self._bad} report{'s' * (self._bad != 1)}"

    def _is_better(self, value: float, reference: float) -> bool:
        return value < reference if self.mode == "min" else value > reference

    def _has_same_source(self, name: str) -> bool:
        """Whether `name` is published together with the metric: "val/accuracy" with "val/loss", or a lane of it.

        Where the metric is called "val_loss", "val/loss" is what was meant.
        """
        group = self.monitor.rpartition("/")[0]
        is_misspelled = not group and name.replace("/", "_") == self.monitor
        is_beside = group != "" and name.rpartition("/")[0] == group
        return is_misspelled or is_beside or name.startswith(f"{self.monitor}/")

    def _missing(self) -> StepError:
        published = ", ".join(map(repr, sorted(self._published))) or "nothing"
        return StepError(
            f"EarlyStop waits for {self.monitor!r}, which was never published. What was: {published}. Give it one of"
            " these names, return the metric from the step, or let the Runner validate:"
            " runner.fit(..., validate=lm.Validate(eval_step, data))"
        )
