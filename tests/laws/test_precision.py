"""`lm.precision`: what is cast, what is not, and that it holds wherever a step runs."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import AffineTransform, Categorical, Distribution, Independent, Normal, TransformedDistribution
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import lumen as lm
from lumen.errors import HyperparameterError, InexactWarning, PatternError
from tests.laws.models import assert_same

ROWS, WIDTH = 8, 4


class Centered(nn.Module):
    """A float32 buffer, and a float32 tensor made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((WIDTH,), 0.5))
        self.layer = nn.Linear(WIDTH, 3)
        self.norm = nn.LayerNorm(3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) * torch.linspace(0.5, 1.5, WIDTH)
        return self.out(self.norm(self.layer(x)).tanh())


class Clock(nn.Module):
    """A sinusoidal embedding of a float time step, which 16 bits cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(torch.stack([t.sin(), t.cos()], 1).to(x.dtype))


def batch_of(rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, WIDTH, generator=generator), torch.randn(rows, 2, generator=generator)
    return {"x": x, "y": y, "t": torch.arange(992.0, 992.0 + rows)}


def state_of(net: Callable[[], nn.Module] = Centered, tx: Any = None) -> lm.TrainState:
    torch.manual_seed(0)
    return lm.TrainState.create(net(), tx or lm.optim.sgd(0.1), seed=0)


def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    def loss_fn(params: Any, batch: Any) -> Any:
        out, buffers = state.apply(params, batch["x"])
        return lm.Mean.of((out - batch["y"]).square().mean(-1)), lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}


def by_torch(state: Any, batch: Any) -> dict[str, Tensor]:
    """The gradient by torch alone: autocast round a functional call, `backward` outside of it."""
    live = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        out = torch.func.functional_call(state.apply_fn.module, {**live, **state.buffers}, (batch["x"],))
        loss = (out.float() - batch["y"]).square().mean()
    return dict(zip(live, torch.autograd.grad(loss, [*live.values()]), strict=True))


def moved(state: Any, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p - 0.1 * grads[name] for name, p in state.params.items()}


def test_it_is_torchs_autocast_with_float32_buffers_and_tensors() -> None:
    state, batch = state_of(), batch_of()
    new, _ = lm.precision("bf16")(step)(state, batch)
    expected = moved(state, by_torch(state, batch))
    assert_same(new.params, expected, tolerance=1e-6)
    plain, _ = step(state, batch)
    assert not torch.equal(plain.params["layer.weight"], new.params["layer.weight"])
    assert {p.dtype for p in new.params.values()} == {torch.float32}


def test_float_inputs_are_not_rounded_before_the_model_sees_them() -> None:
    state, batch = state_of(Clock), batch_of()

    def outputs(transform: Any) -> Tensor:
        run = transform(lambda s, b: (s, {"y": lm.Last(s.apply(s.params, b["x"], t=b["t"])[0])}))
        return run(state, batch)[1]["y"].value  # type: ignore[no-any-return]

    full = outputs(lm.precision("fp32"))
    for transform, bound in (
        (lm.precision("bf16"), 0.01),
        (lm.precision("bf16", cast="model", keep="t"), 0.02),
        (lm.precision("bf16", cast="model", keep=["[tu]"]), 0.02),
    ):
        assert (outputs(transform) - full).abs().max() < bound
    assert (outputs(lm.precision("bf16", cast="model")) - full).abs().max() > 0.2


def test_inputs_in_a_dict_are_kept_by_their_path() -> None:
    seen: list[torch.dtype] = []

    class Net(nn.Linear):
        def forward(self, given: dict[str, Tensor], *rest: Tensor) -> Tensor:
            seen.extend([given["x"].dtype, given["t"].dtype, *(each.dtype for each in rest)])
            return super().forward(given["x"])

    def run(keep: Any) -> list[torch.dtype]:
        seen.clear()
        applied = lm.precision("bf16", cast="model", keep=keep)(lambda s, b: (s, s.apply(s.params, b, b["t"])[0]))
        applied(state_of(lambda: Net(WIDTH, 2)), batch_of())
        return list(seen)

    half, full = torch.bfloat16, torch.float32
    assert run("given.t") == [half, full, half]
    assert run("rest") == [half, half, full]
    with pytest.raises(PatternError, match="no argument of Net's forward matches 'time'; it was called with 'given'"):
        run("time")


def functional(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    def loss_fn(params: Any, batch: Any) -> Tensor:
        out = torch.func.functional_call(state.apply_fn.module, {**params, **state.buffers}, (batch["x"],))
        return F.mse_loss(out.float(), batch["y"])

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def by_hand(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    def loss_fn(params: Any, batch: Any) -> Tensor:
        h = (batch["x"] - 0.5) @ params["layer.weight"].T
        return (h[:, :2] - batch["y"]).square().mean() + 0 * sum(p.sum() for p in params.values())

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_losses_that_never_apply_the_model_are_computed_in_16_bits(policy: str) -> None:
    state, batch = state_of(), batch_of()
    for without in (functional, by_hand):
        cast = lm.precision(policy)(without)
        new, metrics = cast(cast.init(state), batch)
        plain, exact = without(state, batch)
        assert not torch.equal(new.params["layer.weight"], plain.params["layer.weight"])
        torch.testing.assert_close(new.params["layer.weight"], plain.params["layer.weight"], rtol=0.02, atol=0.02)
        torch.testing.assert_close(metrics["loss"], exact["loss"], rtol=0.02, atol=0.02)
    with_apply, _ = lm.precision("bf16")(step)(state, batch)
    without_apply, _ = lm.precision("bf16")(functional)(state, batch)
    assert_same(without_apply.params, with_apply.params, tolerance=1e-6)


@pytest.mark.parametrize(
    "transform",
    [
        lm.remat("layer"),
        lm.quantized_matmul("qat"),
        lm.compile(backend="eager", blocks="layer"),
        lm.precision("bf16", cast="model"),
    ],
    ids=repr,
)
def test_what_acts_on_the_models_application_says_once_that_there_is_none(transform: lm.Transform) -> None:
    state, batch = state_of(lambda: nn.Sequential(OrderedDict(layer=nn.Linear(WIDTH, 2)))), batch_of()
    made = transform(by_hand)
    with pytest.warns(InexactWarning, match=r"changed nothing in the step by_hand, .* out, buffers = state\.apply"):
        new, _ = made(state, batch)
    assert_same(new.params, by_hand(state, batch)[0].params, exact=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(state, batch)
        transform(step)(state, batch)


def test_a_step_with_neither_a_loss_nor_a_model_is_named() -> None:
    def measure(state: Any, batch: Any) -> Any:
        out = torch.func.functional_call(state.apply_fn.module, {**state.params, **state.buffers}, batch["x"])
        return state, {"loss": out.mean()}

    with pytest.warns(InexactWarning, match="changed nothing in the step measure"):
        lm.precision("bf16")(measure)(state_of(), batch_of())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for policy in ("fp32", "tf32"):  # which change nothing here whatever is called
            lm.precision(policy)(measure)(state_of(), batch_of())


class Pair(NamedTuple):
    mean: Tensor
    rest: Any


@dataclass(frozen=True)
class Answer:
    logits: Tensor
    policy: Distribution
    nested: Any
    name: str = "answer"


class Bag(dict[str, Any]):
    """A dict that torch does not know as a pytree."""


class Giving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        gauss = Normal(h, h.exp())
        moved = TransformedDistribution(gauss, [AffineTransform(h, h.exp())])
        packed = pack_sequence([h, h[:2]])
        bag = Bag(policy=Categorical(logits=h))
        return Answer(h, Independent(gauss, 1), [Pair(h, {"moved": moved}), bag, packed, None])


def dtypes(answer: Answer) -> set[torch.dtype]:
    pair, bag, packed, _ = answer.nested
    moved, policy = pair.rest["moved"], bag["policy"]
    found = [answer.logits, answer.policy.base_dist.loc, answer.policy.base_dist.scale, pair.mean]  # type: ignore[attr-defined]
    found += [moved.base_dist.loc, moved.transforms[0].loc, policy.logits, policy.probs, packed.data]
    assert isinstance(packed, PackedSequence)
    assert isinstance(bag, Bag)
    assert answer.policy.event_shape == (WIDTH,)
    assert policy.sample().shape == (ROWS,)
    assert torch.isfinite(moved.log_prob(torch.zeros(ROWS, WIDTH))).all()
    return {each.dtype for each in found}


@pytest.mark.parametrize("cast", ["autocast", "model"])
def test_outputs_come_back_in_float32_whatever_holds_them(cast: Any) -> None:
    seen: list[Any] = []

    def reading(state: Any, batch: Any) -> Any:
        seen.append(state.apply(state.params, batch["x"])[0])
        return state, {}

    lm.precision("bf16", cast=cast)(reading)(state_of(Giving), batch_of())
    assert dtypes(seen[0]) == {torch.float32}
    assert torch.equal(seen[0].logits, seen[0].logits.bfloat16().float())  # it was computed in 16 bits
    assert seen[0].name == "answer"


NETS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": Centered,
    "batch norm": lambda: nn.Sequential(nn.Linear(WIDTH, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval(),
    "instance norm": lambda: nn.Sequential(
        nn.Linear(WIDTH, 6), nn.Unflatten(1, (3, 2)), nn.InstanceNorm1d(3, affine=True), nn.Flatten(), nn.Linear(6, 2)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_under_vmap_each_lane_is_its_own_run(name: str) -> None:
    state, batch = state_of(NETS[name]), batch_of()
    alone, _ = lm.precision("bf16")(step)(state, batch)
    plain, _ = step(state, batch)
    lanes = lm.compose(lm.ensemble(2), lm.precision("bf16"))(step)
    new, _ = lanes(lanes.init([state, state]), batch)
    rows = lm.compose(lm.dp_sgd(1e6, 0.0), lm.precision("bf16"))(step)
    private, _ = rows(rows.init(state), batch)
    far = max(float((alone.params[k] - plain.params[k]).abs().max()) for k in plain.params)
    for lane in (*lanes.export(new), private):
        for key, expected in alone.params.items():
            assert (lane.params[key] - expected).abs().max() <= 3 * far  # rounded in other places, and no more
    assert any(not torch.equal(private.params[key], plain.params[key]) for key in plain.params)


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_traced_it_is_bitwise_the_eager_step(policy: str) -> None:
    state, batch = state_of(), batch_of()
    eager = lm.precision(policy)(step)
    expected, metrics = eager(eager.init(state), batch)
    traced = lm.compose(lm.compile(backend="eager"), lm.precision(policy), lm.donate())(step)
    new, found = traced(traced.init(state), batch)
    assert_same((new.params, found), (expected.params, metrics), tolerance=1e-7)


def test_around_and_inside_it_transforms_keep_their_laws() -> None:
    state, batch = state_of(), batch_of()
    expected, _ = lm.precision("bf16")(step)(state, batch)
    again, _ = lm.compose(lm.precision("bf16"), lm.remat("layer"))(step)(state, batch)
    assert_same(again.params, expected.params, exact=True)
    parts, _ = lm.compose(lm.accumulate(3), lm.precision("bf16"))(step)(state, batch)
    assert_same(parts.params, expected.params, tolerance=1e-3)  # each part's gradient is rounded
    blocks = lm.compose(lm.compile(backend="eager", blocks="layer"), lm.precision("bf16"))(step)
    assert_same(blocks(state, batch)[0].params, expected.params, tolerance=1e-7)


def test_a_weight_used_twice_has_the_sum_of_its_gradients_in_float32() -> None:
    """And one that was used without gradients before has one all the same."""
    w = torch.randn(16, 16)

    def twice(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = x @ params["w"]
            small = (x * 2**-9) @ params["w"]  # of which 16 bits beside the other would keep nothing
            return (x @ params["w"]).float().sum() + small.float().sum() + 0 * target.sum()

        return lm.value_and_grad(loss_fn)({"w": w}, batch)[1], {}

    x = torch.randn(16, 16).bfloat16().float()
    found, _ = lm.precision("bf16")(twice)({"w": w}, x)
    one = (x.bfloat16().T @ torch.ones(16, 16).bfloat16()).float()
    torch.testing.assert_close(found["w"], one + one * 2**-9, rtol=1e-6, atol=0)
    assert found["w"].dtype == torch.float32


def test_what_the_user_switches_off_stays_off() -> None:
    seen: list[torch.dtype] = []

    def partly(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any, batch: Any) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                out, _ = state.apply(params, batch["x"])
                seen.append((out @ out.T).dtype)
            seen.append((out @ out.T).dtype)
            return out.square().mean()

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    new, _ = lm.precision("bf16")(partly)(state_of(), batch_of())
    assert seen == [torch.float32, torch.bfloat16]
    assert_same(new.params, partly(state_of(), batch_of())[0].params, exact=True)


def test_autocast_ends_with_the_loss() -> None:
    seen: list[bool] = []

    def watched(state: Any, batch: Any) -> Any:
        new = step(state, batch)
        seen.append(torch.is_autocast_enabled("cpu"))
        return new

    lm.precision("bf16")(watched)(state_of(), batch_of())
    with pytest.raises(ZeroDivisionError):
        lm.precision("bf16")(lambda s, b: lm.value_and_grad(lambda p, b: 1 / 0)(s.params, b))(state_of(), batch_of())
    assert [*seen, torch.is_autocast_enabled("cpu")] == [False, False]


def test_settings_that_cannot_be_are_refused() -> None:
    for kwargs, said in (
        ({"policy": "bf16", "cast": "layers"}, "give 'autocast' or 'model'"),
        ({"policy": "fp64", "cast": "autocast"}, "casts to 16-bit dtypes only"),
        ({"policy": "bf16", "keep": "t"}, "cast='model'"),
    ):
        with pytest.raises(HyperparameterError, match=said):
            lm.precision(**kwargs)  # type: ignore[arg-type]
    wide = state_of(lambda: Centered().double())
    with pytest.raises(HyperparameterError, match=r"does not cast float64.*state = step\.init\(state\)"):
        lm.precision("bf16")(step)(wide, batch_of())
    with pytest.raises(RuntimeError, match="dtype") as caught:
        lm.precision("bf16", cast="model")(step)(state_of(), batch_of())
    assert "Write lm.precision('bf16'), which casts for each operation" in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match="dtype") as caught:
        double = {**batch_of(), "x": batch_of()["x"].double()}
        lm.precision("bf16")(step)(state_of(), double)
    assert "Give the model x.float()" in "".join(caught.value.__notes__)


def test_under_fsdp_matrices_are_cast_before_they_are_gathered() -> None:
    """Autocast would keep what it makes of each whole weight until the backward pass."""
    seen: dict[str, torch.dtype] = {}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer, self.norm = nn.Embedding(5, WIDTH), nn.Linear(WIDTH, 2), nn.LayerNorm(2)

        def forward(self, x: Tensor) -> Tensor:
            seen.update({name: p.dtype for name, p in self.named_parameters()})
            return self.norm(self.layer(x + self.table((x[:, 0] > 0).long())))

    state, batch = state_of(Net), batch_of()
    expected, _ = lm.precision("bf16")(step)(state, batch)
    assert set(seen.values()) == {torch.float32}
    spread = lm.compose(lm.fsdp(), lm.precision("bf16"))
    new, _ = spread(step)(state, batch)
    assert {name for name, dtype in seen.items() if dtype == torch.bfloat16} == {"layer.weight"}
    assert_same(new.params, expected.params, exact=True)

    def without(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any, batch: Any) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return state.apply(params, batch["x"])[0].square().mean()  # type: ignore[no-any-return]

        return state, {"loss": lm.value_and_grad(loss_fn)(state.params, batch)[0]}

    assert_same(spread(without)(state, batch)[1], without(state, batch)[1], exact=True)


class Region(nn.Module):
    """A product in float32 amid autocast, whose backward products are in float32 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x.float() @ self.weight


def test_the_backward_pass_of_a_compiled_block_is_outside_of_autocast() -> None:
    state, batch = state_of(lambda: nn.Sequential(Region(), nn.Linear(WIDTH, 2))), batch_of()
    expected, _ = lm.precision("bf16")(step)(state, batch)
    found, _ = lm.compose(lm.compile(backend="eager", blocks="0"), lm.precision("bf16"))(step)(state, batch)
    assert_same(found.params, expected.params, tolerance=1e-7)
