"""What a daemon does with bases that come from outside: probation on live answers, commit, adoption, going back.

For the thread that answers requests, as the responder is. A candidate is only ever in memory: whatever happens to the
process, what serves after a restart has been committed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tta_edge.adapt import Stream
from tta_edge.base import Base, BaseStore, own
from tta_edge.errors import ModeRefused
from tta_edge.events import Event, Reason, Tell
from tta_edge.hosting import Host
from tta_edge.probation import Probation
from tta_runtime import theta as thetas
from tta_runtime.atomic import DISK, Disk
from tta_runtime.errors import EngineError, StateUnwritable
from tta_runtime.theta import Vector

log = logging.getLogger(__name__)

Mode = Literal["off", "local", "cloud", "both"]
TAUGHT: tuple[Mode, ...] = ("cloud", "both")
"""Modes in which patches are taken."""
DECAY = 0.5
"""Share of what a stream has learned on the old base that it keeps on a new one, where it learns itself."""
KNOWN = 64
"""Thetas that have served a bundle and are known again, the newest ones."""
WATCHED = 2048
"""Samples of a bundle's streams after a commit in which a collapse is laid to the new base."""


@dataclass(frozen=True)
class Progress:
    """What became of a patch.

    Attributes:
        epoch: of the patch.
        seq: of the patch.
        state: `staged`, `committed`, `refused` or `rolled-back`.
        reason: code; empty where it is good news.
        detail: the values behind it.
        theta_digest: of the committed base.
    """

    epoch: int
    seq: int
    state: Literal["staged", "committed", "refused", "rolled-back"]
    reason: str
    detail: str
    theta_digest: str


Report = Callable[[Progress], None]


@dataclass(frozen=True, eq=False)
class _Candidate:
    base: Base
    probation: Probation
    report: Report


@dataclass(eq=False)
class _Taught:
    """One bundle's bases."""

    host: Host
    base: Base
    before: Base | None = None
    report: Report | None = None
    since: int = WATCHED
    candidate: _Candidate | None = None
    store: BaseStore | None = None
    known: tuple[str, ...] = ()
    """Digests of the bundle's own theta and of the bases that have served, the oldest first."""


def check_mode(mode: Mode, host: Host) -> None:
    """Whether a bundle's method goes with a mode.

    Raises:
        ModeRefused: mode `cloud` is for methods that learn nothing by gradient.
    """
    spec = host.engines.bundle.manifest.methods[host.method]
    if mode == "cloud" and spec.step is not None and spec.backwards != 0:
        raise ModeRefused(
            f"mode `cloud` is for methods that learn nothing themselves, `{host.method}` of `{host.name}` does",
            "Serve auto, norm or source, or set mode = both",
        )


class Bases:
    """The bases of a daemon's bundles.

    Args:
        mode: of the daemon.
        probation_samples: live samples until a candidate is decided on.
        directory: where committed bases stay; None: only in memory.
        tell: takes events.
        streams: all streams in memory.
        disk: what writes.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        probation_samples: int,
        directory: Path | None,
        tell: Tell,
        streams: Callable[[], Iterable[Stream]],
        disk: Disk = DISK,
    ) -> None:
        self._mode: Mode = mode
        self._wanted = probation_samples
        self._directory = directory
        self._tell = tell
        self._streams = streams
        self._disk = disk
        self._taught: dict[str, _Taught] = {}

    @property
    def decay(self) -> float:
        """Share of a stream's own learning that a new base leaves it."""
        return DECAY if self._mode == "both" else 0.0

    def open(self, host: Host) -> None:
        """Find what was committed for a bundle; also after it was loaded anew."""
        bundle = host.engines.bundle
        taught = _Taught(host, own(bundle), known=(bundle.manifest.theta.digest,))
        if self._directory is not None and self._mode in TAUGHT:
            directory = self._directory / "bases" / host.name
            taught.store = BaseStore(directory, bundle, disk=self._disk, above=self._directory)
            found, refused = taught.store.load()
            for slot in refused:
                self._say(host.name, "quarantine", slot.error.code, f"{slot.path.name}: {slot.error.cause}")
            if found:
                taught.known += tuple(_digest(host, each.theta) for each in reversed(found))
                taught.base = found[0]
                # It is watched anew: a restart is no proof of it.
                taught.before, taught.since = (found[1], 0) if len(found) > 1 else (None, WATCHED)
                self._say(host.name, "restore", Reason.START, f"base {found[0].epoch}.{found[0].seq}")
        self._taught[host.name] = taught

    def base(self, bundle: str) -> Base:
        """The committed base of a bundle."""
        return self._taught[bundle].base

    def candidate(self, bundle: str) -> tuple[int, int] | None:
        """Epoch and number of the patch on probation."""
        found = self._taught[bundle].candidate
        return None if found is None else found.base.order

    def admit(self, stream: Stream) -> None:
        """Let a stream that is new, or came back from disk, stand on the committed base."""
        base = self._taught[stream.bundle].base
        if stream.stands_on == base.order and base.seq:
            stream.model.rest_on(base.theta)  # after a restart: what is saved of it was learned on this base
        elif stream.stands_on != base.order and not stream.suspended:
            stream.adopt(base.theta, base.order, decay=self.decay)

    def offer(self, host: Host, epoch: int, seq: int, theta: Vector, report: Report) -> None:
        """Take a verified theta on probation.

        Args:
            host: the bundle it was made for.
            epoch: of its patch.
            seq: of its patch.
            theta: [P], finite.
            report: told what becomes of it.
        """
        taught = self._taught[host.name]
        if self._mode not in TAUGHT:
            self._refuse(host.name, epoch, seq, Reason.MODE, f"the mode is `{self._mode}`", report)
            return
        if (epoch, seq) <= taught.base.seen:
            detail = f"accepted was {taught.base.seen_epoch}.{taught.base.seen_seq}"
            self._refuse(host.name, epoch, seq, Reason.STALE, detail, report)
            return
        probation = Probation.begin(host.engines.bundle.manifest.classes, self._wanted)
        if taught.candidate is not None:
            # It goes on with what was seen of the one before: a stream of patches must not put itself off for ever.
            old = taught.candidate
            probation = old.probation
            self._refuse(
                host.name, *old.base.order, Reason.NEWER, f"{epoch}.{seq} takes its place", old.report, "skip"
            )
        taught.candidate = _Candidate(Base(epoch, seq, theta, epoch, seq), probation, report)
        self._say(host.name, "stage", Reason.PATCH, f"{epoch}.{seq}, theta {_digest(host, theta)[:12]}")
        report(Progress(epoch, seq, "staged", "", "", _digest(host, taught.base.theta)))

    def answered(self, host: Host, stream: Stream, x: NDArray[Any], served: NDArray[np.float32]) -> None:
        """Show a candidate what was just answered; decide on it when it has seen enough.

        Args:
            host: of the stream.
            stream: that answered.
            x: [batch, ...], as the model takes it.
            served: [batch, C], what was answered, finite.
        """
        taught = self._taught[host.name]
        if taught.since < WATCHED:
            taught.since += len(served)
        candidate = taught.candidate
        if candidate is None:
            return
        try:
            said = stream.model.predict(
                x, instead=stream.adopted(candidate.base.theta, decay=self.decay)
            ).logits
        except EngineError as error:
            log.warning("a candidate base could not answer: %s", error)
            return
        candidate = replace(candidate, probation=candidate.probation.seen(said, served))
        taught.candidate = candidate
        if candidate.probation.decided:
            taught.candidate = None
            self._decide(host, taught, candidate)

    def collapsed(self, host: Host, detail: str) -> bool:
        """A stream's predictions have collapsed; whether that is laid to a base just committed, which is taken back."""
        taught = self._taught[host.name]
        if taught.before is None or taught.since >= WATCHED:
            return False
        bad, before, report = taught.base, taught.before, taught.report
        taught.known = tuple(each for each in taught.known if each != _digest(host, bad.theta))
        # The bad one stays known, so that it is not taken again.
        taught.base = replace(before, seen_epoch=bad.seen_epoch, seen_seq=bad.seen_seq)
        taught.before = None
        taught.since = WATCHED
        self._write(host.name, taught, back=True)
        self._adopt(host, taught.base)
        self._say(host.name, "rollback", Reason.COLLAPSE, f"base {bad.epoch}.{bad.seq}: {detail}")
        if report is not None:
            digest = _digest(host, taught.base.theta)
            report(Progress(bad.epoch, bad.seq, "rolled-back", Reason.COLLAPSE.value, detail, digest))
        return True

    # ------------------------------------------------------------------------------------------ inside

    def _decide(self, host: Host, taught: _Taught, candidate: _Candidate) -> None:
        new, digest = candidate.base, _digest(host, candidate.base.theta)
        refused = candidate.probation.objection(returns=digest in taught.known)
        if refused is not None:
            taught.base = replace(taught.base, seen_epoch=new.epoch, seen_seq=new.seq)
            self._write(host.name, taught)  # else the same patch would be taken again after a restart
            self._refuse(host.name, new.epoch, new.seq, *refused, candidate.report)
            return
        old = taught.base
        taught.base = new
        if not self._write(host.name, taught):
            # What cannot survive a restart does not serve: edge and cloud would disagree on what is there.
            taught.base = old
            self._refuse(
                host.name, new.epoch, new.seq, Reason.DISK_ERROR, "it cannot be written", candidate.report
            )
            return
        taught.before, taught.since, taught.report = old, 0, candidate.report
        # The bundle's own is never forgotten.
        taught.known = (taught.known[0], *[each for each in taught.known[1:] if each != digest], digest)
        taught.known = (taught.known[0], *taught.known[1:][1 - KNOWN :])
        self._adopt(host, new)
        self._say(host.name, "commit", Reason.PATCH, f"base {new.epoch}.{new.seq}")
        candidate.report(Progress(new.epoch, new.seq, "committed", "", "", digest))

    def _adopt(self, host: Host, base: Base) -> None:
        for stream in self._streams():
            if stream.bundle == host.name and not stream.suspended:
                stream.adopt(base.theta, base.order, decay=self.decay)

    def _write(self, name: str, taught: _Taught, *, back: bool = False) -> bool:
        if taught.store is None:
            return True
        try:
            (taught.store.go_back if back else taught.store.commit)(taught.base)
        except StateUnwritable as error:
            self._say(name, "disk", Reason.DISK_ERROR, error.cause)
            return False
        return True

    def _refuse(
        self,
        name: str,
        epoch: int,
        seq: int,
        reason: Reason,
        detail: str,
        report: Report,
        action: str = "refuse",
    ) -> None:
        self._say(name, action, reason, f"patch {epoch}.{seq}: {detail}")
        taught = self._taught[name]
        digest = _digest(taught.host, taught.base.theta)
        report(Progress(epoch, seq, "refused", reason.value, detail, digest))

    def _say(self, name: str, action: str, reason: Reason | str, detail: str) -> None:
        code = reason.value if isinstance(reason, Reason) else reason
        self._tell(Event(name, "", action, code, detail))


def _digest(host: Host, theta: Vector) -> str:
    return thetas.digest(host.engines.bundle.manifest.theta, theta)
