"""Who may connect: ZeroMQ's authentication requests answered by a function of the key.

The library asks over an in-process socket for each new connection, before a byte of it is delivered. Nothing is allowed
but CURVE, whatever an attacker's client chooses, and nobody but keys that the caller knows.

Source: ZeroMQ RFC 27 (ZAP).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import zmq.utils.z85

ENDPOINT = "inproc://zeromq.zap.01"
VERSION = b"1.0"
OK = b"200"
"""Status, the third frame of an answer, of a connection that is let in."""

Allow = Callable[[str, str], str]
"""(domain, z85 public key) -> "" where the key may connect, else why not."""


def answer(frames: Sequence[bytes], allow: Allow) -> list[bytes]:
    """The reply to one request.

    Args:
        frames: version, request id, domain, address, routing id, mechanism, credentials.
        allow: decides.

    Returns:
        version, request id, status code, status text, user id, metadata. The user id of an allowed connection is its
        key; what a peer says of itself later can never be more than that.
    """
    number = bytes(frames[1]) if len(frames) > 1 else b""
    if len(frames) < 6 or frames[0] != VERSION:
        return _reply(number, b"500", "not a request of this protocol", "")
    domain, mechanism, credentials = frames[2], frames[5], frames[6:]
    if mechanism != b"CURVE" or len(credentials) != 1 or len(credentials[0]) != 32:
        return _reply(number, b"400", "only CURVE is allowed", "")
    key = zmq.utils.z85.encode(bytes(credentials[0])).decode("ascii")
    refused = allow(bytes(domain).decode("utf-8", "replace"), key)
    if refused:
        return _reply(number, b"400", refused, "")
    return _reply(number, OK, "OK", key)


def _reply(number: bytes, status: bytes, text: str, user: str) -> list[bytes]:
    return [VERSION, number, status, text.encode(), user.encode(), b""]
