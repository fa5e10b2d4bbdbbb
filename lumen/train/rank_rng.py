"""Restores the random generators of a rank, or seeds them if the number of ranks has changed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lumen.checkpoint import rng
from lumen.core import distributed


def restore_rng(own: Mapping[str, Any] | None, main: Mapping[str, Any]) -> None:
    """Restore this rank's `own` generators; if it has none, seed them from those of the `main` rank."""
    if own is not None:
        rng.restore(own)
        return
    text = main["torch"].numpy().tobytes() + "{}/{}".format(*distributed.rows()).encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the one that user code draws from)
