"""The time to compile a GPT: its whole step, and its blocks alone; cold, and with the cache of a start before.

    python benchmarks/compile_time.py                 # 4 and 24 layers; half an hour
    python benchmarks/compile_time.py --layers 4

Each measurement is the first step in a fresh process; cold ones have an empty cache, warm ones that of the cold one.
Processor time is that of the process and of the compilers that it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIANTS = ("whole", "blocks")


def first_step(variant: str, layers: int) -> dict[str, float]:
    """Seconds of the first step of this process, and milliseconds of one after it."""
    import tasks
    import torch
    from ours import state_of, step

    import lumen as lm

    kind: dict[str, Callable[[], Any]] = {"whole": lm.compile, "blocks": lambda: lm.compile(blocks="blocks.*")}
    fast = lm.compose(kind[variant](), lm.donate())(step)
    state = fast.init(state_of(tasks.GPT(layers=layers)))
    batches = tasks.make("gpt").data(8)
    wall, used = time.perf_counter(), processor()
    state, metrics = fast(state, batches[0])
    loss = float(metrics["loss"])
    found = {"seconds": time.perf_counter() - wall, "processor": processor() - used, "loss": loss}
    began = time.perf_counter()
    for batch in batches:
        state, metrics = fast(state, batch)
    torch.as_tensor(metrics["loss"]).item()
    return {**found, "step_ms": 1e3 * (time.perf_counter() - began) / len(batches)}


def processor() -> float:
    """Processor time of this process and of those that it has waited for, in seconds."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def measure(variant: str, layers: int) -> list[dict[str, Any]]:
    """One cold start and one warm one."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for start in ("cold", "warm"):
            given = [sys.executable, __file__, "--one", variant, "--layers", str(layers)]
            out = subprocess.run(
                given, check=True, capture_output=True, text=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            )
            row = {"layers": layers, "variant": variant, "start": start, **json.loads(out.stdout.splitlines()[-1])}
            print(row, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(first_step(options.one, options.layers[0])))
        return
    report = [row for layers in options.layers for variant in VARIANTS for row in measure(variant, layers)]
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
