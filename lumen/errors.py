"""Every exception that Lumen raises on purpose; most also derive from the built-in exception that they refine."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""The text with unprintable characters as escape sequences, except those in `keep`.

    Names of leaves, metrics and files may come from an untrusted file: in a message they must not send control
    sequences to a terminal, or start a new line.

    >>> printable("fc\x1b[31m\nweight")
    'fc\\x1b[31m\\nweight'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class _Printable(Exception):  # noqa: N818 (warnings derive from it, too)
    """An exception or warning whose message has no control characters except newlines and tabs."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(arg, "\n\t") if isinstance(arg, str) else arg for arg in args))


class LumenError(_Printable):
    """The base of all errors raised by Lumen: `except lm.LumenError` catches every one of them."""


class ArgumentError(LumenError, TypeError):
    """An argument of a type that a function does not take; the message says what it takes, and the line to write."""


class BatchError(LumenError, ValueError):
    """A batch that cannot be split or counted: its leaves disagree in rows, or it is too small or empty."""


class LossError(LumenError, ValueError):
    """A loss that cannot be differentiated: not a scalar or `Mean`, or independent of the params."""


class ParamsError(LumenError, ValueError):
    """Params or a module that cannot be trained: with integer, uninitialized, missing or unexpected leaves."""


class StepError(LumenError, TypeError):
    """A step that does not return `(state, metrics)` with a state of the same structure."""


class PurityError(LumenError, RuntimeError):
    """A step that changes its arguments, or returns other results when it is called again."""


class StateError(LumenError, TypeError):
    """A state type that is not a valid pytree, or an assignment to a field of a frozen state."""


class DonatedError(LumenError, RuntimeError):
    """A donated state that is used again, or a state that cannot be donated."""


class OrderError(LumenError, ValueError):
    """Transforms composed in an order in which they would not do what they promise."""


class SlotError(LumenError, KeyError):
    """A state without the slot that a transform needs."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0]) if self.args else ""


class PatternError(LumenError, ValueError):
    """A name pattern that matches nothing, or a leaf that no pattern matches."""


class HyperparameterError(LumenError, ValueError):
    """A hyperparameter, or another number or shape, outside its range, NaN included."""


class MergeError(LumenError, ValueError):
    """A buffer that microbatches or ranks have changed, without a rule for merging the results."""


class NonFiniteError(LumenError, FloatingPointError):
    """A loss, gradient or parameter that is not finite."""


class SpikeError(LumenError, ArithmeticError):
    """A loss, or a norm of the gradient, far above those of the steps before."""


class RewindError(LumenError, RuntimeError):
    """A run that was to go back to a checkpoint once more than allowed, or that has none that is old enough."""


class MetricError(LumenError, TypeError):
    """A metric that is not a typed value, or values of different metrics that cannot merge."""


class WorldError(LumenError, RuntimeError):
    """Processes, meshes or states of processes that do not fit together, or a process that failed."""


class AxisError(LumenError, RuntimeError):
    """A collective over an axis that cannot run where it is called."""


class UpdateInterceptedError(LumenError, RuntimeError):
    """A manual call of `tx.update` under a transform that must intercept the update."""


class ValueKindError(LumenError, TypeError):
    """A value that a sink cannot write, or an invalid image or configuration."""


class SinkError(LumenError, ValueError):
    """A file of another table, a value with the name of a column that a sink reserves, or an unknown `on_error`."""


class PathError(LumenError, ValueError):
    """A URL where only a path can be, or one of a store that is unknown or whose package is not installed."""


class ObjectStoreError(LumenError, OSError):
    """An object store that does not answer, or denies, after the last retry."""


class CheckpointError(LumenError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class CheckpointLeafError(CheckpointError, TypeError):
    """A tree with a leaf, or a name, that a checkpoint cannot contain."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A path without a complete checkpoint."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """A checkpoint or export whose path already exists."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint with files that are damaged, missing or outside its directory."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint whose leaves differ from those of the tree to restore into."""


class CheckpointFormatError(CheckpointError):
    """A checkpoint in a format, or with a dtype, that this version cannot read."""


class CheckpointLockedError(CheckpointError):
    """A directory to which another run writes its checkpoints."""


class GraphBreakWarning(_Printable, UserWarning):
    """A step that cannot be compiled as a single graph, and runs with graph breaks."""


class InexactWarning(_Printable, UserWarning):
    """Something that works, but slower or less exactly than requested."""
