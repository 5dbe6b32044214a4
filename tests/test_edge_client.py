"""The client library where something is wrong with the other side."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest
import zmq

import tiny_bundle
from running import running
from tta_edge import errors, exit_codes, wire
from tta_edge.client import Client, _errors_by_code, as_error
from tta_runtime import errors as runtime_errors
from tta_runtime.errors import TtaError

X = np.zeros((2, 8), np.float32)


@pytest.fixture
def free_endpoint():
    """An endpoint where nobody listens; nobody else can take it either while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{bound.getsockname()[1]}"


class Fake:
    """A daemon that answers what the test tells it, on a real socket."""

    def __init__(self, answer):
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind("tcp://127.0.0.1:0")
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.thread = threading.Thread(target=self._run, args=(answer,), daemon=True)

    def _run(self, answer):
        if self.socket.poll(20_000):
            peer, *frames = self.socket.recv_multipart()
            for reply in answer(wire.decode_request(frames, wire.Limits()).message):
                self.socket.send_multipart([peer, *reply])

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.thread.join(20)
        self.socket.close()


def test_nobody_listens(free_endpoint):
    began_s = time.monotonic()
    with Client(free_endpoint, timeout_s=0.3) as client:
        with pytest.raises(errors.Unreachable, match=free_endpoint):
            client.info()
        with pytest.raises(errors.Unreachable):
            client.predict(X)
    assert time.monotonic() - began_s < 10


def test_somebody_listens_and_never_answers():
    with (
        Fake(lambda _: []) as fake,
        Client(fake.endpoint, timeout_s=0.3) as client,
        pytest.raises(errors.DeadlineExceeded, match=r"0\.3 s"),
    ):
        client.status()


def test_replies_to_earlier_calls_are_dropped():
    def answer(message):
        stale = wire.ResetDone(id=message.id - 1, stream="old", theta_digest="old")
        fresh = wire.ResetDone(id=message.id, stream="s", theta_digest="new")
        return [wire.encode(stale), wire.encode(fresh)]

    with Fake(answer) as fake, Client(fake.endpoint) as client:
        assert client.reset("s") == "new"


@pytest.mark.parametrize(
    "reply",
    [
        [b"nonsense"],
        [wire.PROTOCOL, b"\xc1"],
        wire.encode(
            wire.ResetDone(id=1, stream="s", theta_digest="d")
        ),  # a reply, though not to this request
    ],
)
def test_a_daemon_that_breaks_the_wire_format_is_named(reply):
    with Fake(lambda _: [reply]) as fake, Client(fake.endpoint) as client, pytest.raises(errors.WireError):
        client.info()


def test_busy_says_when_to_come_back():
    def answer(message):
        return [
            wire.encode(
                wire.ErrorReply(id=message.id, code="busy", cause="full", fix="wait", retry_after_s=1.5)
            )
        ]

    with Fake(answer) as fake, Client(fake.endpoint) as client, pytest.raises(errors.Busy) as caught:
        client.info()
    assert caught.value.retry_after_s == 1.5


def test_an_error_without_an_id_reaches_the_call_that_waits():
    reply = wire.encode(wire.ErrorReply(code="malformed-header", cause="c", fix="f"))
    with (
        Fake(lambda _: [reply]) as fake,
        Client(fake.endpoint) as client,
        pytest.raises(errors.MalformedHeader),
    ):
        client.info()


def test_an_error_of_a_later_version_keeps_its_code():
    error = as_error(wire.ErrorReply(id=1, code="out-of-coffee", cause="no beans", fix="Buy some"))
    assert isinstance(error, errors.RemoteError)
    assert "out-of-coffee: no beans" in str(error)


def test_a_client_outlives_a_restart_of_the_daemon(tmp_path):
    tiny_bundle.build(tmp_path / "tiny")
    with running(tmp_path / "tiny") as first:
        endpoint = first.endpoint
        client = Client(endpoint, timeout_s=30)
        assert client.predict(X).steps == 1
    with client, running(tmp_path / "tiny", bind=endpoint):
        assert client.predict(X).steps == 1


def all_errors():
    kinds = [TtaError]
    for kind in kinds:
        kinds += [
            sub
            for sub in kind.__subclasses__()
            if sub.__module__ in (errors.__name__, runtime_errors.__name__)
        ]
    return kinds[1:]


def test_every_error_has_a_code_of_its_own_and_comes_back_as_itself():
    by_code = _errors_by_code()
    assert len({kind.code for kind in all_errors()}) == len(all_errors())
    for kind in all_errors():
        assert by_code[kind.code] is kind
        error = as_error(wire.ErrorReply(id=1, code=kind.code, cause="a cause", fix="A fix"))
        assert type(error) is kind
        assert (error.cause, error.fix) == ("a cause", "A fix")


def test_every_error_has_an_exit_code():
    for kind in all_errors():
        assert exit_codes.exit_code(kind("cause", "fix")) in (2, 3, 4)
