"""A theta becomes a patch of the ledger: numbered, signed, packed. Pure but for the signing key."""

from __future__ import annotations

import msgspec

from tta_cloud.identity import Identity
from tta_cloud.records import Entry, Patch, PatchState
from tta_runtime import theta as thetas
from tta_runtime.bundle import Bundle
from tta_runtime.patch import make_patch
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
