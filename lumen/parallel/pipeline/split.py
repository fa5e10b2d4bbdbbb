"""A model that stops where a stage ends, and that takes a received activation where it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lumen.core import _torch_compat, rules
from lumen.core.module import Apply
from lumen.errors import LossError, ParamsError
from lumen.parallel.pipeline.absent import Absent
from lumen.transforms._support.module_patterns import disable_kv_cache

STAGE = "<pipeline stage>"  # the axis that a `StageRun` or a `Probe` is bound to


class Boundary(BaseException):
    """Leaves the loss function where a stage ends; no `Exception`, which a loss function may catch."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def split_variant(target: Apply, split_points: tuple[str, ...], stage: int | None, owners: Mapping[str, int]) -> Apply:
    """`target` with hooks at its `split_points`; for a `stage`, modules with nothing of it are computed only once."""

    def change(module: nn.Module) -> None:
        for index, point in enumerate(split_points, 1):
            module.get_submodule(point).register_forward_pre_hook(_entering(index, point), with_kwargs=True)
        module.register_forward_hook(_leaving)
        disable_kv_cache(module)  # which would keep keys and values of other stages
        if stage is not None:
            _skip_absent_modules(module, split_points, stage, owners)

    return target.variant(("pipeline", split_points, stage), change)


def _entering(index: int, point: str) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = rules.axis(STAGE)
        if run is None:
            return None
        if not args or not isinstance(args[0], Tensor):
            raise ParamsError(
                f"lm.pipeline sends the first argument of {point!r} from stage {index - 1} to {index}, which must be a"
                f" tensor, and {'it has none' if not args else f'it is a {type(args[0]).__name__}'}. Call the module as"
                " block(x), or split the model elsewhere."
            )
        value = run.enter(index, point, args[0])
        return None if value is args[0] else ((value, *args[1:]), kwargs)

    return hook


def _leaving(_module: nn.Module, _args: Any, out: Any) -> None:
    run = rules.axis(STAGE)
    if run is not None:
        run.leave(out)


def _skip_absent_modules(module: nn.Module, split_points: Sequence[str], stage: int, owners: Mapping[str, int]) -> None:
    """Replace the forward of the outermost modules whose params are all of other stages."""
    own = {name for name, owner in owners.items() if owner == stage}
    kept = [*own, *split_points[max(stage - 1, 0) : stage + 1]]  # what a module must not contain
    skipped: list[str] = []
    for name, sub in module.named_modules():
        if not name or any(name == other or name.startswith(f"{other}.") for other in skipped):
            continue
        has_params = next(sub.parameters(), None) is not None
        if (
            has_params
            and not any(path.startswith(f"{name}.") for path in kept)
            and callable(getattr(sub, "forward", None))
        ):
            skipped.append(name)
            sub.forward = _Skipped(sub)


class _Skipped:
    """Replaces a module's `forward`: computes the form of its result once for each form of its arguments."""

    def __init__(self, module: nn.Module) -> None:
        self._forward = module.forward
        self._results: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The absent result."""
        leaves, spec = _torch_compat.torch_pytree.tree_flatten((args, kwargs))
        forms = [_form_of(leaf) for leaf in leaves]
        if rules.axis(STAGE) is None or _UNKNOWN in forms:
            return self._forward(*args, **kwargs)
        cast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        key = (*forms, spec, cast)
        if key not in self._results:
            out = self._forward(*args, **kwargs)
            if not all(isinstance(x, Absent) for x in _torch_compat.torch_pytree.tree_leaves(out)):
                return out
            self._results[key] = out
        return self._results[key]


_UNKNOWN = object()


def _form_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return type(leaf), leaf.shape, leaf.dtype
    return leaf if leaf is None or isinstance(leaf, bool | int | float | str) else _UNKNOWN


def check_buffers_unwritten() -> None:
    """Raise `ParamsError` where the model that runs now has changed a buffer."""
    _, slots, tensors, buffers = rules.stack.forwards[-1]
    for table, key, name in slots:
        if name not in buffers or isinstance(table[key], Absent):
            continue
        copied = tensors[name]
        if table[key] is not copied or (copied is not buffers[name] and _torch_compat.version_of(copied)):
            raise changed_buffer(name)


def changed_buffer(name: str) -> ParamsError:
    """The error for a buffer that changes."""
    return ParamsError(
        f"the forward pass changes the buffer {name!r}, and lm.pipeline keeps no buffers that change: each stage would"
        " update its own for each microbatch. Use a norm without running statistics (nn.LayerNorm, nn.GroupNorm), or"
        " train without lm.pipeline."
    )


def applied_twice() -> LossError:
    """The error for a loss that applies the model again."""
    return LossError(
        "the loss function applies the model more than once, and lm.pipeline sends each microbatch through its stages"
        " once. Join the inputs and apply it once: state.apply(params, torch.cat([a, b])), or train without"
        " lm.pipeline."
    )
