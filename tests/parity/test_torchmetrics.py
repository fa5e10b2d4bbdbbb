"""Metrics from torchmetrics: parts of the data, merged in any grouping, give what torchmetrics gives for all of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor
from torchmetrics import classification as cl
from torchmetrics import image, regression, retrieval, text
from torchmetrics.utilities.data import _squeeze_if_scalar, dim_zero_cat

import lumen as lm
from lumen.metrics import from_torchmetrics

N = 60
CLASSES = 5
WORDS = ["a", "cat", "sat", "on", "the", "mat", "dog", "ran", "far", "away"]

# Said by torchmetrics whenever one of these is made.
pytestmark = pytest.mark.filterwarnings("ignore:Metric `.*` will save all targets and predictions:UserWarning")

Make = Callable[[], Any]
Data = Callable[[], dict[str, Any]]


def logits() -> dict[str, Any]:
    return {"preds": torch.randn(N, CLASSES), "target": torch.randint(CLASSES, (N,))}


def binary() -> dict[str, Any]:
    return {"preds": torch.rand(N), "target": torch.randint(2, (N,))}


def multilabel() -> dict[str, Any]:
    return {"preds": torch.rand(N, CLASSES), "target": torch.randint(2, (N, CLASSES))}


def labelled_pixels() -> dict[str, Any]:
    return {"preds": torch.rand(N, CLASSES, 3), "target": torch.randint(2, (N, CLASSES, 3))}


def numbers() -> dict[str, Any]:
    target = torch.randn(N)
    return {"preds": target + torch.randn(N), "target": target}


def vectors() -> dict[str, Any]:
    target = torch.randn(N, 2)
    return {"preds": target + 0.3 * torch.randn(N, 2), "target": target}


def images() -> dict[str, Any]:
    target = torch.rand(N // 5, 1, 16, 16)
    return {"preds": (target + 0.1 * torch.randn_like(target)).clamp(0, 1), "target": target}


def tokens() -> dict[str, Any]:
    return {"preds": torch.randn(N, 7, CLASSES), "target": torch.randint(CLASSES, (N, 7))}


def distributions() -> dict[str, Any]:
    return {"p": torch.rand(N, 4).softmax(-1), "q": torch.rand(N, 4).softmax(-1)}


def ranked() -> dict[str, Any]:
    return {**binary(), "indexes": torch.randint(6, (N,))}


def stream() -> dict[str, Any]:
    return {"value": torch.randn(N)}


def weighted() -> dict[str, Any]:
    return {"value": torch.randn(N), "weight": torch.rand(N)}


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(4, 9)))


def translations() -> dict[str, Any]:
    rng = random.Random(0)
    return {
        "preds": [sentence(rng) for _ in range(N)],
        "target": [[sentence(rng) for _ in range(rng.randint(1, 3))] for _ in range(N)],
    }


def transcripts() -> dict[str, Any]:
    rng = random.Random(1)
    return {"preds": [sentence(rng) for _ in range(N)], "target": [sentence(rng) for _ in range(N)]}


class LargestGap(torchmetrics.Metric):
    """A user's own: states of four kinds, and one with a reduction of its own."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("largest", torch.tensor(-torch.inf), dist_reduce_fx="max")
        self.add_state("smallest", torch.tensor(torch.inf), dist_reduce_fx="min")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("product", torch.tensor(1.0), dist_reduce_fx=lambda stacked: stacked.prod(0))
        self.add_state("seen", [], dist_reduce_fx="cat")

    def update(self, value: Tensor) -> None:
        self.largest = torch.maximum(self.largest, value.max())
        self.smallest = torch.minimum(self.smallest, value.min())
        self.count += value.numel()
        self.product *= (1 + value.abs() / 10).prod()
        self.seen.append(value)

    def compute(self) -> dict[str, Tensor]:
        seen = dim_zero_cat(self.seen)
        return {
            "gap": self.largest - self.smallest,
            "count": self.count,
            "product": self.product,
            "median": seen.median(),
        }


def collection() -> torchmetrics.MetricCollection:
    return torchmetrics.MetricCollection(
        {
            "f1": cl.MulticlassF1Score(CLASSES),
            "precision": cl.MulticlassPrecision(CLASSES),
            "auroc": cl.MulticlassAUROC(CLASSES),
            "by_class": torchmetrics.ClasswiseWrapper(cl.MulticlassAccuracy(CLASSES, average=None)),
        },
        prefix="val_",
        postfix="_all",
    )


CASES: dict[str, tuple[Make, Data]] = {
    "MulticlassAccuracy": (lambda: cl.MulticlassAccuracy(CLASSES), logits),
    "MulticlassAccuracy-micro": (lambda: cl.MulticlassAccuracy(CLASSES, average="micro", top_k=2), logits),
    "MulticlassAccuracy-by-class": (lambda: cl.MulticlassAccuracy(CLASSES, average=None), logits),
    "MultilabelAccuracy-samplewise": (
        lambda: cl.MultilabelAccuracy(CLASSES, multidim_average="samplewise"),
        labelled_pixels,
    ),
    "BinaryAccuracy": (cl.BinaryAccuracy, binary),
    "MultilabelAccuracy": (lambda: cl.MultilabelAccuracy(CLASSES), multilabel),
    "MulticlassF1": (lambda: cl.MulticlassF1Score(CLASSES), logits),
    "AUROC-exact": (lambda: cl.MulticlassAUROC(CLASSES), logits),
    "AUROC-binned": (lambda: cl.MulticlassAUROC(CLASSES, thresholds=20), logits),
    "BinaryAUROC": (cl.BinaryAUROC, binary),
    "AveragePrecision": (lambda: cl.MultilabelAveragePrecision(CLASSES), multilabel),
    "ROC-curve": (cl.BinaryROC, binary),
    "CalibrationError": (lambda: cl.BinaryCalibrationError(n_bins=8), binary),
    "ConfusionMatrix": (lambda: cl.MulticlassConfusionMatrix(CLASSES), logits),
    "CohenKappa": (lambda: cl.MulticlassCohenKappa(CLASSES), logits),
    "MatthewsCorrCoef": (lambda: cl.MulticlassMatthewsCorrCoef(CLASSES), logits),
    "MSE": (regression.MeanSquaredError, numbers),
    "MSE-two-outputs": (lambda: regression.MeanSquaredError(num_outputs=2), vectors),
    "MAE": (regression.MeanAbsoluteError, numbers),
    "R2": (regression.R2Score, numbers),
    "Pearson": (regression.PearsonCorrCoef, numbers),
    "Pearson-two-outputs": (lambda: regression.PearsonCorrCoef(num_outputs=2), vectors),
    "Concordance": (regression.ConcordanceCorrCoef, numbers),
    "Spearman": (regression.SpearmanCorrCoef, numbers),
    "Kendall": (regression.KendallRankCorrCoef, numbers),
    "ExplainedVariance": (regression.ExplainedVariance, numbers),
    "CosineSimilarity": (lambda: regression.CosineSimilarity(reduction="mean"), vectors),
    "KLDivergence": (regression.KLDivergence, distributions),
    "Perplexity": (text.Perplexity, tokens),
    "BLEU": (text.BLEUScore, translations),
    "CharErrorRate": (text.CharErrorRate, transcripts),
    "WordErrorRate": (text.WordErrorRate, transcripts),
    "EditDistance": (text.EditDistance, transcripts),
    "CHRF": (text.CHRFScore, translations),
    "ROUGE": (lambda: text.ROUGEScore(rouge_keys=("rouge1", "rougeL")), transcripts),
    "SSIM": (lambda: image.StructuralSimilarityIndexMeasure(data_range=1.0), images),
    "SSIM-of-each": (lambda: image.StructuralSimilarityIndexMeasure(data_range=1.0, reduction=None), images),
    "PSNR": (lambda: image.PeakSignalNoiseRatio(data_range=0.1), images),
    "PSNR-range-found": (lambda: image.PeakSignalNoiseRatio(data_range=(0.0, 1.0)), images),
    "MeanMetric": (torchmetrics.MeanMetric, weighted),
    "SumMetric": (torchmetrics.SumMetric, stream),
    "MinMetric": (torchmetrics.MinMetric, stream),
    "MaxMetric": (torchmetrics.MaxMetric, stream),
    "CatMetric": (torchmetrics.CatMetric, stream),
    "RetrievalNDCG": (retrieval.RetrievalNormalizedDCG, ranked),
    "RetrievalMAP": (retrieval.RetrievalMAP, ranked),
    "Composition": (lambda: regression.MeanSquaredError() + 2 * regression.MeanAbsoluteError(), numbers),
    "Multioutput": (lambda: torchmetrics.MultioutputWrapper(regression.R2Score(), 2), vectors),
    "Collection": (collection, logits),
    "LargestGap": (LargestGap, stream),
}


def make(name: str) -> Any:
    try:
        return CASES[name][0]()
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} needs a package that is not installed: {str(error).splitlines()[0]}")


def cut(data: dict[str, Any], rng: random.Random, parts: int) -> list[dict[str, Any]]:
    """The rows in parts of random sizes, none of them empty."""
    size = len(next(iter(data.values())))
    at = [0, *sorted(rng.sample(range(2, size - 1), parts - 1)), size]
    return [{k: v[a:b] for k, v in data.items()} for a, b in itertools.pairwise(at)]


def grouped(values: Sequence[Any], rng: random.Random) -> Any:
    """All values merged two by two, in a random grouping that keeps their order."""
    if len(values) == 1:
        return values[0]
    middle = rng.randint(1, len(values) - 1)
    return grouped(values[:middle], rng).merge(grouped(values[middle:], rng))


def equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_merged_parts_are_the_whole(name: str) -> None:
    torch.manual_seed(3)
    data = CASES[name][1]()
    whole = make(name)
    whole.update(**data)
    expected = whole.compute()
    metric = from_torchmetrics(make(name))
    equal(metric.of(**data).compute(), expected)
    for seed in range(3):
        rng = random.Random(seed)
        values = [metric.of(**part) for part in cut(data, rng, parts=rng.randint(2, 6))]
        equal(grouped(values, rng).compute(), expected)
        equal(lm.compute_metrics(lm.merge_metrics([{"m": value} for value in values]))["m"], expected)
        equal(metric.init().merge(grouped(values, rng)).compute(), expected)
    no_rows = {name: column[:0] for name, column in data.items()}
    value = metric.of(**data)
    equal(metric.merge(metric.of(**no_rows), value, metric.of(**no_rows)).compute(), expected)
    assert metric.update(value, **no_rows) is value


@pytest.mark.parametrize("name", CASES)
def test_updates_one_by_one_are_those_of_torchmetrics(name: str) -> None:
    torch.manual_seed(4)
    original, metric = make(name), from_torchmetrics(make(name))
    rng = random.Random(5)
    parts = cut(CASES[name][1](), rng, parts=4)
    value = metric.init()
    for part in parts:
        original.update(**part)
        value = metric.update(value, **part)
    torch.testing.assert_close(value.compute(), original.compute(), rtol=0, atol=0, equal_nan=True)
    # What was merged before goes on as well.
    half = metric.of(**parts[0]).merge(metric.of(**parts[1]))
    equal(metric.update(metric.update(half, **parts[2]), **parts[3]).compute(), original.compute())


@pytest.mark.parametrize("name", CASES)
def test_a_packed_value_comes_back(name: str) -> None:
    torch.manual_seed(6)
    metric = from_torchmetrics(make(name))
    values = [metric.of(**part) for part in cut(CASES[name][1](), random.Random(7), parts=3)]
    packed = metric.pack(values[0].merge(values[1]))
    assert all(type(tensor) is Tensor for tensor in packed.values())
    back = metric.unpack({name: tensor.clone() for name, tensor in packed.items()})
    expected = values[0].merge(values[1]).merge(values[2]).compute()
    torch.testing.assert_close(back.merge(values[2]).compute(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["MulticlassAccuracy", "Pearson", "AUROC-exact", "RetrievalMAP", "LargestGap", "PSNR"])
def test_merging_is_what_torchmetrics_does_between_processes(name: str) -> None:
    torch.manual_seed(8)
    parts = cut(CASES[name][1](), random.Random(9), parts=3)
    ranks = [make(name) for _ in parts]
    for rank, part in zip(ranks, parts, strict=True):
        rank.update(**part)
    synced = make(name)
    synced.update(**parts[0])
    asked = iter(_gathering_order(synced))

    def gather(tensor: Tensor, group: Any = None) -> list[Tensor]:
        state = next(asked)
        return [_gathered(rank, state) for rank in ranks]

    synced.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    expected = type(synced).compute(synced)
    metric = from_torchmetrics(make(name))
    merged = metric.merge(*[metric.of(**part) for part in parts])
    equal(merged.compute(), _squeeze_if_scalar(expected))


def _gathering_order(metric: Any) -> list[str]:
    return list(metric._reductions)


def _gathered(rank: Any, state: str) -> Tensor:
    held = getattr(rank, state)
    return torch.cat(held) if isinstance(held, list) else held
