"""What is in memory on the host, as plain data: the process, Python's allocations, a state, and all live tensors."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat
from lumen.core.donation import is_retired

_TOP = 50  # of the tensors, and of the lines that allocate


def memory_report(state: Any) -> dict[str, Any]:
    """The memory of this process and of `state`, in bytes."""
    return {
        "process": process_bytes(),
        "python": python_bytes(),
        "state": None if is_retired(state) else component_bytes(state),
        "tensors": live_tensors(),
        "cuda": torch.cuda.memory_stats() if torch.cuda.is_available() and torch.cuda.is_initialized() else None,
    }


def process_bytes() -> dict[str, int | None]:
    """The resident memory of this process, `rss`, and its maximum so far, `peak_rss`; None where unknown."""
    return {"rss": _status("VmRSS"), "peak_rss": _status("VmHWM") or _max_rss()}


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _max_rss() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def python_bytes() -> list[dict[str, Any]] | None:
    """The lines that allocated most of Python's memory, the largest first; None unless `tracemalloc` runs.

    Data of tensors is not among it: torch allocates that itself.
    """
    if not tracemalloc.is_tracing():
        return None
    statistics = tracemalloc.take_snapshot().statistics("lineno")[:_TOP]
    return [{"line": str(line.traceback), "bytes": line.size, "count": line.count} for line in statistics]


def component_bytes(state: Any) -> dict[str, int]:
    """The bytes of each component of a state: params, buffers, each moment of the optimizer, each slot.

    >>> import torch, lumen as lm
    >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.adam(0.1))
    >>> sizes = component_bytes(state)
    >>> sizes["params"], sizes["opt_state.mu"], sizes["opt_state.nu"], sizes["seed"]
    (12, 12, 12, 8)
    """
    sizes: Counter[str] = Counter()
    for path, tensor in tree.named_tensors(state):
        component = path.rpartition("[")[0] if path.endswith("]") else path
        sizes[component.lstrip(".") or "."] += tensor.numel() * tensor.element_size()
    return dict(sizes)


Key = tuple[str, str, tuple[int, ...]]  # device, dtype and shape


def live_tensors() -> dict[str, Any]:
    """All tensors that Python refers to, by device, dtype and shape, those with the most bytes first.

    Tensors that share memory count once, as the largest of them. What only the autograd graph holds is not among them,
    nor are freed blocks that an allocator keeps.
    """
    largest: dict[int, tuple[int, int, Key]] = {}  # of each storage: the elements of a tensor, the bytes, the tensor
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), Tensor):  # not isinstance, which would ask proxies for their class
            continue
        described = _described(candidate)
        if described is not None:
            storage, tensor = described
            largest[storage] = max(largest.get(storage, tensor), tensor)
    counts = Counter(key for _, _, key in largest.values())
    sizes: Counter[Key] = Counter()
    for _, nbytes, key in largest.values():
        sizes[key] += nbytes
    shown = [
        {"device": key[0], "dtype": key[1], "shape": list(key[2]), "count": counts[key], "bytes": size}
        for key, size in sizes.most_common(_TOP)
    ]
    return {"bytes": sum(sizes.values()), "count": len(largest), "largest": shown}


def _described(tensor: Tensor) -> tuple[int, tuple[int, int, Key]] | None:
    """The identity of a tensor's memory, its elements, the bytes of the memory, and its kind; None without memory."""
    try:
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" or not storage.nbytes():
            return None
        key = str(tensor.device), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        return _torch_compat.storage_id(storage), (tensor.numel(), storage.nbytes(), key)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError):  # fake, wrapped, sparse, lazy
        return None
