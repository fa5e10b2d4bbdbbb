"""Hooks that only a Lightning Trainer calls, and their replacements in Lumen."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lumen.errors import StepError

_COMPUTES = "it changes what a step computes; write the step by hand, or implement it as a transform"
_CLIP = "pass lm.clip(1.0) to the Runner"
_BATCH = "change the batch in training_step, or in the Loader's collate"
_WATCH = "write an lm.Callback"
_METRIC = "log a metric object itself, self.log('acc', self.acc): it is merged over the epoch"
_MODE = "the mode belongs to the state: state.eval(), state.train()"
_SAVED = "checkpoints contain the full state; lm.Checkpointer saves it"

# Each hook that a module may override, with its replacement.
REPLACEMENTS: dict[str, str] = {
    "backward": _COMPUTES,
    "optimizer_step": _COMPUTES,
    "optimizer_zero_grad": _COMPUTES,
    "lr_scheduler_step": "return the scheduler from configure_optimizers only",
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
    REPLACEMENTS[f"on_{_phase}_epoch_end"] = _METRIC
    _EVENTS = ("start", "end", "epoch_start", "batch_start", "batch_end")
    REPLACEMENTS |= {f"on_{_phase}_{event}": _WATCH for event in _EVENTS}
    REPLACEMENTS |= {f"on_{_phase}_model_{mode}": _MODE for mode in ("eval", "train")}
REPLACEMENTS |= {"on_fit_start": _WATCH, "on_fit_end": _WATCH}


def lightning_class(module: Any) -> type:
    """The LightningModule base class of `module`; raises `StepError` if it has none."""
    for kind in type(module).__mro__:
        package = kind.__module__.split(".")[0]
        if kind.__name__ == "LightningModule" and package in ("lightning", "pytorch_lightning"):
            return kind
    raise StepError(
        f"lm.bridges.lightning takes a LightningModule, not {type(module).__name__}. For a torch module write"
        " lm.TrainState.create(module, tx), and a step."
    )


def overrides(module: Any, base: type, name: str) -> bool:
    """Whether the module overrides the method `name` of `base`, or adds it."""
    return getattr(type(module), name, None) is not getattr(base, name, None)


def check_hooks(module: Any, base: type, ignore: Collection[str]) -> None:
    """Raise `StepError` for overridden hooks that are never called, except those in `ignore`."""
    if not module.automatic_optimization:
        raise StepError(
            f"{type(module).__name__} has automatic_optimization=False: its training_step calls optimizers itself,"
            " which a pure step cannot do. Write the step: two lm.value_and_grad calls and two states replace two"
            " optimizers; see 'Coming from Lightning' in the docs."
        )
    unknown = sorted(set(ignore) - REPLACEMENTS.keys())
    if unknown:
        raise StepError(f"ignore={unknown!r} names no hook of a Trainer that Lumen does not call.")
    overridden = [name for name in REPLACEMENTS if name not in ignore and overrides(module, base, name)]
    if overridden:
        lines = "\n".join(f"  {name}: {REPLACEMENTS[name]}" for name in overridden)
        raise StepError(
            f"{type(module).__name__} overrides hooks that only a Trainer calls:\n{lines}\n"
            f"To skip hooks, list them in ignore: lm.bridges.lightning(module, ignore={overridden!r})"
        )
