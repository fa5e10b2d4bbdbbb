"""`lm.plan`: predict memory, communication and time of a run on many devices, in one process without them."""

from lumen.planner.plan import measure
from lumen.planner.report import Plan

__all__ = [
    "Plan",
    "measure",
]


def __dir__() -> list[str]:
    return sorted(__all__)
