"""The update of AdamW with low-bit state: time and bytes, beside torch's fused kernel and torchao's AdamW8bit.

The params are the matrices and biases of one transformer block, the gradients are the same in every step. The reference
is `torch.optim.AdamW(fused=True)` on float32. torchao compiles its update on first use, before the clock; Lumen's is
measured in eager mode and compiled. Bytes are those of the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import lumen as lm
from benchmarks import timing
from benchmarks.options import Options
from benchmarks.rows import Row, timed

LR = 1e-4
BASE = "torch AdamW(fused)"
Update = Callable[[], Any]  # one update; returns the optimizer's state
Tensors = dict[str, torch.Tensor]


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """The params of one block."""
    return {
        "qkv.weight": (3 * width, width),
        "out.weight": (width, width),
        "up.weight": (4 * width, width),
        "up.bias": (4 * width,),
        "down.weight": (width, 4 * width),
        "down.bias": (width,),
    }


def tensors(width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Params or gradients."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes(width).items()}


def theirs(width: int, make: Callable[[list[torch.nn.Parameter]], Any]) -> Update:
    """An optimizer of torch's form."""
    params = [torch.nn.Parameter(p) for p in tensors(width, 0).values()]
    for p, g in zip(params, tensors(width, 1).values(), strict=True):
        p.grad = g
    optimizer = make(params)

    def update() -> Any:
        optimizer.step()
        return [value for state in optimizer.state.values() for value in state.values()]

    return update


def torchao(width: int) -> Update:
    """torchao's, which quantizes blocks of 256 entries of each flattened leaf."""
    from torchao.optim import AdamW8bit

    return theirs(width, lambda params: AdamW8bit(params, lr=LR, weight_decay=1e-2))


def lumen(width: int, *transforms: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Update:
    """A step that is nothing but the update."""
    tx = lm.optim.adamw(LR, **options)
    params, grads = tensors(width, 0, dtype), tensors(width, 1, dtype)

    def step(state: Any, grads: Tensors) -> tuple[Any, dict[str, Any]]:
        params, opt_state = lm.apply_gradients(tx, grads, state["opt"], state["params"])
        return {"params": params, "opt": opt_state}, {}

    donated = lm.compose(*transforms, lm.donate())(step)
    state = donated.init({"params": params, "opt": tx.init(params)})

    def update() -> Any:
        nonlocal state
        state, _ = donated(state, grads)
        return state["opt"]

    return update


VARIANTS: dict[str, Callable[[int], Update]] = {
    BASE: lambda width: theirs(width, lambda params: torch.optim.AdamW(params, lr=LR, fused=True)),
    "torchao AdamW8bit": torchao,
    "Lumen: float32": lumen,
    "Lumen: bf16": lambda width: lumen(width, state_dtype="bf16"),
    "Lumen: int8": lambda width: lumen(width, state_dtype="int8"),
    "Lumen: compile, int8": lambda width: lumen(width, lm.compile(), state_dtype="int8"),
    "Lumen: int8, bf16 params, stochastic": lambda width: lumen(
        width, dtype=torch.bfloat16, state_dtype="int8", stochastic_rounding=True
    ),
}


def measure(options: Options) -> list[Row]:
    """One width; `--quick` measures a narrow block, and leaves out what is compiled."""
    width = options.pick(768, 64)
    count = sum(p.numel() for p in tensors(width, 0).values())
    case = f"{count / 1e6:.1f}M params"
    if not options.wants(case):
        return []
    every = {label: make for label, make in VARIANTS.items() if not (options.quick and _is_compiled(label))}
    updates: dict[str, Update] = {}
    missing: list[Row] = []
    for label, make in options.chosen(every, BASE).items():
        try:
            updates[label] = make(width)
        except ImportError as error:
            missing.append(Row("low_bit", case, label, "update", "ms", note=str(error)))
    states = {label: [update() for _ in range(3)][-1] for label, update in updates.items()}
    sizes = {label: [float(nbytes(state))] for label, state in states.items()}
    measures = {label: lambda update=update: timing.seconds(update) for label, update in updates.items()}
    times = timing.take_turns(measures, options.times(15))
    rows = timed("low_bit", case, times, BASE, unit="ms", metric="update")
    for label, (size,) in sizes.items():
        ratio = size / sizes[BASE][0]
        rows.append(Row("low_bit", case, label, "state", "MB", value=size / 1e6, ratio=ratio, low=ratio, high=ratio))
    return rows + missing


def _is_compiled(label: str) -> bool:
    return "compile" in label or "torchao" in label


def nbytes(state: Any) -> int:
    """The bytes of all tensors of a state; of torchao's, those that it consists of."""
    total = 0
    for leaf in lm.tree.leaves(state):
        if isinstance(leaf, torch.Tensor):
            inner = [getattr(leaf, name) for name in getattr(leaf, "tensor_attrs", ())]
            total += sum(x.nbytes for x in inner) if inner else leaf.nbytes
    return total
