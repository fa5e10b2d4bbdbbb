"""One stage's part of a model: the params that it has, and one run of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat, distributed
from lumen.core.device import Generators
from lumen.core.module import Apply
from lumen.core.primitives import ApplyCall
from lumen.core.sharding import LeafSpec
from lumen.errors import LossError
from lumen.parallel.pipeline.absent import Absent
from lumen.parallel.pipeline.split import Boundary, applied_twice, check_buffers_unwritten, split_variant


class SplitModel:
    """A model with its split points: what each stage has of its params, and an `Absent` for each that it has not."""

    def __init__(
        self,
        split_points: tuple[str, ...],
        owners: Mapping[str, int],
        specs: Mapping[str, LeafSpec],
        values: Mapping[str, Tensor],
    ) -> None:
        self.split_points, self.owners = split_points, dict(owners)
        self.count = len(split_points) + 1
        self._absent: dict[str, Absent] = {}
        with distributed.real_tensors():
            mode = _mode_of(values) or _torch_compat.FakeTensorMode(allow_non_fake_inputs=True)
            for name, owner in owners.items():
                with mode:
                    fake = torch.empty(specs[name].shape, dtype=values[name].dtype, device=values[name].device)
                self._absent[name] = Absent.of(fake, [owner], mode)

    def tensors_of(self, stage: int | None, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """`tensors`, params or buffers by name, with an `Absent` for each param that `stage` has not."""
        owners = self.owners
        return {
            name: self._absent[name] if name in owners and owners[name] != stage else tensor
            for name, tensor in tensors.items()
        }

    def call(self, call: ApplyCall, stage: int | None) -> ApplyCall:
        """`call` with the part of `stage`; for None, with no param at all."""
        target: Apply = split_variant(call.target, self.split_points, stage, self.owners)
        params, buffers = self.tensors_of(stage, call.params), self.tensors_of(stage, call.buffers)
        return call.replace(target=target, params=params, buffers=buffers)


def _mode_of(values: Mapping[str, Tensor]) -> Any:
    """The mode of a plan's tensors, which those of no other mode can meet; None outside of plans."""
    fakes = (value for value in values.values() if isinstance(value, _torch_compat.FakeTensor))
    return next((fake.fake_mode for fake in fakes), None)


class StageRun:
    """One run of the loss function, or of the model alone, as far as it belongs to `stage`.

    `received` is the activation that the stage before has sent.
    """

    def __init__(self, stage: int, count: int, received: Tensor | None, generators: Generators | None) -> None:
        self.stage, self.received = stage, received
        self._is_last = stage == count - 1
        self._generators = generators if stage else None
        self._start = None if self._generators is None else self._generators.get()
        self.has_entered = stage == 0
        self.has_left = False
        self.finished = False  # what enters later is a recomputation

    def enter(self, index: int, name: str, value: Tensor) -> Tensor:
        """What the first module of stage `index` takes in place of `value`."""
        if index == self.stage + 1:
            check_buffers_unwritten()
            raise Boundary(value)
        if index != self.stage:
            return value
        if not self.finished:
            if self.has_entered:
                raise applied_twice()
            self.has_entered = True
            self._check_draws(name)
        assert self.received is not None
        return self.received

    def leave(self, _out: Any) -> None:
        """The end of the model."""
        if self.finished:
            return
        check_buffers_unwritten()
        if self.has_left:
            raise applied_twice()
        self.has_left = True

    def _check_draws(self, name: str) -> None:
        """Raise `LossError` where this run has drawn what the stages before have drawn differently."""
        if self._generators is None or self._start is None:
            return
        if not all(map(torch.equal, self._start, self._generators.get())):
            raise LossError(
                f"the loss function, or the model before {name!r}, draws random numbers from torch's generators, and"
                " each stage would draw others. Draw them by key, which is the same on all:"
                " lm.random.by_row(key, rows, lambda key: lm.random.normal(key, shape)), or let a layer of one stage"
                " draw, such as nn.Dropout."
            )


def check_result(value: Any, stage: int, what: str) -> None:
    """Raise `LossError` where a tensor in `value` depends on more than `stage` has."""
    for leaf in _torch_compat.torch_pytree.tree_leaves(value):
        if isinstance(leaf, Absent) or (isinstance(leaf, Tensor) and leaf.is_meta):
            others = sorted(leaf.stages) if isinstance(leaf, Absent) else ["other than its own"]
            raise LossError(
                f"{what} depends on params or activations of stage {' and '.join(map(str, others))} by another way than"
                f" the one tensor that stage {stage} receives. Under lm.pipeline a loss function reads the model's"
                " output, and of params only those of the last stage. Weight decay belongs to the optimizer:"
                " lm.optim.adamw(weight_decay=...)"
            )
