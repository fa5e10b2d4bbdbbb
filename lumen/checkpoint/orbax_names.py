"""The names of leaves in Orbax: nested dict keys, and the directory of each array.

Orbax joins the keys of an array with dots into the name of its directory, without escaping. So a slash would make a
subdirectory, `..` would leave the checkpoint, `{"a.b": x, "a": {"b": y}}` would name one directory twice, and 256
characters are too long for a file system. Ordinary names are unchanged: JAX finds `state["params"]["fc.weight"]`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from lumen.checkpoint.leaves import PathKey, name_of

_PLAIN = re.compile(r"[A-Za-z0-9_\[\]<>=,+@-][A-Za-z0-9_.\[\]<>=,+@ -]*")
_MAX_LENGTH = 200
_RESERVED = re.compile(  # files that Orbax writes beside the arrays
    r"_metadata|_checkpoint_metadata|_sharding|_strings\.json|array_metadatas|commit_success\.txt|manifest\.ocdbt|d"
    r"|(ocdbt\.|descriptor).*|.*orbax-checkpoint-tmp.*",
    re.IGNORECASE,
)


def array_keys(paths: Sequence[Sequence[PathKey]]) -> list[tuple[str, ...]]:
    """The keys under which Orbax stores each array.

    >>> array_keys([("params", "fc.weight"), ("params", "a/b"), ("mu", 0), ("..",)])
    [('params', 'fc.weight'), ('params', 'a%2Fb'), ('mu', '0'), ('%2E.',)]
    """
    used: set[str] = set()
    result = []
    for path in paths:
        keys = tuple(escape(str(key)) for key in path) or ("value",)
        directory = directory_of(keys)
        if len(directory) > _MAX_LENGTH:
            keys = (f"{directory[-_MAX_LENGTH // 2 :].strip('. ')}~{_digest(path)}",)
        elif directory.casefold() in used or _RESERVED.fullmatch(directory):
            keys = (*keys[:-1], f"{keys[-1]}~{_digest(path)}")
        used.add(directory_of(keys).casefold())  # some file systems are case-insensitive
        result.append(keys)
    return result


def directory_of(keys: Sequence[str]) -> str:
    """The name that Orbax gives to the directory of an array."""
    return ".".join(keys)


def escape(key: str) -> str:
    """The key with percent-encoding for characters that file names should not contain; `%` alone is the empty key.

    >>> escape("fc.weight"), escape("a/b"), escape(""), escape(".."), escape("é")
    ('fc.weight', 'a%2Fb', '%', '%2E.', '%C3%A9')
    """
    if _PLAIN.fullmatch(key):
        return key
    first = True
    text = ""
    for byte in key.encode("utf-8", "surrogatepass"):
        char = chr(byte)
        plain = _PLAIN.fullmatch(char) if first else _PLAIN.fullmatch(f"_{char}")
        text += char if plain else f"%{byte:02X}"
        first = False
    return text or "%"


def _digest(path: Sequence[PathKey]) -> str:
    return hashlib.sha256(name_of(path).encode("utf-8", "surrogatepass")).hexdigest()[:16]
