"""Frozen params at stage 3: a step's state shows them in full, gathered when they are read, and keeps their shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, distributed, rules
from lumen.core.donation import is_retired, retire_updated
from lumen.core.nested_states import map_train_states
from lumen.core.param_leaves import Path
from lumen.core.primitives import Aux, WrappedLoss
from lumen.errors import ParamsError, StateError
from lumen.parallel.fsdp.shard import ShardLayout
from lumen.parallel.fsdp.unit_plan import UnitPlans
from lumen.parallel.fsdp.unshard import UnshardContext
from lumen.parallel.lazy_param import LazyParam

if TYPE_CHECKING:
    from lumen.parallel.fsdp.grad_reduction import UnitReducer
    from lumen.parallel.fsdp.runtime import FSDPRuntime

    MakeReducer = Callable[[ShardLayout], UnitReducer]


class FrozenParam(LazyParam):
    """A frozen param in the buffers of a step's state; the first torch function that takes it gathers it."""

    form = LazyParam.form | {
        _torch_compat.tensor_version.__get__,
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    }


class FrozenSource:
    """Gathers frozen params of one training state: a `lumen.parallel.lazy_param.GatherSource`.

    In a loss function it does so on the chain of the gradient that is being computed.
    """

    def __init__(self, runtime: FSDPRuntime, plans: UnitPlans, make_reducer: MakeReducer) -> None:
        self._runtime, self.plans, self._make_reducer = runtime, plans, make_reducer
        self._known: dict[str, FrozenParam] = {}

    def proxy(self, name: str, shard: Tensor) -> FrozenParam:
        """The param `name`, of which this rank has `shard`; the same object from step to step."""
        known = self._known.get(name)
        if known is not None and known.shard is shard:
            return known
        proxy: FrozenParam = FrozenParam.of(self, name, shard)  # type: ignore[assignment]
        if not rules.is_tracing():
            self._known[name] = proxy
        return proxy

    def empty_meta(self, name: str, dtype: torch.dtype) -> Tensor:
        """The param `name` without memory."""
        return self.plans.empty_meta(name, dtype)

    def unshard(self, name: str, shard: Tensor) -> Tensor:
        """The full param `name`."""
        return self._context().unshard(name, shard)

    def _context(self) -> UnshardContext:
        contexts = self._runtime.contexts
        if contexts:
            for context in (contexts[-1], *contexts[-1].beside):
                if context.plans is self.plans:
                    return context
        return self._runtime.context_beside(self.plans, self._make_reducer(self.plans.layout))


class FrozenParams:
    """The sharded frozen params of the training states, at these paths, of one call of a step.

    The user's step sees proxies: it is a `lumen.core.sharding.StateView`. The transforms around it see shards.
    """

    def __init__(self, layout: ShardLayout, sources: Mapping[Path, FrozenSource]) -> None:
        self._layout, self._sources = layout, sources
        self._proxies: dict[int, FrozenParam] = {}  # by the id of the shard

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step` with proxies in its state, and shards in the state that it returns."""

        def run(state: Any, batch: Any) -> Any:
            shown = self.shown(state)
            out = step(shown, batch)
            if is_retired(shown) and not is_retired(state):
                retire_updated(state)
            if type(out) is not tuple or len(out) != 2:
                return out  # which is refused by name
            return self.kept(out[0]), out[1]

        return run

    def shown(self, state: Any) -> Any:
        """`state` with a proxy in place of each shard."""

        def show(path: Path, inner: Any) -> Any:
            source = self._sources.get(path)
            return inner if source is None else inner.replace(buffers=self._shown_buffers(source, inner.buffers))

        return map_train_states(show, state)

    def _shown_buffers(self, source: FrozenSource, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shown = dict(buffers)
        for name in source.plans.frozen:
            shard = buffers[name]
            shown[name] = self._proxies[id(shard)] = source.proxy(name, shard)
        return shown

    def kept(self, state: Any) -> Any:
        """A state that the step has returned, with this rank's shards in place of proxies and of full tensors."""

        def keep(path: Path, inner: Any) -> Any:
            source = self._sources.get(path)
            return inner if source is None else inner.replace(buffers=self._kept_buffers(source, inner.buffers))

        return map_train_states(keep, state)

    def _kept_buffers(self, source: FrozenSource, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = dict(shards_of(buffers))
        for name, full in source.plans.frozen.items():
            leaf = kept[name]
            if leaf.shape == self._layout.shape(full):
                continue
            if leaf.shape != full:
                raise StateError(
                    f"the step returned the frozen param {name!r} in the shape {tuple(leaf.shape)}, and it has the"
                    f" shape {tuple(full)}. A state keeps its tensors' shapes from step to step."
                )
            kept[name] = self._layout.shard(leaf).clone()
        return kept

    def proxies_of(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`buffers` with proxies in place of their shards."""
        return {name: self._proxies.get(id(buffer), buffer) for name, buffer in buffers.items()}

    def known(self, shards: Mapping[str, Tensor]) -> dict[str, LazyParam]:
        """The proxies of those `shards` that are in the step's state."""
        return {name: self._proxies[id(shard)] for name, shard in shards.items() if id(shard) in self._proxies}

    def in_aux(self, aux: Any) -> Any:
        """What a loss function has returned beside its loss, with proxies in its buffers."""
        return _map_buffers(lambda leaf: self._proxies.get(id(leaf), leaf), aux)


def shards_of(buffers: Mapping[str, Any]) -> Mapping[str, Any]:
    """`buffers` with this rank's shards in place of proxies."""
    return {name: _shard_of(b) for name, b in buffers.items()}


def returning_shards(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`loss_fn`, which returns an aux, with shards in place of proxies among the buffers in that."""

    def run(*args: Any) -> Any:
        result = loss_fn(*args)
        if type(result) is not tuple or len(result) != 2:
            return result
        return result[0], _map_buffers(_shard_of, result[1])

    return WrappedLoss(loss_fn, run, returning_shards)


def _shard_of(leaf: Any) -> Any:
    return leaf.shard if isinstance(leaf, FrozenParam) else leaf


def _map_buffers(change: Callable[[Any], Any], aux: Any) -> Any:
    """What a loss function returns beside its loss, with its buffers changed."""
    if not isinstance(aux, Aux) or not aux.buffers:
        return aux
    changed: Any = aux
    return changed.replace(buffers=tree.map(change, aux.buffers))


def plain_frozen(state: Any) -> dict[str, Tensor]:
    """The frozen params of a training state; `ParamsError` for one of another class than torch's own tensors."""
    names = getattr(getattr(state, "apply_fn", None), "frozen", ())
    frozen = {name: b for name, b in getattr(state, "buffers", {}).items() if name in names}
    for name, buffer in frozen.items():
        if type(buffer) is not Tensor and not (type(buffer) is _torch_compat.FakeTensor and distributed.is_dry_run()):
            raise ParamsError(
                f"the frozen param {name!r} is a {type(buffer).__name__}, and lm.fsdp(stage=3) shards plain"
                " tensors. Create the state with full weights and quantize that: state = lm.quantize(state, 'int8')"
                " keeps codes and scales as plain tensors. Or keep the weights whole: lm.fsdp(stage=2)."
            )
    return frozen
