"""Find the function with which a torchmetrics metric converts logits to probabilities."""

from __future__ import annotations

from typing import Literal

from lumen.errors import MetricError
from lumen.metrics.template import Skeleton

Form = Literal["sigmoid", "softmax"]

_SOFTMAX = {"MulticlassPrecisionRecallCurve", "MulticlassCalibrationError", "MulticlassHingeLoss"}


def form_of_logits(skeleton: Skeleton, required: bool) -> Form | None:
    """The function that a metric, or every metric of a collection, applies to logits; None if there is none.

    If `required`, raises `MetricError` for metrics that differ in it, and if none is a classification metric.
    """
    kinds = [type(node.module) for node in skeleton.nodes if node.is_metric]
    forms = {form for kind in kinds if (form := _form(kind)) is not None}
    if not required:
        return forms.pop() if len(forms) == 1 else None
    if len(forms) > 1:
        raise MetricError(
            "logits=True for a collection in which some take a sigmoid of their predictions and others a softmax."
            " Make one handle for each kind: from_torchmetrics(MetricCollection([...]), logits=True)."
        )
    if not any(kind.__module__.startswith("torchmetrics.classification") for kind in kinds):
        names = ", ".join(sorted({kind.__name__ for kind in kinds})) or "no metric"
        raise MetricError(f"logits=True is for metrics of torchmetrics.classification, not for {names}. Omit it.")
    return forms.pop() if forms else None


def _form(kind: type) -> Form | None:
    names = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("torchmetrics.classification")]
    if _SOFTMAX.intersection(names):
        return "softmax"
    return "sigmoid" if any(name.startswith(("Binary", "Multilabel")) for name in names) else None
