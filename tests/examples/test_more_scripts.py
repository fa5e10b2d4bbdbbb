"""More of the example scripts, smaller than by default: each must learn what it claims.

They run in this process, by their own command lines: starting a process for each would take longer than their training.
"""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import tyro

from tests.examples.test_scripts import EXAMPLES, final, run

Play = Callable[..., str]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Play]:
    """Run a script as `python examples/SCRIPT ARGS` would, in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)

    def played(script: str, *args: str) -> str:
        spec = importlib.util.spec_from_file_location(f"examples_{Path(script).stem}", EXAMPLES / script)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look up their annotations
        spec.loader.exec_module(module)
        module.main(tyro.cli(module.Config, args=args))
        return capsys.readouterr().out

    return played


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(each) for each in found.groups()]


def test_vae_beats_the_mean_image(play: Play) -> None:
    out = play("vae.py", "--epochs", "8")
    bound, baseline = numbers(r"ELBO per pixel (-[\d.]+) nats \(mean image: (-[\d.]+)\)", out)
    assert bound > baseline + 1
    error, baseline = numbers(r"reconstruction ([\d.]+) \(mean image: ([\d.]+)\)", out)
    assert error < 0.6 * baseline
    assert final(Path("runs/vae/metrics.jsonl"), "val/kl") > 5, "the latents are used"


@pytest.mark.slow
def test_vae_draws_the_same_noise_on_two_processes(tmp_path: Path) -> None:
    for processes in (1, 2):
        run("vae.py", "--epochs", "2", "--logdir", str(processes), cwd=tmp_path, processes=processes)
    alone, spread = (final(tmp_path / each / "metrics.jsonl", "val/elbo_per_pixel") for each in ("1", "2"))
    assert alone == pytest.approx(spread, abs=1e-4)


def test_diffusion_draws_digits(play: Play) -> None:
    out = play("diffusion.py", "--epochs", "12", "--samples", "100")
    pattern = r"{} +read as the digit meant ([\d.]+), distance to the nearest training image ([\d.]+)"
    (drawn, near), (guessed, far) = (numbers(pattern.format(name), out) for name in ("samples", "noise"))
    assert drawn > 0.7 > 0.3 > guessed
    assert near < 0.6 * far
    assert final(Path("runs/diffusion/metrics.jsonl"), "val/loss") < 0.4


@pytest.mark.slow
def test_policy_gradient_keeps_the_poles_up(play: Play) -> None:
    out = play("policy_gradient.py", "--updates", "30")
    before, after, best = numbers(r"return of 100 episodes: ([\d.]+) before, ([\d.]+) after; best (\d+)", out)
    assert before < 0.25 * best
    assert after > 0.5 * best


@pytest.mark.slow
def test_distillation_gains_from_images_without_labels(play: Play) -> None:
    out = play("distillation.py")
    alone, taught = numbers(r"labels alone ([\d.]+)\n +with teacher ([\d.]+)", out)
    assert alone > 0.5
    assert taught > alone + 0.03


@pytest.mark.slow
def test_contrastive_features_beat_pixels(play: Play) -> None:
    out = play("contrastive.py", "--epochs", "25")
    pixels, untrained, trained = numbers(
        r"pixels +([\d.]+)\n +untrained features +([\d.]+)\n +trained features +([\d.]+)", out
    )
    assert trained > untrained + 0.02
    assert trained > pixels


@pytest.mark.slow
def test_gan_reaches_the_ring(play: Play) -> None:
    out = play("gan.py", "--steps", "700", "--batch-size", "128", "--lr", "4e-3")
    for word, low, high in (("before", -0.1, 0.2), ("after", 0.4, 1.0)):
        modes, near = numbers(word + r": +(\d) of 8 reached, ([\d.]+)% of the points", out)
        assert low < near / 100 <= high
    assert modes >= 5


@pytest.mark.slow
def test_maml_adapts_where_the_joint_net_cannot(play: Play) -> None:
    out = play("maml.py", "--steps", "400")
    none, once, more = numbers(r"joint +([\d.]+) +([\d.]+) +([\d.]+)", out)
    before, adapted, further = numbers(r"maml +([\d.]+) +([\d.]+) +([\d.]+)", out)
    assert adapted < 0.7 * min(once, before)
    assert further < adapted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers
def test_finetune_lora_learns_and_goes_on(play: Play) -> None:
    pytest.importorskip("transformers")
    small = ("--pretrain-steps", "60", "--layers", "1", "--width", "64", "--lr", "2e-2")
    out = play("finetune_lora.py", *small, "--steps", "60")
    before, after = numbers(r"held-out loss ([\d.]+) before, ([\d.]+) nats", out)
    assert after < before - 0.02
    log = Path("runs/finetune_lora")
    tuned = safetensors.torch.load_file(log / "tuned/model.safetensors")
    base = safetensors.torch.load_file(log / "base/model.safetensors")
    assert tuned.keys() == base.keys()
    changed = {name for name in base if not tuned[name].equal(base[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "up_proj", "down_proj"}
    assert "held-out" in play("finetune_lora.py", *small, "--steps", "60"), "it is through, and says so"


def test_dp_sgd_learns_within_its_budget(play: Play) -> None:
    pytest.importorskip("dp_accounting")
    out = play("dp_sgd.py", "--steps", "60")
    accuracy, spent = numbers(r"with privacy: +([\d.]+), epsilon ([\d.]+) at delta", out)
    assert accuracy > 0.75
    assert 0 < spent < 10
    (plain,) = numbers(r"without privacy: ([\d.]+)", out)
    assert plain > 0.85


@pytest.mark.slow
def test_planner_tells_what_fits(play: Play) -> None:
    out = play("planner.py", "--layers", "2", "--width", "14336", "--heads", "112")
    found = dict(re.findall(r"│ ([a-z][\w ,]+?) +│.*│ +(yes|no) │", out))
    assert found == {
        "ddp": "no",
        "fsdp, optimizer only": found["fsdp, optimizer only"],
        "fsdp": "yes",
        "fsdp in 64 parts": "yes",
        "fsdp in 8 parts": "yes",
    }
    assert re.search(r"fastest that fits, if no communication is hidden: fsdp", out)
