"""The sessions of language models: those in memory, bounded in number and in bytes, and the way to disk and back."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection

from tta_edge.errors import TooManySessions, UnknownSession
from tta_edge.events import Event, Reason, Tell
from tta_edge.hosting import Host
from tta_edge.saver import Saver
from tta_edge.store import Key, StateStore
from tta_runtime.errors import StateError, StateUnwritable, did_you_mean
from tta_runtime.text_model import TextModel, TextSession


class HeldSession:
    """One session in memory.

    Args:
        key: its bundle and its name.
        model: the language model.

    Attributes:
        key: likewise.
        model: theta, state and pending tokens.
        restored: what it started from: `source`, `import`, or a slot file.
        in_use: how many requests work with it.
    """

    def __init__(self, key: Key, model: TextModel) -> None:
        self.key = key
        self.model: TextSession = model.session()
        self.restored = "source"
        self.in_use = 0

    def notes(self) -> str:
        """What is saved beside the checkpoint."""
        return self.model.notes()

    @property
    def nbytes(self) -> int:
        """Memory set apart for it."""
        return self.model.model.session_bytes


class AllInUse(TooManySessions):
    """There will be room when one of the requests under way has ended."""


class Sessions:
    """Sessions by bundle and name. One thread changes them; reading is for any thread.

    Args:
        max_sessions: most in memory.
        max_bytes: most memory of them, and of what is borrowed.
        tell: told of sessions that leave memory or come back.
        store: the state directory, if there is one.
        saver: writes to it.
    """

    def __init__(
        self, *, max_sessions: int, max_bytes: int, tell: Tell, store: StateStore | None, saver: Saver | None
    ) -> None:
        self._max_sessions = max_sessions
        self._max_bytes = max_bytes
        self._tell = tell
        self._store = store
        self._saver = saver
        self._lock = threading.Lock()
        self._held: OrderedDict[Key, HeldSession] = OrderedDict()
        self._begun: dict[Key, HeldSession] = {}
        self._ended: set[Key] = set()
        """Of sessions that are over and still on disk, because it could not be written."""
        self._borrowed = 0

    def all(self) -> list[HeldSession]:
        """Those in memory, the most recently used last."""
        with self._lock:
            return list(self._held.values())

    def stored(self, bundles: Collection[str]) -> int:
        """How many are on disk only, of some bundles."""
        if self._store is None:
            return 0
        on_disk = {key for key in self._store.keys() if key[0] in bundles}  # noqa: SIM118 - not a mapping
        with self._lock:
            return len(on_disk - self._held.keys() - self._ended)

    def durable(self, session: HeldSession) -> bool:
        """Whether the disk holds a session as it is."""
        if self._store is None or self._saver is None or self._saver.owes(session.key):
            return False
        # Others may have pushed its files off the disk, where `max_stored_streams` counts.
        return self._store.has(session.key)

    @property
    def nbytes(self) -> int:
        """Memory set apart for sessions and for what is borrowed."""
        with self._lock:
            return self._borrowed + self._owned()

    def find(self, host: Host, name: str, more: int = 0) -> HeldSession:
        """A session that exists, in memory or on disk; it is the most recently used one afterwards.

        Args:
            host: its bundle.
            name: its name.
            more: bytes that will be borrowed beside it; no other session goes to disk where these could not be had.

        Raises:
            UnknownSession: there is none.
            TooManySessions: it is on disk, and there is no room for it.
        """
        session = self._get(host, name, more)
        if session is None:
            names = [key[1] for key in self._known() if key[0] == host.name]
            raise UnknownSession(
                f"there is no session `{name}` of bundle `{host.name}`{did_you_mean(name, names)}",
                "Sessions begin with their first `absorb`",
            )
        return session

    def begin(self, host: Host, name: str, more: int = 0) -> HeldSession:
        """A session that exists, or a new one, which has its room but exists only from `admit` on; else `leave` it.

        Args:
            host: its bundle.
            name: its name.
            more: see `find`.

        Raises:
            TooManySessions: there is no room for one more.
        """
        session = self._get(host, name, more)
        if session is None:
            session = HeldSession((host.name, name), language_model(host))
            self._make_room(session.nbytes, 1, more=more)
            with self._lock:
                self._begun[session.key] = session
        return session

    def leave(self, session: HeldSession) -> None:
        """Forget a session that was begun and not admitted."""
        with self._lock:
            if self._begun.get(session.key) is session:
                del self._begun[session.key]

    def is_new(self, session: HeldSession) -> bool:
        """Whether a session was begun and not admitted yet."""
        return self._begun.get(session.key) is session

    def admit(self, session: HeldSession) -> bool:
        """Keep a session that has changed, in memory and on disk; gives whether it is durable."""
        with self._lock:
            self._begun.pop(session.key, None)
            self._held[session.key] = session
            self._held.move_to_end(session.key)
            self._ended.discard(session.key)
        if self._saver is None:
            return False
        self._saver.keep(session, session.model.checkpoint, session.notes())
        return self._saver.settle(session)

    def end(self, session: HeldSession) -> bool:
        """Forget a session, in memory and on disk; gives whether the disk has forgotten it."""
        with self._lock:
            self._held.pop(session.key, None)
        session.model.reset()
        if self._saver is None:
            return True
        self._saver.returned(session, None, "")
        forgotten = self._saver.settle(session)
        if not forgotten:
            with self._lock:
                self._ended.add(session.key)
        return forgotten

    def borrow(self, nbytes: int, session: HeldSession) -> None:
        """Set memory apart for a text under way, until `give_back`.

        Args:
            nbytes: how much.
            session: that the text is read with.

        Raises:
            TooManySessions: there is not so much, and no session can go to disk; `AllInUse` where others will end.
        """
        self._make_room(nbytes, 0, own=session)
        with self._lock:
            self._borrowed += nbytes

    def give_back(self, nbytes: int) -> None:
        """What was borrowed is not needed any more."""
        with self._lock:
            self._borrowed -= nbytes

    def swap(self, host: Host) -> tuple[int, int]:
        """Let the sessions of a bundle go on with a new version of it.

        Returns:
            How many go on, and how many have ended because theirs is another model now.
        """
        kept = ended = 0
        for old in self.all():
            if old.key[0] != host.name:
                continue
            if old.model.model is host.text:  # the bundle is as it was
                kept += 1
                continue
            new = HeldSession(old.key, language_model(host))
            try:
                checkpoint, _, notes = new.model.decode(old.model.encode(old.model.checkpoint))
                new.model.resume(checkpoint, notes)
            except StateError as error:
                # What is on disk stays there until it is asked for, and is set aside then.
                self._tell(Event(*old.key, "reset", Reason.OTHER_BUNDLE.value, error.cause))
                with self._lock:
                    del self._held[old.key]
                if self._saver is not None:
                    self._saver.drop(old)
                ended += 1
                continue
            new.restored = old.restored
            with self._lock:
                self._held[old.key] = new
            kept += 1
        return kept, ended

    def save_all(self) -> None:
        """Save what the disk does not hold yet, when the daemon ends."""
        for session in self.all():
            if self._saver is not None and not self.durable(session):
                self._saver.keep(session, session.model.checkpoint, session.notes())
                self._saver.settle(session)

    # ------------------------------------------------------------------------------------------ inside

    def _known(self) -> set[Key]:
        stored = set() if self._store is None else set(self._store.keys())
        with self._lock:
            self._ended &= stored  # the disk has forgotten the others
            return {*self._held, *(stored - self._ended)}

    def _get(self, host: Host, name: str, more: int) -> HeldSession | None:
        key = (host.name, name)
        found = self._held.get(key)
        if found is not None:
            with self._lock:
                self._held.move_to_end(key)
            if self._store is not None:
                self._store.used(key)
            return found
        if self._store is None or not self._store.has(key) or key in self._ended:
            return None
        self._store.used(key)
        session = HeldSession(key, language_model(host))
        self._make_room(session.nbytes, 1, more=more)
        if not self._restore(self._store, session):
            return None
        with self._lock:
            self._held[key] = session
        return session

    def _restore(self, store: StateStore, session: HeldSession) -> bool:
        found = store.load(session)
        for event in found.set_aside:
            self._tell(event)
        if found.restored is None:
            return False
        session.model.resume(found.restored.checkpoint, found.restored.notes)
        session.restored = found.restored.slot
        detail = f"{session.restored}: {session.model.absorbed} tokens, theta {session.model.digest[:12]}"
        self._tell(Event(*session.key, "restore", Reason.RETURNED.value, detail))
        return True

    def _owned(self) -> int:
        return sum(session.nbytes for session in (*self._held.values(), *self._begun.values()))

    def _make_room(self, nbytes: int, count: int, *, own: HeldSession | None = None, more: int = 0) -> None:
        """Let sessions go to disk until there is room, if that makes enough.

        Args:
            nbytes: wanted.
            count: sessions wanted.
            own: what the request that asks holds itself, and will not do without.
            more: bytes that it will ask for next.
        """
        while not self._fits(nbytes, count):
            text = (
                f"{len(self._held) + len(self._begun)} sessions are held and {self.nbytes} bytes set apart, "
                f"max_sessions is {self._max_sessions} and max_session_bytes {self._max_bytes}"
            )
            idle = [session for session in self._held.values() if not session.in_use]
            if not self._fits(nbytes + more - sum(session.nbytes for session in idle), count - len(idle)):
                # None goes to disk in vain: others use too much.
                raise AllInUse(f"{text}; too much of it is in use", "Repeat later, or raise the settings")
            try:
                self._evict(idle[0], text)
            except TooManySessions as error:
                stay = [*idle, own] if own is not None and self._holds(own) else idle
                stay_bytes = sum(session.nbytes for session in stay)
                if len(stay) + count <= self._max_sessions and stay_bytes + nbytes <= self._max_bytes:
                    raise AllInUse(error.cause, error.fix) from error  # what others use will do
                raise

    def _fits(self, nbytes: int, count: int) -> bool:
        held = len(self._held) + len(self._begun)
        return held + count <= self._max_sessions and self.nbytes + nbytes <= self._max_bytes

    def _holds(self, session: HeldSession) -> bool:
        return self._held.get(session.key) is session or self.is_new(session)

    def _evict(self, session: HeldSession, text: str) -> None:
        """Let a session be on disk only; raises TooManySessions where it cannot."""
        if self._store is None or self._saver is None:
            raise TooManySessions(
                text, "Reset a session, raise the settings, or set `state_dir`, so that sessions go to disk"
            )
        if not self.durable(session):
            try:
                self._saver.save_now(session)
            except StateUnwritable as error:
                raise TooManySessions(f"{text}; none can go to disk: {error.cause}", error.fix) from error
        with self._lock:
            del self._held[session.key]
        self._store.discard(session)
        detail = f"{session.model.absorbed} tokens"
        self._tell(Event(*session.key, "evict", Reason.MEMORY_CAP.value, detail))


def language_model(host: Host) -> TextModel:
    """Of a bundle of the task `text`."""
    if host.text is None:
        raise TypeError(f"bundle {host.name} is not for text")
    return host.text
