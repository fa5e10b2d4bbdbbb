"""What tensor_parallel holds, how it runs with the rest of the house, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lumen as lm
from lumen.core import distributed
from lumen.errors import (
    BatchError,
    HyperparameterError,
    OrderError,
    ParamsError,
    PatternError,
    WorldError,
)
from lumen.parallel import Colwise, Region, Rowwise, SequenceParallel
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.tensor import plans
from lumen.parallel.tensor.tensor_parallel import tensor_parallel
from tests.distributed import models, tensor_models
from tests.distributed.models import bare, batches, furthest, make_state, step, train
from tests.distributed.tensor_models import PLANS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


# --------------------------------------------------------------------------------------------------- at rest


def there_and_back(model):
    """The bytes of params here and in all, and the leaves that do not come back bitwise."""
    wrapped = lm.compose(tensor_parallel(PLANS[model, False], mesh(tensor=-1, device="cpu")), lm.ema(0.9))(step)
    plain = train(lm.ema(0.9)(step), make_state(model), batches(1, 8))[1]
    held = wrapped.transforms[0].init(plain)
    back = wrapped.transforms[0].export(held)
    moved = [name for name, leaf in bare(back).items() if not torch.equal(leaf, bare(plain)[name])]
    sizes = [lm.tree.nbytes(tree) for tree in (held.params, plain.params, held.opt_state, plain.opt_state)]
    averaged = lm.tree.nbytes(held.slots["ema"].params), lm.tree.nbytes(plain.slots["ema"].params)
    return moved, sizes, averaged


@pytest.mark.parametrize("model", ["tiny", "llama", "gpt2", "wide"])
def test_state_is_cut_at_rest_and_comes_back_bitwise(model, world2):
    for moved, (params, all_params, memory, all_memory), (averaged, all_averaged) in world2.run(there_and_back, model):
        assert not moved
        assert params < all_params
        assert memory < all_memory
        assert averaged / all_averaged == params / all_params


def test_each_process_holds_its_share_of_the_matrices(world4):
    (_, (here, in_all, memory, all_memory), _), *_ = world4.run(there_and_back, "llama")
    assert here < 0.32 * in_all  # a quarter, and norms and a small head that are whole
    assert memory < 0.32 * all_memory


def parts(around, axes, model):
    """For each leaf that is a piece: its place, this process's values, and where they lie in the whole."""
    grid = mesh(**axes, device="cpu")
    outer = {"alone": [], "ddp": [lm.ddp(grid)], "fsdp": [lm.fsdp(grid)], "fsdp1": [lm.fsdp(grid, stage=1)]}[around]
    wrapped = lm.compose(*outer, tensor_parallel(PLANS[model, False], grid))(step)
    plain = make_state(model)
    state = wrapped.init(plain)
    found = wrapped.shard_specs(state)
    leaves = lm.tree.leaves(state)
    owned = {place: (leaves[place], piece.boxes) for place, piece in found.items() if piece.owner}
    paths = lm.tree.paths(state)
    wholes = {place: dict(lm.tree.named_tensors(plain))[paths[place]] for place in found}
    return owned, wholes


@pytest.mark.parametrize(
    ("around", "axes"),
    [
        ("alone", {"tensor": 4}),
        ("ddp", {"data": 2, "tensor": 2}),
        ("fsdp", {"shard": 2, "tensor": 2}),
        ("fsdp1", {"shard": 2, "tensor": 2}),
    ],
)
def test_pieces_of_all_owners_make_up_each_whole_once(around, axes, world4):
    found = world4.run(parts, around, axes, "gpt2")
    wholes = found[0][1]
    assert len(wholes) > 40  # params and both moments
    for place, whole in wholes.items():
        written, times = torch.full_like(whole, math.nan), torch.zeros_like(whole)
        for owned, _ in found:
            leaf, boxes = owned.get(place, (None, ()))
            for here, there, size in boxes:
                target = tuple(slice(a, a + n) for a, n in zip(there, size, strict=True))
                written[target] = leaf[tuple(slice(a, a + n) for a, n in zip(here, size, strict=True))]
                times[target] += 1
        assert torch.equal(written, whole)
        assert bool((times == 1).all())


# --------------------------------------------------------------------------------------------------- gradients


def regular(state, batch):
    """A loss that reads cut params outside of their layers: a penalty, and an embedding used as an output layer."""

    def loss_fn(params, batch):
        logits, _ = state.apply(params, batch["x"])
        penalty = sum(p.square().sum() for p in params.values())
        shared = params["tokens.weight"] @ params["mix.weight"].T[: params["tokens.weight"].shape[1]]
        return F.cross_entropy(logits, batch["y"]) + 1e-2 * penalty + shared.logsumexp(-1).mean()

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def by_func(state, batch):
    """The same cross-entropy by torch.func."""

    def loss_fn(params, batch):
        return F.cross_entropy(state.apply(params, batch["x"])[0], batch["y"])

    loss, grads = lm.value_and_grad(loss_fn, engine="func")(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def second_order(state, batch):
    """A loss of params after a step of their own, with gradients of gradients: MAML."""

    def inner(params, batch):
        return F.cross_entropy(state.apply(params, batch["x"])[0], batch["y"])

    def loss_fn(params, batch):
        _, grads = lm.value_and_grad(inner)(params, batch)
        return inner({name: p - 0.1 * grads[name] for name, p in params.items()}, batch)

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def penalized(state, batch):
    """A loss with a gradient penalty: autograd's own double backward through every layer."""

    def loss_fn(params, batch):
        x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        out, _ = state.apply(params, x)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return out.mean() + grad.square().sum()

    loss, grads = lm.value_and_grad(loss_fn, engine="autograd")(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


class Blocks(nn.Module):
    """Blocks on floating inputs, whose gradient can be asked for."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([tensor_models.Block(8, 4) for _ in range(2)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


models.register(blocks=Blocks)
BLOCKS = {sequence: plans.gpt(sequence=sequence) for sequence in (False, True)}


def gradients(names):
    """How far each kind of step is from one process."""
    found = []
    steps = {"regular": regular, "func": by_func, "second": second_order, "penalized": penalized}
    for name, model, sequence in names:
        plan = BLOCKS[sequence] if model == "blocks" else PLANS[model, sequence]
        wrapped = tensor_parallel(plan, mesh(tensor=-1, device="cpu"))(steps[name])
        losses, state = train(wrapped, make_state(model), batches(5, 6))
        wanted, other = train(lm.compose()(steps[name]), make_state(model), batches(5, 6))
        found.append((float((losses - wanted).abs().max()), *furthest(bare(wrapped.export(state)), bare(other))))
    return found


KINDS = [("regular", "tiny", False), ("regular", "tiny", True), ("func", "tiny", False), ("func", "tiny", True)]
KINDS += [("second", "tiny", False), ("second", "tiny", True), ("penalized", "blocks", False)]
KINDS += [("penalized", "blocks", True)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_of_all_kinds(kind, world2):
    for ((losses, worst, leaf),) in world2.run(gradients, [kind]):
        assert losses < 1e-10
        assert worst < 1e-10, leaf


# --------------------------------------------------------------------------------------------------- with the others


def in_16_bits(names):
    """Losses, the loss scale and the number of updates under a narrow dtype, and the losses of one process."""
    wrapped = lm.compose(
        tensor_parallel(PLANS["tiny", True], mesh(tensor=-1, device="cpu")), lm.precision(names), lm.remat("blocks.*")
    )(step)
    tx = lm.optim.sgd(0.1)
    losses, state = train(wrapped, make_state("tiny", torch.float32, tx), batches(12, 8, torch.float32))
    wanted, _ = train(lm.precision(names)(step), make_state("tiny", torch.float32, tx), batches(12, 8, torch.float32))
    scale = float(state.slots["precision"].scale) if names == "fp16" else 0.0
    return losses.tolist(), scale, float((losses - wanted).abs().max())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_narrow_dtypes_and_recomputation(name, world2):
    first, second = world2.run(in_16_bits, name)
    assert first == second
    losses, scale, distance = first
    assert distance < 2e-2
    assert name == "bf16" or scale >= 2.0**10


class Dropping(nn.Module):
    """Dropout where activations are whole, and where they are cut."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        h = self.down(self.drop(torch.tanh(self.up(x))))
        return self.out(self.drop(x + h))


models.register(dropping=Dropping)


def drawing(seeded):
    """The losses and whole params of a model with dropout, on processes that were seeded differently."""
    torch.manual_seed(100 + distributed.rank())
    plan = {"up": Colwise(), "down": Rowwise()}
    around = [lm.seeded()] if seeded else []
    wrapped = lm.compose(*around, tensor_parallel(plan, mesh(tensor=-1, device="cpu")))(step)
    before = make_state("dropping")
    torch.manual_seed(100 + distributed.rank())  # models are made from one seed
    losses, state = train(wrapped, before, batches(10, 8))
    return losses.tolist(), {name: state.params[name].clone() for name in ("out.weight", "out.bias", "down.bias")}


@pytest.mark.parametrize("seeded", [False, True])
def test_processes_of_one_axis_draw_alike(seeded, world2):
    (losses, params), (others, theirs) = world2.run(drawing, seeded)
    assert losses == others
    assert all(torch.equal(params[name], theirs[name]) for name in params)


def eval_step(state, batch):
    logits, _ = state.apply(state.params, batch["x"])
    losses = F.cross_entropy(logits, batch["y"], reduction="none")
    return {"loss": lm.Mean.of(losses), "rows": lm.Sum.of(torch.ones_like(batch["y"]))}


def predict_step(state, batch):
    return state.apply(state.params, batch["x"])[0]


def counted(state, batch):
    new, metrics = step(state, batch)
    return new, {**metrics, "rows": lm.Sum.of(torch.ones_like(batch["y"]))}


class Numbers:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.rows = []

    def log(self, step, values):
        self.rows.append((step, {k: v for k, v in values.items() if "/loss" in k or "/rows" in k}))

    def close(self):
        pass


def whole_job(axes, around):
    """Everything that a Runner makes of a data set: numbers, params, predictions; and the rows that were handed out."""
    torch.manual_seed(0)
    if axes:
        grid = mesh(**axes, device="cpu")
        outer = {"alone": [], "ddp": [lm.ddp(grid)], "fsdp": [lm.fsdp(grid)]}[around]
        parallel = [*outer, tensor_parallel(PLANS["tiny", True], grid)]
    else:
        parallel = []
    data = batches(1, 37)[0]
    seen = []

    def watched(state, batch):
        seen.append(batch["x"][:, 0].tolist())
        return counted(state, batch)

    sink = Numbers()
    runner = lm.Runner(watched, transforms=[*parallel, lm.clip(0.5)], sinks=[sink], log_every=2, progress=False)
    loader = lm.Loader(data, batch_size=8, seed=3)
    held_out = lm.Loader(batches(1, 13)[0], batch_size=4, shuffle=False)
    validate = lm.Validate(eval_step, held_out, every=lm.Every(steps=4))
    result = runner.fit(make_state("tiny"), loader, until=lm.Steps(8), validate=validate)
    evaluated = runner.evaluate(eval_step, result.state, lm.Loader(data, batch_size=8, shuffle=False))
    predicted = runner.predict(predict_step, result.state, held_out)
    return sink.rows, evaluated, predicted, {k: v.clone() for k, v in result.export().params.items()}, seen


@pytest.mark.parametrize(("axes", "around"), [({"data": 2, "tensor": 2}, "ddp"), ({"shard": 2, "tensor": 2}, "fsdp")])
def test_a_run_counts_each_row_once_and_makes_the_numbers_of_one_process(axes, around, world4):
    rows, evaluated, predicted, params, seen = whole_job(None, "alone")
    found = world4.run(whole_job, axes, around)
    for rank, (told, also, _, held, handed) in enumerate(found):
        assert bool(told) == (rank == 0)
        assert furthest(held, params)[0] < 1e-10
        assert also == {name: pytest.approx(value, rel=1e-10) for name, value in evaluated.items()}
        assert handed == found[rank // 2 * 2][4]
    for (at, mine), (step_at, values) in zip(found[0][0], rows, strict=True):
        assert at == step_at
        assert mine == {name: pytest.approx(value, rel=1e-10) for name, value in values.items()}
    assert [sorted(a + b) for a, b in zip(found[0][4], found[2][4], strict=True)] == [sorted(each) for each in seen]
    assert torch.equal(found[0][2], found[1][2])
    assert len(found[0][2]) + len(found[2][2]) == len(predicted) == 13


# --------------------------------------------------------------------------------------------------- bad input


def odd_rows():
    return {**batches(1, 4)[0], "x": torch.ones(4, 6, dtype=torch.float64) * distributed.rank()}


def cut(plan, tx=None, model="tiny", batch=None, outer=(), inner=(), dim=None):
    """One step under a plan, on all processes along tensor."""
    grid = mesh(tensor=-1, device="cpu") if dim is None else mesh(**dim, device="cpu")
    wrapped = lm.compose(*outer, tensor_parallel(plan, grid), *inner)(step)
    state = wrapped.init(make_state(model, tx=tx))
    wrapped(state, batches(1, 4)[0] if batch is None else batch)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd, self.out, self.norm = nn.Linear(6, 7), nn.Linear(7, 3), nn.LayerNorm(6)
        self.inner = nn.Sequential(nn.Linear(6, 6))
        self.inner.heads, self.inner.size = 3, 2

    def forward(self, x):
        return self.out(self.odd(self.norm(x)))


class Rank(nn.Module):
    """Another number of features on each process."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 4 + 2 * distributed.rank())

    def forward(self, x):
        return self.up(x)


models.register(odd=Odd, rank=Rank)

GPT = PLANS["tiny", False]
UNIT = {"inner": Region(unit="size"), "inner.0": Colwise()}
BAD = {
    "pattern": (PatternError, "'*.attention' of the plan matches no module", lambda: cut({"*.attention": Region()})),
    "twice": (PatternError, "matched by 'blocks.*' and by", lambda: cut({"blocks.*": Region(), "*.qkv": Colwise()})),
    "tied": (PatternError, "Tied weights have one", lambda: cut({"tokens": Rowwise()})),
    "tied otherwise": (PatternError, "dim 1", lambda: cut({"tokens": Colwise(output="replicate"), "head": Colwise()})),
    "size": (ParamsError, "odd.weight of shape (7, 6)", lambda: cut({"odd": Colwise()}, model="odd")),
    "attribute": (ParamsError, "inner.heads is 3", lambda: cut({"inner": Region("heads")}, model="odd")),
    "unit": (ParamsError, "3 blocks of size=2", lambda: cut(UNIT, model="odd")),
    "kind": (ParamsError, "is a LayerNorm", lambda: cut({"norm": Colwise()}, model="odd")),
    "optimizer": (
        HyperparameterError,
        "adafactor averages over the rows and columns",
        lambda: cut(GPT, lm.optim.adafactor(0.1)),
    ),
    "rows": (BatchError, "different rows", lambda: cut(GPT, batch=odd_rows())),
    "sequence": (
        ParamsError,
        "a tensor of shape (4, 5, 8) cannot be sharded along its dim 1 over 2 ranks",
        lambda: cut(PLANS["tiny", True], batch={**batches(1, 4)[0], "x": torch.ones(4, 5, dtype=torch.float64)}),
    ),
    "states": (WorldError, "differ", lambda: cut({"up": Colwise(output="replicate")}, model="rank")),
    "compile": (OrderError, "cannot trace lm.tensor_parallel", lambda: cut(GPT, outer=[lm.compile()])),
    "auto": (OrderError, "retry on the rank", lambda: cut(GPT, inner=[lm.accumulate("auto")])),
    "dp_sgd": (OrderError, "each example's gradient", lambda: cut(GPT, inner=[lm.dp_sgd(clip=1.0, noise=1.0)])),
    "nobody": (OrderError, "nothing reduces their gradients", lambda: cut(GPT, dim={"data": 2})),
    "meshes": (WorldError, "share one mesh", lambda: cut(GPT, outer=[lm.ddp(mesh(data=2, device="cpu"))])),
}


def refused(name):
    try:
        BAD[name][2]()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_is_refused_everywhere(name, world2):
    kind, text, _ = BAD[name]
    for found, message in world2.run(refused, name):
        assert found == kind.__name__, message
        assert text in message


def test_order_is_checked():
    plan = {"0": Colwise()}
    with pytest.raises(OrderError, match=r"tensor_parallel is outside ddp, but it must be inside"):
        tensor_parallel(plan)(lm.ddp()(step))
    with pytest.raises(OrderError, match="both reduce the gradients of all rows"):
        lm.ddp()(lm.fsdp()(step))
    with pytest.raises(OrderError, match="accumulate is outside tensor_parallel"):
        lm.accumulate(2)(tensor_parallel(plan)(step))


def test_plans_and_styles_are_checked_as_they_are_made():
    for plan in ({}, {"0": "colwise"}, [Colwise()]):
        with pytest.raises(HyperparameterError, match="takes a plan, a dict of styles"):
            tensor_parallel(plan)
    for make in (
        lambda: Colwise(groups=0),
        lambda: Colwise(input="shard"),
        lambda: Rowwise(output="shard"),
        lambda: SequenceParallel(output="shard"),
        lambda: Region(input="shard"),
    ):
        with pytest.raises(HyperparameterError):
            make()


def test_alone_it_is_the_step():
    wrapped = tensor_parallel(GPT)(step)
    losses, state = train(wrapped, make_state("tiny"), batches(3, 4))
    wanted, other = train(lm.compose()(step), make_state("tiny"), batches(3, 4))
    assert torch.equal(losses, wanted)
    assert furthest(bare(wrapped.export(state)), bare(other))[0] == 0.0
    with pytest.raises(PatternError, match="matches no module"):
        tensor_parallel({"other": Colwise()})(step).init(make_state("tiny"))
