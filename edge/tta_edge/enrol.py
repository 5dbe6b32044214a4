"""Enrolment: with a ticket an edge becomes known to a cloud; what it needs then stays in its state directory."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import zmq

from tta_edge.errors import CloudUnreachable, EnrolmentRefused, NotEnrolled
from tta_runtime import sealed as seals
from tta_runtime.atomic import make_durable
from tta_runtime.enrolment import decode_ticket
from tta_runtime.errors import KeyFileRefused, PatchError, WireError
from tta_runtime.files import read_at_most, reason
from tta_runtime.link import Enroll, Enrolled, Refusal, decode_from_cloud, encode_message
from tta_runtime.root import Root, chain, first_root, next_root
from tta_runtime.sealed import MAX_BODY_BYTES, Sealed
from tta_runtime.signing import read_secret, write_secret

DIRECTORY = "cloud"
WAIT_S = 10.0
_KEY_CHARS = 40
_MAX_BYTES = 2 * MAX_BODY_BYTES


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the cloud is, and as what this edge is known there."""

    endpoint: str
    server_key: str
    """z85; an edge talks to nobody else."""
    group: str
    name: str
    check: str = ""
    """sha256 of the other fields and of the edge's public key; a file without one is believed."""

    def checked(self, public: bytes) -> Link:
        """The same with the right `check`.

        Args:
            public: the edge's CURVE key, z85.
        """
        told = "\n".join([self.endpoint, self.server_key, self.group, self.name, public.decode()])
        return msgspec.structs.replace(self, check=hashlib.sha256(told.encode()).hexdigest())


@dataclass(frozen=True, eq=False)
class Enrolment:
    """What an enrolled edge has.

    Attributes:
        directory: where it is.
        link: see :class:`Link`.
        public: the edge's CURVE key, z85.
        secret: likewise.
        roots: the chain of roots, oldest first; the last one is trusted.
    """

    directory: Path
    link: Link
    public: bytes
    secret: bytes
    roots: tuple[Root, ...]

    @property
    def root(self) -> Root:
        """The root that is trusted."""
        return self.roots[-1]

    def follow(self, sealed: Sealed, now_s: float) -> Enrolment:
        """Trust the next root, durably.

        Raises:
            PatchError: it does not follow; nothing has changed.
            KeyFileRefused: it cannot be written; the one before stays.
        """
        root = next_root(self.root, sealed, now_s=now_s)
        write_secret(self.directory / f"{root.version}.root", seals.encode(sealed))
        return Enrolment(self.directory, self.link, self.public, self.secret, (*self.roots, root))


def load(state_dir: Path) -> Enrolment:
    """The enrolment of an edge.

    Raises:
        NotEnrolled: there is none.
        KeyFileRefused, KeyExposed, PatchError: a file of it cannot be used.
    """
    directory = state_dir / DIRECTORY
    if not (directory / "link.json").is_file():
        raise NotEnrolled(
            f"{state_dir} holds no enrolment",
            "Run `tta-edge enroll TOKEN --state-dir DIR` with a token of `tta-cloud enroll`",
        )
    try:
        link = msgspec.json.decode(read_at_most(directory / "link.json", _MAX_BYTES), type=Link)
        secret = _secret(directory / "edge.key")
        files = sorted(directory.glob("*.root"), key=lambda path: int(path.stem))
        sealed = [seals.decode(read_at_most(path, _MAX_BYTES)) for path in files]
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise KeyFileRefused(f"{directory} cannot be used: {reason(error)}", "Enrol anew") from error
    if not sealed:
        raise KeyFileRefused(f"{directory} holds no root", "Enrol anew")
    try:
        public = zmq.curve_public(secret)
    except zmq.ZMQError as error:
        raise KeyFileRefused(f"{directory / 'edge.key'} holds no key", "Enrol anew") from error
    if link.check and link != link.checked(public):
        raise KeyFileRefused(
            f"{directory / 'link.json'} or edge.key is not as it was written at the enrolment",
            "Restore both from a copy, or enrol anew",
        )
    return Enrolment(directory, link, public, secret, tuple(chain(sealed)))


def enrol(token: str, state_dir: Path, *, wait_s: float = WAIT_S) -> Enrolment:
    """Use a ticket: make a key, show it at the cloud's door with the ticket's secret, keep what comes back.

    Tried again with the same ticket it uses the same key, so that an answer lost on the way does no harm.

    Raises:
        BadValue: the token is none.
        EnrolmentRefused: the cloud does not take it, or the state directory belongs to another enrolment.
        CloudUnreachable: nobody answers in time.
        KeyFileRefused: the state directory cannot be written.
    """
    ticket = decode_ticket(token)
    directory = state_dir / DIRECTORY
    if (directory / "link.json").is_file():
        raise EnrolmentRefused(f"{state_dir} is enrolled already", f"Delete {directory} to enrol it anew")
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        make_durable(directory, state_dir)
        directory.chmod(0o700)
    except OSError as error:
        raise KeyFileRefused(
            f"{directory} cannot be made: {reason(error)}", "Choose another --state-dir"
        ) from error
    if not (directory / "edge.key").is_file():
        _, secret = zmq.curve_keypair()
        write_secret(directory / "edge.key", secret + b"\n")
    secret = _secret(directory / "edge.key")
    question = Enroll(id=1, token=ticket.secret, name=ticket.name)
    answer, sealed = _ask(ticket.door, ticket.server_key, secret, question, wait_s)
    root = first_root(sealed)
    write_secret(directory / f"{root.version}.root", seals.encode(sealed))
    link = Link(endpoint=answer.endpoint, server_key=ticket.server_key, group=answer.group, name=ticket.name)
    link = link.checked(zmq.curve_public(secret))
    write_secret(directory / "link.json", msgspec.json.encode(link))  # last: now it is whole
    return load(state_dir)


def _ask(
    door: str, server_key: str, secret: bytes, message: Enroll, wait_s: float
) -> tuple[Enrolled, Sealed]:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, 64 << 10)
        socket.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(secret))
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        try:
            socket.connect(door)
        except zmq.ZMQError as error:
            raise EnrolmentRefused(
                f"{door!r} is no address: {error.strerror}", "Make a token with --door"
            ) from error
        socket.send_multipart(encode_message(message))
        end_s = time.monotonic() + wait_s
        while (left_s := end_s - time.monotonic()) > 0:
            if not socket.poll(int(left_s * 1000) + 1):
                break
            received = decode_from_cloud(socket.recv_multipart())
            if isinstance(received.message, Refusal):
                raise EnrolmentRefused(received.message.cause, received.message.fix)
            if isinstance(received.message, Enrolled):
                return received.message, seals.decode(np.asarray(received.tensors["sealed"]).tobytes())
        raise CloudUnreachable(
            f"{door} does not answer within {wait_s:g} s",
            "Check that `tta-cloud serve` runs, that its `enroll_bind` is reachable and that the token is its own: "
            "a cloud with another key stays silent",
        )
    except (WireError, PatchError) as error:
        raise EnrolmentRefused(
            f"{door} answers with something else: {error.cause}", "Use the same version"
        ) from error
    finally:
        socket.close(linger=0)
        context.term()


def _secret(path: Path) -> bytes:
    data = read_secret(path, _KEY_CHARS + 1).strip()
    if len(data) != _KEY_CHARS:
        raise KeyFileRefused(f"{path} holds no key", "Delete it and enrol anew")
    return data
