"""`lm.remat(offload=True)`: the law, and what is moved to the host.

A tensor on the CPU stays where it is, so most tests here have it count as one on a device: its copies are then made as
on a device that cannot copy beside its computation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import lumen as lm
from lumen import errors
from lumen.transforms._support import host_offload
from lumen.transforms._support.host_offload import HostOffload

from .models import MODELS, Job, assert_same, jobs, train
from .table import STEPS
from .test_remat import ROWS, STACKS, TOKENS, WIDTH, Net, batch_of, state_of, step, trained

aten = torch.ops.aten
INPUT = ROWS * TOKENS * WIDTH * 8  # bytes of a block's input


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The copies on the host; tensors on the CPU count as ones on a device."""
    copies: list[Tensor] = []
    pack = HostOffload.pack

    def recorded(self: HostOffload, tensor: Tensor) -> Any:
        packed = pack(self, tensor)
        if not isinstance(packed, Tensor):
            copies.append(packed.copy)
        return packed

    with monkeypatch.context() as patch:
        patch.setattr(host_offload, "_is_host", lambda device: False)
        patch.setattr(host_offload, "_LEAST", 1)
        patch.setattr(HostOffload, "pack", recorded)
        yield copies


@pytest.mark.parametrize(
    "save", [None, "matmuls", "attention", lambda operator: True], ids=["no", "matmuls", "attention", "all"]
)
def test_training_is_bitwise_the_same(save: Any, copied: list[Tensor]) -> None:
    assert_same(trained(lm.remat(save=save, offload=True)), trained(), exact=True)
    assert copied


@settings(max_examples=15)
@given(job=jobs(tuple(name for name in MODELS if name != "linear")))
def test_any_model_on_the_host(job: Job) -> None:
    transform = lm.remat(lambda name, module: not list(module.children()), save=lambda operator: True, offload=True)
    torch.manual_seed(3)
    expected = train(job.step, job.state(), job.batches(STEPS))
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_offload, "_is_host", lambda device: False)
        assert_same(train(transform(job.step), job.state(), job.batches(STEPS)), expected, exact=True)


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_with_it_is_the_stack_without(name: str, copied: list[Tensor]) -> None:
    around = [make() for make in STACKS[name]]
    assert_same(trained(*around, lm.remat(save="matmuls", offload=True)), trained(*around), exact=True)
    assert copied


def one_step(transform: lm.Transform, net: nn.Module) -> None:
    transform(step)(state_of(net), batch_of())


def test_without_save_it_moves_the_inputs_of_blocks(copied: list[Tensor]) -> None:
    one_step(lm.remat(offload=True), Net(depth=3))
    assert [copy.untyped_storage().nbytes() for copy in copied] == 3 * [INPUT]


def test_with_save_it_moves_what_is_kept_too(copied: list[Tensor]) -> None:
    one_step(lm.remat(save=[aten.addmm], offload=True), Net(depth=2))
    widths = [1, 3, 1, 2, 1]  # the input, and four layers
    assert [copy.untyped_storage().nbytes() for copy in copied] == 2 * [width * INPUT for width in widths]


class Shared(nn.Module):
    """Its blocks are handed one of its params, a buffer, a mask and the batch beside their input."""

    class Block(nn.Linear):
        def forward(self, x: Tensor, *, scale: Tensor, shift: Tensor, mask: Tensor, batch: Tensor) -> Tensor:
            return super().forward(x).tanh() * scale + shift * mask + batch

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.ones(4))
        self.blocks = nn.ModuleList(Shared.Block(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mask, hidden = (x > 0).to(x.dtype), x * self.scale
        for block in self.blocks:
            hidden = block(hidden, scale=self.scale, shift=self.shift, mask=mask, batch=x)
        return hidden


def test_params_buffers_masks_and_the_batch_stay(copied: list[Tensor]) -> None:
    state = state_of(Shared())
    assert_same(trained(lm.remat(offload=True), state=state), trained(state=state), exact=True)
    assert len(copied) == STEPS * 2
    assert {copy.shape for copy in copied} == {(ROWS, TOKENS, 4)}


def test_an_input_by_keyword_is_moved(copied: list[Tensor]) -> None:
    class Named(nn.Linear):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states).tanh()

    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(4, 4), nn.ModuleList(Named(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = block(hidden_states=x)
            return x

    state = state_of(ByKeyword())
    assert_same(trained(lm.remat(offload=True), state=state), trained(state=state), exact=True)
    assert len(copied) == STEPS * 2


def test_on_the_host_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostOffload, "_beside", None)  # a copy would raise
    assert_same(trained(lm.remat(save="matmuls", offload=True)), trained(), exact=True)
    compiled = lm.compile(backend="eager")
    assert_same(trained(compiled, lm.remat(offload=True)), trained(compiled), exact=True)


class Writing(nn.Linear):
    """Writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2.0)).tanh()


def writing() -> lm.TrainState:
    return state_of(nn.Sequential(nn.Linear(4, 4), Writing(4, 4)))


def test_an_input_that_is_written_to_is_moved_before(copied: list[Tensor]) -> None:
    state = writing()
    assert_same(trained(lm.remat(Writing, offload=True), state=state), trained(state=state), exact=True)


def test_an_input_on_the_host_that_is_written_to() -> None:
    with pytest.raises(errors.StepError, match="changed in place after the block had received it"):
        trained(lm.remat(Writing, offload=True), state=writing())


def test_a_graph_cannot_hold_the_copies(copied: list[Tensor]) -> None:
    with pytest.raises(errors.StepError, match=r"cannot be recorded by lm.compile\(\).*blocks=True"):
        lm.compose(lm.compile(backend="eager"), lm.remat(offload=True))(step)(state_of(), batch_of())


def test_compiled_blocks(copied: list[Tensor]) -> None:
    around = lm.compile(blocks=True, backend="eager")
    state = state_of(Net(dropout=0.0))
    assert_same(trained(around, lm.remat(offload=True), state=state), trained(around, state=state))
    assert copied


def test_a_plan_counts_the_host_apart() -> None:
    def planned(device: str, *stack: lm.Transform) -> Any:
        wrapped = lm.compose(*stack)(step)
        return lm.plan(wrapped, lambda: state_of(Net(0.0, depth=6)), batch_of(64), world_size=1, device=device)

    kept, moved = planned("h100", lm.remat(save="matmuls")), planned("h100", lm.remat(save="matmuls", offload=True))
    inputs = 6 * 64 * TOKENS * WIDTH * 8
    assert kept.host.nbytes == 0
    assert 8 * inputs < moved.host.nbytes < 10 * inputs
    assert moved.peak.nbytes < kept.peak.nbytes - 6 * inputs
    assert planned("cpu", lm.remat(offload=True)).host.nbytes == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("save", [None, "matmuls"])
def test_on_a_gpu(save: Any) -> None:
    def on_gpu(*stack: lm.Transform) -> Any:
        wrapped = lm.compose(*stack)(step)
        state = lm.tree.map(lambda x: x.cuda() if isinstance(x, Tensor) else x, state_of())
        torch.manual_seed(5)
        return train(wrapped, state, [batch_of().cuda()] * STEPS)

    assert_same(on_gpu(lm.remat(save=save, offload=True)), on_gpu(), exact=True)
