"""`GradReducer`: how the gradients of several ranks become one, the same protocol for every strategy.

One gradient passes three layers, and each strategy differs in the last one alone:

1. `lumen.core.gradient` differentiates the loss of this rank's rows, and hands its result to the call's `Reduction`.
2. `lumen.parallel.ddp.grad_reduction.GradReduction` is that `Reduction` for every strategy. It decides how rows weigh.
   Losses travel as totals: what is differentiated is the *sum* over this rank's rows, so a rank with more rows
   counts more, and one without any counts nothing. Beside the gradients it sums a few numbers, the stats: the loss's
   total and weight, the number of rows, and means over rows. The sum of gradients divided by the summed weight is the
   gradient of the mean over the global batch.
3. A `GradReducer` sums tensors, and knows nothing of losses:

   | strategy | implementation | a gradient is sent | this rank receives |
   |---|---|---|---|
   | ddp, fsdp stage 1 | `comm.buckets.Buckets` | once its bucket is full, in the backward pass | the sum |
   | fsdp stage 2 | `fsdp.grad_reduction.ShardReducer` | after the backward pass | its shard of the sum |
   | fsdp stage 3 | `fsdp.grad_reduction.UnitReducer` | when the backward pass leaves its unit | its shard |
   | the same, compiled | `fsdp.grad_reduction.TracedUnitReducer` | the same, as a node of the graph | its shard |
   | deepspeed | `deepspeed.grad_reduction.EngineReducer` | by the engine | nothing: the engine keeps it |

`lm.tensor_parallel` splits a model and not its rows. Its gradients are summed inside the loss, by the transposes of its
collectives (`tensor.autograd_collectives`), and then go through the reducer of the `ddp` or `fsdp` around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class GradReducer(Protocol):
    """Sums the gradients of one update over the ranks that have other rows.

    With `in_backward`, gradients are sums already when the backward pass returns them. Then every rank must run equally
    many backward passes, and a rank without rows takes part in each of them with zeros.

    `flat_sums` are the flat tensors that hold the sums after `finish`, if nothing else refers to them: dividing these
    divides the gradients. It is empty where sums are tensors of their own.
    """

    in_backward: bool
    flat_sums: list[Tensor]

    def register_hooks(self, live: Sequence[Tensor]) -> None:
        """Called before the backward pass with the leaves that are differentiated, in the order of params."""

    def finish(self, grads: Sequence[Tensor], stats: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The sums over ranks of `grads`, of which a rank may receive its shards alone, and of `stats`.

        `grads` are what the backward pass returned, in the order of params. `stats` are a few numbers of one dtype,
        whose sums are one vector.
        """
