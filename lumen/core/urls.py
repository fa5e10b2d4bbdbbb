"""Paths and URLs: what an argument that names a place on a disk, or in an object store, may be."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

from lumen.errors import PathError

# The stores in which an object appears all at once: the fsspec protocol, and the package that implements it.
OBJECT_STORES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "memory": "fsspec"}
_LOCAL = ("file", "local")
_SHOWN = "s3://, gs:// and memory://"
_COLLAPSED = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]+):/(?!/)(.*)", re.DOTALL)  # Path("s3://bucket/a") is "s3:/bucket/a"


def is_url(path: object) -> bool:
    """Whether `path` is a URL, which only a str can be.

    >>> is_url("s3://bucket/runs/a"), is_url("runs/a")
    (True, False)
    """
    return isinstance(path, str) and "://" in path


def path_or_url(path: str | os.PathLike[str], name: str) -> Path | str:
    """A `Path`, or the URL of a place in an object store, as a str without a slash at its end.

    `name` is what the place is called in a message: "Checkpointer's directory". Raises `PathError` for the URL of
    anything but an object store, for a store whose package is not installed, and for a `Path` made from a URL.

    >>> path_or_url("memory://runs/a/", "the directory")
    'memory://runs/a'
    """
    text = os.fspath(path)
    if is_url(text):
        return _checked_url(text, name)
    _refuse_collapsed(text, name)
    return Path(path)


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """A `Path`; raises `PathError` for a URL, of which `Path` would make a directory named `s3:`."""
    text = os.fspath(path)
    if is_url(text):
        protocol, _, rest = text.partition("://")
        fix = f"write {rest!r}" if protocol in _LOCAL else "write a path such as 'runs/a', and copy it there afterwards"
        raise PathError(f"{name} is a place on a local disk, and {text!r} is a URL: {fix}.")
    _refuse_collapsed(text, name)
    return Path(path)


def join(location: Path | str, *names: str) -> Path | str:
    """The place of this name below `location`, a path or a URL."""
    return location.joinpath(*names) if isinstance(location, Path) else "/".join((location, *names))


def parse_location(text: str) -> Path | str:
    """A place that was written as text."""
    return text if is_url(text) else Path(text)


def basename(location: Path | str) -> str:
    """The last name of a path or a URL."""
    return str(location).rpartition("/")[2]


def _checked_url(url: str, name: str) -> str:
    protocol, _, rest = url.partition("://")
    if protocol in _LOCAL:
        raise PathError(f"{name} is the URL {url!r} of a path on this machine: write {rest!r}.")
    if protocol not in OBJECT_STORES:
        raise PathError(
            f"{name} is {url!r}, and {protocol}:// is not a store that Lumen writes to: it takes a path, or a URL that"
            f" begins with {_SHOWN}."
        )
    if not rest.strip("/"):
        raise PathError(f"{name} is {url!r}, which names no bucket: write '{protocol}://bucket/runs/a'.")
    if any(segment in ("", ".", "..") for segment in rest.rstrip("/").split("/")) or "?" in rest or "#" in rest:
        raise PathError(f"{name} is {url!r}: a URL here is names with single slashes, '{protocol}://bucket/runs/a'.")
    _require_package(protocol, name)
    return f"{protocol}://{rest.rstrip('/')}"


def _require_package(protocol: str, name: str) -> None:
    package = OBJECT_STORES[protocol]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise PathError(
            f"{name} is at {protocol}://, which needs {package}, and it cannot be imported ({error}):"
            f" pip install {package}"
        ) from error


def _refuse_collapsed(text: str, name: str) -> None:
    collapsed = _COLLAPSED.fullmatch(text)
    if collapsed and (collapsed[1] in OBJECT_STORES or collapsed[1] in _LOCAL):
        url = f"{collapsed[1]}://{collapsed[2]}"
        raise PathError(f"{name} is {text!r}, a URL that pathlib.Path has changed: write the text {url!r}.")
