"""`lm.context_parallel`: sequences sharded over ranks, which compute each row together."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

from lumen.core import _torch_compat, batching, distributed, rules
from lumen.core.primitives import Gradient, GradientCall
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.step import StepFn, Transform, as_step, device_of
from lumen.errors import AxisError, HyperparameterError, LossError, OrderError
from lumen.parallel.comm import consistency
from lumen.parallel.comm.buckets import Buckets
from lumen.parallel.comm.mesh import Mesh
from lumen.parallel.context import loss_check
from lumen.parallel.context.attention import Method, ShardedAttention
from lumen.parallel.context.function_mode import CallSites, SequenceMode, entered
from lumen.parallel.context.metrics import check_aux, merged_aux
from lumen.parallel.context.runtime import ContextRuntime
from lumen.parallel.context.sequence_shards import SequenceShards, leaf_of
from lumen.parallel.ddp.aux_reduction import BufferChecks
from lumen.parallel.ddp.grad_reduction import DataParallelRule, GradReduction
from lumen.parallel.row_reducer import row_reducer
from lumen.parallel.tensor.autograd_collectives import TPGroup
from lumen.parallel.tensor.rank_checks import check_rows, has_dropout, share_generator


class _SumOverContext(DataParallelRule):
    """The gradient summed over the ranks along `context`, where no `lm.ddp` or `lm.fsdp` outside does it."""

    def __init__(self, runtime: ContextRuntime, state: Any, checks: BufferChecks) -> None:
        super().__init__(runtime.comm, "merge", state, checks)
        self._plans = runtime.plans

    def __call__(self, next: Next, call: GradientCall) -> Gradient:
        """The gradient of all positions."""
        rows = batching.count(call.batch)
        reduction = GradReduction(self._comm, Buckets(self._comm, self._plans, rows > 0), rows, self, self._device)
        result: Gradient = next(self._prepared_call(call, rows).replace(summed=True, reduction=reduction))
        if not rows:
            result = result.replace(aux=self._neutral_aux(result.aux))
        return result if call.summed else reduction.normalized(result)


class context_parallel(Transform):
    """Shard the sequences of a batch over the ranks along the mesh's `context` axis, which compute each row together.

    All ranks of the axis receive the same rows, as `lm.Loader` provides them. Of the batch that the step passes to
    `lm.value_and_grad`, each rank's loss function gets consecutive positions of the leaves with positions: by default
    of each leaf with two dims or more along its dim 1, or as `sequence_dims` says, by the path of a leaf:
    `{"input_ids": 1, "labels": 1}`. Outside the loss function everything is as in one process, on every rank.

    Inside it, `F.scaled_dot_product_attention` attends over all positions. Where the ranks divide the numbers of heads
    of queries and keys, an all-to-all exchanges positions for heads before and after it (Ulysses,
    https://arxiv.org/abs/2309.14509). Otherwise keys and values go round the ranks (ring attention,
    https://arxiv.org/abs/2310.01889). `attention="ulysses"` or `"ring"` is one of them for any heads; the first repeats
    keys whose heads cannot be divided, and raises for queries. Causal attention by `is_causal=True` is right as it is.
    `documents` names a leaf `[rows, positions]` with the number of each position's document, which is not sharded:
    positions see those of their own document alone. A mask of all keys works, of this rank's queries or of all; one of
    this rank's keys raises.
    `torch.arange` of as many numbers as a rank has positions, and slices of as many first entries of a longer table,
    are those of this rank's positions; so are the `position_ids` in the batch. Dropout outside of attention draws the
    masks of one process: the ranks share the first one's generator.

    The loss must be an `lm.Mean` over positions, as ranks may have different numbers of positions that count. Labels
    must be shifted before: `lm.losses.shift_labels(input_ids)`. Typed values in `lm.Aux` are merged over the axis. They
    count positions: an `lm.Sum` of something that each rank has would count it several times.

    Law: params, loss and metrics are those of one process, up to the order of floating-point sums. Rows are divided
    over the mesh's other axes by `lm.ddp` or `lm.fsdp` outside, on the same mesh, which then also sum the gradients
    over `context`: `lm.fsdp(mesh)(lm.context_parallel(mesh)(step))`. Alone it sums them itself.

    Pooling over positions sums over the axis itself: `lm.psum(x.sum(1), "context")`; the loss of the pooled features is
    then the same on every rank. Convolutions, recurrence, and attention written by other means are not supported. So
    that none of them goes unnoticed, `verify` compares each loss function, the first time that it is differentiated, on
    a few positions of one row: computed by each rank alone, and sharded. Losses that draw noise need `verify=False`,
    under which they differ from those of one process, and so may whatever else is wrong.

    Raises, on every rank: `BatchError` for a batch whose sequences cannot be sharded; `LossError` for a loss or metric
    that does not say what it counts, for attention that cannot be sharded, and where the comparison fails; `OrderError`
    for transforms that cannot be around it or inside it; `WorldError` where meshes or states differ, and for a mesh
    without ranks along `context`.

    >>> import lumen as lm
    >>> lm.context_parallel(documents="document_ids")
    lm.context_parallel(documents='document_ids')
    """

    name = "context_parallel"
    level = "context"
    reason = "rows are divided over groups of ranks, each of which computes its rows together"
    incompatible: Mapping[str, str] = {
        "tensor_parallel": "both would compute the same rows on several ranks. Use one of them, with lm.fsdp around it",
        "pipeline": "attention would wait for other ranks in the middle of the schedule. Leave one out",
        "deepspeed": "its engine reduces the gradients of rows. Use lm.fsdp",
        "ensemble": "ranks cannot communicate inside of vmap. Train one model",
        "sweep": "ranks cannot communicate inside of vmap. Train one model",
        "compile": "its attention runs eagerly. Leave lm.compile out",
        "dp_sgd": "the gradient of an example would be that of one rank's positions. Leave lm.context_parallel out",
    }

    def __init__(
        self,
        mesh: Mesh | None = None,
        *,
        sequence_dims: Mapping[str, int] | None = None,
        documents: str | None = None,
        attention: Literal["auto", "ulysses", "ring"] = "auto",
        verify: bool = True,
    ) -> None:
        _check_arguments(sequence_dims, documents, attention, verify)
        self.sequence_dims = None if sequence_dims is None else dict(sequence_dims)
        self.documents = documents
        self.attention: Method = attention
        self.verify = verify
        self._mesh = mesh

    def _new_memory(self) -> ContextRuntime:
        return ContextRuntime(self._mesh)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the constructor, by default all ranks along `context`."""
        runtime: ContextRuntime = self._memory
        return runtime.mesh

    def init(self, state: Any) -> Any:
        """The first rank's state, after a check that all along `context` have the same."""
        runtime: ContextRuntime = self._memory
        group = runtime.group
        if group is None:
            return state
        row_reducer(self, runtime.mesh, "lm.context_parallel(mesh)")
        lines = consistency.fingerprint_lines(state, self.within)
        device = device_of(state)
        consistency.assert_same_on_all_ranks(lines, group.group, device, "the processes of lm.context_parallel")
        return consistency.broadcast(state, group.group)

    def wrap(self, step: StepFn) -> StepFn:
        """The step with sharded sequences inside its loss functions."""
        _check_inside(as_step(step).transforms)
        checks = BufferChecks("lm.context_parallel")

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            runtime: ContextRuntime = self._memory
            group = runtime.group
            if group is None:
                with nullcontext() if self.documents is None else rules.around_losses(self._in_one_process):
                    return step(state, batch)
            _check_eager()
            rule: Rule = functools.partial(self._gradient, runtime, group)
            if row_reducer(self, runtime.mesh, "lm.context_parallel(mesh)") is not None:
                with rules.rule_context({Primitive.GRADIENT: rule}):
                    return step(state, batch)
            reducing = _SumOverContext(runtime, state, checks)
            outer: dict[Primitive, Rule] = {Primitive.GRADIENT: reducing, Primitive.APPLY: reducing.apply}
            with runtime.mesh.bound(), rules.rule_context(outer), rules.rule_context({Primitive.GRADIENT: rule}):
                return step(state, batch)

        return run

    def wrap_host(self, step: StepFn) -> StepFn:
        """The step with the first rank's random numbers, where the model has dropout."""

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            group = self._memory.group
            apply = getattr(state, "apply_fn", None)
            if group is not None and apply is not None and has_dropout(apply.module):
                share_generator(group, device_of(state))
            return step(state, batch)

        return run

    def _gradient(self, runtime: ContextRuntime, group: TPGroup, next: Next, call: GradientCall) -> Gradient:
        """GRADIENT: the gradient of this rank's positions, which the call's reduction sums; metrics of all of them."""
        shards = SequenceShards.of(call.batch, self.sequence_dims, self.documents, group.size)
        sites = runtime.sites(call.loss_fn)
        if not (sites.is_checked or distributed.is_dry_run()):
            check_rows(group, call.batch, runtime.mesh.device, "context")
            self._check_loss(runtime, group, shards, sites, next, call)
        failures: list[LossError] = []
        with self._sharded(group, shards, sites, failures):
            result: Gradient = next(call.replace(batch=shards.shard(call.batch, group.index)))
        runtime.raise_together(failures)
        check_aux(result.aux)
        return result.replace(aux=merged_aux(result.aux, group))

    def _sharded(
        self, group: TPGroup, shards: SequenceShards, sites: CallSites, failures: list[LossError]
    ) -> AbstractContextManager[None]:
        """What runs each loss, of all rows or of a microbatch, on shards of its sequences."""

        def around(arguments: tuple[Any, Any]) -> AbstractContextManager[None]:
            batch = arguments[1]
            documents = None if self.documents is None else leaf_of(batch, self.documents)
            attention = ShardedAttention(group, shards.local, documents, failures, self.attention)
            return entered(SequenceMode(attention, group.index, batching.count(batch), sites))

        return rules.around_losses(around)

    def _in_one_process(self, arguments: tuple[Any, Any]) -> AbstractContextManager[None]:
        """What runs a loss on full sequences: attention within documents."""
        batch, sites = arguments[1], CallSites()
        shards = SequenceShards.of(batch, self.sequence_dims, self.documents, 1)
        attention = ShardedAttention(None, shards.length, leaf_of(batch, self.documents or ""), [])
        return entered(SequenceMode(attention, 0, batching.count(batch), sites))

    def _check_loss(
        self,
        runtime: ContextRuntime,
        group: TPGroup,
        shards: SequenceShards,
        sites: CallSites,
        next: Next,
        call: GradientCall,
    ) -> None:
        """Raise `LossError` where the loss of sharded sequences would be another one."""
        batch, excerpt = shards.excerpt(call.batch, loss_check.local_length(shards.local), sites.checks)
        sites.checks += 1
        alone = call.replace(summed=True, reduction=None, grad_sums=None, batch=batch)
        rewind = loss_check.same_draws(call.params)
        documents = nullcontext() if self.documents is None else rules.around_losses(self._in_one_process)
        with _explained(excerpt), documents, rules.unbound_axis("context"):
            full: Gradient = next(alone)
        transforms = () if self.within is None else self.within.transforms
        rounded = loss_check.is_rounded(call.params, transforms)
        comparison = loss_check.Comparison(full, group, runtime.max_over_all_ranks, rounded)
        comparison.check_form(call.loss_fn)
        rewind()
        sites.is_recording = True
        failures: list[LossError] = []
        with self._sharded(group, excerpt, sites, failures):
            sharded: Gradient = next(alone.replace(batch=excerpt.shard(batch, group.index)))
        sites.is_recording = False
        runtime.raise_together(failures)
        rewind()
        sharded = sharded.replace(aux=merged_aux(sharded.aux, group))
        sites.is_checked = not self.verify or comparison.check_values(call.loss_fn, sharded, sites)


def _check_arguments(sequence_dims: Any, documents: Any, attention: Any, verify: Any) -> None:
    if sequence_dims is not None and not (
        isinstance(sequence_dims, Mapping)
        and sequence_dims
        and all(isinstance(path, str) and type(dim) is int for path, dim in sequence_dims.items())
    ):
        raise HyperparameterError(
            f"context_parallel(sequence_dims={sequence_dims!r:.200}) must be a dict from paths of leaves of the"
            ' batch to their dims of positions: {"input_ids": 1, "labels": 1}, or None for dim 1 of all.'
        )
    if documents is not None and not isinstance(documents, str):
        raise HyperparameterError(
            f'context_parallel(documents={documents!r:.200}) must be the path of a leaf of the batch: "document_ids".'
        )
    if not isinstance(attention, str) or attention not in get_args(Method):
        raise HyperparameterError(
            f'context_parallel(attention={attention!r:.200}) must be "ulysses", which exchanges positions for heads,'
            ' "ring", which passes keys round the ranks, or "auto", the first where the ranks divide the heads.'
        )
    if type(verify) is not bool:
        raise HyperparameterError(f"context_parallel(verify={verify!r}) must be True or False.")


@contextmanager
def _explained(excerpt: SequenceShards) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(
            f"This was the check of the loss by lm.context_parallel, on {excerpt.length} positions of a row."
            " A model that takes sequences of one length only cannot be sharded."
        )
        raise


def _check_eager() -> None:
    if rules.is_tracing():
        raise OrderError("lm.compile cannot trace lm.context_parallel, which runs eagerly. Leave lm.compile out.")
    if _torch_compat.peek_interpreter_stack() is not None:
        raise AxisError(
            "lm.context_parallel communicates between ranks, which is impossible inside of vmap or torch.func.grad"
            " around a step. Train one model under lm.context_parallel."
        )


def _check_inside(transforms: Sequence[Transform]) -> None:
    for inner in transforms:
        if getattr(inner, "auto", False):
            raise OrderError(
                f"{inner!r} under lm.context_parallel would retry on the rank that ran out of memory alone. Give a"
                " number: lm.accumulate(2)."
            )
