"""LightningModules across the bridge: the numbers of `lightning.Trainer`."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import lumen as lm

EPOCHS, ROWS, SIZE = 3, 22, 4  # the last batch of an epoch has two rows
BATCHES = -(-ROWS // SIZE)


class Classifier(L.LightningModule):
    """What people write: hyperparameters, metrics, logging, BatchNorm."""

    def __init__(self, configure: Any) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 8})
        self.configure = configure
        self.body = nn.Sequential(nn.Linear(5, self.hparams.width), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.fixed = nn.Linear(2, 2).requires_grad_(False)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.double()

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log_dict({"largest": x.max(), "rows": float(len(x))}, reduce_fx="max", on_step=False, on_epoch=True)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        logits = self(x)
        self.accuracy.update(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_accuracy", self.accuracy)
        self.log("val_rows", len(x), reduce_fx="sum")

    def predict_step(self, batch: Any) -> Any:
        return self(batch[0]).softmax(-1)

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def data(seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def loader(seed: int) -> DataLoader[Any]:
    return DataLoader(data(seed), batch_size=SIZE)


def by_lightning(module: Any, **options: Any) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )
        trainer.fit(module, loader(1), loader(2))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def by_lumen(bridged: Any, *transforms: Any) -> tuple[Any, lm.sinks.Memory]:
    sink = lm.sinks.Memory()
    runner = lm.Runner(bridged.step, transforms=transforms, sinks=[sink], progress=False, log_every=BATCHES)
    validate = lm.Validate(bridged.validation_step, loader(2))
    return runner.fit(bridged.state, loader(1), until=lm.Epochs(EPOCHS), validate=validate).state, sink


def groups(module: Any) -> list[dict[str, Any]]:
    return [{"params": module.body.parameters(), "lr": 0.02}, {"params": module.head.parameters(), "weight_decay": 0.1}]


def sgd(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def adamw(module: Any) -> Any:
    optimizer = torch.optim.AdamW(groups(module), lr=0.05, betas=(0.8, 0.9), eps=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, module.trainer.estimated_stepping_batches)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def warmed(module: Any) -> Any:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05, eps=1e-3)  # the bias before BatchNorm has no gradient
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
    ]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[4])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 2}}


def one_cycle(module: Any) -> Any:
    optimizer = torch.optim.RMSprop(module.parameters(), lr=0.05, eps=1e-3)
    total = EPOCHS * BATCHES
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=total, cycle_momentum=False)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def cycling_momentum(module: Any) -> Any:
    optimizer = torch.optim.SGD(groups(module), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * BATCHES)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def cycling_betas(module: Any) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, eps=1e-3)
    total = module.trainer.estimated_stepping_batches
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def cycling_every_epoch(module: Any) -> Any:
    optimizer = torch.optim.Adamax(module.parameters(), lr=0.05, eps=1e-3)  # an optimizer that stays torch's own
    return [optimizer], [torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.05, step_size_up=2)]


class DecayingWeights(torch.optim.lr_scheduler.LambdaLR):
    """Changes the weight decay with the learning rate, as papers on decoupled decay do."""

    def step(self, epoch: Any = None) -> None:
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.1 * group["lr"]


def decaying_weights(module: Any) -> Any:
    optimizer = torch.optim.RMSprop(module.parameters(), lr=0.05, eps=1e-3, weight_decay=0.1)
    scheduler = DecayingWeights(optimizer, lambda step: 0.9**step)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def plateau(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.3)
    return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


def head_alone(module: Any) -> Any:
    return torch.optim.Adamax(module.head.parameters(), lr=0.05)


CYCLING = [cycling_momentum, cycling_betas, cycling_every_epoch, decaying_weights]


@pytest.mark.parametrize("configure", [sgd, adamw, warmed, one_cycle, plateau, head_alone, *CYCLING])
def test_a_run_is_that_of_the_trainer(configure: Any) -> None:
    module = Classifier(configure)
    start = copy.deepcopy(module.state_dict())
    bridged = lm.bridges.lightning(module, epochs=EPOCHS, batches=BATCHES)
    state, sink = by_lumen(bridged)
    assert all(torch.equal(value, start[name]) for name, value in module.state_dict().items()), "the module changed"
    wanted = by_lightning(module)
    for name, value in module.state_dict().items():
        torch.testing.assert_close({**state.params, **state.buffers}[name], value, rtol=1e-10, atol=1e-10)
    rows = [values for _, values in sink.rows]
    found = {key: value for row in rows for key, value in row.items()}
    assert found["train/train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-9)
    assert found["train/largest"] == pytest.approx(wanted["largest"])
    assert found["val/val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-6)  # Lightning's means are float32
    assert found["val/val_accuracy"] == pytest.approx(wanted["val_accuracy"])
    assert found["val/val_rows"] == wanted["val_rows"] == ROWS


class Measured(Classifier):
    """A collection of metrics, logged in each of the usual ways, and values of some steps only."""

    def __init__(self) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
        accuracies = {"micro": MulticlassAccuracy(3, average="micro"), "macro": MulticlassAccuracy(3)}
        self.train_metrics = MetricCollection(accuracies, prefix="train_")
        self.val_metrics = self.train_metrics.clone(prefix="val_", postfix="_all")
        self.steps = nn.ModuleDict({"validation": self.val_metrics})  # the same object under another name

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_epoch=True)
        self.log("window", loss, on_step=True)
        of_batch = self.train_metrics(logits, y)
        self.log("micro_of_batch", of_batch["train_micro"], on_step=False, on_epoch=True)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        if int(batch_idx) % 2 == 0:
            self.log("even", float(len(y)), on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.steps["validation"].update(self(x), target=y)
        for name, metric in self.val_metrics.items():
            self.log(name, metric)
        self.log("macro_by_name", self.val_metrics["val_macro_all"])
        self.log("macro_by_attribute", self.val_metrics.macro)


def test_metrics_of_an_epoch_and_collections_are_those_of_the_trainer() -> None:
    module = Measured()
    bridged = lm.bridges.lightning(module)
    sink = lm.sinks.Memory()
    runner = lm.Runner(bridged.step, sinks=[sink], progress=False, log_every=4)  # an epoch has six steps
    validate = lm.Validate(bridged.validation_step, loader(2))
    result = runner.fit(bridged.state, loader(1), until=lm.Epochs(EPOCHS), validate=validate)
    wanted = by_lightning(module)
    for name in ("loss", "micro_of_batch", "train_micro", "train_macro", "even"):
        steps, values = sink[f"train/{name}"]
        assert steps == [BATCHES * epoch for epoch in range(1, EPOCHS + 1)], name
        assert values[-1] == pytest.approx(wanted[name], rel=1e-6), name
    assert sink["train/loss_step"] == sink["train/window"]
    assert sink["train/window"][0] == [4, *range(6, 7), 8, 12, 16, 18]
    for name in ("val_micro_all", "val_macro_all", "macro_by_name", "macro_by_attribute"):
        assert result.metrics[f"val/{name}"] == pytest.approx(wanted[name]), name
    assert wanted["loss"] == wanted["loss_epoch"] != wanted["loss_step"]


def test_it_runs_under_transforms() -> None:
    module = Classifier(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    bridged = lm.bridges.lightning(module)
    state, _ = by_lumen(bridged, lm.clip(0.5), lm.donate())
    by_lightning(module, gradient_clip_val=0.5)
    for name, value in module.state_dict().items():
        torch.testing.assert_close({**state.params, **state.buffers}[name], value, rtol=1e-5, atol=1e-7)


def test_accumulation_is_exact_where_the_trainers_is_a_mean_of_means() -> None:
    class Plain(Classifier):
        def __init__(self) -> None:
            super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
            self.body = nn.Linear(5, 8).double()

    module = Plain()
    whole, *_ = next(iter([[data(1).tensors]]))
    bridged = lm.bridges.lightning(module)
    wanted, metrics = bridged.step(bridged.state, whole)
    stack = lm.compose(lm.compile(backend="eager"), lm.accumulate(3), lm.guard(), lm.remat("body"))(bridged.step)
    found, parts = stack(stack.init(bridged.state), whole)
    for name, value in wanted.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-10, atol=1e-12)
    for name in ("train_loss", "largest"):
        assert float(lm.compute_metrics(parts)[name]) == pytest.approx(float(lm.compute_metrics(metrics)[name]))


def test_predictions_and_the_plain_forward() -> None:
    module = Classifier(head_alone)
    bridged = lm.bridges.lightning(module)
    found = lm.Runner(bridged.step, progress=False).predict(bridged.predict_step, bridged.state, loader(2))
    x = data(2).tensors[0]
    module.eval()
    torch.testing.assert_close(found, module(x).softmax(-1))
    torch.testing.assert_close(bridged.state.eval().apply(bridged.state.params, x)[0], module(x))


def test_an_own_optimizer_takes_the_place_of_configure_optimizers() -> None:
    bridged = lm.bridges.lightning(Classifier(None), tx=lm.optim.lion(1e-3))
    state, metrics = bridged.step(bridged.state, data(1).tensors)
    assert int(state.step) == 1
    assert set(metrics) == {"loss", "train_loss", "largest", "rows"}


# ---------------------------------------------------------------------------------------------- refused


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__(sgd)
        self.automatic_optimization = False


class Hooked(Classifier):
    def on_train_epoch_end(self) -> None: ...

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...


class Asking(Classifier):
    what = "current_epoch"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return getattr(self, self.what)


class Computing(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.accuracy.update(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy.compute())


class Silent(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


def test_what_only_a_trainer_does_is_refused_by_name() -> None:
    with pytest.raises(lm.LumenError, match="automatic_optimization=False"):
        lm.bridges.lightning(Manual())
    with pytest.raises(lm.LumenError, match=r"(?s)on_before_optimizer_step: .*on_train_epoch_end: log a metric"):
        lm.bridges.lightning(Hooked(sgd))
    with pytest.raises(lm.LumenError, match="names no hook"):
        lm.bridges.lightning(Hooked(sgd), ignore=["on_fire"])
    with pytest.raises(lm.LumenError, match="takes a LightningModule, not Linear"):
        lm.bridges.lightning(nn.Linear(1, 1))
    ignored = ["on_train_epoch_end", "on_before_optimizer_step"]
    assert lm.bridges.lightning(Hooked(head_alone), ignore=ignored).test_step is None


@pytest.mark.parametrize("what", ["current_epoch", "logger", "optimizers", "lr_schedulers", "manual_backward"])
def test_a_step_that_asks_for_the_trainer(what: str) -> None:
    module = Asking(head_alone)
    module.what = what
    bridged = lm.bridges.lightning(module)
    with pytest.raises(lm.LumenError, match=f"self.{what}.* belongs to a Trainer"):
        bridged.step(bridged.state, data(1).tensors)


def test_errors_of_a_step_say_what_to_write() -> None:
    bridged = lm.bridges.lightning(Computing(head_alone))
    with pytest.raises(lm.LumenError, match=r"self.log\('accuracy', self.accuracy\)"):
        bridged.step(bridged.state, data(1).tensors)
    bridged = lm.bridges.lightning(Silent(head_alone))
    with pytest.raises(lm.LumenError, match="training_step returned NoneType"):
        bridged.step(bridged.state, data(1).tensors)


def several(module: Any) -> Any:
    return [torch.optim.SGD(module.head.parameters(), 0.1), torch.optim.SGD(module.body.parameters(), 0.1)]


class Relabeling(torch.optim.lr_scheduler.LambdaLR):
    def step(self, epoch: Any = None) -> None:
        super().step(epoch)
        self.optimizer.param_groups[0]["nesterov"] = self.last_epoch > 2


def relabeling(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    scheduler = Relabeling(optimizer, lambda step: 1.0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (several, "one optimizer"),
        (relabeling, "Relabeling changes nesterov, from False, which is not a number"),
        (lambda module: 3, "int"),
    ],
)
def test_optimizers_that_cannot_be_converted(configure: Any, message: str) -> None:
    with pytest.raises(lm.LumenError, match=message):
        lm.bridges.lightning(Classifier(configure), epochs=EPOCHS, batches=BATCHES)


def test_a_schedule_needs_to_know_the_length_of_the_run() -> None:
    with pytest.raises(lm.LumenError, match=r"epochs=10, batches=len\(loader\)"):
        lm.bridges.lightning(Classifier(sgd))
    with pytest.raises(lm.LumenError, match="estimated_stepping_batches is not known"):
        lm.bridges.lightning(Classifier(adamw))
