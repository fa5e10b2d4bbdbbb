"""A run's configuration: as a JSON file next to the log, and flattened to dotted names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumen.errors import ValueKindError

Leaf = str | int | float | bool | None


def plain_number(value: float) -> float | str:
    """NaN and infinity as strings, which JSON lacks; `float` and JavaScript's `Number` parse them."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def as_json(values: Any, name: str = "") -> Any:
    """A copy of `values` in dicts, lists and plain values; raises ValueKindError for values that JSON cannot represent.

    >>> from lumen.sinks.config import as_json
    >>> as_json({"model": {"width": 64, "norm": None}, "betas": (0.9, 0.95)})
    {'model': {'width': 64, 'norm': None}, 'betas': [0.9, 0.95]}
    """
    if isinstance(values, Mapping):
        return {str(key): as_json(value, f"{name}.{key}" if name else str(key)) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [as_json(value, f"{name}.{index}") for index, value in enumerate(values)]
    if isinstance(values, float):
        return plain_number(values)
    if values is None or isinstance(values, str | int):
        return values
    raise ValueKindError(
        f"{name!r} of the configuration is {values!r} of type {type(values).__name__}; a configuration may contain"
        " mappings, lists, strings, numbers, booleans and None: write str(value), or value.item() for a number."
    )


def flatten(values: Mapping[str, Any]) -> dict[str, Leaf]:
    """Flatten to leaves with dotted names; a list is one leaf, encoded as JSON.

    >>> from lumen.sinks.config import flatten
    >>> flatten({"model": {"width": 64}, "betas": [0.9, 0.95]})
    {'model.width': 64, 'betas': '[0.9, 0.95]'}
    """
    flat: dict[str, Leaf] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{name}": leaf for name, leaf in flatten(value).items()})
        else:
            flat[key] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return flat


def write_config(path: Path, values: Mapping[str, Any]) -> None:
    """Write `NAME.config.json` next to the file `NAME.jsonl`, atomically."""
    target = path.with_name(f"{path.stem}.config.json")
    text = json.dumps(as_json(values), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
