"""The manifest's decoder on anything: a typed refusal or an identical round trip, within bounds."""

from __future__ import annotations

import json
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_bundle
from tta_runtime import Manifest, manifest_check
from tta_runtime.errors import BundleError, ManifestMalformed, ManifestTooLarge
from tta_runtime.manifest import MAX_MANIFEST_BYTES, decode, encode


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return tiny_bundle.build(tmp_path_factory.mktemp("tiny") / "bundle")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=0, max_value=1 << 54),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["batch", "theta", "state:average", "../x", "float32", "uint8", "forward", "step", ""]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def typed_or_same(data: bytes) -> Manifest | None:
    """The property: a named refusal, or a manifest that encodes and decodes to itself."""
    try:
        first = decode(data)
        manifest_check.check(first)
    except BundleError:  # and nothing else: any other exception fails the test
        return None
    assert decode(encode(first)) == first
    assert encode(decode(encode(first))) == encode(first)
    return first


@given(st.binary(max_size=200))
def test_any_bytes(data):
    assert typed_or_same(data) is None


@given(VALUES)
def test_any_json(value):
    assert typed_or_same(json.dumps(value).encode()) is None


def paths(value: object, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a JSON value."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths(inner, (*at, key))
    return found


@given(data=st.data())
def test_one_changed_value(good, data):
    """A good manifest with any one value replaced, removed or doubled, wherever it stands."""
    value = json.loads(encode(good))
    *above, last = data.draw(st.sampled_from(paths(value)))
    at = value
    for key in above:
        at = at[key]
    action = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if action == "replace":
        at[last] = data.draw(VALUES)
    elif action == "remove":
        del at[last]
    elif isinstance(at, dict):
        at[data.draw(st.text(max_size=5))] = at[last]
    else:
        at.append(at[last])
    typed_or_same(json.dumps(value).encode())


@given(data=st.data())
def test_one_changed_byte(good, data):
    raw = bytearray(encode(good))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    typed_or_same(bytes(raw))


@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated(good, cut):
    raw = encode(good).rstrip()
    assert typed_or_same(raw[: int(cut * len(raw))]) is None


def test_round_trip_is_readable_and_stable(good):
    data = encode(good)
    assert decode(data) == good
    assert data.endswith(b"}\n")
    assert data.splitlines()[1] == b'  "format": "tta-bundle",'
    shuffled = msgspec.structs.replace(good, files=dict(reversed(good.files.items())))
    assert encode(shuffled) == data


def test_the_cost_of_a_step_is_data(good):
    """A bundle of an earlier version does not tell it, and says so."""
    methods = good.methods
    assert (methods["tent"].forwards, methods["tent"].backwards) == (1, 1)
    assert methods["tent"].forward_equivalents == 3
    assert methods["teacher"].forward_equivalents is None
    value = json.loads(encode(good))
    del value["methods"]["tent"]["forwards"], value["methods"]["tent"]["backwards"]
    older = decode(json.dumps(value).encode())
    manifest_check.check(older)
    assert older.methods["tent"].forward_equivalents is None
    free = msgspec.structs.replace(methods["tent"], forwards=0, backwards=0)
    assert free.forward_equivalents == 0


def test_too_large_is_refused_without_parsing():
    data = b"[" * (MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ManifestTooLarge, match=str(MAX_MANIFEST_BYTES)):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":' * 100_000,
        b"[" * (1 << 20),
        b'{"format":"tta-bundle","format_version":1,"classes":' + b"9" * (1 << 20) + b"}",
        b'{"format":"tta-bundle","format_version":' + b"9" * 4000 + b"}",
        b'{"format":"' + b"a" * (1 << 20) + b'","format_version":1}',
        b'{"format":"tta-bundle","format_version":1,'
        + b",".join(b'"k%d":0' % i for i in range(50_000))
        + b"}",
    ],
    ids=["deep", "brackets", "digits", "version", "text", "keys"],
)
def test_memory_is_bounded_by_the_input(data):
    tracemalloc.start()
    try:
        with pytest.raises(BundleError):
            decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * len(data) + (1 << 20)


def test_messages_stay_short_whatever_the_manifest_says(good):
    value = json.loads(encode(good)) | {"x" * 100_000: 1}
    with pytest.raises(ManifestMalformed) as refusal:
        decode(json.dumps(value).encode())
    assert len(str(refusal.value)) < 2_000
