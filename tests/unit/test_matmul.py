"""TF32: torch's setting while a step runs, and what it is afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lumen as lm

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def setting() -> tuple[Any, ...]:
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = "set apart"
    return old, *(backend.fp32_precision for backend in BACKENDS)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in BACKENDS:
        backend.fp32_precision = "none"


def untouched() -> None:
    pass


def old_way() -> None:
    torch.set_float32_matmul_precision("medium")


def new_way() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


class Spy(torch.nn.Linear):
    """Looks at the setting, forward and backward."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(setting())
        out = super().forward(x)
        if out.requires_grad:
            out.register_hook(lambda grad: self.seen.append(setting()))
        return out


def step(state: lm.TrainState, x: torch.Tensor) -> tuple[lm.TrainState, dict[str, Any]]:
    loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0].mean())(state.params, x)
    return state.apply_gradients(grads), {"loss": loss}


@pytest.mark.parametrize("before", [untouched, old_way, new_way])
@pytest.mark.parametrize("outer", [(), (lm.compile(backend="eager"),), (lm.accumulate(2),)], ids=str)
def test_the_setting_holds_for_the_step_alone(before: Any, outer: tuple[lm.Transform, ...]) -> None:
    state = lm.TrainState.create(Spy(), lm.optim.sgd(0.1))
    seen = state.apply_fn.module.seen
    before()
    found = setting()
    made = lm.compose(*outer, lm.precision("tf32"))(step)
    state = made.init(state)
    for _ in range(2):
        state, _ = made(state, torch.ones(4, 2))
    assert len(seen) >= 2
    assert set(seen) == {("high", "tf32", "tf32")}
    assert setting() == found


def test_it_is_put_back_after_an_error() -> None:
    def failing(state: Any, batch: Any) -> Any:
        assert torch.get_float32_matmul_precision() == "high"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lm.precision("tf32")(failing)({}, torch.ones(1))
    assert setting() == ("highest", "none", "none")


def test_it_holds_for_evaluation_and_the_other_way_round() -> None:
    seen = []

    def look(state: Any, batch: Any) -> dict[str, Any]:
        seen.append(setting()[0])
        return {"rows": lm.Sum.of(batch)}

    ieee = lm.precision(lm.Policy(matmul="ieee"))
    torch.set_float32_matmul_precision("medium")
    for transform in (lm.precision("tf32"), ieee, lm.precision("fp32")):
        lm.evaluate(look, lm.TrainState.create(torch.nn.Linear(1, 1), lm.optim.sgd(0.1)), [torch.ones(1)], (transform,))
    assert seen == ["high", "highest", "medium"]
    with pytest.raises(lm.LumenError, match="'bf16'.*'tf32', 'ieee'"):
        lm.Policy(matmul="bf16")
