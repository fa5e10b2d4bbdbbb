"""The cost of a leaf: one step of a model of n small params, by Lumen and by a raw loop, for n from 1 to 10,000.

    python benchmarks/leaves.py                       # 1, 100, 1,000 and 10,000 params
    python benchmarks/leaves.py --leaves 10000 --rounds 9

Each param has 16 entries and the loss is the mean of their squares, so a step is all bookkeeping: flattening trees,
making leaves that require grad, collecting gradients, the optimizer's lists. Both loops take torch's foreach or fused
AdamW; rounds are interleaved, and a ratio is the median over rounds, with the quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lumen as lm

WIDTH = 16
Loop = Callable[[int], float]


class Leaves(torch.nn.Module):
    """n params, all of which the loss uses alike."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.leaves = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(WIDTH)) for _ in range(count))

    def forward(self, target: torch.Tensor) -> torch.Tensor:
        return (torch.stack(list(self.leaves)) - target).square().mean()


def raw(count: int, **kind: bool) -> Loop:
    """The loop that one writes without any library."""
    net, target = Leaves(count), torch.ones(1, WIDTH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, **kind)

    def run(steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad()
            loss = net(target)
            loss.backward()
            optimizer.step()
        return float(loss)

    return run


def ours(count: int) -> Loop:
    """The same as a donated step."""

    def step(state: Any, batch: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
        loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0])(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    donated = lm.donate()(step)
    state = donated.init(lm.TrainState.create(Leaves(count), lm.optim.adamw(1e-3, weight_decay=1e-2)))
    target = torch.ones(1, WIDTH)

    def run(steps: int) -> float:
        nonlocal state
        loss = torch.zeros(())
        for _ in range(steps):
            state, metrics = donated(state, target)
            loss = metrics["loss"]
        return float(loss)

    return run


def compare(count: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One row for each loop: ms a step, and the ratio to the raw foreach loop's."""
    loops = {"raw, foreach": raw(count, foreach=True), "raw, fused": raw(count, fused=True), "lumen": ours(count)}
    last = {name: loop(3) for name, loop in loops.items()}
    began = time.perf_counter()
    loops["raw, foreach"](2)
    steps = max(2, int(2 * seconds / (time.perf_counter() - began)))
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            began = time.perf_counter()
            last[name] = loop(steps)
            times[name].append((time.perf_counter() - began) / steps)
    wanted = last["raw, fused"]
    if abs(last["lumen"] - wanted) > 1e-2 * abs(wanted):
        raise AssertionError(f"the loss is {last['lumen']}, and that of the raw loop {wanted}")
    rows = []
    for name, found in times.items():
        ratios = [mine / other for mine, other in zip(found, times["raw, foreach"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append({
            "variant": name, "ms": 1e3 * statistics.median(found), "ratio": middle, "low": low, "high": high,
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--leaves", type=int, nargs="+", default=[1, 100, 1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each timed section")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = {count: compare(count, options.rounds, options.seconds) for count in options.leaves}
    out = Table(title=f"a step of n params of {WIDTH} entries, ratio to raw foreach [quartiles]")
    for column in ("params", "", "ms", "µs per param", "ratio", "quartiles"):
        out.add_column(column, justify="left" if not column else "right")
    for count, rows in report.items():
        for row in rows:
            per = 1e3 * row["ms"] / count
            spread = f"{row['low']:.2f} – {row['high']:.2f}"
            out.add_row(f"{count:,}", row["variant"], f"{row['ms']:.3f}", f"{per:.2f}", f"{row['ratio']:.2f}", spread)
    Console().print(out)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
