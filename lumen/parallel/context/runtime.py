"""What one step of `lm.context_parallel` keeps on the host: its ranks, and what the checks of its losses found."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lumen.core import distributed
from lumen.core.collectives import MESH_AXES
from lumen.core.primitives import user_loss
from lumen.errors import LossError, WorldError
from lumen.parallel.comm import collectives
from lumen.parallel.comm.buckets import BucketPlanCache, GradComm
from lumen.parallel.comm.mesh import Mesh, StepMesh
from lumen.parallel.context.function_mode import CallSites
from lumen.parallel.tensor.autograd_collectives import TPGroup

_BUCKET = 25 * 2**20  # bytes


class ContextRuntime(StepMesh):
    """The ranks of one step, and its checked losses."""

    def __init__(self, mesh: Mesh | None) -> None:
        super().__init__(mesh, "context")
        self._sites: dict[Any, CallSites] = {}

    @functools.cached_property
    def group(self) -> TPGroup | None:
        """The ranks along `context`; None in a world of one."""
        group = self.mesh.group("context")
        if group is None and self.mesh.size() > 1:
            raise WorldError(
                f"{self.mesh!r} has no processes along context to shard sequences over. Write lm.mesh(context=-1), or"
                " leave lm.context_parallel out."
            )
        return None if group is None else TPGroup(group)

    @functools.cached_property
    def comm(self) -> GradComm:
        """The ranks along `context`, for the sums of gradients where no other transform makes them."""
        assert self.group is not None
        return GradComm(self.group.group)

    @functools.cached_property
    def plans(self) -> BucketPlanCache:
        """The bucket layouts of the gradients."""
        return BucketPlanCache(self.comm, _BUCKET)

    def sites(self, loss_fn: Any) -> CallSites:
        """What is known of a loss function."""
        user = user_loss(loss_fn)
        return self._sites.setdefault(getattr(user, "__code__", user), CallSites())

    def max_over_all_ranks(self, x: Tensor) -> Tensor:
        """The largest entries of `x` on any rank of the mesh."""
        group = self.mesh.group(*MESH_AXES)
        assert group is not None
        return collectives.all_reduce(x, "max", group)()

    def raise_together(self, failures: Sequence[LossError]) -> None:
        """Raise the first failure, on every rank of the mesh, if any rank has one."""
        if distributed.is_dry_run():
            return
        flag = torch.tensor([len(failures)], device=self.mesh.device)
        if not self.max_over_all_ranks(flag).item():
            return
        raise (
            failures[0]
            if failures
            else LossError(
                "attention on another rank along context has a mask of that rank's keys alone; its error says what to"
                " write."
            )
        )
