"""Patches: a theta on its way from the cloud to edges, and the heads that say which is the newest. Pure.

docs/spec/patch.md has the rules; their numbers stand where they are checked, in the order of the page: from cheap to
expensive, and nothing is allocated from a length that was not verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from . import theta as thetas
from .errors import (
    BaseMismatch,
    DigestMismatch,
    EpochAhead,
    Expired,
    FastForward,
    MalformedBody,
    PayloadMismatch,
    PayloadNotFinite,
    Replayed,
    TooFar,
    UnknownCodec,
    WrongChannel,
)
from .manifest import ThetaLayout
from .root import Root
from .sealed import Sealed, check, open_body, seal
from .signing import SecretKey, verify
from .theta import Vector

DOMAIN = b"tta-patch-1\n"
HEAD_DOMAIN = b"tta-head-1\n"
CODECS = ("raw",)
MAX_JUMP = 1 << 20
HEAD_LIFE_S = 600
MAX_PAYLOAD_BYTES = 16 << 20

Sha = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
MaybeSha = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Seq = Annotated[int, Meta(ge=0, le=2**63 - 1)]
DType = Literal["float32", "float16"]


class Patch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is signed of a patch."""

    format: Annotated[int, Meta(ge=1, le=1)] = 1
    bundle_digest: Sha
    """Of the bundle whose theta it is; the layout follows from it."""
    channel: Name
    """The group of edges it is for."""
    epoch: Count
    seq: Seq
    parent_digest: Sha
    """Of the theta that the learner went on from; not needed to apply an absolute theta."""
    theta_digest: Sha
    """Of the float32 theta that results."""
    codec: Annotated[str, Meta(max_length=32)] = "raw"
    dtype: DType
    size: Count
    """P, elements of theta."""
    payload_bytes: Count
    payload_sha256: Sha
    samples: Count
    """New samples behind it."""
    issued_s: Count
    """Seconds since 1970."""


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is the newest patch of a group; short-lived, so that it is the heartbeat as well."""

    format: Annotated[int, Meta(ge=1, le=1)] = 1
    channel: Name
    epoch: Count
    seq: Seq
    """Of the newest patch; 0: there is none in this epoch."""
    body_sha256: MaybeSha
    """Of that patch's signed body; empty where there is none."""
    issued_s: Count
    not_after_s: Count


@dataclass(frozen=True)
class Trust:
    """What an edge trusts now; a refusal leaves it as it is.

    Attributes:
        root: whose publisher keys count.
        bundle_digest: of the bundle at hand.
        channel: the edge's group.
        epoch: of the last accepted patch.
        seq: of the last accepted patch.
    """

    root: Root
    bundle_digest: str
    channel: str
    epoch: int = 0
    seq: int = 0


@dataclass(frozen=True, eq=False)
class Verified:
    """A patch that was verified, and its theta [P], float32, read-only."""

    patch: Patch
    theta: Vector


def make_patch(
    vector: Vector,
    layout: ThetaLayout,
    keys: Sequence[SecretKey],
    *,
    bundle_digest: str,
    channel: str,
    epoch: int,
    seq: int,
    parent_digest: str,
    samples: int,
    issued_s: int,
    dtype: DType = "float32",
) -> tuple[Sealed, bytes]:
    """A signed patch and its payload.

    Args:
        vector: [P], float32.
        layout: of the bundle.
        keys: of publishers.
        bundle_digest: of the bundle.
        channel: the group.
        epoch: of the root.
        seq: higher than that of every patch of the epoch.
        parent_digest: of the theta that the learner went on from.
        samples: new ones behind it.
        issued_s: seconds since 1970.
        dtype: of the payload; float16 halves it and rounds.

    Raises:
        PayloadNotFinite: theta is not finite, or not in that dtype.
    """
    with np.errstate(over="ignore"):
        sent = np.ascontiguousarray(vector.astype(np.dtype(dtype).newbyteorder("<")))
    if not np.isfinite(sent).all():
        raise PayloadNotFinite(
            f"theta as {dtype} holds values that are not finite, its largest is {np.abs(vector).max():.4g}",
            "Send float32" if np.isfinite(vector).all() else "Keep the theta before",
        )
    payload = sent.tobytes()
    body = Patch(
        bundle_digest=bundle_digest,
        channel=channel,
        epoch=epoch,
        seq=seq,
        parent_digest=parent_digest,
        theta_digest=thetas.digest(layout, sent.astype(np.float32)),
        dtype=dtype,
        size=int(vector.size),
        payload_bytes=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        samples=samples,
        issued_s=issued_s,
    )
    return seal(body, DOMAIN, keys), payload


def verify_patch(
    sealed: Sealed,
    payload: bytes | memoryview,
    trust: Trust,
    layout: ThetaLayout,
    theta0: Vector,
    *,
    max_distance: float,
) -> Verified:
    """The theta of a patch, or the first rule that it breaks.

    Args:
        sealed: as received.
        payload: as received.
        trust: what the edge trusts now.
        layout: of the bundle at hand.
        theta0: [P], its source theta.
        max_distance: radius of the ball around the source, as relative L2 distance.

    Raises:
        PatchError: the subclass that names the rule; nothing has changed.
    """
    return verify_payload(verify_body(sealed, trust), payload, layout, theta0, max_distance=max_distance)


def verify_payload(
    patch: Patch, payload: bytes | memoryview, layout: ThetaLayout, theta0: Vector, *, max_distance: float
) -> Verified:
    """The theta of a patch whose body has been verified.

    Args:
        patch: from `verify_body`.
        payload: as received.
        layout: of the bundle at hand.
        theta0: [P], its source theta.
        max_distance: radius of the ball around the source, as relative L2 distance.

    Raises:
        PatchError: the subclass that names the rule (P8 to P11).
    """
    if patch.size != layout.size:  # P8
        raise PayloadMismatch(
            f"the patch has {patch.size} elements, theta has {layout.size}", "It was made for another bundle"
        )
    wanted = patch.size * np.dtype(patch.dtype).itemsize
    if patch.payload_bytes != wanted or len(payload) != wanted:
        raise PayloadMismatch(
            f"the payload has {len(payload)} bytes and is said to have {patch.payload_bytes}; "
            f"{patch.size} x {patch.dtype} are {wanted}",
            "It was cut off or changed on its way; fetch it again",
        )
    found = hashlib.sha256(payload).hexdigest()
    if found != patch.payload_sha256:
        raise PayloadMismatch(
            f"the payload's sha256 is {found[:12]}, signed was {patch.payload_sha256[:12]}",
            "It was changed on its way; fetch it again",
        )
    vector = np.frombuffer(payload, dtype=np.dtype(patch.dtype).newbyteorder("<")).astype(np.float32)
    if not np.isfinite(vector).all():  # P9
        raise PayloadNotFinite(
            f"{int((~np.isfinite(vector)).sum())} of {vector.size} values are not finite",
            "Keep the present base, and look at the cloud's log",
        )
    distance = thetas.distance(vector, theta0)
    if distance > max_distance:  # P10
        raise TooFar(
            f"the theta is {distance:.4g} from the source, max_distance is {max_distance:.4g}",
            "Keep the present base, or raise `max_distance`",
        )
    digest = thetas.digest(layout, vector)
    if digest != patch.theta_digest:  # P11
        raise DigestMismatch(
            f"the theta is {digest[:12]}, signed was {patch.theta_digest[:12]}",
            "Sender and receiver disagree on what theta is",
        )
    vector.flags.writeable = False
    return Verified(patch, vector)


def verify_body(sealed: Sealed, trust: Trust) -> Patch:
    """What is signed of a patch, where an edge may take it; its payload has not been looked at.

    Raises:
        PatchError: the subclass that names the rule (P1 to P7).
    """
    check(sealed)  # P1
    _verify_publisher(sealed, trust.root, DOMAIN)  # P3
    patch = open_body(sealed.body, Patch)  # P2
    if patch.codec not in CODECS:  # P4
        raise UnknownCodec(
            f"the payload's codec is {patch.codec!r}, known is {', '.join(CODECS)}", "Use a newer edge"
        )
    if patch.bundle_digest != trust.bundle_digest:  # P5
        raise BaseMismatch(
            f"the patch was made for the bundle {patch.bundle_digest[:12]}, at hand is {trust.bundle_digest[:12]}",
            "Serve the bundle that the cloud's student is",
        )
    _check_channel(patch.channel, trust.channel)
    _check_epoch(patch.epoch, trust.root)  # P6
    before = trust.seq if patch.epoch == trust.epoch else 0
    if patch.epoch < trust.epoch or patch.seq <= before:
        raise Replayed(
            f"the patch is epoch {patch.epoch} number {patch.seq}, accepted was {trust.epoch} number {trust.seq}",
            "An older state is published anew under a higher number",
        )
    if patch.seq - before > MAX_JUMP:  # P7
        raise FastForward(
            f"the patch has number {patch.seq}, after {before} at most {before + MAX_JUMP} can follow",
            "Rotate the root with a raised epoch; numbers then begin anew",
        )
    return patch


def body_sha256(sealed: Sealed) -> str:
    """Name of a signed body, as heads give it."""
    return hashlib.sha256(sealed.body).hexdigest()


def make_head(
    keys: Sequence[SecretKey], *, channel: str, epoch: int, seq: int, newest: str, issued_s: int
) -> Sealed:
    """A signed head.

    Args:
        keys: of publishers.
        channel: the group.
        epoch: of the root.
        seq: of the newest patch; 0 where there is none.
        newest: `body_sha256` of that patch, or "".
        issued_s: seconds since 1970.
    """
    head = Head(
        channel=channel,
        epoch=epoch,
        seq=seq,
        body_sha256=newest,
        issued_s=issued_s,
        not_after_s=issued_s + HEAD_LIFE_S,
    )
    return seal(head, HEAD_DOMAIN, keys)


def verify_head(sealed: Sealed, trust: Trust, last: Head | None, *, now_s: float) -> Head:
    """A head that is not older than the last one.

    Args:
        sealed: as received.
        trust: what the edge trusts now.
        last: the last head that was accepted; None before the first.
        now_s: seconds since 1970. A clock may be years off: it only ever makes a head too old.

    Raises:
        PatchError: the subclass that names the rule (H1 to H3).
    """
    check(sealed)
    _verify_publisher(sealed, trust.root, HEAD_DOMAIN)
    head = open_body(sealed.body, Head)
    if bool(head.seq) != bool(head.body_sha256) or head.not_after_s < head.issued_s:
        raise MalformedBody(
            f"the head contradicts itself: number {head.seq} with body {head.body_sha256[:12]!r}, "
            f"from {head.issued_s} to {head.not_after_s}",
            "See docs/spec/patch.md",
        )
    _check_channel(head.channel, trust.channel)
    _check_epoch(head.epoch, trust.root)
    if last is not None and (head.epoch, head.seq, head.issued_s) < (last.epoch, last.seq, last.issued_s):
        raise Replayed(  # H2
            f"the head is epoch {head.epoch} number {head.seq} of {head.issued_s}, seen was epoch {last.epoch} "
            f"number {last.seq} of {last.issued_s}",
            "Somebody sends old heads again",
        )
    # What was signed last is a clock that cannot be set back: time is at least that.
    if max(now_s, float(last.issued_s if last else 0)) > head.not_after_s:  # H3
        raise Expired(
            f"the head's time ended at {head.not_after_s}, it is {int(now_s)}",
            "Somebody holds back newer heads, or this machine's clock is ahead",
        )
    return head


def _verify_publisher(sealed: Sealed, root: Root, domain: bytes) -> None:
    verify(root.publisher_keys, root.publisher_threshold, domain, sealed.body, sealed.signed)


def _check_channel(found: str, wanted: str) -> None:
    if found != wanted:
        raise WrongChannel(
            f"it is for the group `{found}`, this edge is in `{wanted}`", "Enrol in that group"
        )


def _check_epoch(epoch: int, root: Root) -> None:
    if epoch > root.epoch:
        raise EpochAhead(f"it is of epoch {epoch}, the root's is {root.epoch}", "Fetch the newest root")
    if epoch < root.epoch:
        raise Replayed(
            f"it is of epoch {epoch}, the root's is {root.epoch}",
            "What was signed before a rotation counts no more",
        )
