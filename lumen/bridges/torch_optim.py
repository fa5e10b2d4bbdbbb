"""What a LightningModule's `configure_optimizers` returns, as an optimizer of `lm.optim`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lumen.errors import HyperparameterError
from lumen.optim import adagrad, adam, adamw, chain, freeze, from_torch, partition, reduce_on_plateau, rmsprop, sgd
from lumen.optim._base import GradientTransformation

_OURS: dict[type, tuple[Callable[..., GradientTransformation], frozenset[str]]] = {
    torch.optim.SGD: (sgd, frozenset({"momentum", "dampening", "weight_decay", "nesterov"})),
    torch.optim.Adam: (adam, frozenset({"betas", "eps", "weight_decay", "amsgrad"})),
    torch.optim.AdamW: (adamw, frozenset({"betas", "eps", "weight_decay", "amsgrad"})),
    torch.optim.RMSprop: (rmsprop, frozenset({"alpha", "eps", "momentum", "centered", "weight_decay"})),
    torch.optim.Adagrad: (adagrad, frozenset({"eps", "lr_decay", "weight_decay"})),
}
_HOW = ("foreach", "fused", "capturable")  # options that say how torch computes, not what


class Configured(NamedTuple):
    """An optimizer, and the metric that its `reduce_on_plateau` watches."""

    tx: GradientTransformation
    monitor: str | None


@dataclass(frozen=True)
class Length:
    """How long the run is: updates in all, and in an epoch. Schedules are tabulated over it."""

    epochs: int | None = None
    batches: int | None = None

    def updates(self, scheduler: Any) -> int:
        """The number of updates, for a schedule."""
        return self._known(self.epochs, scheduler) * self.batches_for(scheduler)

    def batches_for(self, scheduler: Any) -> int:
        """The number of updates in an epoch, for a schedule."""
        return self._known(self.batches, scheduler)

    def _known(self, number: int | None, scheduler: Any) -> int:
        if number is None:
            raise HyperparameterError(
                f"{type(scheduler).__name__} becomes a function of the step, for which the length of the run must be"
                " known. Write: lm.bridges.lightning(module, epochs=10, batches=len(loader))"
            )
        return number


@dataclass(frozen=True, eq=False)
class Table:
    """A schedule by its values; each holds for `every` steps, and the last one from then on."""

    values: Tensor
    every: int = 1

    def __call__(self, step: Tensor) -> Tensor:
        """The value at `step`."""
        place = (step // self.every).clamp(max=len(self.values) - 1)
        return self.values.to(step.device)[place]


def converted(module: nn.Module, found: Any, length: Length) -> Configured:
    """`found`, which `module.configure_optimizers()` returned, as an optimizer of Lumen's.

    Raises `HyperparameterError` for several optimizers, and for a scheduler that changes anything but learning rates.
    """
    optimizer, scheduler = _parts(found)
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    groups = optimizer.param_groups
    plateau, monitor = None, None
    rates: Sequence[Any] = [float(group["lr"]) for group in groups]
    if scheduler is not None:
        if isinstance(scheduler["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau):
            plateau, monitor = _plateau(scheduler, optimizer), scheduler["monitor"]
        else:
            rates = _tables(scheduler, optimizer, length)
    parts = [_rule(optimizer, group, rate) for group, rate in zip(groups, rates, strict=True)]
    owners = {names[id(p)]: i for i, group in enumerate(groups) for p in group["params"] if id(p) in names}
    tx = parts[0]
    if len(parts) > 1 or owners.keys() != set(names.values()):
        left = len(parts)  # what no group holds stays as it is
        rules = dict(enumerate([*parts, freeze()]))
        tx = partition(rules, label=lambda name, _leaf: owners.get(name, left))
    return Configured(tx if plateau is None else chain(tx, plateau), monitor)


def _parts(found: Any) -> tuple[torch.optim.Optimizer, dict[str, Any] | None]:
    """The one optimizer, and its scheduler's configuration."""
    if isinstance(found, Mapping):
        return _single(found["optimizer"]), _config(found.get("lr_scheduler"), found.get("monitor"))
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(each, list) for each in found):
        optimizers, schedulers = found
        _refuse_several(optimizers)
        _refuse_several(schedulers)
        return _single(optimizers[0]), _config(schedulers[0] if schedulers else None)
    if isinstance(found, Sequence):
        _refuse_several(found)
        return _parts(found[0])
    return _single(found), None


def _single(optimizer: Any) -> torch.optim.Optimizer:
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    raise HyperparameterError(
        f"configure_optimizers returned {type(optimizer).__name__}, and a step needs an optimizer: a"
        ' torch.optim.Optimizer, or {"optimizer": ..., "lr_scheduler": ...}.'
        " One of lm.optim is given as lm.bridges.lightning(module, tx=...)."
    )


def _refuse_several(found: Sequence[Any]) -> None:
    if len(found) > 1:
        raise HyperparameterError(
            f"configure_optimizers returned {len(found)} of {type(found[0]).__name__} and the like; automatic"
            " optimization has one optimizer with one scheduler. Give each group of params its own options in one"
            " optimizer, or write the step with a state for each."
        )


def _config(found: Any, monitor: str | None = None) -> dict[str, Any] | None:
    if found is None:
        return None
    config = {"interval": "epoch", "frequency": 1, "monitor": monitor}
    config |= found if isinstance(found, Mapping) else {"scheduler": found}
    if config["interval"] not in ("step", "epoch"):
        raise HyperparameterError(f"a scheduler's interval is 'step' or 'epoch', not {config['interval']!r}.")
    return config


def _rule(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], rate: Any) -> GradientTransformation:
    """The rule for one group of params."""
    options = _options(optimizer, group)
    made, taken = _OURS.get(type(optimizer), (None, frozenset()))
    others = {key: value for key, value in options.items() if key not in taken}
    if made is None or any(others.values()):
        return from_torch(type(optimizer), lr=rate, **options)
    return made(rate, **{key: value for key, value in options.items() if key in taken})


def _tables(config: Mapping[str, Any], optimizer: torch.optim.Optimizer, length: Length) -> list[Table]:
    """The learning rates of each group, as the scheduler gives them over the run."""
    scheduler, frequency = config["scheduler"], int(config["frequency"])
    batches = length.batches_for(scheduler) if config["interval"] == "epoch" or frequency > 1 else 1
    if config["interval"] == "epoch":
        steps, every = -(-length.updates(scheduler) // (batches * frequency)), batches * frequency
    else:
        steps, every = length.updates(scheduler), 1
    before = [_options(optimizer, group) for group in optimizer.param_groups]
    rows = []
    for step in range(steps):
        rows.append([float(group["lr"]) for group in optimizer.param_groups])
        if step + 1 < steps and (every > 1 or (step % batches + 1) % frequency == 0):
            _advance(scheduler)
            _check_same(scheduler, before, [_options(optimizer, group) for group in optimizer.param_groups])
    return [Table(torch.tensor(column, dtype=torch.float64), every) for column in zip(*rows, strict=True)]


def _check_same(scheduler: Any, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    changed = {key for old, new in zip(before, after, strict=True) for key in new if old[key] != new[key]}
    if changed:
        raise HyperparameterError(
            f"{type(scheduler).__name__} changes more than learning rates ({', '.join(sorted(changed))}), which"
            " cannot be tabulated. Turn that off, as OneCycleLR(cycle_momentum=False) does, or give tx= with a schedule"
            " of lm.optim's."
        )


def _advance(scheduler: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")  # SequentialLR's own call
        scheduler.step()


def _options(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer computes with, beside the learning rate; schedulers keep things of their own in groups too."""
    # Torch's AdamW is its Adam with one more option, which it always sets and does not take.
    apart = ("lr", *_HOW, *["decoupled_weight_decay"] * isinstance(optimizer, torch.optim.AdamW))
    return {key: group[key] for key in optimizer.defaults if key not in apart}


def _plateau(config: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> GradientTransformation:
    """ReduceLROnPlateau's rule, in units of the learning rate."""
    scheduler = config["scheduler"]
    if config["interval"] != "epoch" or config["frequency"] != 1:
        raise HyperparameterError("ReduceLROnPlateau is told its metric after each validation: interval='epoch'.")
    if config["monitor"] is None:
        raise HyperparameterError(
            'ReduceLROnPlateau needs to know which metric it watches: {"scheduler": ..., "monitor": "val_loss"}'
        )
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    floors = {float(low) for low in scheduler.min_lrs}
    if len(rates) > 1 and (floors != {0.0}):
        raise HyperparameterError("ReduceLROnPlateau(min_lr=...) with several learning rates has no one least scale.")
    rate = min(rates)
    return reduce_on_plateau(
        factor=scheduler.factor,
        patience=scheduler.patience,
        threshold=scheduler.threshold,
        threshold_mode=scheduler.threshold_mode,
        mode=scheduler.mode,
        cooldown=scheduler.cooldown,
        min_scale=min(floors) / rate,
        eps=scheduler.eps / rate,
    )
