"""The cloud's keys and roots on disk: who it is, and what edges trust."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
import zmq.utils.z85

from tta_cloud.errors import IdentityExists, IdentityMissing
from tta_runtime import sealed as seals
from tta_runtime.errors import KeyFileRefused
from tta_runtime.files import reason
from tta_runtime.root import Root, chain, make_root, named, next_root
from tta_runtime.sealed import Sealed
from tta_runtime.signing import SecretKey, read_secret, write_secret

LIFE_S = 365 * 86_400
"""How long a root may be adopted anew."""
DIRECTORY, ROOTS = "keys", "roots"
_Z85_CHARS = 40


@dataclass(frozen=True, eq=False)
class Identity:
    """What `tta-cloud serve` signs and is known by.

    Attributes:
        curve_public: z85; edges get it with their token.
        curve_secret: z85.
        publisher: signs patches and heads.
        roots: the chain, oldest first; the last one is in force.
    """

    curve_public: str
    curve_secret: str
    publisher: SecretKey
    roots: tuple[tuple[Root, Sealed], ...]

    @property
    def root(self) -> Root:
        """The root in force."""
        return self.roots[-1][0]


def create(store: Path, now_s: float | None = None) -> Identity:
    """Make new keys: CURVE, root and publisher.

    The root key signs nothing but the next root. Move `root.key` to another place once edges are enrolled; it is
    needed for `rotate` only.

    Raises:
        IdentityExists: there are keys.
        KeyFileRefused: they cannot be written.
    """
    directory = store / DIRECTORY
    if directory.exists():
        raise IdentityExists(f"{directory} exists", "Use these keys, or choose another --store")
    try:
        (directory / ROOTS).mkdir(parents=True, mode=0o700)
        directory.chmod(0o700)
        store.chmod(0o700)
    except OSError as error:
        raise KeyFileRefused(
            f"{directory} cannot be made: {reason(error)}", "Choose another --store"
        ) from error
    public, secret = zmq.curve_keypair()
    write_secret(directory / "curve.key", secret + b"\n")
    write_secret(directory / "curve.pub", public + b"\n")
    root_key, publisher = SecretKey.generate(), SecretKey.generate()
    root_key.save(directory / "root.key")
    publisher.save(directory / "publisher.key")
    root = Root(
        version=1,
        epoch=1,
        root_keys=named([root_key.public]),
        root_threshold=1,
        publisher_keys=named([publisher.public]),
        publisher_threshold=1,
        not_after_s=int((time.time() if now_s is None else now_s) + LIFE_S),
    )
    write_secret(directory / ROOTS / "1.root", seals.encode(make_root(root, [root_key])))
    return load(store)


def load(store: Path) -> Identity:
    """The keys of a store.

    Raises:
        IdentityMissing: there are none.
        KeyFileRefused, KeyExposed: one cannot be used.
        PatchError: a root does not follow the one before.
    """
    directory = store / DIRECTORY
    if not (directory / "curve.key").is_file():
        raise IdentityMissing(
            f"there are no keys in {directory}", f"Run `tta-cloud keys init --store {store}`"
        )
    secret = read_secret(directory / "curve.key", _Z85_CHARS + 1).strip()
    if len(secret) != _Z85_CHARS:
        raise KeyFileRefused(f"{directory / 'curve.key'} holds no CURVE key", "Restore it from a copy")
    try:
        public = zmq.curve_public(secret)
    except zmq.ZMQError as error:
        raise KeyFileRefused(
            f"{directory / 'curve.key'} holds no CURVE key", "Restore it from a copy"
        ) from error
    # Any 40 letters are a key, and with another one no edge would ever be heard again.
    known = directory / "curve.pub"
    if known.exists() and read_secret(known, _Z85_CHARS + 1).strip() != public:
        raise KeyFileRefused(
            f"curve.key is not the secret half of curve.pub in {directory}: one of them is damaged",
            "Restore both from a copy",
        )
    roots = read_roots(store)
    return Identity(public.decode(), secret.decode(), _publisher(directory, roots[-1][0]), roots)


def _publisher(directory: Path, root: Root) -> SecretKey:
    """The publisher's key that a root names; also where `rotate` was killed before it had its place."""
    staged = directory / f"publisher.{root.version}.key"
    for path in (directory / "publisher.key", staged):
        if path == staged and not staged.exists():
            break
        found = SecretKey.load(path)
        if found.key_id in root.publisher_keys:
            return found
    raise KeyFileRefused(
        f"{directory / 'publisher.key'} is no key that root {root.version} names: "
        f"{', '.join(each[:12] for each in root.publisher_keys)}; no edge would take what it signs",
        "Restore it from a copy",
    )


def read_roots(store: Path) -> tuple[tuple[Root, Sealed], ...]:
    """The chain of roots of a store, oldest first, without its secrets.

    Raises:
        IdentityMissing: there is none.
        PatchError: a root does not follow the one before.
    """
    directory = store / DIRECTORY / ROOTS
    files = sorted(directory.glob("*.root"), key=lambda path: int(path.stem))
    kept = [seals.decode(path.read_bytes()) for path in files]
    roots = tuple(zip(chain(kept), kept, strict=True))
    if not roots:
        raise IdentityMissing(f"there is no root in {directory}", "Restore the directory from a copy")
    return roots


def rotate(store: Path, root_keys: Sequence[Path], *, now_s: float | None = None) -> Identity:
    """A new publisher key and a raised epoch: what the old key signed, or signs from now on, counts no more.

    Args:
        store: whose keys.
        root_keys: files of the root keys that sign; by default the one that `create` left.
        now_s: seconds since 1970.

    Raises:
        IdentityMissing, KeyFileRefused, KeyExposed: as `load`.
        PatchError: the root keys given are not those of the root in force.
    """
    directory, before = store / DIRECTORY, load(store)
    signers = [SecretKey.load(path) for path in root_keys or [directory / "root.key"]]
    publisher = SecretKey.generate()
    root = msgspec.structs.replace(
        before.root,
        version=before.root.version + 1,
        epoch=before.root.epoch + 1,
        publisher_keys=named([publisher.public]),
        not_after_s=int((time.time() if now_s is None else now_s) + LIFE_S),
    )
    sealed = make_root(root, signers)
    next_root(before.root, sealed, now_s=0)  # refused here rather than by every edge
    staged = directory / f"publisher.{root.version}.key"
    publisher.save(staged)
    write_secret(directory / ROOTS / f"{root.version}.root", seals.encode(sealed))
    os.replace(staged, directory / "publisher.key")
    return load(store)
