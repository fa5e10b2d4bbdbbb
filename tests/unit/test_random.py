import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import lumen as lm
from lumen import random as lrandom
from lumen.random._draws import erfinv
from lumen.random._threefry import threefry

KEY = lrandom.key(1729)
# Random123, tests/kat_vectors, threefry2x32-20: counter, key, expected.
KNOWN_ANSWERS = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]
SAMPLERS = {
    "split": lambda k: lrandom.split(k, 3),
    "fold_in": lambda k: lrandom.fold_in(k, 5),
    "bits": lambda k: lrandom.bits(k, (7, 3)),
    "uniform": lambda k: lrandom.uniform(k, (13,), low=-1.0, high=2.0),
    "uniform_half": lambda k: lrandom.uniform(k, (13,), torch.float16),
    "normal": lambda k: lrandom.normal(k, (13,)),
    "normal_scalar": lambda k: lrandom.normal(k),
    "normal_double": lambda k: lrandom.normal(k, (5, 3), torch.float64),
    "bernoulli": lambda k: lrandom.bernoulli(
        k, torch.linspace(0.2, 0.7, 2, dtype=torch.float32, device=k.device), (3, 2)
    ),
    "randint": lambda k: lrandom.randint(k, (9,), -5, 2**40),
    "permutation": lambda k: lrandom.permutation(k, 40),
}
seeds = st.integers(-(2**63), 2**63 - 1)
sampler = pytest.mark.parametrize("draw", SAMPLERS.values(), ids=SAMPLERS)


# ------------------------------------------------------------------------------------- the hash


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_hash_gives_the_published_answers(counter, key, expected):
    assert threefry(*key, *counter) == expected
    words = map(torch.tensor, (*key, *counter))
    assert tuple(map(int, threefry(*words))) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_fold_in_gives_the_published_answers(counter, key, expected):
    data = counter[0] << 32 | counter[1]
    data -= 2**64 if data >= 2**63 else 0
    assert tuple(lrandom.fold_in(torch.tensor(key), data).tolist()) == expected


# ------------------------------------------------------------------------------------- JAX


@pytest.fixture(scope="module")
def jax():
    jax = pytest.importorskip("jax")
    if not jax.config.jax_threefry_partitionable:
        pytest.skip("jax_threefry_partitionable is off")
    return jax


def test_keys_equal_jax(jax):
    for seed in (0, 7, 2**31, 2**32 - 1):
        theirs, ours = jax.random.key(seed), lrandom.key(seed)
        data = jax.random.key_data
        np.testing.assert_array_equal(ours, data(theirs))
        np.testing.assert_array_equal(lrandom.split(ours), data(jax.random.split(theirs)))
        np.testing.assert_array_equal(lrandom.split(ours, 40), data(jax.random.split(theirs, 40)))
        for number in (0, 3, 2**32 - 1):
            folded = jax.random.fold_in(theirs, np.uint32(number))
            np.testing.assert_array_equal(lrandom.fold_in(ours, number), data(folded))


def test_numbers_equal_jax(jax):
    theirs = jax.random.key(1729)
    for shape in ((), (5,), (3, 4, 5)):
        np.testing.assert_array_equal(lrandom.bits(KEY, shape), jax.random.bits(theirs, shape))
        np.testing.assert_array_equal(lrandom.uniform(KEY, shape), jax.random.uniform(theirs, shape))
        expected = jax.random.bernoulli(theirs, 0.3, shape)
        np.testing.assert_array_equal(lrandom.bernoulli(KEY, 0.3, shape), expected)
    expected = jax.random.uniform(theirs, (1000,), minval=-1.5, maxval=4.0)
    np.testing.assert_allclose(lrandom.uniform(KEY, (1000,), low=-1.5, high=4.0), expected, atol=1e-6)
    for n in (0, 1, 2, 1000, 5000):
        np.testing.assert_array_equal(lrandom.permutation(KEY, n), jax.random.permutation(theirs, n))


def test_normal_equals_jax_at_every_point(jax):
    points = torch.arange(2**23).float().mul_(2.0**-22).add_(2.0**-24 - 1)
    expected = np.asarray(jax.scipy.special.erfinv(points.numpy()))
    np.testing.assert_allclose(erfinv(points) * math.sqrt(2), expected * math.sqrt(2), rtol=0, atol=1e-6)
    expected = jax.random.normal(jax.random.key(1729), (100_000,))
    np.testing.assert_allclose(lrandom.normal(KEY, (100_000,)), expected, rtol=0, atol=1e-6)


def test_double_precision_equals_jax(jax):
    with jax.enable_x64(True):
        for seed in (-1, 2**40 + 3):
            theirs, ours = jax.random.key(seed), lrandom.key(seed)
            np.testing.assert_array_equal(ours, jax.random.key_data(theirs))
            expected = np.asarray(jax.random.uniform(theirs, (100,), dtype="float64"))
            np.testing.assert_array_equal(lrandom.uniform(ours, (100,), torch.float64), expected)


# ------------------------------------------------------------------------------------- purity and transforms


@sampler
def test_no_global_generator_is_read_or_moved(draw):
    torch.manual_seed(0)
    before, key = torch.get_rng_state(), KEY.clone()
    first = draw(key)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw(key), first)
    assert torch.equal(key, KEY)


@sampler
def test_each_vmap_lane_equals_its_own_run(draw):
    keys = lrandom.split(KEY, 17)
    alone = torch.stack([draw(key) for key in keys])
    assert torch.equal(vmap(draw)(keys), alone)
    assert torch.equal(vmap(draw, in_dims=1)(keys.T), alone)
    nested = vmap(vmap(draw))(keys[:16].reshape(4, 4, 2))
    assert torch.equal(nested.flatten(0, 1), alone[:16])


def test_vmap_over_seeds_and_data():
    numbers = torch.arange(-2, 3)
    each = torch.stack([lrandom.key(int(number)) for number in numbers])
    assert torch.equal(vmap(lrandom.key)(numbers), each)
    each = torch.stack([lrandom.fold_in(KEY, int(number)) for number in numbers])
    assert torch.equal(vmap(lrandom.fold_in, in_dims=(None, 0))(KEY, numbers), each)


@sampler
def test_compiled_whole_gives_the_same(draw):
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for key in (KEY, lrandom.key(3)):
        assert torch.equal(compiled(key), draw(key))


def test_vmap_inside_a_compiled_function():
    def lanes(key, data):
        keys = vmap(lrandom.fold_in, in_dims=(None, 0))(key, data)
        pairs = vmap(lambda key: lrandom.bits(key, (5,)), in_dims=1)(keys.T)
        return pairs, vmap(vmap(lambda key: lrandom.bits(key, (2, 3))))(keys.reshape(2, 2, 2))

    data = torch.arange(4)
    compiled = torch.compile(lanes, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(KEY, data), lanes(KEY, data), strict=True):
        assert torch.equal(ours, expected)


def test_one_graph_serves_all_shapes():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda key, x: lrandom.normal(key, x.shape), fullgraph=True, dynamic=True, backend=count)
    for size in (3, 4, 7):
        assert torch.equal(compiled(KEY, torch.zeros(size, 2)), lrandom.normal(KEY, (size, 2)))
    assert len(graphs) == 1


@pytest.mark.slow
def test_inductor_gives_the_same_bits():
    """Of all samplers together, and of each lane: rounding included, which fused products and sums would change."""

    def draw(key):
        keys = lrandom.split(key, 2)
        return [[sample(key) for sample in SAMPLERS.values()], vmap(SAMPLERS["normal"])(keys)]

    found = torch.compile(make_fx(draw)(KEY), fullgraph=True)(KEY)
    for ours, expected in zip(lm.tree.leaves(found), lm.tree.leaves(draw(KEY)), strict=True):
        assert torch.equal(ours, expected)


ROUNDS = {torch.ops.aten.bitwise_xor.Tensor, torch.ops.aten.__lshift__.Scalar, torch.ops.aten.__ilshift__.Scalar}


@sampler
def test_a_recorded_draw_is_one_operation(draw):
    """Inductor would take most of a minute to compile the 20 rounds of each hash."""

    def lanes(keys):
        return vmap(draw)(keys), grad(lambda x: (x * draw(keys[0])).sum())(torch.tensor(1.0))

    for graph in (make_fx(draw)(KEY), make_fx(draw, tracing_mode="fake")(KEY), make_fx(lanes)(lrandom.split(KEY, 3))):
        targets = [node.target for node in graph.graph.nodes]
        assert any(str(target).startswith("lumen.") for target in targets)
        assert not [node for node in targets if node in ROUNDS]


@sampler
def test_a_recorded_draw_is_that_of_eager_mode_in_each_lane(draw):
    def lanes(keys):
        return vmap(draw)(keys), vmap(draw, in_dims=1)(keys.T), vmap(vmap(draw))(keys[None])[0]

    keys = lrandom.split(KEY, 5)
    for found in make_fx(lanes)(lrandom.split(lrandom.key(5), 5))(keys):
        assert torch.equal(found, torch.stack([draw(key) for key in keys]))


@pytest.mark.parametrize("pre_dispatch", [False, True])
@sampler
def test_a_traced_graph_holds_no_constants_of_the_key(draw, pre_dispatch):
    graph = make_fx(draw, pre_dispatch=pre_dispatch)(KEY)
    other = lrandom.key(99)
    assert torch.equal(graph(other), draw(other))


def test_a_gradient_flows_past_the_noise():
    def loss(x, key):
        return (x * lrandom.normal(lrandom.split(key)[1], (3,))).sum()

    x, noise = torch.ones(3), lrandom.normal(lrandom.split(KEY)[1], (3,))
    assert torch.equal(grad(loss)(x, KEY), noise)
    compiled = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, KEY), noise)


def test_modes_and_defaults_do_not_matter():
    expected = {name: draw(KEY) for name, draw in SAMPLERS.items()}
    with torch.inference_mode():
        assert all(torch.equal(draw(KEY), expected[name]) for name, draw in SAMPLERS.items())
    torch.set_default_dtype(torch.float64)
    try:
        for name, draw in SAMPLERS.items():
            assert draw(KEY).dtype == expected[name].dtype
            assert torch.equal(draw(KEY), expected[name])
    finally:
        torch.set_default_dtype(torch.float32)


@sampler
def test_the_device_follows_the_key(draw):
    assert draw(KEY.to("meta")).device.type == "meta"


# ------------------------------------------------------------------------------------- keys


@given(seeds)
@settings(max_examples=50, deadline=None)
def test_a_key_holds_the_bits_of_its_seed(seed):
    key = lrandom.key(seed)
    assert key.shape == (2,)
    assert key.dtype == torch.int64
    high, low = key.tolist()
    assert high << 32 | low == seed % 2**64
    assert torch.equal(lrandom.key(torch.tensor(seed)), key)


@given(seeds, st.integers(0, 40), seeds)
@settings(max_examples=30, deadline=None)
def test_number_and_tensor_paths_agree(seed, n, data):
    key = lrandom.key(seed)
    keys = lrandom.split(key, n)
    assert keys.shape == (n, 2)
    assert torch.equal(keys, lrandom.split(key, 41)[:n])
    assert torch.equal(lrandom.fold_in(key, data), lrandom.fold_in(key, torch.tensor(data)))
    assert torch.equal(vmap(lrandom.fold_in)(key[None], torch.tensor([data]))[0], lrandom.fold_in(key, data))
    assert all(torch.equal(lrandom.fold_in(key, i), keys[i]) for i in range(n))  # as documented


def test_derived_keys_are_distinct_and_their_numbers_independent():
    family = torch.cat([lrandom.split(KEY, 500), *(lrandom.split(k, 10) for k in lrandom.split(KEY, 50))])
    assert len(torch.unique(family, dim=0)) == len(family)
    draws = vmap(lambda key: lrandom.normal(key, (4000,)))(lrandom.split(KEY, 50))
    off_diagonal = torch.corrcoef(torch.cat([draws, lrandom.normal(KEY, (1, 4000))])).fill_diagonal_(0)
    assert off_diagonal.abs().max() < 5 / math.sqrt(4000)


def test_neighbouring_seeds_flip_half_of_all_bits():
    words = vmap(lambda seed: lrandom.bits(lrandom.key(seed), (1000,)))(torch.arange(2))
    flipped = (words[0] ^ words[1])[:, None] >> torch.arange(32) & 1
    assert abs(flipped.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(32_000)


# ------------------------------------------------------------------------------------- statistics, fixed key


def test_bits_are_words_whose_every_bit_is_fair():
    words = lrandom.bits(KEY, (20_000,))
    assert words.min() >= 0
    assert words.max() < 2**32
    rates = (words[:, None] >> torch.arange(32) & 1).double().mean(0)
    assert (rates - 0.5).abs().max() < 5 * 0.5 / math.sqrt(20_000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_fills_its_interval(dtype):
    draws = lrandom.uniform(KEY, (100_000,), dtype)
    assert draws.dtype == dtype
    assert draws.min() >= 0
    assert draws.max() < 1
    draws = draws.double()
    assert abs(draws.mean() - 0.5) < 5e-3
    assert abs(draws.var() - 1 / 12) < 1e-3
    bounded = lrandom.uniform(KEY, (100_000,), dtype, low=1.0, high=1.0625)
    assert bounded.min() >= 1
    assert bounded.max() < 1.0625


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normal_has_the_moments_and_quantiles(dtype):
    draws = lrandom.normal(KEY, (200_000,), dtype)
    assert draws.dtype == dtype
    z = draws.double()
    for power, moment, deviation in ((1, 0, 1), (2, 1, 1.5), (3, 0, 4), (4, 3, 10)):
        assert abs((z**power).mean() - moment) < 5 * deviation / math.sqrt(len(z))
    levels = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert (torch.quantile(torch.special.ndtr(z), levels) - levels).abs().max() < 0.008


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 5.43), (torch.float64, 8.30)])
def test_normal_is_finite_at_the_ends(monkeypatch, dtype, largest):
    ends = torch.tensor([0, 2**32 - 1])
    monkeypatch.setattr(
        "lumen.random._threefry.random_words", lambda key, shape: (ends, ends ^ (dtype == torch.float32) * ends)
    )
    draws = lrandom.normal(KEY, (2,), dtype)
    assert draws.isfinite().all()
    assert 5 < draws.abs().min() <= draws.abs().max() < largest


def test_double_normal_uses_more_bits_than_a_word():
    draws = lrandom.normal(KEY, (200_000,), torch.float64)
    assert len(torch.unique(draws)) == len(draws)  # 32 bits would give about 5 collisions
    levels = torch.special.ndtr(draws) * 2**32
    assert abs((levels - levels.floor()).mean() - 0.5) < 5e-3


def test_bernoulli_rates():
    p = torch.tensor([0.0, 0.1, 0.5, 1.0])
    rates = lrandom.bernoulli(KEY, p, (50_000, 4)).double().mean(0)
    assert rates[0] == 0
    assert rates[3] == 1
    assert (rates - p).abs().max() < 5 * 0.5 / math.sqrt(50_000)
    assert lrandom.bernoulli(KEY, p).shape == (4,)
    assert lrandom.bernoulli(KEY, 1).item() is True


def test_randint_is_even():
    counts = torch.bincount(lrandom.randint(KEY, (60_000,), -3, 3) + 3, minlength=6)
    assert len(counts) == 6
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 25  # chi squared of 5 degrees: p < 2e-4
    wide = lrandom.randint(KEY, (1000,), -(2**62), 2**62 - 1)
    assert wide.min() < -(2**61)
    assert wide.max() > 2**61
    assert lrandom.randint(KEY, (3,), 5, 6).tolist() == [5, 5, 5]


@given(st.integers(0, 300))
@settings(max_examples=20, deadline=None)
def test_a_permutation_holds_each_number_once(n):
    assert torch.equal(lrandom.permutation(KEY, n).sort().values, torch.arange(n))


def test_permutations_are_evenly_likely():
    orders = vmap(lambda key: lrandom.permutation(key, 3))(lrandom.split(KEY, 6000))
    counts = torch.bincount(orders @ torch.tensor([9, 3, 1]))
    counts = counts[counts > 0]
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 25


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lrandom.key(1.5), TypeError, r"seed is 1.5 of type float.*use int"),
        (lambda: lrandom.key(True), TypeError, "seed is True of type bool"),
        (lambda: lrandom.key(2**63), ValueError, r"seed is 9223372036854775808.*% 2\*\*63"),
        (lambda: lrandom.key(torch.ones(())), TypeError, r"seed is a tensor of torch.float32.*long"),
        (lambda: lrandom.key(torch.arange(3)), ValueError, r"seed has shape \[3\].*0-d.*vmap"),
        (lambda: lrandom.split(7), TypeError, r"key is 7, of type int.*lumen.random.key"),
        (lambda: lrandom.bits(KEY.int(), ()), TypeError, r"key is a tensor of torch.int32.*int64"),
        (lambda: lrandom.normal(lrandom.split(KEY), ()), ValueError, r"key has shape \[2, 2\].*vmap"),
        (lambda: lrandom.split(KEY, -1), ValueError, "n is -1; it must be at least 0"),
        (lambda: lrandom.split(KEY, 2.0), TypeError, "n is 2.0 of type float"),
        (lambda: lrandom.fold_in(KEY, 0.5), TypeError, "data is 0.5 of type float"),
        (lambda: lrandom.fold_in(KEY, torch.tensor(True)), TypeError, "data is a tensor of torch.bool"),
        (lambda: lrandom.fold_in(KEY, torch.arange(2)), ValueError, r"data has shape \[2\]"),
        (lambda: lrandom.bits(KEY, 3), TypeError, r"shape is 3; it must be a sequence of ints"),
        (lambda: lrandom.bits(KEY, (2, -1)), ValueError, "a size in shape is -1"),
        (lambda: lrandom.bits(KEY, (2.0,)), TypeError, "a size in shape is 2.0"),
        (lambda: lrandom.uniform(KEY, (), torch.int32), TypeError, r"dtype is of torch.int32.*torch.float64"),
        (
            lambda: lrandom.uniform(KEY, (), low=1.0, high=1.0),
            ValueError,
            "low is 1.0, high is 1.0; low < high",
        ),
        (lambda: lrandom.uniform(KEY, (), high=math.nan), ValueError, "high is nan"),
        (
            lambda: lrandom.uniform(KEY, (), torch.float16, high=1e5),
            ValueError,
            r"6.55e\+04 for torch.float16",
        ),
        (lambda: lrandom.uniform(KEY, (), low="0"), TypeError, "low is '0' of type str"),
        (lambda: lrandom.bernoulli(KEY, 1.5), ValueError, "p is 1.5; a probability lies in"),
        (lambda: lrandom.bernoulli(KEY, torch.tensor(1)), TypeError, "p is of torch.int64"),
        (lambda: lrandom.bernoulli(KEY, torch.ones(3), (2,)), ValueError, r"p has shape \[3\].*\[2\]"),
        (lambda: lrandom.bernoulli(KEY, torch.ones(2, 3), (3,)), ValueError, r"p has shape \[2, 3\]"),
        (lambda: lrandom.randint(KEY, (), 3, 3), ValueError, "low is 3, high is 3"),
        (lambda: lrandom.randint(KEY, (), 0, torch.tensor(3)), TypeError, "low or high is a tensor"),
        (lambda: lrandom.permutation(KEY, -2), ValueError, "n is -2"),
    ],
)
def test_bad_input_is_named_with_its_fix(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_numpy_integers_are_integers():
    assert torch.equal(lrandom.key(np.int64(7)), lrandom.key(7))
    assert torch.equal(lrandom.fold_in(KEY, np.uint32(7)), lrandom.fold_in(KEY, 7))
    assert lrandom.bits(KEY, (np.int32(3), 2)).shape == (3, 2)


# ------------------------------------------------------------------------------------- by row


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_row_draws_by_its_number(dtype):
    rows = torch.tensor([7, 0, 200], dtype=dtype)
    found = lrandom.by_row(KEY, rows, lambda key: lrandom.normal(key, (4,)))
    each = [lrandom.normal(lrandom.fold_in(KEY, int(row)), (4,)) for row in rows]
    assert torch.equal(found, torch.stack(each))


def test_large_and_negative_numbers_of_rows():
    rows = torch.tensor([2**40 + 3, -1])
    found = lrandom.by_row(KEY, rows, lrandom.bits)
    assert found.tolist() == [int(lrandom.bits(lrandom.fold_in(KEY, int(row)))) for row in rows]


def test_a_sampler_may_split_its_key_and_give_several():
    def sample(key):
        first, second = lrandom.split(key)
        return lrandom.uniform(first, (2,)), lrandom.bernoulli(second, 0.5)

    numbers, coins = lrandom.by_row(KEY, torch.arange(5), sample)
    assert numbers.shape == (5, 2)
    assert coins.shape == (5,)
    none = lrandom.by_row(KEY, torch.arange(0), sample)
    assert [leaf.shape for leaf in none] == [(0, 2), (0,)]


def test_noise_by_row_is_the_same_in_microbatches_and_by_key_it_is_not():
    def step_of(noise):
        def step(state, batch):
            def loss_fn(params, batch):
                out, _ = state.apply(params, batch["x"] + noise(state.key, batch))
                return lm.Mean.of(out.square().mean(-1))

            loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
            return state.apply_gradients(grads), {"loss": loss}

        return step

    def by_row(key, batch):
        return lrandom.by_row(key, batch["row"], lambda key: lrandom.normal(key, (3,), torch.float64))

    def by_key(key, batch):
        return lrandom.normal(key, batch["x"].shape, torch.float64)

    state = lm.TrainState.create(torch.nn.Linear(3, 2).double(), lm.optim.sgd(0.1))
    batch = {"x": torch.ones(7, 3, dtype=torch.float64), "row": torch.arange(7)}
    for noise, same in ((by_row, True), (by_key, False)):
        whole = step_of(noise)(state, batch)[1]["loss"].compute()
        parts = lm.accumulate(3)(step_of(noise))(state, batch)[1]["loss"].compute()
        assert torch.allclose(whole, parts, rtol=1e-14, atol=0) is same


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        ([1, 2], TypeError, r"tensor of integers, not \[1, 2\], of type list"),
        (torch.ones(2), TypeError, "tensor of integers, not torch.float32"),
        (torch.tensor(1), ValueError, r"shape \[B\]"),
        (torch.ones(2, 1, dtype=torch.int64), ValueError, r"shape \[B\]"),
    ],
)
def test_rows_that_are_no_numbers_of_rows(rows, error, says):
    with pytest.raises(error, match=says):
        lrandom.by_row(KEY, rows, lrandom.bits)
