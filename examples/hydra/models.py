"""The models that `conf/model/` names."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """Residual blocks of two linear layers, on raw pixels."""

    def __init__(self, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] for images [B, 1, 8, 8]."""
        x = self.stem(images.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class ConvNet(nn.Module):
    """Two convolutions, each normalized in groups of channels, and a linear head."""

    def __init__(self, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_block(*channels) for channels in ((1, width), (width, 2 * width))))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * 4, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] for images [B, 1, 8, 8]."""
        return self.head(self.blocks(images))


def _block(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU(), nn.MaxPool2d(2))
