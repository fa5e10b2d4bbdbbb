"""What transforms of your own need: the three primitives, rules for them, and slots in the state."""

from lumen.core.primitives import ApplyCall, Gradient, GradientCall, UpdateCall
from lumen.core.pytree_dataclass import param_field
from lumen.core.rules import Primitive, rule_context, with_rules
from lumen.core.step import add_slot, slot, with_slot, without_slot

__all__ = [
    "ApplyCall",
    "Gradient",
    "GradientCall",
    "Primitive",
    "UpdateCall",
    "add_slot",
    "param_field",
    "rule_context",
    "slot",
    "with_rules",
    "with_slot",
    "without_slot",
]


def __dir__() -> list[str]:
    return sorted(__all__)
