"""Messages between edge and cloud (docs/spec/link.md): there and back, each rule broken once, any bytes."""

from __future__ import annotations

import copy
import os
import re

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from running import REPOSITORY
from tta_cloud import errors as cloud_errors
from tta_cloud.session import refusal
from tta_runtime import errors, link, sealed, signing, wire

EXAMPLES = int(os.environ.get("TTA_EXAMPLES", "300"))
PROPERTY = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SHA, KEY = "a" * 64, "b" * 32
X = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
ROW = np.frombuffer(b"signed bytes", np.uint8)
PAYLOAD = np.arange(32, dtype=np.uint8)
row, payload = wire.declare(ROW), wire.declare(PAYLOAD)

FROM_EDGE = [
    (
        link.Hello(id=1, version="0.1", bundle_digest=SHA, mode="both", epoch=1, seq=2, theta_digest=SHA),
        {},
    ),
    (
        link.Sample(id=2, key=KEY, stream="cam", taken_ms=5, epoch=1, seq=2, entropy=0.5, x=wire.declare(X)),
        {"x": X},
    ),
    (
        link.Sample(
            id=2, key=KEY, stream="cam", taken_ms=5, epoch=1, seq=2, entropy=0.5, encoding="jpeg", x=row
        ),
        {"x": ROW},
    ),
    (link.Fetch(id=3), {}),
    (
        link.Progress(
            id=4, epoch=1, seq=3, state="rolled-back", reason="collapse", detail="d", theta_digest=SHA
        ),
        {},
    ),
    (link.Ping(id=5), {}),
    (link.GetRoot(id=6, version=2), {}),
    (link.Enroll(id=7, token="t" * 16, name="edge-1"), {}),
]
FROM_CLOUD = [
    (link.Welcome(id=1, group="g", version="0.1", root_version=1, max_open=8, silence_s=30.0), {}),
    (link.Accepted(id=2, key=KEY, stored=False, reason="redundant"), {}),
    (link.PatchMessage(id=3, sealed=row, payload=payload), {"sealed": ROW, "payload": PAYLOAD}),
    (link.PatchMessage(sealed=row, payload=payload), {"sealed": ROW, "payload": PAYLOAD}),
    (link.HeadMessage(sealed=row), {"sealed": ROW}),
    (link.RootMessage(id=6, sealed=row), {"sealed": ROW}),
    (link.RootMessage(sealed=row), {"sealed": ROW}),
    (link.Noted(id=4), {}),
    (link.Enrolled(id=7, group="g", endpoint="tcp://cloud:7610", sealed=row), {"sealed": ROW}),
    (link.Refusal(id=8, code="busy", cause="c", fix="f", retry_after_s=1.0), {}),
    (link.Refusal(code="bad-framing", cause="c"), {}),
]
ENDS = [("edge", FROM_EDGE, link.decode_from_edge), ("cloud", FROM_CLOUD, link.decode_from_cloud)]
CASES = [
    pytest.param(message, tensors, decode, id=f"{end} {wire.tag(message)} {i}")
    for end, rows, decode in ENDS
    for i, (message, tensors) in enumerate(rows)
]


def encoded(message, tensors):
    return [bytes(frame) for frame in link.encode_message(message, tensors)]


def header(message):
    return msgspec.to_builtins(message)


def frames(fields, *rows, protocol=link.PROTOCOL):
    return [protocol, msgpack.packb(fields), *rows]


@pytest.mark.parametrize(("message", "tensors", "decode"), CASES)
def test_a_message_reads_back_the_same(message, tensors, decode):
    received = decode(encoded(message, tensors))
    assert received.message == message
    assert set(received.tensors) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(received.tensors[name], array)
        assert not received.tensors[name].flags.writeable


def test_every_message_is_among_them():
    assert {wire.tag(message) for message, _ in FROM_EDGE} == set(link.FROM_EDGE)
    assert {wire.tag(message) for message, _ in FROM_CLOUD} == set(link.FROM_CLOUD)


@pytest.mark.parametrize(("message", "tensors", "decode"), CASES)
def test_no_message_passes_in_the_wrong_direction(message, tensors, decode):
    other = link.decode_from_cloud if decode is link.decode_from_edge else link.decode_from_edge
    with pytest.raises(errors.UnknownMessage):
        other(encoded(message, tensors))


HELLO, SAMPLE, JPEG = (header(FROM_EDGE[i][0]) for i in range(3))
PATCH, HEAD, WELCOME = header(FROM_CLOUD[2][0]), header(FROM_CLOUD[4][0]), header(FROM_CLOUD[0][0])
BIG = {"dtype": "uint8", "shape": [sealed.MAX_BODY_BYTES + 1024 * signing.MAX_SIGNATURES + 1]}
EDGE, CLOUD = link.decode_from_edge, link.decode_from_cloud


def hello(**changes):
    return frames({**HELLO, **changes})


def sample(**changes):
    return frames({**SAMPLE, **changes}, X.tobytes())


# Each row: the rule, who reads it, what is sent, the one error it must be.
BAD = [
    ("L1 one frame", EDGE, [link.PROTOCOL], errors.BadFraming),
    ("L1 five frames", EDGE, frames(SAMPLE, b"", b"", b""), errors.BadFraming),
    ("L1 the daemon's protocol", EDGE, frames(HELLO, protocol=b"TTA1"), errors.UnsupportedProtocol),
    ("L1 a later version", CLOUD, frames(WELCOME, protocol=b"TTC2"), errors.UnsupportedProtocol),
    ("L2 long header", EDGE, [link.PROTOCOL, b"\xc1" * (16 * 1024 + 1)], errors.MessageTooLarge),
    ("L2 long string", EDGE, hello(version="x" * (8 * 1024 + 1)), errors.MalformedHeader),
    ("L2 many pairs", EDGE, frames({str(i): 0 for i in range(65)}), errors.MalformedHeader),
    (
        "L2 large payload",
        CLOUD,
        frames(PATCH, b"", b"\0" * (link.LIMITS.max_payload_bytes + 1)),
        errors.MessageTooLarge,
    ),
    ("L3 no id", EDGE, frames({"type": "ping"}), errors.BadField),
    ("L3 unknown field", EDGE, hello(name="x"), errors.UnknownField),
    ("L3 model_id in a hello", EDGE, hello(model_id="x"), errors.UnknownField),
    ("L3 mode", EDGE, hello(mode="clouds"), errors.BadField),
    ("L3 digest in capitals", EDGE, hello(bundle_digest="A" * 64), errors.BadField),
    ("L3 digest ends the line", EDGE, hello(theta_digest=SHA + "\n"), errors.BadField),
    ("L3 seq is text", EDGE, hello(seq="1"), errors.BadField),
    ("L3 seq is negative", EDGE, hello(seq=-1), errors.BadField),
    ("L3 seq is true", EDGE, hello(seq=True), errors.BadField),
    ("L3 key is short", EDGE, sample(key="b" * 31), errors.BadField),
    ("L3 stream climbs up", EDGE, sample(stream="../x"), errors.BadField),
    ("L3 entropy is negative", EDGE, sample(entropy=-0.1), errors.BadField),
    ("L3 entropy is NaN", EDGE, sample(entropy=float("nan")), errors.BadField),
    ("L3 entropy is infinite", EDGE, sample(entropy=float("inf")), errors.BadField),
    ("L3 encoding", EDGE, sample(encoding="png"), errors.BadField),
    ("L3 root version 0", EDGE, frames({"type": "get-root", "id": 1, "version": 0}), errors.BadField),
    (
        "L3 short token",
        EDGE,
        frames({"type": "enroll", "id": 1, "token": "x", "name": "e"}),
        errors.BadField,
    ),
    ("L3 no credit", CLOUD, frames({**WELCOME, "max_open": 0}), errors.BadField),
    ("L3 much credit", CLOUD, frames({**WELCOME, "max_open": 1025}), errors.BadField),
    ("L3 silence is NaN", CLOUD, frames({**WELCOME, "silence_s": float("nan")}), errors.BadField),
    (
        "L3 wait for a year",
        CLOUD,
        frames({"type": "error", "code": "busy", "cause": "c", "retry_after_s": 3e7}),
        errors.BadField,
    ),
    (
        "L4 sealed is float",
        CLOUD,
        frames({**HEAD, "sealed": {"dtype": "float32", "shape": [3]}}, b"\0" * 12),
        errors.BadField,
    ),
    (
        "L4 sealed has two dimensions",
        CLOUD,
        frames({**HEAD, "sealed": {"dtype": "uint8", "shape": [3, 4]}}, b"\0" * 12),
        errors.BadField,
    ),
    (
        "L4 sealed is long",
        CLOUD,
        frames({**HEAD, "sealed": BIG}, b"\0" * BIG["shape"][0]),
        errors.BadField,
    ),
    (
        "L4 payload is float",
        CLOUD,
        frames({**PATCH, "payload": {"dtype": "float32", "shape": [8]}}, ROW.tobytes(), bytes(32)),
        errors.BadField,
    ),
    (
        "L4 a JPEG of floats",
        EDGE,
        frames({**JPEG, "x": SAMPLE["x"]}, X.tobytes()),
        errors.BadField,
    ),
    ("L4 sealed in the header", CLOUD, frames({**HEAD, "sealed": b"signed"}), errors.MalformedHeader),
    ("L1 payload missing", CLOUD, frames(PATCH, ROW.tobytes()), errors.TensorMismatch),
    ("L1 payload cut", CLOUD, frames(PATCH, ROW.tobytes(), bytes(31)), errors.TensorMismatch),
]


@pytest.mark.parametrize(("decode", "sent", "expected"), [r[1:] for r in BAD], ids=[r[0] for r in BAD])
def test_a_bad_message_is_refused_by_its_name(decode, sent, expected):
    with pytest.raises(errors.WireError) as caught:
        decode(sent)
    assert type(caught.value) is expected
    assert caught.value.cause
    assert caught.value.fix
    assert "wire.md" not in caught.value.fix


def test_a_refused_frame_names_its_request():
    with pytest.raises(errors.BadField) as caught:
        link.decode_from_edge(frames({**JPEG, "x": SAMPLE["x"]}, X.tobytes()))
    assert caught.value.request_id == 2


def test_the_largest_patch_and_its_signed_body_pass():
    body = np.zeros(link.MAX_SEALED_BYTES, np.uint8)
    theta = np.zeros(link.MAX_PAYLOAD_BYTES, np.uint8)
    message = link.PatchMessage(sealed=wire.declare(body), payload=wire.declare(theta))
    received = link.decode_from_cloud(link.encode_message(message, {"sealed": body, "payload": theta}))
    assert received.tensors["payload"].nbytes == link.MAX_PAYLOAD_BYTES


def test_the_longest_refusal_can_be_read():
    error = errors.BadField("é漢" * 2000, "漢" * 2000)
    message = refusal(error, 7)
    assert link.decode_from_cloud(link.encode_message(message)).message == message


def test_the_page_lists_exactly_these_messages_fields_and_errors():
    text = (REPOSITORY / "docs" / "spec" / "link.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (.*?) \|", text, re.MULTILINE)
    listed = {name: re.findall(r"`(\w+)`", fields) for name, fields in rows}
    messages = {**link.FROM_EDGE, **link.FROM_CLOUD}
    assert listed == {name: list(message.__struct_fields__) for name, message in messages.items()}
    for kind in cloud_errors.LinkRefusal.__subclasses__():
        assert f"`{kind.code}`" in text
    assert re.findall(r"^- \*\*L(\d+)\*\*", text, re.MULTILINE) == [str(i) for i in range(1, 18)]


# --- properties ----------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars | st.binary(max_size=8) | st.sampled_from([SHA, KEY, "cam", "jpeg", "busy"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
any_frames = st.lists(
    st.binary(max_size=200) | st.just(link.PROTOCOL) | values.map(msgpack.packb), max_size=6
)


@st.composite
def mutated(draw, rows):
    """A good message with one thing changed: a field, a byte, a frame's length, the number of frames."""
    message, tensors = draw(st.sampled_from(rows))
    whole = encoded(message, tensors)
    kind = draw(st.sampled_from(["nothing", "field", "nested", "byte", "cut", "longer", "drop", "double"]))
    if kind in ("field", "nested"):
        fields = header(message)
        target = fields
        if kind == "nested" and tensors:
            target = fields[draw(st.sampled_from(sorted(tensors)))]
        name = draw(st.sampled_from([*target, "x", "id", "sealed", "payload", "extra"]))
        if draw(st.booleans()):
            target.pop(name, None)
        else:
            target[name] = copy.deepcopy(draw(values | st.sampled_from(list(fields.values()))))
        whole[1] = msgpack.packb(fields)
        return whole
    index = draw(st.integers(0, len(whole) - 1))
    frame = bytearray(whole[index])
    position = draw(st.integers(0, len(frame) - 1))
    if kind == "byte":
        frame[position] ^= draw(st.integers(1, 255))
    elif kind == "cut":
        del frame[position:]
    elif kind == "longer":
        frame += draw(st.binary(min_size=1, max_size=8))
    whole[index] = bytes(frame)
    if kind == "drop":
        del whole[index]
    elif kind == "double":
        whole.insert(index, whole[index])
    return whole


def read(decode, sent):
    """What was received, or the refusal by its name."""
    try:
        return decode(sent)
    except errors.WireError as error:
        return error


def refused_or_the_same(decode, sent):
    received = read(decode, sent)
    if isinstance(received, errors.WireError):
        assert type(received) is not errors.WireError
        message = refusal(received, received.request_id)
        assert link.decode_from_cloud(link.encode_message(message)).message == message
        return
    again = decode([bytes(f) for f in link.encode_message(received.message, received.tensors)])
    assert again.message == received.message
    for name, array in received.tensors.items():
        assert again.tensors[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("decode", [EDGE, CLOUD])
@PROPERTY
@given(data=st.data())
def test_any_frames_are_refused_by_name_or_read_back_the_same(decode, data):
    refused_or_the_same(decode, data.draw(any_frames))


@pytest.mark.parametrize(("rows", "decode"), [(FROM_EDGE, EDGE), (FROM_CLOUD, CLOUD)])
@PROPERTY
@given(data=st.data())
def test_a_message_with_one_change_is_refused_by_name_or_read_back_the_same(rows, decode, data):
    refused_or_the_same(decode, data.draw(mutated(rows)))
