"""The root: which keys count, and the chain from one root to the next. See docs/spec/patch.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from .errors import Expired, RootRefused
from .sealed import Sealed, check, open_body, seal
from .signing import KEY_BYTES, KEY_ID_CHARS, SecretKey, key_id, verify

DOMAIN = b"tta-root-1\n"

Natural = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seconds = Annotated[int, Meta(ge=0, le=2**53 - 1)]
KeyId = Annotated[str, Meta(pattern=rf"^[0-9a-f]{{{KEY_ID_CHARS}}}\Z")]
Public = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class Root(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may sign what."""

    format: Annotated[int, Meta(ge=1, le=1)] = 1
    version: Natural
    """1, 2, ...; each follows the one before."""
    epoch: Natural
    """Patches and heads carry it; a raised one lets sequence numbers begin anew."""
    root_keys: dict[KeyId, Public]
    """Public keys that may sign the next root, by name."""
    root_threshold: Annotated[int, Meta(ge=1, le=8)]
    publisher_keys: dict[KeyId, Public]
    """Public keys that may sign patches and heads."""
    publisher_threshold: Annotated[int, Meta(ge=1, le=8)]
    not_after_s: Seconds
    """Seconds since 1970 after which this root is not to be adopted anew."""


def named(keys: Sequence[bytes]) -> dict[str, bytes]:
    """Public keys by their names."""
    return {key_id(public): public for public in keys}


def first_root(sealed: Sealed) -> Root:
    """The root that an edge begins with; it came by a way that is trusted (enrolment), and must be whole.

    Raises:
        PatchError: it is not a root that its own root keys have signed.
    """
    check(sealed)
    root = _sound(open_body(sealed.body, Root))
    verify(root.root_keys, root.root_threshold, DOMAIN, sealed.body, sealed.signed)
    return root


def next_root(current: Root, sealed: Sealed, *, now_s: float) -> Root:
    """The root that follows.

    Args:
        current: that is trusted now.
        sealed: what somebody says is the next one.
        now_s: seconds since 1970.

    Raises:
        RootRefused: another version than the next, or a lower epoch (R1, R2).
        TooFewSignatures, BadSignature, UnknownSigner: not signed by enough of the old and of the new root keys (R3).
        Expired: past its time (R4).
    """
    check(sealed)
    root = _sound(open_body(sealed.body, Root))
    if root.version != current.version + 1:
        raise RootRefused(
            f"the root has version {root.version}, the next one is {current.version + 1}",
            "Fetch the roots between in order",
        )
    if root.epoch < current.epoch:
        raise RootRefused(
            f"the root has epoch {root.epoch}, the present one is {current.epoch}", "An epoch never falls"
        )
    verify({**current.root_keys, **root.root_keys}, 0, DOMAIN, sealed.body, sealed.signed)  # nobody else (P3)
    # Those of the other root may sign as well: each threshold looks at its own keys only.
    for keys, threshold in (
        (current.root_keys, current.root_threshold),
        (root.root_keys, root.root_threshold),
    ):
        own = [signature for signature in sealed.signed if signature.key_id in keys]
        verify(keys, threshold, DOMAIN, sealed.body, own)
    if now_s > root.not_after_s:
        raise Expired(
            f"the root's time ended at {root.not_after_s}, it is {int(now_s)}", "Have a new root signed"
        )
    return root


def chain(kept: Sequence[Sealed]) -> list[Root]:
    """The roots that were adopted one after the other, from what was kept of them; their time does not end them.

    Args:
        kept: oldest first.

    Raises:
        PatchError: one does not follow the one before.
    """
    roots: list[Root] = []
    for sealed in kept:
        roots.append(next_root(roots[-1], sealed, now_s=0) if roots else first_root(sealed))
    return roots


def make_root(root: Root, keys: Sequence[SecretKey]) -> Sealed:
    """A signed root; for the first one its own root keys sign, for the next ones the old and the new.

    Raises:
        RootRefused: it contradicts itself.
    """
    return seal(_sound(root), DOMAIN, keys)


def _sound(root: Root) -> Root:
    for kind, keys, threshold in (
        ("root", root.root_keys, root.root_threshold),
        ("publisher", root.publisher_keys, root.publisher_threshold),
    ):
        _check_names(kind, keys)
        if threshold > len(keys):
            raise RootRefused(
                f"{threshold} {kind} keys are asked for, there are {len(keys)}", "Lower the threshold"
            )
    return root


def _check_names(kind: str, keys: Mapping[str, bytes]) -> None:
    for name, public in keys.items():
        if key_id(public) != name:
            raise RootRefused(
                f"a {kind} key is named {name}, its name is {key_id(public)}",
                "A key listed under two names would count twice",
            )
