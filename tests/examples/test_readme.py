"""Every Python block of the README, and of the pages that say so, runs: in order, in one session for each."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import lumen as lm
from tests.examples.blocks import run_blocks, section

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.timeout(240)
def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = run_blocks(README, least=1)
    assert int(session["fast_state"].step) == 2
    assert session["metrics"]["loss"].isfinite()


def test_readme_and_the_first_page_open_with_the_same_sentences() -> None:
    opening = README.read_text().partition("\n```")[0]
    assert (README.parent / "docs/index.md").read_text().startswith(opening)


@pytest.mark.timeout(240)
def test_first_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = run_blocks(README.parent / "docs/index.md")
    assert session["result"].metrics["val/accuracy"] > 0.8
    assert session["resumed"].clock.step == 32
    assert session["metrics"]["loss"].compute().shape == torch.Size([8])
    assert (tmp_path / "runs/tour/metrics.jsonl").exists()


@pytest.mark.timeout(240)
def test_runner_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGUSR1)
    try:
        session = run_blocks(README.parent / "docs/runner.md")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert session["result"].metrics["val/clean/accuracy"] > 0.7
    assert session["stopped"].reason.startswith("val/loss has not improved")
    assert session["best"].best > 0.7
    assert session["one_batch"].metrics["train/loss"] < 0.01
    assert session["probabilities"].shape == (112, 3)
    assert (tmp_path / "lr.png").exists()
    assert list((tmp_path / "profile").glob("*.pt.trace.json"))


@pytest.mark.parametrize(
    ("train", "queued", "code"),
    [
        ("exit 0", False, 0),
        ("exit 1", False, 1),  # also where the run before was interrupted
        ("touch runs/a/interrupted.json; exit 1", True, 1),  # torchrun's code for 75
        ("touch runs/a/interrupted.json; exit 75", True, 75),
    ],
)
def test_slurm_script_starts_a_job_again_that_was_interrupted(train, queued, code, tmp_path: Path) -> None:
    (script,) = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", (README.parent / "docs/runner.md").read_text(), re.DOTALL)
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/interrupted.json").touch()
    for name, body in {"srun": 'shift; exec "$@"', "torchrun": train, "scontrol": 'echo "$@" > queued'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == code
    assert (tmp_path / "queued").exists() is queued
    assert not queued or (tmp_path / "queued").read_text() == "requeue 7\n"


@pytest.mark.timeout(240)
def test_checkpoints_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = run_blocks(README.parent / "docs/checkpoints.md")
    assert (session["first"].clock.step, session["second"].clock.step) == (16, 32)
    assert session["half"]["0.weight"].dtype == torch.bfloat16
    weight = session["params"]["0.weight"]
    assert torch.equal(session["moved"]["backbone"]["0.weight"], weight)
    assert (session["arrays"]["params"]["0.weight"] == weight.numpy()).all()
    assert Path(session["dump"]).is_dir()
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.timeout(240)
def test_metrics_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = run_blocks(README.parent / "docs/metrics.md")
    assert session["merged"] == {"loss": 4.0, "longest": 7}
    assert session["results"].keys() == {"auroc", "scores/accuracy", "scores/f1"}
    assert session["steps"] == [2, 4, 6, 8]
    assert session["losses"][-1] < session["losses"][0]
    assert len(session["memory"]["weight"][1]) == 2


@pytest.mark.timeout(240)
def test_lightning_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = run_blocks(README.parent / "docs/lightning.md")
    assert session["result"].metrics["val/accuracy"] > 0.8
    assert session["ported"].metrics["val/accuracy"] > 0.8
    x, _ = session["held_out"].dataset
    state = session["result"].state
    torch.testing.assert_close(session["trained"](x), state.apply(state.params, x)[0])


def test_every_test_that_the_comparison_names_exists() -> None:
    rows = re.findall(
        r"^\| (\d+) \|.*`(\S+)::(\w+)` \|$", (README.parent / "docs/compare.md").read_text(), flags=re.MULTILINE
    )
    assert [int(number) for number, *_ in rows] == [*range(1, len(rows) + 1)]
    assert len(rows) >= 40
    for _, file, name in rows:
        assert f"\ndef {name}(" in (README.parent / "tests" / file).read_text(), (file, name)


def test_the_transform_of_the_docs_scales_grads() -> None:
    session: dict = {"lm": lm}
    exec(section(README.parent / "docs" / "transforms.md", "Writing one"), session)

    def step(state, batch):
        loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0].mean())(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    state = lm.TrainState.create(torch.nn.Linear(3, 1), lm.optim.sgd(1.0))
    batch = torch.randn(4, 3)
    plain, _ = step(state, batch)
    scaled, _ = lm.compose(session["scale_grads"](3.0), lm.donate())(step)(lm.donate().init(state), batch)
    for name, before in state.params.items():
        torch.testing.assert_close(scaled.params[name] - before, 3.0 * (plain.params[name] - before))


@pytest.mark.timeout(240)
def test_hugging_face_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    session = run_blocks(README.parent / "docs/huggingface.md")
    assert session["result"].metrics["train/loss"] < 5.5
    assert all(torch.equal(p, session["state"].params[n]) for n, p in session["again"].named_parameters())
    assert sum(p.numel() for p in session["tuned"].params.values()) < 0.2 * sum(
        p.numel() for p in session["state"].params.values()
    )
    assert (session["merged"] / "model.safetensors").exists()
    assert all(torch.equal(p, session["state"].params[n]) for n, p in session["loaded"].params.items())
    assert (session["saved"] / "model.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torchao's int8 products would run on the GPU alone")
def test_accelerators_page_runs() -> None:
    session = run_blocks(README.parent / "docs/accelerators.md")
    kept = {name for name, tensor in session["small"].buffers.items() if tensor.dtype == torch.int8}
    assert {"0.weight_qdata", "2.weight_qdata"} <= kept
    assert session["metrics"]["loss"] > 0


def test_the_reference_has_every_public_name() -> None:
    """A submodule with the name of what it holds would hide it from `::: lumen.optim`."""
    text = "\n".join(page.read_text() for page in (README.parent / "docs/api").glob("*.md"))
    pages = set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE))
    for package in (lm.bridges, lm.checkpoint, lm.metrics, lm.optim, lm.parallel, lm.sinks):
        assert package.__name__ in pages
        folder = Path(str(package.__file__)).parent
        hidden = {path.stem for path in folder.glob("*.py")} & {n for n, v in vars(package).items() if callable(v)}
        for name in sorted(hidden):
            assert f"{package.__name__}.{name}.{name}" in pages
