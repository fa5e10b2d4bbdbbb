"""Steps, rows and tokens per second, and the share of the device's peak that they take."""

from __future__ import annotations

from lumen.train.clock import Clock


class Throughput:
    """Measures from the last `restart` to `rates`; `flops_per_step` is set once it is known."""

    def __init__(self, clock: Clock, peak: float | None) -> None:
        self.flops_per_step: float | None = None
        self._clock = clock
        self._peak = peak
        self.restart()

    def restart(self) -> None:
        """Measure from here on, without the validation or setup before."""
        self._since = self._now()

    def rates(self) -> dict[str, float]:
        """What was reached since the last restart, by the names that it is logged under."""
        steps, rows, tokens, seconds = (now - then for now, then in zip(self._now(), self._since, strict=True))
        if not steps or seconds <= 0:
            return {}
        rates = {"steps_per_second": steps / seconds}
        if rows:
            rates["rows_per_second"] = rows / seconds
        if tokens:
            rates["tokens_per_second"] = tokens / seconds
        if self.flops_per_step and self._peak:
            rates["mfu"] = self.flops_per_step * steps / seconds / self._peak
        return rates

    def _now(self) -> tuple[int, int, int, float]:
        return self._clock.step, self._clock.rows, self._clock.tokens, self._clock.seconds
