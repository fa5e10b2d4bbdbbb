"""The example scripts on two processes, under `lm.fsdp` in place of `lm.ddp`: the same numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import tyro

import lumen as lm
from lumen.core import distributed

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples"

# Arguments of a tiny run, the stage of fsdp, and a metric to compare. Stage 2 is for losses that call `torch.func` or
# `torch.vmap`, and for one that applies the model as often as the carts of its own rows live.
SCRIPTS = {
    "contrastive": (("--epochs", "1", "--batch-size", "512"), 3, "train/loss"),
    "diffusion": (("--epochs", "1", "--times", "5", "--width", "8", "--samples", "10"), 3, "train/loss"),
    "digits": (("--epochs", "1", "--batch-size", "512", "--transforms", "donate", "ema", "accumulate"), 3, "val/loss"),
    "distillation": (("--epochs", "1"), 3, "train/loss"),
    "gan": (("--steps", "4", "--batch-size", "16", "--width", "8"), 2, "train/generator"),
    "maml": (("--steps", "3", "--tasks", "4"), 2, "train/loss"),
    "policy_gradient": (("--updates", "2", "--carts", "4"), 2, "val/return"),
    "vae": (("--epochs", "1", "--batch-size", "512", "--width", "8"), 3, "val/elbo_per_pixel"),
}
ELSEWHERE = {
    "char_lm": "tests/examples/test_scripts.py runs it under every strategy",
    "hydra": "tests/examples/test_scripts.py runs it under fsdp on two processes",
    "pretrain": "tests/examples/test_pretrain.py runs it under each of its strategies",
    "ray_train": "tests/examples/test_ray.py runs it where Ray is installed",
    "ray_tune": "tests/examples/test_ray.py runs it where Ray is installed",
    "zero": "its strategy is lm.deepspeed",
}
ALONE = {
    "dp_sgd": "lm.dp_sgd is refused under both: noise belongs to all rows",
    "finetune_lora": "one process writes the directory for the hub",
    "planner": "it plans strategies, and trains nothing",
    "resume": "one process is killed and resumes",
}


def play(name, args, strategy, directory):
    """What a script has left: the last value of each metric, from the first process."""
    strategies = {"ddp": lm.ddp, **{f"fsdp{n}": lambda n=n, **_options: lm.fsdp(stage=n) for n in (2, 3)}}
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    before = Path.cwd()
    os.chdir(directory)
    try:
        sys.modules[spec.name] = module  # where dataclasses look up their annotations
        with mock.patch.object(lm, "ddp", strategies[strategy]):
            spec.loader.exec_module(module)
            module.main(tyro.cli(module.Config, args=[*args, "--progress", "lines"]))
    finally:
        os.chdir(before)
        del sys.modules[spec.name]
    if distributed.rank():
        return {}
    (log, *_) = sorted(directory.glob("runs/**/metrics.jsonl"))
    return {key: value for line in log.read_text().splitlines() for key, value in json.loads(line).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_the_same_numbers_under_fsdp(name, world2, tmp_path):
    args, stage, metric = SCRIPTS[name]
    found = []
    for strategy in ("ddp", f"fsdp{stage}"):
        directory = tmp_path / strategy
        directory.mkdir()
        found.append(world2.run(play, name, args, strategy, directory)[0])
    ddp, fsdp = found
    assert fsdp[metric] == pytest.approx(ddp[metric], rel=1e-4)


def test_every_script_is_here_or_says_why_not():
    scripts = {each.stem for each in EXAMPLES.glob("*.py")} | {"hydra"}
    assert scripts == {*SCRIPTS, *ELSEWHERE, *ALONE}
