"""`lm.plan` in one process: large worlds against arithmetic, costs, advice, pictures, the command, and bad input."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import lumen as lm
from lumen.bridges import lora
from lumen.cli.main import main
from lumen.core import distributed
from lumen.errors import HyperparameterError, StepError, WorldError
from lumen.optim._adam import _TRIALS
from lumen.planner.comm_trace import CollectiveCall, axes_of
from lumen.planner.fake_world import fake_world
from lumen.planner.memory import MemoryTracker
from lumen.planner.plan import plan_loaded
from lumen.planner.render import phases, sampled
from lumen.planner.roofline import compute_seconds, device, ring_bytes, ring_seconds
from lumen.planner.tracker import Work
from tests.distributed import context_models


def step(state, batch):
    def loss_fn(params, batch):
        logits, _ = state.apply(params, batch["x"])
        return F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten())

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def square(state, batch):
    loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0].square().mean())(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h):
        B, T, D = h.shape
        q, k, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in self.qkv(self.first(h)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return h + self.down(F.gelu(self.up(self.second(h))))


class GPT(nn.Module):
    def __init__(self, vocab, width, depth, heads):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def make(transforms=(), vocab=128, width=32, depth=2, heads=2, rows=2, context=16):
    state = lm.TrainState.create(GPT(vocab, width, depth, heads), lm.optim.adamw(1e-3))
    x = torch.zeros(rows, context, dtype=torch.int64)
    return lm.compose(*transforms)(step), state, {"x": x, "y": x}


def planned(*transforms, width=32, **options):
    made = make(transforms, width=width)
    return lm.plan(*made, **options)


# ------------------------------------------------------------------------------------------- large worlds


@pytest.mark.slow
def test_seven_billion_params_on_a_thousand_processes_are_cut_as_arithmetic_says():
    width, layers = 8192, 8

    def seven():
        return make([lm.fsdp(), lm.precision("bf16", cast="model"), lm.donate()], 50_304, width, layers, 64, 1, 128)

    found = plan_loaded(lambda: seven, mesh={"shard": 64, "data": 16})
    params = layers * (12 * width**2 + 10 * width) + 2 * 50_304 * width
    assert params > 6.8e9
    assert found.peak.by_category["params"] == pytest.approx(4 * params / 64, rel=0.01)
    assert found.peak.by_category["optimizer"] == pytest.approx(8 * params / 64, rel=0.01)
    sent = {each.kind: each for each in found.traffic if each.carried > 1000}
    assert sent["all-gather"].axes == sent["reduce-scatter"].axes == "shard"
    assert sent["all-reduce"].axes == "data"
    # In bf16, each unit forward and backward, the root once; gradients in float32.
    root = 2 * 50_304 * width
    assert sent["all-gather"].carried == pytest.approx(2 * (2 * params - root), rel=0.01)
    assert sent["reduce-scatter"].carried == pytest.approx(4 * params, rel=0.01)
    assert found.flops == pytest.approx(6 * (params - 50_304 * width) * 128, rel=0.02)


def test_a_larger_world_holds_less_of_the_state_and_no_less_of_the_rest():
    few, many = planned(lm.fsdp(), world_size=2), planned(lm.fsdp(), world_size=32)
    assert many.peak.by_category["optimizer"] * 14 < few.peak.by_category["optimizer"]
    assert many.peak.by_category["batch"] == few.peak.by_category["batch"]
    assert many.flops == few.flops


def test_a_frozen_base_is_planned_in_shards_and_two_units_of_it_at_a_time():
    def adapted():
        net = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256, bias=False)) for _ in range(8)])
        state = lm.TrainState.create(lora.adapt(net, targets=["*.0"], rank=2), lm.optim.adamw(1e-3))
        return lm.compose(lm.fsdp(wrap=[str(i) for i in range(8)]), lm.donate())(square), state, torch.zeros(2, 256)

    unit = 256 * 256 * 4
    found = plan_loaded(lambda: adapted, world_size=4)
    assert found.peak.by_category["params"] == pytest.approx(8 * unit / 4, rel=0.15)
    gathered = ("gathered params", "communication")  # the one that runs, and the next one on its way
    assert sum(found.peak.by_category.get(kind, 0) for kind in gathered) < 2.3 * unit


def test_the_given_mesh_takes_the_place_of_the_steps_own_and_leaves_it_alone():
    transform = lm.fsdp()
    found = lm.plan(*make([transform]), mesh={"shard": 4, "data": 2})
    assert found.trace.sizes == {"data": 2, "shard": 4, "pipeline": 1, "context": 1, "tensor": 1}
    assert transform.mesh.size() == 1
    assert {each.axes for each in found.traffic} >= {"shard", "data"}


def test_a_plan_leaves_nothing_behind():
    resize, hook = torch.UntypedStorage.resize_, sys.excepthook
    planned(lm.ddp(), world_size=8)
    assert sys.excepthook is hook, "torch's names the rank in each traceback, once more for each world"
    assert not distributed.is_distributed()
    assert not distributed.is_dry_run()
    assert torch.UntypedStorage.resize_ is resize
    assert torch.ones(2).tolist() == [1.0, 1.0]


def test_no_weak_reference_of_torchs_is_copied(monkeypatch):
    """Two of the same one give one count back twice, and what the second writes to is somebody else's by then."""

    def copied(_self, _protocol):
        raise AssertionError("a weak reference to a storage is copied")

    monkeypatch.setattr(StorageWeakRef, "__reduce_ex__", copied)
    _, _, batch = make()

    def on_meta():
        with torch.device("meta"):
            return make()[1]

    assert lm.plan(lm.fsdp()(step), on_meta, batch, world_size=8).peak.nbytes > 0


def test_a_measurement_has_the_numbers_of_a_plan(monkeypatch):
    for trial in _TRIALS.values():  # as in a fresh process, where the fused kernel is tried on first use
        monkeypatch.setattr(trial, "_results", {})
    wrapped, _, batch = make([lm.donate()])
    found = lm.plan(wrapped, lambda: make()[1], batch, world_size=1)
    real = lm.planner.measure(wrapped, lambda: make()[1], batch)
    assert found.peak.nbytes == pytest.approx(real.peak.nbytes, rel=0.01)
    assert found.flops == real.flops
    assert real.trace.seconds > 0


def test_a_plan_computes_no_logits_that_are_computed_in_chunks():
    def made(*transforms):
        return make([lm.donate(), *transforms], vocab=4096, rows=16)

    wrapped, _, batch = made(lm.chunked_logits("head", chunk=16))
    found = lm.plan(wrapped, lambda: made()[1], batch, world_size=1)
    real = lm.planner.measure(wrapped, lambda: made()[1], batch)
    assert found.peak.nbytes == pytest.approx(real.peak.nbytes, rel=0.01)
    logits = 16 * 16 * 4096 * 4
    whole = lm.plan(made()[0], lambda: made()[1], batch, world_size=1)
    assert any(block.nbytes == logits for block in whole.peak.blocks)
    assert not any(block.nbytes == logits for block in found.peak.blocks)
    assert found.peak.nbytes < whole.peak.nbytes - logits


def test_sequences_are_planned_on_their_shards():
    batch = {name: x for name, x in context_models.batches(1, length=64)[0].items() if name != "documents"}
    step = lm.compose(lm.ddp(), lm.context_parallel())(context_models.step)
    one, two = (lm.plan(step, context_models.state_of(), batch, mesh={"context": size}) for size in (1, 2))
    assert two.peak.by_category["activations"] < 0.6 * one.peak.by_category["activations"]
    assert {(each.kind, each.axes) for each in two.traffic} >= {("all-to-all", "context"), ("all-reduce", "context")}


def test_keys_that_go_round_a_ring_are_planned():
    batch = {name: x for name, x in context_models.batches(1, length=64)[0].items() if name != "documents"}
    step = lm.context_parallel(attention="ring")(context_models.step)
    plan = lm.plan(step, context_models.state_of(kv_heads=2), batch, mesh={"context": 4})
    (sent,) = (entry for entry in plan.traffic if entry.kind == "send")
    keys_and_values = 2 * 3 * 2 * 16 * 2 * 8  # rows, heads, positions, features, bytes
    # In each of two blocks keys and values go to three ranks, in both passes, and gradients to three and home.
    assert (sent.axes, sent.times, sent.sent) == ("context", 2 * (3 + 3 + 4), 2 * (3 + 3 + 4) * keys_and_values)


# ------------------------------------------------------------------------------------------- costs


def test_work_takes_its_arithmetic_or_its_traffic_whichever_is_longer():
    on = device("h100", flops=1e12, bandwidth=1e9, efficiency=0.5)
    heavy, wide = Work(10**12, 10, torch.float32, "", ""), Work(10, 10**9, torch.float32, "", "")
    assert compute_seconds([heavy], on) == pytest.approx(2.0)
    assert compute_seconds([heavy, wide], on) == pytest.approx(4.0)


def test_rings_inside_a_node_and_between_nodes():
    on = device("h100", inside=100.0, between=10.0, latency_inside=1.0, latency_between=5.0, per_node=4)
    inside = CollectiveCall("all-gather", 400, (0, 1, 2, 3), "", "")
    assert ring_bytes(inside) == 300
    assert ring_seconds(inside, on) == pytest.approx(3 + 3 * 1)
    across = CollectiveCall("all-gather", 400, (0, 4, 8, 12), "", "")  # one of each node, so one adapter
    assert ring_seconds(across, on) == pytest.approx(30 + 3 * 5)
    both = CollectiveCall("reduce-scatter", 800, tuple(range(8)), "", "")  # four adapters
    assert ring_seconds(both, on) == pytest.approx(700 / 40 + 6 * 1 + 5)
    alone = CollectiveCall("all-reduce", 800, (3,), "", "")
    assert ring_bytes(alone) == ring_seconds(alone, on) == 0
    sent, received = (CollectiveCall(kind, 400, (0, 1, 2, 3), "", "") for kind in ("send", "receive"))
    assert (ring_bytes(sent), ring_seconds(sent, on)) == (400, pytest.approx(4 + 1))  # to the next rank alone
    assert ring_bytes(received) == ring_seconds(received, on) == 0  # it is sent by another
    assert ring_seconds(sent._replace(ranks=(0, 1, 4, 5)), on) == pytest.approx(40 + 5)


def test_a_small_all_reduce_goes_by_a_tree():
    on = device("h100")
    small = CollectiveCall("all-reduce", 16, tuple(range(1024)), "", "")
    assert ring_seconds(small, on) < 1e-3
    assert ring_bytes(small) < 32


def test_axes_are_told_by_the_places_that_differ():
    sizes = {"data": 2, "shard": 2, "tensor": 2}
    assert axes_of([0, 1], sizes) == "tensor"
    assert axes_of([1, 3], sizes) == "shard"
    assert axes_of([0, 2, 4, 6], sizes) == "data×shard"
    assert axes_of([5], sizes) == "itself"


# ------------------------------------------------------------------------------------------- memory


def test_memory_follows_storages_their_views_and_their_sizes():
    memory = MemoryTracker()
    with memory.track_resizes():
        x = torch.ones(100)
        memory.record(x, "aten::ones")
        memory.record(x[10:], "aten::slice")
        assert memory.peak().nbytes == 400
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(800)
        del x
    assert [change.nbytes for change in memory.changes] == [400, -400, 800, -800]
    assert memory.peak().nbytes == 800
    assert memory.peak().by_category["gathered params"] == 800


def test_phases_and_samples_of_a_step():
    timeline = planned(world_size=1).trace.tracker.memory.timeline("step")
    points = sampled(timeline, 50)
    assert len(points) == 50
    assert max(sum(parts.values()) for _, parts in points) == max(sum(parts.values()) for _, parts in timeline)
    names = [name for name, _, _ in phases(points)]
    assert [name for name in names if name] == ["forward", "backward", "update"]


# ------------------------------------------------------------------------------------------- advice


def test_what_does_not_fit_gets_advice_and_what_fits_gets_none():
    assert planned(lm.ddp(), lm.donate(), world_size=8).suggestions == []
    need = planned(lm.ddp(), lm.donate(), world_size=8, width=256)
    limit = need.peak.by_category["params"] * 3.4
    assert need.peak.nbytes > limit
    (first, *_) = planned(lm.ddp(), lm.donate(), world_size=8, width=256, memory=limit).suggestions
    assert "lm.fsdp(stage=" in first
    tight = planned(lm.fsdp(), world_size=8, memory=1e3)
    assert not tight.fits
    said = " ".join(tight.suggestions)
    assert "shard=16" in said or "lm.remat()" in said


def test_a_state_that_is_too_large_only_before_it_is_cut_is_told_apart():
    whole = planned(lm.fsdp(), lm.donate(), world_size=32, width=256)
    assert whole.start.nbytes > whole.peak.nbytes
    found = planned(lm.fsdp(), lm.donate(), world_size=32, width=256, memory=whole.peak.nbytes)
    assert not found.fits
    assert [("meta device" in each) for each in found.suggestions] == [True]


# ------------------------------------------------------------------------------------------- what cannot be planned


def refused(error, match, *transforms, **options):
    with pytest.raises(error, match=match):
        planned(*transforms, **options)
    assert not distributed.is_distributed()


def test_worlds_and_devices_that_do_not_go():
    refused(WorldError, "needs a world")
    refused(WorldError, "needs 3 processes, but the world size is 8", lm.ddp(), world_size=8, mesh={"data": 3})
    refused(WorldError, "no axis 'rows'", lm.ddp(), mesh={"rows": 3})
    refused(WorldError, "write world_size=", lm.ddp(), mesh={"data": -1})
    refused(WorldError, "rank=9 is not in a world of 4", lm.ddp(), world_size=4, rank=9)
    refused(WorldError, "world_size=0", world_size=0)
    refused(HyperparameterError, "device='tpu' is unknown", world_size=2, device="tpu")
    refused(HyperparameterError, "memory=-1", world_size=2, memory=-1)
    refused(HyperparameterError, "speed= is not a figure", world_size=2, speed=3)
    refused(HyperparameterError, "up to 1", world_size=2, efficiency=2)


def test_a_plan_inside_a_world_is_refused():
    with fake_world(2), pytest.raises(WorldError, match="rank 0 of 2 already"):
        planned(lm.ddp(), world_size=4)
    assert not dist.is_initialized()


def test_shapes_that_depend_on_values_are_refused_with_words():
    def selecting(state, batch):
        def loss_fn(params, batch):
            out, _ = state.apply(params, batch)
            return out[out > 0].sum()

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    state = lm.TrainState.create(nn.Linear(4, 2), lm.optim.sgd(0.1))
    with pytest.raises(StepError, match="shape depends on values"):
        lm.plan(selecting, state, torch.ones(3, 4), world_size=1)


def test_numbers_that_a_step_reads_are_told():
    def reading(state, batch):
        new, metrics = step(state, batch)
        return new, {"loss": float(metrics["loss"])}

    _, state, batch = make()
    found = lm.plan(reading, state, batch, world_size=1)
    assert any("reads 2 numbers" in each and "test_plan.py" in each for each in found.assumptions)


def test_a_compiled_step_is_planned_without_and_says_so():
    found = planned(lm.compile(), lm.ddp(), world_size=2)
    assert any("lm.compile was left out" in each for each in found.assumptions)


# ------------------------------------------------------------------------------------------- what it looks like

SCRIPT = """
import torch
import lumen as lm

def step(state, batch):
    loss, grads = lm.value_and_grad(lambda p, x: state.apply(p, x)[0].square().mean())(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}

def make():
    net = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(3)])
    return lm.fsdp()(step), lm.TrainState.create(net, lm.optim.adamw(1e-3)), torch.zeros(4, 16)

def wrong():
    return step
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train_for_plan.py"
    path.write_text(SCRIPT)
    return str(path)


def said(capsys, *argv):
    code = main(["plan", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_prints_a_table_and_writes_pictures(script, tmp_path, capsys):
    files = [tmp_path / name for name in ("plan.html", "plan.svg")]
    outputs = [part for file in files for part in ("-o", str(file))]
    code, out, _ = said(capsys, f"{script}:make", "--mesh", "shard=64,data=16", *outputs)
    assert code == 0
    for words in (
        "rank 0 of 1024 (data=16, shard=64) on h100",
        "all-gather",
        "data×shard",
        "MFU",
        "assumptions",
        "fits",
    ):
        assert words in out
    assert "<svg" in files[0].read_text()
    assert files[1].read_text().startswith("<svg")


def test_the_command_draws_with_matplotlib(script, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    code, _, _ = said(capsys, f"{script}:make", "--world-size", "4", "-o", str(tmp_path / "plan.png"))
    assert code == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_takes_another_strategy_and_speaks_to_programs(script, capsys):
    code, out, _ = said(capsys, f"{script}:make", "--world-size", "8", "--strategy", "ddp", "--json")
    told = json.loads(out)
    assert code == 0
    assert {each["kind"] for each in told["traffic"]} == {"all-reduce"}
    code, out, _ = said(capsys, f"{script}:make", "--world-size", "8", "--strategy", "fsdp(stage=2)", "--memory", "1e3")
    assert code == 1
    assert out.startswith("lm.fsdp(stage=2)(step)")
    assert "does NOT fit" in out
    assert "try:" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{}:nope", "--world-size", "2"], "has no function 'nope'"),
        (["{}:wrong", "--world-size", "2"], "must return (step, state, batch)"),
        (["missing.py:make", "--world-size", "2"], "no such file: missing.py"),
        (["{}:make"], "needs a world"),
        (["{}:make", "--world-size", "4", "--mesh", "shard=3"], "needs 3 processes, but the world size is 4"),
        (["{}:make", "--world-size", "4", "--strategy", "zip"], "--strategy takes ddp, fsdp"),
        (["{}:make", "--world-size", "4", "-o", "plan.txt"], "not as 'plan.txt'"),
    ],
)
def test_the_command_says_what_is_wrong(script, capsys, argv, words):
    code, _, err = said(capsys, *(each.format(script) for each in argv))
    assert code == 1
    assert words in err
    assert not distributed.is_distributed()


def test_a_mesh_that_cannot_be_read_is_a_wrong_command_line(script):
    with pytest.raises(SystemExit) as caught:
        main(["plan", f"{script}:make", "--mesh", "shard"])
    assert caught.value.code == 2


@pytest.mark.parametrize("tx", [lm.optim.adamw(1e-3), lm.optim.adam(1e-3), lm.optim.sgd(0.1, momentum=0.9)])
def test_no_operation_of_a_plan_is_run_on_values(tx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(mode: Any, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} was run on tensors with values")

    monkeypatch.setattr("torch._subclasses.fake_tensor.run_fallback_kernel", run)

    def step(state: lm.TrainState, batch: torch.Tensor) -> Any:
        def loss_fn(params: Any, batch: torch.Tensor) -> torch.Tensor:
            return state.apply(params, batch)[0].square().mean()

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    make = lambda: lm.TrainState.create(torch.nn.Linear(8, 8), tx)  # noqa: E731
    for stack in ([lm.donate()], []):
        assert lm.plan(lm.compose(lm.ddp(), *stack)(step), make, torch.ones(2, 8), mesh={"data": 4}).fits
