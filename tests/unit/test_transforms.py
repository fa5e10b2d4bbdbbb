"""Settings and small promises of single transforms that no law speaks of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lumen as lm


def make_state(net: nn.Module | None = None) -> lm.TrainState:
    return lm.TrainState.create(net or nn.Linear(4, 2), lm.optim.adamw(1e-2))


def step(state: lm.TrainState, batch: torch.Tensor) -> tuple[lm.TrainState, dict[str, Any]]:
    def loss_fn(params: Any, batch: torch.Tensor) -> Any:
        out, buffers = state.apply(params, batch)
        return lm.Mean.of(out.square()), lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}


SAID = [
    (lm.accumulate(4), "lm.accumulate(4)"),
    (lm.accumulate(microbatch=8), "lm.accumulate(microbatch=8)"),
    (lm.clip(1.0), "lm.clip(1.0)"),
    (lm.clip(value=0.5), "lm.clip(value=0.5)"),
    (lm.compile(), "lm.compile()"),
    (
        lm.compile(mode="reduce-overhead", backend="eager"),
        "lm.compile(mode='reduce-overhead', backend='eager')",
    ),
    (lm.donate(), "lm.donate()"),
    (lm.ema(None, warmup=True, start=3), "lm.ema(None, warmup=True, start=3)"),
    (lm.ensemble(3, batch_dim=0), "lm.ensemble(3, batch_dim=0)"),
    (lm.guard("raise"), "lm.guard('raise')"),
    (lm.precision("bf16"), "lm.precision('bf16')"),
    (lm.dp_sgd(1.0, 0.5), "lm.dp_sgd(clip=1.0, noise=0.5)"),
    (lm.remat("blocks.*"), "lm.remat('blocks.*')"),
    (lm.remat(save="matmuls", offload=True), "lm.remat(save='matmuls', offload=True)"),
    (lm.remat(budget="1.5GiB"), "lm.remat(budget='1.5GiB')"),
    (lm.seeded(), "lm.seeded()"),
    (lm.unroll(2), "lm.unroll(2)"),
]


@pytest.mark.parametrize(("transform", "text"), SAID, ids=[text for _, text in SAID])
def test_a_transform_reads_as_it_was_written(transform: lm.Transform, text: str) -> None:
    assert repr(transform) == text
    assert repr(eval(text, {"lm": lm})) == text


class Counted(nn.Linear):
    """A layer that counts its calls."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.calls += 1
        return super().forward(x).tanh()


@pytest.mark.parametrize(
    ("pattern", "calls"),
    [(None, 4), ("blocks.*", 4), ("blocks.1", 3), (Counted, 4), (lambda name, module: name == "blocks.0", 3)],
)
def test_remat_runs_the_chosen_modules_twice(pattern: Any, calls: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Counted(4, 4), Counted(4, 4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    Counted.calls = 0
    lm.remat(pattern)(step)(make_state(Net()), torch.randn(3, 4))
    assert Counted.calls == calls


def test_remat_does_not_repeat_what_the_forward_did_to_buffers() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    new, _ = lm.remat(nn.BatchNorm1d)(step)(make_state(net), torch.randn(5, 4))
    assert int(new.buffers["1.num_batches_tracked"]) == 1


def test_remat_recomputes_with_the_buffers_of_the_call() -> None:
    """The output depends on a buffer that the forward itself counts up."""

    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1.0)
            return super().forward(x).tanh() * self.calls.clone()

    state, batch = make_state(nn.Sequential(Counting(), nn.Linear(4, 2))), torch.randn(3, 4)
    new, _ = lm.remat(Counting)(step)(state, batch)
    expected, _ = step(state, batch)
    for path, (found, want) in enumerate(zip(lm.tree.leaves(new), lm.tree.leaves(expected), strict=True)):
        assert torch.equal(found, want), lm.tree.paths(new)[path]


@pytest.mark.parametrize("transforms", [[], [lm.compile(backend="eager")]], ids=["eager", "compiled"])
def test_remat_draws_no_other_dropout_masks_in_the_recomputation(transforms: list[lm.Transform]) -> None:
    """The loss is quadratic in params, so whatever the masks are, the gradient along params is twice the loss."""

    def along(state: lm.TrainState, batch: torch.Tensor) -> tuple[lm.TrainState, dict[str, torch.Tensor]]:
        def loss_fn(params: Any, batch: torch.Tensor) -> torch.Tensor:
            return state.apply(params, batch)[0].square().mean()

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state, {"loss": loss, "slope": (grads["0.1.weight"] * state.params["0.1.weight"]).sum()}

    block = nn.Sequential(nn.Dropout(), nn.Linear(8, 4, bias=False), nn.Dropout(inplace=True))
    state = make_state(nn.Sequential(block))
    _, found = lm.compose(*transforms, lm.remat("0"))(along)(state, torch.randn(6, 8))
    torch.testing.assert_close(found["slope"], 2 * found["loss"])


def test_donate_writes_into_the_same_memory() -> None:
    donated = lm.donate()(step)
    state = donated.init(make_state())
    before = {path: t.data_ptr() for path, t in lm.tree.named_tensors((state.params, state.opt_state))}
    for _ in range(3):
        state, _ = donated(state, torch.randn(3, 4))
    after = {path: t.data_ptr() for path, t in lm.tree.named_tensors((state.params, state.opt_state))}
    assert after == before


@pytest.mark.parametrize("wrap", [dict, lm.dataclass(type("Two", (), {"__annotations__": {"a": Any, "b": Any}}))])
def test_donate_takes_a_state_of_two_states(wrap: Any) -> None:
    def both(state: Any, batch: torch.Tensor) -> tuple[Any, dict[str, Any]]:
        a, b = (state["a"], state["b"]) if wrap is dict else (state.a, state.b)
        (a, seen), (b, _) = step(a, batch), step(b, batch)
        return wrap(a=a, b=b), seen

    donated, batch = lm.donate()(both), torch.randn(3, 4)
    plain = wrap(a=make_state(), b=make_state())
    state = donated.init(plain)
    for _ in range(2):
        plain, _ = both(plain, batch)
        state, _ = donated(state, batch)
    for x, y in zip(lm.tree.tensors(plain), lm.tree.tensors(state), strict=True):
        assert torch.equal(x, y)


def test_donate_does_not_excuse_other_changes_in_place() -> None:
    def both(state: dict[str, Any], batch: torch.Tensor) -> tuple[Any, dict[str, Any]]:
        state["b"].params["weight"].add_(1.0)
        a, seen = step(state["a"], batch)
        return {"a": a, "b": state["b"]}, seen

    donated = lm.donate()(both)
    with pytest.raises(lm.errors.PurityError, match=r"changed state.*weight.* in place"):
        donated(donated.init({"a": make_state(), "b": make_state()}), torch.randn(3, 4))


def test_donate_leaves_the_module_its_params() -> None:
    net = nn.Linear(4, 2)
    before = net.weight.detach().clone()
    donated = lm.donate()(step)
    donated(donated.init(make_state(net)), torch.randn(3, 4))
    assert torch.equal(net.weight, before)


def test_guard_counts_what_it_skipped() -> None:
    guarded = lm.guard()(step)
    state = guarded.init(make_state())
    for scale in (1.0, torch.inf, torch.nan, 1.0):
        state, _ = guarded(state, torch.ones(3, 4) * scale)
    assert int(state.slots["guard"].skipped) == 2
    assert int(state.slots["guard"].bad) == -1


def test_unroll_merges_metrics_by_their_type() -> None:
    def counts(state: int, batch: torch.Tensor) -> tuple[Any, dict[str, Any]]:
        return state + 1, {"sum": lm.Sum.of(batch), "mean": batch.float().mean(), "last": lm.Last(batch[0])}

    state, metrics = lm.unroll(2)(counts)(0, torch.tensor([[1, 2], [3, 6]]))
    assert state == 2
    assert {k: float(v) for k, v in lm.compute_metrics(metrics).items()} == {
        "sum": 12.0,
        "mean": 3.0,
        "last": 3.0,
    }


def test_sweep_lanes_keep_the_states_seed() -> None:
    state = lm.sweep(lr=[0.1, 0.2]).init(make_state())
    assert state.seed.tolist() == [0, 0]


def test_ensemble_lane_picks_one_run() -> None:
    members = lm.ensemble(3)
    state = members.init(make_state())
    assert torch.equal(members.lane(state, 2).seed, members.export(state)[2].seed)


@pytest.mark.parametrize("steps", [0, 3])
def test_epsilon_grows_with_the_steps(steps: int) -> None:
    pytest.importorskip("dp_accounting")
    private = lm.dp_sgd(clip=1.0, noise=1.0)
    noisy = private(step)
    state = noisy.init(make_state())
    for _ in range(steps):
        state, _ = noisy(state, torch.randn(4, 4))
    spent = private.epsilon(state, delta=1e-5, sample_rate=0.01)
    assert spent == 0.0 if steps == 0 else 0.0 < spent < 2.0
