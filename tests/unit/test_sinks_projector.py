"""Params for TensorBoard's projector: what is written is what the params were, when it was due."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lumen as lm
from lumen.errors import PatternError, SinkError, ValueKindError


def projected(logdir: Path) -> dict[str, list[list[float]]]:
    """The tables that TensorBoard's projector lists, by their names."""
    text = (logdir / "projector_config.pbtxt").read_text()
    pairs = re.findall(r'embeddings \{\ntensor_name: "(.*)"\ntensor_path: "(.*)"\n\}', text)
    assert text.count("embeddings {") == len(pairs) == len(dict(pairs))
    tables = {name: (logdir / path).read_text().splitlines() for name, path in pairs}
    return {name: [[float(cell) for cell in row.split("\t")] for row in rows] for name, rows in tables.items()}


def fit(sink: Any, steps: int = 7, state: Any = None, **options: Any) -> lm.Result:
    def step(state: Any, x: Any) -> tuple[Any, Any]:
        loss, grads = lm.value_and_grad(lambda p, x: state.apply(p, x)[0].square().mean())(state.params, x)
        return state.apply_gradients(grads), {"loss": loss}

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    state = state or lm.TrainState.create(net, lm.optim.sgd(0.1))
    resume = options.pop("resume", "never")
    runner = lm.Runner(step, transforms=[lm.donate()], sinks=[sink], log_every=2, progress=False, **options)
    return runner.fit(state, [torch.ones(4, 2)] * 20, until=lm.Steps(steps), resume=resume)


def test_nothing_is_written_unless_it_is_asked_for(tmp_path: Path) -> None:
    fit(lm.sinks.TensorBoard(tmp_path))
    assert all("tfevents" in each.name for each in tmp_path.iterdir())


def test_the_end_of_a_run(tmp_path: Path) -> None:
    result = fit(lm.sinks.TensorBoard(tmp_path, embeddings=("*.weight",)))
    weights = {name: value.tolist() for name, value in result.state.params.items() if "weight" in name}
    assert projected(tmp_path) == {f"{name}:00007": value for name, value in weights.items()}


def test_every_so_many_steps_and_in_a_run_that_goes_on(tmp_path: Path) -> None:
    def sink(name: str) -> Any:
        return lm.sinks.TensorBoard(tmp_path / name, embeddings=["0.weight"], embed_every=3)

    fit(sink("whole"))
    found = projected(tmp_path / "whole")
    assert [*found] == ["0.weight:00004", "0.weight:00006", "0.weight:00007"], "the logging points after 3 and 6"
    assert found["0.weight:00004"] != found["0.weight:00006"]
    for steps in (5, 7):
        checkpoint = lm.Checkpointer(tmp_path / "run", every=lm.Every(steps=2))
        fit(sink("parts"), steps, checkpoint=checkpoint, resume="auto")
    parts = projected(tmp_path / "parts")
    assert {name: parts[name] for name in found} == found
    sink("parts").take_params(7, {"0.weight": torch.zeros(3, 2, 2, dtype=torch.bfloat16)}, True)
    assert projected(tmp_path / "parts")["0.weight:00007"] == [[0.0] * 4] * 3, "in place of the earlier"


def test_what_cannot_be_shown_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for names, error, text in (
        (("head.weight",), PatternError, "Near names: "),
        (("0.bias",), ValueKindError, r"'0.bias' has the shape \[3\]; the projector shows the rows of matrices"),
    ):
        with pytest.raises(error, match=text):
            fit(lm.sinks.TensorBoard(tmp_path, embeddings=names))
        assert not [*tmp_path.iterdir()]
    with pytest.raises(SinkError, match=r"they are sharded, as by lm\.fsdp, or the state has no `params`"):
        lm.sinks.show_params(lm.sinks.TensorBoard(tmp_path, embeddings=("a",)), 0, None)
    with pytest.raises(ValueKindError, match=r"write embeddings=\('head',\)"):
        lm.sinks.TensorBoard(tmp_path, embeddings="head")
    with pytest.raises(ValueKindError, match="embed_every=0 must be at least 1"):
        lm.sinks.TensorBoard(tmp_path, embed_every=0)
    lm.sinks.show_params(lm.sinks.Memory(), 0, None)
