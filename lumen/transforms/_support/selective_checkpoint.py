"""Blocks that are recomputed in part, and a check that they keep something."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.errors import PatternError
from lumen.transforms._support.saved_operations import Operator, operator_name
from lumen.transforms._support.saved_results import OnDevice, SavedResults


class SelectiveBlocks:
    """The recomputed blocks of one step; `begin` makes what one application of a model needs."""

    def __init__(self, begin: Callable[[], Application]) -> None:
        self._begin = begin
        self._running = threading.local()

    def __deepcopy__(self, _memo: Any) -> SelectiveBlocks:
        return self  # copies of a model share its settings

    def rule(self, next: Next, call: ApplyCall, change: Callable[[nn.Module], None]) -> Any:
        """APPLY: apply the model with the blocks that `change` wraps."""
        target = call.target.variant(("remat", self), change)
        application = self._begin()
        before, self._running.application = self._application(), application
        try:
            result = next(call.replace(target=target))
        finally:
            self._running.application = before
        application.check()
        return result

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one block, and have it recomputed in the backward pass."""
        application = self._application()
        if application is None:  # where a model's own checkpoint recomputes
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return application.run(forward, args, kwargs)

    def _application(self) -> Application | None:
        """The application of a model that is running in this thread."""
        return getattr(self._running, "application", None)


class Application:
    """One application of a model, whose blocks keep the results of the operations that `names` names."""

    def __init__(self, names: Callable[[Operator], bool], requested_by: str) -> None:
        self._names, self._requested_by = names, requested_by
        self._operations: dict[Operator, bool] = {}

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block."""
        results = SavedResults(self._keeps, OnDevice())
        return checkpoint(functools.partial(results.run, forward), *args, use_reentrant=False, **kwargs)

    def _keeps(self, operator: Operator, index: int) -> bool:
        if operator not in self._operations:
            self._operations[operator] = self._names(operator)
        return self._operations[operator]

    def check(self) -> None:
        """Raise `PatternError` if blocks ran and keep nothing."""
        if self._operations and not any(self._operations.values()):
            ran = ", ".join(sorted({operator_name(operator) for operator in self._operations}))
            raise PatternError(
                f"{self._requested_by} names none of the operations that its modules ran: {ran}. Name one of them in"
                " save, or leave save out to recompute everything."
            )
