"""Histograms, images and texts: what they hold, and which sink writes which."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from lumen.errors import LumenError, ValueKindError
from lumen.sinks import CSV, JSONL, Histogram, Image, Memory, TensorBoard, Text, figure
from lumen.sinks.png import encode_png

values = st.lists(st.floats(width=64), max_size=30)


@given(numbers=values, bins=st.integers(1, 40))
@example(numbers=[1.0, -5e-324], bins=1)
def test_every_number_is_counted_once(numbers, bins):
    histogram = Histogram(np.array(numbers, np.float64), bins=bins)
    finite = [x for x in numbers if math.isfinite(x)]
    assert len(histogram.counts) == bins
    assert len(histogram.edges) == bins + 1
    assert all(math.isfinite(edge) for edge in histogram.edges)
    assert histogram.edges == sorted(set(histogram.edges))
    assert sum(histogram.counts) == len(finite)
    assert histogram.nonfinite == len(numbers) - len(finite)
    if finite:
        assert histogram.edges[0] <= min(finite) <= max(finite) <= histogram.edges[-1]


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=40).filter(lambda x: len(set(x)) > 1), st.integers(1, 10))
def test_the_bins_are_numpys(numbers, bins):
    counts, edges = np.histogram(numbers, bins=bins)
    histogram = Histogram(torch.tensor(numbers), bins=bins)
    np.testing.assert_allclose(histogram.edges, edges, rtol=1e-14, atol=1e-14)
    assert histogram.counts == counts.tolist()
    assert (histogram.total, histogram.squares) == (sum(numbers), sum(x * x for x in numbers))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0], dtype=torch.float8_e4m3fn),
        torch.tensor([1.0, 2.0], requires_grad=True),
        torch.tensor([[1], [2]], dtype=torch.uint8),
        [1, 2],
    ],
    ids=str,
)
def test_a_histogram_takes_any_real_tensor(tensor):
    histogram = Histogram(tensor, bins=2)
    assert (histogram.edges, histogram.counts) == ([1.0, 1.5, 2.0], [1, 1])


@pytest.mark.parametrize("make", [lambda: Histogram(torch.ones(2) * 1j), lambda: Histogram("a"), lambda: Text(3)])
def test_what_is_neither_is_an_error(make):
    with pytest.raises(ValueKindError, match="takes a") as caught:
        make()
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, LumenError)


def test_bins_must_be_some():
    with pytest.raises(ValueKindError, match="write Histogram"):
        Histogram(torch.ones(2), bins=0)


# ------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_height_width_channels(channels):
    tensor = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    assert (Image(tensor).pixels == tensor.permute(1, 2, 0).numpy()).all()
    assert (Image(tensor / 255).pixels == Image(tensor).pixels).all()


def test_floats_are_clipped_and_nan_is_black():
    tensor = torch.tensor([[0.0, 1.0, -3.0, 7.0], [math.nan, math.inf, -math.inf, 0.5]], dtype=torch.bfloat16)
    assert Image(tensor).pixels[..., 0].tolist() == [[0, 255, 0, 255], [0, 255, 0, 128]]
    assert Image(tensor > 0).pixels[..., 0].tolist() == [[0, 255, 0, 255], [0, 255, 0, 255]]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(28, 32, 3), r"shape \[28, 32, 3\].*write Image\(tensor\.permute\(2, 0, 1\)\)"),
        (torch.zeros(8, 3, 4, 4), r"shape \[8, 3, 4, 4\].*write Image\(tensor\[0\]\)"),
        (torch.zeros(3, 0, 4), r"shape \[3, 0, 4\]"),
        (torch.zeros(4, 4, dtype=torch.int64), r"an image of int64.*tensor\.to\(torch\.uint8\)"),
    ],
)
def test_what_is_no_image_is_named_with_the_fix(tensor, message):
    with pytest.raises(ValueKindError, match=message):
        Image(tensor)


@pytest.mark.parametrize("channels", [1, 3, 4])
@given(data=st.data())
def test_png_is_read_back(channels, data):
    library = pytest.importorskip("PIL.Image")
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    raw = data.draw(st.binary(min_size=height * width * channels, max_size=height * width * channels))
    pixels = np.frombuffer(raw, np.uint8).reshape(height, width, channels)
    with library.open(io.BytesIO(encode_png(pixels))) as image:
        image.load()
        assert image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        assert (np.asarray(image).reshape(pixels.shape) == pixels).all()


def test_a_figure_is_its_pixels_in_spite_of_settings():
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(2, 1), dpi=50, facecolor="red")
    with matplotlib.rc_context({"savefig.bbox": "tight", "savefig.dpi": 200}):
        image = figure(drawn)
    assert image.pixels.shape == (50, 100, 4)
    assert (image.pixels == [255, 0, 0, 255]).all()


# -------------------------------------------------------------------------------------------------- sinks

LOGGED = {
    "loss": 0.5,
    "h": Histogram([0.0, 1.0, 1.0, 4.0, math.inf], bins=2),
    "i": Image(torch.rand(3, 4, 5)),
    "t": Text("one\n“two”"),
}


def test_jsonl_writes_texts_and_histograms(tmp_path):
    sink = JSONL(tmp_path / "a", time_fn=lambda: 1.0)
    sink.log(0, LOGGED)
    sink.log(1, {"h": Histogram([0, 1], bins=1)})
    sink.close()
    assert [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()] == [
        {
            "step": 0,
            "time": 1.0,
            "loss": 0.5,
            "h": {"edges": [0.0, 2.0, 4.0], "counts": [3, 1], "nonfinite": 1},
            "t": "one\n“two”",
        },
        {"step": 1, "time": 1.0, "h": {"edges": [0.0, 1.0], "counts": [2]}},
    ]


def test_a_text_cannot_take_the_name_of_jsonls_own(tmp_path):
    with pytest.raises(ValueError, match="A value is named 'time'"):
        JSONL(tmp_path / "a").log(0, {"time": Text("now")})


def test_csv_writes_numbers_alone(tmp_path):
    sink = CSV(tmp_path / "a", time_fn=lambda: 1.0)
    sink.log(0, LOGGED)
    sink.close()
    assert list(csv.reader(io.StringIO((tmp_path / "a").read_text()))) == [
        ["step", "time", "loss"],
        ["0", "1.0", "0.5"],
    ]


def test_memory_keeps_the_objects():
    sink = Memory()
    sink.log(3, LOGGED)
    assert sink.rows == [(3, LOGGED)]
    assert sink["i"] == ([3], [LOGGED["i"]])


def test_tensorboard_writes_all_of_them(tmp_path):
    sink = TensorBoard(tmp_path)
    sink.log(3, LOGGED)
    sink.close()
    found = {value.tag: value for value in events(tmp_path)[-1].summary.value}
    assert found.keys() == {"loss", "h", "i", "t/text_summary"}
    assert found["i"].image.encoded_image_string == LOGGED["i"].png()
    assert (found["i"].image.height, found["i"].image.width, found["i"].image.colorspace) == (4, 5, 3)
    text = found["t/text_summary"]
    assert text.tensor.string_val[0].decode() == "one\n“two”"
    assert text.metadata.plugin_data.plugin_name == "text"
    histogram = found["h"].histo
    # TensorBoard's buckets have right limits alone, so that the first, up to the least number, is empty.
    assert (list(histogram.bucket_limit), list(histogram.bucket)) == ([0.0, 2.0, 4.0], [0.0, 3.0, 1.0])
    assert (histogram.min, histogram.max, histogram.num, histogram.sum, histogram.sum_squares) == (0, 4, 4, 6, 18)


def events(logdir):
    found = []
    for path in sorted(logdir.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found
