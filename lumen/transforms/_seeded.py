"""`lm.seeded`: make steps that use torch's random generators replayable."""

from __future__ import annotations

from typing import Any

import torch

from lumen import random
from lumen.core import distributed
from lumen.core.device import forked_rng
from lumen.core.nested_states import train_states
from lumen.core.step import StepFn, Transform, device_of, field_of


class seeded(Transform):
    """Seed torch's random generators from the state's seed and step and the rank, and restore them after each step.

    Dropout and `torch.rand` inside the step then depend on the state alone, so a step can be replayed, and a resumed
    run continues as if it had never stopped. Processes that receive the same rows (along a mesh's `tensor` axis) get
    the same seed. Seeding happens on the host, outside compiled graphs. It reads two numbers from the state, and so
    waits for the previous step on an accelerator.

    Law: `seeded()(step)` is a function of `(state, batch)`; a step that draws no random numbers is bitwise unchanged.

    >>> import lumen as lm, torch
    >>> def step(state, batch):
    ...     return state, {"noise": torch.rand(())}
    >>> state = lm.TrainState.create(torch.nn.Linear(1, 1), lm.optim.sgd(0.1))
    >>> a, b = (lm.seeded()(step)(state, None)[1]["noise"] for _ in range(2))
    >>> torch.equal(a, b)
    True
    """

    name = "seeded"
    level = "seeded"
    reason = "seeded seeds the generators once per step"

    def wrap_host(self, step: StepFn) -> StepFn:
        """The step with seeded generators."""

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            seed = _seed_of(state)
            with forked_rng(device_of(state)):
                torch.manual_seed(seed)
                return step(state, batch)

        return run


def _seed_of(state: Any) -> int:
    inner = train_states(state)
    if not hasattr(state, "seed") and inner:  # of several states, each has its own: the first one's serves for all
        state = inner[0][1]
    # The lanes of an ensemble share one stream, from which torch draws different numbers for each lane.
    seed, step = (int(t.flatten()[0]) for t in (field_of(state, "seed", "seeded"), field_of(state, "step", "seeded")))
    key = random.fold_in(random.fold_in(random.key(seed), step), distributed.rows()[0])
    high, low = key.tolist()
    return int(high << 31) ^ int(low)
