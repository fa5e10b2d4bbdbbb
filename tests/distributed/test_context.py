"""context_parallel: processes that have shards of the same sequences are one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lumen as lm
from lumen.core import distributed as world
from lumen.errors import LumenError
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.context.all_to_all import all_to_all
from lumen.parallel.tensor.autograd_collectives import TPGroup
from tests.distributed.context_models import (
    Mixing,
    batches,
    document_step,
    losses_of,
    positions_within,
    state_of,
    step,
    train,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

AROUND = {
    "alone": lambda grid: [],
    "ddp": lambda grid: [lm.ddp(grid)],
    "fsdp1": lambda grid: [lm.fsdp(grid, stage=1)],
    "fsdp2": lambda grid: [lm.fsdp(grid, stage=2)],
    "fsdp3": lambda grid: [lm.fsdp(grid)],
}
ALL = ["clip", "donate", "accumulate", "remat"]
OUTSIDE = {"clip": lambda: lm.clip(0.1), "donate": lm.donate}
INSIDE = {"accumulate": lambda: lm.accumulate(2), "remat": lambda: lm.remat("blocks.*")}


def far(ours, theirs):
    """How far metrics and params are from those of one process."""
    (numbers, state), (wanted, other) = ours, theirs
    leaves = zip(lm.tree.tensors(state), lm.tree.tensors(other), strict=True)
    params = max(float((a - b).abs().max()) for a, b in leaves)
    return params, max(abs(a[k] - b[k]) for a, b in zip(numbers, wanted, strict=True) for k in b if k in a)


def stack(grid, around, names, **options):
    outer = [OUTSIDE[name]() for name in names if name in OUTSIDE]
    inner = [INSIDE[name]() for name in names if name in INSIDE]
    return lm.compose(*outer, *AROUND[around](grid), lm.context_parallel(grid, **options), *inner)


def law(cases, axes=None, **options):
    """For each case how far the step on shards is from the same transforms in one process."""
    grid = mesh(**(axes or {"context": -1}), device="cpu")
    found = []
    for settings, around, names, rows in cases:
        full = batches(3, rows)
        for batch in full:
            batch.pop("documents")
        index, count = world.rows()
        own = [{name: x.tensor_split(count)[index] for name, x in batch.items()} for batch in full]
        plain = lm.compose(*[(OUTSIDE | INSIDE)[name]() for name in names])(step)
        ours = train(stack(grid, around, names, **options)(step), state_of(**settings), own)
        if count > 1:  # other metrics than the loss are of these rows alone
            ours = [{"loss": numbers["loss"]} for numbers in ours[0]], ours[1]
        found.append(far(ours, train(plain, state_of(**settings), full)))
    return found


def check(found, tolerance=1e-9):
    for by_case in found:
        assert max(map(max, by_case)) < tolerance, by_case


def test_two_processes_compute_as_one(world2):
    models = [
        {},
        {"positions": "slice"},
        {"positions": "narrow"},
        {"kv_heads": 2},
        {"kv_heads": 1},
        {"heads": 1, "kv_heads": 1},
        {"heads": 1, "kv_heads": 1, "causal": False},
        {"causal": False},
        {"dropout": 0.5},
    ]
    check(world2.run(law, [(settings, "alone", [], 3) for settings in models]))


def test_two_processes_compute_as_one_with_other_transforms(world2):
    check(world2.run(law, [({}, "alone", ALL, 3), ({}, "ddp", ALL, 3), ({"dropout": 0.5}, "ddp", ["remat"], 2)]))
    check(world2.run(law, [({"heads": 1, "kv_heads": 1}, "alone", ALL, 3), ({"kv_heads": 1}, "ddp", ALL, 3)]))


@pytest.mark.parametrize(
    ("axis", "around"), [("data", "ddp"), ("shard", "fsdp1"), ("shard", "fsdp2"), ("shard", "fsdp3")]
)
def test_rows_and_sequences_are_sharded_at_once(axis, around, world4):
    cases = [({}, around, ALL, 3), ({}, around, ["accumulate"], 1), ({"kv_heads": 1}, around, ALL, 3)]
    check(world4.run(law, cases, {axis: 2, "context": 2}))


def test_four_processes_share_heads_that_they_divide_or_not(world4):
    cases = [({}, "ddp", [], 2), ({"kv_heads": 2}, "alone", [], 2), ({"heads": 2, "kv_heads": 2}, "alone", [], 2)]
    check(world4.run(law, cases))
    check(world4.run(_with_ulysses, cases[:2]))


def _with_ulysses(cases):
    return law(cases, attention="ulysses")


def masks(kind, heads):
    """Documents, or a mask of all keys, one for each head or for all, also of all queries."""
    grid = mesh(context=-1, device="cpu")
    generator = torch.Generator().manual_seed(1)
    data, plain, options = batches(3), lm.compose()(step), {}
    for batch in data:
        if kind == "documents":
            batch["position_ids"] = positions_within(batch["documents"])
            batch["labels"] = lm.losses.shift_labels(batch["ids"], batch["documents"])
        else:
            shape = 3, heads if kind == "of each head" else 1, 12, 12
            batch["mask"] = (torch.rand(shape, generator=generator) < 0.5) | torch.eye(12).bool()
    if kind == "documents":
        options, plain = {"documents": "documents"}, lm.compose()(document_step)
    else:
        options = {"sequence_dims": {"ids": 1, "labels": 1} | ({} if kind == "of all queries" else {"mask": 2})}
    settings = {"heads": heads, "kv_heads": heads}
    ours = train(lm.context_parallel(grid, **options)(step), state_of(**settings), data)
    return [far(ours, train(plain, state_of(**settings), data))]


@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize("kind", ["documents", "of all heads", "of each head", "of all queries"])
def test_masks(kind, heads, world2):
    check(world2.run(masks, kind, heads))


def packed_step(state, batch):
    def loss_fn(params, batch):
        mask = lm.data.document_mask(batch["documents"])
        logits, _ = state.apply(params, batch["tokens"], batch["positions"], mask)
        return losses_of(logits, batch["targets"])[0]

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def packing():
    """Rows of `lm.data.Packed`, of whose documents a model makes its own mask."""
    grid = mesh(context=-1, device="cpu")
    documents = [[(n + i) % 11 for i in range(n % 7 + 2)] for n in range(40)]
    data = [*lm.Loader(lm.data.Packed(documents, length=12), batch_size=3, shuffle=False)]
    plain = train(lm.compose()(packed_step), state_of(), data)
    inside = [lm.accumulate(2), lm.remat("blocks.*")]
    shards = lm.compose(lm.context_parallel(grid, documents="documents"), *inside)
    return [far(train(shards(packed_step), state_of(), data), plain)]


def test_packed_rows(world2):
    check(world2.run(packing))


def pooled_step(state, batch):
    def loss_fn(params, batch):
        x, _ = state.apply(params, batch["ids"])
        pooled = lm.psum(x.tanh().sum(1), "context")
        return lm.Mean.of(F.cross_entropy(pooled, batch["class"], reduction="none"))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def pooling():
    grid = mesh(context=-1, device="cpu")
    data = [{"ids": batch["ids"], "class": batch["ids"][:, 0]} for batch in batches(3)]
    wrapped = lm.compose(lm.context_parallel(grid), lm.accumulate(2))(pooled_step)
    return [far(train(wrapped, state_of(), data), train(lm.compose()(pooled_step), state_of(), data))]


def test_pooling_by_sums_over_the_axis(world2):
    check(world2.run(pooling))


def runner():
    """What a Runner logs on shards, and in one process."""
    columns = {name: x for name, x in batches(1, rows=8)[0].items() if name != "documents"}

    def evaluate(state, batch):
        return {"loss": losses_of(state.apply(state.params, batch["ids"])[0], batch["labels"])[0]}

    found = []
    for transforms in ([lm.context_parallel(mesh(context=-1, device="cpu"))], []):
        held_out = lm.Loader(columns, batch_size=3, shuffle=False)
        validate = lm.Validate(evaluate, held_out, every=lm.Every(steps=2))
        data = lm.Loader(columns, batch_size=4, seed=2)
        logged = lm.Runner(step, transforms=transforms, progress=False)
        result = logged.fit(state_of(), data, until=lm.Steps(4), validate=validate)
        names = ("train/loss", "train/accuracy", "train/tokens", "train/largest", "val/loss")
        found.append({name: result.metrics[name] for name in names})
    return found


@pytest.mark.filterwarnings("ignore:2 processes do this run")
def test_a_runner_logs_the_numbers_of_one_process(world2):
    for shards, plain in world2.run(runner):
        assert shards == pytest.approx(plain, rel=1e-9)


def exchange():
    """The all-to-all as a function of the tensors of all ranks, its gradient, and its inverse."""
    group = TPGroup(mesh(context=-1, device="cpu").group("context"))
    full = torch.arange(2 * 4 * 6 * 3, dtype=torch.float64).view(2, 4, 6, 3)
    own = full.narrow(2, 3 * group.index, 3)
    found = [torch.equal(all_to_all(all_to_all(own, group, 1, 2), group, 2, 1), own)]
    heads = full.narrow(1, 2 * group.index, 2)
    dtypes = (torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64)
    found += [torch.equal(all_to_all(own.to(dtype), group, 1, 2), heads.to(dtype)) for dtype in dtypes]
    grad = torch.func.grad(lambda x: all_to_all(x, group, 1, 2).square().sum())(own)
    found.append(torch.equal(grad, 2 * own))
    own = own.clone().requires_grad_()
    found.append(torch.autograd.gradcheck(lambda x: all_to_all(x, group, 1, 2).sin().sum(), own, fast_mode=True))
    return found


def test_the_exchange_and_its_gradient(world2):
    for found in world2.run(exchange):
        assert found == [True] * len(found)


# ----------------------------------------------------------------------------------------------------- refusals


def message_of(function, *args):
    try:
        function(*args)
    except LumenError as error:
        return f"{type(error).__name__}: {error}"
    except RuntimeError as error:
        return f"{type(error).__name__}: {error} {' '.join(error.__notes__)}"
    return "nothing"


def mixing(what):
    data = batches(1)
    for batch in data:
        del batch["documents"]
        if what == "mask_of_some":  # this check is of the first positions, where no document ends
            batch["position_ids"] = torch.cat([torch.arange(11), torch.zeros(1).long()]).repeat(3, 1)
    state = state_of(lambda **_: Mixing(what))
    return message_of(train, lm.context_parallel(mesh(context=-1, device="cpu"))(step), state, data)


MIXING = {
    "convolution": "It calls conv1d",
    "recurrence": "It calls lstm",
    "pooling": "It calls mean",
    "counting": "Pass position_ids",
    "range_from_one": "Pass position_ids",
    "own_attention": "It calls softmax",
    "module": "nn.MultiheadAttention",
    "noise": "It calls randn_like",
    "local_mask": "attention has a mask of shape (5, 5)",
    "attention_dropout": "Set it to 0",
    "other_keys": "attention of 5 queries and 2 keys",
    "fixed_length": "A model that takes sequences of one length only",
    "mask_of_some": "a mask of",
}


def mixed(kinds):
    return {what: mixing(what) for what in kinds}


def test_what_cannot_be_sharded_is_refused_on_every_process(world2):
    for messages in world2.run(mixed, list(MIXING)):
        for what, text in MIXING.items():
            assert text in messages[what], (what, messages[what])


def losses(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


LOSSES = {
    "scalar": lambda x, b: (losses(x, b["labels"]).mean(), lm.Aux()),
    "shifts": lambda x, b: (lm.Mean.of(losses(x[:, :-1], b["ids"][:, 1:])), lm.Aux()),
    "first": lambda x, b: (lm.Mean.of(x[:, 0].square()), lm.Aux()),
    "plain metric": lambda x, b: (losses_of(x, b["labels"])[0], lm.Aux(metrics={"x": x.mean()})),
    "count of rows": lambda x, b: (losses_of(x, b["labels"])[0], lm.Aux(metrics={"x": lm.Sum.of(torch.ones(len(x)))})),
}
REFUSED = {
    "scalar": "is a plain scalar",
    "shifts": "Shift labels before the gradient",
    "first": "would not be that of one process",
    "plain metric": "aux['x'] is a tensor of shape ()",
    "count of rows": "the metric 'x' of",
}


def refused_losses():
    grid, found = mesh(context=-1, device="cpu"), {}
    for name, loss in LOSSES.items():

        def own(state, batch, loss=loss):
            def loss_fn(params, batch):
                return loss(state.apply(params, batch["ids"])[0], batch)

            _, grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
            return state.apply_gradients(grads), {}

        found[name] = message_of(train, lm.context_parallel(grid)(own), state_of(), batches(1))
    return found


def test_losses_that_do_not_say_what_they_count_are_refused(world2):
    for found in world2.run(refused_losses):
        for name, text in REFUSED.items():
            assert text in found[name], (name, found[name])


def bad_input():
    grid, plain = mesh(context=-1, device="cpu"), mesh(data=-1, device="cpu")
    batch = batches(1)[0]

    def run(transforms, batch=batch, state=None):
        return message_of(train, lm.compose(*transforms)(step), state or state_of(), [batch])

    other = {**batch, "ids": batch["ids"] + world.rank() % 2}
    return {
        "length": run([lm.context_parallel(grid)], batches(1, length=13)[0]),
        "lengths": run([lm.context_parallel(grid)], {**batch, "mask": torch.ones(3, 5)}),
        "no positions": run([lm.context_parallel(grid)], {"ids": torch.ones(3).long()}),
        "name": run([lm.context_parallel(grid, sequence_dims={"tokens": 1})]),
        "dim": run([lm.context_parallel(grid, sequence_dims={"ids": 0})]),
        "documents": run([lm.context_parallel(grid, documents="pages")]),
        "mesh": run([lm.context_parallel(plain)]),
        "meshes": run([lm.ddp(plain), lm.context_parallel(grid)]),
        "rows": run([lm.context_parallel(grid)], other),
    }


BAD = {
    "length": "BatchError: sequences of 13 positions cannot be sharded over the 2 ranks along context",
    "lengths": "BatchError: the leaves to shard have different numbers of positions",
    "no positions": "BatchError: no leaf of the batch",
    "name": "BatchError: sequence_dims names 'tokens'",
    "dim": "BatchError: sequence_dims={'ids': 0} is not a dim of positions",
    "documents": "BatchError: documents='pages' is not in the batch",
    "mesh": "WorldError: lm.mesh(data=2) has no processes along context",
    "meshes": "WorldError: lm.ddp(lm.mesh(data=2)) has lm.mesh(data=2) and lm.context_parallel has lm.mesh(context=2)",
    "rows": "BatchError: the ranks along context received different rows",
}


def test_bad_input_is_refused_before_the_first_step(world2):
    for found in world2.run(bad_input):
        for name, text in BAD.items():
            assert text in found[name], (name, found[name])


# ------------------------------------------------------------------------------------------------- transformers


def hf_model(family, **options):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16}
    sizes |= {"max_position_embeddings": 64, "attn_implementation": "sdpa", "bos_token_id": 1, "eos_token_id": 2}
    if family == "llama":
        options = {"num_key_value_heads": 2, "intermediate_size": 16} | options
    else:
        options |= {"attn_pdrop": 0.0, "embd_pdrop": 0.2, "resid_pdrop": 0.2}
    config = hf.AutoConfig.for_model(family, **(sizes | options))
    return hf.AutoModelForCausalLM.from_config(config)


def hf_step(state, batch):
    def loss_fn(params, batch):
        labels = batch["labels"]
        positions = {name: batch[name] for name in ("position_ids",) if name in batch}
        out, _ = state.apply(
            params, batch["ids"], **positions, labels=labels, shift_labels=labels, num_items_in_batch=1
        )
        return lm.Mean(out.loss, (labels != -100).sum())

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def hf_law(family, positions, **heads):
    grid = mesh(context=-1, device="cpu")
    data, options = batches(2), {}
    for batch in data:
        documents = batch["documents"] if positions == "documents" else batch.pop("documents") * 0
        if positions != "none":
            batch["position_ids"] = positions_within(documents)
        batch["labels"] = lm.losses.shift_labels(batch["ids"], documents)
    options = {"documents": "documents"} if positions == "documents" else {}

    def state():
        return state_of(lambda **_: hf_model(family, use_cache=False, **heads), lm.optim.sgd(0.1))

    ours = train(lm.compose(lm.seeded(), lm.context_parallel(grid, **options))(hf_step), state(), data)
    return [far(ours, train(lm.compose(lm.seeded())(hf_step), state(), data))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", ["none", "given", "documents"])
def test_models_of_transformers(family, positions, world2):
    check(world2.run(hf_law, family, positions), 1e-5)


ONE_KEY_HEAD = {"num_key_value_heads": 1}
ONE_HEAD = {"num_attention_heads": 1, **ONE_KEY_HEAD}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("positions", "heads"), [("none", ONE_KEY_HEAD), ("documents", ONE_HEAD)])
def test_models_of_transformers_with_fewer_heads_than_processes(positions, heads, world2):
    check(world2.run(_hf_law_of_heads, positions, heads), 1e-5)


def _hf_law_of_heads(positions, heads):
    return hf_law("llama", positions, **heads)
