"""The wire format, clause by clause (docs/spec/wire.md): literal bad messages, properties of any bytes."""

from __future__ import annotations

import re

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from running import REPOSITORY
from tta_edge import errors, wire
from tta_runtime import errors as wire_errors

LIMITS = wire.Limits(max_payload_bytes=1 << 20)
X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
PREDICT = {"type": "predict", "id": 7, "x": {"dtype": "float32", "shape": [2, 3, 4]}}

GENERATE = {"type": "generate", "id": 1, "prompt": {"dtype": "uint8", "shape": [3]}}


def frames(header=None, *tensors, protocol=wire.PROTOCOL):
    header = PREDICT if header is None else header
    return [protocol, header if isinstance(header, bytes) else msgpack.packb(header), *tensors]


def predict(**changes):
    return frames({**PREDICT, **changes}, X.tobytes())


def nested(depth):
    return b"\x81\xa1a" + b"\x91" * depth + b"\x00"


def test_a_request_survives_the_round_trip_without_a_copy():
    message = wire.Predict(id=7, stream="camera-1", adapt=False, compare=True, x=wire.declare(X))
    sent = [bytes(frame) for frame in wire.encode(message, {"x": X})]
    received = wire.decode_request(sent, LIMITS)
    assert received.message == message
    np.testing.assert_array_equal(received.tensors["x"], X)
    assert received.tensors["x"].base is not None
    assert not received.tensors["x"].flags.writeable


@pytest.mark.parametrize("shape", [(0, 3), (), (1,), (2, 0, 5)])
def test_odd_but_legal_shapes_pass(shape):
    array = np.ones(shape, np.uint8)
    sent = wire.encode(wire.Predict(id=0, x=wire.declare(array)), {"x": array})
    assert wire.decode_request(sent, LIMITS).tensors["x"].shape == shape


def test_strided_and_big_endian_arrays_arrive_with_the_same_values():
    for array in (X.transpose(2, 0, 1), X.astype(">f4"), X[::-1]):
        sent = wire.encode(wire.Predict(id=0, x=wire.declare(array)), {"x": array})
        np.testing.assert_array_equal(wire.decode_request(sent, LIMITS).tensors["x"], array)


def test_a_tensor_at_an_odd_address_is_made_usable():
    buffer = memoryview(b"\0" + X.tobytes())[1:]
    view = wire.decode_request(frames(None, buffer), LIMITS).tensors["x"]
    assert view.flags.aligned
    np.testing.assert_array_equal(view, X)


@pytest.mark.parametrize("message", [wire.Info(id=1), wire.Status(id=2), wire.Reset(id=3, stream="a")])
def test_requests_without_tensors(message):
    assert wire.decode_request(wire.encode(message), LIMITS).message == message


def test_a_reply_with_and_without_the_source():
    logits = np.ones((2, 3), np.float32)
    rest = {
        "id": 1,
        "adapted": True,
        "steps": 4,
        "distance": 0.5,
        "theta_digest": "ab",
        "report": {"loss": 1.0},
    }
    for extra in ({}, {"source_logits": wire.declare(logits)}):
        message = wire.Prediction(**rest, compute_ms=1.0, logits=wire.declare(logits), **extra)
        tensors = dict.fromkeys(("logits", *extra), logits)
        received = wire.decode_reply(wire.encode(message, tensors))
        assert received.message == message
        assert set(received.tensors) == set(tensors)


# Each row: the clause, what is sent, the one error it must be.
BAD = [
    ("W1 no frame", [], wire_errors.BadFraming),
    ("W1 protocol only", [wire.PROTOCOL], wire_errors.BadFraming),
    ("W1 a frame too many", frames(None, *[b""] * 5), wire_errors.BadFraming),
    ("W1 a hundred thousand frames", [b""] * 100_000, wire_errors.BadFraming),
    ("W2 another protocol", frames(None, protocol=b"HTTP"), wire_errors.UnsupportedProtocol),
    ("W2 a later version", frames(None, protocol=b"TTA2"), wire_errors.UnsupportedProtocol),
    ("W2 trailing byte", frames(None, protocol=b"TTA1\0"), wire_errors.UnsupportedProtocol),
    ("W2 empty", frames(None, protocol=b""), wire_errors.UnsupportedProtocol),
    ("W3 long header", frames(b"\xc1" * 8193), wire_errors.MessageTooLarge),
    ("W3 large tensors", frames(None, *[b"\0" * (1 << 19)] * 3), wire_errors.MessageTooLarge),
    ("W4 empty header", frames(b""), wire_errors.MalformedHeader),
    ("W4 not MessagePack", frames(b"\xc1"), wire_errors.MalformedHeader),
    ("W4 cut short", frames(msgpack.packb(PREDICT)[:-1]), wire_errors.MalformedHeader),
    ("W4 something after it", frames(msgpack.packb(PREDICT) + b"\0"), wire_errors.MalformedHeader),
    ("W4 an array", frames(b"\x93\x01\x02\x03"), wire_errors.MalformedHeader),
    ("W4 a number", frames(b"\x01"), wire_errors.MalformedHeader),
    ("W4 claims 2**32-1 elements", frames(b"\x81\xa1a\xdd\xff\xff\xff\xff"), wire_errors.MalformedHeader),
    ("W4 claims 2**32-1 pairs", frames(b"\xdf\xff\xff\xff\xff"), wire_errors.MalformedHeader),
    ("W4 claims a 4 GiB string", frames(b"\x81\xa1a\xdb\xff\xff\xff\xff"), wire_errors.MalformedHeader),
    ("W4 too many pairs", frames({str(i): 0 for i in range(65)}), wire_errors.MalformedHeader),
    ("W4 long string", frames({"type": "x" * 1025}), wire_errors.MalformedHeader),
    ("W4 nested deeply", frames(nested(5000)), wire_errors.MalformedHeader),
    ("W4 binary value", frames({"type": b"predict"}), wire_errors.MalformedHeader),
    ("W4 extension type", frames(b"\x81\xa1a\xd4\x01\x00"), wire_errors.MalformedHeader),
    ("W4 timestamp", frames(b"\x81\xa1a\xd6\xff\0\0\0\0"), wire_errors.MalformedHeader),
    ("W4 integer key", frames(b"\x81\x01\x01"), wire_errors.MalformedHeader),
    ("W4 empty binary key", frames(b"\x81\xc4\x00\x01"), wire_errors.MalformedHeader),
    ("W4 array as key", frames(b"\x81\x90\x01"), wire_errors.MalformedHeader),
    ("W4 the same key twice", frames(b"\x82\xa2id\x01\xa2id\x02"), wire_errors.MalformedHeader),
    ("W4 broken UTF-8", frames(b"\x81\xa1\xff\x01"), wire_errors.MalformedHeader),
    ("W5 no type", frames({"id": 1}), wire_errors.UnknownMessage),
    ("W5 unknown type", frames({"type": "predcit", "id": 1}), wire_errors.UnknownMessage),
    ("W5 type is a list", frames({"type": ["predict"], "id": 1}), wire_errors.UnknownMessage),
    ("W5 a reply as a request", frames({"type": "reset-done", "id": 1}), wire_errors.UnknownMessage),
    ("W6 unknown field", predict(adpat=False), wire_errors.UnknownField),
    ("W6 unknown tensor field", predict(x={**PREDICT["x"], "order": "F"}), wire_errors.UnknownField),
    ("W7 missing id", frames({"type": "info"}), wire_errors.BadField),
    ("W7 id is a float", frames({"type": "info", "id": 1.0}), wire_errors.BadField),
    ("W7 id is a bool", frames({"type": "info", "id": True}), wire_errors.BadField),
    ("W7 negative id", frames({"type": "info", "id": -1}), wire_errors.BadField),
    ("W7 huge id", frames({"type": "info", "id": 2**53}), wire_errors.BadField),
    ("W7 adapt is a number", predict(adapt=1), wire_errors.BadField),
    ("W7 stream climbs up", predict(stream="../x"), wire_errors.BadField),
    ("W7 stream starts with a dot", predict(stream=".x"), wire_errors.BadField),
    ("W7 stream is empty", predict(stream=""), wire_errors.BadField),
    ("W7 stream is long", predict(stream="a" * 65), wire_errors.BadField),
    ("W7 stream ends the line", predict(stream="a\n"), wire_errors.BadField),
    ("W7 top_k beyond 31 bits", frames(GENERATE | {"top_k": 2**31}, b"abc"), wire_errors.BadField),
    ("W7 no tensor", frames({"type": "predict", "id": 1}), wire_errors.BadField),
    ("W7 tensor is nil", predict(x=None), wire_errors.BadField),
    ("W7 object dtype", predict(x={"dtype": "object", "shape": [2]}), wire_errors.BadField),
    ("W7 dtype with byte order", predict(x={"dtype": ">f4", "shape": [2, 3, 4]}), wire_errors.BadField),
    ("W7 negative dimension", predict(x={"dtype": "float32", "shape": [-2, -12]}), wire_errors.BadField),
    ("W7 nine dimensions", predict(x={"dtype": "float32", "shape": [1] * 9}), wire_errors.BadField),
    ("W7 dimension is text", predict(x={"dtype": "float32", "shape": ["batch"]}), wire_errors.BadField),
    ("W8 tensor missing", frames(None), wire_errors.TensorMismatch),
    ("W8 tensor too many", frames(None, X.tobytes(), b""), wire_errors.TensorMismatch),
    ("W8 tensor of a message without", frames({"type": "info", "id": 1}, b"\0"), wire_errors.TensorMismatch),
    ("W9 a byte short", frames(None, X.tobytes()[:-1]), wire_errors.TensorMismatch),
    ("W9 a byte more", frames(None, X.tobytes() + b"\0"), wire_errors.TensorMismatch),
    ("W9 another dtype", predict(x={"dtype": "float64", "shape": [2, 3, 4]}), wire_errors.TensorMismatch),
    (
        "W9 size overflows 64 bits",
        predict(x={"dtype": "float64", "shape": [2**31 - 1] * 8}),
        wire_errors.TensorMismatch,
    ),
    (
        "W9 size wraps to 96",
        predict(x={"dtype": "float32", "shape": [2**30, 2**30, 2**30, 2**30, 24]}),
        wire_errors.TensorMismatch,
    ),
    (
        "W9 cannot be laid out",
        frames({**PREDICT, "x": {"dtype": "uint8", "shape": [0, *[2**31 - 1] * 7]}}, b""),
        wire_errors.TensorMismatch,
    ),
]


@pytest.mark.parametrize(("sent", "expected"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_message_is_refused_by_its_name(sent, expected):
    with pytest.raises(wire_errors.WireError) as caught:
        wire.decode_request(sent, LIMITS)
    assert type(caught.value) is expected
    assert caught.value.cause
    assert caught.value.fix


def test_every_wire_error_has_a_bad_message():
    kinds = {
        kind
        for kind in vars(wire_errors).values()
        if isinstance(kind, type) and issubclass(kind, wire_errors.WireError)
    }
    assert {row[2] for row in BAD} == kinds - {wire_errors.WireError}


def test_misspelt_names_get_a_suggestion():
    with pytest.raises(wire_errors.UnknownField, match="no field `adpat`, did you mean `adapt`"):
        wire.decode_request(predict(adpat=False), LIMITS)
    with pytest.raises(wire_errors.UnknownMessage, match="`predcit`, did you mean `predict`"):
        wire.decode_request(frames({"type": "predcit", "id": 1}), LIMITS)


@pytest.mark.parametrize(
    ("sent", "request_id"),
    [
        (predict(adpat=0), 7),
        (frames({"type": "nothing", "id": 9}), 9),
        (frames({"type": "info", "id": True}), None),
        (frames({"type": "info", "id": 2**60}), None),
        (frames(b"\xc1"), None),
    ],
)
def test_w10_the_refusal_names_the_request_where_its_id_can_be_read(sent, request_id):
    with pytest.raises(wire_errors.WireError) as caught:
        wire.decode_request(sent, LIMITS)
    assert caught.value.request_id == request_id


@pytest.mark.parametrize("dtype", ["object", "datetime64[s]", "complex64", "U4", "bool"])
def test_w12_arrays_that_cannot_be_sent_are_refused_before_sending(dtype):
    with pytest.raises(wire_errors.BadField):
        wire.declare(np.zeros(3, dtype))


def test_encode_refuses_tensors_it_did_not_declare():
    message = wire.Predict(id=1, x=wire.declare(X))
    for tensors in ({}, {"x": X, "y": X}, {"x": X[:1]}, {"x": X.astype(np.float64)}):
        with pytest.raises(wire_errors.TensorMismatch):
            wire.encode(message, tensors)


def test_the_specification_lists_exactly_these_messages_fields_and_errors():
    text = (REPOSITORY / "docs" / "spec" / "wire.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (.*?) \|", text, re.MULTILINE)
    listed = {name: re.findall(r"`(\w+)`", fields) for name, fields in rows}
    messages = {**wire.REQUESTS, **wire.REPLIES}
    assert listed == {name: list(message.__struct_fields__) for name, message in messages.items()}
    for kind in (*vars(wire_errors).values(), *vars(errors).values()):
        if isinstance(kind, type) and issubclass(kind, (wire_errors.WireError, errors.ServiceError)):
            named = f"`{kind.code}`" in text
            assert named or kind in (wire_errors.WireError, errors.ServiceError)
    assert {f"W{number}" for number in range(1, 10)} <= {row[0].split()[0] for row in BAD}


# --- properties ----------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
headers = st.one_of(
    st.binary(max_size=200),
    values.map(msgpack.packb),
    # near misses: a good header with some fields changed, added or left out
    st.builds(
        lambda change, drop: msgpack.packb({k: v for k, v in {**PREDICT, **change}.items() if k not in drop}),
        st.dictionaries(
            st.sampled_from(["type", "id", "stream", "adapt", "compare", "x", "y"]), values, max_size=3
        ),
        st.sets(st.sampled_from(list(PREDICT)), max_size=1),
    ),
)
anything = st.builds(
    lambda protocol, header, tensors: [*protocol, *header, *tensors],
    st.lists(st.sampled_from([wire.PROTOCOL, b"TTA2", b""]), max_size=2),
    st.lists(headers, max_size=2),
    st.lists(st.binary(max_size=100) | st.just(X.tobytes()), max_size=3),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(anything)
def test_any_frames_are_refused_by_name_or_read_back_the_same(sent):
    try:
        received = wire.decode_request(sent, LIMITS)
    except wire_errors.WireError:
        return
    again = wire.decode_request(wire.encode(received.message, received.tensors), LIMITS)
    assert again.message == received.message
    for name, array in received.tensors.items():
        assert again.tensors[name].tobytes() == array.tobytes()


stream_ids = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\Z")
arrays = hnp.arrays(
    dtype=st.sampled_from(["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]),
    shape=hnp.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3),
)


@settings(max_examples=200, deadline=None)
@given(arrays, st.integers(0, wire.MAX_REQUEST_ID), st.booleans(), stream_ids)
def test_any_request_reads_back_the_same(array, request_id, adapt, stream):
    message = wire.Predict(id=request_id, stream=stream, adapt=adapt, x=wire.declare(array))
    received = wire.decode_request([bytes(f) for f in wire.encode(message, {"x": array})], LIMITS)
    assert received.message == message
    assert received.tensors["x"].dtype == array.dtype
    assert received.tensors["x"].shape == array.shape
    assert received.tensors["x"].tobytes() == array.tobytes()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_one_flipped_byte_is_refused_by_name_or_changes_one_thing(data):
    whole = [bytes(f) for f in wire.encode(wire.Predict(id=7, x=wire.declare(X)), {"x": X})]
    index = data.draw(st.integers(0, 1))
    position = data.draw(st.integers(0, len(whole[index]) - 1))
    flipped = bytearray(whole[index])
    flipped[position] ^= data.draw(st.integers(1, 255))
    whole[index] = bytes(flipped)
    try:
        received = wire.decode_request(whole, LIMITS)
    except wire_errors.WireError:
        return
    assert received.message != wire.Predict(id=7, x=wire.declare(X))
