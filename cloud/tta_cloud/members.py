"""The edges that were registered, in memory: who is let in, what each is called, what it has said last.

The store has them as well, and `promises.json` those that must be known where the store is lost. For the network
thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import msgspec

from tta_cloud import edges
from tta_cloud.errors import CannotServe, StoreError
from tta_cloud.promises import Promises
from tta_cloud.records import Edge
from tta_cloud.store import Store

log = logging.getLogger(__name__)


class Members:
    """The edges of a service.

    Args:
        store: that has them.
        promises: that outlive it.
        now_ms: milliseconds since 1970.

    Attributes:
        unregistered: whether the store may still lack edges that it has lost; `readmit` is to be called again.
    """

    def __init__(self, store: Store, promises: Promises, now_ms: Callable[[], int]) -> None:
        self._store = store
        self._promises = promises
        self._now_ms = now_ms
        self._edges: dict[str, Edge] = {}
        self.unregistered = False

    # ------------------------------------------------------------------------------------------ looking

    def find(self, key: str) -> Edge | None:
        """An edge by its key, whatever its state; None if there is none."""
        return self._edges.get(key)

    def get(self, key: str) -> Edge:
        """An edge that is let in; raises CannotServe for any other key."""
        found = self._edges.get(key)
        if found is None or found.state != "active":
            raise CannotServe("the key is not enrolled, or no longer", "Enrol with a new token")
        return found

    def refused(self, key: str) -> str:
        """Why a key is not let in; "" where it is."""
        found = self._edges.get(key)
        if found is not None and found.state == "active":
            return ""
        return "the key is not enrolled" if found is None else f"the key is {found.state}"

    def name(self, key: str) -> str:
        """What to call a key, for people."""
        found = self._edges.get(key)
        return f"`{found.name}`" if found is not None else f"with key {key[:8]}.."

    def groups(self) -> set[str]:
        """The groups that have edges, in whatever state."""
        return {edge.group for edge in self._edges.values()}

    def active(self, group: str) -> list[Edge]:
        """The edges of a group that are let in."""
        return [edge for edge in self._edges.values() if edge.group == group and edge.state == "active"]

    def by_group(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """Keys by the group of their edge; others are left out."""
        found: dict[str, list[str]] = {}
        for key in keys:
            if key in self._edges:
                found.setdefault(self._edges[key].group, []).append(key)
        return found

    # ------------------------------------------------------------------------------------------ changes

    def add(self, edge: Edge) -> None:
        """An edge was enrolled, durably."""
        self._edges[edge.key] = edge
        self._promises.keep(self._edges.values())

    def shut_out(self, key: str) -> None:
        """An edge is revoked: here at once, also where the disk does not take it."""
        edge = self._edges.get(key)
        if edge is not None:
            self._edges[key] = msgspec.structs.replace(edge, state="revoked")
            self._promises.keep(self._edges.values())

    def seen(self, edge: Edge, epoch: int, seq: int, digest: str, what: str) -> None:
        """What an edge has said of itself.

        Args:
            edge: as it was known.
            epoch: of the base that it serves.
            seq: of that base.
            digest: of that base.
            what: it said of a patch; "" for nothing new.
        """
        progress = what or edge.progress
        self._edges[edge.key] = msgspec.structs.replace(edge, epoch=epoch, seq=seq, progress=progress)
        self._store.leave(
            edges.report(
                edge.key, epoch=epoch, seq=seq, theta_digest=digest, progress=progress, now_ms=self._now_ms()
            )
        )

    def refresh(self) -> None:
        """Read them from the store."""
        self._edges = {edge.key: edge for edge in self._store.read(edges.listed)}
        self._promises.keep(self._edges.values())

    def readmit(self) -> None:
        """Edges that a damaged store has lost need not enrol again."""
        try:
            count = self._store.call(edges.readmit(self._promises.edges))
        except StoreError as error:  # a full disk, or what was handed in when the damage was found
            if not self.unregistered:
                log.warning("edges are not registered anew for now: %s", error)
            self.unregistered = True
            return
        self.unregistered = False
        if count:
            log.warning("%d edges that the store has lost are registered anew", count)
