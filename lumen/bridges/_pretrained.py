"""Published weights for a model on the meta device: checked from the files' headers, and read shard by shard."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lumen.bridges._weight_files import WeightFiles
from lumen.bridges._weight_names import Recipe, float32_paths, is_transformers, recipes, without_ignored
from lumen.bridges.lora_layer import NAMES, Lora
from lumen.core import _torch_compat, distributed
from lumen.core.device import forked_rng
from lumen.core.module import param_slots
from lumen.core.pending_weights import Move, WeightSource, read_shard
from lumen.core.sharding import ShardSpec
from lumen.errors import CheckpointMismatchError, ParamsError, printable
from lumen.parallel.comm.init import launched_size
from lumen.parallel.fsdp.meta_init import is_written, reset, unlikely_value

SHOWN = 6  # maximum number of names in a message


class PretrainedWeights:
    """The `WeightSource` of a model whose weights are in files.

    `tensors` are its params and buffers, of which those that have values keep them; `fresh` are the names of those to
    be drawn. Files are read in order, and a tensor is sliced before it is copied.
    """

    def __init__(
        self,
        files: WeightFiles,
        module: nn.Module,
        tensors: Mapping[str, Tensor],
        planned: Sequence[Recipe],
        fresh: set[str],
    ) -> None:
        self._files, self._module, self._tensors = files, module, dict(tensors)
        self._recipes = sorted(planned, key=lambda recipe: str(files.tensors[recipe.first].file))
        self._fresh = fresh

    def read(self, specs: Mapping[str, ShardSpec], seed: int, move: Move) -> dict[str, Tensor]:
        """`move(shard)` for each param and buffer by name; those without a spec are read in full."""
        names = canonical_names(self._module)
        values: dict[str, Tensor] = {}
        by_path = {path: specs[name] for path, name in names.items() if name in specs}
        for recipe in self._recipes:
            for path, shard in recipe.read(self._reader(recipe, names), by_path):
                name = names[path]
                value = move(shard.to(self._tensors[name].dtype))
                if name in values and not torch.equal(values[name], value):
                    raise _untied(self._files, name, path)
                values[name] = value
        self._files.close()
        for name, full in (self._kept() | draw(self._module, self._fresh, seed)).items():
            shard = read_shard(specs.get(name), lambda slices, full=full: full[slices or ...])  # type: ignore[misc]
            values[name] = move(shard.clone())
        return {name: values[name] for name in self._tensors}

    def fingerprint(self) -> str:
        """A digest of the files' headers and last entries, which differ where their weights do, in all likelihood."""
        return self._files.fingerprint()

    def _reader(self, recipe: Recipe, names: Mapping[str, str]) -> Callable[[str, tuple[slice, ...]], Tensor]:
        """Blocks of tensors in files, in the dtype of the first result: transformers casts before it converts."""
        dtype = self._tensors[names[recipe.path]].dtype
        return lambda name, slices: self._files.read(name, slices).to(dtype)

    def _kept(self) -> dict[str, Tensor]:
        """The tensors that have values and are in no file."""
        names = canonical_names(self._module)
        in_files = {names[path] for recipe in self._recipes for path in recipe.shapes}
        return {
            name: x.detach()
            for name, x in self._tensors.items()
            if not x.is_meta and name not in in_files | self._fresh
        }


def plan(
    files: WeightFiles, module: nn.Module, tensors: Mapping[str, Tensor], new: Iterable[str], strict: bool
) -> PretrainedWeights:
    """The source of the weights of `module`, whose params and buffers are `tensors`.

    Those named in `new` are drawn although a file may have them; without `strict`, also those that no file has.

    Raises `CheckpointMismatchError` for tensors that are missing, unexpected, of another shape or of another kind of
    dtype.
    """
    drawn = set(new)
    names = canonical_names(module)
    metas = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in files.tensors.items()}
    planned, unexpected = recipes(module, metas)
    planned = [r._replace(shapes={p: x for p, x in r.shapes.items() if names[p] not in drawn}) for r in planned]
    planned = [recipe for recipe in planned if recipe.shapes]
    in_files = {names[path] for recipe in planned for path in recipe.shapes}
    without_file = {name for name, x in tensors.items() if x.is_meta and name not in in_files}
    missing = without_file & {names[path] for path in module.state_dict() if path in names} - drawn - _adapters(module)
    missing, unexpected = without_ignored(module, missing, unexpected)
    _check(files, module, tensors, planned, names, missing if strict else (), unexpected if strict else ())
    if (drawn | missing) and distributed.rank() == 0:
        level = logging.INFO if strict else logging.WARNING
        logging.getLogger(__name__).log(level, "drawn anew: %s", ", ".join(sorted(drawn | missing)))
    return PretrainedWeights(files, module, tensors, planned, without_file | drawn)


def is_unjoined() -> bool:
    """Whether this process is one of several that have not been joined yet, so that they cannot fail together."""
    return not distributed.is_distributed() and launched_size() > 1


class FailedSource:
    """A source that could not be opened, before the processes were joined: all raise its error when they read."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    @classmethod
    def instead_of(cls, open_files: Callable[[], WeightSource]) -> WeightSource:
        """The result of `open_files`, or its error as a source."""
        try:
            return open_files()
        except Exception as error:
            return cls(error)

    def fingerprint(self) -> str:
        """A text: it has no files."""
        return str(self._error)

    def read(self, specs: Mapping[str, ShardSpec], seed: int, move: Move) -> dict[str, Tensor]:
        """Raise the error."""
        raise self._error


def canonical_names(module: nn.Module) -> dict[str, str]:
    """The name that a state has for the tensor at each path of `module`; tied tensors share one."""
    first = {id(table[key]): name for table, key, name in reversed(param_slots(module))}
    parameters = module.named_parameters(remove_duplicate=False)
    named = [*parameters, *module.named_buffers(remove_duplicate=False)]
    return {path: first[id(x)] for path, x in named if x is not None}


def dtypes_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The dtype of each tensor: its own, or float32 where transformers keeps it in a model of 16 bits."""
    main = next((x.dtype for x in tensors.values() if x.is_floating_point()), torch.float32)
    kept = float32_paths(module, main, tensors)
    return {name: torch.float32 if name in kept and x.is_floating_point() else x.dtype for name, x in tensors.items()}


# ------------------------------------------------------------------------------------------------ checks


def _check(
    files: WeightFiles,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    planned: Sequence[Recipe],
    names: Mapping[str, str],
    missing: Iterable[str],
    unexpected: Iterable[str],
) -> None:
    shapes = {path: shape for recipe in planned for path, shape in recipe.shapes.items()}
    other = [
        f"{printable(path)} {tuple(shape)}, not {tuple(tensors[names[path]].shape)}"
        for path, shape in shapes.items()
        if shape != tensors[names[path]].shape
    ]
    kinds = [
        f"{printable(source)} {_brief(files.tensors[source].dtype)}, not {_brief(tensors[names[recipe.path]].dtype)}"
        for recipe in planned
        for group in recipe.sources.values()
        for source in group
        if not _holds(tensors[names[recipe.path]].dtype, files.tensors[source].dtype)
    ]
    problems = lines("missing", missing) + lines("of another shape", other)
    problems += lines("of a dtype that the model cannot hold", kinds) + lines("unexpected", unexpected)
    if problems:
        raise CheckpointMismatchError(
            f"the weights in {files.directory} do not match this {type(module).__name__}: {'; '.join(problems)}."
            f"{_advice(missing, [text.partition(' ')[0] for text in other])}"
        )


def _advice(missing: Iterable[str], other: Iterable[str]) -> str:
    layers = sorted({name.rpartition(".")[0] + ".*" for name in [*missing, *other] if "." in name})
    if not layers:
        return " To load the matching weights only: load_pretrained(state, directory, strict=False)"
    patterns = "".join(f'"{layer}", ' for layer in layers[:SHOWN]).rstrip(" " if len(layers) == 1 else ", ")
    return f" To draw new ones from the state's seed: load_pretrained(state, directory, new=({patterns}))"


def _brief(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _holds(dtype: torch.dtype, saved: torch.dtype) -> bool:
    """Whether a tensor of `dtype` can have the values of a saved one, rounded as from_pretrained rounds them."""
    if dtype == saved:
        return True
    return dtype.is_floating_point and saved.is_floating_point and min(dtype.itemsize, saved.itemsize) > 1


def lines(problem: str, names: Iterable[str]) -> list[str]:
    """A text that names the first of `names`; none if there are no names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return [f"{problem} {', '.join(map(printable, ordered[:SHOWN]))}{more}"] if ordered else []


def _untied(files: WeightFiles, name: str, path: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{printable(name)} and {printable(path)} are one tensor of this model, and {files.directory} has different"
        " values for them. Create the model without tying them: config.tie_word_embeddings = False"
    )


def _adapters(module: nn.Module) -> set[str]:
    return {f"{name}.{key}".lstrip(".") for name, x in module.named_modules() if isinstance(x, Lora) for key in NAMES}


# ------------------------------------------------------------------------------------------------ new tensors


def draw(module: nn.Module, names: set[str], seed: int) -> dict[str, Tensor]:
    """The tensors of `module` of these names as its classes initialize them, after `torch.manual_seed(seed)`.

    A model of transformers does so by its own `initialize_weights()`, which also computes buffers that no checkpoint
    contains; another module by `reset_parameters()`. `module` is on the meta device and is not changed.

    Raises `ParamsError` for tensors that have no value afterwards.
    """
    if not names:
        return {}
    module = copy.deepcopy(module)
    slots = param_slots(module)
    tensors: dict[str, Tensor] = {}
    for table, key, name in slots:
        if name in names:
            tensors.setdefault(name, _unwritten(table[key]))
            table[key] = tensors[name]
        else:
            table[key]._is_hf_initialized = True  # transformers leaves it as it is
    with forked_rng(torch.device("cpu")), torch.no_grad():
        torch.manual_seed(seed)
        _initialize(module, {id(table) for table, _, name in slots if name in names})
    values = {name: table[key].detach() for table, key, name in slots if name in names}
    missing = [name for name, x in values.items() if not is_written(x)]
    if missing:
        raise ParamsError(
            f"no file has {', '.join(map(printable, missing[:SHOWN]))}, and {type(module).__name__} does not initialize"
            f" {'it' if len(missing) == 1 else 'them'}. Create buffers outside of torch.device('meta'), or give their"
            " module a reset_parameters() that sets its tensors."
        )
    return values


def _initialize(module: nn.Module, tables: set[int]) -> None:
    """Initialize the modules that own one of `tables`."""
    inside: set[int] = set()  # modules of models of transformers
    for submodule in module.modules():
        if id(submodule) not in inside and is_transformers(submodule):
            inside |= {id(child) for child in submodule.modules()}
            for child in submodule.modules():
                child.__dict__.pop("_is_hf_initialized", None)
            cast(Any, submodule).initialize_weights()
        own = {id(_torch_compat.own_params(submodule)), id(_torch_compat.own_buffers(submodule))}
        if own.isdisjoint(tables):
            continue
        if isinstance(submodule, Lora):
            submodule.reset_adapter()
        elif id(submodule) not in inside:
            reset(submodule)


def _unwritten(meta: Tensor) -> Tensor:
    """A tensor with memory, of unlikely values."""
    full = torch.full(meta.shape, unlikely_value(meta.dtype), dtype=meta.dtype) if math.prod(meta.shape) else None
    full = torch.empty(meta.shape, dtype=meta.dtype) if full is None else full
    return nn.Parameter(full, requires_grad=meta.requires_grad) if isinstance(meta, nn.Parameter) else full
