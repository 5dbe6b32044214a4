"""Connections that are refused before they can say a word: why, for the log. Pure.

Who is refused connects again and again, and chooses how often; so each cause is told at most once in a while.
"""

from __future__ import annotations

import zmq

EVENTS = (
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)
"""What a socket's monitor is asked for."""
CROWDED = "too many connections that have not said a word, the one that was silent for the longest goes"
EVERY_S = 1.0
MAX_CAUSES = 64


def cause_of(event: int, value: int) -> str:
    """Why a handshake has failed, from a monitor's event; "" where none has, or the authority has said why.

    Args:
        event: as libzmq numbers them.
        value: of the event: a protocol error, a status or an errno.
    """
    if event not in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
        return ""
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return "it does not ask for CURVE"
        if value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
            return "it takes this for a server with another key"
        return "what it sends is no handshake"
    return "the handshake broke off, or took too long: who connects is silent, or does not ask for CURVE"


class Refusals:
    """How often each cause may be told."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, int]] = {}

    def line(self, where: str, cause: str, who: str, now_s: float) -> str:
        """A line for the log; "" where the cause was told just now.

        Args:
            where: the address that was connected to.
            cause: why it is refused.
            who: as far as that is known.
            now_s: seconds.
        """
        last, silent = self._told.get(cause, (-EVERY_S, 0))
        if now_s - last < EVERY_S:
            self._told[cause] = (last, silent + 1)
            return ""
        while len(self._told) >= MAX_CAUSES and cause not in self._told:
            self._told.pop(next(iter(self._told)))
        self._told[cause] = (now_s, 0)
        more = f", and {silent} before it" if silent else ""
        return f"a connection{who} to {where} is refused{more}: {cause}"
