"""Sinks write logged values. A sink has two methods, `log(step, values)` and `close()`.

A sink may also store a run's configuration, show params, and rewind to a checkpoint: see `lumen.sinks.optional`.
"""

from lumen.sinks.aim import Aim
from lumen.sinks.base import Sink, scalars
from lumen.sinks.clearml import ClearML
from lumen.sinks.comet import Comet
from lumen.sinks.console import Console
from lumen.sinks.csv import CSV
from lumen.sinks.info import run_info
from lumen.sinks.jsonl import JSONL
from lumen.sinks.media import Histogram, Image, Text, figure, split
from lumen.sinks.memory import Memory
from lumen.sinks.mlflow import MLflow
from lumen.sinks.optional import Configurable, Resumable, ShowsParams, configure, position, rewind, show_params
from lumen.sinks.tensorboard import TensorBoard
from lumen.sinks.trackio import Trackio
from lumen.sinks.wandb import WandB

__all__ = [
    "CSV",
    "JSONL",
    "Aim",
    "ClearML",
    "Comet",
    "Configurable",
    "Console",
    "Histogram",
    "Image",
    "MLflow",
    "Memory",
    "Resumable",
    "ShowsParams",
    "Sink",
    "TensorBoard",
    "Text",
    "Trackio",
    "WandB",
    "configure",
    "figure",
    "position",
    "rewind",
    "run_info",
    "scalars",
    "show_params",
    "split",
]


def __dir__() -> list[str]:
    return sorted(__all__)
