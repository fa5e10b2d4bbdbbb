"""One application of a model at stage 3: hooks gather each unit before its modules run, and free it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lumen.core.module import param_slots
from lumen.errors import OrderError
from lumen.parallel.fsdp.unshard import UnshardContext, UnshardedUnit
from lumen.parallel.fsdp.wrap import FSDPUnits
from lumen.parallel.lazy_param import LazyParam

ParamSlot = tuple[dict[str, Any], str, str]  # a module's table, the key in it, and the name of the param


class ForwardPass:
    """One application of a model: which units have been gathered, and which one is next.

    `full` are the names of params that are not sharded; `proxies` are what the loss function sees of the others.
    Frozen params, too, are gathered here; the model returns their shards, as it does other buffers.
    """

    def __init__(
        self, context: UnshardContext, units: FSDPUnits, full: frozenset[str], proxies: Mapping[str, LazyParam]
    ) -> None:
        self.context, self.units, self.full = context, units, full
        self._proxies = dict(proxies)
        self._next = 0
        self._slots: dict[int, list[ParamSlot]] = {}
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._ahead: dict[int, UnshardedUnit] = {}
        self._running: dict[int, UnshardedUnit] = {}
        self._last: UnshardedUnit | None = None
        self._gathered: dict[int, UnshardedUnit] = {}
        self._frozen: list[tuple[dict[str, Any], str, Tensor]] = []

    def begin(self, slots: Sequence[ParamSlot]) -> None:
        """Take the shards out of the module, and gather the root's params."""
        owner, full, proxies = self.units.owner, self.full, self._proxies
        frozen = self.context.plans.frozen
        for slot in sorted(slots, key=lambda slot: slot[2] in frozen) if frozen else slots:
            table, key, name = slot
            if name not in owner or name in full:
                continue
            shard = table[key]
            unit = owner[name]
            self._slots.setdefault(unit, []).append(slot)
            self._shards.setdefault(unit, {})[name] = shard
            proxy = proxies.get(name)
            if name in frozen:
                self._frozen.append((table, key, shard))
            # The loss function's own, unless a rule inside has changed the shard: cast it, say.
            if proxy is None or proxy.shard is not shard or (proxy.source is not self.context and name not in frozen):
                proxies[name] = proxy = LazyParam.of(self.context, name, shard)
            table[key] = proxy
        self.enter(0)

    def enter(self, unit: int) -> None:
        """Gather the params of a unit into its modules, after those of the units that were skipped."""
        if self._next < unit:
            self._skip_to(unit)
        if self._next <= unit:
            self._next = unit + 1
        if unit in self._slots:
            params = self._gather(unit)
            for table, key, name in self._slots[unit]:
                table[key] = params[name]

    def recall(self, unit: int) -> None:
        """Put the full params of a unit that has run into its modules once more."""
        unsharded = self._gathered.get(unit)
        if unsharded is not None:
            params = dict(zip(unsharded.names, unsharded.recall(), strict=True))
            for table, key, name in self._slots[unit]:
                table[key] = params[name]

    def leave(self, unit: int, output: Any) -> Any:
        """Free the params of a unit; its output gathers them again in the backward pass."""
        unsharded = self._running.pop(unit, None)
        if unsharded is None:
            return output
        for table, key, name in self._slots[unit]:
            table[key] = self._proxies[name]
        if not unit:
            return output
        output = self.context.tie(output, unsharded)
        unsharded.previous, self._last = self._last, unsharded if unsharded.in_backward else None
        unsharded.has_left = True
        unsharded.free()
        return output

    def end(self, output: Any) -> Any:
        """Gather and free the units that did not run, so that all ranks have gathered the same."""
        if self._next < len(self.units.names):
            self._skip_to(len(self.units.names))
        output = self.leave(0, output)
        for table, key, shard in self._frozen:
            table[key] = shard
        return output

    def _skip_to(self, unit: int) -> None:
        while self._next < unit:
            skipped = self._next
            self._next += 1
            if skipped in self._slots:
                self._gather(skipped)
                self.leave(skipped, None)

    def _gather(self, unit: int) -> dict[str, Tensor]:
        shards = self._shards[unit]
        names = (*shards,)
        unsharded = self._ahead.pop(unit, None)
        if unsharded is None:
            unsharded = self.context.launch(names, (*shards.values(),))
        params = self.context.gather(unsharded, (*shards.values(),))
        self._launch_ahead(unit)  # after what arrived has been copied, so that two units are not under way at a time
        self._running[unit] = self._gathered[unit] = unsharded
        return dict(zip(names, params, strict=True))

    def _launch_ahead(self, unit: int) -> None:
        for other in range(self._next, min(self._next + self.context.prefetch, len(self.units.names))):
            if other in self._shards and other not in self._ahead and other > unit:
                shards = self._shards[other]
                self._ahead[other] = self.context.launch((*shards,), (*shards.values(),))


class RecomputedPass:
    """A part of a `ForwardPass` that runs again in the backward pass, which goes through the last of its units now."""

    def __init__(self, _own: Any, passes: list[Any], first: ForwardPass) -> None:
        self._passes, self._first = passes, first

    @contextmanager
    def again(self) -> Iterator[None]:
        """Take the place of the first pass."""
        self._passes.append(self)
        try:
            yield
        finally:
            self._passes.pop()

    def begin(self, slots: Sequence[ParamSlot]) -> None:
        """The root's params are full until the end of the backward pass, and in their slots already."""

    def enter(self, unit: int) -> None:
        """Put the full params of a unit into its modules."""
        self._first.recall(unit)

    def leave(self, unit: int, output: Any) -> Any:
        """Nothing: the backward pass frees them."""
        return output

    def end(self, output: Any) -> Any:
        """Nothing: units that did not run before do not run now."""
        return output


class NoPass:
    """Below the passes that are running: a module that contains units runs outside of `state.apply`."""

    def begin(self, _slots: Sequence[ParamSlot]) -> None:
        """Raise `OrderError`."""
        raise OrderError(
            "a module that contains units of lm.fsdp ran outside of state.apply, where none of them can be gathered."
        )

    def enter(self, _unit: int) -> None:
        """Raise `OrderError`."""
        self.begin(())

    def leave(self, _unit: int, output: Any) -> Any:
        """Nothing: `enter` has raised."""
        return output

    def end(self, output: Any) -> Any:
        """Nothing: `begin` has raised."""
        return output


Pass = ForwardPass | RecomputedPass | NoPass


def register_unit_hooks(passes: Sequence[Pass], units: FSDPUnits) -> Callable[[nn.Module], None]:
    """A change of a module after which its units are gathered by the innermost of the `passes` that are running."""

    def change(module: nn.Module) -> None:
        for unit, name in enumerate(units.names[1:], 1):
            submodule = module.get_submodule(name)
            submodule.register_forward_pre_hook(_entering(passes, unit))
            submodule.register_forward_hook(_leaving(passes, unit))
        module.register_forward_pre_hook(lambda root, args: passes[-1].begin(param_slots(root)))
        module.register_forward_hook(lambda root, args, output: passes[-1].end(output))

    return change


# Closures and not objects: the copies of a module must share the list of passes.
def _entering(passes: Sequence[Pass], unit: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        passes[-1].enter(unit)

    return hook


def _leaving(passes: Sequence[Pass], unit: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return passes[-1].leave(unit, output)

    return hook
