"""Convert the result of a LightningModule's `configure_optimizers` to an optimizer of `lm.optim`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lumen.errors import HyperparameterError
from lumen.optim import adagrad, adam, adamw, chain, freeze, from_torch, partition, reduce_on_plateau, rmsprop, sgd
from lumen.optim._base import GradientTransformation

_LUMEN_OPTIMIZERS: dict[type, tuple[Callable[..., GradientTransformation], frozenset[str]]] = {
    torch.optim.SGD: (sgd, frozenset({"momentum", "dampening", "weight_decay", "nesterov"})),
    torch.optim.Adam: (adam, frozenset({"betas", "eps", "weight_decay", "amsgrad"})),
    torch.optim.AdamW: (adamw, frozenset({"betas", "eps", "weight_decay", "amsgrad"})),
    torch.optim.RMSprop: (rmsprop, frozenset({"alpha", "eps", "momentum", "centered", "weight_decay"})),
    torch.optim.Adagrad: (adagrad, frozenset({"eps", "lr_decay", "weight_decay"})),
}
_IMPLEMENTATION_OPTIONS = ("foreach", "fused", "capturable")  # these do not affect the result


@dataclass(frozen=True)
class Length:
    """The length of the run in epochs and batches per epoch. Schedules are tabulated over it."""

    epochs: int | None = None
    batches: int | None = None

    def updates(self, scheduler: Any) -> int:
        """The number of updates of the run, for a schedule."""
        return self._require(self.epochs, scheduler) * self.batches_for(scheduler)

    def batches_for(self, scheduler: Any) -> int:
        """The number of updates in an epoch, for a schedule."""
        return self._require(self.batches, scheduler)

    def _require(self, number: int | None, scheduler: Any) -> int:
        if number is None:
            raise HyperparameterError(
                f"{type(scheduler).__name__} becomes a function of the step, which needs the length of the run."
                " Write: lm.bridges.lightning(module, epochs=10, batches=len(loader))"
            )
        return number


@dataclass(frozen=True, eq=False)
class Table:
    """A schedule as a table of values; each applies for `every` steps, and the last one to all later steps."""

    values: Tensor
    every: int = 1

    def __call__(self, step: Tensor) -> Tensor:
        """The value at `step`."""
        index = (step // self.every).clamp(max=len(self.values) - 1)
        return self.values.to(step.device)[index]


def convert_optimizer(module: nn.Module, result: Any, length: Length) -> GradientTransformation:
    """Convert the `result` of `module.configure_optimizers()` to an optimizer of Lumen.

    Raises `HyperparameterError` for several optimizers, and for a scheduler that changes more than learning rates.
    """
    optimizer, scheduler = _optimizer_and_config(result)
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    groups = optimizer.param_groups
    plateau = None
    rates: Sequence[Any] = [float(group["lr"]) for group in groups]
    if scheduler is not None:
        if isinstance(scheduler["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau):
            plateau = _plateau(scheduler, optimizer)
        else:
            rates = _tables(scheduler, optimizer, length)
    group_rules = [_rule(optimizer, group, rate) for group, rate in zip(groups, rates, strict=True)]
    owners = {names[id(p)]: i for i, group in enumerate(groups) for p in group["params"] if id(p) in names}
    tx = group_rules[0]
    if len(group_rules) > 1 or owners.keys() != set(names.values()):
        frozen = len(group_rules)  # the label of params outside all groups
        rules = dict(enumerate([*group_rules, freeze()]))
        tx = partition(rules, label=lambda name, _leaf: owners.get(name, frozen))
    return tx if plateau is None else chain(tx, plateau)


def _optimizer_and_config(result: Any) -> tuple[torch.optim.Optimizer, dict[str, Any] | None]:
    """The optimizer, and the configuration of its scheduler."""
    if isinstance(result, Mapping):
        return _single(result["optimizer"]), _config(result.get("lr_scheduler"), result.get("monitor"))
    if isinstance(result, tuple) and len(result) == 2 and all(isinstance(item, list) for item in result):
        optimizers, schedulers = result
        _refuse_several(optimizers)
        _refuse_several(schedulers)
        return _single(optimizers[0]), _config(schedulers[0] if schedulers else None)
    if isinstance(result, Sequence):
        _refuse_several(result)
        return _optimizer_and_config(result[0])
    return _single(result), None


def _single(optimizer: Any) -> torch.optim.Optimizer:
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    raise HyperparameterError(
        f"configure_optimizers returned {type(optimizer).__name__}, but a step needs a"
        ' torch.optim.Optimizer, or {"optimizer": ..., "lr_scheduler": ...}.'
        " Pass an optimizer of lm.optim as lm.bridges.lightning(module, tx=...)."
    )


def _refuse_several(items: Sequence[Any]) -> None:
    if len(items) > 1:
        raise HyperparameterError(
            f"configure_optimizers returned {len(items)} objects such as {type(items[0]).__name__}; automatic"
            " optimization supports one optimizer with one scheduler. Give each group of params its own options in one"
            " optimizer, or write a step with one state per optimizer."
        )


def _config(scheduler: Any, monitor: str | None = None) -> dict[str, Any] | None:
    if scheduler is None:
        return None
    config = {"interval": "epoch", "frequency": 1, "monitor": monitor}
    config |= scheduler if isinstance(scheduler, Mapping) else {"scheduler": scheduler}
    if config["interval"] not in ("step", "epoch"):
        raise HyperparameterError(f"a scheduler's interval is 'step' or 'epoch', not {config['interval']!r}.")
    return config


def _rule(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], rate: Any) -> GradientTransformation:
    """The rule for one group of params."""
    options = _options(optimizer, group)
    make, supported = _LUMEN_OPTIMIZERS.get(type(optimizer), (None, frozenset()))
    unsupported = {key: value for key, value in options.items() if key not in supported}
    if make is None or any(unsupported.values()):
        return from_torch(type(optimizer), lr=rate, **options)
    return make(rate, **{key: value for key, value in options.items() if key in supported})


def _tables(config: Mapping[str, Any], optimizer: torch.optim.Optimizer, length: Length) -> list[Table]:
    """Tabulate the learning rates of each group over the run."""
    scheduler, frequency = config["scheduler"], int(config["frequency"])
    batches = length.batches_for(scheduler) if config["interval"] == "epoch" or frequency > 1 else 1
    if config["interval"] == "epoch":
        steps, every = -(-length.updates(scheduler) // (batches * frequency)), batches * frequency
    else:
        steps, every = length.updates(scheduler), 1
    initial = [_options(optimizer, group) for group in optimizer.param_groups]
    rows = []
    for step in range(steps):
        rows.append([float(group["lr"]) for group in optimizer.param_groups])
        if step + 1 < steps and (every > 1 or (step % batches + 1) % frequency == 0):
            _advance(scheduler)
            _check_same(scheduler, initial, [_options(optimizer, group) for group in optimizer.param_groups])
    return [Table(torch.tensor(column, dtype=torch.float64), every) for column in zip(*rows, strict=True)]


def _check_same(scheduler: Any, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    changed = {key for old, new in zip(before, after, strict=True) for key in new if old[key] != new[key]}
    if changed:
        raise HyperparameterError(
            f"{type(scheduler).__name__} changes more than learning rates ({', '.join(sorted(changed))}), which"
            " cannot be tabulated. Disable that, as with OneCycleLR(cycle_momentum=False), or pass tx= with a schedule"
            " of lm.optim."
        )


def _advance(scheduler: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")  # SequentialLR's own call
        scheduler.step()


def _options(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The options that affect the result, except the learning rate; groups also contain data of schedulers."""
    # Torch's AdamW is its Adam with one more option, which it always sets but does not accept.
    excluded = ("lr", *_IMPLEMENTATION_OPTIONS, *["decoupled_weight_decay"] * isinstance(optimizer, torch.optim.AdamW))
    return {key: group[key] for key in optimizer.defaults if key not in excluded}


def _plateau(config: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> GradientTransformation:
    """ReduceLROnPlateau's rule, in units of the learning rate; it monitors a metric of the validation "val"."""
    scheduler = config["scheduler"]
    if config["interval"] != "epoch" or config["frequency"] != 1:
        raise HyperparameterError(
            "ReduceLROnPlateau gets its metric after each validation: set interval='epoch' and frequency=1."
        )
    if config["monitor"] is None:
        raise HyperparameterError(
            'ReduceLROnPlateau needs the name of its metric: {"scheduler": ..., "monitor": "val_loss"}'
        )
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    floors = {float(low) for low in scheduler.min_lrs}
    if len(rates) > 1 and (floors != {0.0}):
        raise HyperparameterError(
            "ReduceLROnPlateau(min_lr=...) with several learning rates has no common minimum scale: use one learning"
            " rate, or min_lr=0."
        )
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
        monitor=f"val/{config['monitor']}",
    )
