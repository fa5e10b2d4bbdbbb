"""Eight bits: what `lm.quantize` keeps of a weight, and what `lm.quantized_matmul` makes of a step, by torchao."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lumen as lm
from lumen.transforms import _quantized_matmul

from .models import C, Job, assert_same, jobs, train

KINDS = ("int8", "fp8")
WIDE = 32


class Block(nn.Module):
    """A residual layer whose output comes transposed and averaged: gradients that are no rows of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDE, 2 * WIDE), nn.Linear(2 * WIDE, WIDE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x.transpose(0, 1)).relu()).transpose(0, 1)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, WIDE), Block(), Block(), nn.Flatten(), nn.Linear(3 * WIDE, C))


def fresh(net: nn.Module | None = None) -> lm.TrainState:
    return lm.TrainState.create(network() if net is None else net, lm.optim.adam(1e-2))


def data(rows: int = 48) -> dict[str, Tensor]:
    x = torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(1))
    return {"x": x, "y": x[:, 0, :C].argmax(-1)}


def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    def loss_fn(params: Any, batch: Any) -> lm.Mean:
        out, _ = state.apply(params, batch["x"])
        return lm.Mean.of(F.cross_entropy(out, batch["y"], reduction="none"))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def evaluate(state: Any, batch: Any) -> dict[str, Any]:
    out, _ = state.apply(state.params, batch["x"])
    return {"loss": lm.Mean.of(F.cross_entropy(out, batch["y"], reduction="none"))}


def outputs(state: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = state.apply(state.params, x)[0]
        return out


# ---------------------------------------------------------------------------------------------- quantize


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(2, 40)),
    scale=st.sampled_from([1e-25, 1e-6, 1.0, 300.0]),
    decades=st.sampled_from([0, 8]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_each_weight_is_within_the_bound_that_is_promised(
    shape: tuple[int, int], scale: float, decades: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    """Also for rows of zeros, for tiny rows, and for tiny weights beside large ones."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=random) * scale * 10 ** (-decades * torch.rand(*shape, generator=random))
    weight = (weight * (torch.rand(shape[0], 1, generator=random) > 0.2)).to(dtype)
    net = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    net.weight.data = weight
    small = lm.quantize(fresh(net), kind)
    kept = outputs(small, torch.eye(shape[1], dtype=dtype)).T.double()
    largest = weight.double().abs().amax(1, keepdim=True)
    bound = largest / 254 if kind == "int8" else torch.maximum(weight.double().abs() / 16, largest / 450_000)
    # What comes out has been rounded to the dtype too.
    limits = torch.finfo(dtype)
    assert ((kept - weight.double()).abs() <= bound + limits.eps * (2 * kept.abs() + limits.tiny)).all()


def test_a_weight_without_a_scale_is_named() -> None:
    net = nn.Linear(4, 3)
    net.weight.data[1, 2] = torch.inf
    with pytest.raises(lm.errors.ParamsError, match="'weight' has NaN or infinite entries"):
        lm.quantize(fresh(net))


@settings(max_examples=15, deadline=None)
@given(job=jobs(), kind=st.sampled_from(KINDS))
def test_the_model_is_that_with_rounded_weights(job: Job, kind: str) -> None:
    """Every kind of model of the laws; what cannot be quantized, a tied weight say, stays as it is."""
    state = job.state().eval()
    if job.model == "tied":
        with pytest.raises(lm.LumenError, match="'out' shares its weight with another layer"):
            lm.quantize(state, kind)
        return
    small = lm.quantize(state, kind)
    module = lm.bridges.module(small)
    rounded = {
        name: module.get_submodule(name.removesuffix("weight").rstrip(".")).weight.dequantize().double()
        for name in state.params
        if name not in small.params
    }
    assert rounded
    loss_fn = job.loss_fn
    found, expected = (
        loss_fn(s)(s.params, job.batch())[0] for s in (small, state.replace(params={**state.params, **rounded}))
    )
    assert_same(found, expected, tolerance=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quarter_of_the_memory_and_nearly_the_same_outputs(kind: str) -> None:
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    state = fresh(net)
    small = lm.quantize(state, kind)

    def size(s: Any) -> int:
        return sum(t.nbytes for t in [*s.params.values(), *s.buffers.values()])

    assert size(small) < 0.27 * size(state)
    assert not lm.tree.tensors(small.opt_state)
    x = torch.randn(20, 256)
    error, whole = (outputs(small, x) - outputs(state, x)).norm(), outputs(state, x).norm()
    assert error < (0.01 if kind == "int8" else 0.05) * whole
    assert_same(dict(state.params), dict(lm.pure(net).params), exact=True)


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_wherever_a_state_goes(kind: str, tmp_path: Path) -> None:
    state = fresh()
    small, batch = lm.quantize(state, kind), data()
    expected = outputs(small, batch["x"])
    found = lm.compile(backend="eager")(lambda s, b: (s, {"out": lm.Last(s.apply(s.params, b["x"])[0])}))(small, batch)
    assert_same(found[1]["out"].value, expected, tolerance=1e-6)
    plain = lm.evaluate(evaluate, small, [batch])["loss"]
    for policy, near in (("bf16", 0.05), ("fp64", 1e-5)):
        assert abs(lm.evaluate(evaluate, small, [batch], (lm.precision(policy),))["loss"] - plain) < near
    runner = lm.Runner(step, progress=False)
    assert runner.predict(lambda s, b: s.apply(s.params, b["x"])[0], small, [batch]).allclose(expected, atol=1e-6)
    lm.checkpoint.save(tmp_path / "small", small)
    again = lm.checkpoint.restore(tmp_path / "small", lm.quantize(fresh(), kind))
    assert torch.equal(outputs(again, batch["x"]), expected)


def test_layers_by_name_by_predicate_and_beside_adapters() -> None:
    def gone(state: lm.TrainState, **options: Any) -> set[str]:
        return state.params.keys() - lm.quantize(state, **options).params.keys()

    state = fresh()
    assert gone(state, layers="1.*") == {"1.up.weight", "1.down.weight"}
    assert gone(state, layers=["*.up", "4"]) == {"1.up.weight", "2.up.weight", "4.weight"}
    assert gone(state, layers=lambda name, module: module.in_features > 50) == {
        *("1.down.weight", "2.down.weight", "4.weight")
    }
    with pytest.raises(lm.LumenError, match="matches none of the 6 linear layer names"):
        lm.quantize(state, layers="blocks.*")
    adapted = lm.bridges.lora.adapt(network(), targets="1.up", rank=2)
    small = lm.quantize(fresh(adapted), layers="*.down")  # a frozen weight, which is a buffer
    assert small.buffers["1.down.weight_qdata"].dtype == torch.int8
    tx = lm.optim.adam(1e-2)
    small = small.replace(tx=tx, opt_state=tx.init(small.params))
    losses = train(step, small, [data()] * 2)[1], train(step, small, [data()] * 30)[1]
    assert losses[1]["loss"] < losses[0]["loss"]


def test_what_cannot_be_quantized_is_named() -> None:
    state = fresh()
    with pytest.raises(lm.LumenError, match="'int3'.*'int8', 'fp8'"):
        lm.quantize(state, "int3")
    with pytest.raises(lm.LumenError, match=r"no nn\.Linear"):
        lm.quantize(fresh(nn.Conv1d(1, 1, 1)))
    attention = nn.TransformerEncoderLayer(8, 2, 8)
    assert "self_attn.out_proj.weight" in lm.quantize(fresh(attention)).params
    with pytest.raises(lm.LumenError, match="'self_attn.out_proj' belongs to an nn.MultiheadAttention"):
        lm.quantize(fresh(attention), layers="*.out_proj")
    lanes = lm.ensemble(2)(step).init(state)
    with pytest.raises(lm.LumenError, match=r"step\.export"):
        lm.quantize(lanes)
    small = lm.quantize(state)
    with pytest.raises(lm.LumenError, match=r"tx\.init\(state\.params\)"):
        small.apply_gradients(dict(small.params))


# --------------------------------------------------------------------------------------------- quantized

# On a machine with a GPU torchao's int8 products run there alone.
CPU_ALONE = pytest.mark.skipif(torch.cuda.is_available(), reason="int8 products on the CPU need a machine without GPU")

TRAINING = {
    "int8": lm.quantized_matmul("int8"),
    "fp8": lm.quantized_matmul("fp8", layers=["1.*", "2.*"], emulate=True),
    "qat": lm.quantized_matmul("qat"),
}
# How far an update of the params may be from that in float32, in its norm. Adam would hide the gradient's size.
FAR = {"int8": 0.03, "fp8": 0.12, "qat": 0.03}


def moved(stack: Any, batch: Any, **options: Any) -> Tensor:
    """How the params move in one step of plain gradient descent."""
    state = lm.TrainState.create(network(), lm.optim.sgd(1.0))
    made = stack(step)
    new, _ = made(made.init(state), batch)
    return torch.cat([(new.params[name] - p).flatten() for name, p in state.params.items()])


KINDS_OF_TRAINING = [pytest.param("int8", marks=CPU_ALONE), "fp8", "qat"]


@pytest.mark.parametrize("kind", KINDS_OF_TRAINING)
def test_an_update_differs_by_rounding_alone(kind: str) -> None:
    expected, found = moved(lm.compose(), data()), moved(TRAINING[kind], data())
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < FAR[kind]


@pytest.mark.parametrize("kind", KINDS_OF_TRAINING)
def test_it_still_learns(kind: str) -> None:
    made = TRAINING[kind](step)
    state, _ = train(made, made.init(fresh()), [data()] * 40)
    assert lm.evaluate(evaluate, fresh(), [data()])["loss"] > 0.9
    assert lm.evaluate(evaluate, state, [data()])["loss"] < 0.1
    assert {p.dtype for p in state.params.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS_OF_TRAINING)
@pytest.mark.parametrize("other", ["accumulate", "compile", "remat", "precision", "donate"])
def test_it_composes(kind: str, other: str) -> None:
    it = TRAINING[kind]
    stack = {
        "accumulate": (lm.accumulate(3), it),
        "compile": (lm.compile(backend="eager"), it),
        "remat": (it, lm.remat("[12]")),
        "precision": (lm.precision("bf16"), it),
        "donate": (it, lm.donate()),
    }[other]
    alone, both = moved(it, data()), moved(lm.compose(*stack), data())
    # Parts of a batch, fused arithmetic and bfloat16 round at other places; remat and donate change nothing.
    near = {"remat": 0.0, "donate": 0.0, "compile": 0.01, "accumulate": 0.05, "precision": 0.05}[other]
    assert float((both - alone).norm()) <= near * float(alone.norm())


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_aware_training_sees_the_model_that_quantize_makes(scale: float) -> None:
    state = fresh()
    state = state.replace(params={name: p * (scale if p.dim() > 1 else 0) for name, p in state.params.items()})
    seen = lm.quantized_matmul("qat")(lambda s, b: (s, {"out": lm.Last(s.apply(s.params, b["x"])[0])}))(state, data())[
        1
    ]
    plain = outputs(state, data()["x"])
    unit = plain.abs().max()
    assert_same(seen["out"].value / unit, outputs(lm.quantize(state), data()["x"]) / unit, tolerance=1e-5)
    assert not torch.allclose(seen["out"].value / unit, plain / unit, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "device", "capability", "said"),
    [
        ("fp8", "cuda", (8, 0), r"capability 8\.9 or above, but the params are on a GPU of compute capability 8\.0"),
        ("fp8", "cuda", (8, 9), None),
        ("fp8", "cuda", (12, 0), None),
        ("fp8", "mps", None, r"on mps\. Write lm\.quantized_matmul\('int8'\)"),
        (
            "int8",
            "mps",
            None,
            r"on CUDA devices, but the params are on mps\. Write lm\.quantized_matmul\('qat'\)",
        ),
        pytest.param("int8", "cuda", (9, 0), "needs Triton", marks=CPU_ALONE),
        ("qat", "mps", None, None),
    ],
)
def test_devices_are_refused_by_name(
    kind: str, device: str, capability: Any, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_quantized_matmul, "capability", lambda device: capability)
    if said is None:
        _quantized_matmul.check_device(kind, torch.device(device))
        return
    with pytest.raises(lm.LumenError, match=said):
        _quantized_matmul.check_device(kind, torch.device(device))
    _quantized_matmul.check_device("fp8", torch.device(device), emulate=True)


def test_what_cannot_be_trained_so_is_named() -> None:
    state, batch = fresh(), data()
    with pytest.raises(lm.LumenError, match=r"capability 8.9 or above.*on cpu.*lm.quantized_matmul\('int8'\)"):
        lm.quantized_matmul("fp8")(step)(state, batch)
    with pytest.raises(lm.LumenError, match="'4' is 96 by 3, but both sizes must be multiples of 16"):
        lm.quantized_matmul("fp8", layers="4", emulate=True)(step)(state, batch)
    with pytest.raises(lm.LumenError, match="'int4'.*'int8', 'fp8', 'qat'"):
        lm.quantized_matmul("int4")
    with pytest.raises(lm.LumenError, match="only fp8 needs emulating"):
        lm.quantized_matmul("qat", emulate=True)
    private = lm.dp_sgd(clip=1.0, noise=0.0)
    with pytest.raises(lm.LumenError, match="Leave lm.quantized_matmul out"):
        stack = lm.compose(private, lm.quantized_matmul("qat"))(step)
        stack(stack.init(state), batch)
    with pytest.raises(lm.LumenError, match=r"lm.precision\('bf16'\)\(lm.quantized_matmul\('int8'\)\(step\)\)"):
        lm.quantized_matmul("int8")(lm.precision("bf16")(step))
