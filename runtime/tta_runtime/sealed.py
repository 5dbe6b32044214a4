"""A signed body: bytes that are kept as they were received, and the bounded way from them to a struct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from .errors import MalformedBody
from .packed import unpack
from .signing import MAX_SIGNATURES, SecretKey, Signature

MAX_BODY_BYTES = 8192
MAX_ITEMS = 32
MAX_STR_BYTES = 256

T = TypeVar("T", bound=msgspec.Struct)


class SignatureEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One signature on the wire."""

    key_id: str
    value: bytes


class Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A body with its signatures."""

    body: bytes
    signatures: tuple[SignatureEntry, ...]

    @property
    def signed(self) -> list[Signature]:
        """The signatures as `signing.verify` takes them."""
        return [Signature(entry.key_id, entry.value) for entry in self.signatures]


def seal(body: msgspec.Struct, domain: bytes, keys: Sequence[SecretKey]) -> Sealed:
    """A body signed by some keys."""
    data = msgspec.msgpack.encode(body)
    made = [key.sign(domain, data) for key in keys]
    return Sealed(data, tuple(SignatureEntry(each.key_id, each.value) for each in made))


def encode(sealed: Sealed) -> bytes:
    """The bytes of a body with its signatures."""
    return msgspec.msgpack.encode(sealed)


def decode(data: bytes) -> Sealed:
    """A body with its signatures, unverified.

    Raises:
        MalformedBody: it is none within the limits (P1).
    """
    found = _map(data, MAX_BODY_BYTES + 1024 * MAX_SIGNATURES, binary=MAX_BODY_BYTES)
    sealed = _typed(found, Sealed)
    check(sealed)
    return sealed


def check(sealed: Sealed) -> None:
    """Whether a body and its signatures are within the limits (P1).

    Raises:
        MalformedBody: they are not.
    """
    if len(sealed.body) > MAX_BODY_BYTES:
        raise MalformedBody(
            f"the body has {len(sealed.body)} bytes, the limit is {MAX_BODY_BYTES}", "Refuse who sent it"
        )
    if len(sealed.signatures) > MAX_SIGNATURES:
        raise MalformedBody(
            f"there are {len(sealed.signatures)} signatures, the limit is {MAX_SIGNATURES}",
            "Refuse who sent it",
        )


def open_body(data: bytes, kind: type[T]) -> T:
    """The struct in a body whose signatures have been verified.

    Raises:
        MalformedBody: it is another one, or something else (P2).
    """
    return _typed(_map(data, MAX_BODY_BYTES, binary=64), kind)


def _map(data: bytes, limit: int, *, binary: int) -> dict[str, Any]:
    if len(data) > limit:
        raise MalformedBody(f"it has {len(data)} bytes, the limit is {limit}", "Refuse who sent it")
    try:
        found = unpack(data, max_items=MAX_ITEMS, max_str_bytes=MAX_STR_BYTES, max_bin_bytes=binary)
    except ValueError as error:
        raise MalformedBody(
            f"it is not one MessagePack map within the limits ({error})",
            "See docs/spec/patch.md",
        ) from error
    if not isinstance(found, dict):
        raise MalformedBody(
            f"it is a MessagePack {type(found).__name__}, not a map", "See docs/spec/patch.md"
        )
    return found


def _typed(found: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        raise MalformedBody(
            f"it is no {kind.__name__.lower()} of this version: {error}", "See docs/spec/patch.md"
        ) from error
