"""`lm.remat(budget=...)`: the law before and after the choice, that what is kept fits, and which block is whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lumen as lm
from lumen import errors
from lumen.transforms._support.activation_budget import Call, Cost, choose, parse_bytes
from lumen.transforms._support.saved_results import SavedResults

from .models import assert_same, train
from .test_remat import ROWS, STACKS, TOKENS, WIDTH, Block, Net, batch_of, state_of, step, trained

INPUT = ROWS * TOKENS * WIDTH * 8  # bytes of a block's input
DEPTH = 2
LEAST = DEPTH + 14  # in such inputs: those of all blocks, and what the recomputation of one holds


def after(steps: int, *stack: lm.Transform, state: lm.TrainState | None = None) -> Any:
    wrapped = lm.compose(*stack)(step)
    torch.manual_seed(5)
    return train(wrapped, wrapped.init(state or state_of()), [batch_of()] * steps)


@pytest.mark.parametrize("inputs", [LEAST, LEAST + 2, LEAST + 6, 1000])
def test_training_is_bitwise_the_same(inputs: int) -> None:
    assert_same(after(4, lm.remat(budget=inputs * INPUT)), after(4), exact=True)


@pytest.mark.parametrize("name", ["accumulate, donate", "guard, clip, ema", "sam"])
def test_a_stack_with_it_is_the_stack_without(name: str) -> None:
    around = [make() for make in STACKS[name]]
    assert_same(after(3, *around, lm.remat(budget=(LEAST + 6) * INPUT)), after(3, *around), exact=True)


def test_compiled() -> None:
    compiled, state = lm.compile(backend="eager"), state_of()
    found = after(2, compiled, lm.remat(budget=(LEAST + 3) * INPUT), state=state)
    assert_same(found, after(2, compiled, state=state), exact=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no rule for attention under vmap
def test_under_ensemble_it_keeps_nothing() -> None:
    state = state_of(Net(dropout=0.0))
    found, _ = trained(lm.ensemble(2), lm.remat(budget=(LEAST + 6) * INPUT), state=state)
    assert_same(found, trained(lm.ensemble(2), state=state)[0], exact=True)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The operations whose results are kept, with their bytes."""
    kept: list[tuple[str, int]] = []
    keep = SavedResults.keep

    def recorded(self: SavedResults, func: Any, *args: Any) -> Any:
        out = keep(self, func, *args)
        first = out if isinstance(out, torch.Tensor) else out[0]
        kept.append((str(func), first.untyped_storage().nbytes()))
        return out

    monkeypatch.setattr(SavedResults, "keep", recorded)
    return kept


@pytest.mark.parametrize("inputs", [LEAST, LEAST + 1, LEAST + 4, LEAST + 9])
def test_what_is_kept_fits(inputs: int, kept: list[tuple[str, int]]) -> None:
    after(1, lm.remat(budget=inputs * INPUT))
    assert not kept
    after(2, lm.remat(budget=inputs * INPUT))
    total = sum(nbytes for _, nbytes in kept)
    assert total <= (inputs - LEAST + 1) * INPUT
    assert total >= (inputs - LEAST - 3) * INPUT  # less than one more product


def test_the_dearest_results_are_kept(kept: list[tuple[str, int]]) -> None:
    after(2, lm.remat(budget=12 * INPUT), state=state_of(Net(dropout=0.0)))
    assert {operation for operation, _ in kept} <= {
        "aten.addmm.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
    }
    assert kept


def test_a_budget_below_the_inputs(kept: list[tuple[str, int]]) -> None:
    with pytest.raises(errors.HyperparameterError, match=r"is less than the .* inputs of its 2 modules take"):
        after(1, lm.remat(budget=DEPTH * INPUT - 1))


def test_a_budget_below_one_block() -> None:
    with pytest.raises(errors.HyperparameterError, match=r"is less than the .* of its modules take with the results"):
        after(1, lm.remat(budget=(LEAST - 2) * INPUT))


def once(apply: Any, params: Any, batch: torch.Tensor) -> Any:
    return lm.Mean.of(apply(params, batch)[0].square().sum((-1, -2)))


def twice(apply: Any, params: Any, batch: torch.Tensor) -> Any:
    return lm.Mean.of((apply(params, batch)[0] * apply(params, 2 * batch)[0]).sum((-1, -2)))


@pytest.mark.parametrize(
    ("loss_of", "around", "runs"),
    [
        (once, [], 3 + 2),
        (once, [lm.accumulate(3)], 3 * (3 + 2)),
        (twice, [], 6 + 6),  # the last block of the first application waits for the second
    ],
)
def test_a_block_whose_backward_pass_follows_at_once_is_not_recomputed(
    loss_of: Any, around: list[lm.Transform], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, forward = 0, Block.forward

    def counted(self: Block, x: torch.Tensor, **options: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return forward(self, x, **options)

    def step(state: Any, batch: Any) -> Any:
        loss, grads = lm.value_and_grad(lambda params, batch: loss_of(state.apply, params, batch))(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    monkeypatch.setattr(Block, "forward", counted)
    wrapped = lm.compose(*around, lm.remat("blocks.*", budget="1MB"))(step)
    state, _ = wrapped(wrapped.init(state_of(Net(0.0, depth=3))), batch_of())
    count = 0
    wrapped(state, batch_of())
    assert count == runs


@pytest.mark.parametrize("budget", ["", "much", "-1GiB", 0, "0", "1.5 XB", "GiB"])
def test_what_is_no_number_of_bytes(budget: Any) -> None:
    with pytest.raises(errors.HyperparameterError, match=r"is not a positive number of bytes. Write budget="):
        lm.remat(budget=budget)


@pytest.mark.parametrize("other", [{"save": "matmuls"}, {"offload": True}])
def test_a_budget_decides_alone(other: Any) -> None:
    with pytest.raises(errors.HyperparameterError, match="chooses what to keep by itself"):
        lm.remat(budget="1GiB", **other)


def test_units() -> None:
    assert [parse_bytes(text) for text in ("1kb", "1 KiB", "2.5MiB", 7)] == [1000, 1024, 2621440, 7]


def test_choices_do_not_depend_on_the_order() -> None:
    costs = {Call(0, block, "mm", 0): Cost(8, 80.0) for block in range(4)}
    assert choose(costs, 17) == choose(dict(reversed(costs.items())), 17) == {Call(0, 0, "mm", 0), Call(0, 1, "mm", 0)}


def test_a_plan_makes_the_same_choice() -> None:
    def planned(*stack: lm.Transform) -> int:
        wrapped = lm.compose(*stack)(step)
        plan = lm.plan(wrapped, lambda: state_of(Net(0.0, depth=3)), batch_of(64), world_size=1, device="cpu")
        return plan.peak.by_category["activations"]

    block = 64 * TOKENS * WIDTH * 8
    assert 16 * block <= planned(lm.remat(budget=18 * block)) <= 18 * block
