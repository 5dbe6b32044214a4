"""Rollouts: canaries first, the group only where they are well, and a stop that nothing undoes."""

from __future__ import annotations

import copy
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tta_cloud.rollout import OPINIONS, Rollout, RolloutOptions, Stage, begin, progress, tick

EXAMPLES = int(os.environ.get("TTA_EXAMPLES", "200"))
many = settings(max_examples=EXAMPLES, deadline=None)
OPTIONS = RolloutOptions()


def names(n: int) -> list[str]:
    return [f"edge-{i:03d}" for i in range(n)]


shares = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.02, 0.05, 0.29, 0.5, 1.0]))
options_strategy = st.builds(
    RolloutOptions,
    canary_share=shares,
    min_edges=st.integers(0, 6),
    success_share=shares,
    error_share=shares,
    canary_timeout_s=st.floats(0.5, 100),
)


def committed(rollout: Rollout, edges, now_s: float = 1.0, options: RolloutOptions = OPTIONS) -> Rollout:
    for edge in edges:
        rollout = progress(rollout, edge, "committed", "", now_s, options)
    return rollout


@pytest.mark.parametrize(
    ("edges", "share", "minimum", "canaries"),
    [
        (0, 0.05, 3, 0),
        (0, 0.05, 0, 0),
        (2, 0.05, 3, 0),
        (3, 0.05, 3, 1),
        (20, 0.05, 3, 1),
        (21, 0.05, 3, 2),
        (100, 0.07, 3, 7),
        (100, 0.0, 3, 1),
        (100, 1.0, 3, 0),
        (9, 0.5, 3, 5),
        (1, 0.5, 1, 1),
    ],
)
def test_how_many_canaries(edges: int, share: float, minimum: int, canaries: int) -> None:
    rollout = begin(7, names(edges), 5.0, RolloutOptions(canary_share=share, min_edges=minimum))
    assert len(rollout.canaries) == canaries
    assert rollout.stage is (Stage.CANARY if canaries else Stage.GROUP)
    assert rollout.seq == 7
    assert rollout.began_s == 5.0
    assert all(rollout.may_have(edge) == (not canaries or edge in rollout.canaries) for edge in names(edges))


def test_a_good_patch_from_canaries_to_the_group() -> None:
    rollout = begin(1, names(40), 0.0, OPTIONS)
    first, second = sorted(rollout.canaries)
    rollout = progress(rollout, first, "staged", "", 1.0, OPTIONS)
    assert (rollout.good, rollout.stage) == (frozenset(), Stage.CANARY)
    rollout = committed(rollout, [first], 2.0)
    assert rollout.stage is Stage.CANARY
    assert not rollout.may_have("edge-039")
    rollout = committed(rollout, [second], 3.0)
    assert (rollout.stage, rollout.began_s) == (Stage.GROUP, 3.0)
    assert rollout.may_have("edge-039")
    assert rollout.may_have("an edge that comes later")


@pytest.mark.parametrize("state", ["refused", "rolled-back"])
def test_one_bad_canary_of_few_stops_it(state: str) -> None:
    rollout = begin(1, names(40), 0.0, OPTIONS)
    first, second = sorted(rollout.canaries)
    rollout = progress(committed(rollout, [second]), first, state, "collapse", 1.0, OPTIONS)
    assert rollout.stage is Stage.STOPPED
    assert rollout.bad == {first: "collapse"}
    assert not any(rollout.may_have(edge) for edge in names(40))


def test_who_commits_and_rolls_back_is_bad() -> None:
    rollout = begin(1, names(2), 0.0, OPTIONS)
    rollout = committed(rollout, names(2))
    rollout = progress(rollout, "edge-000", "rolled-back", "", 2.0, OPTIONS, offered=100)
    assert (rollout.good, rollout.bad) == (frozenset({"edge-001"}), {"edge-000": "rolled-back"})
    assert committed(rollout, ["edge-000"]).bad == {}


@pytest.mark.parametrize(
    ("share", "bad", "stopped"), [(0.02, 2, False), (0.02, 3, True), (0.29, 29, False), (0.29, 30, True)]
)
def test_the_group_stops_it_above_the_share(share: float, bad: int, stopped: bool) -> None:
    options = RolloutOptions(error_share=share)
    rollout = Rollout(1, Stage.GROUP, frozenset({"edge-000"}), 0.0, frozenset({"edge-000"}))
    for edge in names(bad + 1)[1:]:
        assert rollout.stage is Stage.GROUP
        rollout = progress(rollout, edge, "refused", "too-far", 1.0, options, offered=100)
    assert (rollout.stage is Stage.STOPPED) == stopped


def test_who_was_offered_it_counts_once_the_group_has_it() -> None:
    """A canary stage has asked nobody but canaries, whatever its caller counts."""
    rollout = begin(1, names(40), 0.0, OPTIONS)
    bad = min(rollout.canaries)
    assert progress(rollout, bad, "refused", "", 1.0, OPTIONS, offered=1000).stage is Stage.STOPPED


@pytest.mark.parametrize(("share", "needed"), [(0.0, 1), (0.55, 11), (0.551, 12), (1.0, 20)])
def test_how_many_canaries_must_have_committed(share: float, needed: int) -> None:
    options = RolloutOptions(success_share=share, canary_share=0.2)
    rollout = begin(1, names(100), 0.0, options)
    canaries = sorted(rollout.canaries)
    assert committed(rollout, canaries[: needed - 1], options=options).stage is Stage.CANARY
    assert committed(rollout, canaries[:needed], options=options).stage is Stage.GROUP


def test_who_is_no_canary_is_not_heard() -> None:
    rollout = begin(1, names(40), 0.0, OPTIONS)
    stranger = next(edge for edge in names(40) if edge not in rollout.canaries)
    for state in ("committed", "refused", "rolled-back"):
        assert progress(rollout, stranger, state, "", 1.0, OPTIONS) == rollout


def test_a_silent_canary_does_not_hold_up_the_group() -> None:
    rollout = begin(1, names(40), 0.0, OPTIONS)
    first, silent = sorted(rollout.canaries)
    rollout = committed(rollout, [first])
    assert tick(rollout, names(40), 59.9, OPTIONS) == rollout
    grown = tick(rollout, names(40), 60.0, OPTIONS)
    assert (grown.stage, grown.began_s) == (Stage.GROUP, 60.0)
    assert grown.may_have(silent)


def test_where_all_are_silent_others_take_their_turn() -> None:
    rollout = begin(4, names(5), 0.0, OPTIONS)
    asked = [rollout.canaries]
    for turn in range(1, 5):
        rollout = tick(rollout, names(5), 60.0 * turn, OPTIONS)
        assert rollout.stage is Stage.CANARY
        assert rollout.began_s == 60.0 * turn
        assert len(rollout.canaries - asked[-1]) == 1
        asked.append(rollout.canaries)
    assert rollout.canaries == set(names(5)), "all have been asked, so nobody is held up"
    assert tick(rollout, names(5), 300.0, OPTIONS).canaries == rollout.canaries
    late = tick(rollout, [*names(5), "late"], 300.0, OPTIONS)
    assert late.canaries - rollout.canaries == {"late"}
    assert committed(late, ["late"], 301.0).stage is Stage.CANARY
    assert tick(committed(late, ["late"], 301.0), [], 360.0, OPTIONS).stage is Stage.GROUP


def test_canaries_differ_with_the_seq() -> None:
    """Nobody is spared, nobody is always the first, neither at the beginning nor when a turn is taken."""
    edges = names(20)
    first = [min(begin(seq, edges, 0.0, OPTIONS).canaries) for seq in range(20)]
    assert sorted(first) == edges
    silent = Rollout(0, Stage.CANARY, frozenset({"gone"}), 0.0)
    seconds = set()
    for seq in range(20):
        grown = tick(Rollout(seq, silent.stage, silent.canaries, 0.0), edges, 60.0, OPTIONS)
        seconds |= grown.canaries - silent.canaries
    assert seconds == set(edges)


def test_an_operators_choice_comes_first() -> None:
    options = RolloutOptions(canary_share=0.1)
    edges = names(30)
    chosen = begin(5, edges, 0.0, options, trusted=["edge-011", "edge-029", "absent"]).canaries
    assert len(chosen) == 3
    assert chosen > {"edge-011", "edge-029"}
    assert begin(5, iter(edges), 0.0, options, trusted=iter(["edge-029", "edge-011"])).canaries == chosen
    many_named = [begin(seq, edges, 0.0, options, trusted=edges[:9]).canaries for seq in range(30)]
    assert frozenset().union(*many_named) == set(edges[:9])


# --- the word of one edge -----------------------------------------------------------------------------


def test_one_lying_canary_stops_no_rollout_where_two_others_have_committed() -> None:
    edges = names(10)
    rollout = begin(4, edges, 0.0, OPTIONS)
    (liar,) = rollout.canaries
    rollout = progress(rollout, liar, "refused", "collapse", 1.0, OPTIONS, online=edges)
    assert rollout.stage is Stage.CANARY
    assert len(rollout.canaries) == OPINIONS
    first, second = sorted(rollout.canaries - {liar})
    rollout = progress(rollout, first, "committed", "", 2.0, OPTIONS, online=edges)
    assert rollout.stage is Stage.CANARY, "one against one"
    rollout = progress(rollout, second, "committed", "", 3.0, OPTIONS, online=edges)
    assert rollout.stage is Stage.GROUP
    assert rollout.bad == {liar: "collapse"}


def test_a_second_canary_that_agrees_stops_it_before_the_group_has_it() -> None:
    edges = names(10)
    rollout = begin(4, edges, 0.0, OPTIONS)
    for _ in range(2):
        honest = min(rollout.canaries - rollout.bad.keys())
        rollout = progress(rollout, honest, "rolled-back", "collapse", 1.0, OPTIONS, online=edges)
    assert rollout.stage is Stage.STOPPED
    assert len(rollout.canaries) <= OPINIONS


def test_where_nobody_else_can_be_asked_one_word_stops_it() -> None:
    rollout = begin(4, ["a", "b"], 0.0, OPTIONS)
    (first,) = rollout.canaries
    assert progress(rollout, first, "refused", "", 1.0, OPTIONS, online=[first]).stage is Stage.STOPPED


def test_one_liar_of_ten_stops_nothing_that_the_group_has_and_two_do() -> None:
    rollout = Rollout(1, Stage.GROUP, frozenset({"edge-001"}), 0.0, frozenset({"edge-001"}))
    rollout = progress(rollout, "edge-005", "refused", "", 1.0, OPTIONS, offered=10, online=names(10))
    assert rollout.stage is Stage.GROUP
    assert progress(rollout, "edge-006", "refused", "", 1.0, OPTIONS, offered=10).stage is Stage.STOPPED


def test_two_edges_do_not_get_a_patch_at_the_same_time() -> None:
    rollout = begin(1, ["a", "b"], 0.0, OPTIONS)
    assert len(rollout.canaries) == 1
    assert committed(rollout, rollout.canaries).stage is Stage.GROUP


@pytest.mark.parametrize("present", [[], ["edge-003"]])
def test_a_group_most_of_which_is_away_does_not_get_a_patch_all_at_once_when_it_is_back(
    present: list[str],
) -> None:
    rollout = begin(1, present, 0.0, OPTIONS, known=10)
    assert rollout.stage is Stage.CANARY
    assert rollout.canaries == frozenset(present)
    rollout = tick(rollout, names(10), 0.1, OPTIONS)
    assert len(rollout.canaries) == 1, "the first that comes is asked at once, and no other"
    assert sum(rollout.may_have(edge) for edge in names(10)) == 1
    assert committed(rollout, rollout.canaries).stage is Stage.GROUP


# --- properties ---------------------------------------------------------------------------------------

EDGES = names(12)
states = st.sampled_from(["staged", "committed", "refused", "rolled-back", "committed", "unheard-of"])


class AnyRollout(RuleBasedStateMachine):
    """One patch, and everything that edges and time may do to it in any order."""

    rollout: Rollout

    @initialize(
        seq=st.integers(0, 2**63 - 1),
        present=st.sets(st.sampled_from(EDGES)),
        options=options_strategy,
        trusted=st.sets(st.sampled_from(EDGES)),
    )
    def start(self, seq, present, options, trusted) -> None:
        self.options, self.now, self.offered = options, 0.0, 0
        self.rollout = begin(seq, present, 0.0, options, trusted=trusted)
        assert begin(seq, sorted(present, reverse=True), 0.0, options, trusted=trusted) == self.rollout

    def then(self, after: Rollout, again: Rollout, kept: Rollout) -> None:
        before = self.rollout
        assert after == again, "a function of its arguments"
        assert before == kept, "its argument is as it was"
        if before.stage is Stage.STOPPED:
            assert after == before
        elif after.stage is not Stage.STOPPED:
            assert before.canaries <= after.canaries
            assert all(after.may_have(edge) for edge in EDGES if before.may_have(edge))
        self.rollout = after

    @rule(
        edge=st.sampled_from(EDGES),
        state=states,
        offered=st.integers(0, 40),
        online=st.sets(st.sampled_from(EDGES)),
    )
    def speaks(self, edge, state, offered, online) -> None:
        kept = copy.deepcopy(self.rollout)
        self.offered = max(self.offered, offered)
        arguments = (edge, state, "why", self.now, self.options)
        after = progress(self.rollout, *arguments, offered=self.offered, online=online)
        again = progress(kept, *arguments, offered=self.offered, online=sorted(online))
        if self.rollout.stage is Stage.CANARY and after.stage is Stage.GROUP:
            asked = len(after.canaries) - len(after.bad)
            wanted = math.ceil(self.options.success_share * asked - 1e-9)
            if after.bad:
                assert len(after.good) >= 2, "one against one"
            assert len(after.good & after.canaries) >= max(1, wanted)
        self.then(after, again, copy.deepcopy(kept))

    @rule(online=st.sets(st.sampled_from(EDGES)), passed_s=st.floats(0, 120))
    def time(self, online, passed_s) -> None:
        self.now += passed_s
        kept = copy.deepcopy(self.rollout)
        after = tick(self.rollout, online, self.now, self.options)
        self.then(after, tick(kept, sorted(online), self.now, self.options), kept)

    @precondition(lambda self: self.rollout.stage is Stage.CANARY)
    @rule()
    def everybody_left_is_silent(self) -> None:
        """Whatever has been before: in bounded time the group has it, or every edge at hand has been asked."""
        rollout, now = self.rollout, self.now
        for _ in range(len(EDGES) + 1):
            now += 1.01 * self.options.canary_timeout_s
            rollout = tick(rollout, EDGES, now, self.options)
        assert all(rollout.may_have(edge) for edge in EDGES)

    @invariant()
    def nobody_is_good_and_bad(self) -> None:
        assert not self.rollout.good & self.rollout.bad.keys()

    @invariant()
    def the_group_has_nothing_that_too_many_refuse(self) -> None:
        rollout = self.rollout
        if rollout.stage is not Stage.STOPPED:
            asked = len(rollout.canaries)
            if rollout.stage is Stage.GROUP:
                asked = max(asked, self.offered, len(rollout.good) + len(rollout.bad))
            alone = 1 if asked >= OPINIONS else 0
            assert len(rollout.bad) <= max(alone, self.options.error_share * asked + 1e-6)

    @invariant()
    def the_group_follows_somebody(self) -> None:
        """Where there are canaries, the group gets nothing that none of them has committed."""
        if self.rollout.stage is Stage.GROUP and self.rollout.canaries:
            assert self.rollout.good or self.rollout.bad


AnyRollout.TestCase.settings = settings(
    max_examples=max(1, EXAMPLES // 4), stateful_step_count=20, deadline=None
)
TestAnyRollout = AnyRollout.TestCase


@many
@given(st.sets(st.sampled_from(EDGES), min_size=3), st.integers(0, 1000))
def test_one_bad_canary_never_reaches_the_group(present, seq) -> None:
    rollout = begin(seq, present, 0.0, OPTIONS)
    bad = min(rollout.canaries)
    rollout = committed(progress(rollout, bad, "refused", "", 1.0, OPTIONS), EDGES)
    assert tick(rollout, present, 1e6, OPTIONS).stage is Stage.STOPPED
