"""Encode images as PNG without an image library, which sinks do not otherwise need."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOR_TYPES = {1: 0, 3: 2, 4: 6}  # channels -> gray, RGB, RGBA


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """The PNG file of `pixels` [H, W, C] with one, three or four channels.

    >>> import numpy as np
    >>> from lumen.sinks.png import encode_png
    >>> encode_png(np.zeros((2, 2, 3), np.uint8))[1:4]
    b'PNG'
    """
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    rows = pixels.reshape(height, width * channels)
    unfiltered = np.zeros((height, 1), np.uint8)  # each row starts with its filter type
    data = zlib.compress(np.concatenate([unfiltered, rows], axis=1).tobytes())
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
