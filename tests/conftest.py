"""One thread, fixed seeds and hypothesis profiles for every test."""

import gc
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator

# For the processes that tests start, kernels of notebooks too: two workers share few cores, and OpenMP's threads spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hypothesis
import numpy as np
import pytest
import torch

# On machines with Triton torch would start processes that compile for it, each with seconds of imports.
os.environ.setdefault("TORCH_WARM_POOL", "0")

# Checkpoints are synchronized to their disk, which the tests need not wait for: where memory is a disk, they use that.
_MEMORY = "/dev/shm"
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 2 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _MEMORY)

# A shell that starts a job in the background lets it ignore Ctrl-C, and tests of interrupts inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Sums in one order on every machine, and no threads that fight over few cores.
torch.set_num_threads(1)


class _TorchRandom:
    """Torch's global generator, for hypothesis to seed before each example and put back after."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # hypothesis holds it weakly
hypothesis.register_random(_torch_random)

# No deadlines: the first example of a compiled step takes seconds, the others microseconds.
hypothesis.settings.register_profile("dev", max_examples=20, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_finish() -> None:
    """Garbage collections need not look at what the imports have left, which lives on: a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed every global generator, so that a test does not depend on those before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (third-party code may still draw from it)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget what a test compiled: torch limits recompilations per function for the whole process."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
