"""`datasets` and the collators of transformers under a Loader: the same batches wherever one begins."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import DataLoader

import lumen as lm

hf = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from tests.parity.hf_models import bert  # noqa: E402

TEXT = "a transform changes how a step is computed, never what; values travel as sums with their weights. "
TOKENIZER = hf.ByT5Tokenizer()  # bytes are its vocabulary: it has no file


def rows():
    """Lines of several lengths, tokenised by `map` as one does."""
    lines = [TEXT[start : start + 5 + start % 17] for start in range(26)]
    data = datasets.Dataset.from_dict({"text": lines})
    return data.map(lambda row: TOKENIZER(row["text"]), remove_columns="text")


MASKED = hf.DataCollatorForLanguageModeling(TOKENIZER, mlm=False)


def hide(samples):
    """Pads as the collator does, and hides a fifth of the tokens at random, as masked language models want it."""
    batch = MASKED(samples)
    hidden = (torch.rand(batch["input_ids"].shape) < 0.2) & (batch["attention_mask"] == 1)
    hidden[:, 0] = True
    batch["labels"] = batch["input_ids"].masked_fill(~hidden, -100)
    batch["input_ids"] = batch["input_ids"].masked_fill(hidden, 2)
    return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_dicts_of_tensors_and_go_on_exactly(workers):
    make = lambda: lm.Loader(rows(), batch_size=4, seed=3, collate=hide, workers=workers)  # noqa: E731
    whole = list(make())
    assert len(whole) == 7
    assert all(type(batch) is dict for batch in whole)
    assert len({batch["input_ids"].shape[1] for batch in whole}) > 1, "padded to the longest of its batch"
    first = make()
    taken = list(itertools.islice(first, 3))
    second = make()
    second.load_state_dict(first.state_dict())
    for wanted, found in zip(whole, [*taken, *second], strict=True):
        assert wanted.keys() == found.keys() == {"input_ids", "attention_mask", "labels"}
        assert all(torch.equal(wanted[name], found[name]) for name in wanted), "what the collator draws too"


def test_a_tokenizers_own_mapping_is_a_dict():
    pad = hf.DataCollatorWithPadding(TOKENIZER)
    assert type(pad([rows()[0]])) is not dict
    (batch,) = lm.Loader(rows(), batch_size=26, collate=pad, shuffle=False)
    assert type(batch) is dict
    assert batch["input_ids"].shape[0] == 26


def step(state, batch):
    def loss_fn(params, batch):
        return state.apply(params, **batch)[0].loss

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def test_a_run_goes_on_within_an_epoch_as_if_nothing_had_happened(tmp_path):
    net = bert(vocab_size=300, max_position_embeddings=64, num_hidden_layers=1)

    def fit(directory, steps, resume="never"):
        state = lm.TrainState.create(net, lm.optim.sgd(1e-2))  # no memory: few leaves to save
        runner = lm.Runner(step, checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=4)), progress=False)
        torch.manual_seed(5)
        data = lm.Loader(rows(), batch_size=4, collate=hide)
        return runner.fit(state, data, until=lm.Steps(steps), resume=resume).state

    whole = fit(tmp_path / "whole", 10)
    fit(tmp_path / "parts", 5)
    parts = fit(tmp_path / "parts", 10, "auto")
    assert all(torch.equal(p, parts.params[name]) for name, p in whole.params.items())


def test_a_torch_loader_with_a_collator_feeds_a_run():
    pad = hf.DataCollatorWithPadding(TOKENIZER)
    data = DataLoader(rows(), batch_size=13, collate_fn=pad)
    seen = []

    def count(state, batch):
        seen.append(type(batch))
        return state, {"rows": lm.Sum.of(torch.ones(len(batch["input_ids"])))}

    state = lm.TrainState.create(torch.nn.Linear(1, 1), lm.optim.sgd(0.1))
    lm.Runner(count, progress=False).fit(state, data, until=lm.Steps(2))
    assert seen == [dict, dict]
