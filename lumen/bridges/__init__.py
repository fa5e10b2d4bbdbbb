"""Interoperate with other libraries: LightningModules, torch modules from states, Hugging Face files, LoRA."""

from lumen.bridges import huggingface, lora
from lumen.bridges._lightning.module import Bridged, lightning
from lumen.bridges.bound import module

__all__ = [
    "Bridged",
    "huggingface",
    "lightning",
    "lora",
    "module",
]


def __dir__() -> list[str]:
    return sorted(__all__)
