"""What `lm.pipeline` does with the primitives of one step."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, batching, distributed, gradient, rules
from lumen.core.device import Generators, forked_rng
from lumen.core.primitives import ApplyCall, Gradient, GradientCall, rewrapped, user_loss
from lumen.core.rules import Next, Primitive, Rule
from lumen.errors import AxisError, BatchError, LossError, OrderError, ParamsError
from lumen.parallel.comm import consistency
from lumen.parallel.pipeline.failures import StageFailure, raise_any
from lumen.parallel.pipeline.job import GradientJob
from lumen.parallel.pipeline.planned import cannot_plan_turns, planned_result
from lumen.parallel.pipeline.probe import Form, Probe, Probed
from lumen.parallel.pipeline.runtime import PipelineRuntime
from lumen.parallel.pipeline.share import PipelineGroup
from lumen.parallel.pipeline.split import STAGE, Boundary
from lumen.parallel.pipeline.stage_run import SplitModel, StageRun, check_result
from lumen.transforms._support import gradient_sums


class _Replay:
    """Bound while a loss is repeated for the rules outside alone, with the results of all microbatches."""


class PipelineRule:
    """The rules of one step: GRADIENT and APPLY."""

    def __init__(self, runtime: PipelineRuntime, group: PipelineGroup, model: SplitModel, state: Any) -> None:
        self._runtime, self._group, self._model = runtime, group, model
        self._apply_fn = state.apply_fn
        self._device = next(iter(state.params.values())).device
        self._job: GradientJob | None = None

    # ------------------------------------------------------------------------------------------------ APPLY

    def apply(self, next: Next, call: ApplyCall) -> Any:
        """APPLY: the part of the stage that runs; outside of a gradient, all stages in turn."""
        if call.target.origin is not self._apply_fn.origin:
            return next(call)
        run = rules.axis(STAGE)
        if isinstance(run, _Replay):
            return None, dict(call.buffers)
        if run is None:
            return self._in_turn(next, call), dict(call.buffers)
        if self._job is not None:
            self._job.buffers = call.buffers
        out, _ = next(self._model.call(call, run.stage))
        return out, dict(call.buffers)

    def _in_turn(self, next: Next, call: ApplyCall) -> Any:
        """The model's output, on all processes, without a graph."""
        if distributed.is_dry_run():
            raise cannot_plan_turns()
        value: Any = None
        for stage in range(self._model.count):
            failure: StageFailure | None = None
            source = stage % self._group.size
            if source == self._group.index:
                try:
                    value = self._run_stage(next, call, stage, value)
                except Exception as error:
                    failure = StageFailure(error, f"the forward pass of stage {stage}")
            raise_any(failure, self._group)
            value = self._group.share(value, source)
        return value

    def _run_stage(self, next: Next, call: ApplyCall, stage: int, received: Any) -> Any:
        run = StageRun(stage, self._model.count, received, Generators(call.params))
        try:
            with rules.bound_axis(STAGE, run):
                value, _ = next(self._model.call(call, stage))
        except Boundary as boundary:
            value = boundary.with_traceback(None).value
        finally:
            run.finished = True
        check_result(value, stage, f"what stage {stage} sends")
        return value

    # --------------------------------------------------------------------------------------------- GRADIENT

    def gradient(self, next: Next, call: GradientCall) -> Gradient:
        """GRADIENT: that of all microbatches, each sent through the stages."""
        inside = rules.inside(Primitive.GRADIENT, self.gradient)
        _check_call(call, inside, self._runtime.param_names)
        run: Next = self._computed
        for rule in reversed(inside):  # they only observe
            run = functools.partial(rule, run)
        result: Gradient = run(call)
        return result

    def _computed(self, call: GradientCall) -> Gradient:
        job, failure = self._prepared(call)
        shared = None
        if job is not None:
            self._run(job)
            shared, failure = self._shared(call, job)
        raise_any(failure, self._runtime.all_processes)
        assert job is not None
        total = self._merged(call, job, shared)
        dtypes = [param.dtype for param in call.params.values()]
        if call.reduction is not None:
            total = call.reduction.finish(gradient_sums.rounded(total, dtypes))
        return gradient_sums.rounded(total if call.summed else gradient.normalized(total), dtypes)

    def _prepared(self, call: GradientCall) -> tuple[GradientJob | None, StageFailure | None]:
        """The job, or why this process has none; None for both where another process along `pipeline` has none."""
        key = self._kind(call)
        forms = self._runtime.forms.get(key)
        error: Exception | None = None if forms else _check_rows(self._group, call.batch)
        job: GradientJob | None = None
        if error is None:
            try:
                job = self._job_of(call, forms)
            except Exception as raised:
                error = raised
            if not forms and self._group.any(error is not None):  # a model may fail on one process alone
                job = None
        if job is not None:
            self._runtime.forms[key] = job.forms
        return job, None if error is None else StageFailure(error, "the check of a batch")

    def _job_of(self, call: GradientCall, forms: Sequence[Form] | None) -> GradientJob:
        microbatches = self._split(call)
        rows = batching.count(microbatches[0])
        forms = forms or self._probe(call, microbatches[0], rows)
        return GradientJob(call, microbatches, rows, self._model, forms)

    def _run(self, job: GradientJob) -> None:
        self._job = job
        try:
            with torch.enable_grad(), self._splitting():
                self._runtime.schedule_of(job.forms, self._model.count).run(job)
        finally:
            self._job = None

    @property
    def _last(self) -> int:
        """The index of the process with the last stage."""
        return (self._model.count - 1) % self._group.size

    def _shared(self, call: GradientCall, job: GradientJob) -> tuple[Any, StageFailure | None]:
        """What the process of the last stage has for the others: the loss and aux of all microbatches."""
        is_last = self._group.index == self._last
        if job.failure is not None or not (is_last or distributed.is_dry_run()):
            return None, job.failure
        results = [job.results[index] for index in sorted(job.results)]
        if not is_last:
            with self._splitting():
                results = [planned_result(call, job, self._model)]
        try:  # all dummy batches are the same one
            total = batching.add_gradients(results[:1] if _is_dummy(call) else results)
        except Exception as error:
            return None, StageFailure(error, "the sum of the losses of the microbatches")
        return (total.loss, total.aux, total.scalar, job.buffer_names), None

    def _merged(self, call: GradientCall, job: GradientJob, shared: Any) -> Gradient:
        """The result of all microbatches, on all processes."""
        loss, aux, scalar, names = self._group.share(shared, self._last)
        if call.has_aux:
            aux = self._with_buffers(call, loss, aux, names)
        return Gradient(loss, job.grads(), aux, scalar, batching.count(call.batch) if call.summed else None)

    def _with_buffers(self, call: GradientCall, loss: Any, aux: Any, names: dict[str, str]) -> Any:
        """The aux with the state's buffers, as the rules outside see them in any loss."""
        results: list[Any] = []

        def again(params: Any, *_args: Any) -> Any:
            applied = self._apply_fn(params, self._runtime.buffers, None)[1] if names else {}
            full = aux
            if names:
                changed: Any = aux
                full = changed.replace(buffers={key: applied[name] for key, name in names.items()})
            results.append(full)
            return loss, full

        with rules.inside_loss, rules.bound_axis(STAGE, _Replay()):
            rewrapped(call.loss_fn, again)(call.params, call.batch, *call.extras)
        return results[0]

    def _split(self, call: GradientCall) -> list[Any]:
        rows, count = batching.count(call.batch), self._runtime.microbatches
        if _is_dummy(call):
            return [call.batch] * count
        if rows % count or not rows:
            raise BatchError(
                f"the batch has {rows} rows, and lm.pipeline(microbatches={count}) needs microbatches of equal size:"
                f" {count} must divide the rows. Use batches of {max(count, rows - rows % count)} rows"
                " (lm.Loader(..., drop_last=True)), or another number of microbatches."
            )
        return batching.split(call.batch, count)

    def _splitting(self) -> AbstractContextManager[None]:
        """A context in which losses that need all rows of the batch refuse a microbatch."""
        return rules.splitting(self._runtime.text if self._runtime.microbatches > 1 else None)

    def _kind(self, call: GradientCall) -> Any:
        """What decides which forms of activations stages send, so that the split is checked once for each."""
        loss_fn = user_loss(call.loss_fn)
        leaves, spec = tree.flatten(call.batch)
        shapes = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else None for x in leaves)
        cast = torch.is_autocast_enabled(self._device.type)
        return getattr(loss_fn, "__code__", loss_fn), spec, shapes, cast, self._apply_fn.module.training

    def _probe(self, call: GradientCall, microbatch: Any, rows: int) -> Sequence[Form]:
        """The forms of what stages send for such a microbatch, from a check of the split."""
        probe = Probe(self._model.count)
        params = self._model.tensors_of(None, call.params)
        call = call.replace(batch=microbatch, params=params, summed=True, reduction=None)
        try:
            with forked_rng(self._device), rules.inside_loss, rules.bound_axis(STAGE, probe), self._splitting():
                gradient.objective_of(call, params, rows)
        except Probed:
            return probe.forms
        except Exception as error:
            error.add_note("lm.pipeline was checking, without values, what passes from stage to stage.")
            raise
        raise LossError(
            "the loss function never applies the model, and lm.pipeline computes its stages there. Write"
            " out, buffers = state.apply(params, x)"
        )


def _check_call(call: GradientCall, inside: Sequence[Rule], param_names: Collection[str]) -> None:
    if _torch_compat.peek_interpreter_stack() is not None or call.engine == "func":
        raise AxisError(
            "lm.pipeline sends activations between processes, which torch cannot do inside vmap or torch.func.grad."
            " Leave engine='func' out, and train one model under lm.pipeline."
        )
    changing = [rule for rule in inside if not getattr(getattr(rule, "__self__", rule), "only_observes", False)]
    if changing or call.grad_sums is not None:
        raise OrderError(
            f"{len(changing)} transforms inside lm.pipeline have a rule for the gradient, which the stages compute"
            " by a schedule of their own. Put them outside: lm.compose(lm.guard(), ..., lm.pipeline(...))"
        )
    params = call.params
    if type(params) is not dict or not params.keys() == param_names:
        raise ParamsError(
            "lm.pipeline differentiates state.params, of which each process has its stage's. Write"
            " lm.value_and_grad(loss_fn)(state.params, batch)"
        )


def _check_rows(group: PipelineGroup, batch: Any) -> BatchError | None:
    """The error, on every process, where those along `pipeline` have not received the same tensors."""
    sums = [consistency.checksum(leaf).cpu() for leaf in tree.tensors(batch)]
    own = torch.stack([torch.zeros(2, dtype=torch.int64), *sums]).sum(0).to(group.device)
    gathered = [torch.empty_like(own) for _ in range(group.size)]
    dist.all_gather(gathered, own, group=group.group)
    if all(torch.equal(gathered[0], other) for other in gathered):
        return None
    return BatchError(
        "the ranks along pipeline received different rows, and must compute the same ones together. Make batches"
        " with lm.Loader, created after the mesh, or divide them by lm.parallel.rows(), which returns the share of"
        " this rank and the number of shares."
    )


def _is_dummy(call: GradientCall) -> bool:
    """Whether the batch stands for that of a process without rows."""
    return call.reduction is not None and not call.reduction.rows
