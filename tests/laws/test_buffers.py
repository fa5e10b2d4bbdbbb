"""Buffers that a model changes: microbatches hand them on, rows under `private` are merged by rules, else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lumen as lm
from lumen.core.buffers import Origin
from lumen.core.undeclared_buffers import Undeclared
from lumen.errors import HyperparameterError, MergeError, ParamsError, PatternError

from .models import assert_same

ROWS = torch.arange(14.0, dtype=torch.float64).reshape(7, 2).flip(0) - 4

RULES = {
    "rows": "sum",
    "total": "sum",
    "means": "mean",
    "high": "max",
    "low": "min",
    "any": "any",
    "calls": "first",
    "table": "sync",
}


class Seen(nn.Module):
    """One buffer for each rule, changed in place, by another tensor, and through `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, dtype=torch.float64)
        self.register_buffer("rows", torch.tensor(2))
        self.register_buffer("total", torch.ones(2, dtype=torch.float64))
        self.register_buffer("means", torch.ones(2, dtype=torch.float64))
        self.register_buffer("high", torch.tensor(3))
        self.register_buffer("low", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("any", torch.tensor(False))
        self.register_buffer("calls", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("fixed", torch.tensor([1.0, float("nan")]))

    def forward(self, x: Tensor) -> Tensor:
        shift = 0.01 * self.total.sum()  # what microbatches hand on is read, too
        self.rows += len(x)
        self.total = self.total + x.detach().sum(0)
        self.means.data.copy_((self.means + x.detach().mean(0)) / 2)
        self.high.copy_(torch.maximum(self.high, x.detach().amax().long()))
        self.low = torch.minimum(self.low, x.detach().amin(0))
        self.any |= (x.detach() > 7).any()
        self.calls += 1
        self.table[1] = 1.0
        return self.layer(x) + shift + self.fixed[0]


def step(state: Any, x: Tensor) -> tuple[Any, Any]:
    def loss_fn(params: Any, x: Tensor) -> Any:
        out, buffers = state.apply(params, x)
        return out.square().mean(), lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, x)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}


def made(merge: Any = None, net: type[nn.Module] = Seen) -> Any:
    torch.manual_seed(0)
    return lm.TrainState.create(net(), lm.optim.sgd(0.1), merge=merge)


def loop(state: Any, parts: Any) -> Any:
    """A raw loop over microbatches: the buffers that it leaves, and the mean gradient's update."""

    def loss_fn(params: Any, x: Tensor, buffers: Any) -> Any:
        out, new = state.apply_fn(params, buffers, x)
        return out.square().sum(), lm.Aux(buffers=new)

    totals: Any = lm.tree.map(torch.zeros_like, state.params)
    for part in parts:
        (_, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, part, state.buffers)
        totals = lm.tree.map(torch.add, totals, grads)
        state = state.replace(buffers=aux.buffers)
    return state.apply_gradients(lm.tree.map(lambda g: g / sum(map(len, parts)), totals))


@pytest.mark.parametrize("merge", [None, RULES])
def test_microbatches_hand_buffers_on_as_a_raw_loop_does(merge: Any) -> None:
    for k in (1, 2, 3):
        new, _ = lm.accumulate(k)(step)(made(merge), ROWS)
        wanted = loop(made(merge), torch.tensor_split(ROWS, k))
        assert torch.equal(new.buffers["fixed"].isnan(), wanted.buffers["fixed"].isnan())
        fixed = {"fixed": torch.zeros(2)}
        assert_same(
            (new.params, {**new.buffers, **fixed}), (wanted.params, {**wanted.buffers, **fixed}), tolerance=1e-12
        )


def test_each_gradient_of_a_step_begins_with_the_buffers_of_the_state() -> None:
    def twice(state: Any, x: Tensor) -> tuple[Any, Any]:
        first, _ = step(state, x)
        again, _ = step(state, x)
        second, _ = step(state.replace(buffers=first.buffers), x)
        return second, {"rows": lm.Last(again.buffers["rows"])}

    new, metrics = lm.accumulate(3)(twice)(made(), ROWS)
    assert int(metrics["rows"].compute()) == 2 + 7
    assert int(new.buffers["rows"]) == 2 + 7 + 7


def test_donated_compiled_and_in_lanes() -> None:
    wanted, _ = lm.accumulate(2)(step)(made(), ROWS)
    around = [[lm.donate()], [lm.compile(backend="eager"), lm.guard(), lm.donate()]]
    for transforms in around:
        wrapped = lm.compose(*transforms, lm.accumulate(2))(step)
        new = wrapped.export(wrapped(wrapped.init(made()), ROWS)[0])
        assert {name: b.tolist() for name, b in new.buffers.items() if name != "fixed"} == {
            name: b.tolist() for name, b in wanted.buffers.items() if name != "fixed"
        }
    lanes = lm.ensemble(2)(lm.accumulate(2)(step))
    for lane in lanes.export(lanes(lanes.init(made()), ROWS)[0]):
        torch.testing.assert_close(lane.buffers["total"], wanted.buffers["total"])
        assert int(lane.buffers["rows"]) == 9


def test_modules_of_torch_have_their_rules() -> None:
    net = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)),
        nn.BatchNorm1d(3),
        nn.InstanceNorm1d(3, track_running_stats=True),
    )
    merges = lm.pure(net).apply.merges
    assert {name: merge.rule for name, merge in merges.items()} == {
        "0.parametrizations.weight.0._u": "sync",
        "0.parametrizations.weight.0._v": "sync",
        **{
            f"{place}.{name}": rule
            for place in (1, 2)
            for name, rule in (("running_mean", "mean"), ("running_var", "mean"), ("num_batches_tracked", "max"))
        },
    }
    assert not any(merge.stepwise for merge in merges.values())


def test_spectral_norm_iterates_once_for_a_step() -> None:
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3, dtype=torch.float64)))

    new, _ = lm.accumulate(3)(step)(made(net=Net), ROWS)
    whole, _ = step(made(net=Net), ROWS)
    assert_same(new.buffers, whole.buffers)


def test_rows_of_private_are_merged_by_their_rules() -> None:
    """Each row begins with the start; the numbers are those of the rules, computed by hand."""
    wrapped = lm.dp_sgd(clip=1e6, noise=0.0, chunk=3)(step)
    start = made(RULES)
    new, _ = wrapped(wrapped.init(start), ROWS)
    assert int(new.buffers["rows"]) == 2 + 7
    torch.testing.assert_close(new.buffers["total"], 1 + ROWS.sum(0))
    torch.testing.assert_close(new.buffers["means"], (0.5 + 0.5 * ROWS).mean(0))
    torch.testing.assert_close(new.buffers["low"], ROWS.amin(0).clamp(max=0))
    assert int(new.buffers["high"]) == int(ROWS.amax())
    assert bool(new.buffers["any"])
    assert int(new.buffers["calls"]) == 1
    assert new.buffers["table"].tolist() == [0.0, 1.0, 0.0]
    both = lm.compose(lm.accumulate(2), lm.dp_sgd(clip=1e6, noise=0.0))(step)
    new, _ = both(both.init(made(RULES)), ROWS)
    assert int(new.buffers["rows"]) == 2 + 7
    torch.testing.assert_close(new.buffers["total"], 1 + ROWS.sum(0))


class Rebinding(nn.Linear):
    """A buffer that another tensor takes the place of."""

    def __init__(self) -> None:
        super().__init__(2, 1, dtype=torch.float64)
        self.register_buffer("count", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("fixed", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + x.detach().sum(0)
        return super().forward(x + self.fixed)


class InPlace(Rebinding):
    """A buffer that is written to."""

    def forward(self, x: Tensor) -> Tensor:
        self.count += x.detach().sum(0)
        return nn.Linear.forward(self, x + self.fixed)


@pytest.mark.parametrize("net", [Rebinding, InPlace])
def test_rows_of_private_need_a_rule(net: Any) -> None:
    wrapped = lm.dp_sgd(clip=1.0, noise=0.0)(step)
    with pytest.raises(MergeError, match=r"'count'.*merge=\{'count': 'mean'\}"):
        wrapped(wrapped.init(made(net=net)), ROWS)
    wrapped(wrapped.init(made({"count": "sum"}, net)), ROWS)


def test_what_no_module_returned_is_refused_where_it_differs() -> None:
    def counting(state: Any, x: Tensor) -> tuple[Any, Any]:
        def loss_fn(params: Any, x: Tensor) -> Any:
            return state.apply(params, x)[0].mean(), lm.Aux(buffers={"kept": ROWS, "own": x.sum()})

        (loss, _), _ = lm.value_and_grad(loss_fn, has_aux=True)(state.params, x)
        return state, {"loss": loss}

    with pytest.raises(MergeError, match=r"leaf 'own' that no module returned"):
        lm.accumulate(2)(counting)(made(), ROWS)


def test_a_buffer_that_the_loss_computes_from_the_new_one() -> None:
    def clamping(state: Any, x: Tensor) -> tuple[Any, Any]:
        def loss_fn(params: Any, x: Tensor) -> Any:
            out, new = state.apply(params, x)
            return out.mean(), lm.Aux(buffers={**new, "rows": new["rows"].clamp(max=8)})

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, x)
        return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}

    new, _ = lm.accumulate(3)(clamping)(made(), ROWS)
    assert int(new.buffers["rows"]) == 8


@pytest.mark.parametrize(
    ("merge", "error", "words"),
    [
        ({"*.rows": "sum"}, PatternError, "matches no buffer; the model's are rows, total"),
        ({"rows": "add"}, HyperparameterError, "'add'} is no rule for a buffer: 'sum' adds up"),
        ({"row*": "sum", "rows": "max"}, PatternError, "'rows' two rules"),
        ({"rows": "mean"}, HyperparameterError, "Write 'sum' or 'max'"),
        ({"any": "sum"}, HyperparameterError, "Write 'any'"),
        ({"total": "any"}, HyperparameterError, "Write 'max'"),
    ],
)
def test_a_rule_that_cannot_be(merge: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        lm.pure(Seen(), merge=merge)


def test_rules_are_said_where_the_model_is_taken_apart() -> None:
    with pytest.raises(ParamsError, match=r"lm\.pure\(net, merge="):
        lm.TrainState.create(lm.pure(Seen()), lm.optim.sgd(0.1), merge=RULES)  # type: ignore[arg-type]
    apply = lm.pure(Seen(), merge={"r*": "max"}).apply
    for each in (apply.eval(), apply.calling(Seen.forward)):
        assert each.merges["rows"].rule == "max"


def test_an_accelerator_is_asked_now_and_then_for_what_has_changed_since() -> None:
    """What an accelerator's buffers go through, here on the CPU: a change in the third step is told after the 4th."""
    undeclared = Undeclared("lm.ddp")
    start = {"a": torch.tensor([0.0, float("nan")]), "b": torch.tensor(False)}

    def look(**changed: Tensor) -> list[str]:
        undeclared._looks += 1
        found = [(Origin(name, x), changed.get(name, x.clone())) for name, x in start.items()]
        return [origin.name for origin in undeclared._changed_on_device(found, rows=False)]

    assert [look(), look(), look(b=torch.tensor(True)), look(a=torch.ones(2))] == [[], [], [], ["a"]]
    assert [look() for _ in range(4)] == [[]] * 4
    assert look(a=torch.ones(3)) == ["a"]
    assert [look() for _ in range(5)] == [[]] * 5
    assert look(b=torch.tensor(True)) == []
    assert look() == ["a", "b"]  # it was another step
