"""Tiny models and steps on which parallel laws are tested."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import lumen as lm

WIDTH, CLASSES = 6, 3


def mlp():
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class ConvNet(nn.Module):
    """A convolution and a BatchNorm; `bias=False` as that bias has no gradient in exact arithmetic."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x.unsqueeze(1)))).mean(-1))


class GPT(nn.Module):
    """One block of attention over the columns of x, with embedding and head tied."""

    def __init__(self, vocab=11, width=8):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # a key's bias has no gradient in exact arithmetic
        self.mix = nn.Linear(width, CLASSES)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed((x.abs() * 5).long().clamp(max=10))
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.mix(h).mean(1) + self.head(h).mean((1, 2)).unsqueeze(-1) * torch.arange(1.0, 4, dtype=h.dtype)


class FullParamView(nn.Module):
    """A param that the loss uses without the module, and a layer that nothing uses."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(WIDTH, CLASSES)
        self.scale = nn.Parameter(torch.ones(CLASSES))
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


class Routed(nn.Module):
    """Rows with a positive first column go by one layer, the others by another: parts use different params."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        chosen = x[:, 0] > 0
        out = x.new_zeros(len(x), CLASSES)
        if chosen.any():
            out = out.index_put((chosen.nonzero()[:, 0],), self.one(x[chosen]))
        if not chosen.all():
            out = out.index_put(((~chosen).nonzero()[:, 0],), self.other(x[~chosen]))
        return out


MODELS = {"mlp": mlp, "conv": ConvNet, "gpt": GPT, "outside": FullParamView, "routed": Routed}


def register(**kinds):
    """Make more models known by name, in this process and those that import the module which calls this."""
    assert not (taken := kinds.keys() & MODELS.keys()), taken
    MODELS.update(kinds)


def make_state(name, dtype=torch.float64, tx=None):
    torch.manual_seed(0)
    return lm.TrainState.create(MODELS[name]().to(dtype), tx or lm.optim.adam(1e-2, eps=1e-4))


def step(state, batch):
    """One step that every model shares: cross-entropy with a mask, and two metrics."""

    def loss_fn(params, batch):
        logits, buffers = state.apply(params, batch["x"])
        if "scale" in params:
            logits = logits * params["scale"]
        losses = F.cross_entropy(logits, batch["y"], reduction="none")
        hits = lm.Mean.of(logits.argmax(-1) == batch["y"])
        return lm.Mean.of(losses, batch["mask"]), lm.Aux(buffers=buffers, metrics={"hits": hits})

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss, **aux.metrics}


def plain_step(state, batch):
    """The same with a plain scalar loss, whose weight is its rows."""

    def loss_fn(params, batch):
        return F.cross_entropy(state.apply(params, batch["x"])[0], batch["y"])

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def batches(count, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        x = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        x[: size // 2, 0] = x[: size // 2, 0].abs()  # the first part takes one route
        x[size // 2 :, 0] = -x[size // 2 :, 0].abs()
        mask = torch.rand(size, generator=generator) > 0.25
        mask[0] = True
        made.append({"x": x, "y": torch.randint(0, CLASSES, (size,), generator=generator), "mask": mask})
    return made


def part(batch, sizes, rank):
    """The rows of one process where each has as many as `sizes` says."""
    return {name: leaf.split(sizes)[rank] for name, leaf in batch.items()}


def transforms(names):
    """Transforms by short names, outermost first, so that functions of a pool can be told which."""
    made = {
        "accumulate": lambda: lm.accumulate(3),
        "bf16": lambda: lm.precision("bf16"),
        "fp16": lambda: lm.precision("fp16"),
        "clip": lambda: lm.clip(0.05),
        "ema": lambda: lm.ema(0.9),
        "guard": lambda: lm.guard(),
        "spike": lambda: lm.guard(spike=6.0, window=20),
        "donate": lambda: lm.donate(),
        "remat": lambda: lm.remat(),
        "remat save": lambda: lm.remat(save="matmuls"),
        "remat budget": lambda: lm.remat(budget="96KiB"),
    }
    return [made[name]() for name in names]


def train(wrapped, state, data):
    """Losses and the final state."""
    losses = []
    state = wrapped.init(state)
    for batch in data:
        state, metrics = wrapped(state, batch)
        loss = metrics["loss"]
        losses.append(loss.compute() if isinstance(loss, lm.Mean) else loss)
    return torch.stack(losses), state


def bare(state):
    """Leaves to compare, by name."""
    return {path: leaf.clone() for path, leaf in lm.tree.named_tensors(state) if path != "seed"}


def assert_within(tolerance, cases, answers):
    """What each process found of the cases of a law: how far the losses are, and the furthest leaf with its name."""
    for found in answers:
        for case, (losses, worst, leaf) in zip(cases, found, strict=True):
            assert losses < tolerance, case
            assert worst < tolerance, (case, leaf)


def furthest(found, wanted):
    """The largest difference relative to the largest entry of each leaf, with its name."""
    assert found.keys() == wanted.keys()
    worst = (0.0, "")
    for name, want in wanted.items():
        have = found[name]
        if want.dtype.is_floating_point and want.numel():
            scale = want.abs().max().clamp(min=1e-3)
            worst = max(worst, (float((have - want).abs().max() / scale), name))
        else:
            assert torch.equal(have, want), name
    return worst


AROUND = [[], ["accumulate"], ["clip"], ["ema"], ["guard"], ["donate"], ["guard", "clip", "ema", "donate"]]


def check_law(law, world, cases, *settings, tolerance=1e-10):
    """Each case of `law`, on every process: losses and leaves are those of the one process that it compares with."""
    cases = [(*case, "step")[:4] for case in cases]
    assert_within(tolerance, cases, world.run(law, cases, *settings))
