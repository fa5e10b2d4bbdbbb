"""Convert the result of a LightningModule's `configure_optimizers` to an optimizer of `lm.optim`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lumen import tree
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
        values = self.values.to(step.device)
        return values.index_select(0, index.reshape(1)).reshape(())  # `values[index]` would read it in Python


def convert_optimizer(module: nn.Module, result: Any, length: Length) -> GradientTransformation:
    """Convert the `result` of `module.configure_optimizers()` to an optimizer of Lumen.

    Raises `HyperparameterError` for several optimizers, and for a scheduler that changes what is not a number.
    """
    optimizer, scheduler = _optimizer_and_config(result)
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    groups = optimizer.param_groups
    plateau = None
    options: Sequence[Mapping[str, Any]] = [_options(optimizer, group) for group in groups]
    if scheduler is not None:
        if isinstance(scheduler["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau):
            plateau = _plateau(scheduler, optimizer)
        else:
            options = _tabulated(scheduler, optimizer, length)
    group_rules = [_rule(type(optimizer), group_options) for group_options in options]
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


def _rule(kind: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> GradientTransformation:
    """The rule for one group of params, some of whose options may be tables."""
    rate, constants = options["lr"], {key: value for key, value in options.items() if key != "lr"}
    tables = {key: constants.pop(key) for key in options if key != "lr" and _has_table(options[key])}
    make, supported = _LUMEN_OPTIMIZERS.get(kind, (None, frozenset()))
    is_supported = tables.keys() <= supported and not any(v for key, v in constants.items() if key not in supported)
    if make is None or not is_supported:
        return _with_options(kind, rate, constants, tables) if tables else from_torch(kind, lr=rate, **constants)
    first = {key: _map(lambda table: table.values[0].clone(), value) for key, value in tables.items()}
    tx = make(rate, **{key: value for key, value in constants.items() if key in supported}, **first)
    return _with_hparams(tx, tables) if tables else tx


def _with_hparams(tx: GradientTransformation, tables: Mapping[str, Any]) -> GradientTransformation:
    """An optimizer of `lm.optim` whose hyperparameters have the values of `tables` at each update."""
    by_name: dict[str, Table] = {}
    for key, value in tables.items():
        entries = {f"beta{i}": entry for i, entry in enumerate(value, 1)} if key == "betas" else {key: value}
        by_name |= {name: entry for name, entry in entries.items() if isinstance(entry, Table)}

    def at_step(state: Any) -> Any:
        return state.replace(hparams={**state.hparams, **{name: at(state.count) for name, at in by_name.items()}})

    def fused(grads: Any, state: Any, params: Any, skip: Tensor | None) -> Any:
        assert tx.fused_fn is not None
        new = tx.fused_fn(grads, at_step(state), params, skip)
        return new if skip is None else new.replace(hparams=tree.select(skip, state.hparams, new.hparams))

    return dataclasses.replace(
        tx,
        update_fn=lambda grads, state, params: tx.update_fn(grads, at_step(state), params),
        fused_fn=None if tx.fused_fn is None else fused,
    )


def _with_options(
    kind: type[torch.optim.Optimizer], rate: Any, constants: Mapping[str, Any], tables: Mapping[str, Any]
) -> GradientTransformation:
    """A torch optimizer whose options have the values of `tables` at each update."""

    def at_step(count: Tensor) -> GradientTransformation:
        options = {key: _map(lambda table: float(table(count)), value) for key, value in tables.items()}
        return from_torch(kind, lr=rate, **constants, **options)

    def fused(grads: Any, state: Any, params: Any, skip: Tensor | None) -> Any:
        tx = at_step(state.count)
        assert tx.fused_fn is not None
        return tx.fused_fn(grads, state, params, skip)

    return dataclasses.replace(
        at_step(torch.zeros((), dtype=torch.int64)),
        update_fn=lambda grads, state, params: at_step(state.count).update_fn(grads, state, params),
        fused_fn=fused,
    )


def _tabulated(config: Mapping[str, Any], optimizer: torch.optim.Optimizer, length: Length) -> list[Mapping[str, Any]]:
    """The options of each group; the learning rate, and what else the scheduler changes, as tables over the run."""
    scheduler, frequency = config["scheduler"], int(config["frequency"])
    batches = length.batches_for(scheduler) if config["interval"] == "epoch" or frequency > 1 else 1
    if config["interval"] == "epoch":
        steps, every = -(-length.updates(scheduler) // (batches * frequency)), batches * frequency
    else:
        steps, every = length.updates(scheduler), 1
    rows = []
    for step in range(steps):
        rows.append([_options(optimizer, group) for group in optimizer.param_groups])
        if step + 1 < steps and (every > 1 or (step % batches + 1) % frequency == 0):
            _advance(scheduler)
    return [
        {key: _column(scheduler, key, [row[key] for row in group_rows], every) for key in group_rows[0]}
        for group_rows in zip(*rows, strict=True)
    ]


def _column(scheduler: Any, key: str, values: Sequence[Any], every: int) -> Any:
    """An option that does not change, or the table of its values; the learning rate is always a table."""
    if key != "lr" and all(value == values[0] for value in values):
        return values[0]
    if all(isinstance(value, tuple | list) and len(value) == len(values[0]) for value in values):
        return tuple(_column(scheduler, key, column, every) for column in zip(*values, strict=True))
    if not all(isinstance(value, int | float | Tensor) and not isinstance(value, bool) for value in values):
        raise HyperparameterError(
            f"{type(scheduler).__name__} changes {key}, from {values[0]!r}, which is not a number and cannot be"
            " tabulated. Pass tx= with a schedule of lm.optim."
        )
    return Table(torch.tensor([float(value) for value in values], dtype=torch.float64), every)


def _has_table(value: Any) -> bool:
    return isinstance(value, Table) or (isinstance(value, tuple) and any(isinstance(v, Table) for v in value))


def _map(fn: Callable[[Table], Any], value: Any) -> Any:
    """An option with `fn` applied to its tables."""
    if isinstance(value, tuple):
        return tuple(fn(entry) if isinstance(entry, Table) else entry for entry in value)
    return fn(value)


def _advance(scheduler: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")  # SequentialLR's own call
        scheduler.step()


def _options(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The options that affect the result; groups also contain data of schedulers."""
    # Torch's AdamW is its Adam with one more option, which it always sets but does not accept.
    excluded = (*_IMPLEMENTATION_OPTIONS, *["decoupled_weight_decay"] * isinstance(optimizer, torch.optim.AdamW))
    options = {key: group[key] for key in optimizer.defaults if key not in excluded}
    return {**options, "lr": float(group["lr"])}


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
