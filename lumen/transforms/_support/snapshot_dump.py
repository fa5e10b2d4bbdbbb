"""Writing a step that failed, so that it can be done again alone: see `lumen.train.replay`."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lumen import checkpoint, tree
from lumen.checkpoint import json_tree, rng
from lumen.core import distributed
from lumen.core.step import Step
from lumen.errors import CheckpointError

KIND = "lumen step"
_UPDATED = ("params", "opt_state", "buffers")  # a bad update is left out, so these stay as they are


@dataclass(frozen=True)
class CallTrace:
    """What a guard met while one call ran or was traced; nothing where it ran as it was compiled before."""

    steps: int = 0
    updates: int = 0
    traced: bool = False

    def with_step(self, updates: int, traced: bool) -> CallTrace:
        """With one more step."""
        return CallTrace(self.steps + 1, self.updates + updates, traced)


@dataclass(frozen=True)
class SnapshotPolicy:
    """What must be copied before a call, because the call overwrites it: learned from the calls before."""

    copied: Literal["all", "others", "nothing"] = "all"
    steps: int = 1

    def after(self, trace: CallTrace, donated: bool) -> SnapshotPolicy:
        """What the next call needs.

        A donated step writes over params and optimizer state, but not in the update that is left out; where there are
        several updates, those before it are done. Compiled, it writes over everything.
        """
        if not trace.steps:
            return self
        if donated and trace.updates > 1:
            return SnapshotPolicy("all", trace.steps)
        return SnapshotPolicy("others" if donated and trace.traced else "nothing", trace.steps)

    def copies(self, path: str) -> bool:
        """Whether the leaf with this path is copied."""
        if self.copied == "others":
            return re.split(r"[.\[]", path, maxsplit=1)[0] not in _UPDATED
        return self.copied == "all"


@dataclass(frozen=True)
class PreStepSnapshot:
    """What a call is about to be given."""

    leaves: list[Any]
    spec: tree.Spec
    generators: dict[str, Any]

    @classmethod
    def of(cls, state: Any, policy: SnapshotPolicy) -> PreStepSnapshot:
        """The state as it is now, also where its memory is handed over."""
        leaves, spec = tree.flatten(state)
        if policy.copied != "nothing":
            leaves = [
                leaf.clone() if isinstance(leaf, Tensor) and policy.copies(path) else leaf
                for path, leaf in zip(tree.paths(state), leaves, strict=True)
            ]
        return cls(leaves, spec, rng.capture())

    def write(
        self, directory: str, within: Step | None, steps: int, number: int | None, batch: Any, message: str
    ) -> str:
        """Write it all, and say where; where that fails, say why, for the step's own error is the one to raise."""
        path = _free_path(Path(directory), number)
        text, tensors = _packed(batch)
        meta = {
            "kind": KIND,
            "message": message,
            "step": number,
            "steps": steps,
            "transforms": [repr(transform) for transform in (within.transforms if within else ())],
            "function": _name_of(within),
            "batch": text,
        }
        try:
            checkpoint.save(
                path,
                {"state": tree.unflatten(self.spec, self.leaves), "batch": tensors},
                extra={"rng": self.generators},
                meta=meta,
            )
        except (OSError, CheckpointError) as error:
            return f" It could not be written to {path}: {error}"
        return f" State and batch are in {path}; do the step again with: lumen replay {path}"


def _packed(batch: Any) -> tuple[str | None, list[Any]]:
    """The batch as text and tensors, or as its leaves alone where it has a type of its own."""
    try:
        packed = json_tree.pack(batch)
    except TypeError:
        return None, tree.leaves(batch)
    return packed["text"], packed["tensors"]


def _name_of(step: Step | None) -> str:
    user = None if step is None else step.user
    return f"{getattr(user, '__module__', '?')}:{getattr(user, '__qualname__', type(user).__name__)}"


def _free_path(directory: Path, number: int | None) -> Path:
    name = "step" if number is None else f"step-{number}"
    if distributed.world_size() > 1:  # each rank writes its own rows
        name += f"-rank-{distributed.rank()}"
    paths = itertools.chain([directory / name], (directory / f"{name}.{n}" for n in itertools.count(2)))
    return next(path for path in paths if not os.path.lexists(path))
