"""Silent connections: how many a cloud keeps, which one goes, and who is not kept waiting by them (T9)."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_server import serving, ticket
from clouds import Edge, look
from tta_cloud import identity, service
from tta_cloud.crowd import Crowd, shut
from tta_edge.enrol import enrol
from tta_runtime.bundle import Bundle

MOST = 24


# --- who goes ---------------------------------------------------------------------------------------------


def test_the_longest_silent_one_goes_and_never_one_that_was_heard() -> None:
    crowd = Crowd(2)
    assert [crowd.accepted(each) for each in (1, 2)] == [[], []]
    crowd.heard(1)
    assert crowd.accepted(3) == []
    assert crowd.accepted(4) == [2]
    crowd.closed(3)
    assert crowd.accepted(5) == []
    assert len(crowd) == 2


def test_at_a_door_saying_something_proves_nothing() -> None:
    crowd = Crowd(2, forgives=False)
    for each in (1, 2):
        crowd.accepted(each)
        crowd.heard(each)
    assert crowd.accepted(3) == [1]


def test_a_number_that_is_given_again_is_a_new_connection() -> None:
    crowd = Crowd(2)
    for each in (1, 2, 1):
        assert crowd.accepted(each) == []
    assert crowd.accepted(3) == [2]


@given(st.lists(st.tuples(st.sampled_from(["accepted", "heard", "closed"]), st.integers(3, 9)), max_size=60))
def test_there_are_never_more_than_may_be(steps: list[tuple[str, int]]) -> None:
    crowd, there = Crowd(3), set[int]()
    for what, descriptor in steps:
        gone = getattr(crowd, what)(descriptor) or []
        there = (there | {descriptor} if what == "accepted" else there - {descriptor}) - set(gone)
        assert len(crowd) == len(there) <= 3
        assert descriptor not in gone


def test_only_a_connection_to_the_port_is_hung_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        port, elsewhere = server.getsockname()[1], other.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, server.accept()[0] as accepted:
            with (tmp_path / "file").open("w") as file:
                assert not shut(file.fileno(), port)
                file.write("still open")
            assert not shut(accepted.fileno(), elsewhere)
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"
            assert not shut(10**6, port)
            assert shut(accepted.fileno(), port)
            client.settimeout(5)
            assert client.recv(1) == b""
            assert not shut(client.fileno(), port), "the other end of it has another port"
            os.fstat(accepted.fileno())  # its owner closes it


# --- a cloud in a crowd -------------------------------------------------------------------------------------


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_SILENT", MOST)
    monkeypatch.setattr(service, "HANDSHAKE_MS", 120_000)  # so that what goes is sent away, and not too late


def connected(endpoint: str, stack: ExitStack) -> socket.socket:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return stack.enter_context(socket.create_connection((host, int(port))))


def hung_up(connections: list[socket.socket]) -> list[bool]:
    """Which connections the other end has closed; its greeting is no end."""
    found = []
    for each in connections:
        each.setblocking(False)
        try:
            while data := each.recv(4096):
                pass
            found.append(not data)
        except BlockingIOError:
            found.append(False)
        except ConnectionError:
            found.append(True)
    return found


@pytest.mark.usefixtures("crowded")
def test_t9_a_crowd_of_silent_connections_is_bounded_and_an_edge_gets_through(
    bundle: Bundle, tmp_path: Path
) -> None:
    identity.create(tmp_path / "cloud")
    with serving(tmp_path / "cloud", bundle.path) as server, ExitStack() as stack:
        for name in ("early", "late"):
            enrol(ticket(server, tmp_path / "cloud", name), tmp_path / name)
        early = stack.enter_context(Edge(tmp_path / "early", bundle))
        look(lambda: early.phase, lambda phase: phase == "online")
        crowd = [connected(server.endpoint, stack) for _ in range(4 * MOST)]
        gone = look(lambda: hung_up(crowd), lambda found: sum(found) >= 3 * MOST)
        assert gone == [True] * (3 * MOST) + [False] * MOST, "the longest silent ones"
        late = stack.enter_context(Edge(tmp_path / "late", bundle))
        look(lambda: late.phase, lambda phase: phase == "online")
        late.take(3, 1)
        late.settled(3)
        crowd += [connected(server.endpoint, stack) for _ in range(2 * MOST)]
        look(lambda: sum(hung_up(crowd)), lambda count: count >= 5 * MOST)
        early.take(2, 2)
        early.settled(2)
        assert not [each for each in (early, late) if each.phase != "online"], "who was heard stays"
        assert server._stats.figures().connections["edges", "crowded"] >= 5 * MOST - 1


@pytest.mark.usefixtures("crowded")
def test_t9_a_crowd_at_the_door_keeps_nobody_from_enrolling(bundle: Bundle, tmp_path: Path) -> None:
    identity.create(tmp_path / "cloud")
    with serving(tmp_path / "cloud", bundle.path) as server, ExitStack() as stack:
        crowd = [connected(server.door, stack) for _ in range(2 * MOST)]
        look(lambda: sum(hung_up(crowd)), lambda count: count == MOST)
        assert enrol(ticket(server, tmp_path / "cloud"), tmp_path / "a").link.group == "yard"
