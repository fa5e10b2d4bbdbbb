"""Writes the model of a sharded state for `from_pretrained`: tensors are gathered one group at a time.

Each rank writes files of its own; the first one adds the configuration and the index, and names the directory last.
The format of a file: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch.distributed as dist
from torch import Tensor

from lumen.bridges._export_names import PublishedTensors
from lumen.bridges._weight_files import DTYPES, INDEX, SINGLE
from lumen.bridges._weight_names import is_transformers
from lumen.bridges.bound import model_of
from lumen.checkpoint.fsync import sync
from lumen.core import distributed, rules
from lumen.core.dtypes import as_bytes
from lumen.core.pending_weights import on_all_ranks
from lumen.core.sharding import ShardingSlot
from lumen.core.step import Step
from lumen.errors import CheckpointError, CheckpointFormatError, ParamsError, StateError, printable

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightFile(NamedTuple):
    """A file to be written by the rank `owner`: the header, and where in the file each tensor begins."""

    name: str
    owner: int
    header: bytes
    offsets: Mapping[str, int]


def save_sharded(state: Any, step: Step, final: Path, temporary: Callable[[], Path], max_bytes: int) -> Path:
    """Write the model of `state`, which `step` has prepared; all ranks call it. Returns the directory `final`.

    `temporary` makes the directory in which it is written, on the first rank.
    """
    module = model_of(state)
    published = on_all_ranks(lambda: _published(state, step, module))
    outputs = {name: x for group in published.outputs for name, x in group.items()}
    files = weight_files(outputs, max_bytes, distributed.world_size())
    directory = _from_first_rank(temporary)
    try:
        on_all_ranks(lambda: _write_config(module, directory) if distributed.rank() == 0 else None)
        on_all_ranks(lambda: _check_shared(directory))
        on_all_ranks(lambda: _write_tensors(state, step, published, files, directory))
        on_all_ranks(lambda: _finish(files, outputs, directory, final) if distributed.rank() == 0 else None)
    finally:
        if distributed.rank() == 0:
            shutil.rmtree(directory, ignore_errors=True)
    return final


def _published(state: Any, step: Step, module: Any) -> PublishedTensors:
    if not is_transformers(module):
        raise ParamsError(
            f"{type(module).__name__} is not a model of transformers, and step=step saves only those. Save the state"
            " that step.export(state) gives, or its tensors: lm.checkpoint.save(path, state)"
        )
    other = [t for t in step.transforms if t.opaque_state or t.level == "ensemble"]
    if other:
        raise StateError(f"{other[0]!r} keeps params in another form. Save step.export(state), without step=step.")
    return PublishedTensors(module, {**state.params, **state.buffers})


def weight_files(outputs: Mapping[str, Tensor], max_bytes: int, ranks: int) -> list[WeightFile]:
    """Files of at most `max_bytes`, and at most a rank's share of all bytes, unless one tensor is larger."""
    limit = min(max_bytes, math.ceil(sum(x.nbytes for x in outputs.values()) / ranks))
    contents: list[dict[str, Tensor]] = [{}]
    for name, x in outputs.items():
        if contents[-1] and sum(other.nbytes for other in contents[-1].values()) + x.nbytes > limit:
            contents.append({})
        contents[-1][name] = x
    count = len(contents)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    pairs = zip(names, contents, strict=True)
    return [_weight_file(name, i * ranks // count, tensors) for i, (name, tensors) in enumerate(pairs)]


def _weight_file(name: str, owner: int, tensors: Mapping[str, Tensor]) -> WeightFile:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for key, x in tensors.items():
        if x.dtype not in _NAMES:
            raise CheckpointFormatError(f"{printable(key)!r} has the dtype {x.dtype}, which safetensors does not have.")
        offsets[key], end = end, end + x.nbytes
        entries[key] = {"dtype": _NAMES[x.dtype], "shape": [*x.shape], "data_offsets": [offsets[key], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return WeightFile(name, owner, header, {key: len(header) + offset for key, offset in offsets.items()})


def _write_tensors(
    state: Any, step: Step, published: PublishedTensors, files: Sequence[WeightFile], directory: Path
) -> None:
    """Gather one group after the other, and write this rank's tensors; after a failure, only gather."""
    own = {key: file for file in files if file.owner == distributed.rank() for key in file.offsets}
    error: Exception | None = None
    with _OpenFiles(directory) as opened:
        for names, outputs in zip(published.groups, published.outputs, strict=True):
            tensors = _gathered(state, step, names)
            if error is None and not own.keys().isdisjoint(outputs):
                try:
                    published.check(tensors)
                    opened.write({k: x for k, x in published.convert(tensors).items() if k in own}, own)
                except Exception as raised:  # the others are waiting in the next gather
                    error = raised
    if error is not None:
        raise CheckpointError(f"{directory} could not be written: {error}") from error


def _gathered(state: Any, step: Step, names: Sequence[str]) -> dict[str, Tensor]:
    """The full params and buffers of these names, on every rank."""
    selected = state.replace(
        params={name: state.params[name] for name in names if name in state.params},
        buffers={name: state.buffers[name] for name in names if name in state.buffers},
        opt_state=(),
        slots={name: slot for name, slot in state.slots.items() if isinstance(slot, ShardingSlot)},
    )
    with rules.running(step):
        for transform in step.transforms:
            if transform.shards:
                selected = transform.export(selected)
    return {**selected.params, **selected.buffers}


class _OpenFiles:
    """The file that is being written, in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: BinaryIO | None = None
        self._name = ""

    def __enter__(self) -> _OpenFiles:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, tensors: Mapping[str, Tensor], files: Mapping[str, WeightFile]) -> None:
        """Write tensors where their files have them."""
        for key, x in tensors.items():
            file = self._opened(files[key])
            file.seek(files[key].offsets[key])
            file.write(as_bytes(x.cpu()).numpy().data)

    def _opened(self, file: WeightFile) -> BinaryIO:
        if self._name != file.name or self._file is None:
            self.__exit__()
            path = self._directory / file.name
            is_new = not path.exists()
            self._file, self._name = path.open("wb" if is_new else "r+b"), file.name
            if is_new:
                self._file.write(file.header)
        return self._file


def _write_config(module: Any, directory: Path) -> None:
    """Write the configuration, and code of the model's own; before the weights, which transformers would remove."""
    module.save_pretrained(directory, state_dict={})


def _finish(files: Sequence[WeightFile], outputs: Mapping[str, Tensor], directory: Path, final: Path) -> None:
    """Add the index, and give the directory its name."""
    if len(files) > 1:
        weight_map = {key: file.name for file in files for key in file.offsets}
        metadata = {
            "total_parameters": sum(x.numel() for x in outputs.values()),
            "total_size": sum(x.nbytes for x in outputs.values()),
        }
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        (directory / INDEX).write_text(text + "\n")
    sync(directory)
    os.rename(directory, final)


def _check_shared(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory.parent} of the first rank is not that of this one. With step=step all processes write to one"
            " directory: give one on a file system that they share."
        )


def _from_first_rank(run: Callable[[], Path]) -> Path:
    """The result of the first rank, on every rank."""
    path = on_all_ranks(lambda: run() if distributed.rank() == 0 else None)
    if distributed.world_size() == 1:
        assert path is not None
        return path
    paths: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(paths, path)
    return paths[0]  # type: ignore[no-any-return]
