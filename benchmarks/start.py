"""Start-up: what `import lumen` takes beyond `import torch`, and how long a process takes to its first step.

All runs are in fresh processes, which alternate; the first of each kind fills the file cache and is not counted.
"Import" is measured inside the process. "First step" is the time from the start of the process to the end of one step
of the small MLP of tasks.py: by a raw loop and by Lumen, eager and compiled, with Inductor's cache empty ("cold") and
as the cold process left it ("warm"). The raw loop compiles the model, Lumen the whole step with its update, or each
kind of block once. Expected: the import takes at most 0.3 s beyond torch's, and loads none of the heavy packages, which
are imported on first use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from benchmarks import timing
from benchmarks.options import Options
from benchmarks.rows import Row, timed

IMPORTS = {
    "import torch": "import torch",
    "Lumen: import torch, lumen": "import torch, lumen",
}
EAGER = {"raw loop": "raw", "Lumen: donate": "donate"}
COMPILED = {"raw loop, torch.compile(model)": "raw-compile", "Lumen: compile, donate": "compile-donate"}
DEEP = {**COMPILED, "Lumen: compile(blocks=...), donate": "blocks-donate"}
LAYERS = 24
SMALL = "import sys, time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"


def measure(options: Options) -> list[Row]:
    """Imports, first steps, and compiled first steps; `--quick` compiles nothing."""
    rows: list[Row] = []
    cases: dict[str, Callable[[], list[Row]]] = {
        "import": lambda: _imports("import", options),
        "first step, eager": lambda: _eager("first step, eager", options),
    }
    if not options.quick:
        cases["first step, compiled"] = lambda: _compiled("first step, compiled", COMPILED, options.times(3), options)
        deep = f"first step, compiled, GPT of {LAYERS} layers"
        cases[deep] = lambda: _compiled(deep, DEEP, options.times(1), options, str(LAYERS))
    for case, run in cases.items():
        if options.wants(case):
            rows += run()
    return rows


def _imports(case: str, options: Options) -> list[Row]:
    chosen = options.chosen(IMPORTS, "import torch")
    measures = {label: lambda code=code: _import(code) for label, code in chosen.items()}
    return timed(
        "start", case, timing.take_turns(measures, options.times(11)), "import torch", unit="s", metric="import"
    )


def _import(code: str) -> float:
    return float(_printed(["-c", SMALL.format(code)]).split()[-1])


def _eager(case: str, options: Options) -> list[Row]:
    chosen = options.chosen(EAGER, "raw loop")
    measures = {label: lambda kind=kind: _first_step(kind) for label, kind in chosen.items()}
    return timed(
        "start", case, timing.take_turns(measures, options.times(7)), "raw loop", unit="s", metric="first step"
    )


def _compiled(case: str, kinds: dict[str, str], rounds: int, options: Options, *model: str) -> list[Row]:
    base = next(iter(kinds))
    chosen = options.chosen(kinds, base)
    times: dict[str, dict[str, list[float]]] = {each: {label: [] for label in chosen} for each in ("cold", "warm")}
    for index in range(rounds):
        for label in timing.rotated(chosen, index):
            with tempfile.TemporaryDirectory() as cache:
                for each in ("cold", "warm"):
                    times[each][label].append(_first_step(chosen[label], cache, *model))
    return [
        row
        for each, found in times.items()
        for row in timed("start", f"{case}, {each} cache", found, base, unit="s", metric="first step")
    ]


def _first_step(kind: str, cache: str | None = None, *model: str) -> float:
    own = {} if cache is None else {"TORCHINDUCTOR_CACHE_DIR": cache}
    return timing.seconds(lambda: _printed(["-m", "benchmarks.first_step", kind, *model], own))


def _printed(arguments: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**_cached(), **(environment or {})},
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it died"])[-1])
    return done.stdout


def _cached() -> dict[str, str]:
    """This process's environment, with bytecode saved to disk as for an installed package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
