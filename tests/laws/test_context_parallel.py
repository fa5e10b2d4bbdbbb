"""What context_parallel and shift_labels promise in one process, for any sequences."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lumen as lm
from lumen.errors import BatchError, HyperparameterError, OrderError
from lumen.parallel.context.attention import ShardedAttention
from lumen.parallel.context.block_attention import Partial, Visibility, attend
from lumen.parallel.context.function_mode import CallSites, SequenceMode
from lumen.parallel.context.loss_check import local_length
from lumen.parallel.context.sequence_shards import SequenceShards


@st.composite
def packed(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Tokens, and the numbers of their documents: [rows, positions]."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    ids = draw(st.lists(st.integers(0, 5), min_size=rows * length, max_size=rows * length))
    ends = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    return torch.tensor(ids).view(rows, length), torch.tensor(ends).view(rows, length).long().cumsum(1)


@given(packed())
def test_a_label_is_the_next_token_of_its_document(batch: tuple[Tensor, Tensor]) -> None:
    ids, documents = batch
    for numbers in (None, documents):
        labels = lm.losses.shift_labels(ids, numbers, ignore_index=-7)
        for row in range(len(ids)):
            for t in range(ids.shape[1]):
                follows = t + 1 < ids.shape[1] and (numbers is None or bool(documents[row, t] == documents[row, t + 1]))
                assert int(labels[row, t]) == (int(ids[row, t + 1]) if follows else -7)


def test_labels_of_other_shapes_are_refused() -> None:
    with pytest.raises(BatchError, match=r"input_ids of shape \[rows, positions\], got \(3,\)"):
        lm.losses.shift_labels(torch.ones(3).long())
    with pytest.raises(BatchError, match=r"documents of the shape of input_ids, \(1, 3\), got \(1, 2\)"):
        lm.losses.shift_labels(torch.ones(1, 3).long(), torch.ones(1, 2).long())


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.sampled_from([None, {"x": 2, "ids": 1}]))
def test_the_shards_of_a_batch_are_the_batch(size: int, local: int, rows: int, dims: dict[str, int] | None) -> None:
    length = size * local
    shape = (rows, length, 2) if dims is None else (rows, 2, length)
    batch = {"ids": torch.arange(rows * length).view(rows, length), "x": torch.randn(shape), "row": torch.arange(rows)}
    shards = SequenceShards.of(batch, dims, None, size)
    own = [shards.shard(batch, index) for index in range(size)]
    for name, leaf in batch.items():
        dim = (dims or {"x": 1, "ids": 1}).get(name)
        assert torch.equal(leaf, own[-1][name] if dim is None else torch.cat([part[name] for part in own], dim))


@given(st.integers(1, 500))
def test_the_check_has_another_length_where_that_is_possible(local: int) -> None:
    length = local_length(local)
    assert length <= local
    assert (length == local) == (local < 4)


def causal(q: Tensor, documents: Tensor) -> Tensor:
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return F.scaled_dot_product_attention(q, q, q, same.tril())


@given(packed(), st.sampled_from([1, 2]))
def test_attention_is_within_documents_in_one_process(batch: tuple[Tensor, Tensor], heads: int) -> None:
    ids, documents = batch
    q = torch.randn(len(ids), heads, ids.shape[1], 3, dtype=torch.float64)
    attention = ShardedAttention(None, ids.shape[1], documents, [])
    torch.testing.assert_close(attention(q, q, q, is_causal=True), causal(q, documents))


@given(packed(), st.integers(1, 3), st.booleans())
def test_attention_to_blocks_of_keys_merges_to_that_of_all(batch: tuple[Tensor, Tensor], size: int, own: bool) -> None:
    """Also where a query sees nothing in some of the blocks."""
    documents = batch[1].repeat(1, size)
    rows, local = batch[1].shape
    q, k, v = torch.randn(3, rows, 1, 1, size * local, 2, dtype=torch.float64)
    for index in range(size):
        visible = Visibility(None, documents if own else None, not own, index, local)
        queries = q.narrow(-2, index * local, local)
        blocks = [
            (rank, k.tensor_split(size, -2)[rank][:, 0], v.tensor_split(size, -2)[rank][:, 0]) for rank in range(size)
        ]
        parts = [attend(queries, *kv, visible, 0, rank) for rank, *kv in blocks if visible.sees(rank)]
        merged = functools.reduce(Partial.merged, parts)
        same = documents[:, None, None, :, None] == documents[:, None, None, None, :]
        mask = same if own else torch.ones(size * local, size * local, dtype=torch.bool).tril()
        wanted = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        torch.testing.assert_close(merged.out, wanted.narrow(-2, index * local, local))


def step(state: Any, batch: Any) -> Any:
    def loss_fn(params: Any, batch: Any) -> Any:
        x = state.apply(params, batch["x"])[0].unsqueeze(1)
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return lm.Mean.of(x.square())

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def test_alone_it_is_the_step() -> None:
    state = lm.TrainState.create(torch.nn.Linear(3, 3), lm.optim.sgd(0.1))
    batch = {"x": torch.randn(2, 5, 3), "documents": torch.tensor([[0, 0, 1, 1, 1]] * 2)}
    wrapped = lm.context_parallel()(step)
    new, metrics = wrapped(wrapped.init(state), batch)
    other, wanted = step(state, batch)
    assert all(map(torch.equal, lm.tree.tensors((new, metrics)), lm.tree.tensors((other, wanted))))
    # Documents count in one process too: the result must not depend on the number of processes.
    _, apart = lm.context_parallel(documents="documents")(step)(state, batch)
    assert float(apart["loss"].compute()) != pytest.approx(float(wanted["loss"].compute()))


class Reads(torch.nn.Module):
    """Places in the code that read ranges."""

    def positions(self, n: int) -> Tensor:
        return torch.arange(n)

    def table(self, x: Tensor, n: int) -> Tensor:
        return x[:, :n]

    def new(self, n: int) -> Tensor:
        return torch.arange(0, n)


@settings(max_examples=20)
@given(st.integers(4, 9), st.integers(0, 2))
def test_ranges_of_positions_are_those_of_the_rank(local: int, index: int) -> None:
    size, reads, sites = 3, Reads(), CallSites()

    def mode(local: int) -> SequenceMode:
        attention: Any = SimpleNamespace(local=local, length=size * local)
        return SequenceMode(attention, index, 1, sites)

    with mode(3):  # of the check: `positions` takes 3 numbers, `table` as many entries of 9
        assert reads.positions(3).tolist() == [3 * index, 3 * index + 1, 3 * index + 2]
        reads.table(torch.arange(20)[None], 3)
        assert torch.arange(local).tolist() == [*range(local)]
    sites.is_recording = False
    own = [*range(index * local, (index + 1) * local)]
    with mode(local):
        assert reads.positions(local).tolist() == own
        assert reads.table(torch.arange(40)[None], local)[0].tolist() == own
        assert reads.positions(local + 1).tolist() == [*range(local + 1)]
        with pytest.raises(lm.errors.LossError, match=r"line \d+, takes the numbers from 0 to .* Are they positions"):
            reads.new(local)


def test_settings_and_neighbors_are_checked() -> None:
    with pytest.raises(HyperparameterError, match=r"sequence_dims=\{\}\) must be a dict"):
        lm.context_parallel(sequence_dims={})
    with pytest.raises(HyperparameterError, match=r"verify=.no.\) must be True or False"):
        lm.context_parallel(verify="no")  # type: ignore[arg-type]
    with pytest.raises(HyperparameterError, match=r"attention='rings'\) must be \"ulysses\", which exchanges"):
        lm.context_parallel(attention="rings")  # type: ignore[arg-type]
    with pytest.raises(OrderError, match=r"lm.accumulate\('auto'\) under lm.context_parallel"):
        lm.compose(lm.context_parallel(), lm.accumulate("auto"))(step)
    with pytest.raises(OrderError, match="context_parallel is outside ddp, but it must be inside"):
        lm.compose(lm.context_parallel(), lm.ddp())
    plan = {"0": lm.parallel.Colwise()}
    for other in (lm.compile(), lm.ensemble(2), lm.dp_sgd(1.0, 0.5), lm.tensor_parallel(plan), lm.deepspeed({})):
        with pytest.raises(OrderError, match=r"cannot be combined with lm.context_parallel"):
            lm.compose(
                *sorted((other, lm.context_parallel()), key=lambda t: t.level in ("context", "dp_sgd", "tensor"))
            )


@given(st.integers(1, 3), st.integers(4, 30), st.integers(0, 9))
def test_an_excerpt_is_a_part_of_the_first_row(size: int, local: int, number: int) -> None:
    """Where no label counts in an excerpt, the next check takes another one."""
    length = size * local
    batch = {"ids": torch.arange(2 * length).view(2, length), "mask": torch.ones(2, 1, length, length)}
    shards = SequenceShards.of(batch, {"ids": 1}, None, size)
    part, own = shards.excerpt(batch, 3, number)
    start = int(part["ids"][0, 0])
    assert part["ids"].tolist() == [[*range(start, start + 3 * size)]]
    assert start + 3 * size <= length
    assert part["mask"].shape == (1, 1, 3 * size, 3 * size)
    assert (own.length, own.local) == (3 * size, 3)
    assert start == 0 or number > 0
