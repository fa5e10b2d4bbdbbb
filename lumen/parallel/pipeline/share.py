"""Values of one process of a pipeline, on all of its processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.core import distributed
from lumen.parallel.comm import collectives
from lumen.parallel.comm.process_groups import GroupRef


class PipelineGroup:
    """The processes along a mesh's `pipeline` axis, or all of its processes, and the index of this one."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = GroupRef(group)
        self.size, self.index, self.device = self._group.size, self._group.index, device

    @property
    def group(self) -> dist.ProcessGroup:
        """Torch's process group."""
        return self._group()

    def __deepcopy__(self, _memo: Any) -> PipelineGroup:
        return self

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum or maximum over the processes; a new tensor."""
        return collectives.all_reduce(x.detach().clone(memory_format=torch.contiguous_format), op, self.group)()

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any of the processes."""
        return bool(self.reduce(torch.tensor(value, dtype=torch.float32, device=self.device), "max"))

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """`x`, which is written to, with the values of the process with index `source`."""
        dist.broadcast(x.view(-1).view(torch.uint8), group=self.group, group_src=source)  # Gloo lacks some dtypes
        return x

    def share(self, value: Any, source: int) -> Any:
        """The tree `value` of the process with index `source`, which alone has to give it; without graphs."""
        if distributed.is_dry_run():  # every process has what it would receive
            return tree.map(lambda x: self.broadcast(x, source) if isinstance(x, Tensor) and x.numel() else x, value)
        leaves, spec = tree.flatten(value) if self.index == source else ([], None)
        packed = [_Placeholder(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        objects = [spec.unflatten(packed) if spec is not None else None]
        dist.broadcast_object_list(objects, group=self.group, group_src=source, device=self.device)
        forms, spec = tree.flatten(objects[0])
        received = []
        for index, form in enumerate(forms):
            if not isinstance(form, _Placeholder):
                received.append(form)
                continue
            tensor = leaves[index].detach().contiguous() if self.index == source else form.empty(self.device)
            received.append(self.broadcast(tensor, source) if tensor.numel() else tensor)
        return spec.unflatten(received)


class _Placeholder:
    """A tensor without its values, as it travels."""

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._dtype = tuple(tensor.shape), tensor.dtype

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=device)
