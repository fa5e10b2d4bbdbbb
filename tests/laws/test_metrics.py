"""Metrics from torchmetrics as values: associative, pure, and at home wherever typed values travel."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import classification as cl
from torchmetrics import regression

import lumen as lm
import lumen.metrics.torchmetrics as handles
from lumen.core import rules
from lumen.core.collectives import LaneAxis
from lumen.errors import AxisError, MetricError
from lumen.metrics import from_torchmetrics

# Torchmetrics warns where a class has no rows, which small random batches do not care about.
MISSING_CLASS = "ignore:No (positive|negative) samples in targets:UserWarning"

MAKERS = {
    "accuracy": lambda: cl.MulticlassAccuracy(3),
    "auroc": lambda: cl.MulticlassAUROC(3),
    "confusion": lambda: cl.MulticlassConfusionMatrix(3),
    "collection": lambda: torchmetrics.MetricCollection([cl.MulticlassAccuracy(3), cl.MulticlassF1Score(3)]),
}


def rows(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=random), torch.randint(3, (n,), generator=random)


def same(a: Any, b: Any) -> bool:
    first, second = lm.tree.leaves(a), lm.tree.leaves(b)
    return len(first) == len(second) and all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


LOGITS = {
    "BinaryAccuracy": (cl.BinaryAccuracy, ()),
    "BinaryAUROC": (lambda: cl.BinaryAUROC(thresholds=11), ()),
    "BinaryCalibrationError": (cl.BinaryCalibrationError, ()),
    "MultilabelF1": (lambda: cl.MultilabelF1Score(3), (3,)),
    "MulticlassAveragePrecision": (lambda: cl.MulticlassAveragePrecision(3, thresholds=11), (3,)),
    "Collection": (lambda: torchmetrics.MetricCollection([cl.BinaryAccuracy(), cl.BinaryF1Score()]), ()),
}


@pytest.mark.filterwarnings(MISSING_CLASS)
@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_logits_in_every_batch(name: str) -> None:
    make, shape = LOGITS[name]
    random = torch.Generator().manual_seed(0)
    preds = torch.randn(12, *shape, generator=random).abs() * 0.4  # some rows lie in [0, 1], others do not
    preds[::5] += 2
    target = torch.randint(3 if name.startswith("Multiclass") else 2, preds.shape, generator=random)
    target = target[:, 0] if name.startswith("Multiclass") else target
    whole = make()
    whole.update(preds, target)
    sure, guessing = from_torchmetrics(make(), logits=True), from_torchmetrics(make())
    for size in (12, 3, 1):
        parts = zip(preds.split(size), target.split(size), strict=True)
        values = [(sure.of(p, t), sure.update(sure.init(), preds=p, target=t), guessing.of(p, t)) for p, t in parts]
        by_place, by_name, guessed = (lm.merge_metrics([{"m": each[i]} for each in values])["m"] for i in range(3))
        torch.testing.assert_close(by_place.compute(), whole.compute())
        assert same(by_place.compute(), by_name.compute())
        if size == 12:
            assert same(guessed.compute(), whole.compute())
            continue
        back = guessing.unpack(guessing.pack(guessed))
        with pytest.warns(lm.InexactWarning, match=r"as in \d of .*logits=True"):
            back.compute()


def test_probabilities_and_labels_are_not_guessed_at() -> None:
    handle = from_torchmetrics(cl.BinaryAccuracy(validate_args=False))
    target = torch.tensor([0, 1, 1])
    value = handle.of(torch.tensor([0.0, 0.7, 1.0]), target).merge(handle.of(torch.tensor([0, 1, 0]), target))
    assert (int(value.as_logits), int(value.updates)) == (0, 2)
    assert float(value.compute()) == pytest.approx(5 / 6)
    assert from_torchmetrics(cl.MulticlassAccuracy(3)).init().as_logits == ()
    with pytest.raises(MetricError, match="not for MeanSquaredError"):
        from_torchmetrics(regression.MeanSquaredError(), logits=True)
    with pytest.raises(MetricError, match="some take a sigmoid"):
        from_torchmetrics(torchmetrics.MetricCollection([cl.BinaryAccuracy(), cl.MulticlassAUROC(3)]), logits=True)


class Boxes(torchmetrics.Metric):
    """Takes lists of dicts, as detection does: an image without boxes is a row all the same."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, found: list[dict[str, Tensor]], real: bool) -> None:
        self.images += len(found)

    def compute(self) -> Tensor:
        return self.images


def test_a_batch_without_rows_is_no_update() -> None:
    accuracy = from_torchmetrics(cl.MulticlassAccuracy(3))
    nothing = accuracy.of(*rows(0))
    assert same(nothing, accuracy.init())
    boxes = from_torchmetrics(Boxes())
    no_boxes = {"boxes": torch.zeros(0, 4)}
    assert int(boxes.of([no_boxes, no_boxes], real=True).compute()) == 2
    assert int(boxes.of([], real=True).updates) == 0
    assert int(from_torchmetrics(torchmetrics.SumMetric()).of(3.0).compute()) == 3
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        accuracy.of(rows(0)[0], rows(2)[1])  # a mistake is torchmetrics' to report

    total = from_torchmetrics(torchmetrics.SumMetric(nan_strategy="disable"))
    lanes, full = (torch.func.vmap(total.of)(torch.ones(4, size)) for size in (0, 3))
    assert lanes.updates.tolist() == [0] * 4
    assert lanes.merge(full).compute().tolist() == [3.0] * 4


@pytest.mark.filterwarnings(MISSING_CLASS)
@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_merge_is_associative_with_init_as_its_unit(name: str, sizes: list[int], seed: int) -> None:
    metric = from_torchmetrics(MAKERS[name]())
    data = [rows(n, seed + i) for i, n in enumerate(sizes)]
    x, y, z = (metric.of(logits.softmax(-1), target) for logits, target in data)
    assert same(x.merge(y).merge(z), x.merge(y.merge(z)))
    assert same(x.merge(y).merge(z).compute(), metric.merge(x, y, z).compute())
    assert same(metric.init().merge(x).states, x.states)
    assert same(x.merge(metric.init()).states, x.states)


@pytest.mark.filterwarnings(MISSING_CLASS)
@pytest.mark.parametrize("name", MAKERS)
def test_nothing_that_was_given_changes(name: str) -> None:
    original = MAKERS[name]()
    original.update(*rows(9))
    before = copy.deepcopy(original)
    metric = from_torchmetrics(original)
    first = metric.of(*rows(5, 1))
    kept = lm.tree.map(torch.clone, first)
    data = rows(9, 2)
    given_before = lm.tree.map(torch.clone, data)
    second = metric.update(first, *data)
    first.merge(second).compute()
    metric.update(first.merge(second), *data)
    assert same(first, kept)
    assert same(data, given_before)
    assert same(original.compute(), before.compute())
    original.update(*data)
    original.reset()
    assert same(metric.of(*data).compute(), from_torchmetrics(MAKERS[name]()).of(*data).compute())


def test_no_history_is_kept() -> None:
    metric = from_torchmetrics(cl.MulticlassAUROC(3))
    logits, y = rows(5)
    logits.requires_grad_()
    value = metric.update(metric.of(logits * 2, y), logits * 2, y)
    assert not any(leaf.requires_grad for leaf in lm.tree.leaves(value))
    errors = from_torchmetrics(regression.MeanSquaredError())
    assert not errors.of(logits[:, 0], y.float()).compute().requires_grad


@pytest.mark.filterwarnings(MISSING_CLASS)
def test_a_value_is_a_pytree_for_lumen_and_for_torch() -> None:
    metric = from_torchmetrics(cl.MulticlassAUROC(3))
    value = metric.of(*rows(4)).merge(metric.of(*rows(3)))
    leaves, spec = lm.tree.flatten(value)
    assert same(lm.tree.unflatten(spec, leaves).compute(), value.compute())
    torch_leaves, torch_spec = torch.utils._pytree.tree_flatten(value)
    assert same(torch.utils._pytree.tree_unflatten(torch_leaves, torch_spec).compute(), value.compute())
    assert same(copy.deepcopy(value).merge(value).compute(), value.merge(value).compute())


def model() -> tuple[lm.TrainState, dict[str, Tensor]]:
    torch.manual_seed(0)
    state = lm.TrainState.create(lm.pure(torch.nn.Linear(4, 3)), lm.optim.sgd(0.1), seed=0)
    return state, {"x": torch.randn(11, 4), "y": torch.randint(3, (11,))}


def step_with(**metrics: Any) -> Any:
    def step(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any, batch: Any) -> Any:
            logits, _ = state.apply(params, batch["x"])
            found = {name: metric.of(logits, batch["y"]) for name, metric in metrics.items()}
            return lm.Mean.of(F.cross_entropy(logits, batch["y"], reduction="none")), lm.Aux(metrics=found)

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss, **aux.metrics}

    return step


def test_microbatches_give_the_metric_of_the_batch() -> None:
    step = step_with(**{name: from_torchmetrics(MAKERS[name]()) for name in MAKERS})
    state, batch = model()
    _, whole = step(state, batch)
    _, parts = lm.accumulate(3)(step)(state, batch)
    expected, found = lm.compute_metrics(whole), lm.compute_metrics(parts)
    for name in MAKERS:
        torch.testing.assert_close(found[name], expected[name])
    assert lm.check_purity(step, state, batch) is None


def test_torch_func_gives_the_same_metric() -> None:
    metric = from_torchmetrics(cl.MulticlassAUROC(3))
    state, batch = model()

    def loss_fn(params: Any, batch: Any) -> Any:
        logits, _ = state.apply(params, batch["x"])
        return F.cross_entropy(logits, batch["y"]), lm.Aux(metrics={"auroc": metric.of(logits, batch["y"])})

    answers = [
        lm.value_and_grad(loss_fn, has_aux=True, engine=engine)(state.params, batch)[0][1].metrics["auroc"]
        for engine in ("func", "autograd")
    ]
    assert same(*answers)
    assert not any(leaf.requires_grad for leaf in lm.tree.leaves(answers))


@pytest.mark.parametrize("name", ["accuracy", "confusion", "mse"])
def test_compiled_steps_return_it(name: str) -> None:
    makers = {
        "accuracy": lambda: cl.MulticlassAccuracy(3),
        "confusion": lambda: cl.MulticlassConfusionMatrix(3, validate_args=False),
        "mse": regression.MeanSquaredError,
    }
    metric = from_torchmetrics(makers[name]())
    state, batch = model()

    def step(state: Any, batch: Any) -> Any:
        logits, _ = state.apply(state.params, batch["x"])
        given = (logits, batch["y"]) if name != "mse" else (logits[:, 0], batch["x"][:, 0])
        return state, {"m": metric.of(*given)}

    fast = lm.compile(backend="eager")(step)
    for _ in range(2):
        _, found = fast(state, batch)
        _, expected = step(state, batch)
        torch.testing.assert_close(found["m"].compute(), expected["m"].compute())
    torch.testing.assert_close(found["m"].merge(found["m"]).compute(), expected["m"].merge(expected["m"]).compute())


def test_a_metric_that_looks_at_values_leaves_the_step_uncompiled() -> None:
    metric = from_torchmetrics(cl.MulticlassAUROC(3))
    state, batch = model()
    step = step_with(auroc=metric)
    with pytest.warns(lm.GraphBreakWarning, match="needs the value of a tensor"):
        _, found = lm.compile(backend="eager")(step)(state, batch)
    assert same(found["auroc"].compute(), step(state, batch)[1]["auroc"].compute())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap's own, about bincount
@pytest.mark.parametrize("make", [lambda: cl.MulticlassAccuracy(3, validate_args=False), regression.MeanSquaredError])
def test_lanes_of_a_vmap_have_a_value_each(make: Any) -> None:
    metric = from_torchmetrics(make())
    x, y = torch.randint(3, (4, 6)), torch.randint(3, (6,))
    if isinstance(make(), regression.MeanSquaredError):
        x, y = x.float(), y.float()
    value = torch.func.vmap(metric.of, in_dims=(0, None))(x, y)
    alone = [metric.of(lane, y) for lane in x]
    torch.testing.assert_close(value.compute(), torch.stack([each.compute() for each in alone]))
    torch.testing.assert_close(value.merge(value).compute(), value.compute())

    def over_lanes(lane: Tensor, x: Tensor) -> Any:
        with rules.bound_axis("lanes", LaneAxis(4, lane)):
            return metric.of(x, y).psum("lanes")

    reduced = torch.func.vmap(over_lanes)(torch.arange(4), x)
    torch.testing.assert_close(reduced.compute(), metric.merge(*alone).compute().expand(4))


def test_lists_of_lanes_stay_apart() -> None:
    metric = from_torchmetrics(torchmetrics.CatMetric(nan_strategy="disable"))
    x = torch.arange(6.0).reshape(2, 3)
    value = torch.func.vmap(metric.of)(x)
    assert torch.equal(value.merge(value).compute(), torch.cat([x, x], dim=1))


def test_what_needs_values_says_so_under_vmap() -> None:
    metric = from_torchmetrics(cl.MulticlassAUROC(3))
    with pytest.raises(MetricError, match="cannot run under vmap.*validate_args=False"):
        torch.func.vmap(metric.of)(*[each[None] for each in rows(4)])


def test_psum_without_the_axis_is_the_value_and_lists_cannot_be_reduced() -> None:
    metric = from_torchmetrics(cl.MulticlassAUROC(3, validate_args=False))
    value = metric.of(*rows(4))
    assert value.psum("lanes") is value
    with rules.bound_axis("lanes", LaneAxis(1, torch.zeros(()))), pytest.raises(AxisError, match="'preds'.*thresholds"):
        value.psum("lanes")


def test_means_maxima_and_minima_are_reduced_over_lanes() -> None:
    class Range(torchmetrics.Metric):
        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("top", torch.tensor(-torch.inf), dist_reduce_fx="max")
            self.add_state("low", torch.tensor(torch.inf), dist_reduce_fx="min")
            self.add_state("mid", torch.tensor(0.0), dist_reduce_fx="mean")

        def update(self, x: Tensor) -> None:
            self.top, self.low = torch.maximum(self.top, x.amax()), torch.minimum(self.low, x.amin())
            self.mid = x.mean()

        def compute(self) -> Tensor:
            return torch.stack([self.top, self.low, self.mid])

    metric = from_torchmetrics(Range())
    x = torch.arange(12.0).reshape(3, 4)

    def over_lanes(lane: Tensor, x: Tensor) -> Any:
        with rules.bound_axis("lanes", LaneAxis(3, lane)):
            return metric.of(x).psum("lanes")

    reduced = torch.func.vmap(over_lanes)(torch.arange(3), x)
    assert torch.equal(reduced.compute(), torch.tensor([[11.0, 0.0, 5.5]] * 3))
    assert torch.equal(metric.merge(*[metric.of(each) for each in x]).compute(), torch.tensor([11.0, 0.0, 5.5]))


def test_threads_do_not_meet() -> None:
    metric = from_torchmetrics(cl.MulticlassAUROC(3))
    expected = [metric.of(*rows(40, seed)).compute() for seed in range(4)]
    found: dict[int, list[Tensor]] = {}

    def work(seed: int) -> None:
        found[seed] = [metric.of(*rows(40, seed)).compute() for _ in range(20)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected[seed]) for seed in range(4) for each in found[seed])


def test_merging_many_copies_each_entry_once(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = from_torchmetrics(torchmetrics.CatMetric())
    value, join = metric.of(torch.ones(1)), handles.merge_states
    copied: list[int] = []

    def counted(slot: Any, contents: list[Any]) -> Any:
        copied.append(sum(map(len, contents)))
        return join(slot, contents)

    monkeypatch.setattr(handles, "merge_states", counted)
    merged = lm.merge_metrics([{"m": value}] * 50)["m"]
    assert copied == [50]
    assert merged.compute().tolist() == [1.0] * 50
    functools.reduce(metric.merge, [value] * 50)  # two by two
    assert sum(copied) == 50 + sum(range(2, 51))


def test_torchmetrics_warnings_are_heard_when_they_are_true() -> None:
    metric = from_torchmetrics(regression.MeanSquaredError())
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        metric.init().compute()
    one = metric.of(torch.ones(2), torch.zeros(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(metric.init().merge(one).compute()) == 1.0
    with pytest.warns(UserWarning, match="nan"):
        from_torchmetrics(torchmetrics.MeanMetric(nan_strategy="warn")).of(torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize("groups", [True, False, [["precision", "recall"], ["auroc"]], "found"])
def test_a_collection_answers_as_torchmetrics_does(groups: Any) -> None:
    members = {"precision": cl.MulticlassPrecision(3), "recall": cl.MulticlassRecall(3), "auroc": cl.MulticlassAUROC(3)}
    original = torchmetrics.MetricCollection(members, compute_groups=groups != "found" and groups, prefix="val/")
    if groups == "found":
        original = torchmetrics.MetricCollection(members, prefix="val/")
        original.update(*rows(30))
    metric = from_torchmetrics(original)
    fresh = original.clone()
    fresh.reset()
    fresh.update(*rows(9, 1))
    fresh.update(*rows(5, 2))
    found = metric.of(*rows(9, 1)).merge(metric.of(*rows(5, 2))).compute()
    assert found.keys() == fresh.compute().keys() == {"val/precision", "val/recall", "val/auroc"}
    torch.testing.assert_close(found, fresh.compute())
    shared = groups in ("found", [["precision", "recall"], ["auroc"]])
    assert len(metric.init().states) == (6 if shared else 10)


def test_chance_makes_no_compute_group() -> None:
    """On a batch without errors, macro and weighted states agree; the next batch tells them apart."""
    members = {"any": cl.MulticlassAccuracy(3, ignore_index=0), "all": cl.MulticlassAccuracy(3)}
    metric = from_torchmetrics(torchmetrics.MetricCollection(members))
    first = (torch.tensor([1, 2]), torch.tensor([1, 2]))
    second = (torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    found = metric.update(metric.of(*first), *second).compute()
    for name, member in members.items():
        alone = from_torchmetrics(member)
        torch.testing.assert_close(found[name], alone.update(alone.of(*first), *second).compute())


def test_labels_beside_the_states_travel_along() -> None:
    class Labeled(torchmetrics.SumMetric):
        kind: Any = None

        def update(self, value: Tensor) -> None:
            self.kind = value.dtype
            super().update(value)

        def compute(self) -> Tensor:
            return super().compute().to(self.kind)

    metric = from_torchmetrics(Labeled())
    value = metric.init().merge(metric.of(torch.ones(2, dtype=torch.float64)))
    assert value.compute().dtype == torch.float64
    with pytest.raises(MetricError, match="'kind'.*cannot be saved"):
        metric.pack(value)


def test_memory_outside_the_states_is_refused() -> None:
    class Counting(torchmetrics.SumMetric):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []
            self.calls = 0

        def update(self, value: Tensor) -> None:
            self.remember(value)
            super().update(value)

        def remember(self, value: Tensor) -> None:
            self.calls += 1

    class Keeping(Counting):
        def remember(self, value: Tensor) -> None:
            self.seen.append(value)

    for kind, name in ((Counting, "calls"), (Keeping, "seen")):
        metric = from_torchmetrics(kind())
        for _ in range(2):  # the second time as well: nothing leaked into the handle
            with pytest.raises(MetricError, match=f"{kind.__name__} keeps '{name}'.*add_state"):
                metric.of(torch.ones(1))
    with pytest.raises(MetricError, match="MinMaxMetric keeps 'm"):
        from_torchmetrics(torchmetrics.MinMaxMetric(regression.MeanSquaredError())).of(
            torch.ones(2), torch.zeros(2)
        ).compute()


def test_values_of_different_handles_do_not_merge() -> None:
    first, second = (from_torchmetrics(regression.MeanSquaredError()) for _ in range(2))
    data = torch.ones(2), torch.zeros(2)
    with pytest.raises(MetricError, match="call from_torchmetrics once, outside the step"):
        first.of(*data).merge(second.of(*data))
    with pytest.raises(MetricError, match="takes its own values, not Mean"):
        first.compute(lm.Mean.of(torch.ones(1)))


def test_what_is_no_metric_is_refused() -> None:
    with pytest.raises(MetricError, match="not the class MeanMetric"):
        from_torchmetrics(torchmetrics.MeanMetric)
    with pytest.raises(MetricError, match="not Linear"):
        from_torchmetrics(torch.nn.Linear(1, 1))


def test_what_was_packed_by_another_metric_is_refused() -> None:
    packed = from_torchmetrics(regression.MeanSquaredError()).of(torch.ones(2), torch.zeros(2))
    with pytest.raises(MetricError, match="'preds' is missing"):
        from_torchmetrics(cl.MulticlassAUROC(3)).unpack(packed.metric.pack(packed))


def test_evaluation_reports_it_by_name() -> None:
    state, batch = model()
    accuracy = from_torchmetrics(cl.MulticlassAccuracy(3, average="micro"))
    both = from_torchmetrics(MAKERS["collection"]())

    def eval_step(state: Any, batch: Any) -> Any:
        logits, _ = state.apply(state.params, batch["x"])
        return {"accuracy": accuracy.of(logits, batch["y"]), "both": both.of(logits, batch["y"])}

    batches = [{name: each[a:b] for name, each in batch.items()} for a, b in ((0, 5), (5, 9), (9, 11))]
    found = lm.evaluate(eval_step, state, batches)
    expected = lm.compute_metrics(eval_step(state, batch))
    assert found["accuracy"] == pytest.approx(float(expected["accuracy"]))
    assert found["both/MulticlassF1Score"] == pytest.approx(float(expected["both"]["MulticlassF1Score"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_live_where_the_data_are() -> None:
    metric = from_torchmetrics(cl.MulticlassAUROC(3, thresholds=5))
    data = rows(20)
    on_gpu = metric.of(*[each.cuda() for each in data])
    assert all(leaf.is_cuda for leaf in lm.tree.leaves(on_gpu))
    torch.testing.assert_close(on_gpu.compute().cpu(), metric.of(*data).compute())
    moved = metric.update(metric.init(), *[each.cuda() for each in data])
    assert torch.equal(moved.compute(), on_gpu.compute())
