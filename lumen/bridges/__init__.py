"""Bridges to what is written for other libraries."""

from lumen.bridges.lightning_module import Bridged as Bridged
from lumen.bridges.lightning_module import lightning as lightning
