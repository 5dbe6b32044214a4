"""The ledger of patches: numbers without gaps, states that can only go where they may, the newest one served."""

from __future__ import annotations

import itertools
import sqlite3

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cloud_records import Kept, contents, patch
from tta_cloud import ledger
from tta_cloud.errors import (
    BadRecord,
    DamagedRecord,
    IllegalTransition,
    LedgerError,
    OutOfOrder,
    UnknownPatch,
)
from tta_cloud.records import PATCH_STATES
from tta_cloud.store import FILE


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def kept(root):
    with Kept(root) as store:
        yield store


def newest(kept, group="g"):
    found = kept.read(lambda db: ledger.newest(db, group))
    return found and (found.entry.epoch, found.entry.seq)


def test_every_state_has_its_row_and_leads_to_known_ones():
    assert set(ledger.TRANSITIONS) == set(PATCH_STATES)
    assert all(to <= set(PATCH_STATES) for to in ledger.TRANSITIONS.values())
    reached = set(ledger.INITIAL).union(*ledger.TRANSITIONS.values())
    assert reached == set(PATCH_STATES)


def test_patches_are_found_as_they_were_appended(kept):
    made = [patch(n) for n in (1, 2, 3)]
    for each in made:
        kept.call(ledger.append(each))
    assert [kept.read(lambda db, n=n: ledger.get(db, "g", 1, n)) for n in (1, 2, 3)] == made
    assert kept.read(lambda db: ledger.entries(db, "g")) == [each.entry for each in reversed(made)]
    assert kept.read(lambda db: ledger.entries(db, "g", 1)) == [made[-1].entry]
    assert newest(kept) == (1, 3)
    assert newest(kept, "h") is None
    with pytest.raises(UnknownPatch, match="no patch 4 of g in epoch 1"):
        kept.read(lambda db: ledger.get(db, "g", 1, 4))


def test_numbers_have_no_gap_and_groups_and_epochs_their_own(kept):
    for seq in (0, 2, -1):
        with pytest.raises((OutOfOrder, BadRecord)):
            kept.call(ledger.append(patch(seq)))
    kept.call(ledger.append(patch(1)))
    before = contents(kept.store)
    for seq in (1, 3, 2**62):
        with pytest.raises(OutOfOrder, match=f"has number {seq}, the next one of g in epoch 1 is 2"):
            kept.call(ledger.append(patch(seq)))
    assert contents(kept.store) == before
    kept.call(ledger.append(patch(1, "h")))
    kept.call(ledger.append(patch(1, epoch=5)))
    with pytest.raises(OutOfOrder, match="of epoch 1, group g is in 5"):
        kept.call(ledger.append(patch(2)))
    kept.call(ledger.append(patch(2, epoch=5)))
    assert newest(kept) == (5, 2)
    assert newest(kept, "h") == (1, 1)


def test_a_patch_that_was_not_published_takes_a_number_and_is_not_served(kept):
    kept.call(ledger.append(patch(1)))
    for seq, state in enumerate(("refused", "built", "canary"), 2):
        kept.call(ledger.append(patch(seq, state=state)))
    assert newest(kept) == (1, 1)
    assert kept.read(lambda db: ledger.last_seq(db, "g", 1)) == 4
    kept.call(ledger.move("g", 1, 3, "published"))
    assert newest(kept) == (1, 3)
    kept.call(ledger.move("g", 1, 3, "rolled-back", "collapse"))
    assert newest(kept) == (1, 1)


@pytest.mark.parametrize("state", sorted(set(PATCH_STATES) - ledger.INITIAL))
def test_no_patch_begins_in_the_middle(kept, state):
    with pytest.raises(IllegalTransition, match=f"cannot begin as {state}"):
        ledger.append(patch(1, state=state))


PATHS = {
    "built": ["built"], "refused": ["refused"], "canary": ["canary"], "published": ["published"],
    "stopped": ["canary", "stopped"], "pinned": ["published", "pinned"], "rolled-back": ["canary", "rolled-back"],
}  # fmt: skip


@pytest.mark.parametrize(("state", "to"), list(itertools.product(PATCH_STATES, PATCH_STATES)))
def test_each_transition_of_the_table_and_no_other(kept, state, to):
    first, *rest = PATHS[state]
    kept.call(ledger.append(patch(1, state=first)))
    for step in rest:
        kept.call(ledger.move("g", 1, 1, step))
    before = kept.read(lambda db: ledger.get(db, "g", 1, 1))
    assert before.entry.state == state
    if to in ledger.TRANSITIONS[state]:
        assert kept.call(ledger.move("g", 1, 1, to, "because")).state == to
        after = kept.read(lambda db: ledger.get(db, "g", 1, 1))
        assert (after.entry.state, after.entry.reason) == (to, "because")
        assert after.payload == before.payload
    else:
        with pytest.raises(IllegalTransition, match=f"is {state} and cannot become {to}"):
            kept.call(ledger.move("g", 1, 1, to, "because"))
        assert kept.read(lambda db: ledger.get(db, "g", 1, 1)) == before


def test_what_is_not_there_cannot_move(kept):
    with pytest.raises(UnknownPatch):
        kept.call(ledger.move("g", 1, 1, "stopped"))
    kept.call(ledger.append(patch(1)))
    with pytest.raises(BadRecord):
        kept.call(ledger.move("g", 1, 1, "stopped", "x" * 2000))
    with pytest.raises(BadRecord):
        kept.call(ledger.move("g", 1, 2**70, "stopped"))
    with pytest.raises(BadRecord):
        kept.read(lambda db: ledger.get(db, "g", 1, 2**70))
    assert newest(kept) == (1, 1)


def test_pruning_leaves_the_newest_the_pinned_and_the_served(kept):
    for seq in range(1, 11):
        kept.call(ledger.append(patch(seq, state="published" if seq <= 4 else "built")))
    kept.call(ledger.move("g", 1, 2, "pinned"))
    kept.call(ledger.append(patch(1, "h")))
    assert kept.call(ledger.prune("g", 3)) == 5
    assert [e.seq for e in kept.read(lambda db: ledger.entries(db, "g"))] == [10, 9, 8, 4, 2]
    assert newest(kept) == (1, 4)
    assert newest(kept, "h") == (1, 1)
    assert kept.call(ledger.prune("g", 0)) == 3
    assert kept.read(lambda db: ledger.last_seq(db, "g", 1)) == 10, "a number is never given twice"
    kept.call(ledger.append(patch(11)))
    assert kept.call(ledger.prune("none", 0)) == 0


def sql(root, statement, *values):
    db = sqlite3.connect(root / FILE)
    with db:
        db.execute(statement, values)
    db.close()


@pytest.mark.parametrize("column", ["body", "signatures", "payload", "state", "reason", "created_ms"])
def test_a_damaged_patch_is_not_served(root, kept, column):
    """Nor an older one in its place: edges would refuse it as a replay. The next patch heals it."""
    kept.call(ledger.append(patch(1)))
    kept.call(ledger.append(patch(2)))
    value = {"state": "pinned", "reason": "x", "created_ms": 99}.get(column, b"other")
    sql(root, f"UPDATE patches SET {column} = ? WHERE seq = 2", value)
    with pytest.raises(DamagedRecord):
        kept.read(lambda db: ledger.newest(db, "g"))
    in_entry = column in ("state", "reason", "created_ms")
    assert [e.seq for e in kept.read(lambda db: ledger.entries(db, "g"))] == ([1] if in_entry else [2, 1])
    kept.call(ledger.append(patch(3)))
    assert kept.read(lambda db: ledger.newest(db, "g")) == patch(3)


def test_a_lost_ledger_resumes_after_what_edges_report(root, kept):
    kept.call(ledger.resume("g", 1, 41))
    with pytest.raises(OutOfOrder, match="the next one of g in epoch 1 is 42"):
        kept.call(ledger.append(patch(1)))
    kept.call(ledger.append(patch(42)))
    with pytest.raises(OutOfOrder, match="number 41 was reported, g has come to 42"):
        kept.call(ledger.resume("g", 1, 41))
    sql(root, "UPDATE counters SET last_seq = 7")
    with pytest.raises(DamagedRecord, match="counter of g"):
        kept.call(ledger.append(patch(8)))
    with pytest.raises(OutOfOrder):
        kept.call(ledger.resume("g", 1, 41))
    kept.call(ledger.resume("g", 1, 42))
    kept.call(ledger.append(patch(43)))
    assert newest(kept) == (1, 43)


def test_any_order_of_calls_keeps_the_numbers_and_the_table(tmp_path_factory):
    """A model of a few lines beside the ledger, over some hundred calls with reopening in between."""

    class Ledger(RuleBasedStateMachine):
        @initialize()
        def begin(self):
            self.root = tmp_path_factory.mktemp("ledger")
            self.kept = Kept(self.root)
            self.model = {}

        def teardown(self):
            self.kept.store.close()

        @rule(group=st.sampled_from("gh"), epoch=st.integers(1, 2), jump=st.sampled_from([0, 1, 1, 1, 2]),
              state=st.sampled_from(sorted(ledger.INITIAL)))  # fmt: skip
        def append(self, group, epoch, jump, state):
            mine = [at for at in self.model if at[0] == group]
            last = max((s for _, e, s in mine if e == epoch), default=0)
            legal = jump == 1 and epoch >= max((e for _, e, _ in mine), default=0)
            if last + jump == 0:
                return
            try:
                self.kept.call(ledger.append(patch(last + jump, group, epoch, state)))
            except OutOfOrder:
                assert not legal
            else:
                assert legal
                self.model[group, epoch, last + jump] = state

        @rule(group=st.sampled_from("gh"), epoch=st.integers(1, 2), seq=st.integers(1, 6),
              state=st.sampled_from(PATCH_STATES))  # fmt: skip
        def move(self, group, epoch, seq, state):
            before = self.model.get((group, epoch, seq))
            try:
                self.kept.call(ledger.move(group, epoch, seq, state))
            except LedgerError:
                assert before is None or state not in ledger.TRANSITIONS[before]
            else:
                self.model[group, epoch, seq] = state

        @rule()
        def reopen(self):
            self.kept.store.close()
            self.kept = Kept(self.root)
            assert self.kept.told == []

        @invariant()
        def agrees(self):
            if not hasattr(self, "model"):
                return
            for group in "gh":
                mine = {at[1:]: s for at, s in self.model.items() if at[0] == group}
                found = self.kept.read(lambda db, group=group: ledger.entries(db, group))
                assert [((e.epoch, e.seq), e.state) for e in found] == sorted(mine.items(), reverse=True)
                served = [at for at, state in mine.items() if state in ledger.SERVED]
                assert newest(self.kept, group) == max(served, default=None)

    run_state_machine_as_test(
        Ledger, settings=settings(max_examples=12, stateful_step_count=40, deadline=None)
    )
