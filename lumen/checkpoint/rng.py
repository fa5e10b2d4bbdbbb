"""The states of the global random generators as a tree, for exact resume."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lumen.core.device import module_of, running
from lumen.errors import CheckpointError, InexactWarning


def capture() -> dict[str, Any]:
    """The states of torch's generators on the CPU and each accelerator in use, and of NumPy's and Python's global ones.

    >>> import lumen as lm, torch
    >>> before = lm.checkpoint.rng.capture()
    >>> first = torch.rand(3)
    >>> lm.checkpoint.rng.restore(before)
    >>> torch.equal(torch.rand(3), first)
    True
    """
    kind, words, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (the global one is captured)
    version, state, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": {str(i): state for i, state in enumerate(_cuda_states())},
        **_accelerator_states(),
        "numpy": {
            "kind": str(kind),
            "words": torch.from_numpy(np.array(words, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {"version": version, "state": torch.tensor(state, dtype=torch.int64), "gauss": next_gauss},
    }


def _cuda_states() -> list[torch.Tensor]:
    # The call would initialize CUDA, which must not happen as a side effect in a process that forks workers.
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _accelerator_states() -> dict[str, Any]:
    """The states of an accelerator other than CUDA, under "other"; empty if there is none, as in old checkpoints."""
    accelerator = running()
    if accelerator is None or accelerator[0] == "cuda":
        return {}
    kind, module = accelerator
    states = {str(i): module.get_rng_state(torch.device(kind, i)) for i in range(module.device_count())}
    return {"other": {kind: states}}


def restore(tree: Mapping[str, Any]) -> None:
    """Restore the result of `capture`, also after a round trip through `lm.checkpoint.load`.

    A device that does not exist here is skipped, with an `InexactWarning`. Raises `CheckpointError` for any other tree,
    and then changes nothing.

    >>> import lumen as lm
    >>> lm.checkpoint.rng.restore({"torch": None})
    Traceback (most recent call last):
        ...
    lumen.errors.CheckpointError: this is not what lm.checkpoint.rng.capture() gave: KeyError('numpy')
    """
    try:
        numpy, python = tree["numpy"], tree["python"]
        words = numpy["words"].numpy().astype(np.uint32)
        numpy_state = (numpy["kind"], words, numpy["position"], numpy["has_gauss"], numpy["gauss"])
        python_state = (python["version"], tuple(python["state"].tolist()), python["gauss"])
        np.random.RandomState().set_state(numpy_state)
        random.Random().setstate(python_state)
        torch.Generator().set_state(tree["torch"])
        cuda = dict(tree["cuda"])
        other_states = [(str(kind), dict(states)) for kind, states in tree.get("other", {}).items()]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"this is not what lm.checkpoint.rng.capture() gave: {error!r}") from error
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate(python_state)
    torch.set_rng_state(tree["torch"])
    _restore_devices("cuda", "CUDA", cuda)
    for kind, states in other_states:
        _restore_devices(kind, kind.upper(), states)


def _restore_devices(kind: str, label: str, states: Mapping[Any, torch.Tensor]) -> None:
    module = module_of(torch.device(kind)) if states else None
    count = 0 if module is None else module.device_count()
    absent = sorted(str(name) for name in states if int(name) >= count)
    for name, state in states.items():
        if module is not None and int(name) < count:
            module.set_rng_state(state, torch.device(kind, int(name)))
    if absent:
        warnings.warn(
            f"the generators of the {label} devices {', '.join(absent)} were not restored: this machine has {count}."
            " Random numbers drawn there, such as dropout, will differ.",
            InexactWarning,
            stacklevel=3,
        )
