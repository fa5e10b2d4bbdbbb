"""The command line: what it prints for a reader and for a program, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lumen as lm
from lumen.cli.main import _parser, main
from tests import zygote

FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)
Capture = pytest.CaptureFixture[str]

TRAIN = """
import torch
import lumen as lm

NAN = {nan}

def step(state, batch):
    def loss_fn(params, batch):
        out = state.apply(params, batch["x"])[0]
        return (out - batch["y"]).square().mean() + ((params["bias"] * 0.0).sum().sqrt() if NAN else 0.0)

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {{"loss": loss}}

def make():
    return step, lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.adam(0.1))

def composed():
    return lm.compose(lm.guard("dump"), lm.ema(0.9))(step), make()[1]

def other():
    return lm.guard()(step), make()[1]

def wrong():
    return step

if __name__ == "__main__":
    import sys
    guarded = lm.compose(lm.guard("dump", sys.argv[1]), lm.ema(0.9))(step)
    guarded(guarded.init(make()[1]), {{"x": torch.ones(3, 2), "y": torch.full((3, 1), float(sys.argv[2]))}})
"""


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with three checkpoints."""
    directory = tmp_path_factory.mktemp("made") / "run"

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        loss, grads = lm.value_and_grad(lambda p, x: state.apply(p, x)[0].square().mean())(state.params, x)
        return state.apply_gradients(grads), {"loss": loss}

    state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.adam(0.1))
    runner = lm.Runner(
        step,
        transforms=[lm.ema(0.5)],
        checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=2), keep=None),
        config={"lr": 0.1, "note": "first try"},
        log_every=2,
        progress=False,
    )
    runner.fit(state, [torch.ones(4, 2)] * 6, until=lm.Steps(6))
    return directory


@pytest.fixture
def run(made_run: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(made_run, tmp_path / "run"))


def said(capsys: Capture, *argv: Any) -> tuple[int, str, str]:
    code = main([str(each) for each in argv])
    out, err = capsys.readouterr()
    return code, out, err


def damage(path: Path) -> None:
    """Flip a bit in the largest file."""
    file = max((each for each in path.rglob("*") if each.is_file() and "meta" not in each.parts), key=os.path.getsize)
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


# ---------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_a_run_is_a_table_of_its_checkpoints(run: Path, place: str, capsys: Capture) -> None:
    code, out, _ = said(capsys, "inspect", run / place)
    head, *rows = out.splitlines()
    assert code == 0
    assert head.split() == ["checkpoint", "written", "bytes", "metrics"]
    assert [row.split()[0] for row in rows] == ["2", "4", "6"]
    assert all("train/loss" in row and "UTC" in row and "KiB" in row for row in rows)
    assert [row.endswith("(newest)") for row in rows] == [False, False, True]


def test_a_run_as_json(run: Path, capsys: Capture) -> None:
    code, out, _ = said(capsys, "inspect", run, "--json")
    found = json.loads(out)
    assert (code, found["kind"]) == (0, "run")
    assert [row["step"] for row in found["checkpoints"]] == [2, 4, 6]
    assert [row.get("newest", False) for row in found["checkpoints"]] == [False, False, True]
    for row in found["checkpoints"]:
        path = Path(row["path"])
        assert row["bytes"] == sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
        assert row["metrics"]["train/loss"] == lm.checkpoint.metadata(path)["metrics"]["train/loss"]


def test_a_checkpoint_is_its_header_and_its_leaves(run: Path, capsys: Capture) -> None:
    code, out, _ = said(capsys, "inspect", run / "checkpoints" / "6")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "config lr 0.1, note first try" in lines
    assert "step lm.ema(0.5)(step)" in lines
    assert any(line.startswith("clock ") and "step 6" in line for line in lines)
    assert any(line.startswith("command ") for line in lines)
    assert any(line.startswith("metrics ") and "train/loss 0." in line for line in lines)
    assert "params/weight float32 [1, 2] 8 B" in lines
    assert "params 2 3 12 B" in lines
    assert "slots/ema 3 4 20 B" in lines
    assert any(line.startswith("(extra) ") for line in lines)


def test_a_checkpoint_as_json(run: Path, capsys: Capture) -> None:
    code, out, _ = said(capsys, "inspect", run / "checkpoints" / "6", "--json", "--verify")
    found = json.loads(out)
    assert code == 0
    assert found["kind"] == "checkpoint"
    assert found["leaves"]["params/weight"] == {"kind": "tensor", "dtype": "float32", "shape": [1, 2], "bytes": 8}
    assert found["groups"]["params"] == {"leaves": 2, "elements": 3, "bytes": 12}
    assert found["meta"]["config"] == {"lr": 0.1, "note": "first try"}
    assert found["verified"] is True
    path = run / "checkpoints" / "6"
    assert found["bytes"] == sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    assert found["files"] == sum(each.is_file() for each in path.rglob("*"))


def test_values(run: Path, capsys: Capture) -> None:
    weight = lm.checkpoint.load(run / "checkpoints" / "6", under="params/weight")
    _, out, _ = said(capsys, "inspect", run, "--values", "params/weight", "--json")
    assert json.loads(out) == {"params/weight": weight.tolist()}
    code, out, _ = said(capsys, "inspect", run, "--values", "params")
    assert code == 0
    assert f"params/weight: float32 [1, 2], from {weight.min():.6g} to {weight.max():.6g}" in out
    assert f"\n{weight}\n" in out
    assert "params/bias: float32 [1]" in out


def test_values_of_every_kind(tmp_path: Path, capsys: Capture) -> None:
    import ml_dtypes
    import numpy as np

    tree = {
        "bad": torch.tensor([1.0, torch.nan, torch.inf]),
        "half": np.array([0.5], dtype=ml_dtypes.bfloat16),
        "word": "\x1b[31mred",
        "none": None,
        "nothing": {},
        "complex": torch.tensor([1j]),
        "empty": torch.empty(0, 3),
        "flag": torch.tensor(True),
        "eighth": torch.tensor([0.5, torch.nan]).to(torch.float8_e4m3fn),
        **({"fourth": torch.zeros(2, dtype=torch.uint8).view(FLOAT4)} if FLOAT4 else {}),
        "scalar": np.float64(float("inf")),
    }
    lm.checkpoint.save(tmp_path / "a", {"all": tree})
    code, out, _ = said(capsys, "inspect", tmp_path / "a", "--values", "all")
    assert code == 0
    assert "all/bad: float32 [3], from 1 to 1, mean 1, 2 not finite" in out
    assert "all/eighth: float8_e4m3fn [2], from 0.5 to 0.5, mean 0.5, 1 not finite" in out
    assert "all/half: float32 [1], from 0.5 to 0.5, mean 0.5" in out
    assert "all/word: \\x1b[31mred" in out
    assert "\x1b" not in out
    _, out, _ = said(capsys, "inspect", tmp_path / "a", "--values", "all", "--json")
    found = json.loads(out)
    assert found["all/bad"] == [1.0, "nan", "inf"]
    assert (found["all/none"], found["all/nothing"], found["all/complex"]) == (None, {}, ["1j"])
    assert said(capsys, "inspect", tmp_path / "a")[0] == 0


def test_a_name_that_is_not_there(run: Path, capsys: Capture) -> None:
    code, out, err = said(capsys, "inspect", run, "--values", "parms")
    assert (code, out) == (1, "")
    assert "has nothing under 'parms'; it has" in err
    assert "params" in err


def test_damage_is_found_and_named(run: Path, capsys: Capture) -> None:
    path = run / "checkpoints" / "4"
    assert said(capsys, "inspect", path, "--verify")[0] == 0
    damage(path)
    assert said(capsys, "inspect", path)[0] == 0  # nobody has read it
    code, out, err = said(capsys, "inspect", path, "--verify")
    assert (code, out) == (1, "")
    assert err.startswith("lumen inspect: ")
    assert "is damaged: its checksum does not match" in err
    code, out, _ = said(capsys, "inspect", run, "--verify")
    assert code == 1
    assert [("is damaged" in line) for line in out.splitlines()[1:]] == [False, True, False]


def test_a_damaged_header_does_not_hide_the_other_checkpoints(run: Path, capsys: Capture) -> None:
    (run / "checkpoints" / "6" / "meta" / "metadata").write_text("{}")
    code, out, _ = said(capsys, "inspect", run, "--json")
    rows = json.loads(out)["checkpoints"]
    assert code == 1
    assert ["damaged" in row for row in rows] == [False, False, True]
    assert rows[1]["newest"] is True
    code, _, err = said(capsys, "inspect", run / "checkpoints" / "6")
    assert code == 1
    assert "digest does not match" in err


def test_a_path_that_is_not_there_suggests_what_is(run: Path, capsys: Capture) -> None:
    assert "Did you mean run?" in said(capsys, "inspect", run.parent / "rum")[2]
    assert "Did you mean run?" in said(capsys, "inspect", run.parent / "rum" / "checkpoints" / "2")[2]
    assert "contains run." in said(capsys, "export", run.parent / "zzz", "--to", "torch")[2]
    code, _, err = said(capsys, "inspect", run.parent)
    assert code == 1
    assert f"There are some in {run}." in err
    assert "A checkpoint is a directory" in said(capsys, "inspect", __file__)[2]


def test_a_terminal_gets_a_drawn_table(run: Path) -> None:
    ours, theirs = pty.openpty()
    done = zygote.start([sys.executable, "-m", "lumen.cli", "inspect", str(run)], stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while piece := os.read(ours, 4096):
            text += piece
    except OSError:  # the other side is closed
        pass
    assert done.wait() == 0
    assert "│" in text.decode()
    assert "(newest)" in text.decode()


def test_inspecting_loads_neither_jax_nor_orbax(run: Path) -> None:
    program = (
        "import sys; from lumen.cli.main import main;"
        f"code = main(['inspect', {str(run / 'checkpoints' / '2')!r}, '--verify']);"
        "sys.exit(code or ','.join({'jax', 'orbax', 'rich', 'wandb', 'mlflow'} & set(sys.modules)) or None)"
    )
    done = zygote.run([sys.executable, "-c", program], bare=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = zygote.start(
        [sys.executable, "-m", "lumen.cli", "inspect", str(run), "--json"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    _, said = done.communicate(timeout=120)
    assert "Traceback" not in said
    assert "Exception ignored" not in said


# ----------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("what", ["params", "ema", "state"])
def test_export_to_torch(run: Path, what: str, tmp_path: Path, capsys: Capture) -> None:
    code, out, _ = said(capsys, "export", run, "--to", "torch", "--what", what, "-o", tmp_path / "out.pt")
    assert code == 0
    assert f"wrote {what} of {run / 'checkpoints' / '6'} to {tmp_path / 'out.pt'}" in out
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    names = {"params": "params/", "ema": "slots/ema/params/", "state": ""}
    prefix = names[what]
    for name, value in found.items():
        assert torch.equal(value, lm.checkpoint.load(run / "checkpoints" / "6", under=prefix + name))
    assert ("params/weight" if what == "state" else "weight") in found


def test_export_to_safetensors_under_its_own_name(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.chdir(tmp_path)
    assert said(capsys, "export", run / "checkpoints" / "2", "--to", "safetensors")[0] == 0
    assert {"weight", "bias"} == safetensors.load_file("params.safetensors").keys()
    code, _, err = said(capsys, "export", run / "checkpoints" / "2", "--to", "safetensors")
    assert code == 1
    assert "params.safetensors exists" in err


def test_export_of_what_is_not_there(run: Path, tmp_path: Path, capsys: Capture) -> None:
    code, _, err = said(capsys, "export", run, "--to", "torch", "--what", "buffers", "-o", tmp_path / "out.pt")
    assert code == 1
    assert "has no buffers to export" in err
    assert not (tmp_path / "out.pt").exists()


# ----------------------------------------------------------------------------------------------- replay


def lumen(*argv: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lumen.cli", *map(str, argv)]
    place = str(Path(lm.__file__).parents[1])
    path = os.pathsep.join([place, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    return zygote.run(command, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def made_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training script whose first step fails, and its dump in `dumps`."""
    path = tmp_path_factory.mktemp("made") / "train.py"
    path.write_text(TRAIN.format(nan=0))
    place = str(Path(lm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": place}
    done = zygote.run([sys.executable, str(path), "dumps", "nan"], cwd=path.parent, env=environment)
    assert "NonFiniteError: the loss is not finite at step 0" in done.stderr
    return path


@pytest.fixture
def script(made_script: Path, tmp_path: Path) -> Path:
    """A copy of the script and its dump."""
    shutil.copytree(made_script.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / made_script.name


def test_replay_in_a_fresh_process(script: Path) -> None:
    for function in ("train.py:make", "train:composed", f"{script}:composed"):
        done = lumen("replay", "dumps/step-0", "--run", function, cwd=script.parent)
        assert done.returncode == 1, done.stderr
        assert done.stdout.startswith("the step failed: the loss is not finite at step 0.")
        assert "This is the failure that the dump was written for." in done.stdout
        assert done.stderr == ""
    assert [each.name for each in (script.parent / "dumps").iterdir()] == ["step-0"]


def test_what_replay_says_in_this_process(script: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code, out, _ = said(capsys, "replay", "dumps/step-0")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "function __main__:step" in lines
    assert "not finite batch/1 3 of 3" in lines
    assert "transforms lm.guard('dump'), lm.ema(0.9)" in lines
    assert "lumen replay dumps/step-0 --run FILE.py:make" in lines
    assert "state/params/weight float32 [1, 2] 8 B" in lines
    assert said(capsys, "replay", "dumps")[1] == out  # the only one there

    for function, wanted in {
        "train.py": "--run takes FILE.py:function",
        "nowhere.py:make": "no such file: nowhere.py",
        "nowhere.train:make": "no module named 'nowhere'",
        "train.py:mak": "has no function 'mak'; it has step, make, composed, other, wrong",
        "train.py:wrong": r"must return (step, state), or (step, state, batch), but returned function",
    }.items():
        code, out, err = said(capsys, "replay", "dumps/step-0", "--run", function)
        assert (code, out) == (1, "")
        assert wanted in err

    code, _, err = said(capsys, "replay", "dumps/step-0", "--run", "train.py:other")
    assert code == 1
    assert "note: the dump names lm.guard('dump'), lm.ema(0.9); this step has lm.guard('skip')" in err
    assert "slots/ema" in err


def test_a_step_that_was_mended_succeeds_and_one_that_fails_otherwise_says_so(
    script: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(script.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = TRAIN.format(nan=0).replace('batch["y"]).square', 'batch["y"].nan_to_num(1.0)).square')
    Path("mended.py").write_text(text)
    code, out, err = said(capsys, "replay", "dumps/step-0", "--run", "mended.py:make")
    assert (code, err) == (0, "")
    heading, loss = out.splitlines()
    assert heading == "the step succeeded"
    assert 0.0 < float(loss.removeprefix("  loss  ")) < 100.0
    Path("worse.py").write_text(text.replace("NAN = 0", "NAN = 1"))
    code, out, _ = said(capsys, "replay", "dumps/step-0", "--run", "worse.py:make")
    assert code == 1
    assert "the gradient of params['bias']" in out
    assert "The dump was written for another failure: the loss is not finite" in out
    Path("broken.py").write_text("import not_installed_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        main(["replay", "dumps/step-0", "--run", "broken:make"])


def test_anomaly_names_the_operation(script: Path) -> None:
    (script.parent / "worse.py").write_text(script.read_text().replace("NAN = 0", "NAN = 1"))
    done = lumen("replay", "dumps/step-0", "--run", "worse.py:make", "--anomaly", cwd=script.parent)
    assert done.returncode == 1
    assert "returned nan values" in done.stdout
    assert "The dump was written for the resulting failure: " in done.stdout
    assert "worse.py" in done.stderr, "where the operation was called"


# ------------------------------------------------------------------------------------------------- demo


def test_demo_trains_and_goes_on(tmp_path: Path, capsys: Capture) -> None:
    code, out, err = said(capsys, "demo", "--epochs", "2", "--rundir", tmp_path / "a")
    assert (code, err) == (0, "")
    assert "46 steps" in out
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    accuracy = [row["val/accuracy"] for row in rows if "val/accuracy" in row]
    assert accuracy[1] > 0.6
    assert f"val/accuracy  {accuracy[1]:.4f}" in out
    assert f"lumen inspect {tmp_path / 'a' / 'checkpoints' / '46'}" in out
    assert said(capsys, "inspect", tmp_path / "a", "--verify")[0] == 0
    assert "46 steps" in said(capsys, "demo", "--epochs", "2", "--rundir", tmp_path / "a")[1]


def test_demo_without_its_data_or_epochs(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = said(capsys, "demo", "--epochs", "0", "--rundir", tmp_path)
    assert (code, err) == (1, "lumen demo: --epochs must be at least 1, got 0: --epochs 12.\n")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, _, err = said(capsys, "demo", "--rundir", tmp_path)
    assert code == 1
    assert "pip install '.[examples]' in the clone of Lumen" in err


# ------------------------------------------------------------------------------------------ the best one


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A run whose best checkpoint by its monitored metric, step 2, is not the newest."""
    losses = iter([3.0, 1.0, 2.0])
    runner = lm.Runner(
        lambda state, x: ({"w": state["w"] + 1}, {}),
        checkpoint=lm.Checkpointer(tmp_path / "best", keep=None, monitor="val/score", mode="min"),
        progress=False,
    )
    validate = lm.Validate(lambda state, x: {"score": next(losses), "accuracy": state["w"], "gap": -state["w"]}, [1])
    runner.fit({"w": torch.zeros(())}, [1], until=lm.Epochs(3), validate=validate)
    return tmp_path / "best"


def test_the_best_checkpoint_by_the_metric_that_the_run_monitors(measured: Path, capsys: Capture) -> None:
    code, out, _ = said(capsys, "inspect", measured, "--best", "--json")
    assert (code, Path(json.loads(out)["path"]).name) == (0, "2")
    code, out, _ = said(capsys, "inspect", measured, "--best", "--values", "w")
    assert (code, "tensor(2.)" in out) == (0, True)
    target = measured / "state.pt"
    assert said(capsys, "export", measured, "--best", "--to", "torch", "--what", "state", "-o", target)[0] == 0
    assert torch.load(target, weights_only=True) == {"w": torch.tensor(2.0)}


def test_the_best_checkpoint_by_another_metric(measured: Path, capsys: Capture) -> None:
    def best(*options: str) -> str:
        code, out, err = said(capsys, "inspect", measured, "--json", *options)
        return Path(json.loads(out)["path"]).name if code == 0 else err

    assert best("--monitor", "val/accuracy") == "3"
    assert best("--monitor", "val/gap", "--mode", "max") == "1"
    assert "write --mode min or --mode max" in best("--monitor", "val/gap")
    error = best("--monitor", "val/los")
    assert "none was saved with 'val/los'. Write --monitor NAME, with one of " in error
    assert "val/accuracy, val/gap, val/score." in error


# ------------------------------------------------------------------------------------------ command line


def test_the_command_alone_lists_the_commands(capsys: Capture) -> None:
    code, out, _ = said(capsys)
    assert code == 0
    assert all(f"  {name} " in out for name in ("demo", "doctor", "plan", "plot", "inspect", "export", "replay"))


@pytest.mark.parametrize("argv", [["inspct"], ["inspect"], ["export", "x"], ["export", "x", "--to", "gguf"]])
def test_a_wrong_command_line_is_2(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage: lumen" in capsys.readouterr().err


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("lumen ")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("demo", "--epochs"),
        ("doctor", "--quick"),
        ("plan", "--mesh"),
        ("plot", "--smooth"),
        ("inspect", "--verify"),
        ("export", "--to"),
        ("replay", "--anomaly"),
    ],
)
def test_help_says_what_each_is_for_with_examples_that_parse(name: str, option: str, capsys: Capture) -> None:
    for argv in (["--help"], [name, "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
    overview, own = capsys.readouterr().out.split("usage: lumen", 2)[1:]
    assert f"    {name} " in overview
    assert option in own
    examples = [line.split("   ")[0] for line in own.split("examples:")[1].splitlines() if f"lumen {name}" in line]
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example.split(" | ")[0].split(f"lumen {name}")[1])
        _parser().parse_args([name, *words])  # ends the process where it is wrong
