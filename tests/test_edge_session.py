"""The protocol as a pair: a client's session and the daemon's, with a list in place of the wire."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_edge import wire
from tta_edge.session import (
    TRANSITIONS,
    Arrived,
    ClientSession,
    Phase,
    Refused,
    ServerSession,
    Settled,
    Signal,
)
from tta_runtime import errors as wire_errors

X = np.ones((2, 3), np.float32)
PEER = b"\0peer"


def server(capacity=2):
    return ServerSession(wire.Limits(), capacity=capacity)


def predict(client):
    return [bytes(f) for f in client.request(wire.Predict(id=0, x=wire.declare(X)), {"x": X})]


def read(client, replies):
    """The one reply, as the client reads it."""
    ((peer, *frames),) = replies
    assert peer == PEER
    return client.receive([bytes(f) for f in frames])


def answer(session, arrived, now_s=0.0):
    return session.answer(
        arrived, wire.ResetDone(id=arrived.message.id, stream="s", theta_digest="d"), {}, now_s
    )


def test_one_request_goes_there_and_back():
    client, daemon = ClientSession(), server()
    (arrived,), replies = daemon.receive(PEER, predict(client), 1.0)
    assert isinstance(arrived, Arrived)
    assert replies == []
    assert (daemon.open, arrived.at_s) == (1, 1.0)
    np.testing.assert_array_equal(arrived.tensors["x"], X)
    received = read(client, answer(daemon, arrived))
    assert received.message.theta_digest == "d"
    assert daemon.open == 0


def test_a_stale_reply_is_dropped_and_the_next_one_is_not():
    client, daemon = ClientSession(), server()
    (first,), _ = daemon.receive(PEER, predict(client), 0.0)
    client.abandon(first.message.id)
    (second,), _ = daemon.receive(PEER, predict(client), 0.0)
    assert read(client, answer(daemon, first)) is None
    assert read(client, answer(daemon, second)).message.id == second.message.id


def test_a_client_may_have_several_requests_open_and_each_is_closed_once():
    client, daemon = ClientSession(), server(capacity=3)
    arrived = [daemon.receive(PEER, predict(client), 0.0)[0][0] for _ in range(3)]
    assert client.open == {1, 2, 3}
    for request in reversed(arrived):
        replies = answer(daemon, request)
        assert read(client, replies).message.id == request.message.id
        assert read(client, replies) is None  # the same once more
    assert client.open == set()


def test_a_request_that_cannot_be_encoded_opens_nothing():
    client = ClientSession()
    with pytest.raises(wire_errors.TensorMismatch):
        client.request(wire.Predict(id=0, x=wire.declare(X)), {})
    assert (client.open, client.last_id) == (set(), 0)


def test_a_broken_reply_closes_its_request_or_all_where_its_id_cannot_be_read():
    client = ClientSession()
    for _ in range(3):
        client.request(wire.Info(id=0))
    with pytest.raises(wire_errors.UnknownMessage):
        client.receive([wire.PROTOCOL, b"\x82\xa4type\xa4pong\xa2id\x02"])
    assert client.open == {1, 3}
    with pytest.raises(wire_errors.BadFraming):
        client.receive([b"?"])
    assert client.open == set()


def test_a_lost_connection_closes_all_that_was_open():
    client = ClientSession()
    for _ in range(2):
        client.request(wire.Info(id=0))
    assert client.lost() == {1, 2}
    assert client.lost() == frozenset()
    client.request(wire.Info(id=0))
    assert client.open == {3}  # an id is not used again: a reply to the old connection cannot be taken for it


def test_what_cannot_be_read_is_answered_and_opens_nothing():
    client, daemon = ClientSession(), server()
    client.request(wire.Info(id=0))
    (event,), replies = daemon.receive(PEER, [b"GET / HTTP/1.1\r\n"], 0.0)
    assert isinstance(event, Refused)
    error = read(client, replies).message
    assert (error.code, error.id, daemon.open) == ("bad-framing", None, 0)


def test_a_full_queue_answers_busy_with_a_time_that_grows_with_the_queue():
    waits = []
    for capacity in (1, 4):
        client, daemon = ClientSession(), server(capacity)
        (slow,), _ = daemon.receive(PEER, predict(client), 0.0)
        answer(daemon, slow, 2.0)  # a request takes two seconds here
        for _ in range(capacity):
            daemon.receive(PEER, predict(client), 2.0)
        (event,), replies = daemon.receive(PEER, predict(client), 2.0)
        assert isinstance(event, Refused)
        error = read(client, replies).message
        assert (error.code, daemon.open) == ("busy", capacity)
        waits.append(error.retry_after_s)
    assert waits == [2.0, 8.0]


def test_the_queue_is_bounded_in_bytes_too_and_one_large_request_still_passes():
    client = ClientSession()
    daemon = ServerSession(wire.Limits(), capacity=100, max_open_bytes=2 * X.nbytes + 1)
    (first,), _ = daemon.receive(PEER, predict(client), 0.0)
    daemon.receive(PEER, predict(client), 0.0)
    (event,), replies = daemon.receive(PEER, predict(client), 0.0)
    assert isinstance(event, Refused)
    assert read(client, replies).message.code == "busy"
    answer(daemon, first)
    assert isinstance(daemon.receive(PEER, predict(client), 0.0)[0][0], Arrived)
    tight = ServerSession(wire.Limits(), capacity=100, max_open_bytes=1)
    assert isinstance(tight.receive(PEER, predict(client), 0.0)[0][0], Arrived)


def test_after_busy_a_place_is_free_again():
    client, daemon = ClientSession(), server(capacity=1)
    (first,), _ = daemon.receive(PEER, predict(client), 0.0)
    daemon.receive(PEER, predict(client), 0.0)
    answer(daemon, first)
    assert isinstance(daemon.receive(PEER, predict(client), 0.0)[0][0], Arrived)


def test_an_id_is_used_once_at_a_time_and_only_by_its_peer():
    client, daemon = ClientSession(), server(capacity=8)
    frames = predict(client)
    (first,), _ = daemon.receive(PEER, frames, 0.0)
    (again,), replies = daemon.receive(PEER, frames, 0.0)
    assert isinstance(again, Refused)
    assert read(client, replies).message.code == "duplicate-request"
    assert isinstance(daemon.receive(b"other", frames, 0.0)[0][0], Arrived)
    answer(daemon, first)
    assert isinstance(daemon.receive(PEER, frames, 0.0)[0][0], Arrived)


def cancel(client, number):
    return [bytes(f) for f in client.request(wire.Cancel(id=0, request=number))]


@pytest.mark.parametrize("bounds", [{"capacity": 2}, {"capacity": 100, "per_client": 2}])
def test_w14_a_cancel_finds_a_place_however_much_is_open_and_takes_none(bounds):
    client, daemon = ClientSession(), ServerSession(wire.Limits(), max_open_bytes=1, **bounds)
    daemon.max_open_bytes = 2 * X.nbytes
    texts = [daemon.receive(PEER, predict(client), 0.0)[0][0] for _ in range(2)]
    assert isinstance(daemon.receive(PEER, predict(client), 0.0)[0][0], Refused)
    cancels = [daemon.receive(PEER, cancel(client, text.message.id), 0.0)[0][0] for text in texts]
    assert [type(each) for each in cancels] == [Arrived] * 2
    assert daemon.open == 4
    for each in (*cancels, *texts):
        assert isinstance(daemon.receive(PEER, predict(client), 0.0)[0][0], Refused)
        answer(daemon, each)
        if each is texts[0]:  # what was cancelled has ended: its place is free
            assert isinstance(daemon.receive(PEER, predict(client), 0.0)[0][0], Arrived)


def test_w14_a_flood_of_cancels_holds_no_more_than_the_requests_that_are_open():
    client, daemon = ClientSession(), server(capacity=2)
    (text,), _ = daemon.receive(PEER, predict(client), 0.0)
    (first,), _ = daemon.receive(PEER, cancel(client, text.message.id), 0.0)
    for _ in range(100):
        (event,), replies = daemon.receive(PEER, cancel(client, text.message.id), 0.0)
        assert isinstance(event, Refused)
        assert read(client, replies).message.code == "duplicate-request"
        (event,), replies = daemon.receive(PEER, cancel(client, first.message.id), 0.0)
        assert event == Settled(PEER, "cancel")
        assert not read(client, replies).message.found  # a cancel is no request that could be cancelled
        (event,), replies = daemon.receive(b"other", cancel(ClientSession(), text.message.id), 0.0)
        assert event == Settled(b"other", "cancel")
        assert daemon.open == 2
    answer(daemon, first)
    assert isinstance(daemon.receive(PEER, cancel(client, text.message.id), 0.0)[0][0], Arrived)


def test_a_request_keeps_its_place_until_the_cancel_of_it_is_answered():
    client, daemon = ClientSession(), server(capacity=1)
    (text,), _ = daemon.receive(PEER, predict(client), 0.0)
    (stop,), _ = daemon.receive(PEER, cancel(client, text.message.id), 0.0)
    answer(daemon, text)
    assert isinstance(daemon.receive(PEER, predict(client), 0.0)[0][0], Refused)
    answer(daemon, stop)
    assert isinstance(daemon.receive(PEER, predict(client), 0.0)[0][0], Arrived)


def test_draining_refuses_new_requests_and_closes_with_the_last_answer():
    client, daemon = ClientSession(), server()
    (open_one,), _ = daemon.receive(PEER, predict(client), 0.0)
    daemon.drain()
    assert daemon.phase is Phase.DRAINING
    (event,), replies = daemon.receive(PEER, predict(client), 0.0)
    assert isinstance(event, Refused)
    assert read(client, replies).message.code == "draining"
    assert answer(daemon, open_one)
    assert daemon.phase is Phase.CLOSED


def test_w14_draining_takes_a_cancel_and_closes_when_it_and_what_it_ended_are_answered():
    client, daemon = ClientSession(), server()
    (text,), _ = daemon.receive(PEER, predict(client), 0.0)
    daemon.drain()
    (event,), replies = daemon.receive(PEER, cancel(client, 99), 0.0)
    assert event == Settled(PEER, "cancel")
    assert not read(client, replies).message.found
    (stop,), _ = daemon.receive(PEER, cancel(client, text.message.id), 0.0)
    assert isinstance(stop, Arrived)
    assert answer(daemon, stop)
    assert daemon.phase is Phase.DRAINING
    assert answer(daemon, text)
    assert daemon.phase is Phase.CLOSED
    (event,), _ = daemon.receive(PEER, cancel(client, text.message.id), 0.0)
    assert isinstance(event, Refused)


def test_draining_with_nothing_open_closes_at_once():
    daemon = server()
    daemon.drain()
    assert daemon.phase is Phase.CLOSED


def test_a_peer_that_went_away_is_forgotten_and_its_answer_goes_nowhere():
    client, daemon = ClientSession(), server()
    (arrived,), _ = daemon.receive(PEER, predict(client), 0.0)
    assert daemon.gone(PEER) == 1
    assert daemon.gone(PEER) == 0
    assert daemon.open == 1  # it still has its place in the queue, so nobody else may have it
    daemon.drain()
    assert daemon.phase is Phase.DRAINING
    assert answer(daemon, arrived) == []
    assert (daemon.open, daemon.phase) == (0, Phase.CLOSED)


def part(session, arrived, start=0):
    reply = wire.Generated(id=arrived.message.id, start=start, tokens=1, text="a")
    return session.answer(arrived, reply, {}, 0.0)


def test_w13_a_part_of_a_reply_leaves_its_request_open_at_both_ends():
    client, daemon = ClientSession(), server()
    (arrived,), _ = daemon.receive(PEER, predict(client), 0.0)
    for start in range(3):
        assert read(client, part(daemon, arrived, start)).message.start == start
        assert (daemon.open, client.open) == (1, {1})
    assert read(client, answer(daemon, arrived)).message.theta_digest == "d"
    assert (daemon.open, client.open) == (0, set())


def test_parts_for_whoever_has_gone_or_waits_no_longer_are_dropped():
    client, daemon = ClientSession(), server()
    (arrived,), _ = daemon.receive(PEER, predict(client), 0.0)
    client.abandon(1)
    assert daemon.waited_for(arrived)
    assert read(client, part(daemon, arrived)) is None
    daemon.gone(PEER)
    assert not daemon.waited_for(arrived)
    assert part(daemon, arrived) == []
    assert daemon.open == 1
    assert answer(daemon, arrived) == []
    assert daemon.open == 0


def test_draining_waits_for_the_end_and_not_for_a_part():
    client, daemon = ClientSession(), server()
    (arrived,), _ = daemon.receive(PEER, predict(client), 0.0)
    daemon.drain()
    part(daemon, arrived)
    assert daemon.phase is Phase.DRAINING
    answer(daemon, arrived)
    assert daemon.phase is Phase.CLOSED


def test_an_answer_that_cannot_be_encoded_leaves_its_request_open_for_another_answer():
    client, daemon = ClientSession(), server()
    (arrived,), _ = daemon.receive(PEER, predict(client), 0.0)
    with pytest.raises(wire_errors.BadField, match="`reset-done` cannot be encoded"):
        daemon.answer(arrived, wire.ResetDone(id=1, stream="\ud800", theta_digest="d"), {}, 0.0)
    with pytest.raises(wire_errors.BadField, match="`generated` cannot be encoded"):
        daemon.answer(arrived, wire.Generated(id=1, start=1 << 64, tokens=1, text="a"), {}, 0.0)
    assert daemon.open == 1
    assert read(client, answer(daemon, arrived)).message.theta_digest == "d"
    assert daemon.open == 0


def test_the_life_of_a_session_only_moves_forward():
    order = list(Phase)
    for phase, moves in TRANSITIONS.items():
        assert set(moves) <= set(Signal)
        assert all(order.index(target) == order.index(phase) + 1 for target in moves.values())
    assert TRANSITIONS[Phase.CLOSED] == {}


def test_a_reply_that_breaks_the_wire_format_is_an_error_of_the_client():
    client = ClientSession()
    client.request(wire.Info(id=0))
    with pytest.raises(wire_errors.WireError):
        client.receive([wire.PROTOCOL, b"\xc1"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["request", "garbage", "cancel", "answer", "gone", "drain"]), max_size=40))
def test_in_any_order_every_request_is_answered_at_most_once_and_the_queue_is_bounded(actions):
    daemon, clients = server(capacity=3), {peer: ClientSession() for peer in (b"a", b"b")}
    waiting: list[Arrived] = []
    gone: set[tuple[bytes, int]] = set()
    for turn, action in enumerate(actions):
        peer = (b"a", b"b")[turn % 2]
        if action == "request":
            events, replies = daemon.receive(peer, predict(clients[peer]), float(turn))
            assert len(events) == 1
            assert len(replies) == (not isinstance(events[0], Arrived))
            waiting += [event for event in events if isinstance(event, Arrived)]
        elif action == "garbage":
            assert len(daemon.receive(peer, [b"?"], float(turn))[1]) == 1
        elif action == "cancel":
            theirs = [each.message.id for each in waiting if each.peer == peer]
            events, replies = daemon.receive(
                peer, cancel(clients[peer], theirs[0] if theirs else 0), float(turn)
            )
            assert len(events) == 1
            assert len(replies) == (not isinstance(events[0], Arrived))
            waiting += [event for event in events if isinstance(event, Arrived)]
        elif action == "answer" and waiting:
            arrived = waiting.pop(turn % len(waiting))
            assert len(answer(daemon, arrived, float(turn))) == (arrived.key not in gone)
        elif action == "gone":
            gone |= {arrived.key for arrived in waiting if arrived.peer == peer}
            daemon.gone(peer)
        elif action == "drain":
            daemon.drain()
        assert daemon.open == len(waiting)
        cancels = sum(isinstance(arrived.message, wire.Cancel) for arrived in waiting)
        assert len(waiting) - cancels <= 3
        assert cancels <= 3
    for arrived in waiting:
        answer(daemon, arrived, 99.0)
    daemon.drain()
    assert daemon.phase is Phase.CLOSED
