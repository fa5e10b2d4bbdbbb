"""Every exception that Lumen raises on purpose; each also derives from the built-in it refines."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""The text with all that does not print written out, but what is in `keep`.

    Names of leaves, metrics and files may come from a stranger's file: in a message they neither reach a terminal as
    control sequences nor begin a line of their own.

    >>> printable("fc\x1b[31m\nweight")
    'fc\\x1b[31m\\nweight'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class _Printable(Exception):  # noqa: N818 (warnings derive from it, too)
    """An exception or warning whose message has no control characters but line ends and tabs."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(each, "\n\t") if isinstance(each, str) else each for each in args))


class LumenError(_Printable):
    """Base of all errors raised by Lumen: `except lm.LumenError` catches every one of them."""


class BatchError(LumenError, ValueError):
    """A batch that cannot be split, counted or cut: its leaves disagree, or it is too small or empty."""


class LossError(LumenError, ValueError):
    """A loss that cannot be differentiated: not a scalar or `Mean`, or independent of the params."""


class ParamsError(LumenError, ValueError):
    """Params or a module that cannot be trained: integer, uninitialized, missing or unexpected leaves."""


class StepError(LumenError, TypeError):
    """A step that does not return `(state, metrics)` with the state's own structure."""


class PurityError(LumenError, RuntimeError):
    """A step that changes what it was given, or answers differently when called again."""


class StateError(LumenError, TypeError):
    """A state type that is not a proper pytree, or an attempt to assign to a frozen one."""


class DonatedError(LumenError, RuntimeError):
    """A state whose memory was handed over to its successor is used again, or cannot be handed over."""


class OrderError(LumenError, ValueError):
    """Transforms composed in an order in which they would not mean what they say."""


class SlotError(LumenError, KeyError):
    """A transform with memory found no slot of its own in the state."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0]) if self.args else ""


class PatternError(LumenError, ValueError):
    """A name pattern that matches nothing, or a leaf that no pattern matches."""


class HyperparameterError(LumenError, ValueError):
    """A hyperparameter outside its range, NaN included."""


class MergeError(LumenError, ValueError):
    """Parts of a batch changed a buffer, and nothing says how they make that of the whole batch."""


class NonFiniteError(LumenError, FloatingPointError):
    """A loss, gradient or parameter that is not finite."""


class MetricError(LumenError, TypeError):
    """A metric that cannot be a typed value, or values of different metrics that cannot merge."""


class WorldError(LumenError, RuntimeError):
    """Processes, a mesh of them, or what they hold, that do not fit together."""


class AxisError(LumenError, RuntimeError):
    """A collective over an axis that cannot run where it was called."""


class UpdateInterceptedError(LumenError, RuntimeError):
    """`tx.update` was called by hand where a transform must see the whole update."""


class ValueKindError(LumenError, TypeError):
    """A value that no sink can write, or an image or configuration that is not one."""


class SinkError(LumenError, ValueError):
    """A file that is another table, a value that takes the name of a sink's own column, or an unknown `on_error`."""


class CheckpointError(LumenError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class CheckpointLeafError(CheckpointError, TypeError):
    """A tree with a leaf, or a name, that no checkpoint holds."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no complete checkpoint where one was asked for."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """There is something already where a checkpoint, or an export, was to be written."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint whose files are damaged, incomplete or lead elsewhere."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint whose leaves are not those of the tree that it is to fill."""


class CheckpointFormatError(CheckpointError):
    """A checkpoint in a format that this version does not read."""


class CheckpointLockedError(CheckpointError):
    """A directory that another run writes its checkpoints to."""


class GraphBreakWarning(_Printable, UserWarning):
    """A step that cannot be compiled whole; it runs with graph breaks instead."""


class InexactWarning(_Printable, UserWarning):
    """Something runs, but slower or less exactly than it was asked to."""
