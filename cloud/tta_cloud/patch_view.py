"""What a patch of the ledger holds, in words and numbers: who signed it, and how far it is from others."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tta_cloud import edges, ledger
from tta_cloud.errors import DamagedRecord, UnknownGroup, UnknownPatch
from tta_cloud.identity import read_roots
from tta_cloud.publishing import sealed_of
from tta_cloud.reading import read
from tta_cloud.records import Patch
from tta_runtime import theta as thetas
from tta_runtime.bundle import Bundle
from tta_runtime.errors import PatchError, did_you_mean
from tta_runtime.patch import DOMAIN
from tta_runtime.patch import Patch as Body
from tta_runtime.root import Root
from tta_runtime.sealed import SignatureEntry, open_body
from tta_runtime.signing import Signature, verify
from tta_runtime.theta import Vector


@dataclass(frozen=True, eq=False)
class Opened:
    """A theta that was published, or the source.

    Attributes:
        name: EPOCH.SEQ, or `source`.
        theta: [P], float32.
        digest: of it.
        bundle_digest: of the bundle that it is for.
    """

    name: str
    theta: Vector
    digest: str
    bundle_digest: str


def find(store: Path, group: str, seq: int, epoch: int | None) -> tuple[Patch, list[Patch]]:
    """A patch, and those before it, the newest first.

    Args:
        store: directory of the service.
        group: whose.
        seq: number of the patch.
        epoch: None for the group's newest one.

    Raises:
        UnknownGroup, UnknownPatch: there is none.
        StoreUnusable, DamagedRecord: it cannot be read.
    """

    def look(db: sqlite3.Connection) -> tuple[Patch, list[Patch]]:
        known_group(db, group)
        at = ledger.last_epoch(db, group) if epoch is None else epoch
        try:
            patch = ledger.get(db, group, at, seq)
        except UnknownPatch as error:
            raise UnknownPatch(error.cause, f"`tta-cloud patches log {group}` shows them") from error
        before = []
        for entry in ledger.entries(db, group, 10_000):
            if (entry.epoch, entry.seq) < (at, seq):
                try:
                    before.append(ledger.get(db, group, entry.epoch, entry.seq))
                except DamagedRecord:
                    continue
        return patch, before

    return read(store, look)


def known_group(db: sqlite3.Connection, group: str) -> None:
    """Whether somebody is in a group; raises UnknownGroup."""
    known = {*ledger.groups(db), *(edge.group for edge in edges.listed(db))}
    if group not in known:
        raise UnknownGroup(
            f"no edge and no patch is of the group `{group}`{did_you_mean(group, known)}",
            "`tta-cloud fleet` shows the groups",
        )


def opened(patch: Patch) -> Opened:
    """The theta of a patch; its signatures are not looked at, its row's seal was.

    Raises:
        PatchError: its body is none of this version.
    """
    body = open_body(patch.body, Body)
    theta = np.frombuffer(patch.payload, np.dtype(body.dtype).newbyteorder("<")).astype(np.float32)
    return Opened(f"{patch.entry.epoch}.{patch.entry.seq}", theta, body.theta_digest, body.bundle_digest)


def source(bundle: Bundle) -> Opened:
    """The theta of the bundle itself."""
    return Opened("source", np.asarray(bundle.theta0), bundle.manifest.theta.digest, bundle.digest)


def describe(store: Path, patch: Patch, before: Sequence[Patch], bundle: Bundle | None) -> dict[str, Any]:
    """Everything about a patch, as JSON values.

    Args:
        store: directory of the service, for its roots.
        patch: which.
        before: the patches before it, among which its parent is looked for.
        bundle: that it is for, where it is at hand: it has the source, and the names of tensors.

    Raises:
        IdentityMissing, PatchError: roots or body cannot be read.
    """
    this, entry = opened(patch), patch.entry
    roots = [root for root, _ in read_roots(store)]
    fits = bundle if bundle is not None and bundle.digest == this.bundle_digest else None
    body = open_body(patch.body, Body)
    parent = _parent(body.parent_digest, before, fits)
    return {
        "group": entry.group,
        "epoch": entry.epoch,
        "seq": entry.seq,
        "state": entry.state,
        "reason": entry.reason,
        "created_ms": entry.created_ms,
        "body": msgspec.to_builtins(body),
        "signatures": signatures(patch, roots),
        "from_parent": None if parent is None else difference(this, parent, fits),
        "from_source": None if fits is None else difference(this, source(fits), fits),
    }


def difference(a: Opened, b: Opened, bundle: Bundle | None) -> dict[str, Any]:
    """How far one theta is from another, as JSON values.

    Args:
        a: the one.
        b: the other, to whose norm `relative` is a ratio.
        bundle: for the names of tensors; without it only the whole is compared.
    """
    gap = a.theta.astype(np.float64) - b.theta
    rows = [] if bundle is None else thetas.diff(bundle.manifest.theta, a.theta, b.theta)
    return {
        "from": b.name,
        "to": a.name,
        "relative": thetas.distance(a.theta, b.theta),
        "norm": float(np.linalg.norm(gap)),
        "max_abs": float(np.abs(gap).max(initial=0.0)),
        "tensors": [
            {
                "name": row.name,
                "kind": row.kind,
                "trained": row.trained,
                "size": row.size,
                "relative": row.relative,
                "norm": row.norm,
                "max_abs": row.max_abs,
            }
            for row in rows
        ],
    }


def signatures(patch: Patch, roots: Sequence[Root]) -> list[dict[str, Any]]:
    """Who signed a patch, and whether the root of its epoch counts that.

    Returns:
        For each signature its `key`, `trusted` (the root names the key as a publisher's) and `good` (it fits the bytes
        as well; one of an unknown key cannot be looked at).
    """
    found = []
    publishers = {
        name: key
        for root in roots
        if root.epoch == patch.entry.epoch
        for name, key in root.publisher_keys.items()
    }
    for signed in sealed_of(patch).signatures:
        trusted = signed.key_id in publishers
        found.append({"key": signed.key_id, "trusted": trusted, "good": _good(patch, signed, publishers)})
    return found


def _good(patch: Patch, signed: SignatureEntry, publishers: dict[str, bytes]) -> bool:
    try:
        verify(publishers, 1, DOMAIN, patch.body, [Signature(signed.key_id, signed.value)])
    except PatchError:
        return False
    return True


def _parent(wanted: str, before: Sequence[Patch], bundle: Bundle | None) -> Opened | None:
    if bundle is not None and bundle.manifest.theta.digest == wanted:
        return source(bundle)
    for patch in before:
        try:
            found = opened(patch)
        except PatchError:
            continue
        if found.digest == wanted:
            return found
    return None
