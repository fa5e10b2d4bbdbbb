"""Metrics that some steps return and others do not, and metrics that are logged once for each epoch."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
import torch
from torchmetrics import MeanMetric

import lumen as lm

BATCHES, EPOCHS = 7, 3
WEIGHTED = lm.metrics.from_torchmetrics(MeanMetric())


def step(state: Any, batch: Any) -> Any:
    x, index = batch["x"], int(batch["x"])
    metrics = {"x": x, "epoch": {"mean": lm.PerEpoch.of(x), "torch": lm.PerEpoch(WEIGHTED.of(x, x + 1))}}
    if index % 2:
        metrics["odd"] = x * 2
        metrics["nested"] = {"largest": lm.Max.of(x)}
    if index == 5:
        metrics["five"] = lm.Sum.of(x)
        metrics["epoch"] = {**metrics["epoch"], "five": lm.PerEpoch(lm.Last(x))}
    return {"w": state["w"] + x}, metrics


DATA = [{"x": torch.tensor(float(i))} for i in range(BATCHES)]


class StopAt(lm.Callback):
    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_step(self, view: lm.CallbackContext) -> None:
        if view.clock.step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def run(directory: Any, stop: int | None = None) -> list[dict[str, Any]]:
    runner = lm.Runner(
        step,
        log_every=4,
        progress=False,
        sinks=[lm.sinks.JSONL(directory / "metrics.jsonl")],
        checkpoint=lm.Checkpointer(directory),
        callbacks=[StopAt(stop)],
    )
    runner.fit({"w": torch.zeros(())}, DATA, until=lm.Epochs(EPOCHS), resume="auto")
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    timed = ("time", "steps_per_second", "goodput", "data_wait")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_names_come_and_go_and_epochs_have_their_own_means(tmp_path: Any) -> None:
    rows = run(tmp_path)
    by_step = {step: [row for row in rows if row["step"] == step] for step in (4, 7, 8)}
    assert by_step[4] == [
        {"step": 4, "epoch": 0, "train/x": 1.5, "train/odd": 4.0, "train/nested/largest": 3.0},
    ]
    weights = torch.arange(BATCHES) + 1.0
    mean = float((torch.arange(BATCHES) * weights).sum() / weights.sum())
    (epoch_end,) = by_step[7]
    assert epoch_end.pop("train/epoch/torch") == pytest.approx(mean)
    assert epoch_end == {"step": 7, "epoch": 1, "train/epoch/mean": 3.0, "train/epoch/five": 5.0}
    window = {"train/x": 3.75, "train/odd": 10.0, "train/nested/largest": 5.0, "train/five": 5.0}
    assert by_step[8] == [{"step": 8, "epoch": 1, **window}]
    assert [row["step"] for row in rows if "train/epoch/mean" in row] == [7, 14, 21]


def test_a_run_that_is_stopped_anywhere_logs_the_same(tmp_path: Any) -> None:
    wanted = run(tmp_path / "whole")
    parts = tmp_path / "parts"
    for stop in (2, 4, 6, 7, 9, 13, 15, 20):
        with pytest.raises(lm.Interrupted):
            run(parts, stop)
    assert run(parts) == wanted


def test_the_part_of_an_epoch_at_the_end_of_a_run_is_logged_and_kept_for_a_longer_one(tmp_path: Any) -> None:
    def fit(steps: int) -> lm.Result:
        runner = lm.Runner(step, log_every=4, progress=False, checkpoint=lm.Checkpointer(tmp_path))
        return runner.fit({"w": torch.zeros(())}, DATA, until=lm.Steps(steps), resume="auto")

    assert fit(3).metrics["train/epoch/mean"] == 1.0
    assert fit(7).metrics["train/epoch/mean"] == 3.0


def test_early_stopping_waits_for_the_epoch() -> None:
    stop = lm.EarlyStop(monitor="train/epoch/mean", patience=1)
    runner = lm.Runner(step, log_every=2, progress=False, callbacks=[stop])
    result = runner.fit({"w": torch.zeros(())}, DATA, until=lm.Epochs(5))
    assert (result.clock.epoch, result.reason) == (2, "train/epoch/mean has not improved on 3 for 1 report")


def test_logging_by_epochs() -> None:
    sink = lm.sinks.Memory()
    runner = lm.Runner(step, log_every=lm.Every(epochs=2), progress=False, sinks=[sink])
    runner.fit({"w": torch.zeros(())}, DATA, until=lm.Epochs(4))
    assert sink["train/x"] == ([14, 28], [3.0, 3.0])


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_microbatches_may_return_other_names(microbatches: int) -> None:
    def counting(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any, batch: Any) -> Any:
            metrics = {"all": lm.Sum.of(batch), "epoch": lm.PerEpoch(lm.Sum.of(batch))}
            if bool((batch > 2).any()):
                metrics["large"] = lm.Sum.of(batch[batch > 2])
            return (params * batch).mean(), lm.Aux(metrics=metrics)

        (loss, aux), _ = lm.value_and_grad(loss_fn, has_aux=True)(state, batch)
        return state, aux.metrics

    _, metrics = lm.accumulate(microbatches)(counting)(torch.ones(()), torch.arange(8.0))
    assert lm.compute_metrics(metrics) == {"all": 28.0, "epoch": 28.0, "large": 25.0}


def test_rows_may_not_come_and_go() -> None:
    def partial(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any, batch: Any) -> Any:
            return (params * batch).mean(), {"rows": batch} if float(batch[0]) else {}

        (loss, aux), _ = lm.value_and_grad(loss_fn, has_aux=True)(state, batch)
        return state, aux

    with pytest.raises(lm.LumenError, match=r"aux\['rows'\] is returned by some of the microbatches only"):
        lm.accumulate(2)(partial)(torch.ones(()), torch.arange(8.0))
