"""How long `import lumen` takes beyond `import torch`.

    python benchmarks/import_time.py               # about a minute
    python benchmarks/import_time.py --rounds 21 --slowest 20 --json PATH

Fresh processes, alternating: one imports torch and then lumen, and takes the time of each; the other imports torch
alone. Printed are the medians of lumen's time inside the process, and of the difference in wall time between the two
kinds, interpreter start and exit included. The first process fills the file cache and is left out. To be expected:
at most 0.3 s; and none of the heavy packages, which load on first use.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timing

HEAVY = (
    "jax",
    "orbax",
    "tensorboardX",
    "torchmetrics",
    "rich",
    "deepspeed",
    "lightning",
    "torch._inductor",
    "torch._dynamo",
)
BOTH = f"""
import sys, time
t0 = time.perf_counter()
import torch
t1 = time.perf_counter()
known = set(sys.modules)
import lumen
t2 = time.perf_counter()
new = set(sys.modules) - known
heavy = [name for name in {HEAVY!r} if name in new]
print(t1 - t0, t2 - t1, len(new), ",".join(heavy) or "-")
"""
ALONE = "import torch"


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--slowest", type=int, default=0, metavar="N", help="list the N modules that take longest")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the figures")
    options = parser.parse_args()
    torch_times, lumen_times, differences = [], [], []
    for index in range(options.rounds + 1):
        alone, _ = timed(ALONE)
        both, said = timed(BOTH)
        if index:
            torch_times.append(float(said[0]))
            lumen_times.append(float(said[1]))
            differences.append(both - alone)
    low, middle, high = timing.quartiles(lumen_times)
    report: dict[str, Any] = {
        "machine": timing.machine(),
        "torch_s": statistics.median(torch_times),
        "lumen_s": middle,
        "lumen_quartiles_s": [low, high],
        "difference_in_wall_time_s": statistics.median(differences),
        "new_modules": int(said[2]),
        "heavy": [] if said[3] == "-" else said[3].split(","),
    }
    print(f"import torch                       {report['torch_s']:.3f} s")
    print(f"import lumen after it              {middle:.3f} s   (quartiles {low:.3f} – {high:.3f})")
    print(f"difference in wall time            {report['difference_in_wall_time_s']:.3f} s")
    heavy = ", ".join(report["heavy"]) or "none"
    print(f"modules it adds                    {report['new_modules']}, heavy ones: {heavy}")
    if options.slowest:
        print(slowest(options.slowest))
    if options.json:
        timing.write_json(options.json, report)
        print(f"written to {options.json}")


def timed(code: str) -> tuple[float, list[str]]:
    """Seconds of a fresh process that runs `code`, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=cached())
    return time.perf_counter() - start, done.stdout.split()


def cached() -> dict[str, str]:
    """This process's environment, with compiled modules kept on disk as an installed package's are."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def slowest(count: int) -> str:
    """The modules beyond torch that take longest by themselves, from `-X importtime`."""
    code = "import torch, sys; print('after torch', file=sys.stderr); import lumen"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True, env=cached()
    )
    lines = done.stderr.partition("after torch")[2].splitlines()
    entries = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    found = sorted(((int(own), name.strip()) for own, _, name in entries), reverse=True)
    return "\n".join(f"{own / 1000:8.1f} ms  {name}" for own, name in found[:count])


if __name__ == "__main__":
    main()
