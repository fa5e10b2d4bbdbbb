"""What one step of `lm.pipeline` keeps on the host: its processes, the split model, and the schedules that it runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lumen.parallel.comm import process_groups
from lumen.parallel.comm.mesh import Mesh, StepMesh
from lumen.parallel.pipeline.layout import PipelineSharding
from lumen.parallel.pipeline.probe import Form
from lumen.parallel.pipeline.schedule import ScheduleName, StageSchedule
from lumen.parallel.pipeline.share import PipelineGroup
from lumen.parallel.pipeline.stage_run import SplitModel
from lumen.parallel.pipeline.stages import stage_of_params


class PipelineRuntime(StepMesh):
    """The processes of one step, and what has been made for its model and its kinds of batches."""

    def __init__(self, mesh: Mesh | None, schedule: ScheduleName, microbatches: int, text: str) -> None:
        super().__init__(mesh, "pipeline")
        self.schedule, self.microbatches = schedule, microbatches
        self.text = text  # of the transform
        self.param_names: frozenset[str] = frozenset()
        self.buffers: Mapping[str, Tensor] = {}  # of the state that runs
        self._model: tuple[Any, SplitModel] | None = None
        self.forms: dict[Any, Sequence[Form]] = {}  # of what stages send, by kind of batch
        self._schedules: dict[Any, StageSchedule] = {}

    @functools.cached_property
    def group(self) -> PipelineGroup | None:
        """The processes along `pipeline`; None where nothing is split."""
        group = self.mesh.group("pipeline")
        return None if group is None else PipelineGroup(group, self.mesh.device)

    @functools.cached_property
    def all_processes(self) -> PipelineGroup:
        """The processes along `pipeline`, and those with other rows, which all end with an error of one of them."""
        group = self.mesh.group("data", "shard", "pipeline")
        assert group is not None
        return PipelineGroup(group, self.mesh.device)

    def model(self, state: Any, sharding: PipelineSharding) -> SplitModel:
        """The model of `state` with its split points."""
        values = {**state.buffers, **state.params}
        key = (
            state.apply_fn.origin,
            sharding.split_points,
            sharding.specs,
            [(x.dtype, x.device) for x in values.values()],
        )
        if self._model is None or self._model[0] != key:
            owners = stage_of_params(state.apply_fn.module, sharding.split_points)
            self._model = key, SplitModel(sharding.split_points, owners, sharding.specs.params, values)
            self.forms.clear()
        self.param_names, self.buffers = frozenset(state.params), state.buffers
        return self._model[1]

    def own_stages(self, count: int) -> list[int]:
        """The stages of this process, of `count`."""
        assert self.group is not None
        return [stage for stage in range(count) if stage % self.group.size == self.group.index]

    def schedule_of(self, forms: Sequence[Form], count: int) -> StageSchedule:
        """The schedule for activations of these forms, made once: its buffers for receiving are used again."""
        key = tuple(forms)
        if key not in self._schedules:
            assert self.group is not None
            process_groups.close_on_leave(self)
            self._schedules[key] = StageSchedule(
                self.schedule, self.microbatches, self.own_stages(count), forms, self.group
            )
        return self._schedules[key]

    def close(self) -> None:
        """Drop the schedules, which refer to the process group, before this world is left."""
        self._schedules.clear()
