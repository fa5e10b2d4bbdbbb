"""Arguments that name a path, or a place in an object store."""

from __future__ import annotations

import argparse
from pathlib import Path

from lumen.core.urls import local_path, path_or_url
from lumen.errors import PathError


def local(text: str) -> Path:
    """A path; a URL is refused."""
    try:
        return local_path(text, "this argument")
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def location(text: str) -> Path | str:
    """A path, or the URL of a place in an object store."""
    try:
        return path_or_url(text, "this argument")
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
