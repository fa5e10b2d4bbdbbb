"""Packed rows: each token is predicted once in an epoch, and a packed row is its documents, each alone."""

import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lumen as lm
from lumen.data.bin_packing import assign, best_fit
from lumen.errors import BatchError

documents = st.lists(st.integers(1, 9), min_size=1, max_size=30).map(
    lambda sizes: [[100 * i + j for j in range(size)] for i, size in enumerate(sizes)]
)


def pairs(rows):
    """(token, target) of all places that count."""
    return [
        (token, target)
        for row in rows
        for token, target in zip(row["tokens"].tolist(), row["targets"].tolist(), strict=True)
        if target != -100
    ]


def expected(docs):
    return [(a, b) for doc in docs for a, b in itertools.pairwise(doc)]


@settings(max_examples=60)
@given(docs=documents, length=st.integers(8, 20), seed=st.integers(-5, 5), epoch=st.integers(0, 3))
def test_each_token_is_predicted_once(docs, length, seed, epoch):
    if max(map(len, docs)) == 1:
        with pytest.raises(BatchError, match="none has two tokens"):
            lm.data.Packed(docs, length)
        return
    rows = lm.data.Packed(docs, length, seed=seed)
    rows.set_epoch(epoch)
    assert sorted(pairs(rows[i] for i in range(len(rows)))) == sorted(expected(docs))
    for row in (rows[i] for i in range(len(rows))):
        assert {leaf.shape for leaf in row.values()} == {(length,)}
        assert {leaf.dtype for leaf in row.values()} == {torch.int64}
        for number in row["documents"].unique().tolist():
            inside = row["documents"] == number
            if not number:
                assert set(row["tokens"][inside].tolist()) <= {0}
                assert set(row["targets"][inside].tolist()) <= {-100}
                continue
            doc = docs[row["tokens"][inside][0].item() // 100]
            assert row["tokens"][inside].tolist() == doc[:-1]  # whole, and in its order
            assert row["positions"][inside].tolist() == list(range(len(doc) - 1))


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    size=st.integers(12, 30),
    seed=st.integers(0, 9),
)
def test_each_document_has_room_once(sizes, size, seed):
    lengths = np.array(sizes)
    groups = best_fit(*np.unique(lengths, return_counts=True), size)
    plan = assign(groups, lengths, lm.data.permute(len(sizes), seed, 0, np.arange(len(sizes))))
    assert sorted(plan.documents.tolist()) == list(range(len(sizes)))
    used = [lengths[row].sum() for row in np.split(plan.documents, plan.offsets[1:-1])]
    assert max(used) <= size
    assert len(used) == sum(group.rows for group in groups)


def naive_best_fit(lengths, size):
    """Document by document, as the algorithm is defined."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=size)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@settings(max_examples=80)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=80), size=st.integers(20, 64))
def test_groups_are_those_of_best_fit_document_by_document(sizes, size):
    groups = best_fit(*np.unique(sizes, return_counts=True), size)
    rooms = [size - sum(a * b for a, b in group.contents) for group in groups for _ in range(group.rows)]
    assert sorted(rooms) == naive_best_fit(sizes, size)


class Attention(nn.Module):
    """A causal layer with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(40, 8), nn.Embedding(16, 8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 40)

    def forward(self, tokens, positions, mask):
        x = self.tokens(tokens) + self.positions(positions)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        causal = mask is None
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2).flatten(2)
        return self.head(x)


def test_a_packed_row_is_its_documents_each_alone():
    torch.manual_seed(0)
    docs = [torch.randint(40, (n,)) for n in (3, 9, 2, 5, 7, 4, 2, 11)]
    net = Attention().double()
    rows = lm.data.Packed(docs, 16)
    batch = next(iter(lm.Loader(rows, batch_size=len(rows))))
    out = net(batch["tokens"], batch["positions"], lm.data.document_mask(batch["documents"]))
    loss = F.cross_entropy(out.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    alone = [
        F.cross_entropy(net(d[None, :-1], torch.arange(len(d) - 1)[None], None)[0], d[1:], reduction="sum")
        for d in docs
    ]
    packed_grads = torch.autograd.grad(loss, [*net.parameters()])
    alone_grads = torch.autograd.grad(sum(alone), [*net.parameters()])
    torch.testing.assert_close(loss, sum(alone), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed_grads, alone_grads, rtol=1e-9, atol=1e-12)


def test_a_model_of_transformers_finds_the_documents_by_their_positions():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    net = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=32))
    state = lm.TrainState.create(net, lm.optim.sgd(0.1))
    docs = [torch.randint(40, (n,)) for n in (6, 9, 4)]
    rows = lm.data.Packed(docs, 16)
    assert len(rows) == 1
    batch = {name: leaf[None] for name, leaf in rows[0].items()}
    places = {"input_ids": batch["tokens"], "position_ids": batch["positions"]}
    out, _ = state.apply(state.params, **places, use_cache=False)
    loss = F.cross_entropy(out.logits[0], batch["targets"][0], reduction="sum")
    alone = sum(
        F.cross_entropy(state.apply(state.params, input_ids=d[None, :-1])[0].logits[0], d[1:], reduction="sum")
        for d in docs
    )
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_packs_anew_in_each_epoch(workers):
    docs = [[100 * i + j for j in range(2 + i % 5)] for i in range(40)]
    rows = lm.data.Packed(docs, 8, seed=3)
    loader = lm.Loader(rows, batch_size=3, seed=1, workers=workers)
    epochs = [[*loader.epoch(epoch)] for epoch in (0, 1)]
    found = [[batch["tokens"] for batch in epoch] for epoch in epochs]
    for epoch in epochs:
        rows_of = [{name: leaf[i] for name, leaf in b.items()} for b in epoch for i in range(len(b["tokens"]))]
        assert sorted(pairs(rows_of)) == sorted(expected(docs))
    contents = [{tuple(row.tolist()) for batch in epoch for row in batch} for epoch in found]
    assert contents[0] != contents[1], "other documents share a row"
    assert len(contents[0]) == len(contents[1]) == len(rows)
    resumed = [batch["tokens"] for batch in loader.epoch(1, start=2)]
    assert all(map(torch.equal, resumed, found[1][2:]))
    parts = [lm.Loader(rows, 3, seed=1, rank=rank, world_size=2).epoch(1) for rank in range(2)]
    joined = [torch.cat([a["tokens"], b["tokens"]]) for a, b in zip(*parts, strict=True)]
    assert all(map(torch.equal, joined, found[1]))


def test_long_documents():
    docs = [list(range(12)), [20, 21]]
    with pytest.raises(BatchError, match=re.escape("document 0 has 12 tokens, and a row of length 5 has room for 6")):
        lm.data.Packed(docs, 5)
    split = lm.data.Packed(docs, 5, overflow="split")
    assert sorted(pairs(split[i] for i in range(len(split)))) == sorted(expected(docs))
    cut = lm.data.Packed(docs, 5, overflow="truncate")
    assert sorted(pairs(cut[i] for i in range(len(cut)))) == sorted(expected([docs[0][:6], docs[1]]))


def test_labels_say_what_is_predicted():
    docs = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], "text": "…"}]
    row = lm.data.Packed(docs, 4, labels="labels")[0]
    assert row["tokens"].tolist() == [1, 2, 3, 0]
    assert row["targets"].tolist() == [-100, 3, 4, -100]


def test_realistic_lengths_leave_little_padding():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(180) - 0.5, 1.0, 20_000), 2, 1025).astype(int)

    class Documents:
        def __len__(self):
            return len(lengths)

        def __getitem__(self, index):
            return np.zeros(lengths[index], np.int32)

    rows = lm.data.Packed(Documents(), 1024, lengths=lengths)
    assert rows.filled >= 0.99
    padded = (lengths - 1).sum() / (len(lengths) * 1024)
    assert rows.filled / padded >= 3, "real tokens in a batch, beside one document in a row"


def test_only_documents_that_are_used_are_read():
    class Documents(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    docs = Documents([[1, 2, 3]] * 10)
    rows = lm.data.Packed(docs, 4, lengths=[3] * 10)
    assert docs.read == 0
    assert rows[0]["tokens"].tolist() == [1, 2, 1, 2]
    assert docs.read == 2


@pytest.mark.parametrize(
    ("docs", "kwargs", "message"),
    [
        ([[1, 2]], {"length": 0}, "length is 0"),
        ([[1, 2]], {"overflow": "cut"}, '"raise", "split" or "truncate"'),
        (iter([[1, 2]]), {}, "Packed(list(stream), ...)"),
        ({"input_ids": [[1, 2]]}, {}, "a map-style data set of documents"),
        (["text"], {}, "Tokenize texts first"),
        ([], {}, "none has two tokens"),
        ([{"ids": [1, 2]}], {}, "has no entry 'input_ids'; it has 'ids'"),
        ([[1, 2]], {"lengths": [2, 3]}, "one integer for each of 1 documents"),
    ],
)
def test_bad_input(docs, kwargs, message):
    with pytest.raises(BatchError, match=re.escape(message)):
        lm.data.Packed(docs, **{"length": 8, **kwargs})


@pytest.mark.parametrize(
    ("docs", "kwargs", "message"),
    [
        ([[1.5, 2.0]], {}, "1-D arrays of integers"),
        ([[[1], [2]]], {}, "1-D arrays of integers"),
        ([[1, 2, 3]], {"lengths": [2]}, "has 3 tokens, and `lengths` says 2"),
        ([{"input_ids": [1, 2], "labels": [1]}], {"labels": "labels"}, "2 tokens and 1 labels"),
    ],
)
def test_bad_documents_are_named_when_they_are_read(docs, kwargs, message):
    rows = lm.data.Packed(docs, 8, **kwargs)
    with pytest.raises(BatchError, match=re.escape(message)):
        rows[0]


def test_masks():
    mask = lm.data.document_mask(torch.tensor([[1, 1, 2, 0]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask.any(-1).all()
    assert not mask[0, 0, 2, 1]
    both = lm.data.document_mask(torch.tensor([[1, 1, 2, 0]]), causal=False)
    assert torch.equal(both[0, 0].int(), torch.block_diag(torch.ones(2, 2), torch.ones(1), torch.ones(1)).int())
    with pytest.raises(BatchError, match=r"\[B, T\]; got \(4,\)"):
        lm.data.document_mask(torch.ones(4))
