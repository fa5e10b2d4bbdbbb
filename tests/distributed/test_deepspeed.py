"""`lm.deepspeed`: the law of each of ZeRO's stages, what becomes configuration, and checkpoints that move."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import lumen as lm
from lumen.core import distributed
from lumen.core.versions import version_of
from lumen.errors import MergeError, StateError
from lumen.parallel.comm.init import leave
from lumen.parallel.deepspeed import engine
from lumen.parallel.deepspeed.engine import missing
from tests.distributed import fsdp_models
from tests.distributed.leaving import a_thread_of_gloo_appears, threads
from tests.distributed.models import bare, batches, furthest, make_state, part, plain_step, step, train, transforms
from tests.distributed.pool import TaskError
from tests.distributed.test_buffers import furthest as furthest_buffer
from tests.distributed.test_buffers import merged
from tests.distributed.test_buffers import part as buffer_rows
from tests.distributed.test_ddp import cut
from tests.laws.test_buffers import ROWS, RULES, made
from tests.laws.test_buffers import step as buffer_step
from tests.tiers import pick

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.skipif(version_of("deepspeed") is None, reason="DeepSpeed is not installed"),
]

assert fsdp_models  # its models are registered where it is imported

STEP = {"step": step, "plain": plain_step}
STEPS = pick(4, 20)


def zero(stage, **more):
    return lm.deepspeed({"zero_optimization": {"stage": stage, **more.pop("zero", {})}, **more})


def adamw():
    # Gradients below eps are noise, which Adam would blow up; masks must know a matrix from its parts.
    return lm.optim.adamw(1e-2, eps=1e-3, weight_decay=0.1, decay_mask=lm.optim.matrices)


def law(stage, cases, steps=STEPS, **config):
    """How far each case on parts is from one process on all rows: the losses, and the furthest leaf."""
    found = []
    for kind, model, around, sizes in cases:
        inner = transforms([around] if around else [])
        wrapped = lm.compose(zero(stage, **config), *inner)(STEP[kind])
        whole = batches(steps, sum(sizes), torch.float32)
        parts = [part(each, sizes, distributed.rank()) for each in whole]
        losses, state = train(wrapped, make_state(model, torch.float32, adamw()), parts)
        beside = lm.compose(*[cut(sizes)] * (model == "stack"), *inner)(STEP[kind])
        wanted, other = train(beside, make_state(model, torch.float32, adamw()), whole)
        state = wrapped.transforms[0].export(state)
        found.append((float((losses - wanted).abs().max()), *furthest(bare(state), bare(other))))
        wrapped.transforms[0].engine.destroy()
        assert torch.nn.functional.linear is torch._C._nn.linear, "DeepSpeed's own is the engine's alone"
    return found


CASES = [
    ("step", "mlp", "", [5, 3]),
    ("plain", "mlp", "", [8, 0]),
    ("step", "gpt", "accumulate", [5, 3]),
    ("step", "outside", "clip", [5, 3]),  # a param used outside of its module, and some that are not used
    ("step", "stack", "", [5, 3]),  # BatchNorms
    ("step", "gpt", "clip", [8, 0]),
    ("step", "outside", "accumulate", [8, 0]),
]
MORE = [("step", "deep", "accumulate", [5, 3]), ("step", "mlp", "ema", [5, 3])]  # a param without dims


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_are_those_of_one_process(stage, world2):
    cases = CASES + (MORE if stage == 2 else [])
    for found in world2.run(law, stage, cases):
        for case, (losses, worst, leaf) in zip(cases, found, strict=True):
            assert losses < 5e-6, (case, losses)
            assert worst < 5e-6, (case, leaf, worst)


def ruled_buffers():
    """How far buffers with rules are from those of one process on all rows, by stage; one without a rule is refused."""
    found = {}
    whole, _ = buffer_step(single_precision(made(RULES)), ROWS.float())
    for stage in (0, 2, 3):
        for around in ([], [lm.accumulate(2)]):
            wrapped = lm.compose(zero(stage), *around)(buffer_step)
            new, _ = wrapped(wrapped.init(single_precision(made(RULES))), buffer_rows([4, 3]).float())
            wanted = merged([4, 3], 2) if around else whole.buffers
            new = wrapped.export(new)
            found[stage, bool(around)] = furthest_buffer(new.buffers, {name: wanted[name] for name in RULES})
            wrapped.transforms[0].engine.destroy()
    wrapped = zero(2)(buffer_step)
    with pytest.raises(MergeError, match="merge="):
        wrapped(wrapped.init(single_precision(made())), buffer_rows([4, 3]).float())
    wrapped.transforms[0].engine.destroy()
    return found


def single_precision(state):
    """The state with its float64 numbers in float32, as the engine takes them."""
    return lm.tree.map(lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x, state)


def test_buffers_are_merged_by_their_rules(world2):
    for found in world2.run(ruled_buffers):
        assert max(found.values()) < 1e-5, found


def frozen():
    """How far clipped steps that keep a layer as it is are from those of one process, by stage, also with offload."""
    found = {}
    whole = batches(2, 8, torch.float32)

    def tx():
        return lm.optim.freeze("0.*", adamw())

    losses, state = train(lm.clip(0.05)(step), make_state("mlp", torch.float32, tx()), whole)
    _, counted = train(lm.clip(0.05)(step), make_state("mlp", torch.float32, adamw()), whole)
    assert furthest({"2.weight": state.params["2.weight"]}, {"2.weight": counted.params["2.weight"]})[0] > 1e-4
    for stage, offload in ((0, False), (1, False), (2, False), (2, True), (3, False), (3, True)):
        more = {"offload_optimizer": {"device": "cpu"}} if offload else {}
        wrapped = lm.compose(zero(stage, zero=more), lm.clip(0.05))(step)
        own, mine = train(wrapped, make_state("mlp", torch.float32, tx()), rows(whole))
        far, _ = furthest(bare(wrapped.transforms[0].export(mine)), bare(state))
        found[stage, offload] = max(float((own - losses).abs().max()), far)
        wrapped.transforms[0].engine.destroy()
    return found


def test_a_clip_leaves_out_what_the_optimizer_freezes(world2):
    for found in world2.run(frozen):
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(("stage", "model"), [(1, "mlp"), (3, "gpt")])
def test_bfloat16_is_the_engines(stage, model, world2):
    for found in world2.run(law, stage, [("step", model, "bf16", [5, 3])], 5):
        assert 1e-7 < found[0][0] < 5e-2


def products(policies):
    """How float32 matrices are multiplied in a step under each policy, and after it."""
    found = []

    def watched(state, batch):
        found.append(torch.get_float32_matmul_precision())
        return step(state, batch)

    for policy in policies:
        wrapped = lm.compose(zero(1), lm.precision(policy))(watched)
        wrapped(wrapped.init(make_state("mlp", torch.float32, adamw())), rows(batches(1, 8, torch.float32))[0])
        found.append(torch.get_float32_matmul_precision())
        wrapped.transforms[0].engine.destroy()
    return found


def test_products_of_matrices_are_as_the_policy_says(world2):
    narrow = lm.Policy(compute=torch.bfloat16, matmul="tf32")
    for found in world2.run(products, ["tf32", "fp32", narrow]):
        assert found == ["high", "highest", "highest", "highest", "high", "highest"]


def test_offload_is_the_configurations(world2):
    zero = {"offload_optimizer": {"device": "cpu"}}
    for found in world2.run(offloaded, zero):
        assert found[1] < 5e-6


def offloaded(zero_more):
    config = {"zero_optimization": {"stage": 2, **zero_more}}
    wrapped = lm.deepspeed(config)(step)
    whole = batches(5, 8, torch.float32)
    losses, state = train(wrapped, make_state("mlp", torch.float32, adamw()), rows(whole))
    wanted, other = train(lm.compose()(step), make_state("mlp", torch.float32, adamw()), whole)
    return float((losses - wanted).abs().max()), furthest(bare(wrapped.export(state)), bare(other))[0]


def rows(whole):
    return [part(each, [5, 3], distributed.rank()) for each in whole]


def saved(stage, path, steps):
    """Train some steps under `stage`, going on from what is at `path`, if anything; save there."""
    wrapped = zero(stage)(step)
    state = wrapped.init(make_state("gpt", torch.float32, adamw()))
    if path.exists():
        state = lm.checkpoint.restore(path / str(steps[0]), state, step=wrapped)
    for batch in rows(batches(steps[1], 8, torch.float32))[steps[0] :]:
        state, metrics = wrapped(state, batch)
    lm.checkpoint.save(path / str(steps[1]), state, step=wrapped)
    return bare(wrapped.export(state)), float(metrics["loss"].compute())


def test_a_checkpoint_moves_from_stage_3_to_one_process_to_stage_1(world2, tmp_path):
    path = tmp_path / "run"
    first, _ = world2.run(saved, 3, path, (0, 4))[0]
    whole = batches(12, 8, torch.float32)
    state = lm.checkpoint.restore(path / "4", make_state("gpt", torch.float32, adamw()))
    assert furthest(bare(state), first)[0] == 0
    for batch in whole[4:8]:
        state, _ = step(state, batch)
    lm.checkpoint.save(path / "8", state)
    last, loss = world2.run(saved, 1, path, (8, 12))[0]
    losses, wanted = train(lm.compose()(step), make_state("gpt", torch.float32, adamw()), whole)
    assert abs(loss - losses[-1]) < 5e-6
    assert furthest(last, bare(wanted))[0] < 5e-6


def fitted(path, stage, steps):
    """A run by the Runner, with validation, that goes on from its newest checkpoint."""

    def eval_step(state, batch):
        logits, _ = state.apply(state.params, batch["x"])
        return {"accuracy": lm.Mean.of(logits.argmax(-1) == batch["y"])}

    columns = batches(1, 24, torch.float32)[0]
    runner = lm.Runner(
        step,
        transforms=[zero(stage), lm.accumulate(2), lm.clip(1.0)],
        checkpoint=lm.Checkpointer(path, every=lm.Every(steps=3)),
        progress=False,
    )
    result = runner.fit(
        make_state("mlp", torch.float32, adamw()),
        lm.Loader(columns, batch_size=8, seed=1),
        until=lm.Steps(steps),
        validate=lm.Validate(eval_step, lm.Loader(columns, batch_size=7, shuffle=False), every=lm.Every(steps=3)),
        resume="auto",
    )
    return bare(result.export()), result.metrics["val/accuracy"], result.clock.step


def test_a_run_goes_on_under_another_stage(world2, tmp_path):
    world2.run(fitted, tmp_path / "a", 3, 5)
    moved = world2.run(fitted, tmp_path / "a", 2, 9)
    whole = world2.run(fitted, tmp_path / "b", 2, 9)
    assert moved[0][1:] == moved[1][1:] == whole[0][1:]
    assert furthest(moved[0][0], whole[0][0])[0] < 5e-6


def held(stage):
    """What is refused of gradients that the engine holds, and one that is asked for."""
    strategy = zero(stage)
    batch = rows(batches(1, 8, torch.float32))[0]
    found = {}

    def wrong(change):
        def run(state, batch):
            _, grads = lm.value_and_grad(lambda p, b: state.apply(p, b["x"])[0].square().mean())(state.params, batch)
            return state.apply_gradients(change(grads)), {}

        return run

    def asked(state, batch):
        _, grads = lm.value_and_grad(lambda p, b: state.apply(p, b["x"])[0].square().mean())(state.params, batch)
        found["grad"] = strategy.gradient("0.weight").clone()
        return state.apply_gradients(grads), {}

    wrapped = strategy(asked)
    old = wrapped.init(make_state("mlp", torch.float32, adamw()))
    wrapped(old, batch)
    for what, change in (
        ("read", lambda grads: lm.tree.map(lambda g: g * 2, grads)),
        ("other", lambda grads: {name: torch.zeros(g.shape) for name, g in grads.items()}),
    ):
        step_of = zero(stage)(wrong(change))
        state = step_of.init(make_state("mlp", torch.float32, adamw()))
        try:
            step_of(state, batch)
        except Exception as error:
            found[what] = f"{type(error).__name__}: {error}"
        try:
            step_of(state, batch)
        except Exception as error:
            found[f"{what} again"] = f"{type(error).__name__}: {error}"
    try:
        old.params  # noqa: B018
    except Exception as error:
        found["old"] = type(error).__name__
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_stay_in_the_engine(stage, world2):
    state = make_state("mlp", torch.float32, adamw())
    loss = lm.value_and_grad(lambda p, b: state.apply(p, b["x"])[0].square().mean())
    _, grads = loss(state.params, batches(1, 8, torch.float32)[0])
    for found in world2.run(held, stage):
        torch.testing.assert_close(found["grad"], grads["0.weight"], rtol=1e-5, atol=1e-7)
        assert "LossError" in found["read"]
        assert 'strategy.gradient("head.weight")' in found["read"]
        assert "the very grads" in found["other"]
        assert "one gradient and one update" in found["other again"]
        assert found["old"] == "DonatedError"


def test_it_runs_alone(tmp_path):
    program = tmp_path / "alone.py"
    program.write_text(ALONE)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-6


ALONE = """
import torch
import lumen as lm

def step(state, batch):
    loss, grads = lm.value_and_grad(lambda p, b: state.apply(p, b)[0].square().mean())(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}

def made():
    torch.manual_seed(0)
    return lm.TrainState.create(torch.nn.Linear(4, 3), lm.optim.adamw(1e-2, eps=1e-3))

wrapped = lm.deepspeed({"zero_optimization": {"stage": 2}})(step)
one, other = wrapped.init(made()), made()
for _ in range(3):
    batch = torch.randn(5, 4)
    one, _ = wrapped(one, batch)
    other, _ = step(other, batch)
print(float((wrapped.export(one).params["weight"] - other.params["weight"]).abs().max()))
"""


@pytest.mark.parametrize(
    ("config", "around", "said"),
    [
        ({"optimizer": {"type": "Adam"}}, [], "state.tx is the optimizer"),
        ({"optimizer": {"type": "OneBitAdam"}}, [], "DeepSpeed has no 1-bit optimizers any more"),
        ({"gradient_accumulation_steps": 2}, [lm.accumulate(4)], "lm.accumulate(4)"),
        ({"gradient_clipping": 2.0}, [lm.clip(1.0)], "lm.clip(1.0)"),
        ({"fp16": {"enabled": True}}, [lm.precision("bf16")], "differ"),
        ({}, [lm.precision("bf16")], "stage 1"),
        ({"zero_optimization": {"stage": 1}}, [lm.precision("fp64")], "float32 params"),
        ({"zero_optimization": {"stage": 4}}, [], "0, 1, 2 and 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, [], "nvme"),
        ({}, [lm.donate()], "in place"),
        ({}, [lm.guard()], "cannot be combined with"),
        ({}, [lm.clip(value=1.0)], "lm.clip(1.0)"),
        ({}, [lm.accumulate("auto")], "lm.accumulate(4)"),
        ({"zero_optimization": {"stage": 3}}, [lm.ema(0.9)], "stage 2"),
        ({"zero_optimization": {"stage": 3}}, [lm.remat()], "stage 2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(config, around, said):
    with pytest.raises((lm.LumenError,), match=re.escape(said)):
        lm.compose(lm.deepspeed(config), *around)(step)


def test_a_config_is_a_dict_or_a_json_file(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert lm.deepspeed(tmp_path / "ds.json").stage == 1
    with pytest.raises(lm.LumenError, match="dict or the path"):
        lm.deepspeed(2)


def refused(kind):
    if kind == "double":
        return lm.deepspeed({})(step).init(make_state("mlp"))
    if kind == "scalar":
        return zero(3)(step).init(make_state("deep", torch.float32))
    if kind == "lamb":
        return zero(1)(step).init(make_state("mlp", torch.float32, lm.optim.lamb(1e-2)))
    if kind == "tree":
        return zero(1)(step).init(make_state("mlp" if distributed.rank() else "gpt", torch.float32))
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("double", "ParamsError", "net.float()"),
        ("scalar", "ParamsError", "torch.ones(1)"),
        ("lamb", "HyperparameterError", "lamb"),
        ("tree", "WorldError", "rank 0"),
    ],
)
def test_refused_everywhere(kind, name, said, world2):
    with pytest.raises(TaskError) as failed:
        world2.run(refused, kind)
    assert sorted((rank, each) for rank, each, _ in failed.value.errors) == [(0, name), (1, name)]
    assert all(said in message for _, _, message in failed.value.errors)


def test_a_lock_that_a_killed_build_left_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w"):
        assert not any(str(lock) in each for each in missing())  # somebody is building
    assert any(f"rm {lock}" in each for each in missing())
    monkeypatch.setattr(engine, "_open_files", lambda: None)  # a system that does not say who is
    assert not any(str(lock) in each for each in missing())
    os.utime(lock, (0, 0))
    assert any(f"rm {lock}" in each for each in missing())


@pytest.mark.parametrize("stage", [2, 3])
def test_alone_it_leaves_its_world_with_no_thread_of_it(stage, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # which it sets, as the next
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    wrapped = zero(stage)(step)
    held = wrapped.init(make_state("mlp", torch.float32, adamw()))
    held = wrapped(held, batches(1, 4, torch.float32)[0]), wrapped.transforms[0].engine
    assert a_thread_of_gloo_appears()
    leave()
    assert threads() == []
    assert held
    with pytest.raises(StateError, match="no engine"):
        wrapped.export(held[0][0])
