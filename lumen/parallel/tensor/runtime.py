"""What one step of `lm.tensor_parallel` keeps on the host: its ranks, and the styles and specs of its models."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.core.sharding import LeafSpec, ShardingSlot, SpecTree
from lumen.parallel.comm.mesh import Mesh, StepMesh
from lumen.parallel.tensor.autograd_collectives import TPGroup
from lumen.parallel.tensor.layers import FullParamView, TPForwardContext
from lumen.parallel.tensor.layout import Plan, module_styles
from lumen.parallel.tensor.styles import Style


@pytree_dataclass
class TensorSharding(ShardingSlot):
    """The slot of `tensor_parallel`, all static: the specs of the state's leaves, and over how many ranks."""

    specs: SpecTree = static()
    size: int = static()


class TPRuntime(StepMesh):
    """The ranks of one step, and the styles and specs of its models."""

    def __init__(self, mesh: Mesh | None, plan: Plan) -> None:
        super().__init__(mesh, "tensor")
        self._plan = plan
        self._styles: dict[Any, dict[str, Style]] = {}
        self._view: tuple[SpecTree, FullParamView] | None = None

    @functools.cached_property
    def tp_group(self) -> TPGroup | None:
        """The ranks along `tensor`; None where nothing is sharded."""
        group = self.mesh.group("tensor")
        return None if group is None else TPGroup(group)

    @functools.cached_property
    def forward_context(self) -> TPForwardContext:
        """What the layers share while a model runs."""
        assert self.tp_group is not None
        return TPForwardContext(self.tp_group)

    def styles(self, apply: Any) -> dict[str, Style]:
        """The style of each module that the plan names."""
        if apply not in self._styles:
            self._styles[apply] = module_styles(apply.module, self._plan)
        return self._styles[apply]

    def layouts(self, sharding: TensorSharding) -> tuple[Mapping[str, LeafSpec], FullParamView]:
        """The specs of the params in the slot of a state, and the view that gathers params by them."""
        cached = self._view
        if cached is None or cached[0] != sharding.specs:
            assert self.tp_group is not None
            self._view = cached = sharding.specs, FullParamView(self.tp_group, sharding.specs.params)
        return sharding.specs.params, cached[1]
