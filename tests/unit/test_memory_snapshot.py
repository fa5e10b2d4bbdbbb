"""Memory snapshots: what they say, when they are written, and that the error they follow stays what it was."""

from __future__ import annotations

import json
import os
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lumen as lm
from lumen.core import _torch_compat
from lumen.errors import HyperparameterError, InexactWarning
from lumen.train import memory_report as reports
from lumen.train import memory_snapshot


def step(state: Any, batch: Any) -> Any:
    def loss_fn(params: Any, batch: Any) -> Any:
        return lm.Mean.of(state.apply(params, batch)[0].square())

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def make_state() -> Any:
    return lm.TrainState.create(torch.nn.Linear(3, 1), lm.optim.adam(0.1))


def fit(callback: lm.Callback, steps: int = 4, function: Any = step) -> lm.Result:
    runner = lm.Runner(function, callbacks=[callback], progress=False)
    return runner.fit(make_state(), [torch.ones(2, 3)] * steps, until=lm.Epochs(1))


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*"))


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text())


# ------------------------------------------------------------------------------------------- what is said


@settings(max_examples=15)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_components_of_a_state_add_up_to_it(sizes: list[int], dtype: torch.dtype) -> None:
    net = torch.nn.Sequential(*[torch.nn.Linear(size, size, dtype=dtype) for size in sizes], torch.nn.BatchNorm1d(2))
    state = lm.compose(lm.guard(), lm.ema(0.9))(step).init(lm.TrainState.create(net, lm.optim.adam(0.1)))
    sizes_by_name = reports.component_bytes(state)
    assert sum(sizes_by_name.values()) == lm.tree.nbytes(state)
    assert sizes_by_name["params"] == sum(p.nbytes for p in net.parameters())
    assert sizes_by_name["buffers"] == sum(b.nbytes for b in net.buffers())


def test_params_of_a_lazy_module_have_no_memory_yet() -> None:
    lazy = torch.nn.LazyLinear(2)
    assert reports.live_tensors()["count"] >= 0
    del lazy


def test_live_tensors_count_memory_once() -> None:
    shape = (3, 5, 7, 11)
    held = [torch.zeros(shape, dtype=torch.float64) for _ in range(3)]
    held += [held[0].detach(), held[1][0], torch.empty(shape, device="meta")]
    found = [group for group in reports.live_tensors()["largest"] if group["shape"] == list(shape)]
    assert found == [{"device": "cpu", "dtype": "float64", "shape": list(shape), "count": 3, "bytes": 3 * 8 * 1155}]
    assert len(held) == 6


def test_python_s_allocations_are_said_while_they_are_traced() -> None:
    assert reports.python_bytes() is None
    tracemalloc.start()
    try:
        held = [bytes(10**6) for _ in range(3)]
        lines = reports.python_bytes()
    finally:
        tracemalloc.stop()
    assert lines is not None
    assert lines[0]["line"].startswith(__file__)
    assert lines[0]["bytes"] >= sum(map(len, held))


def test_the_process_has_a_size_and_a_peak() -> None:
    sizes = reports.process_bytes()
    assert sizes["peak_rss"] >= sizes["rss"] > 10**6  # type: ignore[operator]


# ------------------------------------------------------------------------------------------- when it is written


def test_after_the_given_steps(tmp_path: Path) -> None:
    fit(lm.MemorySnapshot(tmp_path / "a", steps=[3, 2, 9]))
    assert files(tmp_path / "a") == ["step-2-rank-0.json", "step-3-rank-0.json"]
    report = read(tmp_path / "a", "step-3-rank-0.json")
    assert (report["step"], report["rank"], report["state"]["params"], report["cuda"]) == (3, 0, 16, None)
    assert report["tensors"]["bytes"] >= report["state"]["params"]


class At(lm.Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step(self, view: lm.CallbackContext) -> None:
        if view.clock.step == self.step:
            self.action()


def test_at_a_signal_which_is_as_before_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    send = At(2, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    snapshot = lm.MemorySnapshot(tmp_path)
    lm.Runner(step, callbacks=[snapshot, send], progress=False).fit(
        make_state(), [torch.ones(2, 3)] * 5, until=lm.Epochs(1)
    )
    assert files(tmp_path) == ["step-3-rank-0.json"]
    assert signal.getsignal(signal.SIGUSR2) == before


class OddError(MemoryError):
    """Of the host."""


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("device"), OddError("host")], ids=["device", "host"])
def test_when_memory_runs_out_and_the_error_stays_what_it_was(tmp_path: Path, error: Exception) -> None:
    def failing(state: Any, batch: Any) -> Any:
        if int(state.step) == 2:
            raise error
        return step(state, batch)

    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(type(error)) as caught:
        fit(lm.MemorySnapshot(tmp_path), function=failing)
    assert caught.value is error
    assert any(f"What was in memory is in {tmp_path}" in note for note in error.__notes__)
    assert files(tmp_path) == ["out-of-memory-step-2-rank-0.json"]
    assert signal.getsignal(signal.SIGUSR2) == before
    with pytest.raises(type(error)):
        fit(lm.MemorySnapshot(tmp_path / "none", on_oom=False), function=failing)
    assert not (tmp_path / "none").exists()


def test_another_error_is_none_of_its_business(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(lm.MemorySnapshot(tmp_path), function=lambda state, batch: 1 / 0)
    assert files(tmp_path) == []


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(InexactWarning, match="memory snapshot of step 2 could not be written"):
        result = fit(lm.MemorySnapshot(tmp_path / "file", steps=[2]))
    assert result.clock.step == 4

    def failing(state: Any, batch: Any) -> Any:
        raise MemoryError("host")

    with pytest.raises(MemoryError, match="host") as caught:
        fit(lm.MemorySnapshot(tmp_path / "file"), function=failing)
    assert any("What was in memory could not be written: FileExistsError" in note for note in caught.value.__notes__)


def test_on_cuda_the_allocator_records_while_the_run_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls alone, on a machine without CUDA: torch's own snapshot is torch's to test."""
    calls: list[Any] = []
    monkeypatch.setattr(memory_snapshot.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(reports.torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setitem(_torch_compat.__dict__, "record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setitem(_torch_compat.__dict__, "dump_snapshot", calls.append)
    snapshot = lm.MemorySnapshot(tmp_path, steps=[1], signal=None, history=7)
    view = lm.CallbackContext(lm.train.clock.Clock(), make_state())
    snapshot.on_start(view)
    view.clock.step = 1
    snapshot.on_step(view)
    error = torch.OutOfMemoryError("device")
    snapshot.on_exception(view, error)
    snapshot.on_end(view)
    assert calls == [
        {"max_entries": 7, "stacks": "python"},
        str(tmp_path / "step-1-rank-0.pickle"),
        str(tmp_path / "out-of-memory-step-1-rank-0.pickle"),
        {"enabled": None},
    ]
    assert "rank-0.json and" in error.__notes__[0]


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [0]}, "steps"),
        ({"history": 0}, "history"),
        ({"signal": "SIGTERM"}, "SIGTERM and SIGINT end a run"),
        ({"signal": "SIGODD"}, "signal='SIGODD'"),
        ({"signal": None, "on_oom": False}, "would never write"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(HyperparameterError, match=message):
        lm.MemorySnapshot(tmp_path, **options)


def test_a_url_is_no_directory() -> None:
    with pytest.raises(lm.errors.PathError, match="the directory of lm.MemorySnapshot"):
        lm.MemorySnapshot("s3://bucket/memory")
