"""What work and collectives cost on a device and its wires: a roofline, and rings.

An operation takes as long as its arithmetic or its traffic with memory, whichever is longer. Of the two, the device
reaches `efficiency` of what its vendor states.

A collective of n bytes among p processes is a ring: each process sends (p−1)/p·n bytes, twice that for an all-reduce,
and waits p−1 times for its neighbour's latency. An all-reduce may be a tree over the nodes as well, and is what takes
less. Ranks are numbered node by node. Nodes are joined by as many network adapters as the group has processes in each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lumen.core.flops import peak_of
from lumen.errors import HyperparameterError
from lumen.planner.comm_trace import Sent
from lumen.planner.tracker import Work


@dataclass(frozen=True)
class Device:
    """A device and its wires: bytes, bytes per second, seconds.

    `inside` and `between` are the bandwidths of one device in one direction, within a node of `per_node` and between
    nodes. `flops` is a number for all dtypes, or None for the vendor's figures by `name`.
    """

    name: str
    memory: float
    bandwidth: float
    inside: float
    between: float
    latency_inside: float
    latency_between: float
    per_node: int = 8
    efficiency: float = 0.6
    flops: float | Mapping[torch.dtype, float] | None = field(default=None, repr=False)

    def peak(self, dtype: torch.dtype) -> float:
        """Floating point operations per second at `dtype`; for what has no figure, those at float32."""
        if isinstance(self.flops, int | float):
            return float(self.flops)
        if isinstance(self.flops, Mapping):
            return self.flops.get(dtype) or self.flops[torch.float32]
        found = peak_of(self.name, dtype) or peak_of(self.name, torch.float32)
        assert found is not None
        return found


# Memory and bandwidth by NVIDIA's data sheets (SXM), the wires of a DGX: NVLink in one direction, one adapter for each
# GPU. Latencies are those that NCCL reckons with for a step of a ring (NVLink and InfiniBand, protocol "simple").
DEVICES = {
    "h100": Device("h100", 80e9, 3.35e12, 450e9, 50e9, 3.4e-6, 14e-6),
    "h200": Device("h200", 141e9, 4.8e12, 450e9, 50e9, 3.4e-6, 14e-6),
    "a100": Device("a100", 80e9, 2.039e12, 300e9, 25e9, 3.4e-6, 14e-6),
    # One core of a server, and Gloo over the loopback: orders of magnitude, to be replaced by what you have.
    "cpu": Device(
        "cpu", 0.0, 10e9, 1e9, 1e9, 50e-6, 100e-6, 8, flops={torch.float32: 50e9, torch.float64: 25e9}
    ),
}  # fmt: skip


def device(name: str, **figures: Any) -> Device:
    """The device `name`, with `figures` of your own in place of those in the table.

    >>> from lumen.planner.roofline import device
    >>> device("h100", between=25e9).between
    25000000000.0
    """
    if name not in DEVICES:
        raise HyperparameterError(
            f"device={name!r} is unknown; give {', '.join(map(repr, DEVICES))}, with figures of your own where it is"
            " another: device='h100', memory=40e9, bandwidth=2e12, flops=3e14"
        )
    known = set(Device.__dataclass_fields__) - {"name"}
    for key, value in figures.items():
        if key not in known:
            raise HyperparameterError(f"{key}= is no figure of a device; these are {', '.join(sorted(known))}.")
        if not isinstance(value, int | float) or not value > 0:
            raise HyperparameterError(f"{key}={value!r} must be a positive number.")
    if figures.get("efficiency", 1) > 1:
        raise HyperparameterError(f"efficiency={figures['efficiency']!r} is a part of what the device can do, up to 1.")
    found = replace(DEVICES[name], **figures)
    return found if found.memory else replace(found, memory=float(_host_memory()))


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compute_seconds(work: Iterable[Work], on: Device) -> float:
    """How long all operations take, one after the other."""
    total = 0.0
    for each in work:
        arithmetic = each.flops / on.peak(each.dtype) if each.flops else 0.0
        total += max(arithmetic, each.nbytes / on.bandwidth)
    return total / on.efficiency


_TWICE = ("all-reduce",)  # a reduce-scatter, and an all-gather
_ONCE = ("all-gather", "reduce-scatter", "all-to-all")


def ring_bytes(sent: Sent) -> float:
    """How many bytes each process sends."""
    p = len(sent.ranks)
    if sent.kind in _TWICE:
        return 2 * (p - 1) / p * sent.nbytes
    return (p - 1) / p * sent.nbytes if sent.kind in _ONCE else float(sent.nbytes) * (p > 1)


def ring_seconds(sent: Sent, on: Device) -> float:
    """How long one collective takes where nothing else is on the wire.

    >>> from lumen.planner.roofline import device, ring_seconds
    >>> from lumen.planner.comm_trace import Sent
    >>> wide = device("h100", inside=450e9, latency_inside=1e-6)
    >>> round(ring_seconds(Sent("all-gather", 900_000_000, tuple(range(8)), "step", "forward"), wide) * 1e3, 3)
    1.757
    """
    p = len(sent.ranks)
    if p < 2:
        return 0.0
    nodes = _by_node(sent.ranks, on.per_node)
    bandwidth = on.inside if len(nodes) == 1 else min(on.inside, on.between * min(nodes.values()))
    far = len(nodes) - 1
    waits = (p - 1 - far) * on.latency_inside + far * on.latency_between
    if sent.kind not in _TWICE:
        return ring_bytes(sent) / bandwidth + waits
    ring = ring_bytes(sent) / bandwidth + 2 * waits
    near = max(nodes.values()) - 1
    depth = near * on.latency_inside + math.ceil(math.log2(len(nodes))) * on.latency_between
    return min(ring, 2 * sent.nbytes / bandwidth + 2 * depth)


def _by_node(ranks: Sequence[int], per_node: int) -> dict[int, int]:
    counts: dict[int, int] = {}
    for rank in ranks:
        node = rank // per_node
        counts[node] = counts.get(node, 0) + 1
    return counts
