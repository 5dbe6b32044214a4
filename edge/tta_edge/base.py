"""The base: the theta that came from the cloud last and was committed; it survives restarts, candidates do not.

Two slots hold it, so a crash, a full disk or a flipped bit leaves the one before. Order never goes back: what was
accepted is remembered with the base, so that an old patch is refused after a restart as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tta_runtime import tensors
from tta_runtime import theta as thetas
from tta_runtime.atomic import DISK, Disk
from tta_runtime.bundle import Bundle
from tta_runtime.errors import (
    LayoutMismatch,
    NonFiniteTheta,
    StateMalformed,
    StateOfOtherBundle,
    StateTampered,
)
from tta_runtime.slots import Refused, Slots
from tta_runtime.state_file import checksum
from tta_runtime.theta import Vector

FORMAT, VERSION = "tta-base", "1"
_KEYS = {
    "format",
    "format_version",
    "bundle",
    "epoch",
    "seq",
    "seen_epoch",
    "seen_seq",
    "generation",
    "sha256",
}
_FIX = "Delete the file; the cloud sends the newest base again"


@dataclass(frozen=True, eq=False)
class Base:
    """A committed base.

    Attributes:
        epoch: of its patch; 0: it is the bundle's own theta.
        seq: of its patch.
        theta: [P], read-only.
        seen_epoch: of the newest patch that was accepted, committed or not: none before it is taken again.
        seen_seq: likewise.
    """

    epoch: int
    seq: int
    theta: Vector
    seen_epoch: int
    seen_seq: int

    @property
    def order(self) -> tuple[int, int]:
        """Epoch and number."""
        return self.epoch, self.seq

    @property
    def seen(self) -> tuple[int, int]:
        """Epoch and number of the newest accepted patch."""
        return self.seen_epoch, self.seen_seq


def own(bundle: Bundle) -> Base:
    """The base of a daemon that has got no patch yet."""
    return Base(0, 0, bundle.theta0, 0, 0)


class BaseStore:
    """The base of one bundle on disk. For one thread.

    Args:
        directory: its own.
        bundle: whose theta it is.
        disk: what writes.
        above: a directory above it that exists, and whose name is durable.
    """

    def __init__(
        self, directory: Path, bundle: Bundle, *, disk: Disk = DISK, above: Path | None = None
    ) -> None:
        self._bundle = bundle
        self._slots = Slots(directory, disk, base=above)

    def load(self) -> tuple[list[Base], list[Refused]]:
        """The whole bases of this bundle, the newest first, and what was refused; files are left as they are."""
        size = 4 * self._bundle.manifest.theta.size + tensors.MAX_OVERHEAD_BYTES
        good, refused = self._slots.load(self._decode, size)
        return [slot.value for slot in good], refused

    def commit(self, base: Base) -> None:
        """Write a base; it may serve when this has returned.

        Raises:
            StateUnwritable: the operating system refuses; the base before is still there.
        """
        self._slots.commit(lambda generation: self._encode(base, generation))

    def go_back(self, base: Base) -> None:
        """Write a base and delete what came after it: a restart must not find again what was gone back from.

        Raises:
            StateUnwritable: the operating system refuses; then nothing may be left, and the bundle's own theta serves.
        """
        self._slots.replace(lambda generation: self._encode(base, generation))

    def _encode(self, base: Base, generation: int) -> bytes:
        metadata = {
            "format": FORMAT,
            "format_version": VERSION,
            "bundle": self._bundle.digest,
            "epoch": str(base.epoch),
            "seq": str(base.seq),
            "seen_epoch": str(base.seen_epoch),
            "seen_seq": str(base.seen_seq),
            "generation": str(generation),
        }
        arrays = {"theta": base.theta}
        return tensors.encode(arrays, {**metadata, "sha256": checksum(metadata, arrays)})

    def _decode(self, data: bytes) -> tuple[Base, int]:
        try:
            arrays, metadata = tensors.decode(data)
        except tensors.TensorsMalformed as error:
            raise StateMalformed(f"not a whole base file: {error}", _FIX) from error
        if set(metadata) != _KEYS or metadata["format"] != FORMAT or metadata["format_version"] != VERSION:
            raise StateMalformed(f"its metadata is {sorted(metadata)[:12]}, not that of a base file", _FIX)
        found = checksum({k: v for k, v in metadata.items() if k != "sha256"}, arrays)
        if metadata["sha256"] != found:
            raise StateTampered(
                f"the contents have sha256 {found}, the file says {metadata['sha256'][:80]}", _FIX
            )
        if metadata["bundle"] != self._bundle.digest:
            raise StateOfOtherBundle(
                f"the base belongs to the bundle {metadata['bundle'][:12]}, this is {self._bundle.digest[:12]}",
                "Serve that bundle, or delete the file",
            )
        numbers = [metadata[key] for key in ("epoch", "seq", "seen_epoch", "seen_seq", "generation")]
        if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
            raise StateMalformed(f"its numbers are {numbers}", _FIX)
        epoch, seq, seen_epoch, seen_seq, generation = map(int, numbers)
        try:
            vector = thetas.check(self._bundle.manifest.theta, arrays.get("theta", np.zeros(0, np.float32)))
        except (LayoutMismatch, NonFiniteTheta) as error:
            raise StateMalformed(error.cause, _FIX) from error
        return Base(epoch, seq, vector, seen_epoch, seen_seq), generation
