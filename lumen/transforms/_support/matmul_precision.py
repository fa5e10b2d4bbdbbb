"""Torch's precision for float32 matrix products, set temporarily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Names in a Policy, and the values of torch.set_float32_matmul_precision.
PRECISIONS = {"tf32": "high", "ieee": "highest"}


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Multiply float32 matrices in "tf32" (19 bits of each factor, on GPUs that support it) or "ieee" (all 32 bits).

    The setting applies to the process, not to the thread, and is restored afterwards.

    >>> before = torch.get_float32_matmul_precision()
    >>> with float32_products("tf32"):
    ...     torch.get_float32_matmul_precision()
    'high'
    >>> torch.get_float32_matmul_precision() == before
    True
    """
    # Torch has a legacy setting and one per backend. Only the legacy one sets all backends, and the compiler reads
    # both. But it writes "ieee" to a backend that had no setting, so the backends' settings are restored too.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    backend_settings = [backend.fp32_precision for backend in backends]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the backends were set individually, and the legacy setting was not
        before = "highest"
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, setting in zip(backends, backend_settings, strict=True):
            backend.fp32_precision = setting
