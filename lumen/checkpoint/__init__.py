"""Checkpoints in Orbax's format: written in the background, complete or invisible, checked when they are read."""

from lumen.checkpoint import rng as rng
from lumen.checkpoint.convert import export as export
from lumen.checkpoint.matching import restore as restore
from lumen.checkpoint.reading import listed as listed
from lumen.checkpoint.reading import load as load
from lumen.checkpoint.reading import metadata as metadata
from lumen.checkpoint.store import Store as Store
from lumen.checkpoint.writing import save as save
