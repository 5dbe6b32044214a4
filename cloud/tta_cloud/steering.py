"""What an operator does to the patches of a group: let it stay at one, or publish an earlier one again.

Numbers only grow, because edges refuse lower ones. So a group stays where it is, or it gets what it had under a new
number. Each is one transaction with its reason in the ledger.
"""

from __future__ import annotations

import sqlite3

from tta_cloud import learners, ledger
from tta_cloud.errors import GroupPinned, NothingToDo, NotPinnable
from tta_cloud.operations import Operation
from tta_cloud.records import Entry, Patch, PatchState

OFFERED: frozenset[PatchState] = frozenset({"built", "canary", "published", "stopped", "pinned"})
"""States in which edges may have a patch."""


def publish(patch: Patch) -> Operation[None]:
    """`ledger.append` for what was learned: while the group is to stay where it is, there is nothing newer.

    Raises:
        GroupPinned: it is; raised by the operation.
    """
    append, group = ledger.append(patch), patch.entry.group

    def run(db: sqlite3.Connection) -> None:
        held = ledger.pinned(db, group)
        if held is not None:
            raise GroupPinned(
                f"group {group} is pinned at patch {held.epoch}.{held.seq}, patch {patch.entry.seq} is not published",
                f"`tta-cloud patches pin {group} --off` lets it go on",
            )
        append.run(db)

    return Operation("steering.publish", run, append.size_bytes)


def pin(group: str, epoch: int, seq: int, reason: str) -> Operation[Entry]:
    """Let a group stay at a patch: nothing newer is published until `unpin`.

    Raises:
        UnknownPatch, DamagedRecord: raised by the operation, as are the others.
        NothingToDo: it is pinned there.
        NotPinnable: it is not what the whole group has, or some edge may have a newer one.
    """

    def run(db: sqlite3.Connection) -> Entry:
        entry = ledger.entry_of(db, group, epoch, seq)
        if entry.state == "pinned":
            raise NothingToDo(f"group {group} is pinned at patch {epoch}.{seq}")
        newer = [each for each in ledger.after(db, group, epoch, seq) if each.state in OFFERED]
        if newer:
            raise NotPinnable(
                f"patch {newer[-1].epoch}.{newer[-1].seq} is {newer[-1].state}: edges that have it do not go back to "
                f"{epoch}.{seq}",
                f"`tta-cloud patches rollback {group} {seq} --pin` publishes it again under a new number",
            )
        if entry.state != "published":
            raise NotPinnable(
                f"patch {epoch}.{seq} of {group} is {entry.state}, not what the whole group has",
                f"Pin one that is published; `tta-cloud patches log {group}` shows them",
            )
        return ledger.move(group, epoch, seq, "pinned", reason).run(db)

    return Operation("steering.pin", run)


def unpin(group: str, reason: str) -> Operation[Entry]:
    """Let a group go on; raises NothingToDo where it is not pinned, by the operation."""

    def run(db: sqlite3.Connection) -> Entry:
        held = ledger.pinned(db, group)
        if held is None:
            raise NothingToDo(f"group {group} is not pinned")
        return ledger.move(group, held.epoch, held.seq, "published", reason).run(db)

    return Operation("steering.unpin", run)


def reason_of(epoch: int, seq: int, why: str) -> str:
    """What stands in the ledger at a patch that repeats an earlier one."""
    return f"rolled back to {f'{epoch}.{seq}' if seq else 'the source'}: {why or 'an operator asked for it'}"


def roll_back(
    again: Patch, epoch: int, seq: int, *, hold: bool, snapshot: bytes, after: int, now_ms: int
) -> Operation[int]:
    """Publish an earlier patch's content once more; gives the generation of the learner that goes on from it.

    What came after that patch becomes `rolled-back`.

    Args:
        again: the patch with its new number, state `published` and `reason_of` as its reason.
        epoch: of the earlier one.
        seq: of the earlier one; 0: the source.
        hold: whether the group stays at it.
        snapshot: of the learner.
        after: generation of the learner's last snapshot.
        now_ms: milliseconds since 1970.

    Raises:
        BadRecord: a value is out of range.
        NothingToDo: the group has it, and nothing newer; raised by the operation, as are the others.
        DamagedRecord, OutOfOrder, StaleLearner: as they say.
    """
    entry, appended = again.entry, ledger.append(again)
    saved = learners.save(entry.group, snapshot, (), after=after, saved_ms=now_ms)

    def run(db: sqlite3.Connection) -> int:
        later = [each for each in ledger.after(db, entry.group, epoch, seq) if each.state in OFFERED]
        if not later:
            at = f"patch {epoch}.{seq}" if seq else "the source"
            raise NothingToDo(
                f"group {entry.group} is at {at}, and nothing came after it",
                f"`tta-cloud patches pin {entry.group}` lets it stay there",
            )
        why = f"to {entry.epoch}.{entry.seq}; {entry.reason}"[:200]
        held = ledger.pinned(db, entry.group)
        if held is not None and held not in later:
            ledger.move(entry.group, held.epoch, held.seq, "published", why).run(db)
        for each in later:
            ledger.move(entry.group, each.epoch, each.seq, "rolled-back", why).run(db)
        appended.run(db)
        if hold:
            ledger.move(entry.group, entry.epoch, entry.seq, "pinned", entry.reason).run(db)
        return saved.run(db)

    return Operation("steering.roll_back", run, appended.size_bytes + saved.size_bytes)
