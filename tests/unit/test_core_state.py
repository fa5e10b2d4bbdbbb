"""States and steps: what they hold, and how they are changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lumen as lm
from lumen.core.inspect import human_bytes
from lumen.core.step import add_slot, slot, with_slot, without_slot


def plain(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    return state, {}


def make_state(**kwargs: Any) -> lm.TrainState:
    return lm.TrainState.create(nn.Linear(2, 1), lm.optim.sgd(0.1), **kwargs)


def test_create_starts_at_zero() -> None:
    state = make_state(seed=7)
    assert (int(state.step), int(state.seed), state.slots) == (0, 7, {})
    assert state.step.dtype == state.seed.dtype == torch.int64


def test_a_state_is_shown_in_a_line() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 50), nn.BatchNorm1d(50))
    state = lm.TrainState.create(net, lm.optim.chain(lm.optim.clip_by_global_norm(1.0), lm.optim.adamw(1e-3)))
    where = "params: 4 tensors, 550 numbers, float32 on cpu; buffers: 3 tensors, 101 numbers"
    assert repr(state) == f"TrainState(Sequential; step 0; {where}; AdamState lr 0.001)"
    assert repr(lm.ema(0.9).init(state)).endswith("AdamState lr 0.001; slots: ema)")
    swept = lm.sweep(lr=[0.5, 0.25]).init(make_state())
    assert repr(swept) == (
        "TrainState(Linear; step [0, 0]; params: 2 tensors, 6 numbers, float32 on cpu; SGDState lr [0.5, 0.25])"
    )

    @lm.dataclass
    class Gan:
        players: tuple[Any, Any]
        noise: torch.Tensor
        count: int

    shown = repr(Gan((make_state(), {"w": torch.zeros(100)}), torch.zeros(3, 50), 2))
    assert shown == "Gan(players=<7 tensors, 107 numbers>, noise=float32[3, 50], count=2)"


def test_a_state_is_shown_where_its_numbers_cannot_be_read() -> None:
    shown = []

    def showing(state: Any, batch: Any) -> Any:
        shown.append(repr(state))
        return state.replace(step=state.step + 1), {}

    lm.ensemble(2)(showing)(lm.ensemble(2).init(make_state()), torch.ones(1))
    lm.compile(backend="eager")(showing)(make_state(), torch.ones(1))
    assert all("step ?; params: 2 tensors, 3 numbers" in text for text in shown), shown
    donated = lm.donate()(plain_update)
    old = donated.init(make_state())
    donated(old, torch.ones(1))
    assert repr(old).startswith("<a donated state")


def plain_update(state: Any, batch: Any) -> Any:
    return state.apply_gradients({k: torch.zeros_like(p) for k, p in state.params.items()}), {}


def test_apply_gradients_counts_and_takes_further_changes() -> None:
    state = make_state()
    new = state.apply_gradients({k: torch.zeros_like(p) for k, p in state.params.items()}, seed=torch.tensor(5))
    assert (int(new.step), int(new.seed), int(state.step)) == (1, 5, 0)


def test_empty_buffers_keep_the_old() -> None:
    state = lm.TrainState.create(nn.BatchNorm1d(2), lm.optim.sgd(0.1))
    grads = {k: torch.zeros_like(p) for k, p in state.params.items()}
    assert state.apply_gradients(grads, buffers={}).buffers is state.buffers


def test_key_differs_by_step_and_seed() -> None:
    keys = {
        tuple(s.key.tolist()) for s in (make_state(), make_state(seed=1), make_state().replace(step=torch.tensor(1)))
    }
    assert len(keys) == 3


def test_replace_leaves_the_original() -> None:
    state = make_state()
    new = state.replace(step=torch.tensor(9))
    assert (int(state.step), int(new.step)) == (0, 9)
    assert new.params is state.params


def test_a_decorated_subclass_has_fields_of_its_own() -> None:
    @lm.dataclass
    class Gan(lm.TrainState):
        critic: Any = None
        name: str = lm.static(default="gan", kw_only=True)

    state = Gan.create(nn.Linear(2, 1), lm.optim.sgd(0.1), critic={"w": torch.ones(1)})
    assert "critic[w]" in lm.tree.paths(state)
    assert type(state.replace(step=torch.tensor(1))) is Gan
    assert type(lm.tree.map(lambda x: x, state)) is Gan


def test_eval_and_train_change_the_function_only() -> None:
    state = lm.TrainState.create(nn.Sequential(nn.Linear(2, 2), nn.Dropout(1.0)), lm.optim.sgd(0.1))
    x = torch.ones(1, 2)
    assert state.apply(state.params, x)[0].abs().sum() == 0
    assert state.eval().apply(state.params, x)[0].abs().sum() > 0
    assert lm.tree.structure(state.eval().train()) == lm.tree.structure(state)


def test_slots() -> None:
    state = with_slot(make_state(), "a", torch.tensor(1))
    assert int(slot(state, "a")) == 1
    assert without_slot(state, "a").slots == {}


def test_a_slot_is_not_made_twice() -> None:
    state = add_slot(make_state(), "a", lambda: torch.tensor(1))
    assert int(slot(add_slot(state, "a", lambda: torch.tensor(2)), "a")) == 1


def test_a_step_reads_as_it_was_written() -> None:
    step = lm.compile()(lm.guard()(lm.accumulate(microbatch=2)(plain)))
    assert repr(step) == "lm.compile()(lm.guard('skip')(lm.accumulate(microbatch=2)(plain)))"
    assert step.__name__ == "plain"


def test_compose_is_nesting() -> None:
    composed = lm.compose(lm.accumulate(2), lm.precision("bf16"))(plain)
    nested = lm.accumulate(2)(lm.precision("bf16")(plain))
    assert repr(composed) == repr(nested)


def test_compose_of_nothing_still_checks_the_answer() -> None:
    with pytest.raises(lm.LumenError, match="must return"):
        lm.compose()(lambda state, batch: state)(make_state(), None)


def test_inspect_lists_leaves_and_stack(capsys: pytest.CaptureFixture[str]) -> None:
    text = lm.inspect(lm.accumulate(2)(plain), make_state(), {"x": torch.zeros(4, 2)})
    assert capsys.readouterr().out == text + "\n"
    assert text.startswith("lm.accumulate(2)(plain)\nstate: ")
    for line in ("params[weight]", "float32", "[1, 2]", "batch: 1 tensor, 32 B"):
        assert line in text


def test_check_purity_accepts_a_pure_step() -> None:
    lm.check_purity(plain, make_state(), torch.tensor([torch.nan]))


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (2**20, "1.0 MiB"), (2**43, "8.0 TiB")])
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text
