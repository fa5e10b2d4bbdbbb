"""`grad_cache`: losses that compare all rows, computed in microbatches with the gradient of the whole batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lumen as lm
from lumen.core import rules
from lumen.core.rules import Primitive
from lumen.core.step import with_slot
from lumen.errors import LossError, OrderError, PurityError
from lumen.transforms._accumulate import AccumulateState
from tests.laws.models import assert_same

WIDTH, FEATURES = 5, 4
Step = Callable[[Any, Any], tuple[Any, Any]]


class Towers(nn.Module):
    """Two encoders and the temperature that their scores are divided by."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(WIDTH, 6), *middle, nn.Tanh(), nn.Linear(6, FEATURES))
        self.right = nn.Linear(WIDTH, FEATURES)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(left), self.right(right)


def state_of(*middle: nn.Module, tx: Any = None, dtype: torch.dtype = torch.float64) -> lm.TrainState:
    torch.manual_seed(0)
    return lm.TrainState.create(Towers(*middle).to(dtype), tx or lm.optim.sgd(0.5), seed=0)


def batch_of(rows: int = 7, seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return {"left": left, "right": right, "row": torch.arange(rows)}


def clip_loss(params: Any, embeddings: Any, batch: Any) -> Tensor:
    left, right = (F.normalize(embeddings[side], dim=-1) for side in ("left", "right"))
    scores = left @ right.T * params["scale"].exp()
    labels = torch.arange(len(scores))
    return F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)


def simclr_loss(params: Any, embeddings: Any, batch: Any) -> lm.Mean:
    views = F.normalize(torch.cat([embeddings["left"], embeddings["right"]]), dim=-1)
    scores = (views @ views.T / 0.5).masked_fill(torch.eye(len(views), dtype=torch.bool), -torch.inf)
    partners = torch.arange(len(views)).roll(len(batch["left"]))
    return lm.Mean.of(F.cross_entropy(scores, partners, reduction="none"))


def masked_loss(params: Any, embeddings: Any, batch: Any) -> lm.Mean:
    """Rows are counted by what the embeddings carry along; one microbatch may have none."""
    scores = embeddings["left"] @ embeddings["right"].T
    losses = F.cross_entropy(scores, torch.arange(len(scores)), reduction="none")
    return lm.Mean.of(losses, embeddings["row"] >= 2)


LOSSES = {"clip": clip_loss, "simclr": simclr_loss, "masked": masked_loss}


def step_of(loss: Callable[..., Any] = clip_loss, noise: float = 0.0, wrap: Any = lm.grad_cache) -> Step:
    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        def encode(params: Any, batch: Any) -> Any:
            left = batch["left"]
            if noise:
                left = left + noise * lm.random.by_row(state.key, batch["row"], lambda k: lm.random.normal(k, (WIDTH,)))
            (left, right), buffers = state.apply(params, left, batch["right"])
            aux = lm.Aux(buffers=buffers, metrics={"norm": lm.Mean.of(left.square().sum(-1))})
            return {"left": left, "right": right, "row": batch["row"]}, aux

        def with_aux(params: Any, embeddings: Any, batch: Any) -> Any:
            return loss(params, embeddings, batch), lm.Aux(metrics={"rows": lm.Sum(torch.tensor(len(batch["row"])))})

        (value, aux), grads = lm.value_and_grad(wrap(encode, with_aux), has_aux=True)(state.params, batch)
        return state.apply_gradients(grads, buffers=aux.buffers), {"loss": value, **aux.metrics}

    return step


def plain(encode: Callable[..., Any], loss: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss, written as one function."""

    def loss_fn(params: Any, batch: Any) -> Any:
        embeddings, aux = encode(params, batch)
        value, other = loss(params, embeddings, batch)
        return value, lm.Aux(buffers=aux.buffers, metrics={**aux.metrics, **other.metrics})

    return loss_fn


@settings(max_examples=10)
@given(loss=st.sampled_from([*LOSSES]), rows=st.integers(3, 11), data=st.data())
def test_microbatches_are_the_whole_batch(loss: str, rows: int, data: st.DataObject) -> None:
    by = data.draw(st.sampled_from(["k", "microbatch"]))
    number = data.draw(st.integers(1, rows + (2 if by == "microbatch" else 0)))
    step, batch = step_of(LOSSES[loss], noise=0.3), batch_of(rows)
    whole = step(state_of(), batch)
    assert_same(step_of(LOSSES[loss], noise=0.3, wrap=plain)(state_of(), batch), whole, exact=True)
    assert_same(lm.accumulate(**{by: number})(step)(state_of(), batch), whole)


def test_without_it_microbatches_train_on_another_loss() -> None:
    batch = batch_of()
    whole, parts = (wrapped(step_of(wrap=plain))(state_of(), batch)[0] for wrapped in (lm.compose(), lm.accumulate(3)))
    assert not torch.allclose(whole.params["right.weight"], parts.params["right.weight"], rtol=1e-3)
    assert_same(lm.accumulate(8)(step_of())(state_of(), batch), step_of()(state_of(), batch))  # one row each


STACKS: dict[str, Callable[[], list[lm.Transform]]] = {
    "donate, clip, guard, ema": lambda: [lm.guard("raise"), lm.clip(0.1), lm.ema(0.9), lm.donate(), lm.accumulate(3)],
    "guard inside": lambda: [lm.accumulate(3), lm.guard("skip")],
    "remat": lambda: [lm.accumulate(3), lm.remat("left")],
    "compiled": lambda: [lm.compile(backend="eager"), lm.donate(), lm.accumulate(2)],
    "auto": lambda: [lm.accumulate("auto")],
}


@pytest.mark.parametrize("name", STACKS)
def test_among_other_transforms(name: str) -> None:
    stack = STACKS[name]()
    alone = [t for t in stack if not isinstance(t, lm.accumulate | lm.compile)]
    tx = lm.optim.sgd(0.1, momentum=0.9)
    found, wanted = (lm.compose(*each)(step_of(noise=0.0 if name == "compiled" else 0.3)) for each in (stack, alone))
    one, other = found.init(state_of(tx=tx)), wanted.init(state_of(tx=tx))
    for seed in range(2):
        one, numbers = found(one, batch_of(seed=seed))
        other, expected = wanted(other, batch_of(seed=seed))
        assert_same(numbers, expected)
    assert_same(found.export(one).params, wanted.export(other).params)


FP16 = lm.Policy(torch.float32, torch.float16, torch.float32, loss_scale=2.0**9)


def test_as_many_microbatches_as_memory_asked_for() -> None:
    step = lm.accumulate("auto")(step_of())
    state = with_slot(step.init(state_of()), "accumulate", AccumulateState(torch.tensor(3)))
    assert_same(step.export(step(state, batch_of())[0]).params, step_of()(state_of(), batch_of())[0].params)


@pytest.mark.parametrize(("policy", "tolerance"), [(FP16, 5e-3), ("bf16", 3e-2)])
def test_in_sixteen_bits_it_is_as_near_to_float32_as_the_whole_batch(policy: Any, tolerance: float) -> None:
    """The gradient in the embeddings is scaled like any other, and unscaled once."""
    batch = batch_of(8, dtype=torch.float32)
    wanted, _ = step_of()(state_of(dtype=torch.float32), batch)
    step = lm.compose(lm.accumulate(3), lm.precision(policy))(step_of())
    found, metrics = step(step.init(state_of(dtype=torch.float32)), batch)
    assert all(m.dtype == torch.float32 for m in lm.tree.tensors(metrics["loss"]))
    for name, p in wanted.params.items():
        torch.testing.assert_close(found.params[name], p, rtol=0, atol=tolerance)
    if policy is FP16:
        assert int(found.slots["precision"].good) == 1


def test_narrow_params_are_summed_wide() -> None:
    batch = batch_of(8, dtype=torch.bfloat16)
    whole, parts = (t(step_of())(state_of(dtype=torch.bfloat16), batch)[0] for t in (lm.compose(), lm.accumulate(4)))
    for name, p in whole.params.items():
        assert parts.params[name].dtype == torch.bfloat16
        torch.testing.assert_close(parts.params[name], p, rtol=0.03, atol=0.03)


def test_lanes_of_an_ensemble() -> None:
    first, batch = state_of(), batch_of()
    states = [first, first.replace(params={name: 2 * p for name, p in first.params.items()})]
    runs = lm.compose(lm.ensemble(2), lm.accumulate(3))(step_of())
    lanes, _ = runs(runs.init(states), batch)
    for lane, state in zip(runs.export(lanes), states, strict=True):
        assert_same(lane.params, step_of()(state, batch)[0].params)


def test_lanes_of_an_ensemble_draw_alike_in_both_passes() -> None:
    """Were they not the same masks, the embeddings would have no gradient of zero at the loss's own minimum."""
    state, batch = state_of(nn.Dropout()), batch_of()

    def loss(params: Any, embeddings: Any, batch: Any) -> lm.Mean:
        return lm.Mean.of((embeddings["left"] - embeddings["left"].detach()).square().sum(-1))

    runs = lm.compose(lm.ensemble(2), lm.accumulate(3))(step_of(loss))
    lanes, metrics = runs(runs.init([state, state]), batch)
    assert_same(metrics["loss"].total, torch.zeros(2, dtype=torch.float64))
    for lane in runs.export(lanes):
        assert_same(lane.params, state.params, exact=True)


def test_differentiable_from_outside() -> None:
    """The embeddings of a step that somebody differentiates keep their graph."""
    state = state_of()

    def tuned(step: Step, rate: Tensor) -> Tensor:
        params = {name: p * rate for name, p in state.params.items()}
        _, metrics = step(state.replace(params=params), batch_of())
        return metrics["grads"]

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        def encode(params: Any, batch: Any) -> Any:
            left, right = state.apply(params, batch["left"], batch["right"])[0]
            return {"left": left, "right": right}

        _, grads = lm.value_and_grad(lm.grad_cache(encode, clip_loss))(state.params, batch)
        return state, {"grads": sum(g.square().sum() for g in grads.values())}

    rate = torch.ones((), dtype=torch.float64, requires_grad=True)
    (wanted,), (found,) = (torch.autograd.grad(tuned(s, rate), rate) for s in (step, lm.accumulate(3)(step)))
    assert_same(found, wanted)
    assert_same(torch.func.grad(lambda r: tuned(lm.accumulate(3)(step), r))(rate.detach()), wanted)


def test_one_part_with_dropout_is_the_step_itself_and_both_passes_draw_alike() -> None:
    step, batch = step_of(), batch_of()
    torch.manual_seed(5)
    wanted = step(state_of(nn.Dropout()), batch)
    after = torch.rand(3)
    torch.manual_seed(5)
    found = lm.accumulate(microbatch=7)(step)(state_of(nn.Dropout()), batch)
    assert_same(found, wanted)
    assert torch.equal(after, torch.rand(3))


def test_dropout_in_microbatches_is_the_gradient_of_what_was_drawn() -> None:
    """By finite differences, which draw the same masks."""
    state, batch = state_of(nn.Dropout()), batch_of()

    def loss_of(scale: float) -> Tensor:
        torch.manual_seed(3)
        moved = {**state.params, "left.0.weight": state.params["left.0.weight"] * (1 + scale)}
        new, metrics = lm.accumulate(3)(step_of())(state.replace(params=moved), batch)
        slope = (moved["left.0.weight"] - new.params["left.0.weight"]) / 0.5
        return torch.stack([metrics["loss"], (slope * state.params["left.0.weight"]).sum()])

    (above, _), (below, _), (_, slope) = loss_of(1e-6), loss_of(-1e-6), loss_of(0.0)
    torch.testing.assert_close((above - below) / 2e-6, slope, rtol=1e-6, atol=1e-8)


class Counting(nn.Module):
    """Keeps how many rows it has seen, and an average that each microbatch moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.count += len(x)
        self.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.average


def test_buffers_are_updated_once_and_each_pass_sees_the_same() -> None:
    state, batch = state_of(nn.BatchNorm1d(6), Counting()), batch_of()
    new, metrics = lm.accumulate(3)(step_of())(state, batch)
    assert int(new.buffers["left.2.count"]) == 7
    assert int(new.buffers["left.1.num_batches_tracked"]) == 1
    buffers, embeddings, moved = state.buffers, [], []
    for rows in torch.arange(7).tensor_split(3):  # as a raw loop
        out, left = state.apply_fn(state.params, buffers, batch["left"][rows], batch["right"][rows])
        buffers = {name: left[name] if "left.2" in name else buffers[name] for name in left}
        embeddings.append(out)
        moved.append(left["left.1.running_mean"] * len(rows) / 7)
    assert_same(new.buffers["left.2.average"], buffers["left.2.average"])
    assert_same(new.buffers["left.1.running_mean"], sum(moved))
    left, right = (torch.cat(column) for column in zip(*embeddings, strict=True))
    assert_same(metrics["loss"], clip_loss(state.params, {"left": left, "right": right}, batch).detach())


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """The most bytes that graphs kept for backward passes at once, tensors of a batch or of params left out."""
    alive, peak = [0], [0]

    def freed(size: int) -> None:
        alive[0] -= size

    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            size = tensor.nbytes if tensor.grad_fn is not None else 0
            alive[0] += size
            peak[0] = max(peak[0], alive[0])
            weakref.finalize(self, freed, size)

    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        yield peak


def test_activations_of_one_microbatch_at_a_time() -> None:
    deep = [layer for _ in range(48) for layer in (nn.Linear(6, 6), nn.Tanh())]
    peaks = {}
    for k in (1, 8):
        with saved_bytes() as peak:
            lm.accumulate(k)(step_of())(state_of(*deep), batch_of(32))
        peaks[k] = peak[0]
    with saved_bytes() as peak:
        embeddings = {
            side: torch.randn(32, FEATURES, dtype=torch.float64).requires_grad_() for side in ("left", "right")
        }
        clip_loss({"scale": torch.tensor(1.5, dtype=torch.float64, requires_grad=True)}, embeddings, {}).backward()
    assert peaks[8] < 1.05 * max(peaks[1] / 8, peak[0])
    assert peak[0] < peaks[1] / 2


def test_embeddings_that_params_do_not_reach_and_params_that_the_loss_does_not() -> None:
    """A head on frozen features, and embeddings of integers alone."""

    def step(params: Any, batch: Any) -> tuple[Any, Any]:
        def encode(params: Any, batch: Any) -> Any:
            return {"x": batch["left"], "row": batch["row"]}

        def loss(params: Any, embeddings: Any, batch: Any) -> Tensor:
            scores = (embeddings["x"] * params["head"]) @ embeddings["x"].T
            return F.cross_entropy(scores, embeddings["row"])

        value, grads = lm.value_and_grad(lm.grad_cache(encode, loss))(params, batch)
        return params, {"loss": value, **grads}

    params = {"head": torch.ones(WIDTH, dtype=torch.float64), "unused": torch.ones(2)}
    assert_same(lm.accumulate(3)(step)(params, batch_of()), step(params, batch_of()))


def test_gradients_of_a_rule_outside_are_those_of_the_batch_and_a_rule_inside_is_refused() -> None:
    def doubled(next: Any, call: Any) -> Any:
        answer = next(call)
        return answer.replace(grads=lm.tree.map(lambda g: 2 * g, answer.grads))

    outside, wanted = (
        rules.with_rules({Primitive.GRADIENT: doubled}, s) for s in (lm.accumulate(3)(step_of()), step_of())
    )
    assert_same(outside(state_of(), batch_of()), wanted(state_of(), batch_of()))
    with pytest.raises(OrderError, match=r"doubled'?, inside, changes gradients or losses"):
        lm.accumulate(3)(rules.with_rules({Primitive.GRADIENT: doubled}, step_of()))(state_of(), batch_of())
    with pytest.raises(OrderError, match=r"lm\.dp_sgd\(clip=1\.0, noise=0\.0\), inside"):
        private = lm.compose(lm.accumulate(3), lm.dp_sgd(clip=1.0, noise=0.0))(step_of())
        private(private.init(state_of()), batch_of())


def encoded(params: Any, batch: Any) -> Tensor:
    return batch["left"] @ params["w"]


def similar(params: Any, embeddings: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(embeddings @ embeddings.T, torch.arange(len(embeddings)))


def run(loss_fn: Any, *transforms: lm.Transform, has_aux: bool = False) -> Any:
    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        return state, lm.value_and_grad(loss_fn, has_aux=has_aux)(state, batch)

    params = {"w": torch.ones(WIDTH, 2, dtype=torch.float64)}
    return lm.compose(*transforms)(step)(params, batch_of(6))


def test_a_function_that_calls_it_is_refused_where_the_batch_is_split() -> None:
    loss_fn = lm.grad_cache(encoded, similar)
    hidden = lambda params, batch: 2 * loss_fn(params, batch)  # noqa: E731
    run(hidden)
    run(hidden, lm.accumulate(1))
    with pytest.raises(LossError, match=r"lm\.accumulate\(2\) hands a microbatch to lm\.grad_cache\(encoded"):
        run(hidden, lm.accumulate(2))


def scaled_by_wraps(next: Any, call: Any) -> Any:
    """What copies the attributes of the function that it wraps is no less another function."""
    import functools

    @functools.wraps(call.loss_fn)
    def twice(*args: Any) -> Any:
        loss, aux = call.loss_fn(*args)
        return 2 * loss, aux

    return next(call.replace(loss_fn=twice))


def test_a_loss_wrapped_outside_is_refused_not_passed_over() -> None:
    under = rules.with_rules({Primitive.GRADIENT: scaled_by_wraps}, lm.accumulate(3)(step_of()))
    with pytest.raises(LossError, match=r"lm\.accumulate\(3\) hands a microbatch"):
        under(state_of(), batch_of())


def test_draws_that_cannot_be_repeated_are_refused() -> None:
    generator, numbers = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def own(params: Any, batch: Any) -> Tensor:
        return encoded(params, batch) + torch.rand(2, generator=generator)

    def opaque_state(params: Any, batch: Any) -> Tensor:
        return encoded(params, batch) * numbers.random()

    for encode in (own, opaque_state):
        with pytest.raises(LossError, match=r"returned other embeddings when it was called again.*lm\.random"):
            run(lm.grad_cache(encode, similar), lm.accumulate(2))
    dropping = lm.compose(lm.compile(backend="eager"), lm.accumulate(2))(step_of())
    with pytest.raises(OrderError, match=r"encode draws random numbers from torch's generators, and lm\.compile"):
        dropping(state_of(nn.Dropout()), batch_of())


def test_tensors_outside_of_params_are_refused() -> None:
    alpha = torch.ones((), dtype=torch.float64, requires_grad=True)

    def depending(params: Any, batch: Any) -> Tensor:
        return encoded(params, batch) * alpha

    with (
        pytest.warns(lm.InexactWarning, match="require grad and are not among params"),
        pytest.raises(LossError, match="embeddings were computed without a graph"),
    ):
        run(lm.grad_cache(depending, similar), lm.accumulate(2))


BAD: dict[str, tuple[Any, Any, bool, str]] = {
    "views in one tensor": (lambda p, b: encoded(p, b).repeat(2, 1), similar, False, r"two views of each row"),
    "a scalar": (lambda p, b: encoded(p, b).sum(), similar, False, r"returned embeddings of shape \(\)"),
    "a number": (lambda p, b: {"n": 3, "x": encoded(p, b)}, similar, False, r"embeddings\['n'\] 3 for a batch"),
    "complex": (lambda p, b: torch.complex(encoded(p, b), encoded(p, b)), similar, False, "Return real tensors"),
    "nothing": (lambda p, b: {}, similar, False, "returned no embeddings"),
    "buffers of loss": (
        encoded,
        lambda p, e, b: (similar(p, e, b), lm.Aux(buffers={"n": torch.ones(())})),
        True,
        r"Apply the model there: return embeddings, lm\.Aux\(buffers=buffers\)",
    ),
    "one metric twice": (
        lambda p, b: (encoded(p, b), lm.Aux(metrics={"n": lm.Sum(torch.ones(()))})),
        lambda p, e, b: (similar(p, e, b), lm.Aux(metrics={"n": lm.Sum(torch.ones(()))})),
        True,
        "both return a metric 'n'",
    ),
    "aux of another type": (
        lambda p, b: (encoded(p, b), lm.Aux()),
        lambda p, e, b: (similar(p, e, b), {"n": torch.ones(())}),
        True,
        "cannot be joined",
    ),
    "aux unasked": (lambda p, b: (encoded(p, b), lm.Aux()), similar, False, "has_aux=True"),
    "no aux": (encoded, similar, True, r"with has_aux=True a loss function returns \(loss, aux\)"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("transforms", [(), (lm.accumulate(2),)], ids=["plain", "accumulate"])
def test_what_is_refused_is_refused_everywhere(name: str, transforms: tuple[lm.Transform, ...]) -> None:
    encode, loss, has_aux, message = BAD[name]
    with pytest.raises(LossError, match=message):
        run(lm.grad_cache(encode, loss), *transforms, has_aux=has_aux)


def test_aux_of_either_function_alone() -> None:
    either = [
        lm.grad_cache(lambda p, b: (encoded(p, b), lm.Aux(metrics={"n": lm.Sum(torch.ones(()))})), similar),
        lm.grad_cache(encoded, lambda p, e, b: (similar(p, e, b), {"n": e.sum().detach()})),
    ]
    for loss_fn, wanted in zip(either, (3, 1), strict=True):
        _, ((_, aux), _) = run(loss_fn, lm.accumulate(3), has_aux=True)
        _, ((_, whole), _) = run(loss_fn, has_aux=True)
        if wanted == 1:
            assert_same(aux, whole)
        else:
            assert int(aux.metrics["n"].total) == 3


def test_check_purity_takes_it_and_finds_rows_that_depend_on_each_other() -> None:
    lm.check_purity(step_of(), state_of(), batch_of(), rows=True)
    with pytest.raises(PurityError, match=r"encode does not compute each row's embeddings from that row alone"):
        lm.check_purity(step_of(), state_of(nn.BatchNorm1d(6)), batch_of(), rows=True)
    lm.check_purity(step_of(), state_of(nn.BatchNorm1d(6)).eval(), batch_of(), rows=True)
    with pytest.raises(PurityError, match=r"lm\.grad_cache\(encode, loss\)"):
        lm.check_purity(step_of(wrap=plain), state_of(), batch_of(), rows=True)
