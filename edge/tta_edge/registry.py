"""The streams of a daemon: those in memory, bounded, and the way to disk and back."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection

from tta_edge.adapt import Stream
from tta_edge.errors import TooManyStreams, UnknownStream
from tta_edge.events import Event, Reason, Tell
from tta_edge.hosting import Host
from tta_edge.saver import Saver
from tta_edge.store import Key, StateStore
from tta_runtime.errors import StateError, StateUnwritable, did_you_mean

log = logging.getLogger(__name__)


class Registry:
    """Streams by bundle and name. One thread changes it; reading is for any thread.

    Args:
        make: a new stream of a bundle, at the source.
        max_streams: most streams in memory.
        tell: told of streams that leave memory or come back.
        store: the state directory, if there is one.
        saver: writes to it.
        left: told of a stream that is no longer used.
    """

    def __init__(
        self,
        make: Callable[[Host, str], Stream],
        *,
        max_streams: int,
        tell: Tell,
        store: StateStore | None = None,
        saver: Saver | None = None,
        left: Callable[[Stream], None] = lambda _: None,
    ) -> None:
        self._make = make
        self._max_streams = max_streams
        self._tell = tell
        self._store = store
        self._saver = saver
        self._left = left
        self._lock = threading.Lock()
        self._streams: OrderedDict[Key, Stream] = OrderedDict()

    def all(self) -> list[Stream]:
        """The streams in memory, the most recently used last."""
        with self._lock:
            return list(self._streams.values())

    def stored(self, texts: Collection[str] = ()) -> int:
        """How many streams are on disk only; what is there of the bundles `texts` are no streams."""
        if self._store is None:
            return 0
        on_disk = {key for key in self._store.keys() if key[0] not in texts}  # noqa: SIM118 - not a mapping
        with self._lock:
            return len(on_disk - self._streams.keys())

    def get(self, host: Host, name: str, reason: Reason = Reason.RETURNED) -> Stream:
        """A stream from memory, from disk, or new; it is not in the registry before `admit`.

        Raises:
            TooManyStreams: there is no room for one more.
        """
        found = self._streams.get((host.name, name))
        if found is not None:
            return found
        if self._store is not None:
            self._store.used((host.name, name))
        self._make_room()
        stream = self._make(host, name)
        if self._store is not None:
            self._restore(self._store, stream, reason)
        return stream

    def admit(self, stream: Stream) -> None:
        """Keep a stream that was used, as the most recently used one."""
        with self._lock:
            self._streams[stream.key] = stream
            self._streams.move_to_end(stream.key)

    def find(self, host: Host, name: str) -> Stream:
        """A stream that exists, in memory or on disk; it is in the registry afterwards.

        Raises:
            UnknownStream: there is none.
            TooManyStreams: it is on disk, and there is no room for it.
        """
        key = (host.name, name)
        stored = set() if self._store is None or key in self._streams else set(self._store.keys())
        if key not in self._streams and key not in stored:
            names = [stream for bundle, stream in (*self._streams, *stored) if bundle == host.name]
            raise UnknownStream(
                f"there is no stream `{name}` of bundle `{host.name}`{did_you_mean(name, names)}",
                "Streams begin with their first `predict`",
            )
        stream = self.get(host, name)
        self.admit(stream)
        return stream

    def restore_all(self, hosts: dict[str, Host]) -> int:
        """Bring the most recently saved streams back into memory when the daemon starts; gives how many."""
        if self._store is None:
            return 0
        keys = [key for key in self._store.keys() if key[0] in hosts]  # noqa: SIM118 - not a mapping
        for bundle, name in reversed(keys[: self._max_streams]):
            self.admit(self.get(hosts[bundle], name, Reason.START))
        return len(keys)

    def swap(self, host: Host) -> tuple[int, int]:
        """Let the streams of a bundle go on with a new version of it.

        Returns:
            How many keep their theta, and how many start from the new source because theirs does not fit.
        """
        kept = restarted = 0
        for old in self.all():
            if old.bundle != host.name:
                continue
            old.close()
            self._left(old)
            new = self._make(host, old.name)
            data = old.model.encode(old.model.checkpoint, notes=old.notes())
            if self._carry(data, new, old):
                kept += 1
            else:
                restarted += 1  # the other slot on disk is set aside when it is next read
            new.samples, new.enabled = old.samples, old.enabled
            with self._lock:
                self._streams[new.key] = new  # in the place of the old one
            if self._saver is None:
                continue
            if worth_saving(new):  # also in place of a job that waits, which fits the old bundle only
                self._saver.keep(new, new.model.checkpoint, new.notes())
            else:
                self._saver.drop(old)
        return kept, restarted

    def save_all(self) -> None:
        """Save every stream as it is, when the daemon ends; what cannot be written is told and left."""
        if self._saver is None:
            return
        for stream in self.all():
            stream.close()
            if worth_saving(stream):
                try:
                    self._saver.save_now(stream)
                except StateUnwritable as error:
                    log.warning("stream %s is not saved: %s", stream.name, error)

    # ------------------------------------------------------------------------------------------ inside

    def _restore(self, store: StateStore, stream: Stream, reason: Reason) -> None:
        found = store.load(stream)
        restored = found.restored
        if restored is not None:
            stream.resume(restored.checkpoint, restored.notes, before=restored.before, restored=restored.slot)
        for event in found.set_aside:
            stream.record(event)
        if restored is not None:
            detail = f"{restored.slot}: {stream.model.steps} steps, theta {stream.model.digest[:12]}"
            self._tell(Event(*stream.key, "restore", reason.value, detail))

    def _make_room(self) -> None:
        while len(self._streams) >= self._max_streams:
            if self._store is None or self._saver is None:
                raise TooManyStreams(
                    f"{len(self._streams)} streams are held, max_streams is {self._max_streams}",
                    "Use one of them, raise `max_streams`, or set `state_dir`, so that the others go to disk",
                )
            oldest = next(iter(self._streams.values()))
            oldest.close()
            try:
                if worth_saving(oldest):
                    self._saver.save_now(oldest)
            except BaseException as error:
                oldest.reopen()
                if not isinstance(error, StateUnwritable):
                    raise
                raise TooManyStreams(
                    f"{len(self._streams)} streams are held and none can go to disk: {error.cause}", error.fix
                ) from error
            self._left(oldest)
            with self._lock:
                del self._streams[oldest.key]
            self._store.discard(oldest)
            self._tell(Event(*oldest.key, "evict", Reason.MEMORY_CAP.value, f"{oldest.model.steps} steps"))

    def _carry(self, data: bytes, new: Stream, old: Stream) -> bool:
        try:
            checkpoint, _, notes = new.model.decode(data)
        except StateError as error:
            self._tell(Event(*new.key, "reset", Reason.OTHER_BUNDLE.value, error.cause))
            return False
        before = old.checkpoints[-1] if old.checkpoints else None
        new.resume(checkpoint, notes, before=before, restored=old.restored)
        return True


def worth_saving(stream: Stream) -> bool:
    """Whether a stream is more than a new one, or what is on disk, would be.

    One that was restored and not used since is on disk as it is, with the state before it; saving would cost that.
    """
    if stream.model.spec.step is None:
        return False
    return stream.samples > 0 or not stream.enabled or stream.suspended
