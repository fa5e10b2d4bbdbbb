"""flops_of against counts by hand, and peak_flops against the names that devices give themselves.

B: rows, T: tokens, D: features, F: hidden features, C: classes.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F_
from torch import nn

import lumen as lm
from lumen.core.flop_formulas import formulas
from lumen.core.flops import count, flops_of, peak_flops, peak_of


def make_step(loss=lambda out: (out**2).mean()):
    def step(state, batch):
        def loss_fn(params, batch):
            out, buffers = state.apply(params, batch)
            return loss(out), lm.Aux(buffers=buffers)

        (value, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads, buffers=aux.buffers), {"loss": value}

    return step


def state_of(net, tx=None):
    return lm.TrainState.create(net, tx or lm.optim.adamw(1e-3))


class Attention(nn.Module):
    def __init__(self, D, heads, fused, dropout=0.0):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.heads, self.fused, self.dropout = heads, fused, dropout

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.fused:
            return F_.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.mark.parametrize(("B", "D", "F", "C"), [(32, 8, 16, 4), (1, 3, 5, 7)])
def test_mlp_is_six_per_row_and_weight_but_for_the_first_layers_input(B, D, F, C):
    net = nn.Sequential(nn.Linear(D, F), nn.Tanh(), nn.Linear(F, C))
    weights = D * F + F * C
    assert flops_of(make_step(), state_of(net), torch.ones(B, D)) == 6 * B * weights - 2 * B * D * F


def test_attention_by_hand_without_a_fused_kernel():
    B, T, D, heads = 2, 6, 16, 2
    linear = 2 * 2 * B * T * D * 3 * D  # forward, and the gradient of the weight
    product = 2 * B * heads * T * T * (D // heads)  # q kᵀ, and a v: one forward and two backward each
    assert (
        flops_of(make_step(), state_of(Attention(D, heads, fused=False)), torch.ones(B, T, D)) == linear + 6 * product
    )


def test_fused_attention_computes_its_scores_again_in_the_backward():
    B, T, D, heads = 2, 6, 16, 2
    linear = 2 * 2 * B * T * D * 3 * D
    product = 2 * B * heads * T * T * (D // heads)
    assert flops_of(make_step(), state_of(Attention(D, heads, fused=True)), torch.ones(B, T, D)) == linear + 7 * product


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "flash_attention_for_cpu"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_with_grouped_heads_counts_for_each_head_of_the_queries(kernel, kv_heads):
    name = f"_scaled_dot_product_{kernel}{'' if 'attention' in kernel else '_attention'}"
    forward, backward = (formulas()[getattr(torch.ops.aten, name + end)] for end in ("", "_backward"))
    B, heads, S, T, D, V = 2, 4, 3, 5, 8, 6
    q, k, v = (torch.Size(shape) for shape in ((B, heads, S, D), (B, kv_heads, T, D), (B, kv_heads, T, V)))
    scores, values = 2 * B * heads * S * T * D, 2 * B * heads * S * T * V
    assert forward(q, k, v) == scores + values
    assert backward(torch.Size((B, heads, S, V)), q, k, v) == 3 * scores + 2 * values


def test_convolution_by_hand():
    # 2·B·out·in·kernel²·positions for the output and for the kernel's gradient
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    assert flops_of(make_step(), state_of(net), torch.ones(2, 3, 8, 8)) == 2 * (2 * 2 * 5 * 3 * 9 * 36)


class Recurrent(nn.Module):
    def __init__(self, kind, D, F):
        super().__init__()
        self.layer = kind(D, F, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind, gates):
    B, T, D, F = 2, 3, 8, 5
    forward = 2 * B * T * gates * F * (D + F)
    count = flops_of(make_step(), state_of(Recurrent(kind, D, F)), torch.ones(B, T, D))
    # Gradients of the layer's input and of the first hidden state are computed by some kernels and not by others.
    assert 3 * forward - 2 * B * T * gates * F * D - 4 * B * gates * F * F <= count <= 3 * forward


a, b, v = torch.ones(8, 16), torch.ones(16, 4), torch.ones(16)
many_a, many_b = torch.ones(3, 8, 16), torch.ones(3, 16, 4)
PRODUCTS = {
    "in place": (lambda: torch.zeros(8, 4).addmm_(a, b), 2 * 8 * 16 * 4),
    "batches": (lambda: torch.zeros(3, 8, 4).baddbmm_(many_a, many_b), 3 * 2 * 8 * 16 * 4),
    "summed batches": (lambda: torch.addbmm(torch.zeros(8, 4), many_a, many_b), 3 * 2 * 8 * 16 * 4),
    "matrix and vector": (lambda: a @ v, 2 * 8 * 16),
    "added": (lambda: torch.addmv(torch.zeros(8), a, v), 2 * 8 * 16),
    "vectors": (lambda: v @ v, 2 * 16),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_torchs_counter_leaves_out(name):
    product, expected = PRODUCTS[name]

    def step(state, batch):
        return state, {"x": product().sum()}

    assert flops_of(step, {}, torch.ones(1)) == expected


def test_groups_and_the_kernels_of_accelerators():
    """By their formulas: these operations do not run here."""
    table = formulas()
    grouped = table[torch.ops.aten._grouped_mm]
    assert grouped(torch.Size((10, 4)), torch.Size((3, 4, 5))) == 2 * 10 * 4 * 5  # rows in groups
    assert grouped(torch.Size((3, 6, 4)), torch.Size((4, 10))) == 2 * 6 * 4 * 10  # columns in groups
    assert grouped(torch.Size((6, 10)), torch.Size((10, 5))) == 2 * 6 * 10 * 5  # gradients of weights
    assert grouped(torch.Size((3, 6, 4)), torch.Size((3, 4, 5))) == 3 * 2 * 6 * 4 * 5
    weights = [torch.Size((20, 8)), torch.Size((20, 5)), torch.Size((20,)), torch.Size((20,))]
    for name, passes in (("_cudnn_rnn", 1), ("_cudnn_rnn_backward", 2), ("miopen_rnn", 1)):
        formula = table[getattr(torch.ops.aten, name)]
        assert formula(torch.Size((3, 2, 8)), weights) == passes * 2 * 3 * 2 * 20 * (8 + 5)


def test_the_update_counts_where_it_multiplies_matrices():
    net, batch = nn.Linear(8, 8, bias=False), torch.ones(4, 8)
    plain = flops_of(make_step(), state_of(net, lm.optim.sgd(0.1)), batch)
    assert plain == 2 * 2 * 4 * 8 * 8
    # Newton-Schulz: five rounds of three products
    assert flops_of(make_step(), state_of(net, lm.optim.muon(0.1)), batch) == plain + 15 * 2 * 8**3


def test_an_optimizer_that_cannot_be_traced_is_left_out():
    net, batch = nn.Linear(8, 4), torch.ones(16, 8)
    opaque_state = lm.optim.from_torch(torch.optim.Adamax, lr=0.1)
    assert flops_of(make_step(), state_of(net, opaque_state), batch) == flops_of(make_step(), state_of(net), batch)


@pytest.mark.parametrize(
    "transform", [lm.accumulate(2), lm.donate(), lm.precision("bf16"), lm.remat(), lm.compile()], ids=repr
)
def test_transforms_do_not_change_the_count(transform):
    step, batch = make_step(), torch.ones(8, 6)
    state = state_of(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)))
    wrapped = transform(step)
    assert flops_of(wrapped, wrapped.init(state), batch) == flops_of(step, state, batch)


def test_second_derivatives_are_counted():
    w = torch.randn(4, 4)

    def step(state, batch):
        def outer(params, batch):
            inner = lm.value_and_grad(lambda p, b: (b @ p["w"]).pow(3).mean())(params, batch)[1]
            return (inner["w"] ** 2).sum()

        loss, grads = lm.value_and_grad(outer)(state["w"], batch)
        return {"w": {"w": state["w"]["w"] - grads["w"]}}, {"loss": loss}

    found, reason = count(step, {"w": {"w": w}}, torch.ones(3, 4))
    assert reason == ""
    assert found > 2 * 2 * 3 * 4 * 4  # more than the inner gradient alone


def test_nothing_is_computed_changed_or_drawn():
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    constant = torch.ones(2)  # a real tensor among the fake ones
    state, batch = state_of(net), {"x": torch.randn(8, 6), "n": 3, "y": np.ones((8, 2), np.float32)}
    before = lm.tree.map(torch.clone, state)
    seen = []

    def step(state, batch):
        def loss_fn(params, batch):
            out, buffers = state.apply(params, batch["x"] + torch.rand(8, 6))
            return ((out - batch["y"] - constant) ** 2).mean() * batch["n"], lm.Aux(buffers=buffers)

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        seen.append(type(loss).__name__)
        return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}

    generator = torch.get_rng_state()
    assert flops_of(step, state, batch) == 6 * 8 * (36 + 12) - 2 * 8 * 36
    assert seen == ["FakeTensor"]
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(a, b) for a, b in zip(lm.tree.leaves(before), lm.tree.leaves(state), strict=True))


def test_a_huge_model_takes_no_memory():
    with torch.device("meta"):
        net = nn.Linear(2**18, 2**18, bias=False)  # 256 GiB
    state = state_of(net, lm.optim.sgd(0.1))
    assert flops_of(make_step(), state, torch.empty(2, 2**18, device="meta")) == 2 * 2 * 2 * 2**36


def test_why_a_step_cannot_be_counted():
    def reads(state, batch):
        return state, {"loss": float(batch.sum())}

    def breaks(state, batch):
        raise ValueError("a step\nof its own " + "x" * 1000)

    found, reason = count(reads, {}, torch.ones(2))
    assert found is None
    assert "reads a tensor's value" in reason
    found, reason = count(breaks, {}, torch.ones(2))
    assert found is None
    assert reason.startswith("ValueError: a step of its own x")
    assert reason.endswith("x…")


# What torch.cuda.get_device_name gives, and the dense figure of the vendor.
NAMES = [
    ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
    ("NVIDIA A100-PCIE-40GB", torch.float64, 19.5e12),
    ("NVIDIA A100 80GB PCIe", torch.float16, 312e12),
    ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
    ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
    ("NVIDIA H100 NVL", torch.bfloat16, 835.5e12),
    ("NVIDIA H200", torch.float8_e4m3fn, 1978.9e12),
    ("NVIDIA H200 NVL", torch.bfloat16, 835.5e12),
    ("NVIDIA B200", torch.bfloat16, 2250e12),
    ("NVIDIA L4", torch.bfloat16, 121e12),
    ("NVIDIA L40S", torch.bfloat16, 362.05e12),
    ("NVIDIA A10G", torch.bfloat16, 70e12),
    ("Tesla T4", torch.float16, 65e12),
    ("Tesla T4", torch.bfloat16, None),
    ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
    ("Tesla V100-PCIE-32GB", torch.float16, 112e12),
    ("Tesla V100S-PCIE-32GB", torch.float16, 130e12),
    ("NVIDIA GeForce RTX 3090", torch.bfloat16, 71e12),
    ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, 80e12),
    ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
    ("AMD Instinct MI250X", torch.bfloat16, 191.5e12),
    ("AMD Instinct MI300X", torch.bfloat16, 1307.4e12),
    ("AMD Instinct MI300X OAM", torch.float16, 1307.4e12),
    ("NVIDIA L40", torch.bfloat16, None),
    ("NVIDIA A10", torch.bfloat16, None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
    ("NVIDIA GeForce RTX 4090 D", torch.bfloat16, None),
    ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", torch.bfloat16, None),
    ("NVIDIA A100-SXM4-80GB", torch.int8, None),
]


@pytest.mark.parametrize(("name", "dtype", "peak"), NAMES)
def test_peaks_by_name(name, dtype, peak):
    assert peak_of(name, dtype) == peak


def test_float32_is_tf32_where_it_is_allowed():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert peak_of("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
        torch.set_float32_matmul_precision("high")
        assert peak_of("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
        assert peak_of("Tesla V100-SXM2-16GB", torch.float32) == 15.7e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_cpu_has_no_peak():
    assert peak_flops("cpu") is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
