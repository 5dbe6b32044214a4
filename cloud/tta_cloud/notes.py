"""What commands have asked of a service that runs, carried out: enrolment, revocation, pins, rollbacks.

For the network thread; a rollback is the school's, and comes back through `later`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tta_cloud import control, edges, ledger, steering
from tta_cloud.errors import BadRecord, StoreError
from tta_cloud.members import Members
from tta_cloud.records import Entry, Patch
from tta_cloud.rollouts import Rollouts
from tta_cloud.school import School
from tta_cloud.store import Store
from tta_runtime.errors import TtaError

log = logging.getLogger(__name__)


class Notes:
    """Takes the notes of one store.

    Args:
        directory: of the store.
        store: that is changed.
        school: publishes earlier patches again.
        members: the edges.
        rollouts: what groups have.
        shut_out: ends the connections of a key.
        later: has something done by this thread; for any thread.
    """

    def __init__(
        self,
        directory: Path,
        store: Store,
        school: School,
        members: Members,
        rollouts: Rollouts,
        *,
        shut_out: Callable[[str], None],
        later: Callable[[Callable[[], None]], None],
    ) -> None:
        self._directory = directory
        self._store = store
        self._school = school
        self._members = members
        self._rollouts = rollouts
        self._shut_out = shut_out
        self._later = later
        self._going_back: set[Path] = set()

    def take(self) -> None:
        """Do what commands have asked for since."""
        for path, note in control.notes(self._directory):
            if path in self._going_back:
                continue
            answer = control.Answer()
            try:
                if note is None:
                    raise BadRecord(f"the note {path.name} cannot be read", "Use the service's version")
                if isinstance(note, control.LetEnrol):
                    self._store.call(
                        edges.admit(note.hash, note.name, note.group, expires_ms=note.expires_ms)
                    )
                elif isinstance(note, control.ShutOut):
                    self._members.shut_out(note.key)  # at once, also where the disk does not take it
                    self._shut_out(note.key)
                    self._store.call(edges.revoke(note.key))
                elif isinstance(note, control.Pin):
                    answer = self._pin(note)
                elif isinstance(note, control.Unpin):
                    answer = _answer_of(self._store.call(steering.unpin(note.group, note.why)))
                    self._school.wake(note.group)
                elif isinstance(note, control.RollBack):
                    self._going_back.add(path)
                    self._school.roll_back(note, partial(self._rolled_back, path))
                    continue
            except StoreError as error:
                log.warning("a command waits: %s", error)
                return
            except TtaError as error:
                log.warning("a command is not carried out: %s", error)
                answer = control.refusal(error)
            self._done(path, answer)
            self._members.refresh()

    def _done(self, path: Path, answer: control.Answer) -> None:
        path.unlink(missing_ok=True)
        control.tell(path, answer)

    def _pin(self, note: control.Pin) -> control.Answer:
        entry = self._store.call(steering.pin(note.group, note.epoch, note.seq, note.why))
        self._rollouts.hold(self._store.read(lambda db: ledger.get(db, note.group, entry.epoch, entry.seq)))
        log.info("group %s is pinned at patch %d", note.group, entry.seq)
        return _answer_of(entry)

    def _rolled_back(self, path: Path, made: Patch | TtaError) -> None:
        """On the school's thread."""

        def take() -> None:
            self._going_back.discard(path)
            if isinstance(made, TtaError):
                log.warning("a command is not carried out: %s", made)
                self._done(path, control.refusal(made))
                return
            self._rollouts.hold(made)
            self._done(path, _answer_of(made.entry))

        self._later(take)


def _answer_of(entry: Entry) -> control.Answer:
    return control.Answer(entry.epoch, entry.seq, entry.state)
