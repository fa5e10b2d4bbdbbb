"""`lm.bridges.lightning`: convert a LightningModule to a pure step, a state, and validation steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lumen.bridges._lightning.hooks import check_hooks, lightning_class, overrides
from lumen.bridges._lightning.log import current, record_metrics, recording
from lumen.bridges.torch_optim import Length, convert_optimizer
from lumen.core.arguments import checked_first
from lumen.core.buffer_rules import Merges
from lumen.core.gradient import value_and_grad
from lumen.core.metrics import Metric
from lumen.core.module import Pure, pure
from lumen.core.primitives import Aux
from lumen.core.state import TrainState
from lumen.errors import LossError, PurityError, StepError
from lumen.optim._base import GradientTransformation

EvalStep = Callable[[Any, Any], dict[str, Any]]


class Bridged(NamedTuple):
    """The result of `lightning`.

    `step` trains; `validation_step` and `test_step` return metrics, for `lm.Validate` and `lm.evaluate`, and are None
    if the module has none; `predict_step` returns outputs, for `Runner.predict`. A `ReduceLROnPlateau` becomes
    `lm.optim.reduce_on_plateau`, which monitors its metric in a validation named "val", the default name.
    """

    step: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
    state: TrainState
    validation_step: EvalStep | None
    test_step: EvalStep | None
    predict_step: Callable[[Any, Any], Any]


@checked_first
def lightning(
    module: Any,
    *,
    tx: GradientTransformation | None = None,
    epochs: int | None = None,
    batches: int | None = None,
    seed: int = 0,
    ignore: Collection[str] = (),
    merge: Merges | None = None,
) -> Bridged:
    """Convert a LightningModule with automatic optimization to a pure step and its state, without changing its code.

    `training_step` becomes the loss function, `configure_optimizers` the optimizer, and `self.log` the metrics: means
    weighted by rows, the reduction of `reduce_fx`, or torchmetrics metrics that are logged as objects. Transforms and
    the Runner replace Trainer options: `lm.precision` for `precision=`, `lm.clip` for `gradient_clip_val=`, and so on.

    Law: with the same batches, the params equal those of `lightning.Trainer`, up to the order of floating-point sums.
    Declared differences: a value is logged for each logging window of the Runner, not for each step. With
    `on_epoch=True` it is the epoch's, under its name, and the window's is `NAME_step`, unless `on_step=False`. The
    `batch_idx` of a training step is the step of the run, a tensor, and a metric's `forward` covers one batch only.
    Torch's own SGD, Adam, AdamW, RMSprop and Adagrad become those of `lm.optim`, others `lm.optim.from_torch`;
    a scheduler becomes a table of learning rates, and of momentum or betas if it cycles them.

    The state's params are the module's own tensors. `module.load_state_dict({**state.params, **state.buffers})`
    copies the trained params back (with strict=False if params are tied).

    Args:
        module: a LightningModule of `lightning` or `pytorch_lightning`.
        tx: an optimizer of `lm.optim`, instead of `configure_optimizers`.
        epochs: the number of epochs of the run; required with a scheduler.
        batches: the number of batches (updates) per epoch; required with a scheduler.
        seed: the seed of the state.
        ignore: Trainer hooks that the module overrides but that need not be called.
        merge: how microbatches and ranks merge the module's buffers, as in `lm.pure(module, merge=...)`.

    Raises:
        StepError: manual optimization, or overridden hooks that are never called; the message names replacements.
        HyperparameterError: several optimizers, or a scheduler that changes what is not a number.
        MetricError: at the first step, if a logged value cannot be merged.

    >>> import lumen as lm, torch
    >>> from lightning import LightningModule
    >>> class Model(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(2, 1)
    ...     def training_step(self, batch, batch_idx):
    ...         x, y = batch
    ...         loss = ((self.layer(x) - y) ** 2).mean()
    ...         self.log("train_loss", loss)
    ...         return loss
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> step, state, *_ = lm.bridges.lightning(Model())
    >>> data = lm.Loader((torch.ones(8, 2), torch.zeros(8, 1)), batch_size=4)
    >>> result = lm.Runner(step, transforms=[lm.clip(1.0)], progress=False).fit(state, data, until=lm.Epochs(3))
    >>> result.clock.step
    6
    """
    base = lightning_class(module)
    check_hooks(module, base, ignore)
    module = _copy_without_trainer(module)
    length = Length(epochs, batches)
    if not overrides(module, base, "training_step"):
        raise StepError(f"{type(module).__name__} has no training_step.")
    if overrides(module, base, "configure_model"):
        module.configure_model()
    module.__class__ = _class_without_trainer(type(module), base, length)
    if tx is None:
        tx = convert_optimizer(module, module.configure_optimizers(), length)
    apply, params, buffers = pure(module, merge=merge)
    state = TrainState.create(Pure(apply.variant("lightning", record_metrics), params, buffers), tx, seed)
    return Bridged(
        step,
        state,
        _evaluation("validation_step") if overrides(module, base, "validation_step") else None,
        _evaluation("test_step") if overrides(module, base, "test_step") else None,
        predict_step,
    )


def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """One update of a state created by `lm.bridges.lightning`."""
    train = state.apply_fn.calling(_training)

    def loss_fn(params: Any, batch: Any, index: Tensor) -> Any:
        (loss, logged), buffers = train(params, state.buffers, batch, index)
        return loss, Aux(buffers=buffers, metrics=logged)

    (loss, aux), grads = value_and_grad(loss_fn, has_aux=True)(state.params, batch, state.step)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss, **aux.metrics}


def predict_step(state: Any, batch: Any) -> Any:
    """The result of the module's `predict_step` for `batch`."""
    output, _ = state.apply_fn.calling(_predicting)(state.params, state.buffers, batch, state.step)
    return output


def _evaluation(name: str) -> EvalStep:
    def evaluating(module: Any, batch: Any, index: Tensor) -> dict[str, Metric]:
        with recording(batch, index) as record:
            _call(getattr(module, name), batch, index)
        return record.values

    def run(state: Any, batch: Any) -> dict[str, Any]:
        logged: dict[str, Any]
        logged, _ = state.apply_fn.calling(evaluating)(state.params, state.buffers, batch, state.step)
        return logged

    run.__name__ = run.__qualname__ = name
    return run


def _training(module: Any, batch: Any, index: Tensor) -> tuple[Tensor, dict[str, Metric]]:
    with recording(batch, index, trains=True) as record:
        output = _call(module.training_step, batch, index)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise LossError(
            f"training_step returned {type(output).__name__}, but must return a loss: a tensor, or a dict with one"
            " under 'loss'. To skip a batch, return a loss of zero: 0 * loss."
        )
    return loss, record.values


def _predicting(module: Any, batch: Any, index: Tensor) -> Any:
    with recording(batch, index):
        return _call(module.predict_step, batch, index)


def _call(method: Callable[..., Any], batch: Any, index: Tensor) -> Any:
    """Call the method on a batch, with its index if it takes one; a dataloader index is its default, or zero."""
    code: Any = method.__code__
    names = code.co_varnames[1 : code.co_argcount]
    if len(names) < 2 and not code.co_flags & 0x04:  # *args
        return method(batch)
    if "dataloader_idx" in names[2:] and not method.__defaults__:
        return method(batch, index, 0)
    return method(batch, index)


def _copy_without_trainer(module: Any) -> Any:
    """A copy that shares the tensors and has no Trainer."""
    memo: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    trainer = module.__dict__.get("_trainer")
    if trainer is not None:
        memo[id(trainer)] = None
    return copy.deepcopy(module, memo)


def _class_without_trainer(kind: type[nn.Module], base: type, length: Length) -> type[nn.Module]:
    """A subclass of the module's class that implements the Trainer's methods and attributes, or refuses them."""

    def refuse(name: str, fix: str) -> property:
        def get(self: Any) -> Any:
            raise PurityError(f"self.{name} belongs to a Trainer, which a pure step does not have. {fix}")

        return property(get)

    class Alone(kind):  # type: ignore[valid-type, misc]
        def log(
            self,
            name: str,
            value: Any,
            prog_bar: bool = False,
            logger: Any = None,
            on_step: bool | None = None,
            on_epoch: bool | None = None,
            reduce_fx: Any = "mean",
            **options: Any,
        ) -> None:
            current("self.log").log(name, value, reduce_fx, options.get("batch_size"), on_step, on_epoch)

        def log_dict(self, dictionary: Any, *args: Any, **options: Any) -> None:
            for name, value in dictionary.items():
                self.log(name, value, *args, **options)

        def print(self, *args: Any, **options: Any) -> None:
            print(*args, **options)  # noqa: T201

        @property
        def device(self) -> torch.device:
            first = next(self.parameters(), None)
            return torch.device("cpu") if first is None else first.device

        @property
        def global_step(self) -> Tensor:
            index: Tensor = current("self.global_step").index
            return index

        @property
        def trainer(self) -> Any:
            return _Trainer(length)

        logger = refuse("logger", "Log values with self.log, or write an lm.Callback.")
        loggers = logger
        current_epoch = refuse("current_epoch", "Compute from self.global_step, a tensor.")
        optimizers = refuse("optimizers()", "Write a step for manual optimization.")
        lr_schedulers = refuse("lr_schedulers()", "Return the scheduler from configure_optimizers.")
        manual_backward = refuse("manual_backward()", "Return the loss.")
        toggle_optimizer = refuse("toggle_optimizer()", "Return the loss.")
        all_gather = refuse("all_gather()", "Log the values: they are merged over processes.")

    Alone.__name__, Alone.__qualname__, Alone.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Alone


class _Trainer(SimpleNamespace):
    """The Trainer attributes that a schedule may read: the length of the run."""

    def __init__(self, length: Length) -> None:
        attributes: dict[str, Any] = {"max_epochs": length.epochs, "num_training_batches": length.batches}
        attributes["accumulate_grad_batches"] = 1
        if length.epochs is not None and length.batches is not None:
            attributes["estimated_stepping_batches"] = attributes["max_steps"] = length.epochs * length.batches
        super().__init__(**{name: value for name, value in attributes.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        raise PurityError(
            f"self.trainer.{name} is not known here. lm.bridges.lightning(module, epochs=10, batches=len(loader)) sets"
            " max_epochs, num_training_batches, max_steps and estimated_stepping_batches; no other attributes exist."
        )
