"""Edges by their CURVE public key, and the tokens with which they enrol."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from tta_cloud.errors import (
    DamagedRecord,
    EdgeExists,
    EdgeRevoked,
    TokenExpired,
    TokenUsed,
    UnknownEdge,
    UnknownToken,
)
from tta_cloud.operations import Operation
from tta_cloud.records import Edge, Token, checked, restored, seal

TOKEN_BYTES = 32
_EDGE = "key, name, grp, state, first_seen_ms, last_seen_ms, epoch, seq, theta_digest, progress, seal"
_TOKEN = "hash, name, grp, expires_ms, used_by, used_ms, seal"

# ------------------------------------------------------------------------------------------ edges


def register(key: str, name: str, group: str, *, now_ms: int) -> Operation[Edge]:
    """Make an edge known; it is pending until somebody activates it. The same call again changes nothing.

    Raises:
        BadRecord: a value is out of range.
        EdgeRevoked: the key was revoked; raised by the operation, as is the next.
        EdgeExists: the key is known under another name or in another group.
    """
    made = _new(key, name, group, now_ms)
    return Operation("edges.register", lambda db: _register(db, made))


def activate(key: str) -> Operation[Edge]:
    """Serve an edge from now on; raises UnknownEdge, EdgeRevoked by the operation."""

    def run(db: sqlite3.Connection) -> Edge:
        edge = get(db, key)
        if edge.state == "revoked":
            raise _revoked(key)
        return _put(db, msgspec.structs.replace(edge, state="active"))

    return Operation("edges.activate", run)


def revoke(key: str) -> Operation[Edge]:
    """Never serve an edge again; raises UnknownEdge by the operation."""

    def run(db: sqlite3.Connection) -> Edge:
        return _put(db, msgspec.structs.replace(get(db, key), state="revoked"))

    return Operation("edges.revoke", run)


def assign(key: str, group: str) -> Operation[Edge]:
    """Move an edge to another group; raises UnknownEdge, BadRecord by the operation."""

    def run(db: sqlite3.Connection) -> Edge:
        return _put(db, msgspec.structs.replace(get(db, key), group=group))

    return Operation("edges.assign", run)


def readmit(known: Iterable[Edge]) -> Operation[int]:
    """Register edges anew that are not in the store, or whose rows are damaged there; gives how many."""
    each = tuple(checked(edge) for edge in known)

    def run(db: sqlite3.Connection) -> int:
        there = {edge.key for edge in listed(db)}
        missing = [edge for edge in each if edge.key not in there]
        for edge in missing:
            _put(db, edge)
        return len(missing)

    return Operation("edges.readmit", run)


def seen(keys: Iterable[str], *, now_ms: int) -> Operation[int]:
    """Note that edges were heard of; gives how many of them are known."""
    each = tuple(keys)

    def run(db: sqlite3.Connection) -> int:
        known = [edge for key in each if (edge := find(db, key)) is not None]
        for edge in known:
            _put(db, msgspec.structs.replace(edge, last_seen_ms=max(now_ms, edge.last_seen_ms)))
        return len(known)

    return Operation("edges.seen", run)


def report(
    key: str, *, epoch: int, seq: int, theta_digest: str, progress: str, now_ms: int
) -> Operation[Edge]:
    """Note which base an edge says that it serves; raises UnknownEdge, BadRecord by the operation."""

    def run(db: sqlite3.Connection) -> Edge:
        edge = get(db, key)
        told = msgspec.structs.replace(
            edge,
            epoch=epoch,
            seq=seq,
            theta_digest=theta_digest,
            progress=progress,
            last_seen_ms=max(now_ms, edge.last_seen_ms),
        )
        return _put(db, told)

    return Operation("edges.report", run)


def remove(key: str) -> Operation[bool]:
    """Forget an edge, for a row that is damaged; gives whether there was one. A revoked key is no longer known."""

    def run(db: sqlite3.Connection) -> bool:
        return db.execute("DELETE FROM edges WHERE key = ?", (key,)).rowcount > 0

    return Operation("edges.remove", run)


def find(db: sqlite3.Connection, key: str) -> Edge | None:
    """An edge; None if the key is unknown.

    Raises:
        DamagedRecord: it is not what was stored.
    """
    row = db.execute(f"SELECT {_EDGE} FROM edges WHERE key = ?", (key,)).fetchone()
    return None if row is None else decode_edge(row)


def get(db: sqlite3.Connection, key: str) -> Edge:
    """An edge; raises UnknownEdge, DamagedRecord."""
    edge = find(db, key)
    if edge is None:
        raise UnknownEdge(f"no edge has the key {key[:40]}", "Enrol it")
    return edge


def listed(db: sqlite3.Connection, group: str | None = None) -> list[Edge]:
    """The edges of a group, or all, by name; damaged ones are left out."""
    found = []
    for row in db.execute(f"SELECT {_EDGE} FROM edges"):
        try:
            found.append(decode_edge(row))
        except DamagedRecord:
            continue
    return sorted((e for e in found if group in (None, e.group)), key=lambda edge: (edge.name, edge.key))


# ------------------------------------------------------------------------------------------ tokens


def new_token() -> str:
    """A token that nobody can guess; to be shown once."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def issue(token: str, name: str, group: str, *, expires_ms: int) -> Operation[None]:
    """Let whoever has the token enrol once. Only its hash is stored.

    Raises:
        BadRecord: a value is out of range.
    """
    return admit(hash_of(token), name, group, expires_ms=expires_ms)


def admit(digest: bytes, name: str, group: str, *, expires_ms: int) -> Operation[None]:
    """`issue` where only the token's hash is at hand. A token that is known stays as it is: used ones stay used.

    Raises:
        BadRecord: a value is out of range.
    """
    made = checked(Token(hash=digest, name=name, group=group, expires_ms=expires_ms))

    def run(db: sqlite3.Connection) -> None:
        if db.execute("SELECT 1 FROM tokens WHERE hash = ?", (digest,)).fetchone() is None:
            _put_token(db, made)

    return Operation("edges.issue", run)


def withdraw(name: str) -> Operation[int]:
    """Delete the tokens issued for a name, used ones included; gives how many."""

    def run(db: sqlite3.Connection) -> int:
        return db.execute("DELETE FROM tokens WHERE name = ?", (name,)).rowcount

    return Operation("edges.withdraw", run)


def expire_tokens(now_ms: int) -> Operation[int]:
    """Delete the tokens that are refused by their age; gives how many."""

    def run(db: sqlite3.Connection) -> int:
        return db.execute("DELETE FROM tokens WHERE expires_ms <= ?", (now_ms,)).rowcount

    return Operation("edges.expire_tokens", run)


def enrol(token: str, key: str, *, now_ms: int) -> Operation[Edge]:
    """Use a token: the key becomes an active edge with the token's name and group, in one transaction.

    The same key may present its token again: the answer to the first time may have been lost.

    Raises:
        UnknownToken, TokenExpired, TokenUsed, EdgeExists, EdgeRevoked, BadRecord: raised by the operation.
    """
    digest = hash_of(token)

    def run(db: sqlite3.Connection) -> Edge:
        found = _matching(db, digest)
        if found.used_by:
            if not hmac.compare_digest(found.used_by.encode(), key.encode()):
                raise TokenUsed("the token was used by another edge", "Ask for a new token")
            return get(db, key)
        if now_ms >= found.expires_ms:
            raise TokenExpired(
                f"the token was good until {found.expires_ms} ms, it is {now_ms} ms", "Ask for a new token"
            )
        edge = _register(db, _new(key, found.name, found.group, now_ms))
        _put_token(db, msgspec.structs.replace(found, used_by=key, used_ms=now_ms))
        return _put(db, msgspec.structs.replace(edge, state="active"))

    return Operation("edges.enrol", run)


def tokens(db: sqlite3.Connection) -> list[Token]:
    """The tokens by name; damaged ones are left out."""
    found = []
    for row in db.execute(f"SELECT {_TOKEN} FROM tokens"):
        try:
            found.append(decode_token(row))
        except DamagedRecord:
            continue
    return sorted(found, key=lambda token: (token.name, token.hash))


# ------------------------------------------------------------------------------------------ rows


def decode_edge(row: Sequence[Any]) -> Edge:
    """An edge from its row.

    Raises:
        DamagedRecord: it is not what was stored.
    """
    *sealed, found = row
    return restored(Edge, dict(zip(Edge.__struct_fields__, sealed, strict=True)), found, sealed)


def decode_token(row: Sequence[Any]) -> Token:
    """A token from its row.

    Raises:
        DamagedRecord: it is not what was stored.
    """
    *sealed, found = row
    return restored(Token, dict(zip(Token.__struct_fields__, sealed, strict=True)), found, sealed)


def _new(key: str, name: str, group: str, now_ms: int) -> Edge:
    return checked(
        Edge(key=key, name=name, group=group, state="pending", first_seen_ms=now_ms, last_seen_ms=now_ms)
    )


def _register(db: sqlite3.Connection, made: Edge) -> Edge:
    before = find(db, made.key)
    if before is None:
        return _put(db, made)
    if before.state == "revoked":
        raise _revoked(made.key)
    if (before.name, before.group) != (made.name, made.group):
        raise EdgeExists(
            f"the key {made.key} is {before.name} of {before.group}, not {made.name} of {made.group}",
            "Assign it to the group, or let the edge make a new key",
        )
    return before


def _revoked(key: str) -> EdgeRevoked:
    return EdgeRevoked(f"the key {key[:40]} was revoked", "Let the edge make a new key and enrol it")


def _put(db: sqlite3.Connection, edge: Edge) -> Edge:
    values = msgspec.structs.astuple(checked(edge))
    marks = ", ".join("?" * (len(values) + 1))
    db.execute(f"INSERT OR REPLACE INTO edges ({_EDGE}) VALUES ({marks})", (*values, seal(*values)))
    return edge


def _put_token(db: sqlite3.Connection, token: Token) -> None:
    values = msgspec.structs.astuple(token)
    marks = ", ".join("?" * (len(values) + 1))
    db.execute(f"INSERT OR REPLACE INTO tokens ({_TOKEN}) VALUES ({marks})", (*values, seal(*values)))


def hash_of(token: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def _matching(db: sqlite3.Connection, digest: bytes) -> Token:
    """Every token is compared, in a time that does not say how much of one was right."""
    matching = [each for each in tokens(db) if hmac.compare_digest(each.hash, digest)]
    if not matching:
        raise UnknownToken("no such token was issued", "Ask for a token, and copy it whole")
    return matching[0]
