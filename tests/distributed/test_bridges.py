"""What comes over a bridge, spread over processes."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.core import distributed
from tests.distributed.models import furthest, part

pytestmark = pytest.mark.distributed


def lightning_parts(strategy):
    """How far the params of a LightningModule come from those of one process on all rows, and its metrics."""
    import lightning as L
    from torch import nn

    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])

        def forward(self, x):
            return self.blocks(x)

        def training_step(self, batch, batch_idx):
            loss = (self(batch["x"]) - batch["y"]).square().mean()
            self.log("train_loss", loss, on_epoch=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    torch.manual_seed(0)
    bridged = lm.bridges.lightning(Model().double())
    whole = {"x": torch.randn(8, 6).double(), "y": torch.randn(8, 6).double()}
    wrapped = {"ddp": lm.ddp, "fsdp": lm.fsdp}[strategy]()(bridged.step)
    found, wanted = wrapped.init(bridged.state), bridged.state
    for _ in range(3):
        found, _ = wrapped(found, part(whole, [5, 3], distributed.rank()))
        wanted, _ = bridged.step(wanted, whole)
    return furthest(wrapped.export(found).params, wanted.params)[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_lightning_module_on_two_processes(strategy, world2):
    assert max(world2.run(lightning_parts, strategy)) < 1e-10
