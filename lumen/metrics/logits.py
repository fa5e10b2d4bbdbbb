"""Which torchmetrics metrics take logits, and by which function they make probabilities of them."""

from __future__ import annotations

from typing import Literal

from lumen.errors import MetricError
from lumen.metrics.template import Skeleton

Form = Literal["sigmoid", "softmax"]

_SOFTMAX = {"MulticlassPrecisionRecallCurve", "MulticlassCalibrationError", "MulticlassHingeLoss"}


def form_of_logits(skeleton: Skeleton, required: bool) -> Form | None:
    """How a metric, or all of a collection, makes probabilities of logits; None where none does.

    Raises `MetricError`, where it is `required`, for metrics that do so differently, and where none is a classifier's.
    """
    kinds = [type(node.module) for node in skeleton.nodes if node.is_metric]
    forms = {form for kind in kinds if (form := _form(kind)) is not None}
    if not required:
        return forms.pop() if len(forms) == 1 else None
    if len(forms) > 1:
        raise MetricError(
            "logits=True for a collection of metrics of which some take a sigmoid of their predictions and others a"
            " softmax. Make a handle of each kind: from_torchmetrics(MetricCollection([...]), logits=True)."
        )
    if not any(kind.__module__.startswith("torchmetrics.classification") for kind in kinds):
        names = ", ".join(sorted({kind.__name__ for kind in kinds})) or "no metric"
        raise MetricError(f"logits=True is for metrics of torchmetrics.classification, not for {names}. Leave it out.")
    return forms.pop() if forms else None


def _form(kind: type) -> Form | None:
    names = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("torchmetrics.classification")]
    if _SOFTMAX.intersection(names):
        return "softmax"
    return "sigmoid" if any(name.startswith(("Binary", "Multilabel")) for name in names) else None
