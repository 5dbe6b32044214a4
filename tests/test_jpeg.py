"""Samples as JPEG: what comes back, what is not let near a decoder, and that no file costs more than it has."""

from __future__ import annotations

import io
import os
import struct
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tta_runtime import jpeg
from tta_runtime.errors import (
    ImagesExtraMissing,
    JpegMalformed,
    JpegNotBaseline,
    JpegRefused,
    JpegTruncated,
    JpegWrongMode,
    JpegWrongSize,
    NotAnImage,
)
from tta_runtime.jpeg import ImageForm, decode, encode, form_of
from tta_runtime.manifest import InputSpec

EXAMPLES = int(os.environ.get("TTA_EXAMPLES", "300"))
COLOUR = ImageForm(3, 24, 32, "float32", 0.0, 1.0)
GREY = ImageForm(1, 16, 16, "uint8", 0.0, 255.0)


def smooth(form: ImageForm, seed: int = 0) -> np.ndarray:
    """An image that JPEG is made for: gradients and a little noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[: form.height, : form.width] / max(form.height, form.width)
    waves = [np.sin(5 * (draw.random() * x + draw.random() * y)) for _ in range(form.channels)]
    unit = np.clip(0.5 + 0.4 * np.stack(waves) + draw.normal(0, 0.01, form.shape), 0, 1)
    values = form.low + unit * (form.high - form.low)
    return (np.rint(values) if form.dtype == "uint8" else values).astype(form.dtype)


def saved(mode: str = "RGB", size: tuple[int, int] = (32, 24), **options: object) -> bytes:
    """What Pillow writes, which is more than `encode` does."""
    file = io.BytesIO()
    Image.effect_noise(size, 40).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def claims(data: bytes, height: int, width: int) -> bytes:
    """The same file with another size in its frame."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


GOOD = encode(smooth(COLOUR), COLOUR, 90)


# --- there and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        COLOUR,
        GREY,
        replace(COLOUR, dtype="uint8", high=255.0),
        replace(COLOUR, low=-1.0),
        replace(GREY, dtype="float32", low=-3.5, high=12.0),
        replace(COLOUR, dtype="uint8", low=10.0, high=90.0),
    ],
)
def test_an_image_comes_back_nearly_as_it_was(form: ImageForm) -> None:
    x = smooth(form)
    back = decode(encode(x, form, 95), form)
    assert (back.dtype, back.shape) == (x.dtype, x.shape)
    off = np.abs(back.astype(float) - x.astype(float)).max() / (form.high - form.low)
    assert off < 0.04, "of the range"
    assert np.array_equal(decode(encode(back, form, 100), form), decode(encode(back, form, 100), form))


def test_what_lies_outside_the_range_is_cut_not_wrapped() -> None:
    x = np.full(COLOUR.shape, -0.5, np.float32)
    x[:, :, 16:] = 1.7
    back = decode(encode(x, COLOUR, 95), COLOUR)
    assert back[:, :, :8].max() < 0.02
    assert back[:, :, 24:].min() > 0.98


def test_less_quality_is_fewer_bytes_and_all_are_fewer_than_the_array() -> None:
    x = smooth(COLOUR)
    sizes = [len(encode(x, COLOUR, quality)) for quality in (100, 90, 50)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] * 8 < x.nbytes


# --- what has no JPEG --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (["batch", 8], "flat"),
        (["batch", 4, 16, 16], "NCHW"),
        (["batch", 3, 16], "NCHW"),
        (["batch", 3, "height", 16], "NCHW"),
        (["batch", 3, 1 << 17, 2], "NCHW"),
        (["batch", 3, 60_000, 60_000], "NCHW"),
    ],
)
def test_inputs_that_no_jpeg_holds_are_refused_by_name(shape: list[int | str], layout: str) -> None:
    with pytest.raises(NotAnImage, match="a JPEG holds images"):
        form_of(InputSpec(dtype="float32", shape=shape, low=0, high=1, layout=layout))


def test_the_form_follows_the_manifest() -> None:
    spec = InputSpec(dtype="uint8", shape=["batch", 3, 24, 32], low=0, high=255)
    assert form_of(spec) == ImageForm(3, 24, 32, "uint8", 0, 255)


def test_pillow_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for call in (jpeg.needs_pillow, lambda: encode(smooth(GREY), GREY, 90), lambda: decode(GOOD, COLOUR)):
        with pytest.raises(ImagesExtraMissing, match=r"tta-runtime\[images\]"):
            call()


# --- what is refused -----------------------------------------------------------------------------------------

AT = GOOD.index(b"\xff\xc0")
BAD: dict[str, tuple[bytes, type[JpegRefused]]] = {
    "nothing": (b"", JpegMalformed),
    "another format": (b"\x89PNG\r\n\x1a\n" + bytes(64), JpegMalformed),
    "a bomb of 65535 x 65535": (claims(GOOD, 65_535, 65_535), JpegWrongSize),
    "no height, which a later marker would give": (claims(GOOD, 0, 32), JpegWrongSize),
    "turned": (claims(GOOD, 32, 24), JpegWrongSize),
    "another size": (saved(size=(33, 24)), JpegWrongSize),
    "grey for colour": (saved("L"), JpegWrongMode),
    "cmyk": (saved("CMYK"), JpegWrongMode),
    "twelve bits": (GOOD[: AT + 4] + b"\x0c" + GOOD[AT + 5 :], JpegWrongMode),
    "progressive": (saved(progressive=True), JpegNotBaseline),
    "arithmetic": (GOOD[:AT] + b"\xff\xc9" + GOOD[AT + 2 :], JpegNotBaseline),
    "lossless": (GOOD[:AT] + b"\xff\xc3" + GOOD[AT + 2 :], JpegNotBaseline),
    "with a comment": (saved(comment=b"x" * 2000), JpegMalformed),
    "with exif": (saved(exif=Image.Exif().tobytes() + bytes(8)), JpegMalformed),
    "with a colour profile": (saved(icc_profile=bytes(500)), JpegMalformed),
    "with something after it": (GOOD + b"PK\x03\x04", JpegMalformed),
    "twice": (GOOD + GOOD, JpegMalformed),
    "two frames": (GOOD[:AT] + GOOD[AT : AT + 19] + GOOD[AT:], JpegMalformed),
    "no frame": (GOOD[:AT] + GOOD[AT + 19 :], JpegMalformed),
    "a frame that is too long": (
        GOOD[: AT + 2] + struct.pack(">H", 20) + GOOD[AT + 4 : AT + 19] + bytes(3) + GOOD[AT + 19 :],
        JpegMalformed,
    ),
    "a frame that is too short": (GOOD[: AT + 2] + struct.pack(">H", 4) + GOOD[AT + 4 :], JpegMalformed),
    "a segment of no length": (GOOD[: AT + 2] + bytes(2) + GOOD[AT + 4 :], JpegMalformed),
    "a segment beyond the end": (GOOD[: AT + 2] + b"\xff\xff" + GOOD[AT + 4 :], JpegTruncated),
    "no tables": (GOOD[:2] + GOOD[AT:], JpegMalformed),
    "half of it": (GOOD[: len(GOOD) // 2], JpegTruncated),
    "without its end": (GOOD[:-2], JpegTruncated),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name(name: str) -> None:
    data, error = BAD[name]
    with pytest.raises(error) as caught:
        decode(data, COLOUR)
    assert type(caught.value) is error
    assert caught.value.cause
    assert caught.value.fix


def test_every_cut_of_a_file_is_refused() -> None:
    for length in range(len(GOOD)):
        with pytest.raises((JpegTruncated, JpegMalformed)):
            decode(GOOD[:length], COLOUR)


def test_what_a_file_claims_takes_no_memory() -> None:
    bombs = [claims(GOOD, side, side) for side in (30_000, 65_535)]
    decode(GOOD, COLOUR)
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(JpegWrongSize):
                decode(bomb, COLOUR)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


Change = tuple[str, int, bytes]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "cut"]),
        st.integers(0, len(GOOD)),
        st.binary(min_size=1, max_size=6)
        | st.sampled_from([b"\xff\xd9", b"\xff\xda", b"\xff\xc2", b"\xff\xff"]),
    ),
    min_size=1,
    max_size=6,
)


def changed(data: bytes, changes: list[Change]) -> bytes:
    for what, at, value in changes:
        if what == "set":
            data = data[:at] + value + data[at + len(value) :]
        elif what == "insert":
            data = data[:at] + value + data[at:]
        elif what == "delete":
            data = data[:at] + data[at + len(value) :]
        else:
            data = data[:at] + data[at:][len(value) * 40 :]
    return data


def refused_or_an_image(data: bytes) -> None:
    tracemalloc.start()
    try:
        found = decode(data, COLOUR)
    except JpegRefused:
        return
    finally:
        assert tracemalloc.get_traced_memory()[1] < len(data) * 8 + (1 << 20)
        tracemalloc.stop()
    assert found.shape == COLOUR.shape
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1.0001


@settings(max_examples=EXAMPLES, deadline=None)
@given(CHANGES)
@example([("set", len(GOOD) // 2, b"\xff\xd0")])
def test_a_harmed_file_is_refused_by_name_or_is_an_image(changes: list[Change]) -> None:
    refused_or_an_image(changed(GOOD, changes))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_refused_by_name_or_are_an_image(data: bytes, begun: bool) -> None:
    refused_or_an_image(b"\xff\xd8\xff" + data if begun else data)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 100))
def test_whatever_is_encoded_is_let_through(seed: int, quality: int) -> None:
    x = np.random.default_rng(seed).random(COLOUR.shape, dtype=np.float32)
    assert decode(encode(x, COLOUR, quality), COLOUR).shape == COLOUR.shape
