"""How leaves are called inside Orbax: nested dict keys, and the directory of each array.

Orbax joins the keys on the way to an array with dots, and that is the name of its directory, unescaped: a slash makes
a subdirectory, `..` leaves the checkpoint, `{"a.b": x, "a": {"b": y}}` is one directory twice, and 256 characters are
too many for a file system. Ordinary names stay as they are, so that JAX finds `state["params"]["fc.weight"]`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from lumen.checkpoint.leaves import Part, name_of

_PLAIN = re.compile(r"[A-Za-z0-9_\[\]<>=,+@-][A-Za-z0-9_.\[\]<>=,+@ -]*")
_LONGEST = 200
_RESERVED = re.compile(  # files of Orbax's own beside the arrays
    r"_metadata|_checkpoint_metadata|_sharding|_strings\.json|array_metadatas|commit_success\.txt|manifest\.ocdbt|d"
    r"|(ocdbt\.|descriptor).*|.*orbax-checkpoint-tmp.*",
    re.IGNORECASE,
)


def array_keys(paths: Sequence[Sequence[Part]]) -> list[tuple[str, ...]]:
    """The keys under which Orbax keeps each array.

    >>> array_keys([("params", "fc.weight"), ("params", "a/b"), ("mu", 0), ("..",)])
    [('params', 'fc.weight'), ('params', 'a%2Fb'), ('mu', '0'), ('%2E.',)]
    """
    taken: set[str] = set()
    result = []
    for path in paths:
        keys = tuple(escape(str(part)) for part in path) or ("value",)
        directory = directory_of(keys)
        if len(directory) > _LONGEST:
            keys = (f"{directory[-_LONGEST // 2 :].strip('. ')}~{_digest(path)}",)
        elif directory.casefold() in taken or _RESERVED.fullmatch(directory):
            keys = (*keys[:-1], f"{keys[-1]}~{_digest(path)}")
        taken.add(directory_of(keys).casefold())  # there are file systems that do not tell A from a
        result.append(keys)
    return result


def directory_of(keys: Sequence[str]) -> str:
    """The name that Orbax gives to the directory of an array."""
    return ".".join(keys)


def escape(key: str) -> str:
    """The key with what a file name should not hold in percent notation; `%` alone is the empty key.

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


def _digest(path: Sequence[Part]) -> str:
    return hashlib.sha256(name_of(path).encode("utf-8", "surrogatepass")).hexdigest()[:16]
