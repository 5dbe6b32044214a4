"""Images as JPEG files and back: what an edge may send in place of an array, and what a cloud lets near a decoder.

A file from outside is walked marker by marker before Pillow sees it. Only what `encode` writes is let through: one
baseline scan of eight bits, of exactly the size and channels that the model takes, without comments, colour profiles
or anything after the end. So what a file claims costs nothing, and a decoder's rarer paths are out of reach.

Source of the markers: ITU-T T.81, annex B.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import (
    JpegMalformed,
    JpegNotBaseline,
    JpegTruncated,
    JpegWrongMode,
    JpegWrongSize,
    NotAnImage,
)
from .manifest import InputSpec
from .pillow import pillow_image

MAX_SIDE = 65_535
"""What a JPEG can say of itself."""
MAX_PIXELS = 64 << 20
"""Larger images are taken for bombs, by Pillow as well."""
_NEED = "JPEG for the cloud"
_MODES = {1: "L", 3: "RGB"}
_START, _END = b"\xff\xd8", b"\xff\xd9"
_BASELINE = 0xC0
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SCAN = 0xDA
_TABLES = {0xC4, 0xDB, 0xDD, 0xE0}
"""Huffman tables, quantisation, restart interval, JFIF's own header."""
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)
"""In a scan: the next marker that is no restart; 0xff 0x00 is a byte of data."""
_FIX = "Send a baseline JPEG of the size that the model takes, or without loss"


@dataclass(frozen=True)
class ImageForm:
    """What the images of a model are like.

    Attributes:
        channels: 1 or 3.
        height: pixels.
        width: pixels.
        dtype: `uint8` or `float32`.
        low: value of black.
        high: value of white.
    """

    channels: int
    height: int
    width: int
    dtype: str
    low: float
    high: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        return self.channels, self.height, self.width


def form_of(spec: InputSpec) -> ImageForm:
    """What can be sent as JPEG of a model's input.

    Raises:
        NotAnImage: it is no image of one or three channels and of one size.
    """
    shape, sides = spec.shape, spec.shape[1:]
    fixed = [side for side in sides if isinstance(side, int) and 0 < side <= MAX_SIDE]
    size = fixed[1] * fixed[2] if len(fixed) == 3 else MAX_PIXELS + 1
    if spec.layout != "NCHW" or len(shape) != 4 or size > MAX_PIXELS or fixed[0] not in _MODES:
        raise NotAnImage(
            f"the input is {spec.layout} {shape}, a JPEG holds images of 1 or 3 channels and of one size",
            "Send samples without loss",
        )
    channels, height, width = fixed
    return ImageForm(channels, height, width, spec.dtype, spec.low, spec.high)


def needs_pillow() -> None:
    """Say at once that Pillow is missing, not at the first image; raises ImagesExtraMissing."""
    pillow_image(_NEED)


def encode(x: NDArray[Any], form: ImageForm, quality: int) -> bytes:
    """A JPEG file, colours at full resolution and tables made for it: of small images these are the larger part.

    Args:
        x: [C, H, W] as the model takes it; values outside its range are cut.
        form: of the model's images.
        quality: 1 to 100, as libjpeg has it.

    Raises:
        ImagesExtraMissing: Pillow is not installed.
    """
    grey = (np.asarray(x, dtype=np.float32) - form.low) * np.float32(255 / (form.high - form.low))
    levels = np.moveaxis(np.clip(np.rint(grey), 0, 255).astype(np.uint8), 0, -1)
    picture = pillow_image(_NEED).fromarray(
        np.ascontiguousarray(levels[..., 0] if form.channels == 1 else levels)
    )
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return file.getvalue()


def decode(data: bytes, form: ImageForm) -> NDArray[Any]:
    """The array [C, H, W] of a JPEG file, as the model takes it.

    Args:
        data: of the file; not trusted.
        form: that it must have; anything else is refused before it is decoded.

    Raises:
        JpegMalformed, JpegNotBaseline, JpegTruncated, JpegWrongMode, JpegWrongSize: see there.
        ImagesExtraMissing: Pillow is not installed.
    """
    _check(data, form)
    image = pillow_image(_NEED)
    try:
        with image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
            if picture.size != (form.width, form.height) or picture.mode != _MODES[form.channels]:
                raise JpegMalformed(
                    f"it opens as {picture.mode} {picture.size}, which is not what it said", _FIX
                )
            levels = np.asarray(picture)
    except (OSError, EOFError, SyntaxError, ValueError, struct.error) as error:
        raise JpegMalformed(f"it cannot be decoded: {error}", _FIX) from error
    planes = levels[None] if form.channels == 1 else np.moveaxis(levels, -1, 0)
    if form.dtype == "uint8" and (form.low, form.high) == (0, 255):
        return np.ascontiguousarray(planes)
    values = planes * np.float32((form.high - form.low) / 255) + np.float32(form.low)
    return np.ascontiguousarray(np.rint(values) if form.dtype == "uint8" else values, dtype=form.dtype)


# ------------------------------------------------------------------------------------------ markers


def _check(data: bytes, form: ImageForm) -> None:
    """Whether a file is what `encode` makes of such an image, as far as its markers say."""
    if data[:2] != _START:
        raise JpegMalformed(f"it begins with {data[:2].hex() or 'nothing'}, a JPEG with {_START.hex()}", _FIX)
    at, framed, needless = 2, False, ""
    while True:
        code, body = _segment(data, at)
        at += 4 + len(body)
        if code in _FRAMES:
            if framed:
                raise JpegMalformed("it describes its frame twice", _FIX)
            _check_frame(code, body, form)
            framed = True
        elif code == _SCAN:
            if not framed or not body or body[0] != form.channels:
                raise JpegMalformed("its scan is not one of all channels, after the frame", _FIX)
            if needless:
                raise JpegMalformed(f"it has a segment {needless}, which an image does not need", _FIX)
            _check_end(data, at)
            return
        elif code not in _TABLES:
            needless = f"ff{code:02x}"  # told only where the frame is right: a CMYK file is called that


def _segment(data: bytes, at: int) -> tuple[int, bytes]:
    """Code and content of the segment at an offset."""
    head = data[at : at + 4]
    if len(head) < 4:
        raise JpegTruncated(f"it ends after {len(data)} bytes, before its image", _FIX)
    mark, code, size = struct.unpack(">BBH", head)
    if mark != 0xFF or size < 2:
        raise JpegMalformed(f"byte {at} begins no segment: {head.hex()}", _FIX)
    body = data[at + 4 : at + 2 + size]
    if len(body) < size - 2:
        raise JpegTruncated(f"a segment of {size} bytes at byte {at}, the file has {len(data)}", _FIX)
    return code, body


def _check_frame(code: int, body: bytes, form: ImageForm) -> None:
    if code != _BASELINE:
        raise JpegNotBaseline(f"its frame is ff{code:02x}, expected ff{_BASELINE:02x}: baseline", _FIX)
    if len(body) < 6:
        raise JpegMalformed(f"its frame has {len(body)} bytes", _FIX)
    bits, height, width, channels = struct.unpack(">BHHB", body[:6])
    if (channels, bits) != (form.channels, 8):
        raise JpegWrongMode(
            f"it has {channels} channels of {bits} bits, the model takes {form.channels} of 8", _FIX
        )
    if (height, width) != (form.height, form.width):
        raise JpegWrongSize(
            f"it says {height} x {width} pixels, the model takes {form.height} x {form.width}", _FIX
        )
    if len(body) != 6 + 3 * channels:
        raise JpegMalformed(f"its frame has {len(body)} bytes, expected {6 + 3 * channels}", _FIX)


def _check_end(data: bytes, at: int) -> None:
    """Whether the scan from an offset is the last thing in the file, and ends."""
    found = _MARKER.search(data, at)
    if found is None:
        raise JpegTruncated(f"its scan does not end within {len(data)} bytes", _FIX)
    if found.group() != _END or found.end() != len(data):
        raise JpegMalformed(
            f"at byte {found.start()} of {len(data)} comes {found.group().hex()}, not the end", _FIX
        )
