"""Dumps of failed steps, which `lumen.train.replay` reruns."""

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
from lumen.checkpoint.shard_specs import without_sharding_slots
from lumen.core import distributed
from lumen.core.step import Step
from lumen.errors import CheckpointError

KIND = "lumen step"
_UPDATED = ("params", "opt_state", "buffers")  # unchanged when a bad update is skipped


@dataclass(frozen=True)
class CallTrace:
    """The steps and updates that a guard counted in one call; none if the call ran a graph compiled earlier."""

    steps: int = 0
    updates: int = 0

    def with_step(self, updates: int) -> CallTrace:
        """The trace with one more step."""
        return CallTrace(self.steps + 1, self.updates + updates)


@dataclass(frozen=True)
class SnapshotPolicy:
    """Which leaves to copy before a call because the call overwrites them, learned from earlier calls."""

    copied: Literal["all", "others", "nothing"] = "all"
    steps: int = 1

    def after(self, trace: CallTrace, donated: bool) -> SnapshotPolicy:
        """The policy for the next call.

        A donated step overwrites params and optimizer state, except in an update that is skipped. If the step makes
        several updates, those before the skipped one have overwritten them. It also overwrites slots, such as the
        average of `ema`, and a compiled one all leaves.
        """
        if not trace.steps:
            return self
        if donated and trace.updates > 1:
            return SnapshotPolicy("all", trace.steps)
        return SnapshotPolicy("others" if donated else "nothing", trace.steps)

    def copies(self, path: str) -> bool:
        """Whether to copy the leaf with this path."""
        if self.copied == "others":
            return re.split(r"[.\[]", path, maxsplit=1)[0] not in _UPDATED
        return self.copied == "all"


@dataclass(frozen=True)
class PreStepSnapshot:
    """The state and the random generators before a call."""

    leaves: list[Any]
    spec: tree.Spec
    generators: dict[str, Any]

    @classmethod
    def of(cls, state: Any, policy: SnapshotPolicy) -> PreStepSnapshot:
        """A snapshot of the state that stays valid while the call overwrites donated memory."""
        leaves, spec = tree.flatten(state)
        if policy.copied != "nothing":
            leaves = [
                leaf.clone() if isinstance(leaf, Tensor) and policy.copies(path) else leaf
                for path, leaf in zip(tree.paths(state), leaves, strict=True)
            ]
        return cls(leaves, spec, rng.capture())

    def write(
        self, directory: str, step: Step | None, steps: int, step_number: int | None, batch: Any, message: str
    ) -> str:
        """Write the dump, and return a sentence with its path; if writing fails, a sentence with the reason.

        It does not raise, so that the caller can raise the step's own error.
        """
        path = _unused_path(Path(directory), step_number)
        text, tensors = _packed(batch)
        meta = {
            "kind": KIND,
            "message": message,
            "step": step_number,
            "steps": steps,
            "transforms": [repr(transform) for transform in (step.transforms if step else ())],
            "function": _function_name(step),
            "batch": text,
        }
        try:
            checkpoint.save(
                path,
                {"state": without_sharding_slots(tree.unflatten(self.spec, self.leaves)), "batch": tensors},
                extra={"rng": self.generators},
                meta=meta,
            )
        except (OSError, CheckpointError) as error:
            return f" The dump could not be written to {path}: {error}"
        return f" State and batch were written to {path}. Rerun the step with: lumen replay {path}"


def _packed(batch: Any) -> tuple[str | None, list[Any]]:
    """The batch as text and tensors, or as its leaves alone if it has a type that text cannot represent."""
    try:
        packed = json_tree.pack(batch)
    except TypeError:
        return None, tree.leaves(batch)
    return packed["text"], packed["tensors"]


def _function_name(step: Step | None) -> str:
    user = None if step is None else step.user
    return f"{getattr(user, '__module__', '?')}:{getattr(user, '__qualname__', type(user).__name__)}"


def _unused_path(directory: Path, step_number: int | None) -> Path:
    name = "step" if step_number is None else f"step-{step_number}"
    if distributed.world_size() > 1:  # each rank writes its own rows
        name += f"-rank-{distributed.rank()}"
    paths = itertools.chain([directory / name], (directory / f"{name}.{n}" for n in itertools.count(2)))
    return next(path for path in paths if not os.path.lexists(path))
