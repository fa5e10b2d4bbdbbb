"""`lm.replay`: a step that `lm.guard("dump")` wrote, done again alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from lumen import checkpoint, tree
from lumen.checkpoint import json_tree, listed, rng
from lumen.core.step import Step, StepFn, as_step, compose, device_of
from lumen.errors import CheckpointError, CheckpointMismatchError, CorruptCheckpointError, StepError
from lumen.transforms._guard import guard
from lumen.transforms._support.snapshot_dump import KIND
from lumen.transforms._unroll import unroll


def replay(path: str | os.PathLike[str], step: StepFn, state: Any, *, batch: Any = None) -> tuple[Any, Any]:
    """Do the step in the dump at `path` again: the same state, batch and random numbers, so the same failure.

    Returns what the step returns; where it fails as it did, that error is raised. No other dump is written.

    Args:
        path: what `lm.guard("dump")` wrote.
        step: the step with the transforms that it ran under.
        state: a plain state of the same form (as for a new run); its values do not matter.
        batch: one of the same form, where the batch is of a type that plain data cannot tell; its values do not matter.

    Raises:
        CheckpointError: there is no dump, it is damaged, or it is that of another state or of other transforms.
        StepError: the batch is of a type of its own, and none like it was given.

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
    lumen.errors.NonFiniteError: the loss is not finite at step 0. The update was left out. ...
    """
    meta = described(path)
    run = _fitting(as_step(step), meta)
    like = run.init(state)
    given = _batch(path, meta, batch)
    generators = _generators(path)
    try:
        restored = checkpoint.restore(path, like, rename=_state_alone)
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(
            f"{error}\nThe step in it ran under {_list(meta['transforms'])}, the one given runs under"
            f" {_list([repr(t) for t in run.transforms])}. Give the step with the same transforms, and a state of the"
            " same model and optimizer."
        ) from error
    device = device_of(restored)
    given = tree.map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, given)
    rng.restore(generators)
    return run(restored, given)


def described(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the dump at `path` says of itself.

    `message` is that of the failure, `step` the counter before the call and `steps` how many were in it, `transforms`
    are as they read, outermost first, `function` is the module and name of the step, `batch` its form as JSON, or None
    where it has a type of its own.

    Raises `CheckpointError` for what is no dump.
    """
    meta = checkpoint.metadata(path).get("meta")
    if not isinstance(meta, dict) or meta.get("kind") != KIND:
        raise CheckpointError(f"{Path(path)} is a checkpoint, but not a step that lm.guard('dump') wrote.")
    sound = (
        isinstance(meta.get("message"), str)
        and isinstance(meta.get("function"), str)
        and isinstance(meta.get("steps"), int)
        and isinstance(meta.get("step"), int | None)
        and isinstance(meta.get("batch"), str | None)
        and isinstance(meta.get("transforms"), list)
        and all(isinstance(each, str) for each in meta["transforms"])
    )
    if not sound:
        raise _damaged(path, "what it says of the step is not sound")
    return meta


def _fitting(step: Step, meta: dict[str, Any]) -> Step:
    """The step without `unroll` where a single one was written, and with a guard that writes nothing."""
    kept = [t for t in step.transforms if meta["steps"] > 1 or not isinstance(t, unroll)]
    return compose(*(guard("raise") if isinstance(t, guard) and t.on_nonfinite == "dump" else t for t in kept))(
        step.user
    )


def _batch(path: str | os.PathLike[str], meta: dict[str, Any], like: Any) -> Any:
    if meta["batch"] is None and like is None:
        raise StepError(
            "the batch in this dump is of a type of its own; give one of the same form:"
            " lm.replay(path, step, state, batch=next(iter(loader)))"
        )
    tensors = checkpoint.load(path, under="batch")
    if meta["batch"] is not None:
        try:
            return json_tree.unpack({"text": meta["batch"], "tensors": tensors})
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise _damaged(path, f"its batch is not sound ({error})") from error
    spec, leaves = tree.structure(like), listed(tensors)
    if spec.num_leaves != len(leaves):
        raise StepError(f"the batch given has {spec.num_leaves} leaves, that in the dump {len(leaves)}.")
    return tree.unflatten(spec, leaves)


def _generators(path: str | os.PathLike[str]) -> Any:
    extra = checkpoint.load(path, item="extra")
    if not isinstance(extra, dict) or "rng" not in extra:
        raise _damaged(path, "it has no random generators")
    return extra["rng"]


def _damaged(path: str | os.PathLike[str], why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"the dump {Path(path)} is damaged: {why}.")


def _list(transforms: list[str]) -> str:
    return ", ".join(transforms) or "no transforms"


def _state_alone(name: str) -> str | None:
    return name.removeprefix("state/") if name.startswith("state/") else None
