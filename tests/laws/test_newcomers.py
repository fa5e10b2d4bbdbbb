"""What newcomers write: in each case the numbers of a raw PyTorch loop, or an error with the line to write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lumen as lm

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


class Codebook(nn.Module):
    """The codebook of a VQ-VAE in a frozen parameter that the forward pass replaces by a moving average."""

    def __init__(self, trained: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode = nn.Linear(4, 2)
        self.codes = nn.Parameter(torch.randn(3, 2), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        nearest = F.one_hot(torch.cdist(z, self.codes).argmin(1), 3).to(z.dtype)
        loss = (z - nearest @ self.codes.detach()).square().mean()
        moved = torch.lerp(self.codes, nearest.T @ z.detach() / len(z), 0.1)
        self.codes = nn.Parameter(moved.detach(), requires_grad=self.codes.requires_grad)
        return loss


def with_buffers(state: Any, batch: Any) -> Any:
    def loss_fn(params: Any, batch: Any) -> Any:
        loss, buffers = state.apply(params, batch)
        return loss, lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}


def squares(state: Any, batch: Any) -> Any:
    loss, grads = lm.value_and_grad(lambda p, b: state.apply(p, b)[0].square().mean())(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_frozen_parameter_that_the_model_replaces_is_handed_from_microbatch_to_microbatch(parts: int) -> None:
    step = lm.compose(lm.donate(), lm.accumulate(parts))(with_buffers)
    state = step.init(lm.TrainState.create(Codebook().double(), lm.optim.sgd(0.1)))
    net = Codebook().double()
    optimizer = torch.optim.SGD(net.encode.parameters(), 0.1)
    for _ in range(3):
        state, _ = step(state, X.double())
        optimizer.zero_grad()
        for rows in X.double().chunk(parts):
            (net(rows) / parts).backward()
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close({**state.params, **state.buffers}[name], p.detach(), rtol=0, atol=1e-12)


def test_a_trained_parameter_that_the_model_replaces_is_refused_by_name() -> None:
    state = lm.TrainState.create(Codebook(trained=True), lm.optim.sgd(0.1))
    with pytest.raises(lm.errors.ParamsError, match=r"replaced its parameter 'codes'.*register_buffer\('codes'"):
        with_buffers(state, X)


@lm.dataclass
class Counting(lm.TrainState):
    position: int = 0


@pytest.mark.parametrize("donates", [False, True])
def test_a_integer_of_in_a_compiled_state_counts(donates: bool) -> None:
    def step(state: Any, batch: Any) -> Any:
        new, metrics = squares(state, batch)
        return new.replace(position=state.position + 1), metrics

    compiled = lm.compose(lm.compile(backend="eager"), *([lm.donate()] if donates else []))(step)
    state = compiled.init(Counting.create(nn.Linear(4, 1), lm.optim.sgd(0.1)))
    for expected in (1, 2, 3):
        state, _ = compiled(state, X)
        assert state.position == expected


def two_players(state: Any, batch: Any) -> Any:
    (first, metrics), (second, _) = squares(state["a"], batch), squares(state["b"], batch)
    return {"a": first, "b": second}, metrics


def players(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    net = lambda: nn.Sequential(nn.Linear(4, 1), nn.Dropout(dropout))  # noqa: E731
    return {name: lm.TrainState.create(net(), lm.optim.sgd(0.1), seed=i) for i, name in enumerate("ab")}


def test_ema_averages_each_of_several_states() -> None:
    averaged = lm.compose(lm.ema(0.9), lm.donate(), lm.accumulate(2))(two_players)
    alone = lm.ema(0.9)(squares)
    state, singles = averaged.init(players()), {name: alone.init(inner) for name, inner in players().items()}
    for _ in range(3):
        state, _ = averaged(state, X)
        singles = {name: alone(single, X)[0] for name, single in singles.items()}
    for name, single in singles.items():
        for key, p in lm.ema.params(single).items():
            torch.testing.assert_close(lm.ema.params(state[name])[key], p, rtol=0, atol=1e-6)
    assert all(not inner.slots for inner in averaged.export(state).values())


def test_seeded_makes_a_step_of_several_states_a_function() -> None:
    lm.check_purity(lm.seeded()(two_players), players(0.5), X)


def test_lanes_of_several_states_have_seeds_of_their_own() -> None:
    lanes = lm.ensemble(3).init(players())
    assert all(len(inner.seed.unique()) == 3 for inner in lanes.values())


def test_a_name_that_is_no_axis_is_refused_in_a_parallel_step() -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"rows": lm.psum(torch.ones(()), "batch")}

    with pytest.raises(lm.errors.AxisError, match="'batch' is bound nowhere.*'data'"):
        lm.ddp()(step)({}, X)
    assert float(step({}, X)[1]["rows"]) == 1.0  # without a mesh any axis is the identity


def test_a_model_in_evaluation_mode_warns_when_it_is_fit() -> None:
    net = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5)).eval()
    runner = lm.Runner(squares, progress=False)
    with pytest.warns(lm.InexactWarning, match=r"Sequential trains in evaluation mode.*net\.train\(\)"):
        runner.fit(lm.TrainState.create(net, lm.optim.sgd(0.1)), [X], until=lm.Steps(1))
    runner.fit(lm.TrainState.create(net.train(), lm.optim.sgd(0.1)), [X], until=lm.Steps(1))
    runner.fit(lm.TrainState.create(nn.Linear(4, 1).eval(), lm.optim.sgd(0.1)), [X], until=lm.Steps(1))


def test_a_method_that_no_run_calls_warns() -> None:
    class Lightnings(lm.Callback):
        def on_train_epoch_end(self, view: Any) -> None: ...

    with pytest.warns(lm.InexactWarning, match=r"on_train_epoch_end is never called.*on_validate"):
        lm.Runner(squares, callbacks=[Lightnings()], progress=False)


def failing(call: Any) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (what is looked at is the note)
        call()
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def test_errors_of_a_model_say_what_to_write() -> None:
    state = lm.TrainState.create(nn.Linear(4, 1), lm.optim.sgd(0.1))
    assert "x.to(torch.float32)" in failing(lambda: squares(state, X.double()))
    assert "torch.from_numpy" in failing(lambda: squares(state, np.ones((2, 4), np.float32)))
    assert "state.apply(params, **batch)" in failing(lambda: squares(state, {"x": X}))
    assert "state.apply(state.params, x)" in failing(lambda: state.apply(X))
    assert "loss, grads = lm.value_and_grad" in failing(lambda: state.apply_gradients(torch.ones(())))

    def backward(state: Any, batch: Any) -> Any:
        state.apply(state.params, batch)[0].mean().backward()

    assert "In place of loss.backward()" in failing(lambda: lm.donate()(backward)(state, X))

    def slope(state: Any, batch: Any) -> Any:
        x = batch.detach().requires_grad_()
        return {"slope": torch.autograd.grad(state.apply(state.params, x)[0].sum(), x)[0].mean()}

    assert "torch.enable_grad()" in failing(lambda: lm.evaluate(slope, state, [X]))


def test_errors_of_data_say_what_to_write() -> None:
    pd = pytest.importorskip("pandas")
    ragged = [{"ids": torch.ones(n)} for n in (1, 2)]
    assert "lm.Loader((x, y)" in failing(lambda: lm.Loader([X, X[:, 0]], batch_size=2))
    assert "x.to_numpy()" in failing(lambda: lm.Loader((pd.DataFrame(X.numpy()), X), batch_size=2))
    assert "DataCollatorWithPadding" in failing(lambda: next(iter(lm.Loader(ragged, batch_size=2))))


def test_errors_of_losses_say_what_to_write() -> None:
    transformers = pytest.importorskip("transformers")
    out = transformers.modeling_outputs.SequenceClassifierOutput(loss=torch.ones(()), logits=X)
    params = {"w": torch.ones(())}
    assert "return out.loss" in failing(lambda: lm.value_and_grad(lambda p, b: out)(params, X))
    assert "labels" in failing(lambda: lm.value_and_grad(lambda p, b: None)(params, X))

    def step(state: Any, batch: Any) -> Any:
        lm.value_and_grad(lambda p, b: (p["w"] * b.mean(), out), has_aux=True)(params, batch)
        return state, {}

    assert "{'logits': out.logits}" in failing(lambda: lm.accumulate(2)(step)({}, X))


def in_place_net() -> nn.Module:
    class Summing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros(len(x), 1)
            total += super().forward(x)
            return total

    return Summing(4, 1)


def test_writes_in_place_under_vmap_say_what_to_write() -> None:
    for transform in (lm.ensemble(2), lm.dp_sgd(1.0, 0.0)):
        step = transform(squares)
        state = step.init(lm.TrainState.create(in_place_net(), lm.optim.sgd(0.1)))
        assert failing(lambda s=step, at=state: s(at, X)).count("Write x = x + y in place of x += y") == 1  # type: ignore[misc]

    def outside(state: Any, batch: Any) -> Any:
        total = torch.zeros(())
        total += state.params["weight"].sum()
        return state, {"total": total}

    step = lm.ensemble(2)(outside)
    state = step.init(lm.TrainState.create(nn.Linear(4, 1), lm.optim.sgd(0.1)))
    assert failing(lambda: step(state, X)).count("Write x = x + y in place of x += y") == 1


def normalized() -> Any:
    return lm.TrainState.create(nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1)), lm.optim.sgd(0.1))


@pytest.mark.parametrize("stack", [(), (lm.donate(), lm.accumulate(2))], ids=str)
def test_buffers_that_a_step_drops_are_named_once(stack: tuple[lm.Transform, ...]) -> None:
    step = lm.compose(*stack)(squares)
    state = step.init(normalized())
    with pytest.warns(
        lm.InexactWarning, match=r"squares drops .* Sequential has changed \('1.running_mean'.*buffers=aux"
    ):
        state, _ = step(state, X)
    step(state, X)  # warnings are errors here
    kept = lm.compose(*stack)(with_buffers)
    kept(kept.init(lm.TrainState.create(Codebook(), lm.optim.sgd(0.1))), X)
    still = lm.compose(*stack)(squares)
    still(still.init(normalized().eval()), X)


def test_buffers_of_a_module_that_runs_beside_the_state_are_named() -> None:
    net = nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1))

    def beside(state: Any, batch: Any) -> Any:
        call = lambda p, b: torch.func.functional_call(net, dict(p), (b,)).square().mean()  # noqa: E731
        loss, grads = lm.value_and_grad(call)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    step = lm.donate()(beside)
    state = step.init(lm.TrainState.create(net, lm.optim.sgd(0.1)))
    with pytest.warns(lm.InexactWarning, match="ran a Sequential outside of the state.*'1.num_batches_tracked'"):
        step(state, X)


def test_a_list_that_a_compiled_step_reads_is_read_anew() -> None:
    weights, config, log = [1.0, 2.0], {"scale": {"all": 1.0}}, []

    def step(state: Any, batch: Any) -> Any:
        log.append(len(batch))
        return state, {"sum": batch.sum() * weights[1] * config["scale"]["all"]}

    compiled = lm.compile(backend="eager")(step)
    for second, scale in ((2.0, 1.0), (2.0, 1.0), (3.0, 1.0), (3.0, 0.5), (3.0, 0.5)):
        weights[1], config["scale"]["all"] = second, scale
        assert float(compiled({}, torch.ones(4))[1]["sum"]) == 4 * second * scale
    assert log == [4] * 3  # traced once for each


class Drifting(nn.Module):
    """One block that runs twice, and moves a buffer: by `.data`, which autograd does not see, or by a new tensor."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Drift(by_data)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.blocks[0](x))


class Drift(nn.Module):
    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.layer, self.by_data = nn.Linear(4, 4), by_data
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        moved = self.scale + x.detach().mean(0)
        if self.by_data:
            self.scale.data.copy_(moved)
        else:
            self.scale = moved
        return torch.tanh(self.layer(x) * self.scale)


@pytest.mark.parametrize("options", [{}, {"save": "matmuls"}, {"budget": "1MB"}], ids=str)
def test_blocks_are_recomputed_from_what_data_held_when_they_ran(options: Any) -> None:
    def step(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any, batch: Any) -> Any:
            out, buffers = state.apply(params, batch)
            return out.square().mean(), lm.Aux(buffers=buffers)

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}

    found, wanted = (lm.TrainState.create(Drifting(by_data), lm.optim.sgd(0.1)) for by_data in (True, False))
    recomputed = lm.remat(**options)(step)
    for _ in range(2):
        (found, _), (wanted, _) = recomputed(found, X), step(wanted, X)
    for name, leaf in (found.params | found.buffers).items():
        assert torch.equal(leaf, (wanted.params | wanted.buffers)[name])
