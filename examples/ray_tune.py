"""Search hyperparameters with Ray Tune, which ends trials that are worse than others by their validation accuracy.

    python examples/ray_tune.py                  # nine trials, two at a time, on this machine
    python examples/ray_tune.py --trials 27 --gpus

Each trial is a process that Ray starts, on any machine of its cluster. A callback reports each validation to Ray, whose
scheduler (ASHA, asynchronous successive halving) compares it with those that other trials had at the same step. It
stops a trial that is not among the best third. A trial that is lost is started again, and resumes from Lumen's newest
checkpoint. On several machines --rundir is a folder that all of them share.

If trials differ in values alone, as here, `lm.successive_halving` searches in one process, which takes a fraction of
the time for a small model.

Expected: a validation accuracy of 0.93 or more, and trials that were stopped early. --rundir contains a folder for each
trial. Needs `pip install ".[examples,ray]"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ray
import torch
import torch.nn.functional as F
import tyro
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lumen as lm


@dataclass
class Config:
    """Settings of the search."""

    trials: int = 9
    epochs: int = 9
    """How many epochs the best trials are trained."""
    batch_size: int = 128
    seed: int = 0
    at_once: int = 2
    """How many trials run at the same time."""
    gpus: bool = False
    """Give each trial a GPU."""
    rundir: Path = Path("runs/ray_tune")


def load(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A training and a validation set, 80 to 20."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
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
    """Accuracy on held-out images."""
    logits, _ = state.apply(state.params, batch["image"])
    return {"accuracy": lm.Mean.of(logits.argmax(-1) == batch["label"])}


class Report(lm.Callback):
    """Reports each validation to Ray, which may then stop the trial."""

    def on_validate(self, view: lm.CallbackContext) -> None:
        """After each epoch."""
        tune.report({"step": view.clock.step, "accuracy": view.metrics["val/accuracy"]})


def trial(values: dict, config: Config) -> None:
    """What the process of a trial does, with its own `values` of lr and width."""
    rundir = config.rundir / "trials" / tune.get_context().get_trial_id()
    torch.manual_seed(config.seed)
    train_set, val_set = load(config.seed)
    width = values["width"]
    net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    device = "cuda" if config.gpus else "cpu"
    runner = lm.Runner(
        step,
        transforms=[lm.donate()],
        checkpoint=lm.Checkpointer(rundir),
        sinks=[lm.sinks.JSONL(rundir / "metrics.jsonl")],
        callbacks=[Report()],
        progress=False,
    )
    runner.fit(
        lm.TrainState.create(net.to(device), lm.optim.adamw(values["lr"]), seed=config.seed),
        lm.Loader(train_set, batch_size=config.batch_size, seed=config.seed),
        until=lm.Epochs(config.epochs),
        validate=lm.Validate(eval_step, lm.Loader(val_set, batch_size=512, shuffle=False)),
        resume="auto",
    )


def main(config: Config) -> None:
    """Search, and print the result."""
    config.rundir = config.rundir.absolute()  # trials have directories of their own
    epoch = -(-len(load(config.seed)[0]["label"]) // config.batch_size)
    ray.init(include_dashboard=False)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, config=config), {"cpu": 1, "gpu": int(config.gpus)}),
        param_space={"lr": tune.loguniform(1e-5, 1e-1), "width": tune.choice([32, 64])},
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            num_samples=config.trials,
            max_concurrent_trials=config.at_once,
            scheduler=ASHAScheduler(
                time_attr="step", grace_period=epoch, max_t=config.epochs * epoch, reduction_factor=3
            ),
            search_alg=tune.search.BasicVariantGenerator(random_state=config.seed),
        ),
        run_config=tune.RunConfig(
            name="ray", storage_path=str(config.rundir / "ray"), failure_config=tune.FailureConfig(max_failures=1)
        ),
    )
    results = tuner.fit()
    best = results.get_best_result()
    stopped = sum(result.metrics["step"] < config.epochs * epoch for result in results)
    print(
        f"val/accuracy {best.metrics['accuracy']:.4f} with lr={best.config['lr']:.2g} and width={best.config['width']};"
        f" {stopped} of {len(results)} trials were stopped early"
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
