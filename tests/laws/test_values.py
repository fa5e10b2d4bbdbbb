"""Transforms are values: frozen, equal by their settings, and shared by any number of steps and threads."""

import copy
import functools
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lumen as lm
from lumen.core import order
from lumen.core.value_object import ValueObject
from lumen.errors import LumenError, StepError
from tests.tiers import pick

MAKE = {
    "accumulate": lambda: lm.accumulate(2),
    "accumulate, rows": lambda: lm.accumulate(microbatch=3),
    "accumulate, auto": lambda: lm.accumulate("auto"),
    "clip": lambda: lm.clip(0.5),
    "clip, value": lambda: lm.clip(value=0.5),
    "compile": lambda: lm.compile(backend="eager"),
    "context_parallel": lambda: lm.context_parallel(sequence_dims={"ids": 1}, documents="documents"),
    "ddp": lambda: lm.ddp(bucket_mb=2.0),
    "deepspeed": lambda: lm.deepspeed({"zero_optimization": {"stage": 2}}),
    "donate": lambda: lm.donate(),
    "dp_sgd": lambda: lm.dp_sgd(1.0, 0.5, chunk=2),
    "ema": lambda: lm.ema(0.9, warmup=True),
    "ensemble": lambda: lm.ensemble(2, axis="members"),
    "fsdp": lambda: lm.fsdp(stage=2),
    "fsdp, units": lambda: lm.fsdp(wrap=["0"], param_init_fn=torch.nn.init.zeros_),
    "guard": lambda: lm.guard(),
    "guard, raise": lambda: lm.guard("raise"),
    "guard, spike": lambda: lm.guard("dump", spike=6.0, window=20),
    "local": lambda: lm.local(every=2),
    "pipeline": lambda: lm.pipeline(microbatches=2, stages=["2"], schedule="gpipe"),
    "precision": lambda: lm.precision("bf16"),
    "precision, model": lambda: lm.precision("fp16", cast="model", keep=["input"]),
    "quantized_matmul": lambda: lm.quantized_matmul("int8", layers=["0"]),
    "remat": lambda: lm.remat("0"),
    "seeded": lambda: lm.seeded(),
    "sweep": lambda: lm.sweep(lr=[0.1, 0.2]),
    "tensor_parallel": lambda: lm.tensor_parallel({"0": lm.parallel.Colwise()}),
    "unroll": lambda: lm.unroll(2),
}
NOT_SHARED = ("compile", "context_parallel", "deepspeed", "quantized_matmul", "tensor_parallel", "unroll")
SHARED = [name for name in MAKE if name not in NOT_SHARED]


def state_of(seed: int) -> lm.TrainState:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    return lm.TrainState.create(net, lm.optim.adam(0.1), seed=seed)


def by_mean(state, x):
    loss, grads = lm.value_and_grad(lambda p, x: state.apply(p, x)[0].square().mean())(state.params, x)
    return state.apply_gradients(grads), {"loss": loss}


def by_sum(state, x):
    loss, grads = lm.value_and_grad(lambda p, x: (state.apply(p, x)[0] - 1).abs().mean())(state.params, x)
    return state.apply_gradients(grads), {"distance": loss}


def run(transforms, function, seed, state=None):
    """Two steps of a run, and what came of them."""
    step = lm.compose(*transforms)(function)
    state = step.init(state_of(seed) if state is None else state)
    for each in range(2):
        batch = torch.randn(5 + seed, 3, generator=torch.Generator().manual_seed(each))
        state, metrics = step(state, batch)
    return [leaf.clone() for leaf in lm.tree.tensors((step.export(state), metrics))]


def alike(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def in_order(names):
    """The transforms of these names that can be composed, in an order in which they can."""
    stack = []
    for name in names:
        for place in range(len(stack) + 1):
            tried = [*stack[:place], name, *stack[place:]]
            try:
                order.check([MAKE[each]() for each in tried])
                lm.compose(*(MAKE[each]() for each in tried))(by_mean)
            except LumenError:
                continue
            stack = tried
            break
    return stack


@settings(max_examples=pick(5, 40), deadline=None)
@given(st.lists(st.sampled_from(SHARED), min_size=1, max_size=3, unique=True))
def test_a_transform_is_shared_by_steps_and_runs_without_being_changed(names):
    names = in_order(names)
    shared = [MAKE[name]() for name in names]
    before = [copy.deepcopy(vars(each)) for each in shared]
    runs = [(by_mean, 0), (by_sum, 1)]
    own = [run([MAKE[name]() for name in names], *each) for each in runs]
    found = [run(shared, *each) for each in (*runs, *runs)]
    assert all(alike(a, b) for a, b in zip(found, own * 2, strict=True))
    assert [vars(each) for each in shared] == before
    assert shared == [MAKE[name]() for name in names]


def test_a_transform_is_shared_by_threads():
    names = ["accumulate", "guard, raise", "clip", "ema", "donate"]
    stack = in_order(names)
    shared = [MAKE[name]() for name in stack]
    own = [run([MAKE[name]() for name in stack], by_mean, seed) for seed in range(4)]
    states = [state_of(seed) for seed in range(4)]  # drawn from a generator that threads share
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(functools.partial(run, shared, by_mean), range(4), states))
    assert all(alike(a, b) for a, b in zip(found, own, strict=True))


def test_a_compiled_step_and_an_uncompiled_one_share_their_transforms():
    shared = [lm.accumulate("auto"), lm.guard("raise"), lm.ema(0.5)]
    own = run([lm.accumulate("auto"), lm.guard("raise"), lm.ema(0.5)], by_mean, 0)
    compiled = lm.compile(backend="eager")
    for _ in range(2):
        for found in (run([compiled, *shared], by_mean, 0), run(shared, by_mean, 0)):
            assert all(torch.allclose(a, b) for a, b in zip(found, own, strict=True))


@pytest.mark.parametrize("name", MAKE)
def test_transforms_are_equal_by_their_settings(name):
    one, other = MAKE[name](), MAKE[name]()
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == repr(other)
    assert " at 0x" not in repr(one)
    assert all(one != make() for each, make in MAKE.items() if each != name)
    assert copy.deepcopy(one) == one
    assert one.replace() == one


LITERAL = [name for name in MAKE if name not in ("fsdp, units", "tensor_parallel")]


@pytest.mark.parametrize("name", LITERAL)
def test_a_repr_is_the_code_that_makes_its_transform(name):
    transform = MAKE[name]()
    assert eval(repr(transform), {"lm": lm}) == transform


@pytest.mark.parametrize("name", MAKE)
def test_a_transform_is_frozen(name):
    transform = MAKE[name]()
    before = copy.deepcopy(vars(transform))
    for attribute in (*before, "anything"):
        with pytest.raises(StepError, match=rf"{attribute} cannot be assigned: a transform does not change"):
            setattr(transform, attribute, None)
        with pytest.raises(StepError, match="cannot be assigned"):
            delattr(transform, attribute)
    assert vars(transform) == before


def test_a_setting_is_changed_in_a_new_transform():
    with pytest.raises(StepError, match=r"Make a new one: ema.replace\(decay=...\)"):
        lm.ema(0.5).decay = 0.9
    assert lm.ema(0.5, start=3).replace(decay=0.9) == lm.ema(0.9, start=3)


class scaled(lm.Transform):  # noqa: N801
    """As one is written in the docs."""

    name = "scaled"

    def __init__(self, factor, *layers, every=1, then=None, **others):
        self.factor = factor


def test_transforms_of_the_users_own_are_values_too():
    assert scaled(2.0) == scaled(2.0) != scaled(3.0)
    assert repr(scaled(2.0)) == "lm.scaled(2.0)"
    assert repr(scaled(2.0, "a", "b", every=3, rate=[1])) == "lm.scaled(2.0, 'a', 'b', every=3, rate=[1])"
    assert repr(scaled(2.0, then=by_sum)) == "lm.scaled(2.0, then=by_sum)"
    assert repr(scaled(2.0, then=functools.partial(by_sum))) == "lm.scaled(2.0, then=partial(...))"
    assert repr(scaled(2.0, then=object())) == "lm.scaled(2.0, then=object(...))"
    assert repr(scaled(2.0, then=[by_sum] * 9)) == "lm.scaled(2.0, then=then)"
    assert scaled(2.0, "a", rate=1).replace(factor=3.0, rate=2) == scaled(3.0, "a", rate=2)
    assert str(inspect.signature(scaled)) == "(factor, *layers, every=1, then=None, **others)"
    assert str(inspect.signature(lm.seeded)) == "()"


def test_settings_without_a_hash_are_compared_by_value():
    one, other = (scaled(torch.tensor([1.0, 2.0]), then={"a": [{1}, torch.ones(2)]}) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != scaled(torch.tensor([1.0, 3.0]), then={"a": [{1}, torch.ones(2)]})
    assert one != scaled(torch.tensor([1.0, 2.0], dtype=torch.float64), then={"a": [{1}, torch.ones(2)]})
    assert repr(one.replace(then=None)) == "lm.scaled(<tensor of shape (2,)>)"


def test_a_list_that_is_changed_afterwards_changes_no_setting():
    layers = ["a"]
    transform = scaled(2.0, then=layers)
    layers.append("b")
    assert transform == scaled(2.0, then=["a"])
    assert isinstance(transform, ValueObject)


def test_a_wrong_argument_is_refused_as_by_any_class():
    with pytest.raises(TypeError, match="there is no argument 'factor'"):
        lm.ema(0.5, factor=2)
    with pytest.raises(TypeError):
        lm.seeded(1)
