"""Hugging Face's files: a state written as `from_pretrained` reads it, and filled from what `save_pretrained` wrote.

Models need no bridge: `lm.pure` takes those of transformers (and of peft) as they are. Reading and writing is left to
transformers itself, which knows the hub's names, ties, shards and renamings.
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

_SHOWN = 6  # names that a message lists


def save_pretrained(state: Any, directory: str | os.PathLike[str], *, max_shard_size: int | str = "50GB") -> Path:
    """Write the model of `state` as a directory that `from_pretrained` reads, or for the hub; returns its path.

    It holds `config.json` and `model.safetensors`, or several files of at most `max_shard_size` (bytes, or a text such
    as "5GB") with their index, under the hub's names; of tied weights, one is written. Adapters of `lm.bridges.lora`
    are merged into the weights, for which the hub's classes have no other place; a model of peft writes its adapters.
    The directory appears when it is complete. For a step with transforms that cut params give `step.export(state)`;
    of several processes, let one write.

    Raises `CheckpointExistsError` where `directory` exists, `ParamsError` for a model that is not of transformers, and
    `CheckpointError` where it cannot be written.
    """
    final = Path(directory)
    if os.path.lexists(final):
        raise CheckpointExistsError(f"{final} is there already. Remove it, or save under another name.")
    module: Any = lora.merged(state)
    if not hasattr(module, "save_pretrained"):
        raise ParamsError(
            f"{type(module).__name__} is not a model of transformers, so it has no config.json and no place on the hub."
            " Its tensors alone: safetensors.torch.save_file(dict(state.params), path)"
        )
    beside = final.with_name(f".{final.name}.{os.getpid()}{TEMPORARY}")
    try:
        beside.mkdir(parents=True)
        module.save_pretrained(beside, max_shard_size=max_shard_size)
        os.rename(beside, final)
    except OSError as error:
        raise CheckpointError(f"{final} could not be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def load_pretrained(state: Any, directory: str | os.PathLike[str], *, strict: bool = True) -> Any:
    """`state` with the weights that `directory` (or a name on the hub) holds, in the state's own dtypes and devices.

    It is read by `from_pretrained` of the model's class, so files of a base model fill a model with a head, and shards
    and old names are understood. The optimizer starts anew; what the model has beside its published weights, such as
    adapters of `lm.bridges.lora`, stays. With `strict=False` weights that the directory lacks stay too, and those that
    the model lacks are left out.

    Raises `CheckpointMismatchError`, which lists them, where there are such weights, or of other shapes;
    `CheckpointError` where nothing can be read, and for a state that transforms have prepared; `ParamsError` for a
    model that is not of transformers.
    """
    import transformers

    module = state.apply_fn.module
    if not isinstance(module, transformers.PreTrainedModel):
        raise ParamsError(
            f"{type(module).__name__} is not a model of transformers. Load its tensors by name:"
            " state = state.replace(params=safetensors.torch.load_file(path)); a model of peft is loaded before it is"
            " made a state: PeftModel.from_pretrained(net, path, is_trainable=True)"
        )
    if state.slots:
        raise CheckpointError(
            f"the state has been prepared by {', '.join(state.slots)}, which go by the weights it had. Load first:"
            " state = step.init(load_pretrained(state, directory))"
        )
    try:
        loaded, info = type(module).from_pretrained(
            directory,
            config=copy.deepcopy(module.config),
            dtype=next(iter(state.params.values())).dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed with the others
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} could not be read as a {type(module).__name__}: {error}") from error
    missing = set(info["missing_keys"])
    mismatched = [f"{name} {tuple(here)}, not {tuple(own)}" for name, here, own in info["mismatched_keys"]]
    lines = _lines("missing", () if not strict else missing) + _lines("of another shape", mismatched)
    lines += _lines("unexpected", () if not strict else info["unexpected_keys"])
    if lines:
        raise CheckpointMismatchError(
            f"{directory} does not hold the weights of this {type(module).__name__}: {'; '.join(lines)}. To take what"
            " fits and keep the rest as it is: load_pretrained(state, directory, strict=False)"
        )
    found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    found = {name: tensor for name, tensor in found.items() if name not in missing}
    params = _filled(state.params, found)
    return state.replace(params=params, buffers=_filled(state.buffers, found), opt_state=state.tx.init(params))


def _filled(own: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: found[name].detach().to(tensor.device, tensor.dtype) if name in found else tensor
        for name, tensor in own.items()
    }


def _lines(what: str, names: Iterable[str]) -> list[str]:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return [f"{what} {', '.join(map(printable, listed[:_SHOWN]))}{more}"] if listed else []
