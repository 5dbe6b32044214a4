"""Shifts: repeatable, independent of chunks, of the right form, stronger with severity, refused by name."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_images import smooth
from tta_edge.streams import shifts
from tta_edge.streams.constants import CONSTANTS, constants_for
from tta_edge.streams.errors import (
    BadImages,
    BadSeverity,
    FrostPhotosMissing,
    ShiftNeedsColour,
    SourceMalformed,
    UnknownShift,
)
from tta_edge.streams.shifts import COMMON, EXTRA, NAMES, Shift, corrupt, parse_shift, parse_shifts
from tta_runtime.errors import ConfigError, ImagesExtraMissing, InputError

SETS = ("cifar", "imagenet", "digits")
WITHOUT_PHOTOS = [name for name in NAMES if name != "frost"]
# Where the published strengths themselves do not grow the distance from the clean image at every severity:
# the image is darkened, or moved less but more roughly. On 8x8 the published sizes leave few distinct
# strengths.
NOT_MONOTONE = {
    "cifar": {"glass_blur", "motion_blur", "elastic_transform", "frost", "frost_procedural", "saturate"},
    "imagenet": {"fog", "glass_blur", "snow", "elastic_transform", "frost", "frost_procedural", "saturate"},
    "digits": {"glass_blur", "frost", "frost_procedural", "pixelate", "saturate"},
}


@pytest.fixture(scope="module")
def colour():
    return smooth(12, 32)


@pytest.fixture(scope="module")
def digits():
    return smooth(12, 8, 1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("frost")
    for k in range(3):
        image.fromarray(smooth(1, 170 + 10 * k, seed=k)[0]).save(folder / f"frost{k}.png")
    return folder


def distance(a, b):
    return np.abs(a.astype(np.float64) - b).mean()


# ------------------------------------------------------------------------------------------ the form


def test_the_tables_are_complete():
    assert len(COMMON) == 15
    assert len(set(NAMES)) == len(NAMES) == 15 + 1 + len(EXTRA)
    assert set(CONSTANTS) == set(NAMES)
    for name, by_set in CONSTANTS.items():
        assert set(by_set) == set(SETS), name
        for ladder in by_set.values():
            assert len(ladder) == 5, name
            widths = {len(step) if isinstance(step, tuple) else 0 for step in ladder}
            assert len(widths) == 1, name


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (8, "digits"),
        (16, "digits"),
        (28, "cifar"),
        (32, "cifar"),
        (64, "cifar"),
        (96, "imagenet"),
        (224, "imagenet"),
    ],
)
def test_the_set_follows_from_the_size(side, expected):
    assert constants_for(side, side + 5) == constants_for(side + 5, side) == expected


@pytest.mark.parametrize("name", WITHOUT_PHOTOS)
@pytest.mark.parametrize("severity", [1, 5])
def test_shape_dtype_and_an_untouched_input(name, severity, colour):
    before = colour.copy()
    shifted = corrupt(colour, name, severity, 0)
    assert shifted.shape == colour.shape
    assert shifted.dtype == np.uint8
    assert not np.shares_memory(shifted, colour)
    assert (colour == before).all()
    assert distance(shifted, colour) > 0.3


@pytest.mark.parametrize("name", [name for name in WITHOUT_PHOTOS if name != "saturate"])
@pytest.mark.parametrize("shape", [(8, 8), (4, 4), (16, 11), (5, 40), (33, 32)])
def test_grey_images_of_odd_sizes(name, shape):
    images = smooth(3, 48, 1)[:, : shape[0], : shape[1]]
    assert corrupt(images, name, 5, 0).shape == images.shape


@pytest.mark.parametrize("name", WITHOUT_PHOTOS)
def test_no_images_give_no_images(name):
    assert corrupt(np.zeros((0, 32, 32, 3), np.uint8), name, 3, 0).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("name", WITHOUT_PHOTOS)
def test_flat_images_stay_in_range(name, level):
    """Black and white are where divisions by brightness, contrast or saturation go wrong."""
    images = np.full((2, 32, 32, 3), level, np.uint8)
    with np.errstate(all="raise", under="ignore"):
        shifted = corrupt(images, name, 5, 0)
    assert shifted.shape == images.shape


# ------------------------------------------------------------------------------------ repeatability


@pytest.mark.parametrize("name", WITHOUT_PHOTOS)
def test_chunks_equal_the_whole(name, colour):
    whole = corrupt(colour, name, 5, 7)
    parts = [corrupt(colour[a:b], name, 5, 7, first_index=a) for a, b in ((0, 1), (1, 6), (6, 12))]
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize("name", WITHOUT_PHOTOS)
def test_inner_blocks_do_not_show(name, colour, monkeypatch):
    whole = corrupt(colour, name, 4, 7)
    monkeypatch.setattr(shifts, "BLOCK_VALUES", 5 * colour[0].size)
    assert (corrupt(colour, name, 4, 7) == whole).all()


def test_frost_chunks_equal_the_whole(colour, photos):
    whole = corrupt(colour, "frost", 5, 7, frost_dir=photos)
    parts = [
        corrupt(colour[a:b], "frost", 5, 7, first_index=a, frost_dir=photos) for a, b in ((0, 5), (5, 12))
    ]
    assert (np.concatenate(parts) == whole).all()


DRAWN = [
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow",
    "frost_procedural", "fog", "elastic_transform",
]  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_seed_index_and_repetition(name):
    images = np.repeat(smooth(1, 32), 3, axis=0)
    first = corrupt(images, name, 3, 0)
    assert (corrupt(images, name, 3, 0) == first).all()
    assert (corrupt(images, name, 3, 1) != first).any(), "another seed"
    assert (first[0] != first[1]).any(), "another image"


@pytest.mark.parametrize("name", sorted(set(WITHOUT_PHOTOS) - set(DRAWN)))
def test_the_others_draw_nothing(name, colour):
    assert (corrupt(colour, name, 3, 0) == corrupt(colour, name, 3, 99)).all()


def test_pinned_values():
    """A changed recipe, key or order of draws changes published figures: it must not go unnoticed."""
    image = smooth(1, 32)
    assert corrupt(image, "gaussian_noise", 5, 0)[0, :2, :2, 0].tolist() == PINNED["gaussian_noise"]
    assert corrupt(image, "fog", 3, 1)[0, :2, :2, 0].tolist() == PINNED["fog"]
    assert corrupt(image, "contrast", 5, 0)[0, :2, :2, 0].tolist() == PINNED["contrast"]


PINNED = {
    "gaussian_noise": [[125, 152], [120, 155]],
    "fog": [[156, 144], [135, 132]],
    "contrast": [[163, 160], [158, 157]],
}


# ------------------------------------------------------------------------------------------ strength


@pytest.mark.parametrize("chosen", SETS)
@pytest.mark.parametrize("name", WITHOUT_PHOTOS)
def test_distortion_grows_with_severity(name, chosen):
    side = {"cifar": 32, "imagenet": 160, "digits": 8}[chosen]
    images = smooth({"cifar": 24, "imagenet": 3, "digits": 64}[chosen], side, 3)
    far = [distance(corrupt(images, name, severity, 0, constants=chosen), images) for severity in range(1, 6)]
    if name in NOT_MONOTONE[chosen]:
        assert min(far) > 0
    else:
        assert all(a < b for a, b in pairwise(far)), far


def test_the_set_can_be_chosen(colour):
    by_size = corrupt(colour, "gaussian_noise", 1, 0)
    assert (corrupt(colour, "gaussian_noise", 1, 0, constants="cifar") == by_size).all()
    assert distance(corrupt(colour, "gaussian_noise", 1, 0, constants="imagenet"), colour) > 1.5 * distance(
        by_size, colour
    )


def test_noise_has_the_stated_strength():
    grey = np.full((64, 32, 32, 3), 128, np.uint8)
    noise = corrupt(grey, "gaussian_noise", 5, 0).astype(float) / 255
    assert abs(noise.std() - 0.10) < 0.002
    assert abs(noise.mean() - 128 / 255 + 0.5 / 255) < 0.002  # truncation takes half a level on average
    hit = corrupt(grey, "impulse_noise", 5, 0)
    assert abs((hit != 128).mean() - 0.07) < 0.005
    assert abs((hit == 255).sum() / (hit != 128).sum() - 0.5) < 0.03
    shot = corrupt(grey, "shot_noise", 5, 0).astype(float) / 255
    assert abs(shot.std() - np.sqrt(128 / 255 / 50)) < 0.003


def test_fog_keeps_the_brightest_and_brightness_adds():
    images = smooth(4, 32)
    assert corrupt(images, "fog", 3, 0).max() <= images.max()
    dark = np.full((1, 32, 32, 3), 51, np.uint8)
    assert (corrupt(dark, "brightness", 5, 0) == 127).all()  # 0.2 + 0.3, truncated


# -------------------------------------------------------------------------------------------- frost


def test_frost_and_our_texture_are_two_things(colour, photos):
    assert (
        corrupt(colour, "frost", 3, 0, frost_dir=photos) != corrupt(colour, "frost_procedural", 3, 0)
    ).any()


def test_frost_takes_the_directory_of_the_environment(colour, photos, monkeypatch):
    monkeypatch.setenv("TTA_FROST_DIR", str(photos))
    assert (corrupt(colour, "frost", 3, 0) == corrupt(colour, "frost", 3, 0, frost_dir=photos)).all()
    assert [shift.name for shift in parse_shifts("all:3")] == list(COMMON)


def test_all_names_our_texture_where_there_are_no_photographs(monkeypatch):
    monkeypatch.delenv("TTA_FROST_DIR", raising=False)
    names = [shift.name for shift in parse_shifts("all:3")]
    assert len(names) == 15
    assert "frost" not in names
    assert names[COMMON.index("frost")] == "frost_procedural"


def test_frost_on_grey_and_large_images(photos):
    assert corrupt(smooth(2, 8, 1), "frost", 5, 0, frost_dir=photos).shape == (2, 8, 8, 1)
    assert corrupt(smooth(1, 100), "frost", 5, 0, frost_dir=photos).shape == (1, 100, 100, 3)


@pytest.mark.parametrize("case", ["unset", "missing", "empty", "small", "broken"])
def test_frost_without_good_photographs(case, colour, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.delenv("TTA_FROST_DIR", raising=False)
    folder = tmp_path / "photos"
    expected = FrostPhotosMissing
    if case != "missing":
        folder.mkdir()
    if case == "small":
        image.fromarray(smooth(1, 100)[0]).save(folder / "small.png")
    if case == "broken":
        (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
        expected = SourceMalformed
    before = colour.copy()
    with pytest.raises(expected) as caught:
        corrupt(colour, "frost", 3, 0, frost_dir=None if case == "unset" else folder)
    assert caught.value.fix
    assert (colour == before).all()


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), BadImages),
        (np.zeros((2, 32, 32), np.uint8), BadImages),
        (np.zeros((2, 32, 32, 4), np.uint8), BadImages),
        (np.zeros((2, 3, 32, 32), np.uint8), BadImages),
        (np.zeros((2, 3, 32, 3), np.uint8), BadImages),
    ],
)
def test_images_of_another_form(images, error):
    with pytest.raises(error) as caught:
        corrupt(images, "fog", 3, 0)
    assert isinstance(caught.value, InputError)
    assert caught.value.code == "bad-images"


def test_saturate_needs_colour(digits):
    with pytest.raises(ShiftNeedsColour):
        corrupt(digits, "saturate", 3, 0)


@pytest.mark.parametrize("severity", [0, 6, -1, 55])
def test_severity_out_of_range(severity, colour):
    with pytest.raises(BadSeverity, match="1, 2, 3, 4, 5"):
        corrupt(colour, "fog", severity, 0)


@pytest.mark.parametrize("name", ["jpeg_compression", "frost"])
def test_pillow_is_named_where_it_is_missing(name, colour, monkeypatch, photos):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImagesExtraMissing, match=r"tta-runtime\[images\]"):
        corrupt(colour, name, 3, 0, frost_dir=photos)


@pytest.mark.parametrize("name", [name for name in WITHOUT_PHOTOS if name != "jpeg_compression"])
def test_the_others_need_no_pillow(name, colour, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    corrupt(colour[:1], name, 1, 0)


# ----------------------------------------------------------------------------------------- parsing


def test_parsing():
    assert parse_shift("fog:3") == Shift("fog", 3)
    assert parse_shift(" fog : 3 ") == Shift("fog", 3)
    assert parse_shift("fog") == Shift("fog", 5)
    assert str(Shift("fog", 3)) == "fog:3"
    assert parse_shifts("fog:1, contrast:2,fog:1") == (Shift("fog", 1), Shift("contrast", 2))
    assert {shift.severity for shift in parse_shifts("all:2")} == {2}


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("gausian_noise:5", UnknownShift, "did you mean `gaussian_noise`"),
        ("foog", UnknownShift, "did you mean `fog`"),
        ("", UnknownShift, "unknown shift ``"),
        ("fog:3,", UnknownShift, "unknown shift ``"),
        ("all", UnknownShift, "unknown shift `all`"),
        ("fog:", BadSeverity, "severity ``"),
        ("fog:0", BadSeverity, "severity `0`"),
        ("fog:6", BadSeverity, "severity `6`"),
        ("fog:3.0", BadSeverity, "severity `3.0`"),
        ("fog:٣", BadSeverity, "severity `٣`"),
        ("fog:3:3", BadSeverity, "severity `3:3`"),
    ],
)
def test_misspelt_shifts(text, error, words):
    with pytest.raises(error) as caught:
        parse_shift(text) if text == "all" else parse_shifts(text)
    assert words in str(caught.value)
    assert isinstance(caught.value, ConfigError)


@given(st.text(max_size=30))
def test_any_text_is_a_list_of_shifts_or_refused_by_name(text):
    try:
        parsed = parse_shifts(text)
    except (UnknownShift, BadSeverity):
        return
    assert parsed
    assert parse_shifts(",".join(map(str, parsed))) == parsed


@given(st.lists(st.builds(Shift, st.sampled_from(NAMES), st.integers(1, 5)), min_size=1, max_size=8))
def test_written_and_read_again(listed):
    assert parse_shifts(",".join(map(str, listed))) == tuple(dict.fromkeys(listed))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([name for name in WITHOUT_PHOTOS if name != "saturate"]),
    st.integers(1, 5),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.integers(1, 5),
)
def test_any_cut_of_the_stream_is_the_same_stream(name, severity, seed, first, cut):
    images = smooth(6, 12, 1)
    whole = corrupt(images, name, severity, seed, first_index=first)
    parts = [
        corrupt(images[:cut], name, severity, seed, first_index=first),
        corrupt(images[cut:], name, severity, seed, first_index=first + cut),
    ]
    assert (np.concatenate(parts) == whole).all()
