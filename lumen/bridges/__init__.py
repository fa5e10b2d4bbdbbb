"""Between Lumen and others: LightningModules, a state as a module again, Hugging Face's files, LoRA."""

from lumen.bridges import huggingface as huggingface
from lumen.bridges import lora as lora
from lumen.bridges.bound import module as module
from lumen.bridges.lightning_module import Bridged as Bridged
from lumen.bridges.lightning_module import lightning as lightning
