"""A graph of one node, for asking a device whether an array is finite: the sum of its values.

It is the question of `arrays.is_finite`, with four bytes to fetch for an answer. The ONNX file is written here byte by
byte (Protocol Buffers wire format, the fields of onnx.proto3), because an edge has no `onnx`.
"""

from __future__ import annotations

INPUT, OUTPUT = "values", "total"
_IR_VERSION, _OPSET = 8, 13
_FLOAT = 1  # TensorProto.DataType


def sum_graph() -> bytes:
    """An ONNX model: `values`, float32 of any shape -> `total`, float32 []."""
    node = _text(1, INPUT) + _text(2, OUTPUT) + _text(4, "ReduceSum") + _bytes(5, _keepdims_0())
    graph = (
        _bytes(1, node)
        + _text(2, "sum")
        + _bytes(11, _text(1, INPUT) + _bytes(2, _tensor(b"")))
        # A shape without dimensions is a scalar's; no shape at all is any.
        + _bytes(12, _text(1, OUTPUT) + _bytes(2, _tensor(_bytes(2, b""))))
    )
    opset = _text(1, "") + _number(2, _OPSET)
    return _number(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, opset)


def _keepdims_0() -> bytes:
    """AttributeProto: keepdims = 0, of type INT."""
    return _text(1, "keepdims") + _number(3, 0) + _number(20, 2)


def _tensor(shape: bytes) -> bytes:
    """TypeProto of a float32 tensor."""
    return _bytes(1, _number(1, _FLOAT) + shape)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
