"""Tickets: what an operator carries from the cloud to an edge, once."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

import msgspec
from msgspec import Meta

from .errors import BadValue
from .wire import NAME_PATTERN

PREFIX = "tta1."
MAX_CHARS = 1024


class Ticket(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where to enrol, who is there, and the secret that lets one edge in."""

    door: Annotated[str, Meta(max_length=256)]
    server_key: Annotated[str, Meta(min_length=40, max_length=40)]
    """The cloud's CURVE public key, z85: an edge talks to nobody else."""
    secret: Annotated[str, Meta(min_length=16, max_length=128)]
    name: Annotated[str, Meta(pattern=NAME_PATTERN)]


def encode_ticket(ticket: Ticket) -> str:
    """The text of a ticket: one word."""
    return PREFIX + base64.urlsafe_b64encode(msgspec.msgpack.encode(ticket)).decode().rstrip("=")


def decode_ticket(text: str) -> Ticket:
    """A ticket from its text.

    Raises:
        BadValue: it is none.
    """
    text = text.strip()
    try:
        if not text.startswith(PREFIX) or len(text) > MAX_CHARS:
            raise ValueError("it does not begin with tta1.")
        body = text.removeprefix(PREFIX)
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        return msgspec.msgpack.decode(data, type=Ticket)
    except (ValueError, binascii.Error, msgspec.DecodeError) as error:
        raise BadValue(
            f"the token is not whole ({error})", "Copy all of what `tta-cloud enroll` has printed"
        ) from error
