"""What lm.pipeline refuses by name, on every process, without leaving one of them waiting."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lumen as lm
from lumen import errors
from lumen.parallel.comm.mesh import mesh
from tests.distributed.models import CLASSES, MODELS, WIDTH, batches, make_state, register, step
from tests.distributed.pipeline_models import Blocks
from tests.tiers import LONG

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


class Skipping(nn.Sequential):
    """The head sees the first layer's output, too."""

    def forward(self, x):
        first = self[0](x)
        return self[2](torch.tanh(self[1](first)) + first)


class Counting(nn.Module):
    """A layer that counts its calls in a buffer."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


class Reversed(nn.Sequential):
    """Runs its layers from the last to the first."""

    def forward(self, x):
        for layer in reversed(self):
            x = layer(x)
        return x


class Looped(nn.Sequential):
    """Runs its second layer twice."""

    def forward(self, x):
        x = self[1](self[0](x))
        return self[2](self[1](x))


class Peeking(nn.Sequential):
    """Decides by a value of the first layer."""

    def forward(self, x):
        x = self[0](x)
        return self[1](x if x.sum() > 0 else -x)


class Writing(nn.Sequential):
    """Writes the output of a layer into a tensor that it has made before."""

    def forward(self, x):
        full = x.new_zeros(len(x), WIDTH)
        full[:, :] = self[0](x)
        return self[1](full)


def three(kind=nn.Linear):
    return kind(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)


register(
    skipping=lambda: Skipping(*three()),
    counting_first=lambda: nn.Sequential(Counting(WIDTH, 5), nn.Linear(5, CLASSES)),
    counting_last=lambda: nn.Sequential(nn.Linear(WIDTH, 5), Counting(5, CLASSES)),
    reversed=lambda: Reversed(nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, WIDTH)),
    looped=lambda: Looped(*three()),
    peeking=lambda: Peeking(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)),
    writing=lambda: Writing(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)),
    tied=lambda: MODELS["gpt"](),
)


def losses_of(change):
    """A step whose loss function is `change(state, params, batch)`."""

    if change == "aux":
        return _with_lengths

    def changed(state, batch):
        loss, grads = lm.value_and_grad(lambda params, rows: change(state, params, rows))(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    return changed


def _with_lengths(state, batch):
    """Returns a tensor that nobody knows how to merge, on the last stage."""

    def loss_fn(params, batch):
        return _entropy(state, params, batch), {"ids": torch.arange(3)}

    (loss, _), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def _entropy(state, params, batch, x=None):
    return F.cross_entropy(state.apply(params, batch["x"] if x is None else x)[0], batch["y"])


def _fails_at_the_end(state, params, batch):
    loss = _entropy(state, params, batch)
    if float(loss.detach()) > -1:
        raise ValueError("no such label")
    return loss


LOSSES = {
    "twice": lambda state, params, batch: _entropy(state, params, batch) + _entropy(state, params, batch, -batch["x"]),
    "decay": lambda state, params, batch: _entropy(state, params, batch) + params["0.weight"].square().sum(),
    "draw": lambda state, params, batch: _entropy(state, params, batch, batch["x"] + torch.rand_like(batch["x"])),
    "never": lambda state, params, batch: (batch["x"] * 2).mean(),
    "detached": lambda state, params, batch: _entropy(state, params, batch).detach(),
    "fails": _fails_at_the_end,
    "aux": "aux",
    "cache": lambda state, params, batch: lm.grad_cache(
        lambda params, batch: {"out": state.apply(params, batch["x"])[0]},
        lambda params, embeddings, batch: embeddings["out"].mean(0).square().sum(),
    )(params, batch),
}


def error_of(model, settings, loss=None, rows=8, tx="adam", other_rows=False):
    """The error of this process: its type and message; None without one."""
    grid = mesh(pipeline=-1, device="cpu")
    made = step if loss is None else losses_of(LOSSES[loss])
    optimizer = {"adam": lambda: lm.optim.adam(1e-2), "adafactor": lambda: lm.optim.adafactor(1e-2)}[tx]()
    try:
        wrapped = lm.pipeline(grid, **{"microbatches": 2, **settings})(made)
        batch = batches(1, rows)[0]
        if other_rows:
            batch["x"] = batch["x"] + grid.index("pipeline")
        wrapped(wrapped.init(make_state(model, tx=optimizer)), batch)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def errors_of(cases):
    return [error_of(*case) for case in cases]


REFUSED = {
    "tied": (("tied", {"stages": ["norm"]}), "ParamsError", "between tied weights"),
    "no blocks": (("outside", {}), "ParamsError", "has 0 with params: too few for 2 stages"),
    "few blocks": (("mlp", {"stages": 4, "schedule": "interleaved"}), "ParamsError", "has 2 with params"),
    "no module": (("pipeline_stack", {"stages": ["9"]}), "PatternError", "'9' is no module of Sequential"),
    "order": (("pipeline_stack", {"stages": ["4", "2"]}), "PatternError", "in another order"),
    "empty stage": (
        ("pipeline_stack", {"stages": ["3", "4"]}),
        "ParamsError",
        "stage 1 of lm.pipeline begins at '3' and has no",
    ),
    "uneven": (
        ("pipeline_stack", {"stages": 3, "schedule": "interleaved"}),
        "HyperparameterError",
        "same number of stages",
    ),
    "numbers": (("pipeline_stack", {"stages": 4}), "HyperparameterError", "one stage on each of 2 processes"),
    "few microbatches": (("pipeline_stack", {"microbatches": 1}), "HyperparameterError", "as many microbatches"),
    "adafactor": (("pipeline_stack", {}, None, 8, "adafactor"), "HyperparameterError", "cannot run under lm.pipeline"),
    "batchnorm": (("conv", {"stages": ["head"]}), "ParamsError", "changes the buffer 'norm.running_mean'"),
    "counting first": (("counting_first", {}), "ParamsError", "changes the buffer '0.calls'"),
    "counting last": (("counting_last", {}), "ParamsError", "changes the buffer '1.calls'"),
    "skipping": (("skipping", {"stages": ["1"]}), "LossError", "connections that skip a split point"),
    "reversed": (("reversed", {}), "LossError", "does not depend on stage 0"),
    "looped": (("looped", {"stages": ["1"]}), "LossError", "more than once"),
    "peeking": (("peeking", {}), "LossError", "decides by values of stage 0"),
    "writing": (("writing", {}), "LossError", "in place"),
    "rows": (("pipeline_stack", {}, None, 7), "BatchError", "2 must divide the rows"),
    "other rows": (("pipeline_stack", {}, None, 8, "adam", True), "BatchError", "received different rows"),
    "twice": (("pipeline_stack", {}, "twice"), "LossError", "applies the model more than once"),
    "decay": (("pipeline_stack", {}, "decay"), "LossError", "depends on params or activations of stage 0"),
    "draw": (("pipeline_stack", {}, "draw"), "LossError", "draws random numbers from torch's generators"),
    "never": (("pipeline_stack", {}, "never"), "LossError", "never applies the model"),
    "cache": (("pipeline_stack", {}, "cache"), "LossError", "hands a microbatch to lm.grad_cache"),
    "aux": (("pipeline_stack", {}, "aux"), "LossError", "does not know how to merge"),
    "detached": (("pipeline_stack", {}, "detached"), "LossError", "does not depend on params"),
}


def test_what_cannot_be_cut_is_refused_by_name_on_every_process(world2):
    answers = world2.run(errors_of, [case for case, _, _ in REFUSED.values()], limit=120)
    for found in answers:
        for (name, (_, kind, text)), error in zip(REFUSED.items(), found, strict=True):
            assert error is not None, name
            assert error[0] == kind, (name, error)
            assert text in error[1], (name, error)


class _FailingGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, _grad):
        raise ArithmeticError("no such gradient")


class Failing(nn.Linear):
    """Fails on one rank, in one of its passes, at one of its runs with values."""

    def __init__(self, rank, where, run):
        super().__init__(WIDTH, WIDTH)
        self.at, self.where, self.runs = rank, where, -run

    def forward(self, x):
        x = super().forward(x)
        fails = torch.distributed.get_rank() == self.at and self.runs == 0
        self.runs += type(x) is torch.Tensor  # and no form of one
        if fails and self.where == "forward":
            raise ArithmeticError("no such value")
        return _FailingGradient.apply(x) if fails and self.where == "backward" else x


def failures(cases, axes=None):
    """How each case fails here: stages, a schedule, the stage's rank that fails, in which pass and microbatch."""
    grid, found = mesh(**(axes or {"pipeline": -1}), device="cpu"), []
    for schedule, rank, where, run in cases:
        stages = 2 * grid.size("pipeline") if schedule == "interleaved" else None
        cut = lm.pipeline(grid, microbatches=4, schedule=schedule, stages=stages)
        rows = [lm.fsdp(grid)] if grid.size("shard") > 1 else [lm.ddp(grid)] if grid.size("data") > 1 else []
        layers = [Failing(rank, where, run) for _ in range(3)]
        wrapped = lm.compose(*rows, cut)(step)
        state = lm.TrainState.create(nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)).double(), lm.optim.sgd(0.1))
        try:
            wrapped(wrapped.init(state), batches(1, 8)[0])
        except Exception as error:
            found.append((type(error).__name__, str(error), getattr(error, "__notes__", [])))
    return found


FAILURES = [
    (schedule, rank, where, run)
    for schedule in ("gpipe", "1f1b", "interleaved")
    for rank in (0, 1)
    for where, run in (("forward", 2), ("backward", 1))
]
FAILURES += [("1f1b", 1, "forward", 0)]  # before anything is sent


def check_failures(cases, answers):
    texts = {"forward": "no such value", "backward": "no such gradient"}
    for rank, found in enumerate(answers):
        for (_, failing, where, run), (kind, text, notes) in zip(cases, found, strict=True):
            assert texts[where] in text
            place = rf"in the {where} pass of stage \d, microbatch \d" if run else "in the check of a batch"
            if rank == failing:
                assert (kind, text) == ("ArithmeticError", texts[where])
                assert any(re.search(rf"raised on rank {rank} {place}", note) for note in notes)
            else:
                assert kind == "WorldError"
                assert re.search(rf"rank {failing} failed {place}, under lm.pipeline: ArithmeticError", text)


def test_an_error_on_one_stage_ends_all(world2):
    first, last = world2.run(error_of, "pipeline_stack", {}, "fails", limit=60)
    assert last == ("ValueError", "no such label")
    assert first[0] == "WorldError"
    assert "rank 1" in first[1]
    assert "no such label" in first[1]


def test_an_error_in_any_pass_of_a_stage_ends_all(world2):
    check_failures(FAILURES, world2.run(failures, FAILURES, limit=60))


@pytest.mark.skipif(not LONG, reason="four processes: make test-all")
@pytest.mark.parametrize("axis", ["data", "shard"])
def test_an_error_of_a_stage_ends_also_the_processes_with_other_rows(axis, world4):
    cases = [("1f1b", 2, "forward", 0), ("1f1b", 1, "backward", 1)]
    check_failures(cases, world4.run(failures, cases, {axis: 2, "pipeline": 2}, limit=60))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (
            lambda: lm.compose(lm.compile(), lm.pipeline(microbatches=2)),
            errors.OrderError,
            "lm.compile cannot trace it",
        ),
        (
            lambda: lm.compose(lm.fsdp(offload=True), lm.pipeline(microbatches=2))(step),
            errors.OrderError,
            "Leave offload out",
        ),
        (
            lambda: lm.compose(lm.fsdp(wrap="blocks.*"), lm.pipeline(microbatches=2))(step),
            errors.OrderError,
            "Leave wrap and",
        ),
        (lambda: lm.compose(lm.pipeline(microbatches=2), lm.accumulate(2)), errors.OrderError, "must be inside"),
        (lambda: lm.pipeline(microbatches=2)(lm.precision("fp16")(step)), errors.OrderError, "scales the loss"),
        (lambda: lm.pipeline(microbatches=2)(lm.guard()(step)), errors.OrderError, "must be outside"),
        (lambda: lm.pipeline(microbatches=0), errors.HyperparameterError, "positive number"),
        (
            lambda: lm.pipeline(microbatches=2, schedule="zb"),
            errors.HyperparameterError,
            "'gpipe', '1f1b', 'interleaved'",
        ),
        (lambda: lm.pipeline(microbatches=2, stages="h.4"), errors.HyperparameterError, "list of the names"),
    ],
)
def test_what_cannot_be_composed_is_refused_at_once(make, kind, text):
    with pytest.raises(kind) as caught:
        make()
    assert text in str(caught.value)


def test_one_process_takes_a_model_without_blocks():
    state, batch = make_state("outside"), batches(1, 8)[0]
    wrapped = lm.pipeline(microbatches=4)(step)
    assert torch.equal(wrapped(wrapped.init(state), batch)[0].params["scale"], step(state, batch)[0].params["scale"])


def test_one_process_is_the_step():
    state, batch = make_state("pipeline_blocks"), batches(1, 8)[0]
    assert isinstance(state.apply_fn.module, Blocks)
    wrapped = lm.pipeline(microbatches=4, stages=["blocks.2"])(step)
    new, metrics = wrapped(wrapped.init(state), batch)
    expected, numbers = step(state, batch)
    assert all(torch.equal(new.params[name], p) for name, p in expected.params.items())
    assert torch.equal(metrics["loss"].compute(), numbers["loss"].compute())
