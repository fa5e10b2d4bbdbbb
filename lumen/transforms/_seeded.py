"""`lm.seeded`: make steps that draw from torch's generators replayable."""

from __future__ import annotations

from typing import Any

import torch

from lumen import random
from lumen.core import distributed
from lumen.core.device import forked_rng
from lumen.core.step import StepFn, Transform, device_of, field_of


class seeded(Transform):
    """Seed torch's generators from seed, step and rank before each step, and restore them after.

    Processes that are handed the same rows (along a mesh's `tensor` axis) are seeded alike.

    Dropout and `torch.rand` inside the step then depend on nothing but the state: a step can be replayed, and a resumed
    run goes on as if it had not been interrupted. The seeding happens on the host, outside compiled regions, and reads
    two numbers from the state, so on an accelerator it waits for the step before.

    Law: `seeded()(step)` is a function of `(state, batch)`; a step that draws nothing is unchanged, bitwise.

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
    reason = "the generators are seeded once for a step"

    def wrap_host(self, step: StepFn) -> StepFn:
        """The step with its generators seeded."""

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            seed = _seed_of(state)
            with forked_rng(device_of(state)):
                torch.manual_seed(seed)
                return step(state, batch)

        return run


def _seed_of(state: Any) -> int:
    # The lanes of an ensemble share one stream: torch gives each lane numbers of its own from it.
    seed, step = (int(t.flatten()[0]) for t in (field_of(state, "seed", "seeded"), field_of(state, "step", "seeded")))
    key = random.fold_in(random.fold_in(random.key(seed), step), distributed.rows()[0])
    high, low = key.tolist()
    return int(high << 31) ^ int(low)
