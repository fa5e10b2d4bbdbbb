"""One gradient in microbatches: what runs on the stages of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import gradient, loss_errors, rules
from lumen.core.device import Generators
from lumen.core.dtypes import NARROW
from lumen.core.primitives import Aux, Gradient, GradientCall
from lumen.errors import LossError, ParamsError
from lumen.parallel.pipeline.failures import StageFailure
from lumen.parallel.pipeline.probe import Form
from lumen.parallel.pipeline.split import STAGE, Boundary
from lumen.parallel.pipeline.stage_graph import StageGraph, as_node
from lumen.parallel.pipeline.stage_run import SplitModel, StageRun, check_result


class GradientJob:
    """The loss of each microbatch, of which each stage computes its part.

    An error of a stage does not stop the schedule, in which other processes would wait: the process sends zeros from
    then on, and `failure` is for all processes to raise together.
    """

    def __init__(
        self, call: GradientCall, microbatches: Sequence[Any], rows: int, model: SplitModel, forms: Sequence[Form]
    ) -> None:
        self._call, self._microbatches, self._rows = call, microbatches, rows
        self._model, self.forms = model, forms
        self._generators = Generators(call.params)
        self._sums: dict[str, Tensor] = {}
        self._leaves = {name: self._leaf(name, param) for name, param in call.params.items() if param.numel()}
        self.results: dict[int, Gradient] = {}
        self.buffer_names: dict[str, str] = {}
        self.buffers: Mapping[str, Tensor] = {}  # that the model was last applied with
        self.failure: StageFailure | None = None

    @property
    def first_microbatch(self) -> tuple[Any, int]:
        """The first microbatch, and its rows."""
        return self._microbatches[0], self._rows

    def forward(self, stage: int, index: int, received: Tensor | None) -> Tensor:
        """What `stage` sends for microbatch `index`."""
        graph = StageGraph(received)

        def forward() -> None:
            graph.sent = self._compute(stage, index, graph.received)

        def backward(grad: Tensor) -> None:
            self._attempt(lambda: graph.backward(grad), f"the backward pass of stage {stage}, microbatch {index}")

        self._attempt(forward, f"the forward pass of stage {stage}, microbatch {index}")
        sent = self._zeros(stage) if graph.sent is None else graph.sent
        return as_node(graph, received, sent, backward)

    def _attempt(self, run: Callable[[], None], where: str) -> None:
        """Run a pass, unless this process has failed already."""
        if self.failure is None:
            try:
                run()
            except Exception as error:
                self.failure = StageFailure(error, where)

    def grads(self) -> dict[str, Tensor]:
        """The summed gradients of the stages of this process, in float32 for 16-bit params; others are empty."""
        grads = {}
        for name, param in self._call.params.items():
            leaf = self._leaves.get(name)
            total = self._sums.get(name, None if leaf is None else leaf.grad)
            grads[name] = torch.zeros_like(param) if total is None else total
        return {name: grad.to_dense() if grad.is_sparse else grad for name, grad in grads.items()}

    def _is_last(self, stage: int) -> bool:
        return stage == self._model.count - 1

    def _leaf(self, name: str, param: Tensor) -> Tensor:
        leaf = param.detach().requires_grad_()
        if leaf.dtype in NARROW:  # summed in float32
            leaf.register_post_accumulate_grad_hook(self._widening(name))
        return leaf

    def _widening(self, name: str) -> Callable[[Tensor], None]:
        def add(leaf: Tensor) -> None:
            assert leaf.grad is not None
            total = self._sums.get(name)
            self._sums[name] = leaf.grad.float() if total is None else total + leaf.grad
            leaf.grad = None

        return add

    def _compute(self, stage: int, index: int, received: Tensor | None) -> Tensor:
        run = StageRun(stage, self._model.count, received, self._generators)
        params = self._model.tensors_of(stage, {**self._call.params, **self._leaves})
        call = self._call.replace(batch=self._microbatches[index], params=params, summed=True, reduction=None)
        try:
            with rules.inside_loss, rules.bound_axis(STAGE, run):
                result = gradient.objective_of(call, params, self._rows)
        except Boundary as boundary:
            return self._sent(boundary.with_traceback(None).value, stage)
        finally:
            run.finished = True
        return self._loss(result, run, call, index)

    def _sent(self, value: Tensor, stage: int) -> Tensor:
        check_result(value, stage, f"what stage {stage} sends")
        form = self.forms[stage]
        if Form.of(value) != form:
            raise LossError(
                f"stage {stage} sends a tensor of shape {tuple(value.shape)} and {value.dtype}, and sent {form.shape}"
                f" and {form.dtype} for the first microbatch. Under lm.pipeline activations keep their form."
            )
        if not value.requires_grad:
            raise LossError(
                f"what stage {stage} sends has no gradient. Leave out .detach() and torch.no_grad() in the model."
            )
        return value.contiguous()

    def _loss(self, result: tuple[Tensor, Any, Any, bool], run: StageRun, call: GradientCall, index: int) -> Tensor:
        objective, loss, aux, scalar = result
        if not self._is_last(run.stage) or not run.has_left:
            raise LossError(
                f"the loss function returned in stage {run.stage} of {self._model.count}, without having applied the"
                " model to the end. Under lm.pipeline a loss applies the model once, on each microbatch:"
                " out, buffers = state.apply(params, x)"
            )
        check_result((objective, loss.total, loss.weight), run.stage, "the loss")
        aux, self.buffer_names = without_buffers(aux, self.buffers)
        check_result(tree.leaves(aux), run.stage, "the aux")
        if not objective.requires_grad:
            raise loss_errors.independent_of(call)
        self.results[index] = Gradient(gradient.detached(loss), None, gradient.detached(aux), scalar, self._rows)
        return torch.stack([objective]).float()  # the form that is declared; only its gradient counts, which is one

    def _zeros(self, stage: int) -> Tensor:
        """A tensor in the form that `stage` sends."""
        form = Form((1,), torch.float32) if self._is_last(stage) else self.forms[stage]
        return torch.zeros(form.shape, dtype=form.dtype, device=next(iter(self._leaves.values())).device)


def without_buffers(aux: Any, buffers: Mapping[str, Tensor]) -> tuple[Any, dict[str, str]]:
    """An aux without its buffers, and the name that each of these has in the model.

    Raises `ParamsError` for one that is not the model's, unchanged.
    """
    if not isinstance(aux, Aux) or not aux.buffers:
        return aux, {}
    changed: Any = aux
    by_id = {id(tensor): name for name, tensor in buffers.items()}
    names = {}
    for key, leaf in aux.buffers.items():
        if id(leaf) not in by_id:
            raise ParamsError(
                f"lm.Aux(buffers=...) has a tensor {key!r} that the model did not return, and lm.pipeline keeps no"
                " buffers that change. Report it in metrics: lm.Last(x)."
            )
        names[key] = by_id[id(leaf)]
    return changed.replace(buffers={}), names
