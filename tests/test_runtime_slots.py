"""Two slots for one thing: after any sequence of commits, failures and damage the newest whole one is found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from disks import Failing, Recording
from snapshots import files, unchanged
from tta_runtime import state_file
from tta_runtime.atomic import leftovers, make_durable, write_atomic
from tta_runtime.errors import StateMalformed, StateUnreadable, StateUnwritable
from tta_runtime.slots import SLOTS, Slots, newest_ns

LIMIT = 1000


def encode(value):
    return lambda generation: f"{generation} {value}".encode()


def decode(data):
    generation, _, value = data.decode().partition(" ")
    if not generation.isdigit() or not value:
        raise StateMalformed("not a slot", "Delete it")
    return value, int(generation)


def opened(directory, **arguments):
    """Slots that have read what is there, with the values found, the newest first, and the refused names."""
    slots = Slots(directory, **arguments)
    good, refused = slots.load(decode, LIMIT)
    return slots, [slot.value for slot in good], [slot.path.name for slot in refused]


@pytest.fixture
def place(tmp_path):
    return tmp_path / "streams" / "bundle" / "cam"


@pytest.fixture
def slots(place, tmp_path):
    slots = Slots(place, base=tmp_path)
    for value in ("one", "two", "three"):
        slots.commit(encode(value))
    return slots


def test_commits_take_turns_and_the_two_newest_are_found(slots, place):
    assert opened(place)[1:] == (["three", "two"], [])
    assert files(place).keys() == set(SLOTS)
    assert slots.commit(encode("four")) == "b.state"
    assert slots.commit(encode("five")) == "a.state"
    assert opened(place)[1] == ["five", "four"]


def test_nothing_there(place):
    with unchanged(place.parents[2]):
        slots, good, refused = opened(place)
    assert (good, refused) == ([], [])
    assert newest_ns(place) is None
    slots.clear()


def test_a_new_start_goes_on_where_the_last_one_ended(slots, place):
    again, *_ = opened(place)
    again.commit(encode("four"))
    assert opened(place)[1] == ["four", "three"]


def test_only_the_owner_may_read_a_slot(slots, place):
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("damage", [b"", b"rubbish", b"x" * (LIMIT + 1), None])
def test_a_damaged_slot_is_replaced_first_and_the_other_one_stays(slots, place, name, damage):
    newest = {"a.state": "three", "b.state": "two"}
    kept = next(value for slot, value in newest.items() if slot != name)
    path = place / name
    path.unlink()
    if damage is None:
        path.mkdir()
    else:
        path.write_bytes(damage)
    with unchanged(place):
        again, good, refused = opened(place)
    assert (good, refused) == ([kept], [name])
    if damage is not None:
        assert again.commit(encode("four")) == name
        assert opened(place)[1:] == (["four", kept], [])
    else:
        with unchanged(place), pytest.raises(StateUnwritable, match="directory"):
            again.commit(encode("four"))


def test_both_damaged(slots, place):
    for name in SLOTS:
        (place / name).write_bytes(b"rubbish")
    again, good, refused = opened(place)
    assert (good, refused) == ([], list(SLOTS))
    again.commit(encode("four"))
    assert opened(place)[1:] == (["four"], ["b.state"])


def test_of_equal_generations_one_is_newest_and_the_next_commit_decides(place):
    place.mkdir(parents=True)
    for name in SLOTS:
        (place / name).write_bytes(f"7 {name}".encode())
    again, good, _ = opened(place)
    assert good == ["a.state", "b.state"]
    again.commit(encode("eight"))
    assert opened(place)[1] == ["eight", "a.state"]


def test_beyond_the_largest_generation_it_starts_over_and_nothing_older_comes_back(place):
    place.mkdir(parents=True)
    (place / "a.state").write_bytes(f"{state_file.MAX_GENERATION} last".encode())
    again, good, _ = opened(place)
    assert good == ["last"]
    again.commit(encode("first"))
    assert opened(place)[1] == ["first"]
    again.commit(encode("second"))
    assert opened(place)[1] == ["second", "first"]
    assert (place / "a.state").read_bytes() == b"2 second"


def test_starting_over_fails_as_a_whole(place):
    place.mkdir(parents=True)
    (place / "a.state").write_bytes(f"{state_file.MAX_GENERATION} last".encode())
    disk = Failing(calls=("remove",))
    again, *_ = opened(place, disk=disk)
    disk.broken = True
    for _ in range(2):
        with pytest.raises(StateUnwritable):
            again.commit(encode("first"))
        assert opened(place)[1][0] == "last"
    disk.broken = False
    again.commit(encode("first"))
    assert opened(place)[1] == ["first"]


# --- going back -------------------------------------------------------------------------------------


def test_replacing_leaves_only_the_new_one(slots, place):
    assert slots.replace(encode("back")) == "b.state"
    assert opened(place)[1] == ["back"]
    slots.commit(encode("on"))
    assert opened(place)[1] == ["on", "back"]


def test_replacing_writes_before_it_deletes(place, tmp_path):
    disk = Recording()
    slots = Slots(place, disk, base=tmp_path)
    slots.commit(encode("one"))
    slots.commit(encode("two"))
    del disk.calls[:]
    slots.replace(encode("back"))
    names = [call.name for call in disk.calls]
    assert names == ["create", "write", "sync", "replace", "sync_directory", "remove", "sync_directory"]


def test_replacing_without_room_deletes_first(slots, place):
    """What was gone back from must not be found again, even where the new one finds no place."""
    disk = Failing(calls=("write",))
    again, *_ = opened(place, disk=disk, base=place.parents[2])
    disk.broken = True
    with pytest.raises(StateUnwritable):
        again.replace(encode("back"))
    assert opened(place)[1:] == ([], [])
    disk.broken = False
    again.replace(encode("back"))
    assert opened(place)[1] == ["back"]


def test_clearing_leaves_no_directory_and_starts_anew(slots, place):
    slots.clear()
    assert not place.exists()
    slots.clear()
    slots.commit(encode("new"))
    assert opened(place)[1] == ["new"]


def test_clearing_takes_the_older_one_first(slots, place):
    disk = Failing(2, calls=("remove",))
    again, *_ = opened(place, disk=disk)
    with pytest.raises(StateUnwritable, match="cannot be deleted"):
        again.clear()
    assert opened(place)[1] == ["three"]
    again.clear()
    assert not place.exists()


def test_what_others_put_there_stays_and_is_no_failure(slots, place):
    (place / "notes.txt").write_text("mine")
    (place / ".a.state.0123456789ab.tmp").write_bytes(b"half")
    (place / ".hidden.tmp").write_text("mine too")
    (place / "directory").mkdir()
    slots.clear()
    assert files(place).keys() == {"notes.txt", ".hidden.tmp", "directory"}
    slots.commit(encode("new"))
    assert opened(place)[1:] == (["new"], [])


# --- links, files in the way, failures --------------------------------------------------------------


def test_a_slot_that_is_a_link_is_not_followed(slots, place, tmp_path):
    (tmp_path / "target").write_bytes(b"9 elsewhere")
    (place / "a.state").unlink()
    (place / "a.state").symlink_to(tmp_path / "target")
    again = Slots(place)
    good, refused = again.load(decode, LIMIT)
    assert [slot.value for slot in good] == ["two"]
    assert isinstance(refused[0].error, StateUnreadable)
    again.commit(encode("four"))
    assert (tmp_path / "target").read_bytes() == b"9 elsewhere"
    assert not (place / "a.state").is_symlink()


def test_a_directory_that_is_a_link_is_not_followed(slots, place, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    with unchanged(tmp_path):
        again, good, refused = opened(place, base=tmp_path)
        assert (good, refused) == ([], [])
        for act in (lambda: again.commit(encode("x")), again.clear, lambda: again.replace(encode("x"))):
            with pytest.raises(StateUnwritable, match="link"):
                act()


def test_a_file_where_the_directory_belongs(place, tmp_path):
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    with unchanged(tmp_path):
        again, good, _ = opened(place, base=tmp_path)
        assert good == []
        with pytest.raises(StateUnwritable, match="where a directory belongs"):
            again.commit(encode("x"))


def test_a_directory_that_was_deleted_meanwhile_comes_back(slots, place):
    for path in place.iterdir():
        path.unlink()
    place.rmdir()
    with pytest.raises(StateUnwritable, match="No such file"):
        slots.commit(encode("four"))
    slots.commit(encode("four"))
    assert opened(place)[1] == ["four"]


def count(act):
    disk = Failing()
    act(disk)
    return disk.count


def test_whichever_call_fails_the_newest_stays_or_is_the_new_one(tmp_path):
    def run(disk, place):
        slots = Slots(place, disk, base=tmp_path)
        done, failed = None, 0
        for value in "abcdef":
            try:
                slots.commit(encode(value))
                done = value
            except StateUnwritable:
                failed += 1
                found = opened(place)[1]
                assert found[:1] in ([done] if done else [], [value])
                slots.commit(encode(value))
                done = value
            assert opened(place)[1][0] == done
            assert not list(leftovers(place))
        return failed

    calls = count(lambda disk: run(disk, tmp_path / "streams" / "counted"))
    assert calls == 4 + 6 * 5
    for nth in range(1, calls + 1):
        assert run(Failing(nth), tmp_path / "streams" / str(nth)) == 1


def test_a_failed_fsync_of_the_directory_leaves_the_order_right(slots, place):
    """The new content may be there although the commit failed; the next commit must not replace the other one."""
    disk = Failing(2, calls=("sync_directory",))
    again, *_ = opened(place, disk=disk)
    with pytest.raises(StateUnwritable):
        again.commit(encode("four"))
    assert opened(place)[1] == ["four", "three"]
    again.commit(encode("five"))
    assert opened(place)[1] == ["five", "three"]


# --- directories ------------------------------------------------------------------------------------


def test_each_new_directory_is_synced_into_its_parent(tmp_path):
    disk = Recording()
    make_durable(tmp_path / "a" / "b", tmp_path, disk)
    assert [(call.name, Path(call.path).name) for call in disk.calls] == [
        ("make_directory", "a"),
        ("sync_directory", tmp_path.name),
        ("make_directory", "b"),
        ("sync_directory", "a"),
    ]


def test_directories_that_exist_are_synced_too(tmp_path):
    """Whoever made them may have been killed before the sync."""
    (tmp_path / "a").mkdir()
    disk = Recording()
    make_durable(tmp_path / "a", tmp_path, disk)
    assert [call.name for call in disk.calls] == ["sync_directory"]


def test_only_our_own_temporary_files_are_left_overs(tmp_path):
    theirs = {"a.tmp", ".tmp", ".x.tmp", ".a.state.0123.tmp", "a.state.0123456789ab.tmp"}
    for name in theirs | {".a.state.0123456789ab.tmp"}:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in leftovers(tmp_path)] == [".a.state.0123456789ab.tmp"]


def test_what_a_killed_writer_leaves_is_a_left_over(tmp_path):
    kept = []

    class Killed(BaseException):
        pass

    class Stopping(Recording):
        def replace(self, source: Path, target: Path) -> None:
            kept.append(source)
            os.link(source, source.with_name(f"kept{source.name}"))
            raise Killed

    with pytest.raises(Killed):
        write_atomic(tmp_path / "a.state", b"x", disk=Stopping())
    (tmp_path / f"kept{kept[0].name}").rename(kept[0])
    assert list(leftovers(tmp_path)) == kept
