"""Operators that are opaque to inductor: it neither fuses them, nor lets their tensors share memory.

They are used where its optimizations do harm (torch 2.13). It lets the inputs of a `torch.cat` share the memory of the
result, and then reduces in that memory while the backward pass still reads an input. It also merges copies of params
that must be made one after the other to save memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """`run` as one node of a graph, with the `signature` of its arguments; `fake` returns the result without values.

    It is registered at its first call, in a trace.
    """

    def __init__(self, signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self._signature, self._run, self._fake = signature, run, fake
        self._name = signature.partition("(")[0]
        self._library: torch.library.Library | None = None

    def __call__(self, *args: Any) -> Any:
        """Add a node to the graph."""
        if self._library is None:
            self._library = torch.library.Library("lumen", "FRAGMENT")
            self._library.define(self._signature)
            self._library.impl(self._name, self._run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"lumen::{self._name}", self._fake, lib=self._library)
        return getattr(torch.ops.lumen, self._name)(*args)
