"""The cost of operations and collectives on a device and its network: a roofline, and rings.

An operation takes as long as its arithmetic or its memory traffic, whichever is longer. The device reaches the fraction
`efficiency` of its vendor's figures for both.

A collective of n bytes among p processes is a ring: each process sends (p−1)/p·n bytes, twice that for an all-reduce,
and waits p−1 times for its neighbor's latency. An all-reduce may also be a tree over the nodes; the faster one counts.
Ranks are numbered node by node. Nodes are connected by as many network adapters as the group has processes in each.
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
from lumen.planner.comm_trace import CollectiveCall
from lumen.planner.tracker import Work


@dataclass(frozen=True)
class Device:
    """A device and its interconnect, in bytes, bytes per second and seconds.

    `inside` and `between` are the bandwidths of one device in one direction, within a node of `per_node` devices and
    between nodes. `flops` is a number for all dtypes, or None for the vendor's figures by `name`.
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
        """Floating-point operations per second at `dtype`, or at float32 if there is no figure for `dtype`."""
        if isinstance(self.flops, int | float):
            return float(self.flops)
        if isinstance(self.flops, Mapping):
            return self.flops.get(dtype) or self.flops[torch.float32]
        flops = peak_of(self.name, dtype) or peak_of(self.name, torch.float32)
        assert flops is not None
        return flops


# Memory and bandwidth from NVIDIA's data sheets (SXM), the interconnect of a DGX: NVLink in one direction, one adapter
# per GPU. Latencies are those that NCCL assumes for a step of a ring (NVLink and InfiniBand, protocol "simple").
DEVICES = {
    "h100": Device("h100", 80e9, 3.35e12, 450e9, 50e9, 3.4e-6, 14e-6),
    "h200": Device("h200", 141e9, 4.8e12, 450e9, 50e9, 3.4e-6, 14e-6),
    "a100": Device("a100", 80e9, 2.039e12, 300e9, 25e9, 3.4e-6, 14e-6),
    # One core of a server, and Gloo over the loopback: orders of magnitude only.
    "cpu": Device(
        "cpu", 0.0, 10e9, 1e9, 1e9, 50e-6, 100e-6, 8, flops={torch.float32: 50e9, torch.float64: 25e9}
    ),
}  # fmt: skip


def device(name: str, **figures: Any) -> Device:
    """The device `name`, with `figures` that replace those in the table.

    >>> from lumen.planner.roofline import device
    >>> device("h100", between=25e9).between
    25000000000.0
    """
    if name not in DEVICES:
        raise HyperparameterError(
            f"device={name!r} is unknown; give {', '.join(map(repr, DEVICES))}, and for other devices your own"
            " figures: device='h100', memory=40e9, bandwidth=2e12, flops=3e14"
        )
    names = set(Device.__dataclass_fields__) - {"name"}
    for key, value in figures.items():
        if key not in names:
            raise HyperparameterError(f"{key}= is not a figure of a device; these are {', '.join(sorted(names))}.")
        if not isinstance(value, int | float) or not value > 0:
            raise HyperparameterError(f"{key}={value!r} must be a positive number.")
    if figures.get("efficiency", 1) > 1:
        raise HyperparameterError(
            f"efficiency={figures['efficiency']!r} must be a fraction of the vendor's figures, up to 1."
        )
    chosen = replace(DEVICES[name], **figures)
    return chosen if chosen.memory else replace(chosen, memory=float(_host_memory()))


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compute_seconds(work: Iterable[Work], on: Device) -> float:
    """The total time of the operations, run one after the other."""
    total = 0.0
    for operation in work:
        arithmetic = operation.flops / on.peak(operation.dtype) if operation.flops else 0.0
        total += max(arithmetic, operation.nbytes / on.bandwidth)
    return total / on.efficiency


_TWICE = ("all-reduce",)  # a reduce-scatter, and an all-gather
_NEIGHBORS = ("send", "receive")  # one message, counted where it is sent
_ONCE = ("all-gather", "reduce-scatter", "all-to-all")


def ring_bytes(call: CollectiveCall) -> float:
    """The bytes that each process sends."""
    p = len(call.ranks)
    if call.kind == "receive":
        return 0.0
    if call.kind in _TWICE:
        return 2 * (p - 1) / p * call.nbytes
    return (p - 1) / p * call.nbytes if call.kind in _ONCE else float(call.nbytes) * (p > 1)


def ring_seconds(call: CollectiveCall, on: Device) -> float:
    """The time of one collective on an otherwise idle network.

    >>> from lumen.planner.roofline import device, ring_seconds
    >>> from lumen.planner.comm_trace import CollectiveCall
    >>> wide = device("h100", inside=450e9, latency_inside=1e-6)
    >>> call = CollectiveCall("all-gather", 900_000_000, tuple(range(8)), "step", "forward")
    >>> round(ring_seconds(call, wide) * 1e3, 3)
    1.757
    """
    p = len(call.ranks)
    if p < 2:
        return 0.0
    nodes = _by_node(call.ranks, on.per_node)
    if call.kind in _NEIGHBORS:
        return _seconds_to_neighbor(call, on, len(nodes) > 1)
    bandwidth = on.inside if len(nodes) == 1 else min(on.inside, on.between * min(nodes.values()))
    far = len(nodes) - 1
    waits = (p - 1 - far) * on.latency_inside + far * on.latency_between
    if call.kind not in _TWICE:
        return ring_bytes(call) / bandwidth + waits
    ring = ring_bytes(call) / bandwidth + 2 * waits
    near = max(nodes.values()) - 1
    depth = near * on.latency_inside + math.ceil(math.log2(len(nodes))) * on.latency_between
    return min(ring, 2 * call.nbytes / bandwidth + 2 * depth)


def _seconds_to_neighbor(call: CollectiveCall, on: Device, between: bool) -> float:
    """The time of a message to the next rank, and of the one that is received meanwhile; the slowest rank counts."""
    if call.kind == "receive":
        return 0.0
    bandwidth = min(on.inside, on.between) if between else on.inside
    return ring_bytes(call) / bandwidth + (on.latency_between if between else on.latency_inside)


def _by_node(ranks: Sequence[int], per_node: int) -> dict[int, int]:
    counts: dict[int, int] = {}
    for rank in ranks:
        node = rank // per_node
        counts[node] = counts.get(node, 0) + 1
    return counts
