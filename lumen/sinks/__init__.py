"""Sinks: where logged values go. A sink is two methods, `log(step, values)` and `close()`."""

from lumen.sinks.base import Memory as Memory
from lumen.sinks.base import Sink as Sink
from lumen.sinks.base import scalars as scalars
from lumen.sinks.csv import CSV as CSV
from lumen.sinks.jsonl import JSONL as JSONL
from lumen.sinks.tensorboard import TensorBoard as TensorBoard
