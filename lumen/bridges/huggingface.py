"""Save a state for `from_pretrained` or peft, and load the files that `save_pretrained` wrote.

Models need no bridge: `lm.pure` accepts those of transformers (and of peft) unchanged. transformers itself reads and
writes the files, because it handles the hub's names, tied weights, shards and renamed weights.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lumen.bridges import lora
from lumen.bridges._pretrained import FailedSource, dtypes_of, is_unjoined, lines, plan
from lumen.bridges._sharded_save import save_sharded
from lumen.bridges._weight_files import WeightFiles
from lumen.bridges.bound import model_of
from lumen.bridges.lora_layer import Lora
from lumen.checkpoint._save import TEMPORARY
from lumen.core.arguments import checked, checked_first
from lumen.core.pending_weights import WeightSource, on_all_ranks, with_source
from lumen.core.step import Step
from lumen.core.urls import local_path
from lumen.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointMismatchError,
    HyperparameterError,
    ParamsError,
    printable,
)
from lumen.optim._param_names import Pattern, matching_any
from lumen.transforms._support.activation_budget import parse_bytes

_DIRECTORY = "the directory of weights"
_SHOWN = 6  # maximum number of names in a message
_PEFT = (("lora_a", "lora_A.weight"), ("lora_b", "lora_B.weight"))


@checked_first
def save_pretrained(
    state: Any, directory: str | os.PathLike[str], *, max_shard_size: int | str = "50GB", step: Step | None = None
) -> Path:
    """Write the model of `state` to a directory for `from_pretrained` or the hub; returns its path.

    It contains `config.json` and `model.safetensors`, or several files of at most `max_shard_size` (bytes, or a text
    such as "5GB") with their index, under the hub's names; tied weights are written once. Adapters of
    `lm.bridges.lora` are merged into the weights, because the hub's classes cannot store them; a peft model writes its
    adapters. The directory appears only when it is complete. With several processes, call it on one of them.

    If transforms shard params, pass `step`, which prepared the state, and call it on every process, for a directory
    that all of them share. Each process writes files of its own, of at most its share of the bytes, and gathers no more
    than a few tensors at a time: one, or those of a block where transformers converts them together.

    Raises `CheckpointExistsError` if `directory` exists, `ParamsError` if the model is not a transformers model, and
    `CheckpointError` if the directory cannot be written; with `step`, on every process.
    """
    if step is not None:
        max_bytes = _parse_bytes(max_shard_size)
        final = local_path(directory, _DIRECTORY)
        return save_sharded(state, step, final, lambda: _begin(_new_directory(directory)), max_bytes)
    final = _new_directory(directory)
    module: Any = lora.merged(state)
    if not hasattr(module, "save_pretrained"):
        raise ParamsError(
            f"{type(module).__name__} is not a transformers model, so it has no config.json and cannot be saved for the"
            " hub. To save its tensors only: safetensors.torch.save_file(dict(state.params), path)"
        )
    return _write(final, lambda path: module.save_pretrained(path, max_shard_size=max_shard_size))


@checked
def save_adapters(state: Any, directory: str | os.PathLike[str], *, base: str | None = None) -> Path:
    """Write the adapters of `lm.bridges.lora` to a directory of peft's files; returns its path.

    `peft.PeftModel.from_pretrained(net, directory)` reads `adapter_config.json` and `adapter_model.safetensors` for the
    model that was adapted, also where its weights were quantized afterwards. `base` is the name or path of that model,
    which peft records. The directory appears only when it is complete. Of a sharded state it takes the full adapters:
    `save_adapters(step.export(state.replace(buffers={})), directory)` gathers no frozen weight. With several processes,
    call `export` on all of them and this function on one.

    Raises `CheckpointExistsError` if `directory` exists, `CheckpointError` if it cannot be written, and `ParamsError`
    if the state has no adapters or trains other params, or if its params are sharded.
    """
    final = _new_directory(directory)
    module = model_of(state)
    layers = {name: x for name, x in module.named_modules() if isinstance(x, Lora)}
    tensors = _peft_tensors(state, layers)
    config = _peft_config(module, layers, base)

    def write(path: Path) -> None:
        from safetensors.torch import save_file

        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))

    return _write(final, write)


def _peft_tensors(state: Any, layers: Mapping[str, Lora]) -> dict[str, Tensor]:
    """The adapters by peft's names."""
    names = {f"{name}.{key}": f"base_model.model.{name}.{peft_key}" for name in layers for key, peft_key in _PEFT}
    others = [name for name in state.params if name not in names]
    if others or not layers:
        problem = f"trains {', '.join(map(printable, others[:_SHOWN]))} beside them" if layers else "has none"
        raise ParamsError(
            f"save_adapters writes the adapters of lora.adapt(...), and this state {problem}. Save the merged model:"
            " huggingface.save_pretrained(state, directory)"
        )
    shapes = {f"{name}.{key}": getattr(layer, key).shape for name, layer in layers.items() for key, _ in _PEFT}
    for name, shape in shapes.items():
        actual = state.params[name].shape
        if actual != shape:
            raise ParamsError(
                f"the adapter {name!r} has the shape {tuple(shape)}, and the state has {tuple(actual)} for it. Gather"
                " them on every process: state = step.export(state.replace(buffers={}))"
            )
    return {peft_name: state.params[name].detach().contiguous() for name, peft_name in names.items()}


def _peft_config(module: nn.Module, layers: Mapping[str, Lora], base: str | None) -> dict[str, Any]:
    """The entries of `adapter_config.json`."""
    first = next(iter(layers.values()))
    rank = first.lora_a.shape[0]
    ends = tuple(f".{name}" for name in layers)  # peft matches names in a list by their ends
    is_plain = all(name in layers or not name.endswith(ends) for name, _ in module.named_modules())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(layers) if is_plain else "|".join(map(re.escape, sorted(layers))),
        "fan_in_fan_out": not any(isinstance(layer, nn.Linear) for layer in layers.values()),
        "inference_mode": True,
    }


def _new_directory(directory: str | os.PathLike[str]) -> Path:
    final = local_path(directory, _DIRECTORY)
    if os.path.lexists(final):
        raise CheckpointExistsError(f"{final} already exists. Remove it, or save under another name.")
    return final


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.{os.getpid()}{TEMPORARY}")


def _begin(final: Path) -> Path:
    """A new directory, which is named `final` when it is complete."""
    temporary = _temporary(final)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{final} could not be written: {error}") from error
    return temporary


def _parse_bytes(size: int | str) -> int:
    try:
        return parse_bytes(size)
    except HyperparameterError as error:
        raise HyperparameterError(
            f'save_pretrained(max_shard_size={size!r}) is not a positive number of bytes. Write "5GB" or 5_000_000_000.'
        ) from error


def _write(final: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a directory, which is named `final` when it is complete."""
    temporary = _temporary(final)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        os.rename(temporary, final)
    except OSError as error:
        raise CheckpointError(f"{final} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


@checked_first
def load_pretrained(
    state: Any, directory: str | os.PathLike[str], *, strict: bool = True, new: Pattern | Sequence[Pattern] = ()
) -> Any:
    """`state` with the weights of `directory` (or a name on the hub), in the state's own dtypes and devices.

    `from_pretrained` of the model's class reads them, so the files of a base model load into a model with a head, and
    shards and old names are supported. The optimizer state is reset; tensors without published weights, such as
    adapters of `lm.bridges.lora`, stay unchanged, and so do those that match `new` (globs or regular expressions of
    names), such as a new head. With `strict=False`, weights missing from the directory also stay unchanged, and weights
    unknown to the model are ignored.

    Of a state whose model was created under `torch.device("meta")`, the directory must be local, and only the headers
    of its safetensors files are read here; call it on every process. `step.init(state)`, or a run, then reads the
    values. Under `lm.fsdp` and `lm.tensor_parallel` each process reads its shards from the files, so that none holds
    more than these and one unit; under other transforms each reads all. Names are mapped by transformers' tables; a
    model that is not of transformers has those of its `state_dict()`. New weights, and adapters, are drawn from the
    state's seed, the same on any number of processes. Buffers that no file contains are computed by the model's
    classes.

    Law: what `step.export(step.init(state))` has of the directory's weights is bitwise
    `from_pretrained(directory, dtype=...)`, in the dtype that the model was created in.

    Raises `CheckpointMismatchError`, which lists missing, unexpected and mismatched weights; `CheckpointError` if
    nothing can be read, or if transforms have initialized the state; `PatternError` for `new` that matches nothing;
    `ParamsError` if the model is not a transformers model and not on the meta device. Where one process fails, all do.

    >>> import lumen as lm, safetensors.torch, tempfile, torch
    >>> directory = tempfile.TemporaryDirectory()
    >>> safetensors.torch.save_file(torch.nn.Linear(4, 2).state_dict(), f"{directory.name}/model.safetensors")
    >>> with torch.device("meta"):
    ...     net = torch.nn.Linear(4, 2)
    >>> state = lm.TrainState.create(net, lm.optim.sgd(0.1))
    >>> state = lm.bridges.huggingface.load_pretrained(state, directory.name)
    >>> step = lm.fsdp()(lambda state, batch: (state, {}))
    >>> state.params["weight"].is_meta, step.init(state).params["weight"].is_meta
    (True, False)
    >>> directory.cleanup()
    """
    module = model_of(state)
    if state.slots:
        raise CheckpointError(
            f"the state was initialized by {', '.join(state.slots)}, which depend on its weights. Load first:"
            " state = step.init(load_pretrained(state, directory))"
        )
    tensors = {**state.params, **state.buffers}
    matched = set(matching_any(new, list(tensors), "tensor")) if new else set()
    if any(x.is_meta for x in tensors.values()):
        return _pending(state, module, directory, matched, strict)
    return _loaded(state, module, directory, matched, strict)


def _pending(state: Any, module: nn.Module, directory: str | os.PathLike[str], new: set[str], strict: bool) -> Any:
    """`state`, on the meta device, with the source of its weights."""
    dtypes = dtypes_of(module, {**state.params, **state.buffers})
    tensors = {name: x.to(dtypes[name]) if x.is_meta else x for name, x in {**state.params, **state.buffers}.items()}

    def open_files() -> WeightSource:
        config = getattr(module, "config", None)
        filename = getattr(config, "transformers_weights", None)
        files = WeightFiles(directory, filename, getattr(type(config), "extra_files", ()))
        return plan(files, module, tensors, new, strict)

    source = FailedSource.instead_of(open_files) if is_unjoined() else on_all_ranks(open_files)
    params = {name: tensors[name] for name in state.params}
    buffers = {name: tensors[name] for name in state.buffers}
    return with_source(state.replace(params=params, buffers=buffers, opt_state=state.tx.init(params)), source)


def _loaded(state: Any, module: nn.Module, directory: str | os.PathLike[str], new: set[str], strict: bool) -> Any:
    """`state` with the weights that `from_pretrained` reads."""
    import transformers

    if not isinstance(module, transformers.PreTrainedModel):
        raise ParamsError(
            f"{type(module).__name__} is not a transformers model. Load its tensors by name:"
            " state = state.replace(params=safetensors.torch.load_file(path)); load a peft model before creating the"
            " state: PeftModel.from_pretrained(net, path, is_trainable=True)"
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
    kept = {*info["missing_keys"], *new}
    mismatched = [
        f"{name} {tuple(saved)}, not {tuple(expected)}"
        for name, saved, expected in info["mismatched_keys"]
        if name not in new
    ]
    problems = lines("missing", kept - new if strict else ()) + lines("of another shape", mismatched)
    problems += lines("unexpected", () if not strict else info["unexpected_keys"])
    if problems:
        raise CheckpointMismatchError(
            f"the weights in {directory} do not match this {type(module).__name__}: {'; '.join(problems)}. To load the"
            " matching weights only: load_pretrained(state, directory, strict=False)"
        )
    weights = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    weights = {name: tensor for name, tensor in weights.items() if name not in kept}
    params = _fill(state.params, weights)
    return state.replace(params=params, buffers=_fill(state.buffers, weights), opt_state=state.tx.init(params))


def _fill(tensors: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: weights[name].detach().to(tensor.device, tensor.dtype) if name in weights else tensor
        for name, tensor in tensors.items()
    }
