"""Models of transformers, unmodified, train as they do in a raw loop and in transformers' own Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import lumen as lm

hf = pytest.importorskip("transformers")

from tests.parity.hf_models import MODELS, batches, gpt2, llama, text  # noqa: E402

STEPS = 10
TOLERANCE = 1e-6


def step(state, batch):
    def loss_fn(params, batch):
        out, buffers = state.apply(params, **batch)
        return out.loss, lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}


def raw(net, data):
    """What training is without Lumen: the loss of each step, and after it all tensors of the net."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    for number, batch in enumerate(data):
        torch.manual_seed(number)
        loss = net(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach(), {**dict(net.named_parameters()), **dict(net.named_buffers())}


def furthest(state, tensors, apart=()):
    """The largest difference of any tensor, but of those whose names end in one of `apart`."""
    held = {**state.params, **state.buffers}
    assert held.keys() == tensors.keys()
    names = [name for name in tensors if not name.endswith(tuple(apart))]
    return max(float((held[name] - tensors[name].detach()).abs().max()) for name in names)


@pytest.mark.parametrize("transforms", [[], [lm.donate()], [lm.remat()]], ids=["plain", "donate", "remat"])
@pytest.mark.parametrize("name", MODELS)
def test_each_step_is_that_of_a_raw_loop(name, transforms):
    make, rows = MODELS[name]
    net, data = make(), batches(rows, STEPS)
    if transforms and isinstance(transforms[0], lm.remat):
        net.config.use_cache = False  # remat sees to that; keys out of a cache have other strides, so other sums
    torch_adam = lm.optim.from_torch(torch.optim.AdamW, lr=1e-3, weight_decay=0.01)
    wrapped = lm.compose(*transforms)(step)
    state = wrapped.init(lm.TrainState.create(copy.deepcopy(net), torch_adam))
    losses = []
    for number, (wanted, tensors) in enumerate(raw(net, data)):
        torch.manual_seed(number)  # dropout draws the same numbers
        state, metrics = wrapped(state, data[number])
        assert float(metrics["loss"]) == float(wanted)
        assert furthest(state, tensors) == 0.0
        losses.append(float(wanted))
    assert len(set(losses)) == STEPS
    if name == "resnet":
        assert int(state.buffers["resnet.embedder.embedder.normalization.num_batches_tracked"]) == STEPS


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "reentrant", "transforms"),
    [
        ("gpt2", True, [lm.donate()]),
        ("llama", False, [lm.accumulate(2)]),
        ("bert", False, [lm.donate()]),
        ("vit", False, [lm.compile(backend="eager")]),
    ],
)
def test_gradient_checkpointing_changes_no_number(name, reentrant, transforms):
    make, rows = MODELS[name]
    net, data, calls = make(), batches(rows, 2), []
    net.config.use_cache = False  # as checkpointing has it
    block = next(m for m in net.modules() if isinstance(m, hf.modeling_layers.GradientCheckpointingLayer))
    part = next(block.children())  # a hook of the block itself runs outside of what is recomputed
    part.register_forward_pre_hook(lambda *_: calls.append(name))  # which copies of the module keep
    found, counts = [], []
    for checkpointed in (False, True):
        if checkpointed:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        wrapped = lm.compose(*transforms)(step)
        state = wrapped.init(lm.TrainState.create(copy.deepcopy(net), lm.optim.sgd(0.1)))
        calls.clear()
        for number, batch in enumerate(data):
            torch.manual_seed(number)
            state, _ = wrapped(state, batch)
        found.append(state)
        counts.append(len(calls))
    assert counts[1] > counts[0]  # recomputed
    assert furthest(found[1], {**found[0].params, **found[0].buffers}) < TOLERANCE


class Counted(lm.compile):
    """`lm.compile(blocks=True)` that counts what it compiles."""

    def __init__(self):
        super().__init__(backend="eager", blocks=True)
        self.functions = []  # a transform is frozen, its list is not

    def _compile_block(self, function, example):
        self.functions.append(function)
        return super()._compile_block(function, example)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet"])
def test_blocks_share_one_compiled_form(name):
    """Also where each block knows its number, and without a cache, through which they would hand on objects."""
    net, data = MODELS[name][0](), batches(MODELS[name][1], 3)
    net.config.use_cache = False
    compiled = Counted()
    state = lm.TrainState.create(net, lm.optim.sgd(0.1))
    found = [lm.compose(*around)(step) for around in ([], [compiled])]
    states = [state, state]
    for number, batch in enumerate(data):
        losses = []
        for place, wrapped in enumerate(found):
            torch.manual_seed(number)
            states[place], metrics = wrapped(states[place], batch)
            losses.append(float(metrics["loss"]))
        assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert furthest(states[1], {**states[0].params, **states[0].buffers}) < TOLERANCE
    assert len(compiled.functions) == 1


# Keys have a bias without a gradient in exact arithmetic: Adam makes steps of its rounding noise.
NOISE = ("k_proj.bias", "key.bias", "c_attn.bias")


@pytest.mark.parametrize("name", MODELS)
def test_each_step_with_lumens_own_adamw(name):
    make, rows = MODELS[name]
    net, data = make(), batches(rows, STEPS)
    state = lm.TrainState.create(copy.deepcopy(net), lm.optim.adamw(1e-3, weight_decay=0.01))
    for number, (wanted, tensors) in enumerate(raw(net, data)):
        torch.manual_seed(number)
        state, metrics = step(state, data[number])
        assert abs(float(metrics["loss"] - wanted)) < TOLERANCE
        assert furthest(state, tensors, NOISE) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_a_step_is_one_compiled_region(name):
    # One graph without a break, which would warn; a compiler behind it would take half a minute.
    make, rows = MODELS[name]
    batch = batches(rows, 1)[0]
    state = lm.TrainState.create(make().eval(), lm.optim.adamw(1e-3, eps=1e-4))
    found, metrics = lm.compile(backend="eager")(step)(state, batch)
    wanted, losses = step(state, batch)
    assert abs(float(metrics["loss"] - losses["loss"])) < TOLERANCE
    assert max(float((found.params[k] - p).abs().max()) for k, p in wanted.params.items()) < TOLERANCE


def counted_step(first):
    """A step whose loss counts the labels from column `first`: transformers divides its sum by `num_items_in_batch`."""

    def step(state, batch):
        def loss_fn(params, batch):
            out, _ = state.apply(params, **batch, num_items_in_batch=1)
            return lm.Mean(out.loss, (batch["labels"][:, first:] != -100).sum())

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    return step


def uneven(rows):
    """Rows with very different numbers of tokens, so that means of means would be wrong."""
    batch = text(rows, 16, torch.Generator().manual_seed(3))
    lengths = torch.arange(rows) * 5 % 14 + 3
    mask = (torch.arange(16) < lengths.unsqueeze(1)).long()
    batch |= {"attention_mask": mask, "labels": batch["input_ids"].masked_fill(mask == 0, -100)}
    return [{name: column[row] for name, column in batch.items()} for row in range(rows)]


class Recorder(hf.TrainerCallback):
    """Params after each of the Trainer's steps."""

    def __init__(self):
        self.params: list[dict[str, Tensor]] = []

    def on_step_end(self, args, state, control, model, **_):
        self.params.append({name: p.detach().clone() for name, p in model.named_parameters()})


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


# The Trainer counts a row's first token as a target, which it is not, for models whose class it does not take for a
# causal one by its name, such as GPT2LMHeadModel.
@pytest.mark.parametrize(("make", "first"), [(lambda: gpt2(**NO_DROPOUT), 0), (llama, 1)], ids=["gpt2", "llama"])
def test_a_fine_tuning_is_that_of_the_trainer(make, first, tmp_path):
    datasets = pytest.importorskip("datasets")
    net, seen, recorder = make(), [], Recorder()
    state_net = copy.deepcopy(net)

    def collate(samples):
        seen.append(hf.default_data_collator(samples))
        return dict(seen[-1])

    epochs, rows, micro, parts, warmup = 2, 24, 4, 2, 2
    steps = epochs * rows // (micro * parts)
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=parts,
        learning_rate=5e-3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        warmup_steps=warmup,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    columns = {name: [row[name].tolist() for row in uneven(rows)] for name in ("input_ids", "attention_mask", "labels")}
    trainer = hf.Trainer(
        net, arguments, data_collator=collate, train_dataset=datasets.Dataset.from_dict(columns), callbacks=[recorder]
    )
    trainer.train()
    log = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(log) == len(recorder.params) == steps
    assert len(seen) == steps * parts

    peak, optim = 5e-3, lm.optim
    schedule = optim.join([optim.linear(0.0, warmup, peak), optim.linear(peak, steps - warmup, 0.0)], [warmup])
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(schedule, weight_decay=0.1, decay_mask=optim.matrices))
    state = lm.TrainState.create(state_net.train(), tx)
    wrapped = lm.accumulate(parts)(counted_step(first))
    for number, wanted in enumerate(recorder.params):
        pieces = seen[number * parts : (number + 1) * parts]
        batch = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        state, metrics = wrapped(state, batch)
        assert furthest(state.replace(buffers={}), wanted, NOISE) < TOLERANCE, number
        assert abs(float(metrics["loss"].compute()) - float(log[number]["loss"])) < TOLERANCE
    assert float(log[0]["grad_norm"]) > 1.0, "nothing was clipped"
    assert float(log[-1]["loss"]) < float(log[0]["loss"])


def test_a_router_of_transformers_counts_as_often_as_there_are_tokens():
    config = hf.MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1, router_aux_loss_coef=0.5,
        output_router_logits=True,
    )  # fmt: skip
    torch.manual_seed(0)
    state = lm.TrainState.create(hf.MixtralForCausalLM(config), lm.optim.sgd(0.1)).eval()
    ids = torch.arange(12).reshape(2, 6)
    batch = {"input_ids": ids, "labels": ids}
    expected, _ = state.apply(state.params, **batch)

    out, _ = state.apply(state.params, **batch, num_items_in_batch=1)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    router = config.router_aux_loss_coef * out.aux_loss
    loss = lm.Mean(out.loss + (tokens - 1) * router, tokens)
    torch.testing.assert_close(loss.compute(), expected.loss, rtol=1e-5, atol=0)
    assert not torch.isclose(lm.Mean(out.loss, tokens).compute(), expected.loss, rtol=1e-2)


def classifier_rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 32, (count, 6), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(3, (count,), generator=generator)}


def raw_classifier(net, train, val, epochs, patience):
    """A loop with a warm-up, a validation after each epoch, the best weights, and an early stop."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-2, weight_decay=0.01)
    schedule = hf.get_linear_schedule_with_warmup(optimizer, 3, epochs * len(train))
    losses, best = [], {}
    for _ in range(epochs):
        for batch in train:
            net(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(float(net.eval()(**val).loss))
        net.train()
        if losses[-1] == min(losses):
            best = {name: p.detach().clone() for name, p in net.named_parameters()}
        if len(losses) - 1 - losses.index(min(losses)) == patience:
            break
    return losses, best


def test_a_classifier_is_that_of_a_raw_loop_from_the_warm_up_to_the_hub(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    net = hf.BertForSequenceClassification(hf.BertConfig(**sizes, **dropout, num_attention_heads=2))
    train, val, epochs, patience = classifier_rows(24, 0), classifier_rows(12, 1), 12, 2
    batches = [{name: rows[start : start + 8] for name, rows in train.items()} for start in (0, 8, 16)]
    losses, wanted = raw_classifier(copy.deepcopy(net), batches, val, epochs, patience)
    assert patience < len(losses) < epochs

    def eval_step(state, batch):
        logits = state.apply(state.params, **batch)[0].logits
        return {"loss": lm.Mean.of(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))}

    lr = lm.optim.join([lm.optim.linear(0.0, 3, 3e-2), lm.optim.linear(3e-2, epochs * 3 - 3, 0.0)], [3])
    state = lm.TrainState.create(net, lm.optim.adamw(lr, weight_decay=0.01))
    runner = lm.Runner(
        step,
        transforms=[lm.donate()],
        callbacks=[lm.EarlyStop(monitor="val/loss", patience=patience)],
        checkpoint=lm.Checkpointer(tmp_path / "run", monitor="val/loss"),
        progress=False,
    )
    result = runner.fit(
        state,
        lm.Loader(train, batch_size=8, shuffle=False),
        until=lm.Epochs(epochs),
        validate=lm.Validate(eval_step, lm.Loader(val, batch_size=5, shuffle=False)),
    )
    assert result.history["val/loss"][1] == pytest.approx(losses, abs=1e-5)
    best = lm.checkpoint.restore(runner.checkpoint.best(), state)
    saved = lm.bridges.huggingface.save_pretrained(best, tmp_path / "hub")
    again = hf.AutoModelForSequenceClassification.from_pretrained(saved)
    for name, p in again.named_parameters():
        assert torch.equal(p, best.params[name])
        torch.testing.assert_close(p.detach(), wanted[name], rtol=0, atol=1e-5)
