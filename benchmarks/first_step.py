"""One step in this process, `python -m benchmarks.first_step KIND [LAYERS]`: what start.py times.

The model is the small MLP of tasks.py, or the GPT with LAYERS layers.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.tasks import GPT, LEARNING_RATE, WEIGHT_DECAY, loss_of, mlp


def main(kind: str, layers: int = 0) -> None:
    """One step of a raw loop, or of Lumen under the transforms that `kind` names."""
    torch.manual_seed(0)
    net = GPT(layers=layers) if layers else mlp(784, 128, 128, 10)
    text = torch.randint(0, 128, (8, 65))
    x, y = (text[:, :-1], text[:, 1:]) if layers else (torch.randn(32, 784), torch.randint(0, 10, (32,)))
    if kind.startswith("raw"):
        model = torch.compile(net) if kind == "raw-compile" else net
        optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        loss_of(model(x), y).backward()
        optimizer.step()
        return
    import lumen as lm

    def step(state, batch):
        def loss_fn(params, batch):
            return loss_of(state.apply(params, batch[0])[0], batch[1])

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    named = {"donate": lm.donate, "compile": lm.compile, "blocks": lambda: lm.compile(blocks="blocks.*")}
    fast = lm.compose(*[named[name]() for name in kind.split("-")])(step)
    fast(fast.init(lm.TrainState.create(net, lm.optim.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY))), (x, y))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
