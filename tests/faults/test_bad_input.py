"""Bad input: a clear error at the earliest point: what was found, what is allowed, and what to write."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lumen as lm
from lumen import errors
from lumen.core import rules

ACROSS = {
    "accumulate": lm.accumulate(2),
    "donate": lm.donate(),
    "compile": lm.compile(backend="eager"),
    "seeded": lm.seeded(),
    "guard": lm.guard(),
}


def make_state(net: nn.Module | None = None) -> lm.TrainState:
    return lm.TrainState.create(net or nn.Linear(4, 2), lm.optim.sgd(0.1), seed=0)


def make_batch(rows: int = 6) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 4), "y": torch.randint(0, 2, (rows,))}


def loss_of(state: lm.TrainState) -> Any:
    def loss_fn(params: Any, batch: Any) -> lm.Mean:
        out, _ = state.apply(params, batch["x"])
        return lm.Mean.of(F.cross_entropy(out, batch["y"], reduction="none"))

    return loss_fn


def step(state: lm.TrainState, batch: Any) -> tuple[lm.TrainState, dict[str, Any]]:
    loss, grads = lm.value_and_grad(loss_of(state))(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def gradient(loss_fn: Any, params: Any = None, batch: Any = None, **kwargs: Any) -> Any:
    params = {"w": torch.ones(3)} if params is None else params
    return lm.value_and_grad(loss_fn, **kwargs)(params, torch.ones(3) if batch is None else batch)


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("transform", [None, *ACROSS], ids=str)
def test_a_step_that_returns_one_value(transform: str | None) -> None:
    def only_state(state: lm.TrainState, batch: Any) -> Any:
        return step(state, batch)[0]

    run = ACROSS[transform](only_state) if transform else lm.compose()(only_state)
    with pytest.raises(errors.StepError, match=r"only_state must return \(state, metrics\).*one value, TrainState"):
        run(run.init(make_state()), make_batch())


def test_a_step_that_returns_three_values() -> None:
    with pytest.raises(errors.StepError, match=r"a tuple of 3.*Write: return state, \{\}"):
        lm.compose()(lambda state, batch: (state, {}, 1))(make_state(), make_batch())


@pytest.mark.parametrize("transform", [None, *ACROSS], ids=str)
def test_a_state_whose_tree_changes(transform: str | None) -> None:
    def grows(state: lm.TrainState, batch: Any) -> Any:
        new, metrics = step(state, batch)
        return new.replace(slots={**new.slots, "mine": torch.zeros(())}), metrics

    run = ACROSS[transform](grows) if transform else lm.compose()(grows)
    with pytest.raises(errors.StepError, match=r"grows returned a state whose structure differs.*slots\[mine\]"):
        run(run.init(make_state()), make_batch())


def test_a_step_that_is_no_function() -> None:
    with pytest.raises(errors.StepError, match=r"not Linear|not int"):
        lm.accumulate(2)(3)


@pytest.mark.parametrize("transform", [None, "accumulate", "guard", "seeded"], ids=str)
def test_params_changed_in_place(transform: str | None) -> None:
    def mutates(state: lm.TrainState, batch: Any) -> Any:
        state.params["weight"].add_(1.0)
        return step(state, batch)

    run = ACROSS[transform](mutates) if transform else lm.compose()(mutates)
    with pytest.raises(errors.PurityError, match=r"mutates changed state.params\[weight\] in place.*state.replace"):
        run(run.init(make_state()), make_batch())


def test_buffers_changed_in_place() -> None:
    def mutates(state: lm.TrainState, batch: Any) -> Any:
        state.buffers["running_mean"].zero_()
        return state, {}

    with pytest.raises(errors.PurityError, match=r"state.buffers\[running_mean\]"):
        lm.compose()(mutates)(make_state(nn.BatchNorm1d(4)), make_batch())


def test_check_purity_names_a_changed_batch() -> None:
    def mutates(state: Any, batch: Any) -> Any:
        batch["x"].add_(1.0)
        return state, {}

    with pytest.raises(errors.PurityError, match=r"changed batch\[x\] in place"):
        lm.check_purity(mutates, make_state(), make_batch())


def test_check_purity_names_what_differs() -> None:
    with pytest.raises(errors.PurityError, match=r"another metrics\[noise\].*lm.seeded\(\)"):
        lm.check_purity(lambda s, b: (s, {"noise": torch.rand(())}), make_state(), make_batch())


def test_assigning_to_a_state() -> None:
    with pytest.raises(errors.StateError, match=r"params cannot be assigned.*state = state.replace\(params=\.\.\.\)"):
        make_state().params = {}


def test_replacing_an_unknown_field() -> None:
    with pytest.raises(errors.StateError, match=r"no field 'parms'; its fields are .*params"):
        make_state().replace(parms={})


def test_an_undecorated_state_subclass() -> None:
    class WithTarget(lm.TrainState):
        target: Any = None

    with pytest.raises(
        errors.StateError, match=r"(?s)WithTarget subclasses TrainState.*@lm.dataclass\n    class WithTarget"
    ):
        WithTarget.create(nn.Linear(2, 1), lm.optim.sgd(0.1))


def test_an_undecorated_subclass_of_a_decorated_subclass() -> None:
    @lm.dataclass
    class Middle(lm.TrainState):
        extra: Any = None

    class Lower(Middle):
        pass

    with pytest.raises(errors.StateError, match="Lower subclasses Middle"):
        Lower.create(nn.Linear(2, 1), lm.optim.sgd(0.1))


def test_grads_of_other_params() -> None:
    with pytest.raises(errors.StateError, match=r"grads and params differ: missing bias"):
        make_state().apply_gradients({"weight": torch.zeros(2, 4)})


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("transform", [lm.accumulate(2), lm.accumulate(microbatch=2), lm.dp_sgd(1.0, 0.0)], ids=repr)
def test_leaves_with_different_leading_sizes(transform: lm.Transform) -> None:
    batch = {"x": torch.zeros(6, 4), "y": torch.zeros(5, dtype=torch.int64)}
    run = transform(step)
    with pytest.raises(
        errors.BatchError, match=r"different leading sizes \(x: \(6, 4\), y: \(5,\)\).*further argument"
    ):
        run(run.init(make_state()), batch)


@pytest.mark.parametrize("k", [0, -1, 2.5, True, None])
def test_accumulate_by_no_count(k: Any) -> None:
    with pytest.raises(errors.BatchError, match=r"one positive number.*lm.accumulate\(4\)"):
        lm.accumulate(k)


def test_a_batch_with_a_scalar_leaf() -> None:
    with pytest.raises(errors.BatchError, match=r"scalar tensor.*further argument"):
        lm.accumulate(2)(step)(make_state(), {**make_batch(), "temperature": torch.tensor(1.0)})


def test_a_batch_with_a_string() -> None:
    with pytest.raises(errors.BatchError, match="leaf of type str"):
        lm.accumulate(2)(step)(make_state(), {**make_batch(), "id": "a"})


def test_a_batch_without_tensors() -> None:
    with pytest.raises(errors.BatchError, match="no tensor"):
        lm.accumulate(2)(lambda s, b: gradient(lambda p, b: p["w"].sum(), batch=b))(make_state(), {})


def test_a_missing_batch() -> None:
    with pytest.raises(errors.BatchError, match=r"second argument.*\(params, batch\)"):
        lm.value_and_grad(lambda params: params["w"].sum())({"w": torch.ones(1)})


def test_unroll_of_an_unstacked_batch() -> None:
    with pytest.raises(errors.BatchError, match=r"unroll\(2\) takes 2 stacked batches.*\[6\].*lm.stack"):
        lm.unroll(2)(step)(make_state(), make_batch(6))


# ----------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("engine", ["autograd", "func"])
@pytest.mark.parametrize(
    ("loss_fn", "says"),
    [
        (lambda p, b: p["w"] * b, r"shape \(3,\).*lm.Mean.of\(losses\)"),
        (lambda p, b: 3.0, r"not 3.0.*floating scalar"),
        (lambda p, b: None, "not None.*Is a return missing"),
        (lambda p, b: (p["w"].sum(), {}), "has_aux=True"),
        (lambda p, b: p["w"].sum() > 0, r"torch.bool"),
        (lambda p, b: lm.Mean(p["w"], torch.tensor(3.0)), r"shape \(3,\)"),
    ],
)
def test_a_loss_that_is_no_scalar(loss_fn: Any, says: str, engine: str) -> None:
    with pytest.raises(errors.LossError, match=says):
        gradient(loss_fn, engine=engine)


def test_aux_that_was_announced_and_is_missing() -> None:
    with pytest.raises(errors.LossError, match=r"has_aux=True.*\(loss, aux\).*return loss, lm.Aux"):
        gradient(lambda p, b: p["w"].sum(), has_aux=True)


def test_other_argnums() -> None:
    with pytest.raises(errors.LossError, match=r"argnums=1.*first argument"):
        lm.value_and_grad(lambda p, b: p, argnums=1)


def test_an_unknown_engine() -> None:
    with pytest.raises(errors.LossError, match="'auto', 'autograd' or 'func'"):
        lm.value_and_grad(lambda p, b: p, engine="jax")


def test_a_loss_of_the_batch_alone() -> None:
    with pytest.raises(errors.LossError, match=r"does not depend on params.*state.apply\(params, x\)"):
        gradient(lambda p, b: b.sum())


def test_a_loss_behind_detach() -> None:
    with pytest.raises(errors.LossError, match=r"does not depend on params.*\.detach\(\)"):
        gradient(lambda p, b: (p["w"].detach() * b).sum())


def test_a_loss_of_the_module_itself() -> None:
    net = nn.Linear(4, 2)
    state = make_state(net)

    def loss_fn(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch["x"]), batch["y"])

    for _ in range(2):  # each time, not only when the function is first seen
        with pytest.raises(errors.LossError, match=r"call the module itself\?.*state.apply\(params, x\)"):
            lm.value_and_grad(loss_fn)(state.params, make_batch())


@pytest.mark.parametrize("transform", [None, lm.compile(backend="eager"), lm.accumulate(2)], ids=repr)
def test_a_loss_of_the_module_itself_in_a_step(transform: Any) -> None:
    net = nn.Linear(4, 2)

    def calls_the_module(state: lm.TrainState, batch: Any) -> Any:
        def loss_fn(params: Any, batch: Any) -> Tensor:
            return F.cross_entropy(net(batch["x"]), batch["y"])

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    run = transform(calls_the_module) if transform else calls_the_module
    with pytest.raises(errors.LossError, match="does not depend on params"):
        run(make_state(net), make_batch())


def test_an_aux_that_cannot_be_merged() -> None:
    def with_matrix(state: lm.TrainState, batch: Any) -> Any:
        def loss_fn(params: Any, batch: Any) -> Any:
            return loss_of(state)(params, batch), lm.Aux(metrics={"gram": batch["x"].T @ batch["x"]})

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss, **aux.metrics}

    with pytest.raises(errors.LossError, match=r"aux\['gram'\].*shape \(4, 4\).*lm.Mean.of"):
        lm.accumulate(2)(with_matrix)(make_state(), make_batch())


# ----------------------------------------------------------------------------------------------- params


def test_integer_params() -> None:
    with pytest.raises(errors.ParamsError, match=r"params\['n'\] is a tensor.*torch.int64.*buffers"):
        gradient(lambda p, b: p["w"].sum(), {"w": torch.ones(2), "n": torch.tensor(3)})


def test_integer_params_of_an_optimizer() -> None:
    with pytest.raises(errors.ParamsError, match=r"params\['n'\] is torch.int64.*buffers"):
        lm.optim.sgd(0.1).init({"n": torch.tensor(3)})


def test_no_params() -> None:
    with pytest.raises(errors.ParamsError, match="empty tree"):
        gradient(lambda p, b: b.sum(), {})


def test_a_model_without_trainable_params() -> None:
    with pytest.raises(errors.ParamsError, match="no trainable parameters"):
        make_state(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("net", [nn.LazyLinear(2), nn.Sequential(nn.LazyConv2d(2, 3)), nn.LazyBatchNorm1d()])
def test_lazy_parameters(net: nn.Module) -> None:
    with pytest.raises(errors.ParamsError, match=r"uninitialized lazy parameters.*net\(example_input\)"):
        lm.pure(net)


def test_params_of_another_model() -> None:
    state = make_state()
    with pytest.raises(errors.ParamsError, match=r"missing \['bias'\], unexpected \['biases'\].*state.params"):
        state.apply({"weight": state.params["weight"], "biases": state.params["bias"]}, torch.ones(1, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, "fast"])
@pytest.mark.parametrize("make", [lm.optim.sgd, lm.optim.adamw], ids=lambda f: f.__name__)
def test_a_bad_learning_rate(make: Any, value: Any) -> None:
    with pytest.raises(errors.HyperparameterError, match=rf"lr={value!r} is not allowed.*\[0, inf\)"):
        make(value)


def test_a_learning_rate_tensor_that_is_nan() -> None:
    with pytest.raises(errors.HyperparameterError, match="lr="):
        lm.optim.sgd(torch.tensor(math.nan))


def test_a_learning_rate_for_each_of_several_runs() -> None:
    with pytest.raises(errors.HyperparameterError, match=r"lm.sweep\(lr=values\)"):
        lm.optim.sgd(torch.tensor([0.1, 0.2]))


# ----------------------------------------------------------------------------------------- transforms


WRONG = [
    (lm.accumulate(2), lm.compile()),
    (lm.remat(), lm.precision("bf16")),
    (lm.precision("bf16"), lm.accumulate(4)),
    (lm.precision("bf16"), lm.dp_sgd(1.0, 0.0)),
    (lm.accumulate(2), lm.ensemble(3)),
    (lm.donate(), lm.guard()),
    (lm.ema(0.9), lm.clip(1.0)),
    (lm.guard(), lm.ensemble(2)),
    (lm.donate(), lm.ensemble(2)),
    (lm.dp_sgd(1.0, 0.0), lm.guard()),
    (lm.seeded(), lm.unroll(2)),
    (lm.ensemble(2), lm.seeded()),
    (lm.guard(), lm.ema(0.9), lm.accumulate(2), lm.compile(), lm.donate()),
    (lm.remat(), lm.seeded(), lm.donate(), lm.ensemble(2), lm.guard(), lm.compile()),
]


def written_in(message: str) -> tuple[lm.Step, lm.Step]:
    """The steps that the code in the message makes, in both of its forms."""
    lines = re.findall(r"^(?:Write: |or:    )(.*)$", message, re.MULTILINE)
    nested, composed = (eval(line, {"lm": lm, "step": step}) for line in lines)
    return nested, composed


@pytest.mark.parametrize("transforms", WRONG, ids=lambda ts: ">".join(t.name for t in ts))
def test_the_wrong_order_is_answered_with_the_right_code(transforms: tuple[lm.Transform, ...]) -> None:
    def wrong() -> None:
        run = step
        for transform in reversed(transforms):
            run = transform(run)

    for compose in (wrong, lambda: lm.compose(*transforms)):
        with pytest.raises(errors.OrderError, match="must be inside") as caught:
            compose()
        nested, composed = written_in(str(caught.value))
        assert repr(nested) == repr(composed)
    assert sorted(t.name for t in composed.transforms) == sorted(t.name for t in transforms)


def test_another_librarys_engine_is_not_compiled() -> None:
    for compose in (lambda: lm.compose(lm.compile(), lm.deepspeed({})), lambda: lm.compile()(lm.deepspeed({})(step))):
        with pytest.raises(errors.OrderError, match=r"cannot be combined with lm.deepspeed: .*deepcompile"):
            compose()


@pytest.mark.parametrize("other", [lm.unroll(2), lm.guard(), lm.donate(), lm.ensemble(2), lm.sweep(lr=[0.1])])
def test_what_cannot_stand_beside_an_engine_is_told_when_it_is_composed(other: lm.Transform) -> None:
    for order in ((other, lm.deepspeed({})), (lm.deepspeed({}), other)):
        with pytest.raises(errors.OrderError, match=re.escape(f"{other!r} cannot be combined with lm.deepspeed: ")):
            lm.compose(*order)


def test_a_transform_twice() -> None:
    with pytest.raises(errors.OrderError, match="accumulate is applied twice"):
        lm.accumulate(2)(lm.accumulate(3)(step))


@pytest.mark.parametrize(
    "transform",
    [lm.guard(), lm.ema(0.9), lm.dp_sgd(1.0, 1.0), lm.precision("fp16")],
    ids=lambda t: t.name,
)
def test_a_missing_slot(transform: lm.Transform) -> None:
    with pytest.raises(errors.SlotError, match=rf"{transform.name} has no slot.*state = step.init\(state\)"):
        transform(step)(make_state(), make_batch())


def test_a_missing_slot_is_a_key_error_and_reads_well() -> None:
    with pytest.raises(KeyError) as caught:
        lm.ema.params(make_state())
    assert str(caught.value).startswith("ema has no slot in this state (it has none).")


def test_a_state_without_slots() -> None:
    @lm.dataclass
    class Bare:
        params: Any
        step: Any

    with pytest.raises(errors.StateError, match=r"Bare has no such field.*slots: dict"):
        lm.ema(0.9).init(Bare({"w": torch.ones(1)}, torch.tensor(0)))


@pytest.mark.parametrize("pattern", ["layers.*", nn.Conv2d, lambda name, module: False])
def test_remat_of_nothing(pattern: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(errors.PatternError, match="matches no module of Sequential; its modules are 0, 1"):
        lm.remat(pattern)(step)(make_state(net), make_batch())


@pytest.mark.skipif(not hasattr(lm.optim, "partition"), reason="partition is not there yet")
def test_partition_with_an_unknown_pattern() -> None:
    tx = lm.optim.partition({"encoder.*": lm.optim.sgd(0.1), "*": lm.optim.adamw(1e-3)})
    with pytest.raises(errors.PatternError, match=r"encoder\.\*.*weight"):
        tx.init(make_state().params)


@pytest.mark.skipif(not hasattr(lm.optim, "freeze"), reason="freeze is not there yet")
def test_freeze_with_an_unknown_pattern() -> None:
    with pytest.raises(errors.PatternError, match=r"encoder\.\*.*weight"):
        lm.optim.chain(lm.optim.freeze("encoder.*"), lm.optim.sgd(0.1)).init(make_state().params)


def test_decay_mask_with_an_unknown_pattern() -> None:
    with pytest.raises(errors.PatternError, match="encoder"):
        lm.optim.adamw(1e-3, decay_mask="encoder.*").init(make_state().params)


def test_sweep_of_an_unknown_name() -> None:
    with pytest.raises(
        errors.PatternError, match=r"the state has no 'momentum' to sweep over.*hyperparameters are lr.*as a tensor"
    ):
        lm.sweep(momentum=[0.1, 0.9]).init(make_state())


def test_sweep_of_unequally_many_values() -> None:
    with pytest.raises(errors.PatternError, match=r"the same number of values.*'lr': 2, 'seed': 3"):
        lm.sweep(lr=[1, 2], seed=[1, 2, 3])


@pytest.mark.parametrize("name", ["lr", "scheduled_lr"])
def test_sweep_of_a_learning_rate_that_is_a_schedule(name: str) -> None:
    state = lm.TrainState.create(nn.Linear(3, 2), lm.optim.adamw(lm.optim.cosine(0.1, 10)))
    with pytest.raises(errors.PatternError, match=r"is a schedule.* lm\.sweep\(factor=\[0\.3, 1\.0, 3\.0\]\)"):
        lm.sweep(**{name: [0.1, 0.2]}).init(state)


@pytest.mark.parametrize("count", [2, 4])
def test_ensemble_of_another_number_of_states(count: int) -> None:
    with pytest.raises(errors.StateError, match=rf"ensemble\(3\).init got {count} states"):
        lm.ensemble(3).init([make_state()] * count)


def test_ensemble_of_different_models() -> None:
    with pytest.raises(errors.StateError, match=r"lanes 0 and 1 differ in apply_fn.module \(bias on one side only"):
        lm.ensemble(2).init([make_state(), make_state(nn.Linear(4, 2, bias=False))])


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: lm.clip(), errors.HyperparameterError),
        (lambda: lm.clip(1.0, value=1.0), errors.HyperparameterError),
        (lambda: lm.clip(math.nan), errors.HyperparameterError),
        (lambda: lm.ema(1.0), errors.HyperparameterError),
        (lambda: lm.ema(math.nan), errors.HyperparameterError),
        (lambda: lm.guard("ignore"), errors.HyperparameterError),
        (lambda: lm.precision("int8"), errors.HyperparameterError),
        (lambda: lm.precision(16), errors.HyperparameterError),
        (lambda: lm.dp_sgd(clip=math.nan, noise=1.0), errors.HyperparameterError),
        (lambda: lm.dp_sgd(clip=1.0, noise=-1.0), errors.HyperparameterError),
        (lambda: lm.dp_sgd(clip=1.0, noise=1.0, batch_size=0), errors.HyperparameterError),
        (lambda: lm.compile(mode="fastest"), errors.HyperparameterError),
        (lambda: lm.compile(backend="jax"), errors.HyperparameterError),
        (lambda: lm.unroll(0), errors.BatchError),
        (lambda: lm.ensemble(0), errors.StateError),
    ],
)
def test_a_bad_setting_is_refused_when_it_is_given(make: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


def test_private_with_batchnorm_in_training_mode() -> None:
    run = lm.dp_sgd(1.0, 0.0)(step)
    state = run.init(make_state(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))))
    with pytest.raises(errors.PurityError, match=r"module '1' is a BatchNorm1d in training mode.*GroupNorm"):
        run(state, make_batch())


def test_private_with_loss_scaling() -> None:
    with pytest.raises(errors.HyperparameterError, match=r'scales the loss.*lm.precision\("bf16"\)'):
        lm.dp_sgd(1.0, 1.0)(lm.precision("fp16")(step))


def test_tx_update_by_hand_under_a_transform_that_must_see_it() -> None:
    def by_hand(state: lm.TrainState, batch: Any) -> Any:
        loss, grads = lm.value_and_grad(loss_of(state))(state.params, batch)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
        params = lm.optim.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state), {"loss": loss}

    by_hand(make_state(), make_batch())
    with pytest.raises(errors.UpdateInterceptedError, match=r"lm.apply_gradients"):
        lm.clip(1.0)(by_hand)(make_state(), make_batch())


# --------------------------------------------------------------------------------------------- donation


@pytest.mark.parametrize("stack", [(), (lm.compile(backend="eager"),), (lm.accumulate(2),)], ids=len)
def test_a_donated_state_used_again(stack: tuple[lm.Transform, ...]) -> None:
    run = lm.compose(*stack, lm.donate())(step)
    state = run.init(make_state())
    run(state, make_batch())
    for use in (lambda: state.params, lambda: run(state, make_batch()), lambda: state.replace(step=0)):
        with pytest.raises(errors.DonatedError):
            use()
    with pytest.raises(
        errors.DonatedError, match=r"state.params was read after.*state, metrics = step\(state, batch\)"
    ):
        _ = state.params


def test_a_donated_state_used_again_inside_the_step() -> None:
    def looks_back(state: lm.TrainState, batch: Any) -> Any:
        new, metrics = step(state, batch)
        moved = new.params["weight"] - state.params["weight"]
        return new, {**metrics, "moved": moved.norm()}

    looks_back(make_state(), make_batch())
    run = lm.donate()(looks_back)
    with pytest.raises(errors.DonatedError, match="inside a step read what you need before"):
        run(run.init(make_state()), make_batch())


@lm.dataclass
class WithTarget(lm.TrainState):
    """A state with a second copy of the params."""

    target: Any = None


def test_an_aliased_leaf_under_donate() -> None:
    state = make_state()
    state = WithTarget(
        **{k: v for k, v in vars(state).items() if k != "target"}, target={"weight": state.params["weight"]}
    )
    with pytest.raises(
        errors.DonatedError,
        match=r"state.target\[weight\] and state.params\[weight\] are the same memory.*clone",
    ):
        lm.donate()(step)(state, make_batch())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_sets_an_alias_under_donate(compiled: bool) -> None:
    def syncs(state: WithTarget, batch: Any) -> Any:
        new, metrics = step(state, batch)
        return new.replace(target=new.params), metrics

    run = lm.compose(*((lm.compile(backend="eager"),) if compiled else ()), lm.donate())(syncs)
    plain = make_state()
    state = run.init(WithTarget(**vars(plain), target=lm.tree.map(torch.clone, plain.params)))
    if compiled:  # the new values are copied into the old memory, so no two leaves can share it
        new, _ = run(state, make_batch())
        assert torch.equal(new.target["weight"], new.params["weight"])
        assert new.target["weight"].data_ptr() != new.params["weight"].data_ptr()
        return
    with pytest.raises(errors.DonatedError, match="same memory"):
        run(state, make_batch())


def test_an_old_leaf_in_another_place_under_donate_and_compile() -> None:
    def swaps(state: WithTarget, batch: Any) -> Any:
        return state.replace(params=state.target, target=state.params), {}

    run = lm.compose(lm.compile(backend="eager"), lm.donate())(swaps)
    plain = make_state()
    state = run.init(WithTarget(**vars(plain), target=lm.tree.map(torch.clone, plain.params)))
    with pytest.raises(
        errors.DonatedError, match=r"old state.target\[weight\] as the new state.params\[weight\].*clone"
    ):
        run(state, make_batch())


# ------------------------------------------------------------------------------------------ collectives


class Processes:
    """A process axis of two, which must never be reached from inside vmap."""

    size = 2
    process = True

    def index(self) -> Tensor:
        return torch.tensor(0)

    def reduce(self, x: Tensor, op: str) -> Tensor:
        assert not torch._C._functorch.is_functorch_wrapped_tensor(x)
        return 2 * x


@pytest.mark.parametrize("collective", [lm.psum, lm.pmean, lm.pmax, lm.pmin], ids=lambda f: f.__name__)
@pytest.mark.parametrize("around", [torch.func.vmap, torch.func.grad], ids=lambda f: f.__name__)
def test_a_process_collective_inside_a_functorch_transform(collective: Any, around: Any) -> None:
    x = torch.ones(3) if around is torch.func.vmap else torch.tensor(1.0)
    with (
        rules.bound_axis("data", Processes()),
        pytest.raises(errors.AxisError, match=r"process axis 'data'.*after lm.value_and_grad"),
    ):
        around(lambda v: collective(v, "data"))(x)


def test_a_process_collective_outside_works() -> None:
    with rules.bound_axis("data", Processes()):
        assert float(lm.psum(torch.tensor(1.0), "data")) == 2.0


def test_every_error_is_a_lumen_error() -> None:
    classes = [c for n, c in vars(errors).items() if n[0] != "_" and isinstance(c, type) and issubclass(c, Exception)]
    assert all(issubclass(c, lm.LumenError) or issubclass(c, Warning) for c in classes)


def test_a_state_of_one_run_is_not_one_of_lanes() -> None:
    with pytest.raises(errors.StateError, match=r"state = step.init\(state\)"):
        lm.ensemble(2)(step)(make_state(), make_batch())


def test_what_several_processes_refuse_is_refused_alone() -> None:
    with pytest.raises(errors.PatternError, match="matches no module"):
        lm.fsdp(wrap="layers.*")(step).init(make_state())
    with pytest.raises(errors.OrderError, match="lm.compile cannot trace"):
        lm.compose(lm.compile(), lm.fsdp(offload=True))(step).init(make_state())
