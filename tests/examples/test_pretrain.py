"""The pretraining script: every option changes how its step is computed, and none of them what it computes."""

from pathlib import Path

import pytest

from tests.examples.test_scripts import final, run

TINY = ("--steps", "4", "--layers", "2", "--width", "16", "--heads", "2", "--context", "32", "--documents", "60")
COMMON = (*TINY, "--batch-size", "4", "--progress", "lines")
PLAIN = ("--remat", "all", "--no-chunked")
WAYS = {
    "one process": ((), 1),
    "recomputed": (("--remat", "none", "--accumulate", "2"), 1),
    "budget": (("--remat", "budget=200KB"), 1),
    "fsdp": (("--strategy", "fsdp"), 2),
    "tensor": (("--strategy", "tensor", "--remat", "none"), 2),
    "context": (("--strategy", "context", "--accumulate", "2"), 2),
    "ddp": (("--strategy", "ddp", "--remat", "attention"), 2),
}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_way_has_the_same_losses(tmp_path: Path) -> None:
    found = {}
    for name, (args, processes) in {"plain": (PLAIN, 1), **WAYS}.items():
        directory = tmp_path / name.replace(" ", "-")
        directory.mkdir()
        out = run("pretrain.py", *COMMON, *args, cwd=directory, processes=processes)
        assert out.count("nats per byte") == 1
        found[name] = final(directory / "runs/pretrain/metrics.jsonl", "val/loss")
    assert found == pytest.approx(dict.fromkeys(found, found["plain"]), rel=1e-4)
    assert found["plain"] < 5.6


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    size = ("--steps", "60", "--layers", "1", "--width", "32", "--context", "64", "--documents", "200")
    out = run("pretrain.py", *size, "--batch-size", "8", "--progress", "lines", cwd=tmp_path)
    assert "of whose places are tokens" in out
    assert final(tmp_path / "runs/pretrain/metrics.jsonl", "val/loss") < 3.4
