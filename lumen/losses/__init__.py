"""Losses that a step cannot write as cheaply by itself, and the labels that they take."""

from lumen.losses._linear_cross_entropy import linear_cross_entropy
from lumen.losses._shift_labels import shift_labels

__all__ = ["linear_cross_entropy", "shift_labels"]


def __dir__() -> list[str]:
    return sorted(__all__)
