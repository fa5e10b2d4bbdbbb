"""Tensors in a directory of safetensors files: their shapes and dtypes from the headers, and slices of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumen.core.urls import local_path
from lumen.errors import CheckpointFormatError, CheckpointNotFoundError, CorruptCheckpointError, printable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# https://github.com/huggingface/safetensors: the names of dtypes in a header.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SAMPLE = 4096  # bytes at the end of a file that tell it from another one of the same shapes
_KEPT_OPEN = 2**28  # bytes read from a file before it is opened anew, which releases the pages that were mapped


class FileTensor(NamedTuple):
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFiles:
    """The tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` lists.

    `filename` names another file, or index, of the directory, and `extra` are files that count where they exist.

    Raises `CheckpointNotFoundError` for a directory without either, `CorruptCheckpointError` for files that are missing
    or truncated, and `CheckpointFormatError` for dtypes that torch cannot hold.
    """

    def __init__(
        self, directory: str | os.PathLike[str], filename: str | None = None, extra: Iterable[str] = ()
    ) -> None:
        self.directory = local_path(directory, "the directory of weights")
        self.tensors: dict[str, FileTensor] = {}
        self._open: Any = None
        self._path: Path | None = None
        self._read = 0
        files = _files(self.directory, filename)
        for file in [*files, *(self.directory / name for name in extra if (self.directory / name).is_file())]:
            self.tensors.update(_header(file))
        for file, names in files.items():
            missing = [name for name in names if name not in self.tensors]
            if missing:
                raise CorruptCheckpointError(
                    f"{self.directory / (filename or INDEX)} lists {printable(missing[0])!r} in {file.name}, which"
                    f" does not contain it. {_AGAIN}"
                )

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        """A block of the tensor `name`, by default all of it; nothing else is read."""
        file = self.tensors[name].file
        if file != self._path or self._read > _KEPT_OPEN:
            self._open, self._path, self._read = _opened(file), file, 0
        try:
            mapped: Tensor = self._open.get_slice(name)[slices or ...]
        except Exception as error:  # safetensors raises its own, which is no OSError
            raise _damaged(file, error) from error
        self._read += mapped.nbytes
        return mapped.clone(memory_format=torch.contiguous_format)  # it is a view of the file

    def fingerprint(self) -> str:
        """A digest of the headers, sizes and last bytes of the files."""
        digest = hashlib.sha256()
        for name, x in sorted(self.tensors.items()):
            digest.update(repr((name, x.file.name, x.shape, x.dtype)).encode())
        for file in sorted({x.file for x in self.tensors.values()}):
            with file.open("rb") as opened:
                size = opened.seek(0, os.SEEK_END)
                opened.seek(max(0, size - _SAMPLE))
                digest.update(size.to_bytes(8, "little") + opened.read())
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file that was read last."""
        self._open = self._path = None


_AGAIN = "Copy or download the directory again."


def _files(directory: Path, filename: str | None) -> dict[Path, list[str]]:
    """The files of a directory, each with the names of tensors that an index lists in it."""
    if filename is None:
        filename = next((name for name in (SINGLE, INDEX) if (directory / name).is_file()), None)
    if filename is not None and (Path(filename).is_absolute() or ".." in Path(filename).parts):
        raise CorruptCheckpointError(f"transformers_weights of the config is {filename!r}, outside of {directory}.")
    if filename is None or not (directory / filename).is_file():
        there = sorted(entry.name for entry in directory.iterdir())[:8] if directory.is_dir() else None
        contents = "does not exist" if there is None else f"contains {', '.join(map(printable, there)) or 'nothing'}"
        raise CheckpointNotFoundError(
            f"{directory} {contents}, and weights are read from {filename or f'{SINGLE} or {INDEX}'}. Give a"
            " directory that save_pretrained wrote, or download one: huggingface_hub.snapshot_download(name)"
        )
    if not filename.endswith(".json"):
        return {directory / filename: []}
    files: dict[Path, list[str]] = {}
    for name, file in _weight_map(directory / filename).items():
        if Path(file).name != file:
            raise CorruptCheckpointError(f"{directory / filename} lists {file!r}, which is outside its directory.")
        files.setdefault(directory / file, []).append(name)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CorruptCheckpointError(
            f"{directory / filename} lists {', '.join(map(printable, absent[:6]))}, which"
            f" {'is' if len(absent) == 1 else 'are'} not there. {_AGAIN}"
        )
    return dict(sorted(files.items()))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{index} is not an index of safetensors files: {error!r}. {_AGAIN}") from error


def _header(file: Path) -> dict[str, FileTensor]:
    tensors = {}
    opened = _opened(file)
    for name in list(opened.keys()):
        header = opened.get_slice(name)
        dtype = DTYPES.get(header.get_dtype())
        if dtype is None:
            raise CheckpointFormatError(
                f"{printable(name)!r} in {file} has the dtype {header.get_dtype()}, which torch cannot hold as a"
                " tensor. Convert the files, for example with from_pretrained(directory, dtype=torch.bfloat16)."
            )
        tensors[name] = FileTensor(file, tuple(header.get_shape()), dtype)
    return tensors


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except Exception as error:  # safetensors raises its own, which is no OSError
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CorruptCheckpointError:
    state = f"damaged or truncated ({file.stat().st_size} bytes)" if file.is_file() else "not there any more"
    return CorruptCheckpointError(f"{file} is {state}: {error}. {_AGAIN}")
