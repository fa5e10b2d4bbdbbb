"""The clock of a run, its limits (`Steps`, `Epochs`, `Tokens`, `Seconds`) and its intervals (`Every`)."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lumen.core.arguments import checked
from lumen.errors import HyperparameterError

NEVER = 2**62


@dataclass
class Clock:
    """A run's progress: optimizer `step`s, complete `epoch`s, `batch`es of this epoch, `rows`, `tokens` and `seconds`.

    All count from the beginning of training, also after a resume. `seconds` is running time, without the time between
    two runs. `tokens` are counted only if a limit or a setting needs them. When a run goes back to a checkpoint
    (`lm.Rewind`), `step`, `rows` and `tokens` are those of the checkpoint again: they count what the state was trained
    on. `epoch` and `batch`, the position in the data, go on, and so do `seconds`.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Its fields by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set all fields."""
        for name in asdict(self):
            setattr(self, name, state[name])


class Until:
    """A limit of a run; `a | b` ends it at whichever is reached first."""

    def __or__(self, until: Until) -> Until:
        return _First((*_members(self), *_members(until)))

    def reached(self, clock: Clock) -> bool:
        """Whether the run is over."""
        raise NotImplementedError

    def steps(self) -> int | None:
        """The number of steps at which the run ends, or None if that is unknown."""
        return None

    def epochs(self) -> int | None:
        """The number of epochs at which the run ends, or None if that is unknown."""
        return None

    def only_steps(self) -> bool:
        """Whether it is reached only at the step that `steps` returns, or at the end of an epoch."""
        return False

    def needs_tokens(self) -> bool:
        """Whether it needs the number of tokens."""
        return False


@checked
@dataclass(frozen=True)
class Steps(Until):
    """End after `n` optimizer steps.

    >>> import lumen as lm
    >>> lm.Steps(100) | lm.Epochs(2)
    Steps(100) | Epochs(2)
    """

    n: int

    def __post_init__(self) -> None:
        _check_positive("Steps", self.n, "lm.Steps(1000)")

    def __repr__(self) -> str:
        return f"Steps({self.n})"

    def reached(self, clock: Clock) -> bool:
        """Whether `n` steps are complete."""
        return clock.step >= self.n

    def steps(self) -> int | None:
        """`n`."""
        return self.n

    def only_steps(self) -> bool:
        """Yes."""
        return True


@checked
@dataclass(frozen=True)
class Epochs(Until):
    """End after `n` passes over the data.

    >>> import lumen as lm
    >>> lm.Epochs(3) | lm.Seconds(3600)
    Epochs(3) | Seconds(3600)
    """

    n: int

    def __post_init__(self) -> None:
        _check_positive("Epochs", self.n, "lm.Epochs(10)")

    def __repr__(self) -> str:
        return f"Epochs({self.n})"

    def reached(self, clock: Clock) -> bool:
        """Whether `n` epochs are complete."""
        return clock.epoch >= self.n

    def epochs(self) -> int | None:
        """`n`."""
        return self.n

    def only_steps(self) -> bool:
        """Yes: it is checked when an epoch ends."""
        return True


@checked
@dataclass(frozen=True)
class Tokens(Until):
    """End at the first step that is complete after `n` tokens.

    The Runner's `tokens` counts those of a batch. By default each element of the batch's first integer tensor is one.

    >>> import lumen as lm
    >>> lm.Tokens(10**9) | lm.Seconds(3600)
    Tokens(1000000000) | Seconds(3600)
    """

    n: int

    def __post_init__(self) -> None:
        _check_positive("Tokens", self.n, "lm.Tokens(10**9)")

    def __repr__(self) -> str:
        return f"Tokens({self.n})"

    def reached(self, clock: Clock) -> bool:
        """Whether `n` tokens were trained on."""
        return clock.tokens >= self.n

    def needs_tokens(self) -> bool:
        """Yes."""
        return True


@checked
@dataclass(frozen=True)
class Seconds(Until):
    """End at the first step that is complete after `n` seconds of running time.

    >>> import lumen as lm
    >>> lm.Seconds(3600)
    Seconds(3600)
    """

    n: float

    def __post_init__(self) -> None:
        _check_positive("Seconds", self.n, "lm.Seconds(3600)")

    def __repr__(self) -> str:
        return f"Seconds({self.n})"

    def reached(self, clock: Clock) -> bool:
        """Whether `n` seconds have passed."""
        return clock.seconds >= self.n


@dataclass(frozen=True)
class _First(Until):
    members: tuple[Until, ...]

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.members))

    def reached(self, clock: Clock) -> bool:
        return any(member.reached(clock) for member in self.members)

    def steps(self) -> int | None:
        return min((n for member in self.members if (n := member.steps()) is not None), default=None)

    def epochs(self) -> int | None:
        return min((n for member in self.members if (n := member.epochs()) is not None), default=None)

    def only_steps(self) -> bool:
        return all(member.only_steps() for member in self.members)

    def needs_tokens(self) -> bool:
        return any(member.needs_tokens() for member in self.members)


@checked
@dataclass(frozen=True)
class Every:
    """An interval of `steps` steps, `epochs` epochs or `seconds` seconds; of several, whichever is over first.

    >>> import lumen as lm
    >>> lm.Every(steps=500)
    Every(steps=500)
    """

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        intervals = self._intervals()
        if not intervals:
            raise HyperparameterError("Every takes steps, epochs or seconds: lm.Every(steps=500)")
        for name, value in intervals.items():
            _check_positive(f"Every({name}=…)", value, f"lm.Every({name}={500 if name == 'steps' else 1})")

    def __repr__(self) -> str:
        return f"Every({', '.join(f'{k}={v}' for k, v in self._intervals().items())})"

    def _intervals(self) -> dict[str, float]:
        values = {"steps": self.steps, "epochs": self.epochs, "seconds": self.seconds}
        return {name: value for name, value in values.items() if value is not None}


class Timer:
    """Says when something that happens `Every` so often is due, counting from `clock`."""

    def __init__(self, every: Every, clock: Clock) -> None:
        self.every = every
        self.restart(clock)

    def restart(self, clock: Clock) -> None:
        """Start a new interval at `clock`."""
        self._since = {"step": clock.step, "epoch": clock.epoch, "seconds": clock.seconds}
        steps = self.every.steps
        self.next_step = NEVER if steps is None else (clock.step // steps + 1) * steps

    @property
    def since(self) -> int:
        """The step at which the interval began."""
        return int(self._since["step"])

    def due(self, clock: Clock, epoch_end: bool = True) -> bool:
        """Whether it is due; it stays due until `restart`. An interval of epochs is due only at the end of an epoch."""
        every = self.every
        if every.epochs is not None and not epoch_end:
            return False
        return (
            clock.step >= self.next_step
            or (every.epochs is not None and clock.epoch // every.epochs > self._since["epoch"] // every.epochs)
            or (every.seconds is not None and clock.seconds - self._since["seconds"] >= every.seconds)
        )

    def state_dict(self) -> dict[str, Any]:
        """The time at which the interval began."""
        return dict(self._since)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the interval that `state_dict` returned."""
        self.restart(Clock(**state))


def _members(until: Until) -> tuple[Until, ...]:
    return until.members if isinstance(until, _First) else (until,)


def _check_positive(what: str, value: float, line: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not value > 0:
        raise HyperparameterError(f"{what} takes a positive number, got {value!r:.80}. Write: {line}")
