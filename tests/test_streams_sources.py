"""Sources: what they give, and every malformed file refused by its name, with nothing on disk changed."""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stream_images import smooth
from tta_edge.streams import npz
from tta_edge.streams.errors import (
    BuiltinMissing,
    InputMismatch,
    ShiftNotGiven,
    SourceMalformed,
    SourceMissing,
    SourceTooLarge,
    StreamError,
    UnknownShift,
    UnknownSource,
)
from tta_edge.streams.shifts import COMMON, Shift, corrupt
from tta_edge.streams.source import Source, align_labels
from tta_edge.streams.sources import open_source
from tta_runtime.errors import ConfigError, ImagesExtraMissing, InputError

X = smooth(7, 12)
Y = np.array([0, 1, 2, 0, 1, 2, 0])


def snapshot(folder):
    """Every file below a folder by name and content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def everything(source: Source):
    return source.read(np.arange(source.count))


# ----------------------------------------------------------------------------------------------- digits


def test_digits():
    source = open_source("digits")
    assert (source.count, source.shape) == (899, (8, 8, 1))
    assert everything(source).dtype == np.uint8
    assert np.bincount(source.labels).min() > 80
    assert source.class_names == tuple("0123456789")
    assert not source.sorted_by_class


def test_digits_are_attributed():
    from tta_edge.builtin import builtin_digits

    text = (builtin_digits().parent / "ATTRIBUTION.md").read_text()
    for word in (
        "Alpaydin",
        "CC BY 4.0" if "CC BY 4.0" in text else "Creative Commons Attribution 4.0",
        "Changes",
    ):
        assert word in text


def test_a_missing_builtin_says_what_to_do(tmp_path, monkeypatch):
    from tta_edge import builtin

    monkeypatch.setattr(builtin, "_DIGITS", tmp_path)
    with pytest.raises(BuiltinMissing, match=r"build\.sh"):
        builtin.builtin_bundle()
    with pytest.raises(BuiltinMissing, match=r"test\.npz"):
        open_source("digits")


# -------------------------------------------------------------------------------------------------- npz


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (X, (12, 12, 3)),
        (np.moveaxis(X, -1, 1), (12, 12, 3)),
        (X[..., 0], (12, 12, 1)),
        (X[..., :1], (12, 12, 1)),
        (np.moveaxis(X[..., :1], -1, 1), (12, 12, 1)),
        (np.asfortranarray(X), (12, 12, 3)),
        (np.zeros((4, 3, 5, 3), np.uint8), (3, 5, 3)),
    ],
)
def test_npz_layouts(tmp_path, x, shape):
    np.savez(tmp_path / "a.npz", x=x)
    source = open_source(f"npz:{tmp_path / 'a.npz'}")
    assert source.shape == shape
    assert source.labels is None
    assert source.class_names is None
    wanted = X[..., : shape[2]] if shape[:2] == (12, 12) else x
    assert (everything(source) == wanted).all()
    assert (source.read(np.array([2, 0])) == wanted[[2, 0]]).all()


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", ">i4"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_labels(tmp_path, dtype, save):
    save(tmp_path / "a.npz", x=X, y=Y.astype(dtype), other=np.zeros(3))
    source = open_source(f"npz:{tmp_path / 'a.npz'}")
    assert source.labels.dtype == np.int64
    assert (source.labels == Y).all()


def _npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _member(name: str, data: bytes, *, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def _header(shape, dtype="|u1", version=b"\x01\x00", data=b""):
    """An npy member whose header declares whatever is asked."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def _flipped(data: bytes) -> bytes:
    """One bit of the first array's content flipped: the archive's checksum objects."""
    place = len(data) // 3
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


BAD_NPZ = {
    "empty file": (b"", SourceMalformed, "not an npz"),
    "garbage": (b"\x00\xffgarbage" * 99, SourceMalformed, "not an npz"),
    "an npy file": (_header((3,), data=b"abc"), SourceMalformed, "not an npz"),
    "truncated": (_npz(x=X)[:-40], SourceMalformed, "not an npz"),
    "no x": (_npz(images=X, y=Y), SourceMalformed, "no array `x`, it holds `images`, `y`"),
    "no array at all": (_member("readme.txt", b"hello"), SourceMalformed, "holds nothing"),
    "x is not an array": (_member("x.npy", b"hello"), SourceMalformed, "cannot be read"),
    "x ends inside its header": (
        _member("x.npy", _header((2, 4, 4, 3))[:20]),
        SourceMalformed,
        "cannot be read",
    ),
    "x shorter than declared": (
        _member("x.npy", _header((9, 8, 8, 3), data=b"\0" * 99)),
        SourceMalformed,
        "declares 1728 bytes, the file holds 99",
    ),
    "x longer than declared": (
        _member("x.npy", _header((1, 4, 4, 3), data=b"\0" * 99)),
        SourceMalformed,
        "declares 48 bytes",
    ),
    "a huge x": (_member("x.npy", _header((10**9, 10**6, 3))), SourceTooLarge, "the limit is"),
    "a negative shape": (_member("x.npy", _header((-1, 8, 8, 3))), SourceMalformed, "cannot be read"),
    "a shape that is a text": (_member("x.npy", _header("12")), SourceMalformed, "cannot be read"),
    "a header that is code": (
        _member("x.npy", b"\x93NUMPY\x01\x00\x20\x00__import__('os').system('true') "),
        SourceMalformed,
        "cannot be read",
    ),
    "a newer npy": (
        _member("x.npy", _header((1, 4, 4, 3), version=b"\x09\x00")),
        SourceMalformed,
        "cannot be read",
    ),
    "a flipped bit": (_flipped(_npz(x=X)), SourceMalformed, "cannot be read"),
    "python objects": (_npz(x=np.array([{"a": 1}], dtype=object)), SourceMalformed, "never loaded"),
    "float images": (_npz(x=X / 255.0), SourceMalformed, "images are uint8"),
    "two axes": (_npz(x=X[0, ..., 0]), SourceMalformed, "shape [12, 12]"),
    "four channels": (_npz(x=np.zeros((2, 8, 8, 4), np.uint8)), SourceMalformed, "1 or 3 channels"),
    "no image": (_npz(x=X[:0]), SourceMalformed, "holds no image"),
    "images without pixels": (_npz(x=np.zeros((2, 0, 8, 3), np.uint8)), SourceMalformed, "holds no image"),
    "too few labels": (_npz(x=X, y=Y[:-1]), SourceMalformed, "expected [7]"),
    "labels in two axes": (_npz(x=X, y=Y[:, None]), SourceMalformed, "shape [7, 1]"),
    "float labels": (_npz(x=X, y=Y * 1.0), SourceMalformed, "whole numbers"),
    "negative labels": (_npz(x=X, y=Y - 1), SourceMalformed, "label -1"),
    "object labels": (_npz(x=X, y=np.array(list("abcdefg"), dtype=object)), SourceMalformed, "never loaded"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz(tmp_path, case):
    data, error, words = BAD_NPZ[case]
    (tmp_path / "a.npz").write_bytes(data)
    before = snapshot(tmp_path)
    with pytest.raises(error) as caught:
        open_source(f"npz:{tmp_path / 'a.npz'}")
    assert words in str(caught.value)
    assert caught.value.fix
    assert isinstance(caught.value, InputError)
    assert snapshot(tmp_path) == before


def test_the_size_limit_counts_bytes(tmp_path):
    np.savez(tmp_path / "a.npz", x=X)
    npz.read_array(tmp_path / "a.npz", "x", max_bytes=X.nbytes)
    with pytest.raises(SourceTooLarge, match=str(X.nbytes)):
        npz.read_array(tmp_path / "a.npz", "x", max_bytes=X.nbytes - 1)


def test_a_compressed_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """A member of 64 MiB in 64 KiB: its declared size is compared with the limit first."""
    declared = _header((1 << 14, 64, 64, 1), data=b"\0" * (1 << 26))
    (tmp_path / "a.npz").write_bytes(_member("x.npy", declared, compression=zipfile.ZIP_DEFLATED))
    assert (tmp_path / "a.npz").stat().st_size < 1 << 17
    with pytest.raises(SourceTooLarge):
        npz.read_array(tmp_path / "a.npz", "x", max_bytes=1 << 20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.float32]),
        hnp.array_shapes(min_dims=0, max_dims=5, max_side=5, min_side=0),
    )
)
def test_any_array_is_images_or_refused_by_name(tmp_path, array):
    np.savez(tmp_path / "a.npz", x=array)
    try:
        source = open_source(f"npz:{tmp_path / 'a.npz'}")
    except SourceMalformed:
        return
    assert array.dtype == np.uint8
    images = everything(source)
    assert images.shape == (source.count, *source.shape)
    assert source.shape[2] in (1, 3)
    assert sorted(images.ravel()) == sorted(array.ravel())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=12), st.integers(0, 10**6))
def test_any_damage_gives_the_images_or_a_named_error(tmp_path, patch, place):
    good = _npz(x=X, y=Y)
    place %= len(good)
    (tmp_path / "a.npz").write_bytes(good[:place] + patch + good[place + len(patch) :])
    try:
        source = open_source(f"npz:{tmp_path / 'a.npz'}")
    except StreamError:
        return
    assert everything(source).dtype == np.uint8


# ----------------------------------------------------------------------------------------------- images


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for k, (picture, label) in enumerate(zip(X, Y, strict=True)):
        place = tmp_path / "set" / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        image.fromarray(picture).save(place / f"{k}.png")
    return tmp_path / "set"


def test_class_folders(folder):
    (folder / "class0" / "notes.txt").write_text("not an image")
    (folder / "empty").mkdir()
    source = open_source(f"images:{folder}")
    by_class = np.argsort(Y, kind="stable")
    assert source.class_names == ("class0", "class1", "class2")
    assert (source.labels == Y[by_class]).all()
    assert (everything(source) == X[by_class]).all()
    assert source.sorted_by_class


def test_a_flat_folder_has_no_labels(folder):
    source = open_source(f"images:{folder / 'class1'}")
    assert (source.count, source.labels, source.class_names) == (2, None, None)
    assert (everything(source) == X[[1, 4]]).all()


def test_grey_and_other_modes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, mode in (("grey", "L"), ("alpha", "RGBA"), ("palette", "P")):
        (tmp_path / name).mkdir()
        image.fromarray(X[0]).convert(mode).save(tmp_path / name / "a.png")
    assert open_source(f"images:{tmp_path / 'grey'}").shape == (12, 12, 1)
    assert open_source(f"images:{tmp_path / 'alpha'}").shape == (12, 12, 3)
    assert everything(open_source(f"images:{tmp_path / 'palette'}")).shape == (1, 12, 12, 3)


def test_a_grey_image_among_colour_ones_is_fine(folder):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(X[0]).convert("L").save(folder / "class1" / "z.png")
    assert everything(open_source(f"images:{folder}")).shape == (8, 12, 12, 3)


@pytest.mark.parametrize(
    ("case", "error", "words", "when"),
    [
        ("missing", SourceMissing, "no directory", "open"),
        ("a file", SourceMissing, "no directory", "open"),
        ("empty", SourceMalformed, "holds no image", "open"),
        ("mixed", SourceMalformed, "beside folders", "open"),
        ("first broken", SourceMalformed, "not a readable image", "open"),
        ("later broken", SourceMalformed, "not a readable image", "read"),
        ("truncated", SourceMalformed, "cannot be decoded", "read"),
        ("another size", SourceMalformed, "is 5x5 in colour", "read"),
        ("colour after grey", SourceMalformed, "is 12x12 in colour", "read"),
    ],
)
def test_bad_folders(folder, tmp_path, case, error, words, when):
    image = pytest.importorskip("PIL.Image")
    place = folder
    if case == "missing":
        place = tmp_path / "nowhere"
    if case == "a file":
        place = folder / "class0" / "0.png"
    if case == "empty":
        place = tmp_path / "new"
        place.mkdir()
    if case == "mixed":
        image.fromarray(X[0]).save(folder / "a.png")
    if case == "first broken":
        (folder / "class0" / "0.png").write_bytes(b"no image")
    if case == "later broken":
        (folder / "class2" / "5.png").write_bytes(b"no image")
    if case == "truncated":
        whole = (folder / "class2" / "5.png").read_bytes()
        (folder / "class2" / "5.png").write_bytes(whole[: len(whole) // 2])
    if case == "another size":
        image.fromarray(X[0, :5, :5]).save(folder / "class2" / "5.png")
    if case == "colour after grey":
        image.fromarray(X[0]).convert("L").save(folder / "class0" / "0.png")
    before = snapshot(tmp_path)
    if when == "open":
        with pytest.raises(error) as caught:
            open_source(f"images:{place}")
    else:
        source = open_source(f"images:{place}")
        with pytest.raises(error) as caught:
            everything(source)
    assert words in str(caught.value)
    assert snapshot(tmp_path) == before


def test_images_without_pillow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImagesExtraMissing, match=r"tta-runtime\[images\]"):
        open_source(f"images:{folder}")


# --------------------------------------------------------------------------------------------- cifar10c


@pytest.fixture
def published(tmp_path):
    """The published layout in small: 4 images, 5 severities, three corruptions of which one is not ours."""
    place = tmp_path / "CIFAR-10-C"
    place.mkdir()
    clean = smooth(4, 32)
    for name in ("fog", "gaussian_noise"):
        np.save(place / f"{name}.npy", np.concatenate([corrupt(clean, name, s, 0) for s in range(1, 6)]))
    np.save(place / "spatter.npy", np.concatenate([clean] * 5))
    np.save(place / "labels.npy", np.tile(np.array([3, 1, 4, 1]), 5))
    return place


def test_published_directory(published):
    source = open_source(f"cifar10c:{published}")
    assert (source.count, source.shape) == (4, (32, 32, 3))
    assert source.labels.tolist() == [3, 1, 4, 1]
    assert source.parse("all:5") == (Shift("gaussian_noise", 5), Shift("fog", 5))
    assert source.parse("spatter:2,fog:1") == (Shift("spatter", 2), Shift("fog", 1))
    assert len(source.parse(None)) == 15
    read = source.shifted(Shift("fog", 3), seed=9)
    wanted = corrupt(smooth(4, 32), "fog", 3, 0)
    assert (read(np.array([2, 0]), 0) == wanted[[2, 0]]).all(), "taken from the file, whatever the seed"


def test_published_labels_once(published):
    np.save(published / "labels.npy", np.array([3, 1, 4, 1], dtype=np.uint8))
    assert open_source(f"cifar10c:{published}").labels.tolist() == [3, 1, 4, 1]


def test_published_directory_lacks_a_shift(published):
    source = open_source(f"cifar10c:{published}")
    with pytest.raises(ShiftNotGiven, match="no contrast:5"):
        source.parse("contrast:5")
    with pytest.raises(ShiftNotGiven, match="no unshifted images"):
        source.shifted(None, 0)
    with pytest.raises(UnknownShift, match="did you mean `spatter`"):
        source.parse("spater:1")
    for name in ("fog", "gaussian_noise"):
        (published / f"{name}.npy").unlink()
    with pytest.raises((ShiftNotGiven, UnknownShift)):
        open_source(f"cifar10c:{published}").parse("all:5")


def _save(path, array):
    np.save(path, array, allow_pickle=True)


def _images(folder):
    return [path for path in folder.glob("*.npy") if path.stem != "labels"]


BAD_PUBLISHED = {
    "no labels": (lambda d: (d / "labels.npy").unlink(), SourceMissing, "labels.npy"),
    "only labels": (lambda d: [p.unlink() for p in _images(d)], SourceMalformed, "no <corruption>.npy"),
    "truncated": (
        lambda d: (d / "fog.npy").write_bytes((d / "fog.npy").read_bytes()[:-1]),
        SourceMalformed,
        "not a readable npy",
    ),
    "empty file": (lambda d: (d / "fog.npy").write_bytes(b""), SourceMalformed, "not a readable npy"),
    "garbage": (
        lambda d: (d / "fog.npy").write_bytes(b"garbage" * 99),
        SourceMalformed,
        "not a readable npy",
    ),
    "objects": (
        lambda d: _save(d / "fog.npy", np.array([{}] * 20, dtype=object)),
        SourceMalformed,
        "not a readable npy",
    ),
    "floats": (
        lambda d: _save(d / "fog.npy", np.zeros((20, 32, 32, 3))),
        SourceMalformed,
        "images are uint8",
    ),
    "another number": (
        lambda d: _save(d / "fog.npy", np.zeros((15, 32, 32, 3), np.uint8)),
        SourceMalformed,
        "fog.npy",
    ),
    "not five severities": (
        lambda d: [_save(p, np.zeros((7, 32, 32, 3), np.uint8)) for p in _images(d)],
        SourceMalformed,
        "not 5 severities",
    ),
    "too few labels": (lambda d: _save(d / "labels.npy", np.zeros(3, int)), SourceMalformed, "expected 4"),
    "labels that change": (
        lambda d: _save(d / "labels.npy", np.arange(20)),
        SourceMalformed,
        "5 times the same 4",
    ),
    "float labels": (lambda d: _save(d / "labels.npy", np.zeros(20)), SourceMalformed, "whole numbers"),
    "one label": (lambda d: _save(d / "labels.npy", np.array(3)), SourceMalformed, "labels.npy"),
}


@pytest.mark.parametrize("case", BAD_PUBLISHED)
def test_bad_published_directory(published, case):
    damage, error, words = BAD_PUBLISHED[case]
    damage(published)
    before = snapshot(published)
    with pytest.raises(error) as caught:
        open_source(f"cifar10c:{published}")
    assert words in str(caught.value)
    assert snapshot(published) == before


# ---------------------------------------------------------------------------------------- names and labels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "unknown source ``"),
        ("digit", "did you mean `digits`"),
        ("nzp:a.npz", "did you mean `npz`"),
        ("npz", "Write digits, npz:FILE"),
        ("npz:", "Write digits, npz:FILE"),
        ("digits:3", "unknown source `digits:3`"),
        ("/some/path.npz", "unknown source"),
    ],
)
def test_unknown_sources(text, words):
    with pytest.raises(UnknownSource) as caught:
        open_source(text)
    assert words in str(caught.value)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("kind", ["npz", "images", "cifar10c"])
def test_missing_places(tmp_path, kind):
    with pytest.raises(SourceMissing) as caught:
        open_source(f"{kind}:{tmp_path / 'nowhere'}")
    assert str(tmp_path / "nowhere") in str(caught.value)


def _source(labels, names):
    return Source(
        "s", len(labels), (4, 4, 1), lambda i: np.zeros((len(i), 4, 4, 1), np.uint8), np.array(labels), names
    )


def test_labels_as_the_model_counts():
    names = ["ant", "bee", "cat"]
    assert align_labels(_source([0, 1, 0], ("cat", "ant")), 3, names).tolist() == [2, 0, 2], "by name"
    assert align_labels(_source([0, 1], ("2", "10")), 11, names).tolist() == [2, 10], "by number"
    assert align_labels(_source([0, 1, 2], ("x", "y", "z")), 3, None).tolist() == [0, 1, 2], "in order"
    assert align_labels(_source([2, 1], None), 3, names).tolist() == [2, 1], "as given"
    unlabelled = Source("s", 2, (4, 4, 1), lambda i: np.zeros((2, 4, 4, 1), np.uint8))
    assert align_labels(unlabelled, 3, names) is None


@pytest.mark.parametrize(
    ("labels", "names", "classes", "model_names", "words"),
    [
        ([0, 1], ("cat", "be"), 3, ["ant", "bee", "cat"], "did you mean `bee`"),
        ([0, 1], ("x", "y"), 3, None, "2 classes, the model has 3"),
        ([0, 3], None, 3, None, "label 3, the model's classes are 0..2"),
        ([0, 1], ("0", "3"), 3, None, "label 3"),
    ],
)
def test_labels_that_do_not_fit(labels, names, classes, model_names, words):
    with pytest.raises(InputMismatch) as caught:
        align_labels(_source(labels, names), classes, model_names)
    assert words in str(caught.value)


def test_all_of_an_ordinary_source_is_the_fifteen(monkeypatch):
    monkeypatch.delenv("TTA_FROST_DIR", raising=False)
    assert open_source("digits").parse(None) == (None,)
    assert len(open_source("digits").parse("all:5")) == len(COMMON)
