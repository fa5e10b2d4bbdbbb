"""Buffers over processes: by their rules they are those of one process on all rows; without one they may not change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lumen as lm
from lumen.core import distributed
from lumen.errors import LossError, MergeError, OrderError, WorldError
from lumen.parallel import Colwise, Rowwise
from tests.laws.test_buffers import ROWS, RULES, Rebinding, Seen, loop, made, step

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


class Kept(nn.Linear):
    """The rows of the last batch, a NaN where one was seen, and a frozen weight."""

    def __init__(self):
        super().__init__(2, 1, dtype=torch.float64)
        self.bias.requires_grad_(False)
        self.register_buffer("last", torch.zeros(7, 2, dtype=torch.float64))
        self.register_buffer("most", torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        self.last = x.detach()
        self.most = torch.where(x.detach().amin(0) < -3, torch.nan, x.detach().amax(0))
        return super().forward(x)


class Hidden(Rebinding):
    """A change that no version counter tells."""

    def forward(self, x):
        self.count.data.add_(1.0)
        return nn.Linear.forward(self, x + self.fixed)


class OwnNorm(Rebinding):
    """Statistics that torch moves past version counters."""

    def forward(self, x):
        return nn.Linear.forward(self, nn.functional.batch_norm(x, self.count, self.fixed, training=True))


class Between(nn.Module):
    """A buffer of features that lie on one process each."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(2, 4, dtype=torch.float64), nn.Linear(4, 1, dtype=torch.float64)
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        h = self.up(x)
        self.total = self.total + h.detach().sum()
        return self.down(h)


class Ranked(Rebinding):
    """A buffer that is not equal everywhere."""

    def forward(self, x):
        self.count += distributed.rank()
        return nn.Linear.forward(self, x)


def part(sizes):
    return ROWS.split(sizes)[distributed.rank()]


def merged(sizes, k):
    """The buffers of a step, by hand: each process goes through its microbatches, and the ends are merged."""
    start = made(RULES).buffers
    ends = [loop(made(RULES), rows.tensor_split(min(k, len(rows)))).buffers for rows in ROWS.split(sizes) if len(rows)]
    rows = [size for size in sizes if size]
    return {
        "rows": start["rows"] + sum(end["rows"] - start["rows"] for end in ends),
        "total": start["total"] + sum(end["total"] - start["total"] for end in ends),
        "means": sum(end["means"] * n for end, n in zip(ends, rows, strict=True)) / len(ROWS),
        "high": torch.stack([end["high"] for end in ends]).amax(0),
        "low": torch.stack([end["low"] for end in ends]).amin(0),
        "any": torch.stack([end["any"] for end in ends]).any(0),
        "calls": ends[0]["calls"],
        "table": ends[0]["table"],
    }


def furthest(found, wanted):
    return max(float((found[name].double() - wanted[name].double()).abs().max()) for name in wanted)


def laws():
    """How far buffers and params are from those of one process, and what is refused."""
    found = {}
    whole, _ = step(made(RULES), ROWS)
    for sizes in ([4, 3], [0, 7]):
        for transform in (lm.ddp(), lm.fsdp(), lm.fsdp(stage=2)):
            wrapped = lm.compose(transform, lm.donate())(step)
            state, _ = wrapped(wrapped.init(made(RULES)), part(sizes))
            new = wrapped.export(state)
            wanted = {name: whole.buffers[name] for name in RULES}
            found[f"{transform} {sizes}"] = max(furthest(new.buffers, wanted), furthest(new.params, whole.params))
            found[f"{transform} {sizes} fixed"] = float(not torch.equal(new.buffers["fixed"][:1], torch.ones(1)))
            both = lm.compose(transform, lm.accumulate(2))(step)
            new, _ = both(both.init(made(RULES)), part(sizes))
            found[f"{transform} {sizes} accumulate"] = furthest(new.buffers, merged(sizes, 2))
        wrapped = lm.ddp(reduce_dtype="bf16")(step)
        kept, _ = wrapped(wrapped.init(made({"last": "gather", "most": "max"}, Kept)), part(sizes))
        bias = made(net=Kept).buffers["bias"]
        found[f"gather {sizes}"] = furthest(kept.buffers, {"last": ROWS, "bias": bias})
        found[f"nan {sizes}"] = float(kept.buffers["most"].isnan().tolist() != [True, False])
    local = lm.ddp(buffers="local")(step)
    own, _ = local(local.init(made(net=Rebinding)), part([4, 3]))
    found["local"] = furthest(own.buffers, {"count": part([4, 3]).sum(0)})
    return found


def test_parts_are_the_whole(world2):
    for found in world2.run(laws):
        assert max(found.values()) < 1e-12, found


def compiled_laws():
    """The same of a compiled step, with and without microbatches, and the error of a rule that cannot be traced."""
    found = {}
    whole, _ = step(made(RULES), ROWS)
    for sizes in ([4, 3], [0, 7]):
        for inside, wanted in (([], {n: whole.buffers[n] for n in RULES}), ([lm.accumulate(2)], merged(sizes, 2))):
            wrapped = lm.compose(lm.compile(backend="eager"), lm.ddp(), *inside)(step)
            new, _ = wrapped(wrapped.init(made(RULES)), part(sizes))
            found[f"{inside} {sizes}"] = furthest(new.buffers, wanted)
    wrapped = lm.compose(lm.compile(backend="eager"), lm.ddp())(step)
    with pytest.raises(OrderError, match="rule 'gather' of the buffer 'last'"):
        wrapped(wrapped.init(made({"last": "gather", "most": "max"}, Kept)), part([4, 3]))
    return found


def test_compiled_parts_are_the_whole(world2):
    for found in world2.run(compiled_laws):
        assert max(found.values()) < 1e-12, found


def refusals():
    """The errors of buffers without a rule, also the second of two steps, and of one that comes out different."""
    told = []
    cases = [(Rebinding, None, lm.ddp()), (Hidden, None, lm.fsdp()), (Ranked, {"count": "sync"}, lm.ddp())]
    cases.append((Hidden, None, lm.compose(lm.compile(backend="eager"), lm.ddp())))
    for net, merge, transform in cases:
        wrapped = transform(step)
        with pytest.raises((MergeError, WorldError)) as caught:
            wrapped(wrapped.init(made(merge, net)), part([4, 3]))
        told.append(str(caught.value))
    wrapped = lm.ddp()(step)
    state = wrapped.init(made(net=Late))
    for _ in range(2):
        state, _ = wrapped(state, part([4, 3]))
    with pytest.raises(MergeError, match="'late'"):
        wrapped(state, part([4, 3]))
    wrapped = lm.compose(lm.compile(backend="eager"), lm.ddp())(step)
    with pytest.raises(MergeError, match=r"'count'.*'fixed'"):
        wrapped(wrapped.init(made(net=OwnNorm)), part([4, 3]))
    wrapped = lm.tensor_parallel({"up": Colwise(), "down": Rowwise()})(step)
    with pytest.raises(WorldError, match="different buffers: total"):
        wrapped(wrapped.init(made(net=Between)), ROWS)
    return told


def shapes_that_differ():
    """What each elementwise rule says of a buffer with as many rows as its rank's batch."""
    texts = []
    for rule in ("first", "max", "min", "mean", "sum"):
        wrapped = lm.ddp()(step)
        with pytest.raises(LossError) as caught:
            wrapped(wrapped.init(made({"last": rule, "most": "max"}, Kept)), part([4, 3]))
        texts.append(str(caught.value))
    return texts


def test_a_buffer_whose_shape_depends_on_the_rank_is_refused_by_name(world2):
    for texts in world2.run(shapes_that_differ):
        for rule, text in zip(("first", "max", "min", "mean", "sum"), texts, strict=True):
            assert text.startswith(f"the rule of the buffer 'last' is {rule!r}, but its shape went from (7, 2) to ")
            assert "'gather'" in text


class Late(Seen):
    """A buffer that first changes in the third step."""

    def __init__(self):
        super().__init__()
        for name in RULES:
            delattr(self, name)
        self.register_buffer("step", torch.zeros(1, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)
        self.register_buffer("late", torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        self.late += self.norm.num_batches_tracked >= 2
        return self.layer(self.norm(x))


def test_a_buffer_without_a_rule_may_not_change(world2):
    first, second = world2.run(refusals)
    assert first == second
    for text in first[:2] + first[3:]:
        assert "lm.pure(net, merge={'count': 'mean'})" in text
    assert "'fixed'" not in "".join(first)
    assert first[2].startswith("the rule of 'count' is 'sync'")
