"""What a dump holds, and that one from a stranger runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lumen as lm
from lumen.cli import parse_transforms
from lumen.cli.main import main
from lumen.errors import CheckpointError, CorruptCheckpointError, StepError
from lumen.train.replay import read_description
from lumen.transforms._support.snapshot_dump import KIND, CallTrace, SnapshotPolicy

SOUND = {
    "kind": KIND,
    "message": "the loss is not finite at step 0.",
    "step": 0,
    "steps": 1,
    "transforms": ["lm.guard('dump')"],
    "function": "train:step",
    "batch": '{"tensor": 0}',
}


def step(state: Any, x: Any) -> tuple[Any, Any]:
    loss, grads = lm.value_and_grad(lambda p, x: state.apply(p, x)[0].sum())(state.params, x)
    return state.apply_gradients(grads), {"loss": loss}


def state() -> lm.TrainState:
    return lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))


def dump(path: Path, **changes: Any) -> Path:
    """A dump as a stranger may write it: every digest is right."""
    tree = {"state": lm.guard("dump")(step).init(state()), "batch": [torch.full((3, 2), torch.nan)]}
    lm.checkpoint.save(path, tree, extra={"rng": lm.checkpoint.rng.capture()}, meta={**SOUND, **changes})
    return path


def test_what_must_be_copied_is_learned_from_the_call_before() -> None:
    first = SnapshotPolicy()
    assert first.copied == "all"
    assert first.after(CallTrace(), donated=True) is first  # ran as it was compiled before
    assert first.after(CallTrace(1, 1), donated=False) == SnapshotPolicy("nothing", 1)
    donated = first.after(CallTrace(1, 1), donated=True)
    assert donated == SnapshotPolicy("others", 1)
    assert first.after(CallTrace(1, 2), donated=True) == SnapshotPolicy("all", 1)
    assert first.after(CallTrace(1, 2), donated=False) == SnapshotPolicy("nothing", 1)
    assert first.after(CallTrace().with_step(1).with_step(1), donated=True) == SnapshotPolicy("all", 2)
    left = ("params[fc.weight]", "opt_state[0].mu[fc.weight]", "buffers[mean]")
    assert not any(donated.copies(path) for path in left)
    assert all(donated.copies(path) for path in ("step", "slots[ema].params[fc.weight]", "params_target[fc.weight]"))


def test_a_dump_says_what_it_is(tmp_path: Path) -> None:
    guarded = lm.compose(lm.guard("dump", tmp_path), lm.ema(0.9), lm.accumulate(2))(step)
    with pytest.raises(lm.NonFiniteError):
        guarded(guarded.init(state()), torch.full((4, 2), torch.inf))
    told = read_description(tmp_path / "step-0")
    assert told["transforms"] == ["lm.guard('dump')", "lm.ema(0.9)", "lm.accumulate(2)"]
    assert told["function"] == f"{__name__}:step"
    assert (told["step"], told["steps"]) == (0, 1)


def test_a_checkpoint_is_no_dump(tmp_path: Path) -> None:
    lm.checkpoint.save(tmp_path / "a", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="not a step that lm.guard"):
        read_description(tmp_path / "a")


# -------------------------------------------------------------------------------------- from a stranger


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("transforms", "lm.guard('dump')"),
        ("transforms", [1]),
        ("message", None),
        ("function", ["os", "system"]),
        ("steps", None),
        ("steps", "2"),
        ("step", [0]),
        ("batch", 3),
    ],
)
def test_unsound_fields_are_refused(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="description of the step is invalid"):
        read_description(dump(tmp_path / "a", **{field: value}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]" * 3,
        '{"tensor": 7}',
        '{"tensor": "x"}',
        '{"dict": [[{"list": []}, 1]]}',
        '{"a": 1, "b": 2}',
        '{"bytes": 3}',
        "[" * 100_000,
    ],
)
def test_unsound_batches_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="its batch is invalid"):
        lm.replay(dump(tmp_path / "a", batch=text), lm.guard("raise")(step), state())


def test_a_dump_without_generators_is_refused(tmp_path: Path) -> None:
    tree = {"state": lm.guard()(step).init(state()), "batch": [torch.ones(3, 2)]}
    lm.checkpoint.save(tmp_path / "a", tree, meta=SOUND)
    with pytest.raises(CorruptCheckpointError, match="no random generators"):
        lm.replay(tmp_path / "a", lm.guard("raise")(step), state())


HOSTILE = [
    "__import__('os').system('touch pwned')",
    "lm.guard(__import__('os').system('touch pwned'))",
    "lm.checkpoint.save('pwned', {})",
    "lm.compile(options={'cpp.cxx': ('touch pwned',)})",
    "lm.compile(**{'options': {'cpp.cxx': ('touch pwned',)}})",
    "lm.Transform()",
    "lm.guard.__init__.__globals__['os'].system('touch pwned')",
    "lm.remat([open('pwned', 'w') for _ in range(1)])",
    "lm.sweep(lr=…3)",
    "lm.guard('dump', 'pwned')",
    "(lambda: 0)()",
    "lm.unroll",
    "lm.unroll(0)",
    "(" * 5000,
    "\0",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_transforms_run_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StepError, match="step with its transforms"):
        parse_transforms.parse([text])
    (tmp_path / "train.py").write_text(
        "import torch, lumen as lm\n"
        "def step(state, x):\n    raise SystemExit('it was run')\n"
        "def make():\n    return step, lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))\n"
    )
    assert main(["replay", str(dump(tmp_path / "a", transforms=[text])), "--run", "train.py:make"]) == 1
    assert "step with its transforms" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()


def test_nothing_of_a_dump_reaches_the_terminal_as_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = dict.fromkeys(("message", "function"), "\x1b]0;owned\x07\x1b[2J[red]x")
    path = dump(tmp_path / "a", transforms=["\x1b[31m"], **bad)
    assert main(["replay", str(path)]) == 0
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "[red]x" in said


ROUND = [
    lm.accumulate(4),
    lm.accumulate(microbatch=8),
    lm.accumulate("auto"),
    lm.clip(1.0),
    lm.clip(value=0.5),
    lm.compile(),
    lm.compile(mode="reduce-overhead"),
    lm.compile(backend="eager"),
    lm.donate(),
    lm.ema(0.99, warmup=True, start=3),
    lm.ema(None),
    lm.ensemble(2),
    lm.guard("dump", "elsewhere"),
    lm.precision("fp16"),
    lm.dp_sgd(1.0, 0.5),
    lm.remat("blocks.*"),
    lm.seeded(),
    lm.sweep(lr=[0.1, 0.2]),
    lm.unroll(2),
]


@pytest.mark.parametrize("transform", ROUND, ids=repr)
def test_transforms_are_read_as_they_were_written(transform: lm.Transform) -> None:
    (found,) = parse_transforms.parse([repr(transform)])
    assert type(found) is type(transform)
    assert repr(found) == repr(transform)
    assert found == (transform.replace(directory="dumps") if isinstance(transform, lm.guard) else transform)


@pytest.mark.parametrize(
    "transform",
    [lm.precision(lm.Policy(compute=torch.bfloat16)), lm.remat(torch.nn.Linear), lm.sweep(lr=torch.ones(2))],
    ids=["precision", "remat", "sweep"],
)
def test_transforms_that_cannot_be_read_say_what_to_write(transform: lm.Transform) -> None:
    with pytest.raises(StepError, match=r"return lm.compose\(...\)\(step\), state"):
        parse_transforms.parse([repr(transform)])


def other(state: Any, x: Any) -> tuple[Any, Any]:
    def loss_fn(params: Any, x: Any) -> Any:
        return (x * params["weight"].sqrt()).sum()  # whose gradient at zero is infinite

    loss, grads = lm.value_and_grad(loss_fn)({"weight": state.params["weight"]}, x)
    return state.apply_gradients({**grads, "bias": torch.zeros(1)}), {"loss": loss}


class Around(lm.Transform):
    """Does nothing, wherever it stands."""

    name = "around"


def test_a_guard_in_several_steps_dumps_the_one_that_failed(tmp_path: Path) -> None:
    guard = lm.guard("dump", tmp_path)
    alone = guard(step)
    around = Around()(alone)
    apart = guard(other)
    lm.compose(guard, lm.ema(0.5))(step)
    runs = [
        (alone, torch.full((3, 2), torch.nan), "step", ["lm.guard('dump')"], "the loss is not finite"),
        (around, torch.full((3, 2), torch.nan), "step", ["lm.around()", "lm.guard('dump')"], "the loss is not finite"),
        (apart, torch.ones(1, 2), "other", ["lm.guard('dump')"], r"gradient of params\['weight'\]"),
    ]
    for each, batch, function, transforms, message in runs:
        given = each.init(state())
        given = given.replace(params={**given.params, "weight": torch.zeros(1, 2)})
        with pytest.raises(lm.NonFiniteError, match=message) as caught:
            each(given, batch)
        path = str(caught.value).rpartition(" ")[2]
        meta = lm.checkpoint.metadata(path)["meta"]
        assert meta["function"].rpartition(":")[2] == function
        assert meta["transforms"] == transforms
    assert guard.within is None
