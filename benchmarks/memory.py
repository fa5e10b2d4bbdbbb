"""Peak memory of one optimizer step, as a ratio to a raw loop with fused AdamW, beside an analytic lower bound.

There are three models: an MLP with a large state (110 MB of params and moments, batch 512), a GPT with large
activations (38 MB of state, 140 MB of activations), and a deeper GPT with longer texts for what `lm.remat` keeps, whose
steps are timed as well, in interleaved rounds. Every variant runs in fresh processes. See peak.py for the two
ways of measuring, and bound.py for the bound. Expected of "allocated": donate at most 1.05 of the raw loop; the plain
step and compile alone about 1.6 for the MLP (they hold the old state and the new one).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks import bound, peak, spread, tasks, timing
from benchmarks.apart import ApartError, apart
from benchmarks.options import Options
from benchmarks.rows import Row
from benchmarks.rows import timed as rows_of_times

PROCESSES = 2  # under fsdp
PARTS = 4  # microbatches
METHODS = {"allocated": peak.allocated, "resident": peak.grown}
Start = Callable[[], Callable[[Any], None]]  # makes a state, and returns a function that runs one step


@dataclass(frozen=True)
class Model:
    """A model with its batch; its bound is computed from `units`."""

    net: Callable[[], nn.Module]
    batch: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    units: list[bound.Unit]
    blocks: str | None = None  # recomputed by remat
    is_for_remat: bool = False  # measured with variants of remat alone, and timed


@dataclass(frozen=True)
class Variant:
    """A variant of training: a raw loop, or Lumen's transforms of these names; `least` are the bound's terms."""

    transforms: tuple[str, ...] | None = None
    least: dict[str, Any] = field(default_factory=dict)
    remat: dict[str, Any] = field(default_factory=dict)  # options of lm.remat

    @property
    def processes(self) -> int:
        """The number of processes."""
        return self.least.get("processes", 1)


WIDTHS, ROWS = (1024, 2560, 2560, 10), 512
VOCAB, TOKENS, WIDTH, LAYERS, TEXTS = 128, 128, 256, 4, 16
LONG = {"vocab": VOCAB, "tokens": 256, "width": 256, "layers": 8}
LONG_TEXTS, ROUNDS = 8, 7


def _images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, WIDTHS[0]), torch.randint(0, WIDTHS[-1], (ROWS,))


def _texts(texts: int = TEXTS, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, VOCAB, (texts, tokens)), torch.randint(0, VOCAB, (texts, tokens))


MODELS = {
    "mlp": Model(lambda: tasks.mlp(*WIDTHS), _images, bound.mlp(WIDTHS, ROWS)),
    "gpt": Model(
        lambda: tasks.GPT(VOCAB, TOKENS, WIDTH, layers=LAYERS),
        _texts,
        bound.gpt(VOCAB, TOKENS, WIDTH, LAYERS, TEXTS),
        "blocks.*",
    ),
    "gpt-long": Model(
        lambda: tasks.GPT(**LONG),
        lambda: _texts(LONG_TEXTS, LONG["tokens"]),
        bound.gpt(**LONG, rows=LONG_TEXTS),
        "blocks.*",
        is_for_remat=True,
    ),
}
BASE = "raw loop"
_SPLIT, _SHARDED, _OLD = {"microbatches": PARTS}, {"processes": PROCESSES}, {"keeps_old": True}
VARIANTS = {
    BASE: Variant(),
    "raw loop, 4 microbatches": Variant(None, _SPLIT),
    "raw loop, checkpointed blocks": Variant(None, {"remat": True}),
    "torch fully_shard, 2 processes": Variant(None, _SHARDED),
    "Lumen: the plain step": Variant((), _OLD),
    "Lumen: donate": Variant(("donate",)),
    "Lumen: donate, accumulate(4)": Variant(("accumulate", "donate"), _SPLIT),
    "Lumen: donate, remat": Variant(("remat", "donate"), {"remat": True}),
    "Lumen: donate, remat, keep matmuls": Variant(("remat", "donate"), {}, {"save": "matmuls"}),
    "Lumen: donate, remat, keep attention": Variant(("remat", "donate"), {}, {"save": "attention"}),
    "Lumen: donate, remat, 124 MB": Variant(("remat", "donate"), {}, {"budget": "124MB"}),
    "Lumen: donate, fsdp, 2 processes": Variant(("fsdp", "donate"), _SHARDED),
    "Lumen: compile": Variant(("compile",), _OLD),
    "Lumen: compile, donate": Variant(("compile", "donate")),
}


def measure(options: Options) -> list[Row]:
    """Each model and variant, measured in both ways; `--quick` measures one way, the GPT, one process, uncompiled."""
    # Timed before the allocator returns freed blocks at once: its page faults took a third of a step's time.
    for name in peak.ENVIRONMENT:
        os.environ.pop(name, None)
    rows = [row for case, model in MODELS.items() if model.is_for_remat for row in _timed(case, options)]
    os.environ.update(peak.ENVIRONMENT)
    for method in options.pick(tuple(METHODS), ("allocated",)):
        for case, model in MODELS.items():
            if not options.wants(case) or (options.quick and case == "mlp"):
                continue
            base = None
            for label, variant in options.chosen(VARIANTS, BASE).items():
                if _left_out(model, variant, options.quick):
                    continue
                row = _row(case, label, method, options.threads, base)
                base = row.value if label == BASE else base
                rows.append(row)
    return rows


def _left_out(model: Model, variant: Variant, quick: bool) -> bool:
    transforms = variant.transforms or ()
    if model.is_for_remat:
        return not (variant.transforms == ("donate",) or "remat" in transforms or variant == VARIANTS[BASE])
    if variant.remat:
        return True
    long = "compile" in transforms or variant.processes > 1
    return (model.blocks is None and "remat" in variant.least) or (quick and long)


def _row(case: str, label: str, method: str, threads: int, base: float | None) -> Row:
    least = bound.least(MODELS[case].units, **VARIANTS[label].least) / 1e6
    try:
        if VARIANTS[label].processes > 1:
            found = apart(spread.world_of, PROCESSES, in_world, case, label, method)
        else:
            found = apart(alone, case, label, method, threads)
    except ApartError as error:
        return Row("memory", case, label, method, "MB", bound=least, note=str(error))
    value = found / 1e6
    return Row("memory", case, label, method, "MB", value, value / (base or value), bound=least)


def _timed(case: str, options: Options) -> list[Row]:
    """The time of a step of each variant, and its ratio to the raw loop's in the same round."""
    if not options.wants(case):
        return []
    labels = [label for label in options.chosen(VARIANTS, BASE) if not _left_out(MODELS[case], VARIANTS[label], False)]
    try:
        times = apart(rounds_of, case, labels, options.rounds or ROUNDS, options.threads)
    except ApartError as error:
        return [Row("memory", case, label, "step", "ms", note=str(error)) for label in labels]
    return rows_of_times("memory", case, times, BASE, unit="ms")


def rounds_of(case: str, labels: list[str], rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of a step, in interleaved rounds, in this process."""
    timing.prepare(threads)
    torch.manual_seed(0)
    batch = MODELS[case].batch()
    steps = {label: trainer(case, VARIANTS[label])() for label in labels}
    times: dict[str, list[float]] = {label: [] for label in labels}
    for number in range(-2, rounds):  # two to warm up: a budget is spent from the second step on
        for label, step in steps.items():
            start = time.perf_counter()
            step(batch)
            if number >= 0:
                times[label].append(time.perf_counter() - start)
    return times


def alone(case: str, label: str, method: str, threads: int) -> int:
    """The peak of one variant, in this process."""
    timing.prepare(threads)
    torch.manual_seed(0)
    return METHODS[method](trainer(case, VARIANTS[label]), MODELS[case].batch())


def in_world(case: str, label: str, method: str) -> int:
    """The same on several processes; each has its shard of the batch."""
    torch.manual_seed(0)
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parts = [each.tensor_split(size)[rank].clone() for each in MODELS[case].batch()]
    most = torch.tensor(METHODS[method](trainer(case, VARIANTS[label]), tuple(parts)))
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def trainer(case: str, variant: Variant) -> Start:
    """The training function of a variant."""
    if variant.transforms is None:
        return lambda: raw(MODELS[case], **variant.least)
    return _lumen(MODELS[case], variant.transforms, variant.remat)


def _lumen(model: Model, names: tuple[str, ...], remat: dict[str, Any]) -> Start:
    import lumen as lm
    from benchmarks.ours import step

    arguments = {"accumulate": (PARTS,), "remat": (model.blocks,)}
    options = {"remat": remat}
    stack = [getattr(lm, name)(*arguments.get(name, ()), **options.get(name, {})) for name in names]
    fast = lm.compose(*stack)(step)
    apply, tx = lm.pure(model.net().to("meta")).apply, lm.optim.adamw(1e-3)  # one function: compiled once

    def start() -> Callable[[Any], None]:
        params = {name: p.detach() for name, p in model.net().named_parameters()}
        state = fast.init(lm.TrainState.create(lm.Pure(apply, params, {}), tx))
        del params

        def move(batch: Any) -> None:
            nonlocal state
            state, _ = fast(state, batch)

        return move

    return start


def raw(model: Model, *, microbatches: int = 1, remat: bool = False, processes: int = 1) -> Callable[[Any], None]:
    """The reference: a handwritten loop in plain PyTorch."""
    net = model.net()
    if remat:
        _checkpointed(net)
    if processes > 1:
        for block in spread.blocks(net):
            spread.fully_shard(block)
        spread.fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

    def move(batch: Any) -> None:
        optimizer.zero_grad()
        for x, y in zip(*[each.chunk(microbatches) for each in batch], strict=True):
            (tasks.loss_of(net(x), y) / microbatches).backward()
        optimizer.step()

    return move


def _checkpointed(net: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    for block in spread.blocks(net):
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
