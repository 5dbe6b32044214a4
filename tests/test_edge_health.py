"""/metrics, /livez and /readyz over real sockets, and every kind of client that an open port meets."""

from __future__ import annotations

import json
import logging
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

import tiny_bundle
from figures import busy_stats, status, stream
from running import process_environment, running
from tta_edge.client import Client
from tta_edge.errors import AddressInUse, BadEndpoint, CannotBind, RemoteBindRefused
from tta_edge.metrics import exposition
from tta_runtime.health import MAX_CONNECTIONS, MAX_REQUEST_BYTES, HealthServer

PATIENCE_S = 20
PATHS = ("/metrics", "/livez", "/readyz")
X, _ = tiny_bundle.samples(16, seed=3, shift=0.5)
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


class Told:
    """A daemon that is as the test says: alive, accepting, and its figures to be had at once or not."""

    def __init__(self):
        self.is_alive = self.is_accepting = True
        self.figures = threading.Event()
        self.figures.set()
        self.asked = threading.Event()
        self.defect = None

    def exposition(self):
        self.asked.set()
        assert self.figures.wait(PATIENCE_S)
        if self.defect is not None:
            raise self.defect
        return exposition(status(streams=[stream()]), busy_stats().figures())

    def alive(self):
        return self.is_alive

    def accepting(self):
        return self.is_accepting


@pytest.fixture
def told():
    return Told()


@contextmanager
def serving(told, address="127.0.0.1:0", *, timeout_s=PATIENCE_S):
    server = HealthServer(address, told, allow_remote=False, name="tta-edge", timeout_s=timeout_s)
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server(told):
    with serving(told) as server:
        yield server


@pytest.fixture
def hasty(told):
    """A server that gives a connection one second."""
    with serving(told, timeout_s=1.0) as server:
        yield server


def place(server):
    host, _, port = server.endpoint.removeprefix("http://").rpartition(":")
    return host.strip("[]"), int(port)


def connect(server):
    return socket.create_connection(place(server), timeout=PATIENCE_S)


def ask(server, path, method="GET", body=None):
    """(status, headers, body) of one request."""
    connection = HTTPConnection(*place(server), timeout=PATIENCE_S)
    try:
        connection.request(method, path, body=body)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def to_the_end(connection):
    """What comes until the server closes; a broken connection is an end, too."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    return received


def raw(server, data):
    with connect(server) as connection:
        connection.sendall(data)
        return to_the_end(connection)


def assert_refused(answer, code, name):
    status_, headers, body = answer
    assert status_ == code
    assert headers["Content-Type"] == "application/json"
    refusal = json.loads(body)
    assert set(refusal) == {"code", "cause", "fix"}
    assert refusal["code"] == name
    assert all(refusal.values())


def assert_serves(server):
    assert ask(server, "/livez")[0] == 200


# --- what is answered ---------------------------------------------------------------------------------


def test_metrics_are_what_prometheus_reads(server):
    code, headers, body = ask(server, "/metrics")
    assert code == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert families["tta_dropped_samples"].samples[0].value == 7


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/livez?verbose=1", "/readyz?"])
def test_a_healthy_daemon_says_so(server, path):
    code, headers, body = ask(server, path)
    assert (code, json.loads(body)) == (200, {"status": "ok"})
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", [*PATHS, "/other"])
def test_head_is_get_without_its_body(server, path):
    code, headers, body = ask(server, path)
    head_code, head_headers, nothing = ask(server, path, "HEAD")
    changing = {"Date": ""}
    assert (head_code, {**head_headers, **changing}) == (code, {**headers, **changing})
    assert int(headers["Content-Length"]) == len(body)
    assert nothing == b""


def test_the_server_does_not_say_what_it_is_made_of(server):
    _, headers, _ = ask(server, "/livez")
    assert headers["Server"] == "tta-edge"


def test_a_daemon_that_drains_is_alive_and_not_ready(server, told):
    told.is_accepting = False
    assert ask(server, "/livez")[0] == 200
    assert_refused(ask(server, "/readyz"), 503, "not-ready")
    told.is_accepting = True
    assert ask(server, "/readyz")[0] == 200


def test_a_daemon_that_hangs_is_neither_alive_nor_ready(server, told):
    told.is_alive = False
    assert_refused(ask(server, "/livez"), 503, "stalled")
    assert_refused(ask(server, "/readyz"), 503, "stalled")
    assert ask(server, "/metrics")[0] == 200


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/metrics/", "/Metrics", "/../etc/passwd", "/%2e%2e/", "*"])
def test_an_unknown_path_is_refused_and_the_known_ones_named(server, path):
    answer = ask(server, path)
    assert_refused(answer, 404, "not-found")
    assert "/metrics, /livez, /readyz" in json.loads(answer[2])["fix"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "get", "NONSENSE"])
def test_another_method_is_refused_with_those_allowed(server, method):
    answer = ask(server, "/metrics", method)
    assert_refused(answer, 405, "method-not-allowed")
    assert answer[1]["Allow"] == "GET, HEAD"


def test_a_body_is_dropped_and_the_refusal_still_arrives(server):
    assert_refused(ask(server, "/metrics", "POST", body=bytes(32 * 1024)), 405, "method-not-allowed")


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"\0\xff\xfe\r\n\r\n",
        b"HELLO\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET /metrics HTTP/x\r\n\r\n",
        b"GET  /metrics  more words HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nno colon\r\n: \r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + b"a: b\r\n" * 500 + b"\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\n\n",
        b"GET http://elsewhere/metrics HTTP/1.1\r\n\r\n",
    ],
    ids=range(10),
)
def test_garbage_is_refused_or_cut_off_and_the_next_client_is_served(server, data):
    answer = raw(server, data)
    assert b"Traceback" not in answer
    assert b"200 OK" not in answer.partition(b"\r\n")[0] or b"no colon" in data
    assert_serves(server)


def test_a_malformed_request_is_told_so_in_json(server):
    head, _, body = raw(server, b"GET /livez HTTP/x\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 400 ")
    assert json.loads(body)["code"] == "bad-request"


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_a_request_that_is_too_large_is_refused_before_it_has_ended(server, end):
    head, _, body = raw(server, b"GET /" + b"x" * MAX_REQUEST_BYTES + end).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 431 ")
    assert json.loads(body)["code"] == "bad-request"
    assert_serves(server)


# --- clients that are slow, many or gone --------------------------------------------------------------


def test_a_client_that_sends_byte_by_byte_is_cut_off_at_the_deadline(hasty):
    began = time.monotonic()
    with connect(hasty) as slow:
        slow.settimeout(0.02)
        ended = False
        while not ended:
            assert time.monotonic() - began < PATIENCE_S
            try:
                slow.sendall(b"x")
                ended = slow.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                ended = True
    assert time.monotonic() - began >= 1.0
    assert_serves(hasty)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /me", GET, b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n"]
)
def test_a_client_that_falls_silent_is_cut_off(hasty, sent):
    with connect(hasty) as silent:
        silent.sendall(sent)
        to_the_end(silent)
    assert_serves(hasty)


def test_two_hundred_idle_connections_cost_sixteen_threads_and_pass(hasty):
    before = threading.active_count()
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(hasty)) for _ in range(200)]
        assert threading.active_count() <= before + MAX_CONNECTIONS
        assert all(to_the_end(connection) == b"" for connection in idle)
    assert_serves(hasty)


def test_one_connection_too_many_is_closed_and_the_place_of_one_that_left_is_free(server):
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(server)) for _ in range(MAX_CONNECTIONS)]
        assert raw(server, b"") == b""
        idle[0].shutdown(socket.SHUT_WR)
        assert to_the_end(idle[0]) == b""
        assert_serves(server)


def test_a_client_that_breaks_off_is_no_event(server, caplog):
    caplog.set_level(logging.DEBUG)
    for sent in (b"", b"GET /met", GET):
        with connect(server) as connection:
            connection.sendall(sent)
            # Closing then sends a reset at once.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert_serves(server)
    assert caplog.records == []


def test_scrapes_are_not_logged(server, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    for path in (*PATHS, "/other"):
        ask(server, path)
    raw(server, b"garbage\r\n\r\n")
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


SHORT_OF_DESCRIPTORS = """
import logging, os, resource, sys, threading
from tta_runtime.health import HealthServer

class Alive:
    def alive(self):
        return True

logging.basicConfig(level="DEBUG")
server = HealthServer("127.0.0.1:0", Alive(), False, name="tta-edge")
server.start()
print(server.endpoint, flush=True)
sys.stdin.readline()
for thread in threading.enumerate():
    if thread.name == "tta-http-request":
        thread.join()
free = os.dup(0)
os.close(free)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
print("none left", flush=True)
sys.stdin.readline()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
sys.stdin.readline()
server.close()
"""


def test_without_descriptors_a_connection_waits_and_is_served_later():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", SHORT_OF_DESCRIPTORS]
    with subprocess.Popen(command, env=process_environment(), text=True, bufsize=1, **pipes) as process:
        patience = threading.Timer(PATIENCE_S, process.kill)  # then the lines waited for below end
        patience.start()
        server = SimpleNamespace(endpoint=process.stdout.readline().strip())
        assert_serves(server)
        process.stdin.write("take them\n")
        assert process.stdout.readline() == "none left\n"
        with connect(server) as client:
            client.sendall(GET)
            while "cannot accept" not in process.stderr.readline():
                assert process.poll() is None
            process.stdin.write("give them back\n")
            assert to_the_end(client).startswith(b"HTTP/1.0 200 ")
        _, log = process.communicate("end\n", timeout=PATIENCE_S)
        patience.cancel()
    assert process.returncode == 0
    assert log.count("cannot accept") < 10, "it does not spin"


# --- a daemon that is slow or defective ---------------------------------------------------------------


def test_scrapes_wait_for_each_other_for_a_time_and_liveness_does_not_wait(hasty, told):
    told.figures.clear()
    first = threading.Thread(target=raw, args=(hasty, b"GET /metrics HTTP/1.0\r\n\r\n"))
    first.start()
    assert told.asked.wait(PATIENCE_S)
    assert ask(hasty, "/livez")[0] == 200
    assert_refused(ask(hasty, "/metrics"), 503, "busy")
    told.figures.set()
    first.join(PATIENCE_S)
    assert ask(hasty, "/metrics")[0] == 200


def test_a_defect_is_answered_without_its_trace_and_logged_once(server, told, caplog):
    told.defect = RuntimeError("secret detail")
    for _ in range(3):
        answer = ask(server, "/metrics")
        assert_refused(answer, 500, "internal")
        assert b"secret" not in answer[2]
    assert_serves(server)
    assert len(caplog.records) == 1
    assert "secret detail" in caplog.text
    told.defect = None
    assert ask(server, "/metrics")[0] == 200
    told.defect = RuntimeError("again")
    ask(server, "/metrics")
    assert len(caplog.records) == 2


# --- a daemon that really runs ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


@pytest.fixture(params=["inline", "always"])
def daemon_under_load(bundle, request):
    """(server, client) of a daemon to which another client sends batches all the time, so that it steps."""
    with running(bundle, http="127.0.0.1:0", policy=request.param, step_batch=16, window=64) as daemon:
        ended = threading.Event()
        failures = []

        def send():
            with Client(daemon.endpoint, timeout_s=PATIENCE_S) as client:
                while not ended.is_set():
                    try:
                        client.predict(X, stream="camera-1")
                    except Exception as error:  # noqa: BLE001 - shown by the assertion below
                        failures.append(error)
                        return

        sender = threading.Thread(target=send)
        sender.start()
        with Client(daemon.endpoint, timeout_s=PATIENCE_S) as client:
            yield http_end(daemon), client
        ended.set()
        sender.join(PATIENCE_S)
        assert failures == []


def http_end(server):
    """The HTTP end of a daemon, as the helpers above want it."""
    return SimpleNamespace(endpoint=server.http_endpoint)


def scraped(server):
    """Sample name -> sum over its series."""
    totals = {}
    code, _, body = ask(server, "/metrics")
    assert code == 200
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0) + sample.value
    return totals


def test_scrapes_see_steps_go_on_and_counters_never_fall(daemon_under_load):
    server, _ = daemon_under_load
    before, began = scraped(server), time.monotonic()
    counters = [name for name in before if name.endswith(("_total", "_bucket", "_count"))]
    counters.remove("tta_inference_pending_request_count")
    goal = before["tta_steps_total"] + 20
    while before["tta_steps_total"] < goal:
        assert time.monotonic() - began < PATIENCE_S
        now = scraped(server)
        assert [name for name in counters if now[name] < before[name]] == []
        before = now
    assert before["tta_step_duration_seconds_count"] == before["tta_steps_total"]


def test_idle_http_clients_do_not_keep_the_daemon_from_answering(daemon_under_load):
    server, client = daemon_under_load
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(server))
        steps = client.predict(X).steps
        assert client.predict(X, adapt=False).steps >= steps
        assert client.status().requests.failed == 0


def test_liveness_and_readiness_of_a_real_daemon(bundle):
    with running(bundle, http="127.0.0.1:0") as daemon:
        server = http_end(daemon)
        assert ask(server, "/livez")[0] == ask(server, "/readyz")[0] == 200
    with pytest.raises(ConnectionError):
        connect(server)


def test_without_http_nothing_listens(bundle):
    with running(bundle, http="off") as daemon:
        assert daemon.http_endpoint == ""


def test_a_daemon_whose_http_port_is_taken_does_not_start_and_leaves_its_own_port_free(bundle, server):
    host, port = place(server)
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        bind = f"tcp://127.0.0.1:{chosen.getsockname()[1]}"
    with pytest.raises(AddressInUse, match="`http`"), running(bundle, bind=bind, http=f"{host}:{port}"):
        pass
    with running(bundle, bind=bind) as daemon:
        assert daemon.endpoint == bind


# --- where it listens ---------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_refused_with_what_to_do(told, server):
    host, port = place(server)
    with pytest.raises(AddressInUse) as refusal:
        HealthServer(f"{host}:{port}", told, allow_remote=False, name="tta-edge")
    assert "`http`" in refusal.value.cause
    assert str(port) in refusal.value.cause
    assert "--http off" in refusal.value.fix
    assert "127.0.0.1:0" in refusal.value.fix
    assert_serves(server)


@pytest.mark.parametrize(
    "address",
    ["", "off", "5556", "127.0.0.1", "127.0.0.1:-1", "127.0.0.1:99999", "http://127.0.0.1:80", "a b:1"],
)
def test_a_malformed_address_is_refused(told, address):
    with pytest.raises(BadEndpoint, match="`http`"):
        HealthServer(address, told, allow_remote=False, name="tta-edge")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "*:0", "[::]:0", "192.0.2.1:80", "example.org:80"])
def test_an_address_that_others_can_reach_has_to_be_asked_for(told, address):
    with pytest.raises(RemoteBindRefused, match="--allow-remote"):
        HealthServer(address, told, allow_remote=False, name="tta-edge")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "*:*"])
def test_an_address_that_others_can_reach_is_served_when_asked_for(told, address):
    server = HealthServer(address, told, allow_remote=True, name="tta-edge")
    server.start()
    try:
        assert_serves(server)
    finally:
        server.close()


def test_an_address_of_another_machine_cannot_be_bound(told):
    with pytest.raises(CannotBind, match="`http`"):
        HealthServer("192.0.2.1:80", told, allow_remote=True, name="tta-edge")


def test_it_listens_on_ipv6_too(told):
    try:
        server = HealthServer("[::1]:0", told, allow_remote=False, name="tta-edge")
    except CannotBind:
        pytest.skip("this machine has no IPv6")
    assert server.endpoint.startswith("http://[::1]:")
    server.start()
    assert_serves(server)
    server.close()


# --- its end ------------------------------------------------------------------------------------------


def test_closing_ends_open_connections_at_once_and_frees_the_port(told):
    threads = set(threading.enumerate())
    with serving(told) as server:
        with connect(server) as idle, connect(server) as half:
            half.sendall(b"GET /livez")
            assert_serves(server)
            server.close()
            assert to_the_end(idle) == to_the_end(half) == b""
        server.close()
    with pytest.raises(ConnectionError):
        connect(server)
    assert set(threading.enumerate()) <= threads
    with serving(told, "{}:{}".format(*place(server))) as again:
        assert_serves(again)


def test_a_server_that_was_never_started_can_be_closed(told):
    server = HealthServer("127.0.0.1:0", told, allow_remote=False, name="tta-edge")
    server.close()
    with pytest.raises(ConnectionError):
        connect(server)
