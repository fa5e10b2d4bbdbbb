"""`lm.ddp`: the same params on every rank, each with its own rows of the batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

from lumen.core import _torch_compat, batching, row_fields, rules
from lumen.core.annotations import integer_of
from lumen.core.primitives import Gradient, GradientCall
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.sharding import ShardSpec
from lumen.core.step import StepFn, Transform, as_step, device_of
from lumen.errors import AxisError, HyperparameterError, OrderError
from lumen.parallel import row_shards
from lumen.parallel.comm import consistency
from lumen.parallel.comm.buckets import BucketPlanCache, Buckets, GradComm
from lumen.parallel.comm.mesh import Mesh, StepMesh
from lumen.parallel.ddp.aux_reduction import BufferChecks
from lumen.parallel.ddp.grad_reduction import Buffers, DataParallelRule, GradReduction
from lumen.parallel.row_reducer import check_context
from lumen.transforms._support.unapplied import Unapplied


class _Processes(StepMesh):
    """The ranks of one step, and the buckets that its gradients are sent in."""

    def __init__(self, mesh: Mesh | None, reduce_dtype: str | None, limit: float) -> None:
        super().__init__(mesh, "data")
        self._reduce_dtype, self._limit = reduce_dtype, limit

    @functools.cached_property
    def comm(self) -> GradComm | None:
        """The ranks that have other rows, or other positions of the same rows; None for one alone."""
        group = self.mesh.group("data", "shard", "context")
        return None if group is None else GradComm(group, self._reduce_dtype)

    @functools.cached_property
    def plans(self) -> BucketPlanCache:
        """The bucket layouts of its gradients."""
        assert self.comm is not None
        return BucketPlanCache(self.comm, self._limit)


class DDPRule(DataParallelRule):
    """What ddp does with each gradient of one step."""

    def __init__(
        self, processes: _Processes, comm: GradComm, buffers: Buffers, state: Any, checks: BufferChecks
    ) -> None:
        super().__init__(comm, buffers, state, checks)
        self._plans = processes.plans

    def __call__(self, next: Next, call: GradientCall) -> Gradient:
        """The gradient of the global batch."""
        if _torch_compat.peek_interpreter_stack() is not None:
            raise AxisError(
                "lm.ddp sums gradients over ranks, which torch cannot do inside vmap or torch.func.grad. Train one"
                " model under lm.ddp, or an lm.ensemble in each process without it."
            )
        rows = batching.count(call.batch)
        # BatchNorm's statistics are summed in the backward pass too, where they must not interleave with buckets.
        overlap = rows > 0 and self._buffers != "sync"
        reducer = Buckets(self._comm, self._plans, overlap)
        reduction = GradReduction(self._comm, reducer, rows, self, self._device)
        self._counts = rows > 0
        call = self._prepared_call(call, rows)
        result: Gradient = next(call.replace(summed=True, reduction=reduction))
        if not rows:
            result = result.replace(aux=self._neutral_aux(result.aux))
        return result if call.summed else reduction.normalized(result)


class ddp(Transform):
    """Split the rows of each batch over ranks, and sum gradients over ranks while they are computed.

    Each rank passes its share of the global batch to the step. Shares may differ in size, or be empty. Params are
    equal on all ranks: `init` checks that all have the same tree, and takes the values of the first rank. Of an
    `lm.row_field()` it keeps this rank's rows, which `export` gathers.

    Law: for any shares, params and loss are those of one process on the global batch, up to the order of
    floating-point sums, as losses are reduced as totals and weights. This includes params that a loss reaches on some
    ranks only, or on none. The loss must be a mean over rows, or over what an `lm.Mean` counts. A loss that needs all
    rows at once (negatives from the batch) gathers them by `lm.all_gather`; `lm.check_purity(..., rows=True)` detects
    it. The loss that `lm.value_and_grad` returns is that of the global batch, and so are plain scalars in `lm.Aux`.
    Typed values stay this rank's own, and merge when they are logged. An inner loop inside the loss (MAML) sees this
    rank's rows alone.

    `buffers` decides how those in `lm.Aux(buffers=...)` are reduced. With "merge" each follows its rule: that of
    `lm.pure(net, merge=...)`, or that of the torch module it belongs to (BatchNorm's running statistics are averaged by
    rows, its counter takes the largest). A buffer without a rule may not change: the first step that changes it raises
    `MergeError`, which names the fix. With "local" each rank keeps its own. In both cases BatchNorm in training mode
    normalizes by the statistics of each rank's own rows. With "sync" it normalizes by those of all rows, as one process
    does, at the cost of two more sums for each layer and of the overlap below.

    `reduce_dtype="bf16"` sends float32 gradients in half the bytes. Declared change: each rank's gradients and their
    sum are rounded to bfloat16 (the sum is taken in float32). `check_every=n` compares the params of all ranks every n
    steps, see `lm.parallel.check_equal`. Buckets of `bucket_mb` MiB are launched during the backward pass.

    A rank without rows runs the loss on two rows of zeros that weigh nothing, and so takes part in every collective.
    Ranks must call `lm.value_and_grad` equally often and on the same params. The first call of each kind is compared.
    A later call that is missing on a rank ends in the mesh's timeout, and `TORCH_DISTRIBUTED_DEBUG=DETAIL` finds it at
    once.

    Raises `WorldError` on every rank where states, versions or steps differ, and `OrderError` for transforms that it
    cannot contain.

    >>> import lumen as lm
    >>> lm.ddp(reduce_dtype="bf16")
    lm.ddp(reduce_dtype='bf16')
    """

    name = "ddp"
    level = "parallel"
    reason = "gradients are reduced once for an update, after everything that computes those of a rank's own rows"

    def __init__(
        self,
        mesh: Mesh | None = None,
        *,
        buffers: Buffers = "merge",
        reduce_dtype: Literal["bf16"] | None = None,
        bucket_mb: float = 25.0,
        check_every: int | None = None,
    ) -> None:
        if buffers not in ("merge", "local", "sync"):
            raise HyperparameterError(f"ddp(buffers={buffers!r}) is unknown; give 'merge', 'local' or 'sync'.")
        if reduce_dtype not in (None, "bf16"):
            raise HyperparameterError(f"ddp(reduce_dtype={reduce_dtype!r}) is unknown; give 'bf16' or None.")
        if not bucket_mb > 0:
            raise HyperparameterError(f"ddp takes buckets of a positive size, got bucket_mb={bucket_mb!r}.")
        period = integer_of(check_every, low=1)
        if check_every is not None and period is None:
            raise HyperparameterError(f"ddp(check_every={check_every!r}) must be a positive number of steps, or None.")
        self.buffers = buffers
        self.reduce_dtype = reduce_dtype
        self.bucket_mb = bucket_mb
        self.check_every = period
        self._mesh = mesh

    def _new_memory(self) -> _Processes:
        return _Processes(self._mesh, self.reduce_dtype, self.bucket_mb * 2**20)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the constructor, by default all ranks along `data`."""
        processes: _Processes = self._memory
        return processes.mesh

    def init(self, state: Any) -> Any:
        """The first rank's state, after a check that all ranks have the same; of row fields this rank's rows."""
        row_shards.check(state)
        row_shards.check_size(state, self.mesh)
        comm = self._memory.comm
        if comm is None:
            return state
        check_context(self, self.mesh)
        prepared = row_shards.is_sharded(state)
        shared, rows = row_fields.split_off(state) if prepared else (state, [])
        lines = consistency.fingerprint_lines(shared, self.within)
        consistency.assert_same_on_all_ranks(lines, comm.group, device_of(state), "the processes of lm.ddp")
        shared = consistency.broadcast(shared, comm.group)
        return row_fields.joined(shared, rows) if prepared else row_shards.shard(shared, self.mesh, self.name)

    def export(self, state: Any) -> Any:
        """The state with the rows of all ranks in its row fields, on every rank."""
        return row_shards.unshard(state, self.mesh)

    def shard_specs(self, state: Any) -> dict[int, ShardSpec]:
        """This rank's rows of the row fields."""
        return row_shards.specs(state, self.mesh)

    def wrap(self, step: StepFn) -> StepFn:
        """The step with gradients summed over ranks."""
        inside = as_step(step).transforms
        self._check_inside(inside)
        checks = BufferChecks("lm.ddp")
        unapplied = Unapplied(self, step, "synchronized no BatchNorm")

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            processes: _Processes = self._memory
            if processes.comm is None:
                with processes.mesh.bound():
                    return step(state, batch)
            if processes.mesh.sizes["context"] > 1:
                check_context(self, processes.mesh, inside)
            rule = DDPRule(processes, processes.comm, self.buffers, state, checks)
            handlers: dict[Primitive, Rule] = {Primitive.GRADIENT: rule, Primitive.APPLY: rule.apply}
            with processes.mesh.bound(), rules.rule_context(handlers):
                result = step(state, batch)
            if self.buffers == "sync" and not rule.applied:
                unapplied.warn()
            return result

        return row_shards.checked(run, lambda: self.mesh)

    def wrap_host(self, step: StepFn) -> StepFn:
        """Compare the params of all ranks every `check_every` steps."""
        every = self.check_every
        if every is None:
            return step
        done = 0

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            nonlocal done
            new, metrics = step(state, batch)
            done += 1
            if done % every == 0:
                consistency.check_equal(new, self.mesh)
            return new, metrics

        return run

    def _check_inside(self, transforms: Sequence[Transform]) -> None:
        for inner in transforms:
            if inner.level == "dp_sgd":
                raise OrderError(
                    f"{inner!r} under lm.ddp would add noise for the rows of one rank, and account for these alone."
                    " Train it in one process, with lm.accumulate for large batches."
                )
            if inner.level == "accumulate" and self.buffers == "sync":
                raise OrderError(
                    f"{inner!r} runs BatchNorm on one microbatch at a time, and ranks with fewer rows run fewer,"
                    f' so {self!r} cannot sum their statistics. Write lm.ddp(buffers="merge"), or leave one out.'
                )
