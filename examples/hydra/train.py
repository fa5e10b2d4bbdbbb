"""Train on scikit-learn's handwritten digits, with every choice and setting in composable YAML files, by Hydra.

    python examples/hydra/train.py                                    # about 20 seconds on 2 cores
    python examples/hydra/train.py optimizer=lion transforms=mixed strategy=fsdp
    python examples/hydra/train.py model=mlp model.width=256 lr=1e-3 steps=300
    python examples/hydra/train.py --multirun model=mlp,convnet optimizer=adamw,lion steps=200
    torchrun --nproc-per-node=2 examples/hydra/train.py strategy=fsdp

`conf/` has a folder for each choice, with a file for each alternative: `model`, `optimizer`, `transforms`, `strategy`.
A file names what it builds (`_target_: lumen.optim.adamw`) and the arguments, so Lumen needs no configuration system:
Hydra calls the target, and the script gets the object. `--multirun` runs every combination, one after another;
`--help` lists the settings, `--cfg job` shows the configuration of a run.

Expected: a validation accuracy of 0.97 or more. The directory runs/hydra/MODEL-OPTIMIZER-TRANSFORMS-STRATEGY, which
`rundir=…` changes, contains the composed configuration (.hydra/config.yaml), TensorBoard logs, a JSONL file and
checkpoints. Started again with the same choices, a run resumes. A sweep leaves a folder for each of its runs in
runs/hydra/sweep, named by what differs. Needs `pip install ".[examples,hydra]"`.
"""

from __future__ import annotations

from pathlib import Path

import hydra
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from sklearn.datasets import load_digits
from torch import Tensor

import lumen as lm


def load(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A training and a validation set, 80 to 20."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0 - 0.5
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = len(labels) * 4 // 5
    return tuple({"image": images[part], "label": labels[part]} for part in (order[:cut], order[cut:]))


def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
    """One training step."""

    def loss_fn(params, batch):
        logits, _ = state.apply(params, batch["image"])
        return lm.Mean.of(F.cross_entropy(logits, batch["label"], reduction="none"))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def eval_step(state: lm.TrainState, batch: dict[str, Tensor]) -> dict[str, lm.Mean]:
    """Loss and accuracy on held-out images."""
    logits, _ = state.apply(state.params, batch["image"])
    loss = lm.Mean.of(F.cross_entropy(logits, batch["label"], reduction="none"))
    return {"loss": loss, "accuracy": lm.Mean.of(logits.argmax(-1) == batch["label"])}


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    """Train as the configuration says; the validation accuracy, which a sweeper may maximize."""
    torch.manual_seed(config.seed)
    rundir = Path(HydraConfig.get().runtime.output_dir)
    train_set, val_set = load(config.seed)
    # "all" hands over plain lists and dicts; else an optimizer in a list, being a dataclass, becomes configuration.
    chosen = (config.model, config.optimizer, config.transforms, config.strategy)
    net, tx, transforms, strategy = (instantiate(each, _convert_="all") for each in chosen)
    every = lm.Every(steps=min(config.every, config.steps))
    runner = lm.Runner(
        step,
        transforms=[*transforms["outside"], lm.seeded(), strategy, *transforms["inside"]],
        checkpoint=lm.Checkpointer(rundir, every=every),
        sinks=[lm.sinks.TensorBoard(rundir), lm.sinks.JSONL(rundir / "metrics.jsonl")],
        config=OmegaConf.to_container(config, resolve=True),
        progress=config.progress,
    )
    result = runner.fit(
        lm.TrainState.create(net, tx, seed=config.seed),
        lm.Loader(train_set, batch_size=config.batch_size, seed=config.seed),
        until=lm.Steps(config.steps),
        validate=lm.Validate(
            eval_step, lm.Loader(val_set, batch_size=256, shuffle=False), every=every, use=transforms["validate"]
        ),
        resume="auto",
    )
    if lm.rank() == 0:
        print(f"val/accuracy {result.metrics['val/accuracy']:.4f} after {result.clock.step} steps: {rundir}")
    return result.metrics["val/accuracy"]


if __name__ == "__main__":
    main()
