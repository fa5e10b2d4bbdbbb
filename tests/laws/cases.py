"""Small inputs that once gave wrong numbers without an error, each with its right numbers.

A `Case` is run under every way to run a step (`Form`): by `test_cases` here in one process, by
`tests/distributed/test_cases.py` in two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lumen as lm
from lumen.errors import PurityError

Tensors = dict[str, Tensor]


class Form(NamedTuple):
    """A way to run a step: the transforms around it, and which rows go through one backward pass.

    Each of the `rounds` has the microbatches that the ranks compute at the same time. In a `narrow` form what autocast
    computes in 16 bits is cast before it is gathered, so that the sum of its gradients is rounded to 16 bits, once.
    """

    around: Callable[[], list[lm.Transform]]
    rounds: Sequence[Sequence[slice]]
    narrow: bool = False


@dataclass(frozen=True)
class Case:
    """A state, a step with transforms, batches, and what `read` must find in the state after them."""

    make_state: Callable[[], lm.TrainState]
    step: Callable[[Any, Any], tuple[Any, Any]]
    batches: Callable[[], list[Any]]
    expected: Callable[[Form], Tensors]
    read: Callable[[Any], Tensors]
    transforms: Callable[[], Sequence[lm.Transform]] = tuple
    outer: Callable[[], Sequence[lm.Transform]] = tuple  # those that stand outside of accumulate
    tolerance: float = 0.0
    refused: Mapping[str, tuple[type[Exception], str]] = field(default_factory=dict)  # by form

    def run(self, form: Form, batches: Sequence[Any] | None = None) -> Tensors:
        """Train on the batches under the transforms of `form` and those of the case."""
        around = form.around()
        parallel = [t for t in around if t.level in ("compile", "parallel")]
        rest = [t for t in around if t not in parallel]
        step = lm.compose(*parallel, *self.outer(), *rest, *self.transforms())(self.step)
        state = step.init(self.make_state())
        for batch in self.batches() if batches is None else batches:
            state, _ = step(state, batch)
        for transform in step.transforms:
            if transform.level in ("compile", "parallel"):
                state = transform.export(state)
        return {name: x.detach().clone() for name, x in self.read(state).items()}


def params_of(state: Any) -> Tensors:
    """The params by name."""
    return dict(state.params)


def difference(found: Tensors, expected: Tensors) -> float:
    """The largest difference of an entry, 0 where all are equal; NaN counts as infinite."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        error = (found[name].double() - x.double()).abs().max().item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def sgd_step(forward: Callable[[Any, Any, Any], Tensor], **fields: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A step on the mean of `forward(state, params, batch)` over its rows."""

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        loss, grads = lm.value_and_grad(lambda p, b: lm.Mean.of(forward(state, p, b)))(state.params, batch)
        return state.apply_gradients(grads, **fields), {"loss": loss}

    return step


def mean_square(state: Any, params: Any, batch: Any) -> Tensor:
    """The squared output of each row."""
    return state.apply(params, batch)[0].square().flatten(1).sum(1)  # type: ignore[no-any-return]


def torch_loop(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    row_losses: Callable[[Any], Tensor],
    batches: Sequence[Any],
    form: Form,
    narrow: bool = False,
) -> Tensors:
    """The params after a loop in plain PyTorch, with a backward pass for each microbatch.

    With `narrow` the gradients of matrices that ranks add up travel in bfloat16, where the form has them do so.
    """
    for batch in batches:
        total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        for microbatches in form.rounds:
            net.zero_grad()
            for rows in microbatches:
                row_losses({key: x[rows] for key, x in batch.items()}).sum().backward()
            for name, p in net.named_parameters():
                if p.grad is not None:
                    rounds = narrow and form.narrow and p.dim() > 1
                    total[name] += p.grad.bfloat16() if rounds else p.grad
        count = max(rows.stop for microbatches in form.rounds for rows in microbatches)
        for name, p in net.named_parameters():
            p.grad = total[name] / count
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


# ------------------------------------------------------------------------------------ buffers (f01)


class Counting(nn.Module):
    """Counts kept in buffers, as a codebook's usage or a queue's pointer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, dtype=torch.float64)
        self.register_buffer("rows", torch.zeros((), dtype=torch.long))
        self.register_buffer("total", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("any", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        self.total += x.detach().sum(0)
        self.any |= (x > 3).any()
        return self.layer(x)  # type: ignore[no-any-return]


def _counting_step(state: Any, batch: Any) -> tuple[Any, Any]:
    def loss_fn(params: Any, batch: Any) -> Any:
        out, buffers = state.apply(params, batch["x"])
        return lm.Mean.of(out.square().sum(1)), lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}


def _counting_state() -> lm.TrainState:
    torch.manual_seed(0)
    return lm.TrainState.create(Counting(), lm.optim.sgd(1e-3), merge={"rows": "sum", "total": "sum", "any": "any"})


_COUNTED = torch.arange(16.0, dtype=torch.float64).reshape(8, 2).flip(0)


BUFFERS = Case(
    make_state=_counting_state,
    step=_counting_step,
    batches=lambda: [{"x": _COUNTED}, {"x": _COUNTED}],
    expected=lambda form: {
        "rows": torch.tensor(16),
        "total": torch.tensor([112.0, 128.0]),
        "any": torch.tensor(True),
    },
    read=lambda state: dict(state.buffers),
)


# ------------------------------------------------------------------------------------ precision (f06, f07, f21)


class Normalizing(nn.Module):
    """A float32 buffer and a tensor made by the forward pass, beside what autocast computes in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((4,), 0.5))
        self.hidden, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x - self.mean) + torch.linspace(0.0, 1.0, 4)
        return self.out(torch.tanh(h) - self.mean)  # type: ignore[no-any-return]


class Clock(nn.Module):
    """A sinusoidal embedding of float time steps, which 16 bits cannot tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, t: Tensor) -> Tensor:
        return self.layer(torch.stack([t.sin(), t.cos()], 1))  # type: ignore[no-any-return]


def _seeded(net: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return net()


def _module_losses(module: nn.Module, batch: Any) -> Tensor:
    return module(batch["x"]).float().square().sum(1)  # type: ignore[no-any-return]


def _autocast_loop(
    net: Callable[[], nn.Module], losses: Callable[[nn.Module, Any], Tensor], batches: list[Any], narrow: bool
) -> Callable[[Form], Tensors]:
    def expected(form: Form) -> Tensors:
        module = _seeded(net)

        def row_losses(batch: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                return losses(module, batch)

        return torch_loop(module, torch.optim.SGD(module.parameters(), 0.1), row_losses, batches, form, narrow)

    return expected


def _applied(state: Any, params: Any, batch: Any) -> Tensor:
    return mean_square(state, params, batch["x"])


def _functional(state: Any, params: Any, batch: Any) -> Tensor:
    tensors = {**params, **state.buffers}
    out = torch.func.functional_call(state.apply_fn.module, tensors, (batch["x"],))
    return out.float().square().sum(1)  # type: ignore[no-any-return]


def _function_losses(params: Any, batch: Any) -> Tensor:
    h = (batch["x"] - 0.5) @ params["hidden.weight"].T + params["hidden.bias"]
    h = torch.tanh(h + torch.linspace(0.0, 1.0, 4)) - 0.5
    return (h @ params["out.weight"].T + params["out.bias"]).float().square().sum(1)  # type: ignore[no-any-return]


def _precise(
    net: Callable[[], nn.Module],
    x: Tensor,
    forward: Callable[[Any, Any, Any], Tensor],
    losses: Callable[[nn.Module, Any], Tensor] = _module_losses,
    *,
    narrow: bool = False,
) -> Case:
    batches = [{"x": x}] * 3
    return Case(
        make_state=lambda: lm.TrainState.create(_seeded(net), lm.optim.sgd(0.1)),
        step=sgd_step(forward),
        batches=lambda: batches,
        expected=_autocast_loop(net, losses, batches, narrow),
        read=params_of,
        transforms=lambda: [lm.precision("bf16")],
        tolerance=1e-6,
    )


_ROWS = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
CONSTANTS = _precise(Normalizing, _ROWS, _applied, narrow=True)
FLOAT_INPUTS = _precise(Clock, torch.arange(992.0, 1000.0), _applied, narrow=True)
FUNCTIONAL_CALL = _precise(Normalizing, _ROWS, _functional)
PLAIN_FUNCTION = _precise(
    Normalizing,
    _ROWS,
    lambda state, params, batch: _function_losses(params, batch),
    lambda module, batch: _function_losses(dict(module.named_parameters()), batch),
)


# ------------------------------------------------------------------------------------ 16 bits (f30, f31, f33)


def _linear_in_16_bits(tx: Any) -> Callable[[], lm.TrainState]:
    def make() -> lm.TrainState:
        net = nn.Linear(64, 1, bias=False, dtype=torch.bfloat16)
        nn.init.ones_(net.weight)
        return lm.TrainState.create(net, tx())

    return make


def _linear(state: Any, params: Any, batch: Any) -> Tensor:
    return state.apply(params, batch["x"])[0].float().flatten()  # type: ignore[no-any-return]


def _unit_gradients(steps: int) -> Callable[[], list[Any]]:
    """Batches of which the mean of the rows, the gradient, is 1; exactly, also over microbatches."""
    rows = torch.tensor([0.0, 1.0, 3.0, 0.0, 1.0, 2.0, 1.0, 0.0], dtype=torch.bfloat16)
    return lambda: [{"x": rows[:, None].expand(8, 64)} for _ in range(steps)]


def _constant(**values: float) -> Callable[[Form], Tensors]:
    return lambda form: {name: torch.full((1, 64), value) for name, value in values.items()}


SGD_16_BITS = Case(
    make_state=_linear_in_16_bits(lambda: lm.optim.sgd(0.5)),
    step=sgd_step(_linear),
    batches=_unit_gradients(3),
    expected=_constant(weight=-0.5),
    read=params_of,
)

_AVERAGED_STEPS, _DECAY = 6, 0.999


def _average(steps: int) -> float:
    average = 1.0
    for i in range(1, steps + 1):
        average = _DECAY * average + (1 - _DECAY) * (1 - i / 256)
    return average


EMA_16_BITS = Case(
    make_state=_linear_in_16_bits(lambda: lm.optim.sgd(1 / 256)),
    step=sgd_step(_linear),
    batches=_unit_gradients(_AVERAGED_STEPS),
    expected=_constant(weight=1 - _AVERAGED_STEPS / 256, average=_average(_AVERAGED_STEPS)),
    read=lambda state: {**params_of(state), "average": state.slots["ema"].params["weight"]},
    outer=lambda: [lm.ema(_DECAY)],
    tolerance=2e-6,  # in 16 bits the average stays at 1: an error of 8e-5
)

_SMALL = 2.0**-12  # a sixteenth of the distance between two bfloat16 below 1


SCHEDULE_FREE_16_BITS = Case(
    make_state=_linear_in_16_bits(lambda: lm.optim.schedule_free(lm.optim.sgd(_SMALL))),
    step=sgd_step(_linear),
    batches=_unit_gradients(_AVERAGED_STEPS),
    # The mean of 1 - t * lr over the steps t.
    expected=_constant(average=1 - _SMALL * (_AVERAGED_STEPS + 1) / 2),
    read=lambda state: {"average": state.opt_state.x["weight"]},
    tolerance=1e-6,
)


# ------------------------------------------------------------------------------------ strides (f32)

_generator = torch.Generator().manual_seed(0)
_IMAGES = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=_generator).contiguous(
    memory_format=torch.channels_last
)
_FILTERS = 0.3 * torch.randn(5, 3, 3, 3, dtype=torch.float64, generator=_generator)
_TARGETS = F.conv2d(_IMAGES, 0.3 * torch.randn(5, 3, 3, 3, dtype=torch.float64, generator=_generator))
_CONV_BATCHES = [{"x": _IMAGES, "y": _TARGETS}] * 3


class Filters(nn.Module):
    """A convolution, whose weight has a gradient with other strides for channels-last images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_FILTERS.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


def _conv_losses(state: Any, params: Any, batch: Any) -> Tensor:
    return (state.apply(params, batch["x"])[0] - batch["y"]).square().flatten(1).mean(1)  # type: ignore[no-any-return]


def _strided(tx: Callable[[], Any], make_optimizer: Callable[[Any], torch.optim.Optimizer], **fields: Any) -> Case:
    def expected(form: Form) -> Tensors:
        net = Filters()

        def row_losses(batch: Any) -> Tensor:
            return (net(batch["x"]) - batch["y"]).square().flatten(1).mean(1)  # type: ignore[no-any-return]

        return torch_loop(net, make_optimizer(net.parameters()), row_losses, _CONV_BATCHES, form)

    return Case(
        make_state=lambda: lm.TrainState.create(Filters(), tx()),
        step=sgd_step(_conv_losses),
        batches=lambda: _CONV_BATCHES,
        expected=expected,
        read=params_of,
        tolerance=1e-10,
        **fields,
    )


def _torch_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.1, eps=1e-4, foreach=False, fused=False)


STRIDES = _strided(lambda: lm.optim.adamw(0.1, eps=1e-4), _torch_adamw)
STRIDES_FROM_TORCH = _strided(
    lambda: lm.optim.from_torch(torch.optim.AdamW, lr=0.1, eps=1e-4, fused=True),
    _torch_adamw,
    refused=dict.fromkeys(("compile", "ddp compile"), (PurityError, "runs in eager mode only.*such as lm.optim.adamw")),
)


# ------------------------------------------------------------------------------------ eight bits (f42)


def _zero_row_net() -> nn.Module:
    """Weights that eight bits keep exactly, and a row of zeros."""
    net = nn.Linear(16, 4)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([1.0, -0.5, 1.0, 0.5] * 4).expand(4, 16))
        net.weight[1] = 0.0
        net.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    return net


_EIGHTHS = torch.randint(-8, 9, (8, 16), generator=torch.Generator().manual_seed(1)) / 8


def _quantized_state(kind: str) -> Callable[[], lm.TrainState]:
    def make() -> lm.TrainState:
        tx = lm.optim.sgd(0.1)
        state = lm.quantize(lm.TrainState.create(_zero_row_net(), tx), kind)  # type: ignore[arg-type]
        return state.replace(tx=tx, opt_state=tx.init(state.params))

    return make


def _bias_alone(form: Form) -> Tensors:
    """The bias after training it in plain PyTorch beside the exact weight."""
    net, batches = _zero_row_net(), [{"x": _EIGHTHS}] * 2
    net.get_parameter("weight").requires_grad_(False)
    optimizer = torch.optim.SGD([net.get_parameter("bias")], 0.1)
    found = torch_loop(net, optimizer, lambda batch: net(batch["x"]).square().sum(1), batches, form)
    return {"bias": found["bias"]}


def _zero_row(kind: str, **fields: Any) -> Case:
    return Case(
        make_state=_quantized_state(kind),
        step=sgd_step(_applied),
        batches=lambda: [{"x": _EIGHTHS}] * 2,
        expected=_bias_alone,
        read=params_of,
        **fields,
    )


ZERO_ROW_FP8 = _zero_row("fp8", tolerance=1e-5)
ZERO_ROW_INT8 = _zero_row("int8", tolerance=0.02)


CASES = {
    "f01 buffers": BUFFERS,
    "f06 constants": CONSTANTS,
    "f07 float inputs": FLOAT_INPUTS,
    "f21 functional_call": FUNCTIONAL_CALL,
    "f21 plain function": PLAIN_FUNCTION,
    "f30 sgd": SGD_16_BITS,
    "f31 ema": EMA_16_BITS,
    "f32 adamw": STRIDES,
    "f32 from_torch": STRIDES_FROM_TORCH,
    "f33 schedule_free": SCHEDULE_FREE_16_BITS,
    "f42 fp8": ZERO_ROW_FP8,
    "f42 int8": ZERO_ROW_INT8,
}


# ------------------------------------------------------------------------------------ metrics (f43, f44)

# In batches of 4; those of the last are probabilities, as far as one can see.
SCORES = torch.tensor([-2.0, -0.5, 0.2, 0.9, 0.3, 3.0, 0.6, 0.7, 0.4, 0.1])
LABELS = torch.tensor([0, 0, 0, 1, 0, 1, 1, 0, 1, 0])


def metric_columns(rows: int = 10) -> Tensors:
    """Some rows. Of nine, batches of 4 leave one: on two ranks one has none of it."""
    return {"x": torch.ones(rows, 1), "score": SCORES[:rows], "label": LABELS[:rows]}


def metric_step(**metrics: Callable[[Tensor, Tensor], Any]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A step that returns `metrics` of its rows' scores and labels."""

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        def loss_fn(params: Any, batch: Any) -> Any:
            found = {name: metric(batch["score"], batch["label"]) for name, metric in metrics.items()}
            return lm.Mean.of(state.apply(params, batch["x"])[0].square().flatten()), lm.Aux(metrics=found)

        (_, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads), aux.metrics

    return step


def linear_state(tx: Any = None) -> lm.TrainState:
    """A state of a layer with one input."""
    torch.manual_seed(0)
    return lm.TrainState.create(nn.Linear(1, 1), tx or lm.optim.sgd(0.1))


def metric_run(
    step: Any, transforms: Sequence[lm.Transform], log_every: int, rows: int = 10
) -> dict[str, Sequence[float]]:
    """What a run over `metric_columns` logs, by name."""
    data = lm.Loader(metric_columns(rows), batch_size=4, shuffle=False)
    runner = lm.Runner(step, transforms=list(transforms), log_every=log_every, progress=False)
    history = runner.fit(linear_state(), data, until=lm.Epochs(1)).history
    return {
        name: history[f"train/{name}"][1] for name in ("worst", "least", "hits") if f"train/{name}" in history.names
    }


# ------------------------------------------------------------------------------------ windows (f52)


def window_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """A step whose loss is the mean of its rows' `x`, whatever the params are."""

    def loss_fn(params: Any, batch: Any) -> lm.Mean:
        return lm.Mean.of(batch["x"][:, 0] + 0 * state.apply(params, batch["x"])[0][:, 0])

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss, "rows": lm.Mean.of(batch["x"]), "sum": lm.Sum.of(batch["x"])}


WINDOW = torch.arange(23.0)[:, None].sqrt()  # of batches of 6, the last has 5


def window(directory: Any, transforms: Sequence[lm.Transform], steps: int) -> dict[str, float]:
    """Go on in `directory` up to step `steps`; what is logged there of all steps so far."""
    runner = lm.Runner(
        window_step,
        transforms=list(transforms),
        checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=2)),
        log_every=100,
        progress=False,
    )
    data = lm.Loader({"x": WINDOW}, batch_size=6, shuffle=False)
    metrics = runner.fit(linear_state(), data, until=lm.Steps(steps), resume="auto").metrics
    return {name: metrics[f"train/{name}"] for name in ("loss", "rows", "sum")}


def whole_window(steps: int) -> dict[str, float]:
    """The numbers of a window of the first `steps` steps."""
    rows = WINDOW[: 6 * steps].double()
    return {"loss": rows.mean().item(), "rows": rows.mean().item(), "sum": rows.sum().item()}


# ------------------------------------------------------------------------------------ where each input is tested

FORMS_OF_A_STEP = ("plain", "accumulate", "donate", "compile", "ddp", "fsdp")
_HERE, _THERE = "tests/laws/test_cases.py", "tests/distributed/test_cases.py"


def _row(here: str, there: str | None = None, **others: str) -> dict[str, str]:
    """The tests of one input: `here` in one process, `there` on two, and `others` by form."""
    found = dict.fromkeys(FORMS_OF_A_STEP[:4], f"{_HERE}::{here}")
    found |= dict.fromkeys(FORMS_OF_A_STEP[4:], f"{_THERE}::{there or here}")
    return {form: others.get(form, test) for form, test in found.items()}


_LIFETIME = "tests/unit/test_lifetime.py::test_"
_LOADERS = "does not apply: a Loader's workers know of no transform"

# Inputs of data sources have a table of their own, in tests/distributed/test_data_sources.py.
WHERE = {
    "f00 a guard in two steps": _row("test_a_shared_guard_dumps_the_step_that_failed"),
    "f01 buffers": _row("test_numbers"),
    "f06 float32 constants": _row("test_numbers"),
    "f07 float inputs": _row("test_numbers"),
    "f20 monitored names": _row("test_a_monitored_name_that_no_validation_gives"),
    "f21 precision without apply": _row("test_numbers"),
    "f21 remat and quantized without apply": _row("test_what_acts_on_the_model_alone_says_that_it_changed_nothing"),
    "f30 sgd": {
        **_row("test_numbers"),
        "compile": "tests/unit/test_optim_lowerings.py::test_a_compiled_update_is_float64_rounded_once",
    },
    "f31 ema": _row("test_numbers"),
    "f32 strides": _row("test_numbers"),
    "f33 schedule_free": _row("test_numbers"),
    "f42 a row of zeros": _row("test_numbers"),
    "f43 a rank without rows": _row("test_metrics_of_uneven_batches"),
    "f44 logits": _row("test_a_metric_that_guesses_at_logits_says_so"),
    "f50 after fit": {
        **_row("test_nothing_is_alive_after_a_run"),
        "plain": f"{_LIFETIME}nothing_is_alive_when_a_run_returns_or_raises",
        "accumulate": f"{_LIFETIME}nothing_is_alive_when_a_run_returns_or_raises",
        "donate": f"{_LIFETIME}nothing_is_alive_under_donation_and_compilation",
        "compile": f"{_LIFETIME}nothing_is_alive_under_donation_and_compilation",
    },
    "f51 workers after fit": {
        **dict.fromkeys(FORMS_OF_A_STEP, _LOADERS),
        "plain": f"{_LIFETIME}worker_processes_end_with_their_loader",
        "accumulate": f"{_LIFETIME}worker_processes_end_with_their_loader",
    },
    "f52 a window over two worlds": {
        **_row("test_a_window_cut_by_a_restart_logs_the_uninterrupted_numbers"),
        "ddp": "tests/distributed/test_runner.py"
        "::test_a_window_cut_by_restarts_into_other_worlds_logs_the_uninterrupted_numbers",
        "fsdp": f"{_THERE}::test_a_window_cut_by_restarts_into_other_worlds",
    },
    "f53 an error of the data": _row(
        "test_an_os_error_of_the_data_ends_in_a_checkpoint",
        "test_an_os_error_of_the_data_keeps_the_last_checkpoint_of_all_ranks",
    ),
}
