"""A theta becomes a patch of the ledger: numbered, signed, packed; and back. Pure but for keys."""

from __future__ import annotations

import msgspec

from tta_cloud.identity import Identity
from tta_cloud.records import Entry, Patch, PatchState
from tta_runtime import theta as thetas
from tta_runtime.bundle import Bundle
from tta_runtime.patch import Trust, make_patch, verify_patch
from tta_runtime.sealed import Sealed, SignatureEntry
from tta_runtime.theta import Vector


def build(
    theta: Vector,
    identity: Identity,
    bundle: Bundle,
    *,
    group: str,
    seq: int,
    parent: Vector,
    samples: int,
    now_s: float,
    state: PatchState = "built",
    reason: str = "",
) -> Patch:
    """A signed patch of the root's epoch.

    Args:
        theta: [P].
        identity: signs it.
        bundle: that it is for.
        group: who gets it.
        seq: its number.
        parent: [P], what the group has now.
        samples: new ones behind it.
        now_s: seconds since 1970.
        state: in which it enters the ledger.
        reason: why, for the ledger.

    Raises:
        PayloadNotFinite: theta is not finite.
    """
    layout, epoch = bundle.manifest.theta, identity.root.epoch
    sealed, payload = make_patch(
        theta,
        layout,
        [identity.publisher],
        bundle_digest=bundle.digest,
        channel=group,
        epoch=epoch,
        seq=seq,
        parent_digest=thetas.digest(layout, parent),
        samples=samples,
        issued_s=int(now_s),
    )
    entry = Entry(group=group, epoch=epoch, seq=seq, state=state, reason=reason, created_ms=int(now_s * 1000))
    signatures = msgspec.msgpack.encode(sealed.signatures)
    return Patch(entry=entry, body=sealed.body, signatures=signatures, payload=payload)


def theta_of(patch: Patch, identity: Identity, bundle: Bundle) -> Vector:
    """What a patch in the ledger carries, [P].

    Raises:
        PatchError: it is not this cloud's, or of another bundle.
    """
    entry = patch.entry
    root = next((root for root, _ in reversed(identity.roots) if root.epoch == entry.epoch), identity.root)
    trust = Trust(root, bundle.digest, entry.group, epoch=entry.epoch, seq=entry.seq - 1)
    verified = verify_patch(
        sealed_of(patch),
        patch.payload,
        trust,
        bundle.manifest.theta,
        bundle.theta0,
        max_distance=float("inf"),
    )
    return verified.theta


def sealed_of(patch: Patch) -> Sealed:
    """What was signed of a patch in the ledger, with its signatures."""
    return Sealed(patch.body, msgspec.msgpack.decode(patch.signatures, type=tuple[SignatureEntry, ...]))
