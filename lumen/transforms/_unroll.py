"""`lm.unroll`: several steps in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lumen import tree
from lumen.core.annotations import integer_of
from lumen.core.arguments import checked
from lumen.core.metrics import merge_metrics
from lumen.core.step import StepFn, Transform
from lumen.errors import BatchError


class unroll(Transform):
    """Run `k` steps in one call, over `k` stacked batches (see `lm.stack`); their metrics are merged.

    Under `lm.compile` the k steps become one graph, so the overhead of a call is paid once.

    Law: `unroll(k)(step)` on k stacked batches equals `step` called k times, bitwise in eager mode. Metrics merge by
    their type; plain numbers are averaged.

    Raises `BatchError` unless the batch contains k batches.

    >>> import lumen as lm, torch
    >>> def step(count, batch):
    ...     return count + batch.sum(), {"rows": lm.Sum.of(torch.tensor(len(batch)))}
    >>> total, metrics = lm.unroll(2)(step)(torch.tensor(0.0), torch.ones(2, 3))
    >>> total, metrics["rows"].compute()
    (tensor(6.), tensor(6))
    """

    name = "unroll"
    level = "unroll"
    reason = "unroll repeats complete steps"

    def __init__(self, k: int) -> None:
        number = integer_of(k, low=1)
        if number is None:
            raise BatchError(f"unroll takes a positive number of steps, got {k!r}. Write lm.unroll(8).")
        self.k = number

    def wrap(self, step: StepFn) -> StepFn:
        """The k steps as one."""

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            all_metrics = []
            for step_batch in self._unstack(batch):
                state, metrics = step(state, step_batch)
                all_metrics.append(metrics)
            return state, merge_metrics(all_metrics)

        return run

    def _unstack(self, batch: Any) -> list[Any]:
        leaves, spec = tree.flatten(batch)
        sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
        if sizes != {self.k}:
            raise BatchError(
                f"unroll({self.k}) takes {self.k} stacked batches, but the leaves' leading sizes are {sorted(sizes)}."
                f" Write: batch = lm.stack([batch_1, …, batch_{self.k}])"
            )
        return [tree.unflatten(spec, [leaf[i] for leaf in leaves]) for i in range(self.k)]


@checked
def stack(batches: Sequence[Any]) -> Any:
    """Stack batches of equal shapes into one tree with a new leading dim, for `unroll`.

    >>> import lumen as lm, torch
    >>> lm.stack([{"x": torch.zeros(3)}, {"x": torch.ones(3)}])["x"].shape
    torch.Size([2, 3])
    """
    return tree.map(lambda *leaves: torch.stack(leaves), *batches)
