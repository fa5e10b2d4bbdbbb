"""What one step of `lm.fsdp` keeps on the host: its mesh, the units of its models, and the running passes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from lumen.core import rules
from lumen.core.module import Apply
from lumen.core.param_leaves import Path
from lumen.errors import WorldError
from lumen.parallel.comm.buckets import BucketPlanCache, GradComm
from lumen.parallel.comm.mesh import Mesh, StepMesh
from lumen.parallel.fsdp.forward_pass import NoPass, Pass
from lumen.parallel.fsdp.frozen_params import FrozenSource
from lumen.parallel.fsdp.shard import ShardLayout
from lumen.parallel.fsdp.unit_plan import UnitPlans
from lumen.parallel.fsdp.unshard import UnshardContext
from lumen.parallel.fsdp.unshard_traced import TracedUnshardContext
from lumen.parallel.fsdp.wrap import FSDPUnits, find

if TYPE_CHECKING:
    from lumen.parallel.fsdp.frozen_params import MakeReducer
    from lumen.parallel.fsdp.fsdp import Sharding, fsdp
    from lumen.parallel.fsdp.grad_reduction import UnitReducer

_BUCKET = 25 * 2**20  # bytes


class FSDPRuntime(StepMesh):
    """The mesh, units and passes of one step."""

    def __init__(self, mesh: Mesh | None, transform: fsdp) -> None:
        super().__init__(mesh, "shard")
        self._transform = transform
        self._patterns = [transform.patterns] if isinstance(transform.patterns, str) else transform.patterns
        self._units: dict[Apply, FSDPUnits] = {}
        self._unit_plans: dict[Path, tuple[Sharding, UnitPlans]] = {}
        self._frozen: dict[Path, FrozenSource] = {}
        self.stage = transform.stage
        self.passes: list[Pass] = [NoPass()]  # of the model, the innermost last
        self.contexts: list[UnshardContext] = []  # of the gradients that are being computed, the innermost last

    def __deepcopy__(self, _memo: object) -> FSDPRuntime:
        return self  # copies of a model run in the same step

    @functools.cached_property
    def layout(self) -> ShardLayout | None:
        """This rank's shards of the params; None where nothing is sharded."""
        group, row_group = self.mesh.group("shard"), self.mesh.group("data", "shard", "context")
        if group is None or row_group is None:
            if row_group is not None:
                raise WorldError(
                    f"{self._transform!r} has no processes along shard to shard params over. Write lm.mesh(shard=-1),"
                    " or use lm.ddp() to copy them everywhere."
                )
            return None
        device = self.mesh.device if self._transform.offload else None
        return ShardLayout(group, self.mesh.group("data", "context"), row_group, device)

    @functools.cached_property
    def comm(self) -> GradComm:
        """The ranks that have other rows."""
        assert self.layout is not None
        return GradComm(self.layout.row_group)

    @functools.cached_property
    def bucket_plans(self) -> BucketPlanCache:
        """The buckets that gradients travel in at stage 1."""
        return BucketPlanCache(self.comm, _BUCKET)

    def unit_plans(self, path: Path, sharding: Sharding) -> UnitPlans:
        """The shapes in the slot of the state at `path`, and plans for its units, which are kept for the next step."""
        known = self._unit_plans.get(path)
        if known is None or (known[0] is not sharding and known[0] != sharding):
            assert self.layout is not None
            shapes = {name: torch.Size(spec.shape) for name, spec in sharding.specs.params.items()}
            frozen = {name: shapes.pop(name) for name in [*shapes] if ("buffers", name) in sharding.specs.leaves}
            param_dtype = torch.bfloat16 if self._transform.param_dtype else None
            self._unit_plans[path] = known = sharding, UnitPlans(self.layout, shapes, param_dtype, frozen)
        return known[1]

    def frozen_source(self, path: Path, plans: UnitPlans, make_reducer: MakeReducer) -> FrozenSource:
        """What gathers the frozen params of the state at `path`, kept for the next step."""
        known = self._frozen.get(path)
        if known is None or known.plans is not plans:
            self._frozen[path] = known = FrozenSource(self, plans, make_reducer)
        return known

    def units(self, apply: Apply, params: Iterable[str]) -> FSDPUnits:
        """The units of a model, of its params and frozen ones; `PatternError` where a pattern matches nothing."""
        if apply not in self._units:
            self._units[apply] = find(apply.module, self._patterns, [*params, *apply.frozen])
        return self._units[apply]

    def context(self, plans: UnitPlans, reducer: UnitReducer) -> UnshardContext:
        """A new chain of all-gathers."""
        transform = self._transform
        if transform.offload:
            transform.check_offload()
        kind = TracedUnshardContext if rules.is_tracing() else UnshardContext
        return kind(plans, transform.prefetch, reducer)

    def context_beside(self, plans: UnitPlans, reducer: UnitReducer) -> UnshardContext:
        """All-gathers of params that no gradient is taken in, on the chain of the gradient that is being computed."""
        context = self.context(plans, reducer)
        if self.contexts:
            self.contexts[-1].attach(context)
        return context
