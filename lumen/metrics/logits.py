"""Logits as predictions: which function converts them to probabilities, and whether torchmetrics has to guess."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lumen.errors import InexactWarning, MetricError
from lumen.metrics.template import MetricTemplate

Form = Literal["sigmoid", "softmax"]

_SOFTMAX = {"MulticlassPrecisionRecallCurve", "MulticlassCalibrationError", "MulticlassHingeLoss"}


def form_of_logits(template: MetricTemplate, required: bool) -> Form | None:
    """The function that a metric, or every metric of a collection, applies to logits; None if there is none.

    If `required`, raises `MetricError` for metrics that differ in it, and if none is a classification metric.
    """
    kinds = [type(node.module) for node in template.nodes if node.is_metric]
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


def convert_predictions(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], form: Form
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of an update with the predictions, which are logits, as probabilities."""
    logits = _predictions(args, kwargs)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        return args, kwargs
    preds = logits.sigmoid() if form == "sigmoid" else logits.softmax(1)
    return (args, {**kwargs, "preds": preds}) if "preds" in kwargs else ((preds, *args[1:]), kwargs)


def guessed_as_logits(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """1 if torchmetrics interprets the predictions as logits, which it does if one is outside [0, 1]; else 0."""
    preds = _predictions(args, kwargs)
    if not isinstance(preds, Tensor):
        return torch.zeros((), dtype=torch.int64)
    return (~((preds >= 0) & (preds <= 1)).all() & preds.is_floating_point()).to(torch.int64)


def _predictions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return kwargs.get("preds", args[0] if args else None)


def warn_if_mixed(metric: object, guessed: int, updates: int) -> None:
    """Warn if torchmetrics interpreted predictions as logits in some updates, and as probabilities in others."""
    if 0 < guessed < updates:
        warnings.warn(
            f"{metric!r}: torchmetrics interprets predictions as logits if one of a batch is outside [0, 1], as in"
            f" {guessed} of {updates} updates, and as probabilities in the others, so the result differs from that"
            " of all the data together. For logits write lm.metrics.from_torchmetrics(metric, logits=True);"
            " otherwise pass probabilities.",
            InexactWarning,
            stacklevel=3,
        )
