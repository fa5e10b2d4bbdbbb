"""CUDA graphs without a GPU: a stand-in for inductor that answers, as a graph does, in the same memory each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lumen as lm
from lumen.core import _torch_compat
from lumen.transforms._support import compiled_graph


class Graph:
    """The traced region, whose outputs are written where those of the last call were."""

    def __init__(self, graph: Callable[..., list[Tensor]], log: list[str]) -> None:
        self.graph = graph
        self.log = log
        self.memory: list[Tensor] = []

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        self.log.append("replay")
        made = self.graph(*tensors)
        self.memory = self.memory or [torch.empty_like(each) for each in made]
        for place, each in zip(self.memory, made, strict=True):
            place.copy_(each)
        return self.memory


def step(state: lm.TrainState, x: Tensor) -> tuple[lm.TrainState, dict[str, Any]]:
    loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0].square().mean())(state.params, x)
    return state.apply_gradients(grads), {"loss": loss}


def test_what_a_graph_answers_outlives_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    options: dict[str, Any] = {}

    def stand_in(graph: Any, example: Any, options: dict[str, Any] = options) -> Graph:
        log.append(f"compile {options['triton.cudagraphs']}")
        return Graph(graph, log)

    monkeypatch.setattr(_torch_compat, "inductor_compile", stand_in)
    monkeypatch.setattr(compiled_graph, "_uses_cuda_graphs", lambda options, example: options["triton.cudagraphs"])
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: log.append("mark"))
    fast = lm.compile(mode="reduce-overhead")(step)
    state = lm.TrainState.create(torch.nn.Linear(3, 1), lm.optim.adam(0.1))
    x = torch.randn(5, 3)
    expected, found, kept = state, state, []
    for _ in range(3):
        expected, metrics = step(expected, x)
        found, same = fast(found, x)
        kept.append((found, same, expected, metrics))
    assert log == ["compile True", *["mark", "replay"] * 3]
    for found, same, expected, metrics in kept:
        torch.testing.assert_close(dict(found.params), dict(expected.params))
        torch.testing.assert_close(same["loss"], metrics["loss"])


def test_nothing_is_copied_where_no_graph_is_recorded() -> None:
    graphs = {"triton.cudagraphs": True}
    assert not compiled_graph._uses_cuda_graphs(graphs, [torch.ones(1)])
    assert not compiled_graph._uses_cuda_graphs({}, [torch.ones(1)])
