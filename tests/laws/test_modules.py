"""`lm.pure(module)` is the module: the same outputs, gradients and buffers, and the module is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import lumen as lm

from .models import MODELS, Attention, Job, Tied, assert_same, jobs


class Biased(nn.Module):
    """A buffer that is trained on beside frozen and shared parts."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = self.one
        self.register_buffer("seen", torch.zeros(()))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.sum().detach()
        return self.two(self.one(x).tanh()) * self.frozen


class SelfAttention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x, x, x)


def _rows() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def _sequence() -> Tensor:
    return torch.randn(3, 6, 4, dtype=torch.float64)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, batch_first=True, bidirectional=True), _sequence),
    "gru": (lambda: nn.GRU(4, 3, batch_first=True), _sequence),
    "multihead attention": (SelfAttention, _sequence),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        _sequence,
    ),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)), _rows),
    "spectral norm": (lambda: spectral_norm(nn.Linear(4, 4)), _rows),
    "orthogonal": (lambda: orthogonal(nn.Linear(4, 4)), _rows),
    "batch norm": (lambda: nn.BatchNorm1d(4), _rows),
    "batch norm with momentum None": (lambda: nn.BatchNorm1d(4, momentum=None), _rows),
    "instance norm": (lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), _sequence),
    "shared and frozen": (Biased, _rows),
    "attention": (Attention, lambda: MODELS["attention"].inputs(3)),
    "tied": (Tied, lambda: MODELS["tied"].inputs(5)),
}


def total(out: Any) -> Tensor:
    return sum(t.square().sum() for t in lm.tree.tensors(out))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_pure_is_the_module(case: str, training: bool) -> None:
    make, inputs = CASES[case]
    module = make().double().train(training)
    model = lm.pure(module)
    params, buffers = lm.tree.map(torch.clone, (model.params, model.buffers))
    x = inputs()

    def loss_fn(params: Any, x: Tensor) -> Any:
        out, new = model.apply(params, buffers, x)
        return total(out), lm.Aux(buffers=new, metrics={"out": out})

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(params, x)
    untouched = {**params, **buffers}
    out = module(x)
    total(out).backward()
    assert_same(aux.metrics["out"], lm.tree.map(torch.Tensor.detach, out), tolerance=1e-12)
    torch.testing.assert_close(loss, total(out).detach())
    # The module itself has now run once: its buffers are what the pure one returned.
    own = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    assert_same(dict(aux.buffers), {name: own[name].detach() for name in aux.buffers}, tolerance=1e-12)
    assert_same(grads, {n: p.grad for n, p in module.named_parameters() if p.requires_grad}, tolerance=1e-12)
    assert_same(untouched, {**params, **buffers}, exact=True)


@pytest.mark.parametrize("case", CASES)
def test_the_module_is_left_alone(case: str) -> None:
    make, inputs = CASES[case]
    module = make().double()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    model = lm.pure(module)
    with torch.no_grad():
        model.apply(*model[1:], inputs())
    assert_same(dict(module.state_dict()), before, exact=True)


@settings(max_examples=15)
@given(job=jobs(tuple(MODELS)))
def test_names_are_those_of_the_module(job: Job) -> None:
    module = job.module()
    model = lm.pure(module)
    assert list(model.params) == [name for name, _ in module.named_parameters()]
    assert set(model.buffers) == {name for name, _ in module.named_buffers()}


def test_later_changes_of_the_module_do_not_reach_it() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model = lm.pure(module.eval())
    x = torch.randn(2, 4)
    expected, _ = model.apply(model.params, {}, x)
    module.train()
    module[1].p = 1.0
    found, _ = model.apply(model.params, {}, x)
    assert torch.equal(found, expected)


def test_eval_and_train_are_the_two_modes() -> None:
    model = lm.pure(nn.Dropout(1.0))
    x = torch.ones(3)
    for apply, expected in ((model.apply, 0.0), (model.apply.eval(), 1.0), (model.apply.eval().train(), 0.0)):
        assert apply({}, {}, x)[0].tolist() == [expected] * 3
    assert model.apply.eval().train() is model.apply


def test_an_error_in_forward_leaves_the_function_usable() -> None:
    model = lm.pure(nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        model.apply(model.params, {}, torch.ones(3, 5))
    out, _ = model.apply(model.params, {}, torch.ones(3, 4))
    assert out.device.type == "cpu"


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Any) -> Any:
        return self.up(self.down(x))

    def error(self, x: Any, *, scale: float) -> Any:
        return ((self.norm(self(x)) + self.forward(x) - x) * scale).square().mean()


def test_a_method_is_called_as_the_module_is() -> None:
    module, x, calls = TwoWays(), torch.randn(3, 4), []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    model = lm.pure(module)
    apply = model.apply.calling(TwoWays.error)
    assert apply is model.apply.calling(TwoWays.error)
    out, buffers = apply(model.params, model.buffers, x, scale=2.0)
    assert calls == ["before"], "hooks of the module run once around the whole"
    again, _ = apply.eval()(model.params, buffers, x, scale=2.0)
    torch.testing.assert_close(out, module.error(x, scale=2.0))
    torch.testing.assert_close(buffers["norm.running_mean"], module.norm.running_mean)
    torch.testing.assert_close(again, module.eval().error(x, scale=2.0))
    torch.testing.assert_close(model.apply(model.params, model.buffers, x)[0], module(x))


@pytest.mark.parametrize("transform", [lm.remat("down"), lm.compile(backend="eager"), lm.precision("fp64"), lm.guard()])
def test_a_method_runs_under_transforms(transform: Any) -> None:
    def step(state: Any, x: Any) -> Any:
        def loss_fn(params: Any, x: Any) -> Any:
            loss, buffers = state.apply_fn.calling(TwoWays.error)(params, state.buffers, x, scale=2.0)
            return loss, lm.Aux(buffers=buffers)

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, x)
        return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}

    state = lm.TrainState.create(TwoWays().double(), lm.optim.sgd(0.1))
    x = torch.randn(5, 4, dtype=torch.float64)
    wanted, _ = step(state, x)
    wrapped = transform(step)
    found, _ = wrapped(wrapped.init(state), x)
    for name, value in wanted.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-10, atol=1e-12)


class Sided(nn.Module):
    """Keeps a side loss where its user would look for it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.side = torch.zeros(())
        self.sides: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        self.side = out.square().mean()
        self.sides = [self.side]
        return out.tanh()


def with_side(module: Any, x: Tensor) -> Any:
    return module(x), module[0].side


def test_a_side_loss_is_returned_from_inside_the_model_and_a_stale_one_is_refused() -> None:
    net = nn.Sequential(Sided(), nn.Linear(4, 1)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    out = net(x)
    expected = out.mean() + net[0].side
    net[0].side, net[0].sides = torch.zeros(()), []
    state = lm.TrainState.create(net, lm.optim.sgd(0.1))

    def right(state: Any, batch: Tensor) -> Any:
        def loss_fn(params: Any, batch: Tensor) -> Tensor:
            (out, side), _ = state.apply_fn.calling(with_side)(params, state.buffers, batch)
            return out.mean() + side

        assert isinstance(net, nn.Module)  # a module of the step's own may be at hand
        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    def stale(state: Any, batch: Tensor) -> Any:
        def loss_fn(params: Any, batch: Tensor) -> Tensor:
            return state.apply(params, batch)[0].mean() + net[0].side

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    new, metrics = right(state, x)
    assert_same(metrics["loss"], expected)
    lm.seeded()(right)(state, x)
    assert not torch.equal(new.params["0.inner.weight"], state.params["0.inner.weight"])
    for step in (stale, lm.precision("fp64")(stale)):
        with pytest.raises(lm.errors.PurityError, match=r"reads 'side' from a Sequential.*forward of Sided"):
            lm.compose()(step)(state, x)


def test_two_parameters_in_one_memory_are_refused() -> None:
    """As peft's adapters of tied layers are: the one is the other's transpose."""
    net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))
    net[1].weight = nn.Parameter(net[0].weight.t())
    with pytest.raises(lm.errors.ParamsError, match=r"'0.weight' and '1.weight' are two.*ensure_weight_tying"):
        lm.pure(net)
    net[0].weight.requires_grad_(False)
    with pytest.raises(lm.errors.ParamsError, match="two parameters in the same memory"):
        lm.pure(net)
    net[1].weight.requires_grad_(False)
    assert list(lm.pure(net).params) == []

    flat = torch.zeros(12)  # as an RNN lays its weights out: side by side
    for i, layer in enumerate(net):
        layer.weight = nn.Parameter(flat[6 * i : 6 * i + 6].view(layer.weight.shape))
    assert list(lm.pure(net).params) == ["0.weight", "1.weight"]
    interleaved = torch.zeros(3, 4)
    net[0].weight, net[1].weight = (nn.Parameter(interleaved[:, i : i + 2]) for i in (0, 2))
    assert list(lm.pure(net).params) == ["0.weight", "1.weight"]
