"""Both ends of the link without sockets: each rule alone, then the pair over a line that loses, doubles, delays,
reorders and cuts messages, with restarts of either end. Time is a number here.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
from collections import Counter, OrderedDict

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_cloud import session as cloud_side
from tta_cloud.session import Arrived, CloudSession, Gone, Refused, SessionOptions
from tta_edge.uplink import Uplink
from tta_edge.uplink_events import (
    Acknowledged,
    Connect,
    Garbled,
    GivenUp,
    HeadCame,
    Held,
    Lost,
    Online,
    PatchCame,
    RootCame,
)
from tta_edge.uplink_options import UplinkOptions
from tta_edge.uplink_phase import TRANSITIONS, Phase
from tta_edge.uplink_samples import Upload
from tta_runtime import errors, link, wire

SEEDS = int(os.environ.get("TTA_SEEDS", "40"))
SHA = "a" * 64
PEER, USER = b"\0peer", "key-1"
HELLO = link.Hello(id=0, version="1", bundle_digest=SHA, mode="both", epoch=0, seq=0, theta_digest=SHA)
WELCOME = link.Welcome(id=0, group="g", version="1", root_version=0, max_open=4)
X = np.arange(6, dtype=np.float32)


def whole(frames):
    return [bytes(frame) for frame in frames]


def frames_of(message, **tensors):
    return whole(link.encode_message(message, tensors))


replace = msgspec.structs.replace


def key(number):
    return f"{number:032x}"


def sample(number, *, key_number=None, x=X):
    return link.Sample(
        id=number,
        key=key(number if key_number is None else key_number),
        stream="s",
        taken_ms=0,
        epoch=0,
        seq=0,
        entropy=0.5,
        x=wire.declare(x),
    )


# --- the cloud's end ------------------------------------------------------------------------------


def receive(session, message, *, peer=PEER, user=USER, now_s=0.0, **tensors):
    """What happened, and what the peer reads."""
    events, sends = session.receive(peer, user, frames_of(message, **tensors), now_s)
    return events, [link.decode_from_cloud(whole(frames)).message for _, *frames in sends]


def send_sample(session, number, **others):
    return receive(session, sample(number), x=X, **others)


def greet(session, *, peer=PEER, user=USER, number=1, now_s=0.0):
    events, replies = receive(session, replace(HELLO, id=number), peer=peer, user=user, now_s=now_s)
    assert replies == []
    (sent,) = session.answer(events[-1], replace(WELCOME, id=number))
    assert sent[0] == peer
    return session


def only_refused(events, code):
    (event,) = events
    assert isinstance(event, Refused)
    assert event.error.code == code
    return event.error


@pytest.mark.parametrize(
    "message", [link.Ping(id=5), link.Fetch(id=5), link.GetRoot(id=5, version=1), sample(5)], ids=wire.tag
)
def test_l5_nothing_is_done_for_who_has_not_said_hello(message):
    session = CloudSession()
    tensors = {"x": X} if isinstance(message, link.Sample) else {}
    events, (reply,) = receive(session, message, **tensors)
    only_refused(events, "not-greeted")
    assert (reply.code, reply.id) == ("not-greeted", 5)
    assert (session.open, session.peers, session.online) == (0, 0, {})


def test_l5_nothing_is_done_before_the_hello_is_answered_nor_after_it_was_refused():
    session = CloudSession()
    (arrived,), _ = receive(session, replace(HELLO, id=1))
    only_refused(send_sample(session, 2)[0], "not-greeted")
    (sent,) = session.refuse(arrived, errors.BadValue("another bundle", "Serve that one"))
    assert link.decode_from_cloud(whole(sent[1:])).message.code == "bad-value"
    only_refused(send_sample(session, 3)[0], "not-greeted")
    assert (session.open, session.peers, session.online) == (0, 0, {})


def test_a_welcomed_edge_is_there_and_its_requests_are_answered():
    session = greet(CloudSession())
    assert session.online == {USER: replace(HELLO, id=1)}
    (arrived,), replies = send_sample(session, 2, now_s=1.0)
    assert replies == []
    assert (arrived.user, arrived.at_s, session.open) == (USER, 1.0, 1)
    np.testing.assert_array_equal(arrived.tensors["x"], X)
    ((peer, *frames),) = session.answer(arrived, link.Accepted(id=2, key=key(2), stored=True))
    assert peer == PEER
    assert link.decode_from_cloud(whole(frames)).message.stored
    assert session.open == 0
    with pytest.raises(KeyError):
        session.answer(arrived, link.Accepted(id=2, key=key(2), stored=True))


def test_l11_a_ping_is_answered_by_the_session_itself():
    events, (reply,) = receive(greet(CloudSession()), link.Ping(id=9))
    assert events == []
    assert reply == link.Noted(id=9)


def test_l6_a_routing_name_that_comes_with_another_key_begins_again():
    session = greet(CloudSession())
    events, (reply,) = send_sample(session, 2, user="key-2")
    gone, refused = events
    assert gone == Gone(USER, "replaced")
    assert refused.error.code == reply.code == "not-greeted"
    assert (session.peers, session.online) == (0, {})


def test_l8_a_repeated_request_waits_for_the_one_answer_and_gets_it_again():
    session = greet(CloudSession())
    (arrived,), _ = send_sample(session, 2)
    assert send_sample(session, 2) == ([], [])
    accepted = link.Accepted(id=2, key=key(2), stored=True)
    session.answer(arrived, accepted)
    assert send_sample(session, 2) == ([], [accepted])
    assert session.open == 0


def test_l8_a_repeated_hello_gets_the_welcome_and_changes_nothing():
    session = greet(CloudSession())
    (arrived,), _ = send_sample(session, 2)
    assert receive(session, replace(HELLO, id=1)) == ([], [replace(WELCOME, id=1)])
    assert session.answer(arrived, link.Accepted(id=2, key=key(2), stored=True))


@pytest.mark.parametrize("answered", [False, True])
def test_l8_another_request_under_a_used_id_is_refused(answered):
    session = greet(CloudSession())
    (arrived,), _ = send_sample(session, 2)
    if answered:
        session.answer(arrived, link.Accepted(id=2, key=key(2), stored=True))
    events, (reply,) = receive(session, sample(2, key_number=3), x=X)
    only_refused(events, "duplicate-request")
    assert reply.id == 2
    assert session.open == (0 if answered else 1)


def test_l8_a_refusal_is_not_remembered_and_the_same_request_may_succeed():
    session = greet(CloudSession())
    (arrived,), _ = send_sample(session, 2)
    session.refuse(arrived, errors.BadValue("disk full", ""))
    (again,), _ = send_sample(session, 2)
    assert session.answer(again, link.Accepted(id=2, key=key(2), stored=True))


def test_l8_what_carries_a_patch_is_made_again():
    session = greet(CloudSession())
    row = np.zeros(8, np.uint8)
    patch = link.PatchMessage(id=2, sealed=wire.declare(row), payload=wire.declare(row))
    for _ in range(2):
        (arrived,), _ = receive(session, link.Fetch(id=2))
        assert session.answer(arrived, patch, {"sealed": row, "payload": row})


def test_l8_the_memory_of_answers_is_bounded():
    session = greet(CloudSession(SessionOptions(max_open=1, spare=1)))
    for number in range(2, 12):
        (arrived,), _ = send_sample(session, number)
        session.answer(arrived, link.Accepted(id=number, key=key(number), stored=True))
    assert len(session._peers[PEER].answered) == 2
    assert send_sample(session, 11)[0] == []  # remembered
    assert isinstance(send_sample(session, 2)[0][0], Arrived)  # for the store to recognise


def test_l10_an_edge_has_a_bound_and_the_others_do_not_feel_it():
    session = greet(CloudSession(SessionOptions(max_open=2, spare=1, retry_after_s=3.0)))
    greet(session, peer=b"other", user="key-2")
    arrived = [send_sample(session, number)[0][0] for number in (2, 3, 4)]
    events, (reply,) = send_sample(session, 5)
    only_refused(events, "busy")
    assert (reply.code, reply.retry_after_s, session.open) == ("busy", 3.0, 3)
    assert isinstance(send_sample(session, 2, peer=b"other", user="key-2")[0][0], Arrived)
    session.answer(arrived[0], link.Accepted(id=2, key=key(2), stored=True))
    assert isinstance(send_sample(session, 5)[0][0], Arrived)


def test_l10_connecting_again_does_not_evade_the_bound():
    session = CloudSession(SessionOptions(max_open=2, spare=1))
    for attempt in range(10):
        events, _ = receive(session, replace(HELLO, id=attempt * 10 + 1))
        if isinstance(events[-1], Arrived):
            session.answer(events[-1], replace(WELCOME, id=attempt * 10 + 1))
        for number in range(2, 8):
            send_sample(session, attempt * 10 + number)
        assert session.open <= 3


@pytest.mark.parametrize("bound", [{"capacity": 2}, {"max_open_bytes": 2 * X.nbytes}])
def test_l10_all_edges_together_have_a_bound(bound):
    session = CloudSession(SessionOptions(**bound))
    for number in range(3):
        greet(session, peer=bytes([number]), user=f"key-{number}")
    for number in range(2):
        send_sample(session, 2, peer=bytes([number]), user=f"key-{number}")
    only_refused(send_sample(session, 2, peer=b"\2", user="key-2")[0], "busy")
    assert session.open == 2


def test_l11_a_silent_edge_is_forgotten_and_any_traffic_counts():
    session = greet(CloudSession(SessionOptions(silence_s=10.0)))
    assert session.next_s(4.0) == 6.0
    session.receive(PEER, USER, [b"nonsense"], 9.0)
    assert session.tick(18.9) == []
    assert session.tick(19.0) == [Gone(USER, "silent")]
    assert (session.peers, session.online, session.next_s(19.0)) == (0, {}, None)
    only_refused(receive(session, link.Ping(id=3), now_s=20.0)[0], "not-greeted")


def test_l13_a_new_hello_replaces_the_connection_and_its_open_requests():
    session = greet(CloudSession())
    (arrived,), _ = send_sample(session, 2)
    greet(session, number=7)
    assert session.answer(arrived, link.Accepted(id=2, key=key(2), stored=True)) == []
    assert (session.open, session.peers) == (0, 1)
    assert isinstance(send_sample(session, 2)[0][0], Arrived)


def test_l13_an_edge_that_comes_by_another_connection_replaces_the_former():
    session = greet(CloudSession())
    (arrived,), _ = send_sample(session, 2)
    events, _ = receive(session, replace(HELLO, id=1), peer=b"new")
    assert events[0] == Gone(USER, "replaced")
    session.answer(events[1], replace(WELCOME, id=1))
    assert session.answer(arrived, link.Accepted(id=2, key=key(2), stored=True)) == []
    assert [frames[0] for frames in session.push([USER], link.Noted(id=0))] == [b"new"]
    assert session.peers == 1


def test_connections_are_bounded_and_the_longest_silent_one_goes():
    session = CloudSession(SessionOptions(max_peers=2))
    for number in range(3):
        events, _ = receive(
            session, replace(HELLO, id=1), peer=bytes([number]), user=f"key-{number}", now_s=float(number)
        )
        session.answer(events[-1], replace(WELCOME, id=1))
    assert events[0] == Gone("key-0", "crowded-out")
    assert set(session.online) == {"key-1", "key-2"}


def test_a_draining_cloud_answers_what_is_open_and_takes_nothing_new():
    session = greet(CloudSession())
    (arrived,), _ = send_sample(session, 2)
    session.drain()
    only_refused(send_sample(session, 3)[0], "draining")
    assert session.answer(arrived, link.Accepted(id=2, key=key(2), stored=True))


def test_at_the_door_edges_enrol_and_nothing_else():
    session = CloudSession(door=True)
    only_refused(receive(session, replace(HELLO, id=1))[0], "not-greeted")
    enroll = link.Enroll(id=1, token="t" * 16, name="edge-1")
    for number in (1, 2):  # the answer was lost: it is asked again
        (arrived,), _ = receive(session, replace(enroll, id=number))
        enrolled = link.Enrolled(
            id=number, group="g", endpoint="tcp://c:1", sealed=wire.declare(np.zeros(4, np.uint8))
        )
        assert session.answer(arrived, enrolled, {"sealed": np.zeros(4, np.uint8)})
        assert (session.peers, session.online) == (0, {})
    only_refused(receive(greet(CloudSession()), enroll)[0], "duplicate-request")
    only_refused(receive(greet(CloudSession()), replace(enroll, id=8))[0], "not-greeted")


def test_what_is_pushed_goes_to_those_who_are_there():
    session = greet(CloudSession())
    row = np.arange(4, dtype=np.uint8)
    head = link.HeadMessage(sealed=wire.declare(row))
    assert [f[0] for f in session.push([USER, "elsewhere"], head, {"sealed": row})] == [PEER]
    assert session.gone(PEER) == [Gone(USER, "unreachable")]
    assert session.gone(PEER) == []
    assert session.push([USER], head, {"sealed": row}) == []
    greet(session)
    assert session.revoke(USER) == [Gone(USER, "revoked")]


def test_l16_a_refusal_leaves_everything_as_it_was():
    session = greet(CloudSession())
    (arrived,), _ = send_sample(session, 2)
    before = (session.open, session.peers, session.online)
    for sent in ([], [b"HTTP"], [link.PROTOCOL, b"\xc1"], frames_of(sample(3), x=X)[:2]):
        events, replies = session.receive(PEER, USER, sent, 1.0)
        assert isinstance(events[0], Refused)
        assert len(replies) == 1
    assert (session.open, session.peers, session.online) == before
    assert session.answer(arrived, link.Accepted(id=2, key=key(2), stored=True))


@pytest.mark.parametrize("table", [cloud_side.TRANSITIONS, cloud_side.DOOR, TRANSITIONS])
def test_a_table_covers_every_phase(table):
    assert set(table) == set(type(next(iter(table))))


@pytest.mark.parametrize("bad", [{"max_open": 0}, {"silence_s": 0}, {"retry_after_s": 1e9}])
def test_bounds_that_are_none_are_refused(bad):
    with pytest.raises(errors.BadValue):
        SessionOptions(**bad)


# --- the edge's end -------------------------------------------------------------------------------


class Edge:
    """An uplink whose sends are read as the cloud would."""

    def __init__(self, *, draw=lambda: 0.0, **options):
        self.uplink = Uplink(HELLO, draw, UplinkOptions(**options))
        self.now_s = 0.0

    def tick(self, now_s=None):
        self.now_s = self.now_s if now_s is None else now_s
        events, sends = self.uplink.tick(self.now_s)
        return events, [link.decode_from_edge(whole(frames)).message for frames in sends]

    def sends(self, now_s=None):
        events, sends = self.tick(now_s)
        assert events == []
        return sends

    def get(self, message, now_s=None, **tensors):
        self.now_s = self.now_s if now_s is None else now_s
        events, sends = self.uplink.receive(frames_of(message, **tensors), self.now_s)
        return events, [link.decode_from_edge(whole(frames)).message for frames in sends]

    def greeting(self, now_s=None):
        assert self.tick(now_s) == ([Connect()], [])
        self.uplink.connected(self.now_s)
        (hello,) = self.sends()
        return hello

    def online(self, now_s=None, **welcome):
        hello = self.greeting(now_s)
        welcome = replace(WELCOME, id=hello.id, **welcome)
        events, sends = self.get(welcome)
        assert events == [Online(welcome)]
        assert self.uplink.phase is Phase.ONLINE
        self.first = sends
        return self

    def offer(self, number, x=X):
        return self.uplink.offer(
            Upload(key=key(number), stream="s", taken_ms=0, epoch=0, seq=0, entropy=0.5, x=x)
        )

    def alive(self, until_s):
        """Time passes, and the cloud pushes something now and then."""
        while self.now_s < until_s:
            self.get(
                link.HeadMessage(sealed=wire.declare(X.view(np.uint8))),
                min(until_s, self.now_s + 1),
                sealed=X.view(np.uint8),
            )


def test_the_life_of_a_link():
    edge = Edge()
    assert not edge.offer(1)
    hello = edge.greeting()
    assert replace(hello, id=0) == HELLO
    assert not edge.offer(1)
    edge.get(replace(WELCOME, id=hello.id))
    assert edge.offer(1)
    (sent,) = edge.sends()
    assert (sent.key, sent.stream) == (key(1), "s")
    events, _ = edge.get(link.Accepted(id=sent.id, key=key(1), stored=True))
    assert events == [Acknowledged(key(1), True, "")]
    edge.uplink.close()
    assert edge.uplink.next_s(0.0) is None
    assert edge.tick(100.0) == ([], [])


def test_l7_ids_count_up_from_a_random_start():
    edge = Edge(draw=lambda: 0.5).online()
    for number in range(3):
        edge.offer(number)
    assert [m.id for m in edge.sends()] == [2**51 + 2, 2**51 + 3, 2**51 + 4]


def test_l10_samples_stay_within_the_credit_and_the_window():
    for options, welcome, room in (({}, {"max_open": 3}, 3), ({"window": 2}, {"max_open": 3}, 2)):
        edge = Edge(**options).online(**welcome)
        assert edge.uplink.room == room
        assert [edge.offer(number) for number in range(4)] == [True] * room + [False] * (4 - room)
        assert not edge.offer(0)
        assert len(edge.sends()) == room


def test_l10_a_cloud_that_grants_less_after_a_break_gets_less():
    edge = Edge().online(max_open=3)
    for number in range(3):
        edge.offer(number)
    assert len(edge.sends()) == 3
    edge.uplink.disconnected(1.0)
    edge.online(now_s=2.0, max_open=1)
    assert [m.key for m in edge.first] == [key(0)]
    _, sends = edge.get(link.Accepted(id=edge.first[0].id, key=key(0), stored=True))
    assert [m.key for m in sends] == [key(1)]


def test_l10_and_within_the_bytes_but_one_goes_alone_however_large():
    edge = Edge(window_bytes=2 * X.nbytes).online()
    for number in range(4):
        edge.offer(number)
    first, _ = edge.sends()
    _, sends = edge.get(link.Accepted(id=first.id, key=first.key, stored=True))
    assert [m.key for m in sends] == [key(2)]
    edge = Edge(window_bytes=1).online()
    edge.offer(1)
    edge.offer(2)
    assert [m.key for m in edge.sends()] == [key(1)]


def test_l8_what_is_not_answered_is_sent_again_the_same_and_later_each_time():
    edge = Edge(answer_s=5.0, max_answer_s=12.0).online()
    edge.offer(1)
    (sent,) = edge.sends()
    (request,) = edge.uplink._samples.all()
    times, tries = [], request.tries
    for _ in range(100):
        edge.alive(edge.now_s + 0.5)
        if request.tries > tries:
            tries += 1
            times.append(edge.now_s)
    gaps = np.diff([0.0, *times])
    np.testing.assert_allclose(gaps[:4], [5.0, 10.0, 12.0, 12.0], atol=0.51)
    assert edge.uplink.holds == {key(1)}
    accepted = link.Accepted(id=sent.id, key=sent.key, stored=True)
    assert edge.get(accepted)[0] == [Acknowledged(key(1), True, "")]
    assert edge.get(accepted)[0] == []  # the answer to the repetition


def test_l10_busy_holds_all_samples_back_for_as_long_as_the_cloud_said():
    edge = Edge().online()
    edge.offer(1)
    (sent,) = edge.sends()
    events, _ = edge.get(link.Refusal(id=sent.id, code="busy", cause="c", retry_after_s=3.0))
    assert events == [Held("busy", "c", 3.0)]
    edge.offer(2)
    edge.alive(2.9)
    assert [m for m in edge.sends() if isinstance(m, link.Sample)] == []
    _, sends = edge.tick(3.0)
    assert [m.key for m in sends if isinstance(m, link.Sample)] == [key(1), key(2)]


def test_l14_a_sample_that_is_refused_again_and_again_is_given_up_and_blocks_nobody():
    edge = Edge(attempts=3, answer_s=1.0).online()
    edge.offer(1)
    edge.offer(2)
    events = []
    for _ in range(10):
        for message in edge.tick()[1]:
            if isinstance(message, link.Sample) and message.key == key(1):
                events += edge.get(link.Refusal(id=message.id, code="bad-field", cause="c"))[0]
            elif isinstance(message, link.Sample):
                events += edge.get(link.Accepted(id=message.id, key=message.key, stored=True))[0]
        edge.now_s += 1.0
    assert events == [Acknowledged(key(2), True, ""), GivenUp("sample", key(1), "bad-field", "c")]
    assert edge.uplink.holds == frozenset()


def test_l11_silence_is_noticed_after_pings_and_only_then():
    edge = Edge(ping_s=2.0, liveness=3).online()
    assert edge.uplink.next_s(0.0) == 2.0
    assert [type(m) for m in edge.sends(1.9)] == []
    (first,) = edge.sends(2.0)
    (second,) = edge.sends(4.0)
    assert first == second
    events, sends = edge.tick(6.0)
    assert sends == []
    assert [(e.code, e.wait_s) for e in events] == [("silent", 1.0)]
    assert edge.tick(6.9) == ([], [])
    assert edge.tick(7.0)[0] == [Connect()]


def test_l11_any_message_is_a_sign_of_life_and_an_edge_that_only_listens_says_something():
    edge = Edge(ping_s=2.0, liveness=3).online(silence_s=20.0)
    said = []
    for now_s in range(1, 60):
        _, sends = edge.get(
            link.HeadMessage(sealed=wire.declare(X.view(np.uint8))), float(now_s), sealed=X.view(np.uint8)
        )
        for message in sends:
            said.append(now_s)
            edge.get(link.Noted(id=message.id))
    assert edge.uplink.phase is Phase.ONLINE
    assert max(np.diff(said)) <= 20.0 / 3


def test_l11_bytes_under_way_lengthen_the_patience():
    edge = Edge(ping_s=2.0, liveness=3, slow_bytes_per_s=1024.0, window_bytes=1 << 20).online()
    edge.offer(1, np.zeros(10 * 1024, np.uint8))
    edge.sends()
    assert edge.tick(15.9)[0] == []
    assert edge.tick(16.0)[0][0].code == "silent"


def test_l12_the_wait_doubles_up_to_a_limit_is_drawn_and_a_welcome_ends_it():
    for draw, factor in ((0.0, 1.0), (0.5, 0.75)):
        edge, waits = Edge(draw=lambda draw=draw: draw, wait_s=1.0, max_wait_s=8.0, connect_s=10.0), []
        for _ in range(6):
            assert edge.tick()[0] == [Connect()]
            ((lost,), _) = edge.tick(edge.now_s + 10.0)
            assert lost.code == "unreachable"
            waits.append(lost.wait_s)
            assert edge.uplink.next_s(edge.now_s) == lost.wait_s
            edge.now_s += lost.wait_s
        assert waits == [w * factor for w in (1.0, 2.0, 4.0, 8.0, 8.0, 8.0)]
        edge.online()
        assert edge.uplink.disconnected(edge.now_s)[0].wait_s == factor
        assert edge.uplink.disconnected(edge.now_s) == []


@pytest.mark.parametrize(("told_s", "wait_s"), [(None, 1.0), (20.0, 20.0)])
def test_l12_a_refused_hello_waits_as_long_as_it_was_told(told_s, wait_s):
    edge = Edge()
    hello = edge.greeting()
    events, _ = edge.get(
        link.Refusal(id=hello.id, code="not-admitted", cause="c", fix="f", retry_after_s=told_s)
    )
    assert events == [Lost("not-admitted", "c", "f", wait_s)]


def test_l12_a_draining_cloud_is_left():
    edge = Edge().online()
    events, _ = edge.get(link.Refusal(code="draining", cause="c", retry_after_s=9.0))
    assert events == [Lost("draining", "c", "", 9.0)]


def test_l12_an_edge_that_was_forgotten_says_hello_and_sends_its_samples_again():
    edge = Edge().online()
    edge.offer(1)
    (sent,) = edge.sends()
    edge.alive(3.0)
    events, (hello,) = edge.get(link.Refusal(id=sent.id, code="not-greeted", cause="c"))
    assert events == []
    assert replace(hello, id=0) == HELLO
    assert edge.get(link.Refusal(id=sent.id, code="not-greeted", cause="c")) == (
        [],
        [],
    )  # sent before the hello
    events, sends = edge.get(replace(WELCOME, id=hello.id))
    assert isinstance(events[0], Online)
    assert sends == [sent]


def test_l12_a_cloud_that_forgets_at_once_is_not_asked_at_once():
    edge = Edge().online()
    events, _ = edge.get(link.Refusal(code="not-greeted", cause="c"))
    assert events[0].code == "forgotten"


def test_samples_outlive_the_connection():
    edge = Edge().online()
    edge.offer(1)
    sent = edge.sends()
    edge.uplink.disconnected(1.0)
    assert edge.uplink.holds == {key(1)}
    assert edge.uplink.room == 0
    edge.online(now_s=2.0)
    assert edge.first == sent
    edge.uplink.withdraw(key(1))
    assert edge.uplink.holds == frozenset()


def patch_of(number, fetch):
    row = np.frombuffer(str(number).encode(), np.uint8)
    return link.PatchMessage(id=fetch, sealed=wire.declare(row), payload=wire.declare(row)), {
        "sealed": row,
        "payload": row,
    }


def test_l15_a_patch_is_fetched_when_a_newer_one_is_named_and_not_again_at_once():
    edge = Edge(refetch_s=10.0).online()
    edge.uplink.have(1, 3)
    edge.uplink.newest(1, 3)
    assert edge.sends() == []
    edge.uplink.newest(1, 4)
    (fetch,) = edge.sends()
    edge.uplink.newest(1, 4)
    assert edge.sends() == []
    message, rows = patch_of(4, fetch.id)
    events, sends = edge.get(message, **rows)
    assert isinstance(events[0], PatchCame)
    assert (events[0].sealed, bytes(events[0].payload), sends) == (b"4", b"4", [])
    assert edge.sends() == []
    assert edge.uplink.next_s(0.0) == 2.0  # until the ping
    edge.alive(9.5)  # it was not adopted
    assert not any(isinstance(m, link.Fetch) for m in edge.sends())
    assert any(isinstance(m, link.Fetch) for m in edge.sends(10.0))
    edge.uplink.have(1, 4)
    edge.uplink.newest(2, 1)  # numbers begin anew with an epoch


def test_l15_a_newer_head_during_a_fetch_leads_to_another_fetch():
    edge = Edge().online()
    edge.uplink.newest(1, 1)
    (fetch,) = edge.sends()
    edge.uplink.newest(1, 2)
    message, rows = patch_of(1, fetch.id)
    assert edge.get(message, **rows)[1] == []  # until the edge has said what it makes of it
    edge.uplink.have(1, 1)
    sends = edge.sends()
    assert [type(m) for m in sends] == [link.Fetch]
    _, sends = edge.get(link.Noted(id=sends[0].id))  # there is none for this edge yet
    assert sends == []


def test_l15_an_answer_that_is_newer_than_the_question_is_not_fetched_a_second_time():
    edge = Edge().online()
    edge.uplink.newest(1, 1)
    (fetch,) = edge.sends()
    edge.uplink.newest(1, 2)
    message, rows = patch_of(2, fetch.id)
    assert edge.get(message, **rows)[1] == []
    edge.uplink.have(1, 2)
    assert edge.sends() == []


def test_l15_a_patch_that_could_not_be_kept_is_fetched_again_later():
    edge = Edge(refetch_s=10.0).online()
    edge.uplink.newest(1, 1)
    (fetch,) = edge.sends()
    message, rows = patch_of(1, fetch.id)
    edge.get(message, **rows)
    edge.uplink.have(1, 1)
    edge.uplink.lack(1, 1, held=(0, 0))
    edge.alive(9.5)
    assert not any(isinstance(m, link.Fetch) for m in edge.sends())
    assert any(isinstance(m, link.Fetch) for m in edge.sends(10.0))
    edge.uplink.have(1, 2)
    edge.uplink.lack(1, 1, held=(0, 0))  # a newer one was taken meanwhile
    assert edge.uplink._patches.have == (1, 2)


def test_pushed_messages_are_handed_on_as_they_are():
    edge = Edge().online()
    message, rows = patch_of(7, None)
    assert edge.get(message, **rows)[0][0].sealed == b"7"
    assert edge.get(link.RootMessage(sealed=rows and wire.declare(rows["sealed"])), sealed=rows["sealed"])[
        0
    ] == [RootCame(b"7")]
    assert edge.get(link.HeadMessage(sealed=wire.declare(rows["sealed"])), sealed=rows["sealed"])[0] == [
        HeadCame(b"7")
    ]


def test_roots_are_asked_for_in_order():
    edge = Edge().online(root_version=2)
    row = np.zeros(1, np.uint8)
    asked, sends = [], edge.first
    while sends:
        asked += [m.version for m in sends]
        events, more = edge.get(link.RootMessage(id=sends[0].id, sealed=wire.declare(row)), sealed=row)
        assert isinstance(events[0], RootCame)
        assert more == []
        edge.uplink.have_root(asked[-1])
        sends = edge.sends()
    assert asked == [1, 2]


def test_reports_arrive_in_order_and_again_after_a_break():
    edge = Edge().online()
    for state in ("staged", "committed"):
        edge.uplink.report(1, 1, state, theta_digest=SHA, detail="d" * 1000)
    (first,) = edge.sends()
    assert (first.state, len(first.detail)) == ("staged", 512)
    edge.uplink.disconnected(1.0)
    edge.online(now_s=2.0)
    (again,) = edge.first
    assert again.state == "staged"
    assert again.id != first.id
    _, (second,) = edge.get(link.Noted(id=again.id))
    assert second.state == "committed"
    assert edge.get(link.Noted(id=second.id)) == ([], [])


def test_reports_are_bounded_and_the_oldest_goes():
    edge = Edge(max_reports=2).online()
    for seq in range(5):
        edge.uplink.report(1, seq, "committed", theta_digest=SHA)
    assert edge.uplink.dropped_reports == 3
    assert [m.seq for m in edge.sends()] == [3]


@pytest.mark.parametrize(
    "answer",
    [lambda sent: link.Noted(id=sent.id), lambda sent: link.Accepted(id=sent.id, key=key(9), stored=True)],
)
def test_what_is_no_answer_to_the_question_is_ignored_and_told(answer):
    edge = Edge().online()
    edge.offer(1)
    (sent,) = edge.sends()
    events, _ = edge.get(answer(sent))
    assert isinstance(events[0], Garbled)
    assert edge.uplink.holds == {key(1)}
    events, _ = edge.uplink.receive([b"HTTP"], 0.0)
    assert events[0].error.code == "bad-framing"


def test_a_sample_that_cannot_be_sent_is_refused_and_not_held():
    edge = Edge().online()
    with pytest.raises(errors.BadField):
        edge.offer(1, np.array(["text"]))
    with pytest.raises(errors.MessageTooLarge):
        edge.offer(1, np.zeros(link.MAX_PAYLOAD_BYTES + 1, np.uint8))
    assert edge.uplink.holds == frozenset()


@pytest.mark.parametrize("bad", [{"window": 0}, {"ping_s": float("inf")}, {"wait_s": 9.0, "max_wait_s": 8.0}])
def test_options_that_are_none_are_refused(bad):
    with pytest.raises(errors.BadValue):
        UplinkOptions(**bad)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.binary(max_size=60) | st.just(link.PROTOCOL), max_size=5), max_size=5))
def test_whatever_comes_in_neither_end_raises(messages):
    edge, session = Edge().online(), greet(CloudSession())
    for message in messages:
        edge.uplink.receive(message, 0.0)
        session.receive(PEER, USER, message, 0.0)
    assert edge.uplink.phase is Phase.ONLINE
    assert USER in session.online


# --- the pair -------------------------------------------------------------------------------------

FAULTY_S, HEALED_S = 90.0, 240.0
WINDOW, MAX_OPEN = 6, 5
LATE_S = 1.5


class World:
    """One cloud with a store, edges with spools, and lines between them; one seed decides everything."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.now_s = 0.0
        self.faulty = True
        self.bad = {
            "lose": self.draw.choice([0.0, 0.05, 0.3]),
            "double": self.draw.choice([0.0, 0.1]),
            "cut": self.draw.choice([0.0, 0.03]),
            "late": self.draw.choice([0.0, 0.2]),
        }
        self.named = self.draw.random() < 0.5  # whether an edge's connections carry the same routing name
        self.cut_off = set()
        self.queue, self.order = [], itertools.count()
        self.store, self.stored_times, self.committing = {}, Counter(), []
        self.reports, self.newest, self.root = {}, 0, 0
        self.start_cloud()
        self.edges = [Device(self, number) for number in range(2)]
        self.steps = Counter()

    def start_cloud(self):
        """Of a cloud that was killed only the store is left."""
        self.cloud = CloudSession(
            SessionOptions(max_open=MAX_OPEN, spare=4, silence_s=20.0, retry_after_s=0.5)
        )
        self.committing = []

    def at(self, delay_s, what, *arguments):
        heapq.heappush(self.queue, (self.now_s + delay_s, next(self.order), what, arguments))

    def carry(self, deliver, line, frames):
        """Over a line: at once or late, twice, in part, or not at all."""
        if line in self.cut_off:
            return
        frames = whole(frames)
        if self.faulty:
            if self.draw.random() < self.bad["lose"]:
                return
            if self.draw.random() < self.bad["cut"]:
                index = self.draw.randrange(len(frames))
                frames[index] = frames[index][: self.draw.randrange(max(1, len(frames[index])))]
        for _ in range(2 if self.faulty and self.draw.random() < self.bad["double"] else 1):
            late = self.faulty and self.draw.random() < self.bad["late"]
            self.at(self.draw.uniform(0.0, LATE_S) if late else 0.01, deliver, frames)

    # the cloud

    def to_cloud(self, peer, user):
        def deliver(frames):
            events, sends = self.cloud.receive(peer, user, frames, self.now_s)
            self.send_from_cloud(sends)
            for event in events:
                if isinstance(event, Arrived):
                    self.handle(event)

        return deliver

    def send_from_cloud(self, sends):
        for peer, *frames in sends:
            for edge in self.edges:
                if edge.peer == peer:
                    self.carry(edge.receiver(), edge.user, frames)

    def handle(self, event):
        message = event.message
        if isinstance(message, link.Sample):
            if self.faulty and self.draw.random() < 0.05:
                self.send_from_cloud(self.cloud.refuse(event, errors.StateUnwritable("disk full", "")))
            else:
                if not self.committing:
                    self.at(self.draw.choice([0.02, 2.0]) if self.faulty else 0.02, self.commit, self.cloud)
                self.committing.append(event)
            return
        tensors = {}
        if isinstance(message, link.Hello):
            reply = link.Welcome(
                id=message.id,
                group="g",
                version="1",
                root_version=self.root,
                max_open=MAX_OPEN,
                silence_s=20.0,
            )
        elif isinstance(message, link.Fetch):
            reply, tensors = patch_of(self.newest, message.id)
        elif isinstance(message, link.GetRoot):
            tensors = {"sealed": np.frombuffer(str(message.version).encode(), np.uint8)}
            reply = link.RootMessage(id=message.id, sealed=wire.declare(tensors["sealed"]))
        else:
            self.reports.setdefault(event.user, []).append((message.seq, message.state))
            reply = link.Noted(id=message.id)
        self.send_from_cloud(self.cloud.answer(event, reply, tensors))

    def commit(self, cloud):
        """The store's group commit: durable first, answered after."""
        if cloud is not self.cloud:
            return  # that cloud was killed before it
        for event in self.committing:
            message, wanted = event.message, int(event.message.key, 16) % 5 != 0
            known = message.key in self.store
            if wanted and not known:
                self.store[message.key] = event.tensors["x"].copy()
                self.stored_times[message.key] += 1
            reason = "duplicate" if known else "" if wanted else "redundant"
            reply = link.Accepted(id=message.id, key=message.key, stored=wanted, reason=reason)
            self.send_from_cloud(cloud.answer(event, reply))
        self.committing = []

    def push_head(self):
        row = np.frombuffer(f"{self.newest} {self.root}".encode(), np.uint8)
        head = link.HeadMessage(sealed=wire.declare(row))
        self.send_from_cloud(self.cloud.push([e.user for e in self.edges], head, {"sealed": row}))
        self.cloud.tick(self.now_s)
        self.at(5.0, self.push_head)

    # faults

    def trouble(self):
        if not self.faulty:
            return
        what = self.draw.choice(
            ["cut off", "kill cloud", "kill edge", "break", "publish", "rotate", "nothing"]
        )
        edge = self.draw.choice(self.edges)
        if what == "cut off":
            self.cut_off.add(edge.user)
            self.at(self.draw.uniform(0.5, 25.0), self.cut_off.discard, edge.user)
        elif what == "kill cloud":
            self.start_cloud()
        elif what == "kill edge":
            edge.start()
        elif what == "break":
            edge.handle(edge.uplink.disconnected(self.now_s))
            edge.peer = None
        elif what == "publish":
            self.newest += 1
        elif what == "rotate":
            self.root += 1
        self.at(self.draw.uniform(0.5, 8.0), self.trouble)

    def heal(self):
        self.faulty = False
        self.newest += 1

    def run(self):
        self.at(0.0, self.push_head)
        self.at(1.0, self.trouble)
        self.at(FAULTY_S, self.heal)
        for edge in self.edges:
            self.at(0.0, edge.produce)
        while True:
            due_s, what, arguments = self.next_due()
            if due_s > FAULTY_S + HEALED_S:
                return
            assert due_s >= self.now_s - 1e-9
            self.now_s = max(self.now_s, due_s)
            self.steps[int(self.now_s)] += 1
            assert self.steps[int(self.now_s)] < 2000, "it goes round and round"
            what(*arguments)
            self.check_bounds()

    def next_due(self):
        # No clock is so fine that a wait could end before its time by rounding.
        waits = [(edge.uplink.next_s(self.now_s), edge) for edge in self.edges]
        timers = [(self.now_s + (wait_s and wait_s + 1e-6), 0, edge.turn, ()) for wait_s, edge in waits]
        first = min(timers, key=lambda t: t[0])
        if self.queue and self.queue[0][0] <= first[0]:
            first = heapq.heappop(self.queue)
        return first[0], first[2], first[3]

    def check_bounds(self):
        assert self.cloud.open <= len(self.edges) * (MAX_OPEN + 4)
        assert self.cloud.peers <= len(self.edges)
        assert len(self.queue) < 500
        for edge in self.edges:
            assert len(edge.uplink.holds) <= WINDOW


class Device:
    """An edge: its spool outlives it, its uplink does not."""

    def __init__(self, world, number):
        self.world, self.number, self.user = world, number, f"key-{number}"
        self.spool, self.made = OrderedDict(), {}
        self.have = self.root = 0
        self.connections = 0
        self.start()

    def start(self):
        self.peer = None
        options = UplinkOptions(window=WINDOW, window_bytes=400, attempts=1000, patch_bytes=100)
        self.uplink = Uplink(HELLO, self.world.draw.random, options, now_s=self.world.now_s)
        self.uplink.have(1, self.have)
        self.uplink.have_root(self.root)

    def produce(self):
        number = len(self.made) * 10 + self.number
        x = np.full(self.world.draw.randrange(1, 40), number, np.float32)
        self.made[key(number)] = x
        self.spool[key(number)] = x
        if self.world.faulty:
            self.world.at(self.world.draw.uniform(0.2, 3.0), self.produce)

    def receiver(self):
        uplink, peer = self.uplink, self.peer

        def deliver(frames):
            if self.uplink is uplink and self.peer == peer:
                events, sends = uplink.receive(frames, self.world.now_s)
                self.handle(events)
                self.send(sends)

        return deliver

    def turn(self):
        for name, x in self.spool.items():
            if not self.uplink.room:
                break
            self.uplink.offer(Upload(name, "s", 0, 1, self.have, 0.5, x))
        events, sends = self.uplink.tick(self.world.now_s)
        self.send(sends)
        self.handle(events)

    def send(self, sends):
        for frames in sends:
            if self.peer is not None:
                self.world.carry(self.world.to_cloud(self.peer, self.user), self.user, frames)

    def handle(self, events):
        for event in events:
            if isinstance(event, Connect):
                self.connections += 1
                name = f"{self.number}" if self.world.named else f"{self.number}.{self.connections}"
                self.peer = name.encode()
                self.world.at(0.05, self.up, self.uplink, self.connections)
            elif isinstance(event, Lost):
                self.peer = None
            elif isinstance(event, Acknowledged):
                if event.key in self.spool:  # of an edge that was killed the answer may come late
                    assert (event.key in self.world.store) == event.stored
                    del self.spool[event.key]
            elif isinstance(event, HeadCame):
                newest, root = map(int, event.sealed.split())
                self.uplink.newest(1, newest)
                self.uplink.newest_root(root)
            elif isinstance(event, PatchCame) and int(event.sealed) > self.have:
                self.have = int(event.sealed)
                self.uplink.have(1, self.have)
                self.uplink.report(1, self.have, "staged", theta_digest=SHA)
                self.uplink.report(1, self.have, "committed", theta_digest=SHA)
            elif isinstance(event, RootCame):
                self.root = max(self.root, int(event.sealed))
                self.uplink.have_root(self.root)
            assert not isinstance(event, GivenUp)

    def up(self, uplink, connection):
        if uplink is self.uplink and connection == self.connections and self.user not in self.world.cut_off:
            self.uplink.connected(self.world.now_s)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_the_line_does_each_sample_arrives_once_and_the_newest_patch_is_fetched(seed):
    world = World(seed)
    world.run()
    for edge in world.edges:
        assert edge.uplink.phase is Phase.ONLINE
        assert len(edge.made) > 10
        assert edge.spool == {}
        assert edge.uplink.holds == frozenset()
        assert edge.have == world.newest
        assert edge.root == world.root
        assert world.reports[edge.user][-1] == (world.newest, "committed")
        for name, x in edge.made.items():
            wanted = int(name, 16) % 5 != 0
            assert world.stored_times[name] == int(wanted)
            if wanted:
                np.testing.assert_array_equal(world.store[name], x)
    assert world.cloud.open == 0
