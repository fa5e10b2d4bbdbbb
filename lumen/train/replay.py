"""`lm.replay`: runs a step again that `lm.guard("dump")` wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from lumen import checkpoint, tree
from lumen.checkpoint import json_tree, listed, rng
from lumen.core.arguments import checked_first
from lumen.core.step import Step, StepFn, Transform, as_step, compose, device_of
from lumen.errors import CheckpointError, CheckpointMismatchError, CorruptCheckpointError, StepError
from lumen.transforms._guard import guard
from lumen.transforms._support.snapshot_dump import KIND
from lumen.transforms._unroll import unroll


@checked_first
def replay(path: str | os.PathLike[str], step: StepFn, state: Any, *, batch: Any = None) -> tuple[Any, Any]:
    """Run the step in the dump at `path` again, with the same state, batch and random numbers, so it fails again.

    Returns what the step returns, or raises its error. It writes no other dump.

    Args:
        path: the directory that `lm.guard("dump")` wrote.
        step: the step with the transforms that it ran under.
        state: a plain state of the same structure (as for a new run); its values do not matter.
        batch: a batch of the same structure, if its type cannot be stored as plain data; its values do not matter.

    Raises:
        CheckpointError: there is no dump, it is damaged, or it belongs to another state or to other transforms.
        StepError: the batch has a type that cannot be stored, and `batch` is missing.

    >>> import lumen as lm, tempfile, torch
    >>> def step(state, x):
    ...     loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0].mean())(state.params, x)
    ...     return state.apply_gradients(grads), {"loss": loss}
    >>> guarded = lm.guard("dump", tempfile.mkdtemp())(step)
    >>> start = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
    >>> try:
    ...     guarded(guarded.init(start), torch.full((3, 2), torch.nan))
    ... except lm.NonFiniteError:
    ...     pass
    >>> lm.replay(guarded.transforms[0].directory + "/step-0", guarded, start)
    Traceback (most recent call last):
        ...
    lumen.errors.NonFiniteError: the loss is not finite at step 0. The update was skipped. ...
    """
    meta = read_description(path)
    replayed = _replayed_step(as_step(step), meta)
    like = replayed.init(state)
    saved_batch = _read_batch(path, meta, batch)
    generators = _read_rng(path)
    try:
        restored = checkpoint.restore(path, like, rename=_state_path)
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(
            f"{error}\nThe step in it ran under {_list(meta['transforms'])}, but this one runs under"
            f" {_list([repr(t) for t in replayed.transforms])}. Give the step with the same transforms, and a state of"
            " the same model and optimizer."
        ) from error
    device = device_of(restored)
    saved_batch = tree.map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, saved_batch)
    rng.restore(generators)
    return replayed(restored, saved_batch)


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of the dump at `path`.

    `message` is the failure's message, `step` the counter before the call, and `steps` the number of steps in it.
    `transforms` has their reprs, outermost first, `function` is the module and name of the step, and `batch` its
    structure as JSON, or None if its type cannot be stored.

    Raises `CheckpointError` for what is not a dump.
    """
    meta = checkpoint.metadata(path).get("meta")
    if not isinstance(meta, dict) or meta.get("kind") != KIND:
        raise CheckpointError(f"{Path(path)} is a checkpoint, but not a step that lm.guard('dump') wrote.")
    is_valid = (
        isinstance(meta.get("message"), str)
        and isinstance(meta.get("function"), str)
        and isinstance(meta.get("steps"), int)
        and isinstance(meta.get("step"), int | None)
        and isinstance(meta.get("batch"), str | None)
        and isinstance(meta.get("transforms"), list)
        and all(isinstance(text, str) for text in meta["transforms"])
    )
    if not is_valid:
        raise _damaged(path, "its description of the step is invalid")
    return meta


def _replayed_step(step: Step, meta: dict[str, Any]) -> Step:
    """The step without `unroll`, if the dump has a single step, and with a guard that writes no dump."""
    transforms = [t for t in step.transforms if meta["steps"] > 1 or not isinstance(t, unroll)]
    return compose(*map(_without_dump, transforms))(step.user)


def _without_dump(transform: Transform) -> Transform:
    if isinstance(transform, guard) and transform.on_nonfinite == "dump":
        return transform.replace(on_nonfinite="raise")
    return transform


def _read_batch(path: str | os.PathLike[str], meta: dict[str, Any], like: Any) -> Any:
    if meta["batch"] is None and like is None:
        raise StepError(
            "the batch in this dump has a type that could not be stored; give a batch of the same structure:"
            " lm.replay(path, step, state, batch=next(iter(loader)))"
        )
    tensors = checkpoint.load(path, under="batch")
    if meta["batch"] is not None:
        try:
            return json_tree.unpack({"text": meta["batch"], "tensors": tensors})
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise _damaged(path, f"its batch is invalid ({error})") from error
    spec, leaves = tree.structure(like), listed(tensors)
    if spec.num_leaves != len(leaves):
        raise StepError(f"the batch has {spec.num_leaves} leaves, but the batch in the dump has {len(leaves)}.")
    return tree.unflatten(spec, leaves)


def _read_rng(path: str | os.PathLike[str]) -> Any:
    extra = checkpoint.load(path, item="extra")
    if not isinstance(extra, dict) or "rng" not in extra:
        raise _damaged(path, "it has no random generators")
    return extra["rng"]


def _damaged(path: str | os.PathLike[str], why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"the dump {Path(path)} is damaged: {why}.")


def _list(transforms: list[str]) -> str:
    return ", ".join(transforms) or "no transforms"


def _state_path(name: str) -> str | None:
    return name.removeprefix("state/") if name.startswith("state/") else None
