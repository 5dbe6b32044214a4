"""Ed25519 keys and signatures: who said it, not who delivered it. See docs/spec/patch.md."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .atomic import DISK, Disk, write_atomic
from .errors import BadSignature, KeyExposed, KeyFileRefused, TooFewSignatures, UnknownSigner
from .files import reason

KEY_BYTES, SIGNATURE_BYTES, KEY_ID_CHARS = 32, 64, 32
MAX_SIGNATURES = 8
HEADER = "tta ed25519 secret key, version 1"
_MAX_FILE = 256


@dataclass(frozen=True)
class Signature:
    """One key's signature.

    Attributes:
        key_id: of the key, 32 hex digits.
        value: 64 bytes.
    """

    key_id: str
    value: bytes


def read_secret(path: Path, limit: int) -> bytes:
    """The content of a file that only its owner may read, or its first `limit` + 1 bytes.

    Raises:
        KeyExposed: others than its owner may read or write the file.
        KeyFileRefused: it cannot be read, or is a symbolic link.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(fd, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(limit + 1)
    except OSError as error:
        raise KeyFileRefused(
            f"the key file {path} cannot be read: {reason(error)}", "Name the file that holds the key"
        ) from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyExposed(
            f"the key file {path} has the mode {stat.S_IMODE(mode):04o}, others can use it",
            f"chmod 600 {path}, and replace the key if others have had it",
        )
    return data


def write_secret(path: Path, data: bytes, disk: Disk = DISK) -> None:
    """Write a file that only its owner can read.

    Raises:
        KeyFileRefused: it cannot be written.
    """
    try:
        write_atomic(path, data, mode=0o600, disk=disk)
    except OSError as error:
        raise KeyFileRefused(
            f"the key file {path} cannot be written: {reason(error)}", "Choose another place"
        ) from error


def key_id(public: bytes) -> str:
    """Name of a public key: the first 16 bytes of its sha256, in hex."""
    return hashlib.sha256(public).hexdigest()[:KEY_ID_CHARS]


class SecretKey:
    """A signing key. Its secret is never shown."""

    def __init__(self, secret: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self.public: bytes = self._key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )

    def __repr__(self) -> str:
        return f"SecretKey({self.key_id})"

    @property
    def key_id(self) -> str:
        """Name of its public half."""
        return key_id(self.public)

    @classmethod
    def generate(cls) -> SecretKey:
        """A new key from the operating system's random numbers."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> SecretKey:
        """A key from its file.

        Raises:
            KeyExposed: others than its owner may read or write the file.
            KeyFileRefused: it cannot be read, is a symbolic link, or is no key.
        """
        data = read_secret(path, _MAX_FILE)
        lines = data.decode("ascii", "replace").split("\n")
        try:
            secret = (
                bytes.fromhex(lines[1]) if len(lines) == 3 and lines[0] == HEADER and not lines[2] else b""
            )
        except ValueError:
            secret = b""
        if len(secret) != KEY_BYTES:
            raise KeyFileRefused(
                f"the file {path} is not a secret key of this version", f"It must begin with `{HEADER}`"
            )
        return cls(secret)

    def save(self, path: Path, disk: Disk = DISK) -> None:
        """Write the key to a new file that only its owner can read.

        Raises:
            KeyFileRefused: there is a file already, or it cannot be written.
        """
        if path.exists() or path.is_symlink():
            raise KeyFileRefused(
                f"{path} exists", "Keep it, or move it away first: a lost key cannot be made again"
            )
        secret = self._key.private_bytes(
            serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
        )
        write_secret(path, f"{HEADER}\n{secret.hex()}\n".encode("ascii"), disk)

    def sign(self, domain: bytes, message: bytes) -> Signature:
        """The signature of a message of one kind.

        Args:
            domain: the kind; a signature of one kind is none of another.
            message: the bytes as they are sent.
        """
        return Signature(self.key_id, self._key.sign(domain + message))


def verify(
    keys: Mapping[str, bytes], threshold: int, domain: bytes, message: bytes, signatures: Sequence[Signature]
) -> None:
    """Whether enough keys have signed.

    Args:
        keys: public keys by their name.
        threshold: how many different ones must have signed.
        domain: kind of the message.
        message: the bytes as they were received.
        signatures: at most `MAX_SIGNATURES`; each of them must be good, for a bad one means that somebody tampers.

    Raises:
        UnknownSigner, BadSignature, TooFewSignatures: as they say.
    """
    signers: set[str] = set()
    for signature in signatures[:MAX_SIGNATURES]:
        public = keys.get(signature.key_id)
        if public is None:
            raise UnknownSigner(
                f"it is signed by the key {signature.key_id[:KEY_ID_CHARS]}, trusted are {', '.join(sorted(keys))}",
                "Fetch the newest root; if none names that key, somebody pretends to be the publisher",
            )
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature.value, domain + message)
        except (InvalidSignature, ValueError) as error:
            raise BadSignature(
                f"the signature of the key {signature.key_id} does not fit the message of {len(message)} bytes",
                "It was changed on its way, or forged",
            ) from error
        signers.add(signature.key_id)  # one key counts once, however often it signs
    if len(signers) < threshold:
        raise TooFewSignatures(
            f"{len(signers)} of the {threshold} keys that are asked for have signed",
            "Have it signed by the others as well",
        )
