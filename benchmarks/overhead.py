"""The cost of one optimizer step, as a ratio to a raw PyTorch loop with fused AdamW.

    make bench                                                      # everything
    python benchmarks/overhead.py --quick                           # a first look
    python benchmarks/overhead.py --model mlp --only 'lumen*' jax   # some of the variants (globs)

Two models are timed on two threads: an MLP whose step is mostly overhead (about 0.3 ms), and a small GPT whose step is
mostly arithmetic (tens of ms). All variants run in one process, in interleaved rounds. Each timed section starts from
the same fresh state, after warm-up steps and a garbage collection, next to a section of the raw loop; a ratio is
the median over rounds of such pairs, and the range beside it the quartiles. The row of the raw loop itself is such a
pair too, so it shows the noise of the measurement: expect 1.00, within 0.02 on a quiet machine. The last column
compares the shortest sections of all; on a busy machine, with short sections (--steps 16), it is the better guide.

A variant must also reach the loss of the raw loop after 16 steps. One whose package is missing (they come with the
extra `[bench]`), or that fails, is listed with the reason. Set BENCH_TRACEBACK=1 to see where it failed.

To be expected on two cores of a server, for the MLP: JAX 0.7 to 0.8, Fabric 1.1 to 1.2, Accelerate 1.5, Lightning 1.9,
with logging 2.6; Lumen's plain step at most 1.6, donated 1.0, compiled and donated 0.9, unrolled 0.8.
"""

from __future__ import annotations

import argparse
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import timing
from rich.console import Console
from rich.table import Table


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = parsed()
    timing.hold_threads(options.threads)
    warnings.filterwarnings("ignore")
    import tasks

    variants = chosen(options.only)
    console = Console()
    report = {"machine": timing.machine(), "rounds": options.rounds, "models": {}}
    console.print(described(report["machine"]))
    for name in ("mlp", "gpt") if options.model == "both" else (options.model,):
        task = tasks.make(name)
        steps = options.steps or (task.steps // 4 if options.quick else task.steps)
        with console.status(name) as status:
            rows = timing.compare(task, variants, rounds=options.rounds, steps=steps, progress=status.update)
        best = min(rows[0].times)
        report["models"][name] = {
            "title": task.title,
            "steps": steps,
            "rows": [timing.summary(row, best) for row in rows],
        }
        console.print(table(report["models"][name]))
        for row in report["models"][name]["rows"]:
            if "missing" in row:
                console.print(f"missing: {row['label']} ({row['missing']})", markup=False, style="yellow")
    if options.json:
        timing.write_json(options.json, report)
        console.print(f"written to {options.json}")


def parsed() -> argparse.Namespace:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("mlp", "gpt", "both"), default="both")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="names of variants, or globs; the raw loop always runs"
    )
    parser.add_argument("--rounds", type=int, help="interleaved rounds (15; 5 with --quick)")
    parser.add_argument(
        "--steps", type=int, help="steps in one timed section (mlp 200, gpt 32; a quarter with --quick)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="fewer rounds of fewer steps")
    options = parser.parse_args()
    options.rounds = options.rounds or (5 if options.quick else 15)
    return options


def chosen(only: list[str] | None) -> list[timing.Variant]:
    """The variants asked for, the raw loop first."""
    import ours
    import peers

    every = peers.VARIANTS + ours.VARIANTS
    if not only:
        return every
    picked = [v for v in every[1:] if any(fnmatchcase(v.name, pattern) for pattern in only)]
    if not picked and "raw" not in only:
        raise SystemExit(f"--only {' '.join(only)} matches nothing; there are: {', '.join(v.name for v in every)}")
    return [every[0], *picked]


def described(machine: dict) -> str:
    """The machine in a line."""
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in machine["versions"].items())
    load = "" if machine["load_before"] is None else f", load {machine['load_before']:.1f}"
    return f"{machine['cpu']}, {machine['threads']} threads{load}; Python {machine['python']}; {versions}"


def table(model: dict) -> Table:
    """One model's rows."""
    found = Table(title=f"{model['title']}: ratio to the raw loop", title_justify="left")
    for name, justify in (
        ("variant", "left"),
        ("µs/step", "right"),
        ("ratio", "right"),
        ("quartiles", "right"),
        ("best", "right"),
    ):
        found.add_column(name, justify=justify)
    for row in model["rows"]:
        if "missing" in row:
            found.add_row(row["label"], "–", "–", "missing", "–", style="dim")
        else:
            low, high = row["ratio_quartiles"]
            found.add_row(
                row["label"],
                f"{row['us_per_step']:.0f}",
                f"{row['ratio']:.2f}",
                f"{low:.2f} – {high:.2f}",
                f"{row['ratio_of_best']:.2f}",
            )
    return found


if __name__ == "__main__":
    main()
