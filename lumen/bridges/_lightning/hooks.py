"""What a LightningModule may ask of its Trainer, and what takes its place here."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lumen.errors import StepError

_COMPUTES = "it changes what a step computes; write the step by hand, or the same as a transform"
_CLIP = "pass lm.clip(1.0) to the Runner"
_BATCH = "change the batch in training_step, or in the Loader's collate"
_WATCH = "write an lm.Callback"
_METRIC = "log a metric object itself, self.log('acc', self.acc): it is merged over the epoch"
_MODE = "the mode is the state's: state.eval(), state.train()"
_SAVED = "checkpoints hold the whole state; lm.Checkpointer saves it"

# Each hook that could be overridden, with what to write instead.
INSTEAD: dict[str, str] = {
    "backward": _COMPUTES,
    "optimizer_step": _COMPUTES,
    "optimizer_zero_grad": _COMPUTES,
    "lr_scheduler_step": "give the scheduler from configure_optimizers alone",
    "configure_gradient_clipping": _CLIP,
    "on_before_zero_grad": _COMPUTES,
    "on_before_backward": _COMPUTES,
    "on_after_backward": _COMPUTES,
    "on_before_optimizer_step": _COMPUTES,
    "transfer_batch_to_device": _BATCH,
    "on_before_batch_transfer": _BATCH,
    "on_after_batch_transfer": _BATCH,
    "configure_sharded_model": "pass lm.fsdp() to the Runner",
    "configure_callbacks": "pass callbacks to the Runner",
    "on_save_checkpoint": _SAVED,
    "on_load_checkpoint": _SAVED,
}
_PHASES = ("train", "validation", "test", "predict")
for _phase in _PHASES:
    INSTEAD[f"on_{_phase}_epoch_end"] = _METRIC
    _watched = ("start", "end", "epoch_start", "batch_start", "batch_end")
    INSTEAD |= {f"on_{_phase}_{when}": _WATCH for when in _watched}
    INSTEAD |= {f"on_{_phase}_model_{mode}": _MODE for mode in ("eval", "train")}
INSTEAD |= {"on_fit_start": _WATCH, "on_fit_end": _WATCH}


def lightning_class(module: Any) -> type:
    """The class LightningModule that `module` descends from; raises `StepError` where it does not."""
    for kind in type(module).__mro__:
        package = kind.__module__.split(".")[0]
        if kind.__name__ == "LightningModule" and package in ("lightning", "pytorch_lightning"):
            return kind
    raise StepError(
        f"lm.bridges.lightning takes a LightningModule, not {type(module).__name__}. For a torch module write"
        " lm.TrainState.create(module, tx), and a step."
    )


def overrides(module: Any, base: type, name: str) -> bool:
    """Whether the module has a method of its own where `base` has one that does nothing, or none."""
    return getattr(type(module), name, None) is not getattr(base, name, None)


def check_hooks(module: Any, base: type, ignore: Collection[str]) -> None:
    """Raise `StepError` for what nobody would call, but for those to `ignore`."""
    if not module.automatic_optimization:
        raise StepError(
            f"{type(module).__name__} has automatic_optimization=False: its training_step calls optimizers itself,"
            " which a pure step cannot do. Write the step: two lm.value_and_grad calls and two states do what two"
            " optimizers do; see 'Coming from Lightning' in the docs."
        )
    unknown = sorted(set(ignore) - INSTEAD.keys())
    if unknown:
        raise StepError(f"ignore={unknown!r} names no hook of a LightningModule that is not called.")
    found = [name for name in INSTEAD if name not in ignore and overrides(module, base, name)]
    if found:
        lines = "\n".join(f"  {name}: {INSTEAD[name]}" for name in found)
        raise StepError(
            f"{type(module).__name__} overrides what only a Trainer calls:\n{lines}\n"
            f"What can be left out goes into ignore: lm.bridges.lightning(module, ignore={found!r})"
        )
