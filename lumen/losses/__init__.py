"""Losses that a step cannot write as cheaply by itself."""

from lumen.losses._linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]


def __dir__() -> list[str]:
    return sorted(__all__)
