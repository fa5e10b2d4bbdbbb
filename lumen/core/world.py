"""Which of how many processes this is: the one place that asks `torch.distributed`."""

from __future__ import annotations

import torch.distributed as dist


def is_distributed() -> bool:
    """Whether this process belongs to a group of several, or of one that was set up as a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number; 0 alone, and before `lm.mesh` or a parallel transform has joined the processes.

    >>> import lumen as lm
    >>> if lm.rank() == 0:
    ...     print("once, however many processes there are")
    once, however many processes there are
    """
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes there are; 1 alone, and before they are joined.

    >>> import lumen as lm
    >>> lm.world_size()
    1
    """
    return dist.get_world_size() if is_distributed() else 1
