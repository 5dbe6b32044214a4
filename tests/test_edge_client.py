"""The client library, above all where something is wrong with the other side."""

from __future__ import annotations

import gc
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import peers
import tiny_bundle
from peers import HANG_UP, Fake
from running import daemon, process_environment, running
from tta_edge import errors, exit_codes, wire
from tta_edge.calls import Ask, _errors_by_code
from tta_edge.client import Client, Retry, as_error
from tta_edge.retry import Attempts
from tta_runtime import errors as runtime_errors
from tta_runtime import errors as wire_errors
from tta_runtime.errors import TtaError

X = np.zeros((2, 8), np.float32)
BATCH, _ = tiny_bundle.samples(16)  # enough to be adapted on in the same pass
SOON_S = 8  # far more than anything here takes, far less than the deadlines of 30 s


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


@pytest.fixture
def free_endpoint():
    """An endpoint where nobody listens; nobody else can take it either while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{bound.getsockname()[1]}"


class Watched(Retry):
    """A policy that says when it is asked."""

    asked = None

    def before_next(self, error, attempt, draw):
        wait_s = super().before_next(error, attempt, draw)
        self.asked(error, attempt, wait_s)
        return wait_s


def watched(asked, **settings):
    return type("Watched", (Watched,), {"asked": staticmethod(asked)})(**settings)


# --- nobody there -----------------------------------------------------------------------------------


def test_nobody_listens(free_endpoint):
    with Client(free_endpoint, timeout_s=0.3) as client:
        began_s = time.monotonic()
        with pytest.raises(errors.Unreachable, match=free_endpoint):
            client.info()
        assert time.monotonic() - began_s >= 0.3
        with pytest.raises(errors.Unreachable, match=r"within 0\.1 s"):
            client.predict(X, timeout_s=0.1)


@pytest.mark.parametrize(
    "says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 100], ids=["nothing", "http", "bytes"]
)
def test_somebody_listens_who_does_not_speak_the_protocol(says):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(says)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        with (
            Client(f"tcp://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.5) as client,
            pytest.raises(errors.Unreachable),
        ):
            client.status()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)


@pytest.mark.parametrize(
    "endpoint", ["", "127.0.0.1:5555", "tcp://127.0.0.1:*", "tcp://127.0.0.1:0", "ipc:///x"]
)
def test_a_malformed_endpoint_is_refused_at_once(endpoint):
    with pytest.raises(errors.BadEndpoint):
        Client(endpoint)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_deadline_that_cannot_be_kept_is_refused(free_endpoint, timeout_s):
    with pytest.raises(runtime_errors.BadValue):
        Client(free_endpoint, timeout_s=timeout_s)
    with Client(free_endpoint) as client, pytest.raises(runtime_errors.BadValue):
        client.info(timeout_s=timeout_s)


# --- no answer, or a wrong one ----------------------------------------------------------------------


def test_somebody_listens_and_never_answers():
    with (
        Fake(lambda _: []) as fake,
        Client(fake.endpoint, timeout_s=0.3) as client,
        pytest.raises(errors.DeadlineExceeded, match=r"0\.3 s"),
    ):
        client.status()


def test_replies_to_earlier_calls_are_dropped():
    late = []

    def answer(message):
        late.append(message)
        return [] if len(late) == 1 else [peers.done(late[0], "old"), peers.done(message, "new")]

    with Fake(answer) as fake, Client(fake.endpoint, timeout_s=30) as client:
        with pytest.raises(errors.DeadlineExceeded):
            client.reset("s", timeout_s=0.3)
        assert client.reset("s").theta_digest == "new"


def test_replies_to_requests_that_were_never_made_are_dropped():
    def answer(message):
        return [wire.encode(wire.ResetDone(id=message.id + 7, stream="s", theta_digest="d"))]

    with (
        Fake(answer) as fake,
        Client(fake.endpoint, timeout_s=0.3) as client,
        pytest.raises(errors.DeadlineExceeded),
    ):
        client.reset("s")


def test_a_flood_of_foreign_replies_does_not_outlast_the_deadline():
    stale = wire.encode(wire.ResetDone(id=999, stream="s", theta_digest="d"))
    with Fake(lambda _: [stale] * 20_000) as fake, Client(fake.endpoint, timeout_s=0.2) as client:
        with pytest.raises(errors.DeadlineExceeded):
            client.reset("s")
        with pytest.raises(errors.DeadlineExceeded):
            client.reset("s")


GARBAGE = {
    "one frame": [b"nonsense"],
    "seven frames": [wire.PROTOCOL, *[b"\x80"] * 6],
    "no header": [wire.PROTOCOL, b"\xc1"],
    "another protocol": [b"TTA9", b"\x80"],
    "a request": wire.encode(wire.Info(id=1)),
    "an unknown message": [wire.PROTOCOL, b"\x82\xa4type\xa4pong\xa2id\x01"],
    "a reply to something else": wire.encode(wire.ResetDone(id=1, stream="s", theta_digest="d")),
}


@pytest.mark.parametrize("reply", GARBAGE.values(), ids=GARBAGE)
def test_a_daemon_that_breaks_the_wire_format_is_named(reply):
    with (
        Fake(lambda _: [reply]) as fake,
        Client(fake.endpoint, timeout_s=30) as client,
        pytest.raises(wire_errors.WireError) as caught,
    ):
        client.info()
    assert caught.value.fix


def test_after_garbage_the_client_goes_on():
    def answer(message):
        return [[b"nonsense"] if message.id == 1 else peers.info(message)]

    with Fake(answer) as fake, Client(fake.endpoint, timeout_s=30) as client:
        with pytest.raises(wire_errors.BadFraming):
            client.info()
        assert client.info().model_id == "fake"


@pytest.mark.parametrize(
    "logits",
    [
        np.zeros((3, 3), np.float32),
        np.zeros((2, 3), np.float64),
        np.zeros((2, 0), np.float32),
        np.zeros(2, np.float32),
        np.zeros((2, 1, 3), np.float32),
        np.zeros((), np.float32),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_logits_that_are_none_of_this_batch_are_refused(logits):
    def answer(message):
        return [peers.info(message) if isinstance(message, wire.Info) else peers.prediction(message, logits)]

    with (
        Fake(answer) as fake,
        Client(fake.endpoint, timeout_s=30) as client,
        pytest.raises(wire_errors.TensorMismatch, match="logits"),
    ):
        client.predict(X)


def test_an_error_without_an_id_reaches_the_call_that_waits():
    reply = wire.encode(wire.ErrorReply(code="malformed-header", cause="c", fix="f"))
    with (
        Fake(lambda _: [reply]) as fake,
        Client(fake.endpoint, timeout_s=30) as client,
        pytest.raises(wire_errors.MalformedHeader),
    ):
        client.info()


# --- refused before anything is sent ----------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.predict(X, stream="../x"),
        lambda client: client.predict(X, bundle="-"),
        lambda client: client.predict(X, adapt=1),
        lambda client: client.predict(np.array([["a"]])),
        lambda client: client.info("a/b"),
        lambda client: client.reset(""),
        lambda client: client.rollback("x" * 65),
        lambda client: client.adapt("yes"),
        lambda client: client.adapt(True, "a b"),
        lambda client: client.reload("\n"),
        lambda client: client.events(0),
        lambda client: client.events(np.int64(5)),
        lambda client: client.events(5.0),
    ],
)
def test_what_the_daemon_would_not_take_is_refused_here(call):
    with (
        Fake(lambda _: []) as fake,
        Client(fake.endpoint, timeout_s=30) as client,
        pytest.raises(wire_errors.BadField),
    ):
        call(client)
    assert fake.requests == []


def test_a_too_large_array_is_refused_here():
    def answer(message):
        return [peers.info(message, max_request_bytes=63)]

    with Fake(answer) as fake, Client(fake.endpoint, timeout_s=30) as client:
        for _ in range(2):
            with pytest.raises(runtime_errors.TooLarge, match=r"64 bytes, .* takes 63"):
                client.predict(X)
    assert [type(message) for message in fake.requests] == [wire.Info]  # the limit is asked for once


def test_the_limit_is_asked_for_again_after_a_restart():
    logits = np.zeros((2, 3), np.float32)

    def first(message):
        return [peers.info(message) if isinstance(message, wire.Info) else peers.prediction(message, logits)]

    with Fake(first) as fake:
        client = Client(fake.endpoint, timeout_s=30)
        assert client.predict(X).logits.shape == (2, 3)
    second = Fake(lambda message: [peers.info(message, max_request_bytes=8)], fake.endpoint)
    with client, second, pytest.raises(runtime_errors.TooLarge, match="takes 8"):
        client.predict(X)


# --- what is asked and what is answered -------------------------------------------------------------

ASKED = [
    (lambda c: c.info("b"), wire.Info(id=1, bundle="b")),
    (lambda c: c.status(), wire.Status(id=1)),
    (lambda c: c.reset("s", "b"), wire.Reset(id=1, stream="s", bundle="b")),
    (lambda c: c.rollback("s", "b"), wire.Rollback(id=1, stream="s", bundle="b")),
    (lambda c: c.rollback(), wire.Rollback(id=1)),
    (lambda c: c.adapt(False), wire.Adapt(id=1, on=False)),
    (lambda c: c.adapt(True, "s", "b"), wire.Adapt(id=1, on=True, stream="s", bundle="b")),
    (lambda c: c.reload("b"), wire.Reload(id=1, bundle="b")),
    (lambda c: c.events(7), wire.Events(id=1, limit=7)),
]


@pytest.mark.parametrize(("call", "message"), ASKED, ids=[str(message) for _, message in ASKED])
def test_each_method_asks_for_what_it_is_called(call, message):
    with Fake(lambda message: [peers.error(message, "unknown-bundle")]) as fake:
        with Client(fake.endpoint, timeout_s=30) as client, pytest.raises(errors.UnknownBundle):
            call(client)
        assert fake.requests == [message]


# --- the daemon dies --------------------------------------------------------------------------------


def test_a_daemon_that_goes_with_a_request_open_is_noticed_before_the_deadline():
    with Fake(lambda _: [HANG_UP]) as fake, Client(fake.endpoint, timeout_s=30) as client:
        began_s = time.monotonic()
        with pytest.raises(errors.ConnectionLost, match="may have been carried out"):
            client.reset("s")
        assert time.monotonic() - began_s < SOON_S


def test_an_answer_that_was_sent_before_the_connection_broke_counts():
    for _ in range(20):
        with (
            Fake(lambda message: [peers.done(message), HANG_UP]) as fake,
            Client(fake.endpoint, timeout_s=30) as client,
        ):
            assert client.reset("s").theta_digest == "digest"


def test_a_request_that_may_have_been_carried_out_is_never_sent_again():
    asked = []
    policy = watched(lambda *what: asked.append(what), attempts=5, wait_s=0.0)
    with Fake(lambda _: [HANG_UP]) as first:
        client = Client(first.endpoint, timeout_s=30, retry=policy)
        with client, pytest.raises(errors.ConnectionLost):
            client.reset("s")
    ((error, attempt, wait_s),) = asked
    assert (type(error), attempt, wait_s) == (errors.ConnectionLost, 1, None)
    assert len(first.requests) == 1


def test_a_request_lost_with_its_connection_does_not_reach_the_next_daemon():
    with Fake(lambda _: [HANG_UP]) as first:
        client = Client(first.endpoint, timeout_s=30)
        with pytest.raises(errors.ConnectionLost):
            client.reset("s")
    with client, Fake(lambda message: [peers.info(message)], first.endpoint) as second:
        assert client.info().model_id == "fake"
        assert [type(message) for message in second.requests] == [wire.Info]


def test_a_daemon_that_hangs_costs_one_deadline_and_its_late_answer_is_dropped(bundle):
    with daemon(bundle) as process, Client(process.endpoint, timeout_s=30) as client:
        source = client.predict(X, adapt=False).theta_digest
        process.process.send_signal(signal.SIGSTOP)
        with pytest.raises(errors.DeadlineExceeded):
            client.reset(timeout_s=0.3)
        process.process.send_signal(signal.SIGCONT)
        assert client.predict(X, adapt=False).theta_digest == source


def test_a_killed_daemon_is_found_again_on_its_port(bundle):
    with daemon(bundle) as first:
        client = Client(first.endpoint, timeout_s=30)
        assert client.predict(BATCH).steps == 1
        first.stop(signal.SIGKILL)
    with pytest.raises(errors.Unreachable):
        client.predict(X, timeout_s=0.3)
    with client, daemon(bundle, bind=first.endpoint) as second:
        assert second.endpoint == first.endpoint
        assert client.predict(BATCH).steps == 1


def test_a_client_outlives_a_restart_in_order(bundle):
    with running(bundle) as first:
        client = Client(first.endpoint, timeout_s=30)
        assert client.predict(BATCH).steps == 1
    with client, running(bundle, bind=first.endpoint):
        assert client.predict(BATCH).steps == 1


# --- trying again -----------------------------------------------------------------------------------


def test_busy_says_when_to_come_back():
    with (
        Fake(lambda message: [peers.error(message, "busy", 1.5)]) as fake,
        Client(fake.endpoint, timeout_s=30) as client,
        pytest.raises(errors.Busy) as caught,
    ):
        client.info()
    assert caught.value.retry_after_s == 1.5
    assert len(fake.requests) == 1  # nothing is tried again unless asked for


def test_a_busy_daemon_is_asked_again_when_it_said():
    times = []

    def answer(message):
        times.append(time.monotonic())
        return [peers.error(message, "busy", 0.2) if len(times) < 3 else peers.done(message)]

    with Fake(answer) as fake, Client(fake.endpoint, timeout_s=30, retry=Retry(attempts=3)) as client:
        assert client.reset("s").theta_digest == "digest"
    assert all(gap >= 0.2 for gap in np.diff(times))


@pytest.mark.parametrize("code", ["busy", "draining"])
def test_a_refusal_is_not_tried_for_ever(code):
    with Fake(lambda message: [peers.error(message, code)]) as fake:
        policy = Retry(attempts=4, wait_s=0.0)
        with Client(fake.endpoint, timeout_s=30, retry=policy) as client, pytest.raises(errors.ServiceError):
            client.reset("s")
    assert len(fake.requests) == 4


@pytest.mark.parametrize("code", ["internal", "wrong-shape", "unknown-stream", "out-of-coffee"])
def test_other_refusals_are_not_tried_again(code):
    with Fake(lambda message: [peers.error(message, code)]) as fake:
        policy = Retry(attempts=4, wait_s=0.0)
        with Client(fake.endpoint, timeout_s=30, retry=policy) as client, pytest.raises(TtaError):
            client.reset("s")
    assert len(fake.requests) == 1


def test_a_daemon_that_starts_late_is_found_by_trying_again():
    # The port is free again when the reserving socket is closed, and only then.
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        failed = threading.Event()
        policy = watched(lambda *_: failed.set(), attempts=1000, wait_s=0.01, max_wait_s=0.1)
        client, found = Client(endpoint, timeout_s=0.2, retry=policy), []
        thread = threading.Thread(target=lambda: found.append(client.info()))
        thread.start()
        assert failed.wait(20)
    with client, Fake(lambda message: [peers.info(message)], endpoint):
        thread.join(20)
        assert [info.model_id for info in found] == ["fake"]


def test_the_policy_by_cases():
    policy = Retry(attempts=4, wait_s=1.0, max_wait_s=3.0)
    gone = errors.Unreachable("c", "f")
    assert [policy.before_next(gone, attempt, 0.0) for attempt in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, None]
    assert policy.before_next(errors.Draining("c", "f"), 1, 0.5) == 0.75
    busy = errors.Busy("c", "f")
    assert policy.before_next(busy, 1, 0.0) == 1.0
    for told_s, expected in [
        (0.0, 0.0),
        (2.0, 2.0),
        (3.0, 3.0),
        (3.1, None),
        (-1.0, None),
        (float("nan"), None),
    ]:
        busy.retry_after_s = told_s
        assert policy.before_next(busy, 1, 0.0) == expected
    for kind in (errors.DeadlineExceeded, errors.ConnectionLost, errors.ClientClosed, errors.Internal):
        assert policy.before_next(kind("c", "f"), 1, 0.0) is None
    with pytest.raises(FrozenInstanceError):
        policy.attempts = 9


def test_attempts_end_with_the_last_error_itself():
    draws = iter([0.0, 0.5, 0.0])
    attempts = Attempts(Retry(attempts=4, wait_s=1.0, max_wait_s=3.0), lambda: next(draws))
    refusals = [errors.Draining("c", "f") for _ in range(3)]
    assert [attempts.failed(error) for error in refusals[:2]] == [1.0, 1.5]
    lost = errors.ConnectionLost("c", "f")
    with pytest.raises(errors.ConnectionLost) as raised:
        attempts.failed(lost)
    assert raised.value is lost


def test_attempts_end_when_part_of_the_answer_has_come():
    gone = errors.Unreachable("c", "f")
    attempts = Attempts(Retry(attempts=4), lambda: 0.0)
    assert attempts.failed(gone) == 0.1
    with pytest.raises(errors.Unreachable) as raised:
        attempts.failed(gone, begun=True)
    assert raised.value is gone


def test_what_was_to_be_sent_goes_with_the_error():
    def call():
        sent = set(X.flat)
        held.append(weakref.ref(sent))
        try:
            raise errors.Draining("c", "f")
        except errors.Draining as error:
            Attempts(Retry(attempts=1)).failed(error)
        return sent

    held = []
    gc.disable()
    try:
        with suppress(errors.Draining):
            call()
        assert held[0]() is None
    finally:
        gc.enable()


def test_each_call_has_its_own_count():
    policy, gone = Retry(attempts=2, wait_s=1.0), errors.Unreachable("c", "f")
    for _ in range(2):
        attempts = Attempts(policy, lambda: 0.0)
        assert attempts.failed(gone) == 1.0
        with pytest.raises(errors.Unreachable):
            attempts.failed(gone)


@given(st.integers(1, 5000), st.floats(0, 1, exclude_max=True), st.floats(0, 5) | st.none())
def test_a_wait_is_never_longer_than_said_and_never_earlier_than_told(attempt, draw, told_s):
    policy, busy = Retry(attempts=10_000), errors.Busy("c", "f")
    busy.retry_after_s = told_s
    wait_s = policy.before_next(busy, attempt, draw)
    assert 0 <= wait_s <= 1.1 * policy.max_wait_s
    assert told_s is None or wait_s >= told_s


@pytest.mark.parametrize(
    "settings",
    [{"attempts": 0}, {"wait_s": -1}, {"wait_s": 9}, {"max_wait_s": float("inf")}, {"wait_s": float("nan")}],
)
def test_a_policy_that_cannot_be_kept_is_refused(settings):
    with pytest.raises(runtime_errors.BadValue):
        Retry(**settings)


# --- closing, sharing -------------------------------------------------------------------------------


def test_a_closed_client_says_so(free_endpoint):
    client = Client(free_endpoint)
    client.close()
    client.close()
    for call in (lambda: client.predict(X), client.info, client.status):
        with pytest.raises(errors.ClientClosed, match=free_endpoint):
            call()


@pytest.mark.parametrize(
    ("message", "tensors"),
    [
        (wire.Events(id=0, limit=1 << 64), {}),
        (wire.Info(id=0, bundle="\ud800"), {}),
        (wire.Predict(id=0, x=wire.declare(X)), {}),
        (wire.Predict(id=0, x=wire.declare(X)), {"x": None}),
    ],
)
def test_a_request_that_cannot_be_encoded_ends_that_call_only(message, tensors):
    with Fake(lambda message: [peers.done(message)]) as fake, Client(fake.endpoint, timeout_s=30) as client:
        assert client.reset("s").theta_digest == "digest"
        caught = []

        def work():
            with pytest.raises(wire_errors.WireError) as error:
                client._exchange(Ask(message, wire.InfoReply, None, tensors), 30, time.monotonic())
            caught.append(error.value)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(SOON_S)
        assert len(caught) == 1
        assert caught[0].cause
        assert caught[0].fix
        assert client.reset("s").theta_digest == "digest"
        assert client._io.losses == 0
    assert [type(message) for message in fake.requests] == [wire.Reset] * 2


def test_closing_ends_the_calls_of_other_threads():
    with Fake(lambda _: []) as fake:
        client, caught = Client(fake.endpoint, timeout_s=30), []

        def work():
            with pytest.raises(errors.ClientClosed) as error:
                client.info()
            caught.append(error.value)

        thread = threading.Thread(target=work)
        thread.start()
        fake.wait()
        client.close()
        thread.join(20)
        assert len(caught) == 1


def test_threads_may_share_a_client(bundle):
    with running(bundle) as server, Client(server.endpoint, timeout_s=30) as client:
        steps = []

        def work(number):
            steps.extend((number, client.predict(BATCH, stream=f"s{number}").steps) for _ in range(5))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(steps) == [(number, step) for number in range(4) for step in range(1, 6)]


def client_threads():
    return {thread for thread in threading.enumerate() if thread.name == "tta-client"}


def test_a_client_that_was_forgotten_leaves_no_thread(free_endpoint):
    before = client_threads()
    client = Client(free_endpoint)
    (thread,) = client_threads() - before
    del client
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


FORKED = """
import os, sys
from tta_edge.client import Client
from tta_edge.errors import ClientClosed
client = Client(sys.argv[1])
child = os.fork()
if child == 0:
    try:
        client.info()
    except ClientClosed:
        os._exit(7)
    os._exit(8)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
client.close()
"""


def test_a_process_that_was_forked_off_is_told_to_make_its_own_client(free_endpoint):
    command = [sys.executable, "-c", FORKED, free_endpoint]
    done = subprocess.run(
        command, env=process_environment(), timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- errors -----------------------------------------------------------------------------------------


def test_an_error_of_a_later_version_keeps_its_code():
    error = as_error(wire.ErrorReply(id=1, code="out-of-coffee", cause="no beans", fix="Buy some"))
    assert isinstance(error, errors.RemoteError)
    assert "out-of-coffee: no beans" in str(error)


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
