"""Save a state for `from_pretrained`, and load the files that `save_pretrained` wrote.

Models need no bridge: `lm.pure` accepts those of transformers (and of peft) unchanged. transformers itself reads and
writes the files, because it handles the hub's names, tied weights, shards and renamed weights.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from lumen.bridges import lora
from lumen.checkpoint._save import TEMPORARY
from lumen.errors import CheckpointError, CheckpointExistsError, CheckpointMismatchError, ParamsError, printable

_SHOWN = 6  # maximum number of names in a message


def save_pretrained(state: Any, directory: str | os.PathLike[str], *, max_shard_size: int | str = "50GB") -> Path:
    """Write the model of `state` to a directory for `from_pretrained` or the hub; returns its path.

    It contains `config.json` and `model.safetensors`, or several files of at most `max_shard_size` (bytes, or a text
    such as "5GB") with their index, under the hub's names; tied weights are written once. Adapters of
    `lm.bridges.lora` are merged into the weights, because the hub's classes cannot store them; a peft model writes its
    adapters. The directory appears only when it is complete. If the step's transforms shard params, pass
    `step.export(state)`. With several processes, call it on one of them.

    Raises `CheckpointExistsError` if `directory` exists, `ParamsError` if the model is not a transformers model, and
    `CheckpointError` if the directory cannot be written.
    """
    final = Path(directory)
    if os.path.lexists(final):
        raise CheckpointExistsError(f"{final} already exists. Remove it, or save under another name.")
    module: Any = lora.merged(state)
    if not hasattr(module, "save_pretrained"):
        raise ParamsError(
            f"{type(module).__name__} is not a transformers model, so it has no config.json and cannot be saved for the"
            " hub. To save its tensors only: safetensors.torch.save_file(dict(state.params), path)"
        )
    temporary = final.with_name(f".{final.name}.{os.getpid()}{TEMPORARY}")
    try:
        temporary.mkdir(parents=True)
        module.save_pretrained(temporary, max_shard_size=max_shard_size)
        os.rename(temporary, final)
    except OSError as error:
        raise CheckpointError(f"{final} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def load_pretrained(state: Any, directory: str | os.PathLike[str], *, strict: bool = True) -> Any:
    """`state` with the weights of `directory` (or a name on the hub), in the state's own dtypes and devices.

    `from_pretrained` of the model's class reads them, so the files of a base model load into a model with a head, and
    shards and old names are supported. The optimizer state is reset; tensors without published weights, such as
    adapters of `lm.bridges.lora`, stay unchanged. With `strict=False`, weights missing from the directory also stay
    unchanged, and weights unknown to the model are ignored.

    Raises `CheckpointMismatchError`, which lists missing, unexpected and mismatched weights; `CheckpointError` if
    nothing can be read, or if transforms have initialized the state; `ParamsError` if the model is not a transformers
    model.
    """
    import transformers

    module = state.apply_fn.module
    if not isinstance(module, transformers.PreTrainedModel):
        raise ParamsError(
            f"{type(module).__name__} is not a transformers model. Load its tensors by name:"
            " state = state.replace(params=safetensors.torch.load_file(path)); load a peft model before creating the"
            " state: PeftModel.from_pretrained(net, path, is_trainable=True)"
        )
    if state.slots:
        raise CheckpointError(
            f"the state was initialized by {', '.join(state.slots)}, which depend on its weights. Load first:"
            " state = step.init(load_pretrained(state, directory))"
        )
    try:
        loaded, info = type(module).from_pretrained(
            directory,
            config=copy.deepcopy(module.config),
            dtype=next(iter(state.params.values())).dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below with the others
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} could not be read as a {type(module).__name__}: {error}") from error
    missing = set(info["missing_keys"])
    mismatched = [f"{name} {tuple(saved)}, not {tuple(expected)}" for name, saved, expected in info["mismatched_keys"]]
    lines = _lines("missing", () if not strict else missing) + _lines("of another shape", mismatched)
    lines += _lines("unexpected", () if not strict else info["unexpected_keys"])
    if lines:
        raise CheckpointMismatchError(
            f"the weights in {directory} do not match this {type(module).__name__}: {'; '.join(lines)}. To load the"
            " matching weights only: load_pretrained(state, directory, strict=False)"
        )
    weights = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    weights = {name: tensor for name, tensor in weights.items() if name not in missing}
    params = _fill(state.params, weights)
    return state.replace(params=params, buffers=_fill(state.buffers, weights), opt_state=state.tx.init(params))


def _fill(tensors: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: weights[name].detach().to(tensor.device, tensor.dtype) if name in weights else tensor
        for name, tensor in tensors.items()
    }


def _lines(problem: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return [f"{problem} {', '.join(map(printable, ordered[:_SHOWN]))}{more}"] if ordered else []
