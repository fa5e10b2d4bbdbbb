"""Sinks: where logged values go. A sink is two methods, `log(step, values)` and `close()`.

A sink may also keep a run's configuration, show params, and go back to a checkpoint: see `lumen.sinks.optional`.
"""

from lumen.sinks.base import Sink as Sink
from lumen.sinks.base import scalars as scalars
from lumen.sinks.console import Console as Console
from lumen.sinks.csv import CSV as CSV
from lumen.sinks.info import run_info as run_info
from lumen.sinks.jsonl import JSONL as JSONL
from lumen.sinks.media import Histogram as Histogram
from lumen.sinks.media import Image as Image
from lumen.sinks.media import Text as Text
from lumen.sinks.media import figure as figure
from lumen.sinks.media import split as split
from lumen.sinks.memory import Memory as Memory
from lumen.sinks.mlflow import MLflow as MLflow
from lumen.sinks.optional import Configurable as Configurable
from lumen.sinks.optional import Resumable as Resumable
from lumen.sinks.optional import ShowsParams as ShowsParams
from lumen.sinks.optional import configure as configure
from lumen.sinks.optional import position as position
from lumen.sinks.optional import rewind as rewind
from lumen.sinks.optional import show_params as show_params
from lumen.sinks.tensorboard import TensorBoard as TensorBoard
from lumen.sinks.wandb import WandB as WandB
