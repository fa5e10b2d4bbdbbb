"""What one step of `lm.fsdp` keeps on the host: its processes, the units of its models, the passes that are running."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

from lumen.core.module import Apply
from lumen.errors import OrderError, WorldError
from lumen.parallel.comm.buckets import BucketPlanCache, GradComm
from lumen.parallel.comm.mesh import Mesh, StepMesh
from lumen.parallel.fsdp.shard import ShardLayout
from lumen.parallel.fsdp.unshard import ForwardPass
from lumen.parallel.fsdp.wrap import FSDPUnits, find

_BUCKET = 25 * 2**20  # bytes


class FSDPRuntime(StepMesh):
    """The processes, units and passes of one step."""

    def __init__(
        self, given: Mesh | None, patterns: str | Sequence[str] | None, transform: str, *, offload: bool
    ) -> None:
        super().__init__(given, "shard")
        self._patterns = [patterns] if isinstance(patterns, str) else patterns
        self._transform, self._offload = transform, offload
        self._units: dict[Apply, FSDPUnits] = {}
        self._passes: list[ForwardPass] = []

    def __deepcopy__(self, _memo: object) -> FSDPRuntime:
        return self  # copies of a model run in the same step

    @functools.cached_property
    def layout(self) -> ShardLayout | None:
        """How this process's shards lie in the whole; None where nothing is sharded."""
        group, everyone = self.mesh.group("shard"), self.mesh.group("data", "shard")
        if group is None or everyone is None:
            if everyone is not None:
                raise WorldError(
                    f"{self._transform} has no processes along shard to cut params over. Write lm.mesh(shard=-1), or"
                    " use lm.ddp() to copy them everywhere."
                )
            return None
        return ShardLayout(group, self.mesh.group("data"), everyone, self.mesh.device if self._offload else None)

    @functools.cached_property
    def plans(self) -> BucketPlanCache:
        """The buckets that gradients travel in at stage 1."""
        assert self.layout is not None
        return BucketPlanCache(GradComm(self.layout.everyone), _BUCKET)

    def units(self, apply: Apply, params: Sequence[str]) -> FSDPUnits:
        """The units of a model; `PatternError` where a pattern matches nothing."""
        if apply not in self._units:
            self._units[apply] = find(apply.module, self._patterns, params)
        return self._units[apply]

    @contextlib.contextmanager
    def running(self, forward: ForwardPass) -> Iterator[None]:
        """With `forward` as the pass that the hooks of units belong to."""
        self._passes.append(forward)
        try:
            yield
        finally:
            self._passes.pop()

    def current(self) -> ForwardPass:
        """The innermost pass that is running."""
        if not self._passes:
            raise OrderError(
                "a module that contains units of lm.fsdp ran again in the backward pass, where none of them can be"
                " gathered. Recompute the units themselves, lm.remat('blocks.*'), or make that module the unit:"
                " lm.fsdp(wrap='body')."
            )
        return self._passes[-1]
