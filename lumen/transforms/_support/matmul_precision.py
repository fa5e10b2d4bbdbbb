"""How torch multiplies matrices of float32, set for a while and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# By what a policy says; the values are those of torch.set_float32_matmul_precision.
PRECISIONS = {"tf32": "high", "ieee": "highest"}


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Products of float32 matrices in "tf32" (19 bits of each factor, on GPUs that have it) or "ieee" (all of them).

    The setting is the process's, not the thread's; it is what it was again afterwards.

    >>> before = torch.get_float32_matmul_precision()
    >>> with float32_products("tf32"):
    ...     torch.get_float32_matmul_precision()
    'high'
    >>> torch.get_float32_matmul_precision() == before
    True
    """
    # torch has an old setting and one for each backend. Only the old one sets all alike, and the compiler reads both;
    # but it writes "ieee" where a backend had none of its own, so these are kept too.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    own = [backend.fp32_precision for backend in backends]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the backends were set apart from it, and it has not been touched
        before = "highest"
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, setting in zip(backends, own, strict=True):
            backend.fp32_precision = setting
