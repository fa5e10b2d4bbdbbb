"""lm.pipeline in a run: rows, metrics, validation and checkpoints are those of one process; and models of others."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import lumen as lm
from lumen.core import distributed
from lumen.parallel.comm.mesh import mesh
from tests.distributed.models import bare, batches, furthest, make_state, step
from tests.distributed.pipeline_models import TWO

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def evaluate(state, batch):
    out, _ = state.apply(state.params, batch["x"])
    losses = F.cross_entropy(out, batch["y"], reduction="none")
    return {"loss": lm.Mean.of(losses), "rows": lm.Sum(torch.tensor(float(len(out))))}


def run(directory, in_stages, stops=(6,)):
    """A run that ends and resumes at `stops`: its state in full, and what it has logged."""
    cut = [lm.pipeline(mesh(pipeline=-1, device="cpu"), **TWO)] if in_stages else []
    data = batches(1, 24)[0]
    for stop in stops:
        runner = lm.Runner(
            step,
            transforms=[lm.ema(0.9), lm.donate(), *cut],
            checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=3), keep=2),
            sinks=[lm.sinks.JSONL(directory / "metrics.jsonl")],
            log_every=2,
            progress=False,
        )
        result = runner.fit(
            make_state("pipeline_blocks"),
            lm.Loader(data, batch_size=8, seed=2),
            until=lm.Steps(stop),
            validate=lm.Validate(evaluate, lm.Loader(data, batch_size=5), every=lm.Every(steps=3)),
            resume="auto",
        )
    state = bare(runner.step.export(result.state))
    lines = []
    if distributed.rank() == 0:
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "hits", "val/loss", "val/rows", "step", "epoch")
    return state, [{name: line[name] for name in names if name in line} for line in lines]


def test_a_run_in_stages_is_that_of_one_process_also_after_it_resumed(world2, tmp_path):
    for name in ("alone", "stages"):
        (tmp_path / name).mkdir()
    wanted, lines = run(tmp_path / "alone", False)
    (state, logged), (other, _) = world2.run(run, tmp_path / "stages", True, (4, 6))
    for found in (state, other):
        worst, leaf = furthest(found, wanted)
        assert worst < 1e-12, leaf
    assert [line for line in logged if "val/rows" in line][-1]["val/rows"] == 24
    for found, want in zip(logged[-3:], lines[-3:], strict=True):
        assert found == pytest.approx(want)


def huggingface(kind):
    """How far two steps of a causal language model of transformers are from one process, or what refuses it."""
    import transformers as hf

    sizes = {"vocab_size": 11, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 16}
    torch.manual_seed(0)
    if kind == "gpt2":
        small = {"vocab_size": 11, "n_embd": 8, "n_layer": 4, "n_head": 2, "n_positions": 16, "bos_token_id": 0}
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 0}
        net = hf.GPT2LMHeadModel(hf.GPT2Config(**small, **none, tie_word_embeddings=False))
    else:
        net = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, tie_word_embeddings=kind == "tied"))
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
    batch = {"ids": ids, "mask": torch.ones_like(ids)}
    state = lm.TrainState.create(net.double(), lm.optim.adam(1e-2, eps=1e-4))
    cut = lm.pipeline(mesh(pipeline=-1, device="cpu"), **TWO)
    wrapped, losses = cut(language_step), []
    try:
        held = wrapped.init(state)
    except lm.LumenError as error:
        return str(error)
    for _ in range(2):
        held, metrics = wrapped(held, batch)
        state, numbers = language_step(state, batch)
        losses.append(float((metrics["loss"] - numbers["loss"]).abs()))
    return max(losses), *furthest(bare(cut.export(held)), bare(state))


def language_step(state, batch):
    def loss_fn(params, batch):
        out, _ = state.apply(params, input_ids=batch["ids"], attention_mask=batch["mask"])
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_of_transformers_are_cut_between_their_layers(kind, world2):
    pytest.importorskip("transformers")
    for losses, worst, leaf in world2.run(huggingface, kind):
        assert losses < 1e-12
        assert worst < 1e-12, leaf


def test_tied_embeddings_are_refused(world2):
    pytest.importorskip("transformers")
    for message in world2.run(huggingface, "tied"):
        assert "cannot split a model between tied weights" in message
