"""The cost of one optimizer step, as a ratio to a raw PyTorch loop with fused AdamW.

Two models are timed: an MLP whose step is mostly overhead (about 0.3 ms), and a small GPT whose step is mostly
arithmetic (tens of ms). All variants run in one process, in interleaved rounds. Each timed section starts from the same
fresh state, after warm-up steps and a garbage collection, next to a section of the raw loop. A ratio is the median over
rounds of such pairs, with the quartiles as its range. The row of the raw loop itself is such a pair too, so it shows
the noise of the measurement: expect 1.00, within 0.02 on a quiet machine.

A variant must also reach the loss of the raw loop after 16 steps. A variant that fails, or whose package is missing
(they come with the extra `[bench]`), is listed with the reason.
"""

from __future__ import annotations

from benchmarks import ours, peers, tasks, timing
from benchmarks.options import Options
from benchmarks.rows import Row

COMPILES_LONG = ("lumen-compile", "lumen-unroll", "lumen-unroll-stack", "runner-compile-donate", "runner-unroll")
COMPILES = (*COMPILES_LONG, "raw-compile", "lumen-compile-donate")


def measure(options: Options) -> list[Row]:
    """Both models, with every variant."""
    rows = []
    for name in ("mlp", "gpt"):
        if not options.wants(name):
            continue
        task = tasks.make(name)
        variants = _variants(options, name)
        steps = options.pick(task.steps, task.steps // 8)
        found = timing.compare(task, variants, rounds=options.times(15), steps=steps)
        rows += [each.row("overhead", name) for each in found]
    return rows


def _variants(options: Options, model: str) -> list[timing.Variant]:
    every = {variant.label: variant for variant in peers.VARIANTS + ours.VARIANTS}
    chosen = options.chosen(every, peers.VARIANTS[0].label).values()
    if not options.quick:
        return list(chosen)
    left_out = COMPILES if model == "gpt" else COMPILES_LONG
    return [variant for variant in chosen if variant.name not in left_out]
