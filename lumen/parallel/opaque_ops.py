"""Operators of a graph that inductor does not look into: it neither fuses them, nor lets their tensors share memory.

They stand where its freedom does harm (torch 2.13). It lets the parts of a `torch.cat` live in the memory of the whole,
and then sums over processes in that memory while the backward pass still reads a part. And it draws copies of params
together that were meant to be made one after the other, whatever memory that takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """`run` as one node of a graph, with the `signature` of its arguments; `shell` gives the result without its values.

    It is registered when it is first called, in a trace.
    """

    def __init__(self, signature: str, run: Callable[..., Any], shell: Callable[..., Any]) -> None:
        self._signature, self._run, self._shell = signature, run, shell
        self._name = signature.partition("(")[0]
        self._library: torch.library.Library | None = None

    def __call__(self, *args: Any) -> Any:
        """A node."""
        if self._library is None:
            self._library = torch.library.Library("lumen", "FRAGMENT")
            self._library.define(self._signature)
            self._library.impl(self._name, self._run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"lumen::{self._name}", self._shell, lib=self._library)
        return getattr(torch.ops.lumen, self._name)(*args)
