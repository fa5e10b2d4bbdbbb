"""The engines of steps, and which engine has which state.

DeepSpeed's engine is the one object that a transform keeps outside the state. It is not a value: it hooks the model,
owns memory and process groups, and updates in place. So a state only refers to it. Each step of `lm.deepspeed` has a
holder, whose engine lives as long as the step, and `HOLDERS` has the holder of each state by the number in its slot.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.core.sharding import FLAT, LeafSpec, ShardingSlot, SpecTree
from lumen.core.step import Transform
from lumen.core.tensor_proxy import empty_meta
from lumen.errors import StateError
from lumen.parallel.comm.buckets import GradComm
from lumen.parallel.comm.mesh import Mesh, StepMesh
from lumen.parallel.comm.process_groups import close_on_leave
from lumen.parallel.ddp.aux_reduction import BufferChecks
from lumen.parallel.deepspeed.config import Setup
from lumen.parallel.deepspeed.engine import Engine, init_single_process_group

_numbers = itertools.count(1)


@pytree_dataclass
class EngineSlot(ShardingSlot):
    """The slot of `deepspeed`, all static: the `number` of the state's engine, the params' dtypes, and specs.

    The specs are those of the optimizer's state: of a leaf that is laid out like a param this rank has the same span.
    """

    specs: SpecTree = static()
    number: int = static()
    dtypes: tuple[tuple[str, torch.dtype], ...] = static()


class PendingGrads(NamedTuple):
    """Stand-ins for the gradients in the engine, which times `scale` (None is 1) are those of the mean loss."""

    grads: dict[str, Tensor]
    scale: Tensor | None


class EngineHolder(StepMesh):
    """The engine of one step, and what is kept for the next call of the step."""

    def __init__(self, transform: Transform, mesh: Mesh | None) -> None:
        super().__init__(mesh, "data")
        self.transform = transform
        self.other: EngineHolder | None = None  # the holder of the last call's state, if another
        self.engine: Engine | None = None
        self.number = 0
        self.specs = SpecTree({}, {})
        self.param_slots: list[
            tuple[int, str]
        ] = []  # the leaves of the optimizer's state that are laid out like params
        self.pending: PendingGrads | None = None
        self.checks = BufferChecks("lm.deepspeed")
        self.unreached: dict[Any, list[str]] = {}
        self._engine_key: Any = None
        self._finalizer: Any = None

    def __deepcopy__(self, _memo: Any) -> EngineHolder:
        return self  # a state may be copied, an engine may not

    @functools.cached_property
    def comm(self) -> GradComm:
        """The communicator of the other ranks."""
        init_single_process_group(self.mesh.device)
        assert dist.group.WORLD is not None
        return GradComm(dist.group.WORLD)

    def require_engine(self) -> Engine:
        """The engine; `StateError` before it is created."""
        if self.engine is None:
            raise StateError("lm.deepspeed has no engine yet. Prepare the state: state = step.init(state)")
        return self.engine

    def hold(self, state: Any, setup: Setup) -> Engine:
        """The engine, loaded with a state: the one that there is, if it is of this model, or a new one."""
        key = (state.apply_fn.train().module, repr(setup), tuple(state.params))
        if self._engine_key != key:
            self.close()
        if self.engine is None:
            self.engine = Engine(state.apply_fn, state.params, state.buffers, setup)
            self._engine_key = key
            self._finalizer = weakref.finalize(self, self.engine.close)  # closes with its step
            self._finalizer.atexit = False
        close_on_leave(self)
        self.engine.load(state.params)
        HOLDERS.pop(self.number, None)
        self.number, self.pending, self.other = next(_numbers), None, None
        HOLDERS[self.number] = self
        specs = {name: LeafSpec(tuple(p.shape), FLAT) for name, p in state.params.items()}
        self.specs = SpecTree.of(state, specs, field="opt_state")
        self.param_slots = self.specs.locate(state.opt_state, ("opt_state",))
        return self.engine

    def close(self) -> None:
        """Close the engine, and with it the process groups that it keeps."""
        if self._finalizer is not None:
            self._finalizer()
        self.engine = self._finalizer = self._engine_key = None

    # `lumen.parallel.lazy_param.GatherSource`, for the params of stage 3.

    def empty_meta(self, name: str, dtype: torch.dtype) -> Tensor:
        """The param `name` without memory."""
        return empty_meta(self.require_engine().shapes[name], dtype)

    def unshard(self, name: str, shard: Tensor) -> Tensor:
        """The param `name`, gathered."""
        return self.require_engine().full_param(name)


HOLDERS: weakref.WeakValueDictionary[int, EngineHolder] = weakref.WeakValueDictionary()


def holder_of(slot: EngineSlot) -> EngineHolder:
    """The holder of the state with this slot; `StateError` where its engine has another state now."""
    holder = HOLDERS.get(slot.number)
    if holder is None:
        raise StateError(
            "the engine of this state has another state since: step.init(state) was called again. Keep a plain state"
            " for later: plain = step.export(state)."
        )
    return holder
