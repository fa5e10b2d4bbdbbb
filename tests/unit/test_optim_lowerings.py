"""Laws that every optimizer keeps, in both of its lowerings."""

import importlib
import math
import re

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import lumen as lm
from lumen import optim
from lumen.core import _torch_compat
from lumen.optim import _vmap_fused as by_lane

SHAPES = {"a.weight": (5, 3), "a.bias": (5,), "b.weight": (3, 4)}


def rates(count):
    return 0.01 / (1 + count.double())


def make(lr=0.01):
    """Every optimizer and combinator, by name."""
    tensor = torch.tensor(0.1, dtype=torch.float64)
    matrices = optim.muon(lr, dtype=torch.float64)
    return {
        "adamw": optim.adamw(lr),
        "adamw amsgrad": optim.adamw(lr, amsgrad=True),
        "adamw masked": optim.adamw(lr, weight_decay=0.1, decay_mask="*.weight"),
        "adamw schedule": optim.adamw(rates),
        "adamw tensors": optim.adamw(lr, (tensor + 0.8, tensor + 0.8), tensor / 10, tensor),
        "adamw eps_root": optim.adamw(lr, eps_root=1e-4),
        "adamw wide moments": optim.adamw(lr, state_dtype=torch.float64),
        "adam": optim.adam(lr, weight_decay=0.1),
        "sgd": optim.sgd(lr),
        "sgd dampening": optim.sgd(lr, 0.9, dampening=0.3, weight_decay=0.1, decay_mask=optim.matrices),
        "sgd nesterov": optim.sgd(lr, 0.9, nesterov=True),
        "sgd tensors": optim.sgd(rates, tensor, dampening=tensor, weight_decay=tensor),
        "lion": optim.lion(lr, weight_decay=0.1, decay_mask=re.compile("weight")),
        "lion schedule": optim.lion(rates),
        "rmsprop": optim.rmsprop(lr, momentum=0.9, centered=True, weight_decay=0.1),
        "rmsprop schedule": optim.rmsprop(rates),
        "adagrad": optim.adagrad(lr, lr_decay=0.1, initial_accumulator=0.1),
        "adagrad schedule": optim.adagrad(rates, weight_decay=0.1),
        "adafactor": optim.adafactor(lr, weight_decay=0.1),
        "nadam": optim.nadam(lr, weight_decay=0.1),
        "radam": optim.radam(lr, (0.9, 0.6)),
        "lamb": optim.lamb(lr, weight_decay=0.1, decay_mask="*.weight"),
        "muon": optim.partition({"*.weight": matrices}, optim.adamw(lr)),
        "lookahead": optim.lookahead(optim.adamw(lr), period=3),
        "schedule_free": optim.schedule_free(optim.sgd(lr)),
        "clipped": optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(lr)),
        "traced": optim.chain(optim.trace(0.9), optim.sgd(lr)),
        "plateau": optim.chain(optim.adamw(lr), optim.reduce_on_plateau()),
        "partition": optim.partition({"*.bias": optim.sgd(lr, 0.9)}, optim.adamw(lr)),
        "freeze": optim.freeze("a.*", optim.adamw(lr)),
        "finite": optim.apply_if_finite(optim.adamw(lr), 3),
    }


ALL = list(make())
FUSED = [name for name, tx in make().items() if tx.fused_fn is not None]


def tensors(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in shapes.items()}


def plain(tx):
    return optim.GradientTransformation(tx.init_fn, tx.update_fn)


def run(tx, steps=8, dtype=torch.float32, **kwargs):
    params = tensors(0, dtype)
    opt_state = tx.init(params)
    for step in range(steps):
        params, opt_state = tx.apply(tensors(step + 1, dtype), opt_state, params, **kwargs)
    return params, opt_state


def assert_same(left, right):
    """Equal structures and equal bits."""
    assert lm.tree.structure(left) == lm.tree.structure(right)
    for path, a, b in zip(lm.tree.paths(left), lm.tree.leaves(left), lm.tree.leaves(right), strict=True):
        assert a.dtype is b.dtype, path
        assert torch.equal(a, b), path


def assert_close(left, right, tolerance):
    assert lm.tree.structure(left) == lm.tree.structure(right)
    for a, b in zip(lm.tree.leaves(left), lm.tree.leaves(right), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", FUSED)
def test_both_lowerings_give_the_same_numbers(name, dtype, tolerance):
    tx = make()[name]
    assert_close(run(tx, dtype=dtype), run(plain(tx), dtype=dtype), tolerance)


LINKS = {"traced": 2, "clipped": 2}  # of a chain, which hand on gradients in their dtype
DTYPES = {"half": torch.float16, "brain": torch.bfloat16, "single": torch.float32, "double": torch.float64}


def leaf_of(shape, dtype, generator):
    """Entries of size 0.1 and more: what a rule takes the sign of, or divides by, is no matter of rounding."""
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    return (x + 0.1 * x.sign()).to(dtype)


def leaves_of(seed, sizes):
    """A vector of each size and a matrix, in each dtype."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"v{n}.{{}}.bias": (n,) for n in sizes} | {"a.{}.weight": (5, 3)}
    return {
        name.format(key): leaf_of(shape, dtype, generator)
        for key, dtype in DTYPES.items()
        for name, shape in shapes.items()
    }


def strided_leaves(seed):
    """Transposed, sliced and channels-last leaves in each dtype."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {}
    for key, dtype in DTYPES.items():
        leaves[f"a.{key}.weight"] = leaf_of((17, 15), dtype, generator).t()
        leaves[f"b.{key}.weight"] = leaf_of((4, 34), dtype, generator)[:, ::2]
        leaves[f"c.{key}.bias"] = leaf_of((2, 3, 4, 5), dtype, generator).to(memory_format=torch.channels_last)
    return leaves


def spaced(leaf):
    """The same entries with gaps between them."""
    return torch.stack([leaf, leaf], -1)[..., 0]


def rounded_once(tx, params, all_grads):
    """The params that `tx` leads to in float64, rounded to their dtypes after each step."""
    exact = {name: p.double() for name, p in params.items()}
    opt_state = tx.init(exact)
    for grads in all_grads:
        updates, opt_state = tx.update_fn({name: g.double() for name, g in grads.items()}, opt_state, exact)
        exact = {name: (p + updates[name]).to(params[name].dtype).double() for name, p in exact.items()}
    return exact


def assert_rounded_once(found, exact, times=1):
    """`times` is in how many places 16-bit numbers are rounded."""
    for name, p in found.items():
        eps = torch.finfo(p.dtype).eps
        bound = (
            times * eps * exact[name].abs().clamp(min=0.05)
            if p.dtype.itemsize == 2
            else 32 * eps * (1 + exact[name].abs())
        )
        wrong = (p.double() - exact[name]).abs() > bound
        assert not wrong.any(), (name, int(wrong.sum()), (p.double() - exact[name]).abs().max().item())


def train(tx, params, all_grads):
    opt_state = tx.init(params)
    for grads in all_grads:
        params, opt_state = tx.apply(grads, opt_state, params)
    return params


@pytest.mark.parametrize("name", ALL)
def test_every_lowering_is_float64_rounded_once(name):
    """Fused, foreach and plain; of any dtype, size and layout."""
    tx = make()[name]
    sizes = (1, 15, 16, 17, 64, 1000, 4097)
    cases = [
        (leaves_of(0, sizes), [{key: spaced(g) for key, g in leaves_of(s + 1, sizes).items()} for s in range(3)]),
        (strided_leaves(0), [lm.tree.map(torch.Tensor.contiguous, strided_leaves(s + 1)) for s in range(3)]),
    ]
    for params, grads in cases:
        exact = rounded_once(tx, params, grads)
        for lowering in (tx, plain(tx)):
            assert_rounded_once(train(lowering, params, grads), exact, LINKS.get(name, 1))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", [name for name in ALL if "schedule" not in name or name == "schedule_free"])
def test_every_lane_is_float64_rounded_once(name, large, monkeypatch):
    monkeypatch.setattr(by_lane, "_MIN_LANE_SIZE", 0 if large else 2**60)
    tx = make()[name]
    lanes = [leaves_of(seed, (17, 64)) for seed in (0, 10)]
    grads = [[leaves_of(seed + s, (17, 64)) for s in (1, 2, 3)] for seed in (0, 10)]
    stacked, *all_grads = [
        {key: torch.stack([lane[key] for lane in each], -1) for key in lanes[0]}
        for each in (lanes, *zip(*grads, strict=True))
    ]
    together = torch.func.vmap(lambda p, gs: train(tx, p, gs), in_dims=-1)(stacked, all_grads)
    for i, lane in enumerate(lanes):
        assert_rounded_once(
            {key: p[i] for key, p in together.items()}, rounded_once(tx, lane, grads[i]), LINKS.get(name, 1)
        )


@pytest.mark.parametrize("name", ["adamw", "sgd nesterov", "lion", "rmsprop", "adagrad", "schedule_free"])
def test_a_compiled_update_is_float64_rounded_once(name):
    tx = make()[name]
    params, *grads = [leaves_of(s, (17,)) for s in range(3)]
    state = lm.TrainState.create(torch.nn.Linear(1, 1), tx).replace(params=params, opt_state=tx.init(params))
    step = lm.compile(backend="eager")(lambda state, grads: (state.apply_gradients(grads), {}))
    for each in grads:
        state, _ = step(state, each)
    assert_rounded_once(state.params, rounded_once(tx, params, grads))


@pytest.mark.parametrize(
    ("kernel", "module", "name"),
    [
        ("_fused_sgd_", "sgd", "sgd nesterov"),
        ("_fused_adamw_", "adam", "adamw"),
        ("_fused_adam_", "adam", "adam"),
        ("_fused_adagrad_", "adaptive", "adagrad"),
    ],
)
def test_a_fused_kernel_that_is_wrong_is_not_used(kernel, module, name, monkeypatch):
    right = run(plain(make()[name]), 2)
    # As torch's of 16-bit SGD, which leaves params alone.
    monkeypatch.setattr(_torch_compat, kernel.removeprefix("_"), lambda *args, **kwargs: None)
    for trial in trials(importlib.import_module(f"lumen.optim._{module}")):
        monkeypatch.setattr(trial, "_results", {})
    assert_same(run(make()[name], 2), right)


def test_a_fused_kernel_that_this_torch_lacks_is_not_used(monkeypatch):
    def absent(*args, **kwargs):
        raise NotImplementedError("Could not run 'aten::_fused_adagrad_' with arguments from the 'CUDA' backend")

    right = run(plain(make()["adagrad"]), 2)
    monkeypatch.setattr(_torch_compat, "fused_adagrad_", absent)
    for trial in trials(importlib.import_module("lumen.optim._adaptive")):
        monkeypatch.setattr(trial, "_results", {})
    assert_same(run(make()["adagrad"], 2), right)


def trials(module):
    return module._TRIALS.values() if hasattr(module, "_TRIALS") else [module._TRIAL]


@pytest.mark.parametrize("name", ALL)
def test_what_is_averaged_is_kept_in_float32(name):
    """Of 16-bit params; of float64 params in float64."""
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        opt_state = make()[name].init(tensors(0, dtype))
        if name != "adamw wide moments":
            assert {leaf.dtype for leaf in lm.tree.tensors(opt_state) if leaf.dim()} <= {wide}


@pytest.mark.parametrize("name", ALL)
def test_donation_changes_where_and_not_what(name):
    tx = make()[name]
    params = tensors(0)
    opt_state = tx.init(params)
    for step in range(4):
        grads = tensors(step + 1)
        before = lm.tree.map(torch.clone, (params, opt_state, grads))
        kept = tx.apply(grads, opt_state, params)
        assert_same((params, opt_state, grads), before)
        given = lm.tree.map(torch.clone, params)
        memory = [p.data_ptr() for p in given.values()]
        donated = tx.apply(grads, lm.tree.map(torch.clone, opt_state), given, donate=True)
        assert donated[0] is given
        assert [p.data_ptr() for p in given.values()] == memory
        assert_same(donated, kept)
        params, opt_state = kept


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("lower", [lambda tx: tx, plain], ids=["fused", "plain"])
@pytest.mark.parametrize("name", ALL)
def test_skip_changes_nothing(name, lower, donate):
    tx = lower(make()[name])
    params, opt_state = run(tx, 3)
    params["a.bias"][0] = -0.0
    bad = tensors(9)
    bad["a.weight"][0, 0] = math.nan
    before = lm.tree.map(torch.clone, (params, opt_state))
    for grads in (bad, tensors(9)):
        params, opt_state = tx.apply(grads, opt_state, params, skip=torch.tensor(True), donate=donate)
        assert_same((params, opt_state), before)
        assert math.copysign(1, params["a.bias"][0].item()) == -1
    assert_same(
        tx.apply(tensors(9), opt_state, params, skip=torch.tensor(False)),
        tx.apply(tensors(9), opt_state, params),
    )


@pytest.mark.parametrize("name", ALL)
def test_state_keeps_its_structure_dtypes_and_shapes(name):
    tx = make()[name]
    start = tx.init(tensors(0))
    for lowering in (tx, plain(tx)):
        _, opt_state = run(lowering, 2)
        assert lm.tree.structure(opt_state) == lm.tree.structure(start)
        for a, b in zip(lm.tree.leaves(opt_state), lm.tree.leaves(start), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)


@pytest.mark.parametrize("name", ALL)
def test_state_owns_its_memory(name):
    """So that it can be donated with the params, leaf by leaf."""
    params = tensors(0)
    lr = torch.tensor(0.01, dtype=torch.float64)
    opt_state = make(lr)[name].init(params)
    leaves = [*lm.tree.tensors(opt_state), *params.values(), lr]
    assert len({leaf.data_ptr() for leaf in leaves}) == len(leaves)
    assert all(isinstance(leaf, torch.Tensor) for leaf in lm.tree.leaves(opt_state))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", [name for name in ALL if "schedule" not in name or name == "schedule_free"])
def test_lanes_of_vmap_are_their_own_runs(name, large, monkeypatch):
    """Params and learning rates differ by lane; float64 to 1e-10. Large lanes are updated one by one, by kernels."""
    monkeypatch.setattr(by_lane, "_MIN_LANE_SIZE", 0 if large else 2**60)
    lrs = torch.tensor([0.003, 0.01, 0.03], dtype=torch.float64)
    lanes = [{key: p * (1 + i) for key, p in tensors(0, torch.float64).items()} for i in range(3)]
    stacked = lm.tree.map(lambda *leaves: torch.stack(leaves), *lanes)
    all_grads = [tensors(step + 1, torch.float64) for step in range(4)]

    def train(params, lr):
        tx = make(lr)[name]
        opt_state = tx.init(params)
        for grads in all_grads:
            params, opt_state = tx.apply(grads, opt_state, params)
        return params

    together = torch.func.vmap(train)(stacked, lrs)
    for i, lane in enumerate(lanes):
        alone = train(lane, lrs[i])
        assert_close({key: value[i] for key, value in together.items()}, alone, 1e-10)


@pytest.mark.parametrize("name", ALL)
def test_traced_update_is_the_plain_lowering(name):
    tx = make()[name]
    params, opt_state = run(tx, 2)
    traced = make_fx(lambda *args: tx.apply(*args), tracing_mode="fake")(tensors(7), opt_state, params)
    assert not any("fused" in str(node.target) or "foreach" in str(node.target) for node in traced.graph.nodes)
    assert_same(traced(tensors(8), opt_state, params), plain(tx).apply(tensors(8), opt_state, params))


@pytest.mark.parametrize("name", ["adamw", "sgd dampening", "lion", "adafactor", "muon", "lookahead", "plateau"])
def test_params_may_be_any_tree(name):
    flat = tensors(0)
    nested = {"a": {"weight": flat["a.weight"], "bias": flat["a.bias"]}, "b": {"weight": flat["b.weight"]}}
    grads = tensors(1)
    nested_grads = {"a": {"bias": grads["a.bias"], "weight": grads["a.weight"]}, "b": {"weight": grads["b.weight"]}}
    tx = make()[name]
    expected, _ = tx.apply(grads, tx.init(flat), flat)
    for lowering in (tx, plain(tx)):
        found, _ = lowering.apply(nested_grads, tx.init(nested), nested)
        assert_close(list(lm.tree.leaves(found)), list(expected.values()), 1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd nesterov", "lion schedule", "adafactor", "nadam", "lookahead"])
def test_params_may_be_one_tensor(name):
    tx = make()[name]
    params = torch.randn(3)
    for lowering in (tx, plain(tx)):
        found, _ = lowering.apply(torch.ones(3), lowering.init(params), params)
        assert found.shape == params.shape
        assert not torch.equal(found, params)


@pytest.mark.parametrize("name", [name for name in FUSED if name != "muon"])
def test_grads_are_matched_by_name_not_by_position(name):
    tx = make()[name]
    params, grads = tensors(0), tensors(1)
    shuffled = {key: grads[key] for key in reversed(grads)}
    for lowering in (tx, plain(tx)):
        assert_same(
            lowering.apply(shuffled, lowering.init(params), params)[0],
            lowering.apply(grads, lowering.init(params), params)[0],
        )


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("adamw wide moments", "muon")])
def test_params_of_several_dtypes(name):
    """Each leaf is updated as if the others were not there."""
    tx = make()[name]
    if name in ("clipped", "partition", "freeze", "finite"):
        return
    dtypes = {"a.weight": torch.float64, "a.bias": torch.float32, "b.weight": torch.bfloat16}
    params = {key: p.to(dtypes[key]) for key, p in tensors(0).items()}
    grads = {key: g.to(dtypes[key]) for key, g in tensors(1).items()}
    found, opt_state = tx.apply(grads, tx.init(params), params)
    expected, _ = plain(tx).apply(grads, tx.init(params), params)
    for key, dtype in dtypes.items():
        assert found[key].dtype is dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(found[key], expected[key], rtol=tolerance, atol=tolerance)


def test_scalar_params_keep_their_dtype():
    """A 0-d leaf would be promoted by the float64 scalars of the state."""
    params, grads = {"s": torch.tensor(1.0)}, {"s": torch.tensor(0.5)}
    for name in ("adamw", "sgd nesterov", "lion", "rmsprop", "adagrad", "adafactor", "nadam", "radam"):
        tx = make()[name] if name != "lion" else optim.lion(0.1)
        updates, opt_state = tx.update_fn(grads, tx.init(params), params)
        assert updates["s"].dtype is torch.float32, name
        assert all(leaf.dtype is not torch.float16 for leaf in lm.tree.leaves(opt_state))


def test_moments_in_another_dtype():
    params = {key: p.bfloat16() for key, p in tensors(0).items()}
    grads = {key: g.bfloat16() for key, g in tensors(1).items()}
    for dtype in (torch.bfloat16, torch.float64):
        tx = optim.adamw(0.01, state_dtype=dtype)
        for lowering in (tx, plain(tx)):
            new, opt_state = lowering.apply(grads, lowering.init(params), params)
            assert {leaf.dtype for leaf in lm.tree.leaves((opt_state.mu, opt_state.nu))} == {dtype}
            assert {leaf.dtype for leaf in new.values()} == {torch.bfloat16}


def test_bias_correction_keeps_its_digits():
    """`1 - 0.9999999**t` by subtraction has lost half of them in float32, and seven even in float64."""
    from lumen.optim._numerics import one_minus_power

    beta, t = 1 - 1e-7, 3
    exact = 3e-7 - 3e-14 + 1e-21  # 1 - (1 - x)^3, written out
    found = one_minus_power(beta, torch.tensor(t)).item()
    assert found == pytest.approx(exact, rel=1e-8)
    assert one_minus_power(0.0, torch.tensor(t)).item() == 1.0
    by_tensor = one_minus_power(torch.tensor(0.9, dtype=torch.float64), torch.tensor(t)).item()
    assert by_tensor == pytest.approx(1 - 0.9**3, rel=1e-14)
