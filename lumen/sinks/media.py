"""Media values: histograms, images and texts."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lumen.errors import ValueKindError
from lumen.sinks.base import Number, scalars
from lumen.sinks.png import encode_png


class Histogram:
    """The distribution of a tensor's numbers in `bins` bins of equal width, counted at construction.

    `counts` has one entry for each bin and `edges` one more. NaN and infinity are in no bin and are counted in
    `nonfinite`. `total` and `squares` are the sums of the finite numbers and of their squares.

    Raises ValueKindError unless `values` is a tensor or array of real numbers and `bins` is at least one.

    >>> import lumen as lm, torch
    >>> histogram = lm.sinks.Histogram(torch.tensor([0.0, 1.0, 1.0, 4.0, float("nan")]), bins=2)
    >>> histogram.edges, histogram.counts, histogram.nonfinite
    ([0.0, 2.0, 4.0], [3, 1], 1)
    """

    def __init__(self, values: Any, bins: int = 64) -> None:
        if bins < 1:
            raise ValueKindError(f"bins={bins} must be at least 1; write Histogram(tensor, bins=64).")
        array = _array(values, "Histogram(tensor)")
        numbers = array.astype(np.float64).ravel()
        finite = numbers[np.isfinite(numbers)]
        low, high = _span(finite, bins)
        # Halved, because the width of the full range of float64 overflows.
        counts, halves = np.histogram(finite / 2, bins=bins, range=(low / 2, high / 2))
        self.counts: list[int] = counts.tolist()
        self.edges: list[float] = [low, *(halves[1:-1] * 2).tolist(), high]  # half of the smallest float64 is 0
        self.nonfinite: int = numbers.size - finite.size
        with np.errstate(over="ignore"):
            self.total: float = float(finite.sum())
            self.squares: float = float(finite @ finite)

    def __repr__(self) -> str:
        return f"Histogram({sum(self.counts)} numbers from {self.edges[0]:.4g} to {self.edges[-1]:.4g})"


class Image:
    """An image from a tensor [C, H, W] with 1, 3 or 4 channels (gray, RGB, RGBA), or [H, W].

    Floating-point values range from 0 to 1: values outside are clipped, and NaN is black. uint8 ranges from 0 to 255,
    and booleans are black and white. `pixels` is uint8 [H, W, C]; `png()` encodes the file.

    Raises ValueKindError for another shape or dtype.

    >>> import lumen as lm, torch
    >>> lm.sinks.Image(torch.rand(3, 28, 32)).pixels.shape
    (28, 32, 3)
    """

    def __init__(self, tensor: Any) -> None:
        array = _array(tensor, "Image(tensor)")
        if array.ndim == 2:
            array = array[None]
        if array.ndim != 3 or array.shape[0] not in (1, 3, 4) or 0 in array.shape:
            channels_last = array.ndim == 3 and array.shape[2] in (1, 3, 4)
            fix = (
                "Image(tensor.permute(2, 0, 1))"
                if channels_last
                else "Image(tensor[0]), for example, for one image of a batch"
            )
            raise ValueKindError(
                f"an image of shape {list(array.shape)}: Image takes [C, H, W] with 1, 3 or 4 channels, or [H, W];"
                f" write {fix}."
            )
        self.pixels: NDArray[np.uint8] = np.ascontiguousarray(_bytes(array).transpose(1, 2, 0))

    def png(self) -> bytes:
        """The image as a PNG file."""
        return encode_png(self.pixels)

    def __repr__(self) -> str:
        height, width, channels = self.pixels.shape
        return f"Image({width}x{height}, {channels} channels)"


@dataclass(frozen=True)
class Text:
    """A text: generated samples, a table, a note. TensorBoard shows it as Markdown.

    >>> import lumen as lm
    >>> sink = lm.sinks.Memory()
    >>> sink.log(0, {"sample": lm.sinks.Text("to be or not")})
    >>> sink["sample"]
    ([0], [Text(text='to be or not')])
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ValueKindError(f"Text takes a str, got {type(self.text).__name__}; write Text(str(value)).")


Media = Histogram | Image | Text


def figure(figure: Any) -> Image:
    """The `Image` of a matplotlib figure, which stays open: call `plt.close(figure)` yourself.

    >>> import lumen as lm
    >>> from matplotlib.figure import Figure
    >>> fig = Figure(figsize=(2, 1), dpi=50)
    >>> _ = fig.subplots().plot([1, 2, 3])
    >>> lm.sinks.figure(fig)
    Image(100x50, 4 channels)
    """
    from matplotlib import rc_context

    raw = io.BytesIO()
    with rc_context({"savefig.bbox": None}):  # "tight" would make the size unknown
        figure.savefig(raw, format="rgba", dpi=figure.dpi)
    width, height = (int(size) for size in figure.bbox.size)
    pixels = np.frombuffer(raw.getvalue(), np.uint8).reshape(height, width, 4)
    return Image(pixels.transpose(2, 0, 1))


def split(values: Mapping[str, Any]) -> tuple[dict[str, Number], dict[str, Media]]:
    """Split `values` into numbers (see `scalars`) and media: histograms, images and texts.

    A sink writes the kinds it supports, and ignores the others.

    >>> import lumen as lm
    >>> numbers, media = lm.sinks.split({"loss": 0.5, "sample": lm.sinks.Text("hello")})
    >>> numbers, list(media)
    ({'loss': 0.5}, ['sample'])
    """
    media = {name: value for name, value in values.items() if isinstance(value, Media)}
    return scalars({name: value for name, value in values.items() if name not in media}), media


def _array(values: Any, call: str) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype.is_floating_point and values.dtype.itemsize < 4 else values
        values = values.numpy()  # NumPy has neither bfloat16 nor float8
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueKindError(
            f"{call} takes a tensor or array of real numbers, got {type(values).__name__} of {array.dtype}."
        )
    return array


def _span(finite: NDArray[np.float64], bins: int) -> tuple[float, float]:
    """The range of the numbers, widened so that each bin has a nonzero width in float64."""
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    step = math.ulp(max(-low, high)) * bins
    if high / 2 - low / 2 >= step:
        return low, high
    pad = step if high > low else max(step, 0.5)
    largest = float(np.finfo(np.float64).max)
    return max(low - pad, -largest), min(high + pad, largest)


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind != "f":
        raise ValueKindError(
            f"an image of {array.dtype}: Image takes floating point from 0 to 1, uint8 or bool;"
            " write Image(tensor.to(torch.uint8))."
        )
    pixels: NDArray[np.uint8] = (np.nan_to_num(array, nan=0.0).clip(0, 1) * 255).round().astype(np.uint8)
    return pixels
