"""A step that `guard("dump")` wrote fails in the same way again, alone, from the very same state."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lumen as lm
from lumen.checkpoint import fsync
from lumen.train.replay import read_description
from tests import zygote
from tests.tiers import in_turns

from .models import Job, assert_same
from .test_declared import poisoned

BAD = 2  # the step that fails
ROOT = Path(__file__).parents[2]


class Exploding(torch.nn.Module):
    """Noise, and a slope without bound where the input is negative; its value stays finite."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
        self.head = torch.nn.Linear(8, 1)
        self.offset = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        slack = torch.where(x.min() < -1e3, 0.0, 1.0).to(self.offset.dtype)
        singular = (self.offset.square().sum() + slack).sqrt() - slack.sqrt()
        return self.head(self.body(x.clamp(-1, 1))).squeeze(-1) + singular


def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    def loss_fn(params: Any, batch: Any) -> Any:
        out, buffers = state.apply(params, batch)
        return lm.Mean.of(out.square()), lm.Aux(buffers=buffers, metrics={"noise": lm.Sum.of(torch.rand(()))})

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss, **aux.metrics}


def twice(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Two updates, of which the second alone is bad."""
    state, _ = step(state, batch.clamp(-1, 1))
    return step(state, batch)


def job_step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    return Job(model="dropout").step(state, batch)


def start() -> lm.TrainState:
    torch.manual_seed(3)
    return lm.TrainState.create(Exploding(), lm.optim.adamw(1e-2), seed=5)


def batches(kind: str) -> list[Tensor]:
    """The last makes the loss NaN, or the gradient of one leaf alone."""
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(6, 4, generator=generator) for _ in range(BAD + 1)]
    made[-1][-1, -1] = {"loss": torch.nan, "gradient": -1e4}[kind]
    return made


EAGER = lm.compile(backend="eager")
# What stands inside the guard, what outside it, and the step.
STACKS: dict[str, tuple[list[lm.Transform], list[lm.Transform], Any]] = {
    "plain": ([], [], step),
    "seeded inside": ([], [lm.seeded()], step),
    "seeded outside": ([lm.seeded()], [], step),
    "donate": ([], [lm.donate()], step),
    "two updates": ([], [], twice),
    "donate, two updates": ([], [lm.donate()], twice),
    "compile": ([EAGER], [], step),
    "compile, seeded, donate": ([lm.compile(backend="eager"), lm.seeded()], [lm.donate()], step),
    "compile, ema, donate": ([lm.compile(backend="eager")], [lm.ema(0.9), lm.donate()], step),
    "compile, donate, two updates": ([lm.compile(backend="eager")], [lm.donate()], twice),
    "bf16": ([], [lm.precision("bf16")], step),
    "ema": ([], [lm.ema(0.9)], step),
    "clip, ema, donate, accumulate": ([], [lm.clip(1.0), lm.ema(0.9), lm.donate(), lm.accumulate(2)], step),
    "accumulate": ([], [lm.accumulate(2)], step),
}


def stacked(name: str, guard: lm.Transform) -> Any:
    outside, inside, function = STACKS[name]
    return lm.compose(*outside, guard, *inside)(function)


def copied(state: Any) -> Any:
    return lm.tree.map(lambda x: x.clone() if isinstance(x, Tensor) else x, state)


def failed(guarded: Any, state: Any, given: list[Any]) -> tuple[str, Any]:
    """The message of the failure at the last batch, and the state before it."""
    torch.manual_seed(11)
    for batch in given[:-1]:
        state, _ = guarded(state, batch)
    before = copied(state)
    with pytest.raises(lm.NonFiniteError) as caught:
        guarded(state, given[-1])
    return str(caught.value), before


def state_in(dump: Path, like: Any) -> Any:
    def name(saved: str) -> str | None:
        return saved.removeprefix("state/") if saved.startswith("state/") else None

    return lm.checkpoint.restore(dump, like, rename=name)


def again(dump: Path, guarded: Any, state: Any, batch: Any = None) -> str:
    torch.manual_seed(99)  # what is drawn comes from the dump
    with pytest.raises(lm.NonFiniteError) as caught:
        lm.replay(dump, guarded, state, batch=batch)
    return str(caught.value)


@pytest.mark.parametrize(("name", "kind"), in_turns(list(STACKS), ["loss", "gradient"]))
def test_a_replayed_step_fails_as_it_did_from_the_same_state(name: str, kind: str, tmp_path: Path) -> None:
    guarded = stacked(name, lm.guard("dump", tmp_path))
    message, before = failed(guarded, guarded.init(start()), batches(kind))
    (dump,) = tmp_path.iterdir()
    told = read_description(dump)
    written = f"State and batch were written to {dump}. Rerun the step with: lumen replay {dump}"
    assert message == f"{told['message']} {written}"
    assert ("offset" if kind == "gradient" else "loss") in told["message"]
    assert told["step"] == int(before.step)
    found = state_in(dump, guarded.init(start()))
    for (path, a), (_, b) in zip(lm.tree.named_tensors(found), lm.tree.named_tensors(before), strict=True):
        assert torch.equal(a, b), path
    assert again(dump, stacked(name, lm.guard("dump", tmp_path)), start()) == told["message"]
    assert list(tmp_path.iterdir()) == [dump], "a replay writes nothing"


@pytest.mark.parametrize("name", STACKS)
def test_a_cured_step_goes_on_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    """Bitwise, and so with the same random numbers."""
    outside, inside, function = STACKS[name]

    def cured(state: Any, batch: Any) -> tuple[Any, Any]:
        return function(state, batch.nan_to_num())

    guarded = stacked(name, lm.guard("dump", tmp_path))
    failed(guarded, guarded.init(start()), batches("loss"))
    (dump,) = tmp_path.iterdir()
    torch.manual_seed(99)
    new, metrics = lm.replay(dump, lm.compose(*outside, lm.guard("raise"), *inside)(cured), start())

    guarded = lm.compose(*outside, lm.guard("raise"), *inside)(cured)
    expected = guarded.init(start())
    torch.manual_seed(11)
    for batch in batches("loss"):
        expected, numbers = guarded(expected, batch)
    for (path, a), (_, b) in zip(lm.tree.named_tensors(new), lm.tree.named_tensors(expected), strict=True):
        assert torch.equal(a, b), path
    assert_same(metrics, numbers, exact=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("donated", [False, True])
def test_unrolled_steps(compiled: bool, donated: bool, tmp_path: Path) -> None:
    """Eager, the dump is that of the bad step; compiled, that of the whole call, which is done again as a whole."""

    def make() -> Any:
        outside = [lm.compile(backend="eager"), lm.unroll(2)] if compiled else [lm.unroll(2)]
        return lm.compose(*outside, lm.guard("dump", tmp_path), *([lm.donate()] if donated else []))(step)

    good, bad = batches("loss")[0], batches("gradient")
    calls = [lm.stack([good, good]), lm.stack([good, good]), lm.stack([bad[0], bad[-1]])]
    message, before = failed(make(), make().init(start()), calls)
    (dump,) = tmp_path.iterdir()
    told = read_description(dump)
    assert (told["steps"], told["step"]) == ((2, 4) if compiled else (1, 5))
    if compiled:
        assert_same(state_in(dump, make().init(start())), before, exact=True)
    assert again(dump, make(), start()) == told["message"] == message[: len(told["message"])]


def test_a_call_of_the_first_time_is_written_whole(tmp_path: Path) -> None:
    """Before the first call nobody knows what the step will write over."""
    for name in ("donate", "compile, ema, donate", "donate, two updates"):
        guarded = stacked(name, lm.guard("dump", tmp_path / name))
        _, before = failed(guarded, guarded.init(start()), batches("loss")[-1:])
        (dump,) = (tmp_path / name).iterdir()
        assert_same(state_in(dump, guarded.init(start())), before, exact=True)


def test_fp16_at_its_smallest_scale(tmp_path: Path) -> None:
    """What overflows at every scale is no fault of the scale: the guard outside sees it after 17 halvings."""
    guarded = lm.compose(lm.guard("dump", tmp_path), lm.precision("fp16"))(step)
    state = guarded.init(start())
    state = state.replace(slots={**state.slots, "precision": state.slots["precision"].replace(scale=torch.tensor(1.0))})
    message, before = failed(guarded, state, batches("gradient"))
    (dump,) = tmp_path.iterdir()
    restored = state_in(dump, guarded.init(start()))
    assert_same(restored, before, exact=True)
    assert float(restored.slots["precision"].scale) == 1.0
    assert message.startswith(again(dump, guarded, start()))


def test_an_ensemble(tmp_path: Path) -> None:
    job = Job(rows=4)
    guarded = lm.compose(lm.ensemble(2), lm.guard("dump", tmp_path))(job.step)
    message, before = failed(guarded, guarded.init(job.state()), [job.batch(0), poisoned(job)])
    assert_same(state_in(tmp_path / "step-1", guarded.init(job.state())), before, exact=True)
    assert message.startswith(again(tmp_path / "step-1", guarded, job.state()))


# ---------------------------------------------------------------------------------------------- batches


@lm.dataclass
class Rows:
    """A batch of a type of its own."""

    x: Tensor
    y: Tensor
    mask: Tensor


@pytest.mark.parametrize("form", ["tuple", "dict", "nested"])
def test_plain_batches_need_no_help(form: str, tmp_path: Path) -> None:
    job = Job(form=form, model="dropout")
    guarded = lm.guard("dump", tmp_path)(job.step)
    message, _ = failed(guarded, guarded.init(job.state()), [job.batch(0), job.batch(1), poisoned(job)])
    assert message.startswith(again(tmp_path / "step-2", guarded, job.state()))


def test_batches_of_a_type_of_their_own_need_one_like_them(tmp_path: Path) -> None:
    job = Job(form="tuple")

    def typed(state: Any, batch: Rows) -> tuple[Any, Any]:
        return job.step(state, (batch.x, batch.y, batch.mask))

    guarded = lm.guard("dump", tmp_path)(typed)
    message, _ = failed(guarded, guarded.init(job.state()), [Rows(*job.batch()), Rows(*poisoned(job))])
    assert message.startswith(again(tmp_path / "step-1", guarded, job.state(), batch=Rows(*job.batch(8))))
    with pytest.raises(lm.LumenError, match="has a type that could not be stored; give a batch of the same structure"):
        lm.replay(tmp_path / "step-1", guarded, job.state())
    with pytest.raises(lm.LumenError, match="has 2 leaves, but the batch in the dump has 3"):
        lm.replay(tmp_path / "step-1", guarded, job.state(), batch=(1, 2))


def test_a_batch_that_no_checkpoint_holds_does_not_hide_the_failure(tmp_path: Path) -> None:
    def fetching(state: Any, batch: Any) -> tuple[Any, Any]:
        return step(state, batch["get"]())

    guarded = lm.guard("dump", tmp_path)(fetching)
    bad = batches("loss")[-1]
    with pytest.raises(lm.NonFiniteError, match=r"loss is not finite at step 0.*could not be written.*function"):
        guarded(guarded.init(start()), {"get": lambda: bad})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- failures


def test_a_full_disk_does_not_hide_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fsync, "sync_file", full)
    guarded = lm.guard("dump", tmp_path)(step)
    message, _ = failed(guarded, guarded.init(start()), batches("loss"))
    assert message.startswith("the loss is not finite at step 2.")
    assert "could not be written" in message
    assert "No space left on device" in message
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_does_not_hide_the_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    guarded = lm.guard("dump", tmp_path / "file" / "dumps")(step)
    message, _ = failed(guarded, guarded.init(start()), batches("loss"))
    assert message.startswith("the loss is not finite at step 2.")
    assert "could not be written" in message


def test_failures_at_the_same_step_do_not_write_over_each_other(tmp_path: Path) -> None:
    for _ in range(3):
        guarded = lm.guard("dump", tmp_path)(step)
        failed(guarded, guarded.init(start()), batches("loss"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step-2", "step-2.2", "step-2.3"]


def test_other_transforms_than_in_the_dump_are_named(tmp_path: Path) -> None:
    guarded = lm.compose(lm.guard("dump", tmp_path), lm.ema(0.9))(step)
    failed(guarded, guarded.init(start()), batches("loss"))
    with pytest.raises(lm.LumenError, match=r"(?s)slots/ema.*ran under lm.guard\('dump'\), lm.ema\(0.9\).*runs under"):
        lm.replay(tmp_path / "step-2", lm.guard("raise")(step), start())


# ------------------------------------------------------------------------------------------ other processes

FRESH = ("plain", "seeded inside", "donate", "compile, ema, donate", "clip, ema, donate, accumulate", "bf16")


def messages(directory: str) -> dict[str, str]:
    """What each of the dumps fails with when it is done again."""
    return {
        name: again(Path(directory) / name / f"step-{BAD}", stacked(name, lm.guard("dump")), start()) for name in FRESH
    }


def test_a_fresh_process_fails_as_this_one_did(tmp_path: Path) -> None:
    told = {}
    for name in FRESH:
        guarded = stacked(name, lm.guard("dump", tmp_path / name))
        failed(guarded, guarded.init(start()), batches("gradient"))
        told[name] = read_description(tmp_path / name / f"step-{BAD}")["message"]
    program = "import json, sys; from tests.laws.test_replay import messages; print(json.dumps(messages(sys.argv[1])))"
    done = zygote.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == told
