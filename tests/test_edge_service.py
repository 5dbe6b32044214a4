"""The daemon over real sockets: what works, and all that is refused. A refusal ends with: nothing changed."""

from __future__ import annotations

import hashlib
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_bundle
from running import running
from tta_edge import errors, wire
from tta_edge.client import Client
from tta_edge.session import ClientSession
from tta_runtime import Model
from tta_runtime import errors as runtime_errors
from tta_runtime import errors as wire_errors

X, Y = tiny_bundle.samples(16, seed=1, shift=0.5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


@pytest.fixture
def server(bundle):
    with running(bundle) as server:
        yield server


@pytest.fixture
def client(server):
    with Client(server.endpoint, timeout_s=20) as client:
        client.predict(X)  # one step, so that theta is not the source's
        yield client


def files(bundle):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.iterdir()}


@contextmanager
def nothing_changes(client, bundle):
    """After the block: every stream as it was, every file as it was, and the next request is answered."""

    def snapshot():
        streams = client.status().streams
        return sorted((s.id, s.theta_digest, s.steps) for s in streams), files(bundle)

    before = snapshot()
    yield
    assert snapshot() == before
    assert client.predict(X, adapt=False).logits.shape == (16, 3)
    assert snapshot() == before


class Raw:
    """A DEALER that says exactly what it is told."""

    def __init__(self, endpoint):
        self.session = ClientSession()
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def ask(self, *frames):
        self.socket.send_multipart(frames)
        assert self.socket.poll(20_000), "no reply"
        return wire.decode_reply(self.socket.recv_multipart()).message


# --- what works ----------------------------------------------------------------------------------


def test_requests_give_exactly_what_the_model_gives(bundle, server):
    model = Model.open(bundle, method="tent")
    with Client(server.endpoint) as client:
        for seed in range(5):
            x, _ = tiny_bundle.samples(16, seed=seed, shift=1.0)
            source = model.predict(x, source=True).logits
            step = model.adapt(x)
            reply = client.predict(x, compare=True)
            np.testing.assert_array_equal(reply.logits, step.logits)
            np.testing.assert_array_equal(reply.source_logits, source)
            assert (reply.adapted, reply.reason, reply.steps) == (True, "", seed + 1)
            assert reply.theta_digest == model.digest
            assert reply.distance == model.distance
            assert reply.report == pytest.approx(dict(step.report))
            assert reply.entropy.shape == reply.source_entropy.shape == (16,)
            assert 0 < reply.compute_ms <= reply.latency_ms


def test_without_adapt_and_compare_theta_stays_and_one_answer_comes(bundle, client):
    with nothing_changes(client, bundle):
        reply = client.predict(X, adapt=False)
        assert (reply.adapted, reply.report) == (False, {})
        assert reply.source_logits is None
        assert reply.source_entropy is None


def test_info_says_what_to_send(client):
    info = client.info()
    assert (info.model_id, info.method, info.classes) == ("tiny", "tent", 3)
    assert info.methods == ["source", "teacher", "tent"]
    assert (info.input.dtype, info.input.shape, info.input.low, info.input.high) == (
        "float32",
        ["batch", 8],
        0,
        1,
    )
    assert info.class_names == ["a", "b", "c"]
    assert info.limits.min_batch == 2
    assert info.hyper["lr"] == 0.05
    assert len(info.bundle_digest) == 64


def test_streams_adapt_apart_and_reset_returns_one_to_the_source(bundle, client):
    first = client.predict(X, stream="camera-1")
    assert first.steps == 1
    for _ in range(3):
        client.predict(X, stream="camera-2")
    assert client.predict(X, stream="camera-1", adapt=False).theta_digest == first.theta_digest
    source = Model.open(bundle).digest
    assert client.reset("camera-2").theta_digest == source
    by_id = {s.id: s for s in client.status().streams}
    assert (by_id["camera-2"].steps, by_id["camera-2"].last_event) == (0, "reset: requested")
    assert (by_id["camera-1"].steps, by_id["camera-1"].theta_digest) == (1, first.theta_digest)


def test_status_counts(client):
    with pytest.raises(runtime_errors.WrongShape):
        client.predict(np.zeros((2, 9), np.float32))
    status = client.status()
    assert (status.requests.failed, status.requests.failures) == (1, {"wrong-shape": 1})
    assert status.requests.ok == 2  # info for the limits, predict
    assert status.latency_ms["p50"] <= status.latency_ms["p99"]
    assert [(b.name, b.model_id, b.method, b.loads) for b in status.bundles] == [
        ("default", "tiny", "tent", 1)
    ]
    (stream,) = status.streams
    assert (stream.id, stream.method, stream.steps, stream.state) == ("default", "tent", 1, "adapting")
    assert stream.entropy > 0


def test_a_method_without_a_step_only_serves(bundle):
    with running(bundle, method="source") as server, Client(server.endpoint) as client:
        reply = client.predict(X)
        assert (reply.adapted, reply.steps, reply.distance) == (False, 0, 0.0)
        assert client.status().streams[0].state == "source"


def test_a_batch_below_the_methods_minimum_is_answered_and_not_adapted_on(bundle):
    with running(bundle, inline_min_batch=1) as server, Client(server.endpoint) as client:
        client.predict(X)
        with nothing_changes(client, bundle):
            reply = client.predict(X[:1])
            assert (reply.adapted, reply.reason, reply.collected) == (False, "", True)
            assert reply.logits.shape == (1, 3)


def test_a_small_batch_is_answered_and_collected(bundle, client):
    with nothing_changes(client, bundle):
        reply = client.predict(X[:4])
        assert (reply.adapted, reply.reason, reply.collected) == (False, "", True)
        assert client.status().streams[0].window == 4


def test_hyper_parameters_reach_the_method(bundle):
    with (
        running(bundle, hyper={"lr": 0.0, "tent": {"alpha": 0.0}}) as server,
        Client(server.endpoint) as client,
    ):
        assert client.info().hyper == {"lr": 0.0, "momentum": 0.9, "alpha": 0.0}
        assert client.predict(X).distance == 0.0


def test_images_as_uint8(tmp_path):
    tiny_bundle.build(tmp_path / "u8", dtype="uint8")
    with running(tmp_path / "u8") as server, Client(server.endpoint) as client:
        assert client.predict(np.full((16, 8), 200, np.uint8)).adapted


def test_large_batches_pass_whole(bundle):
    x, _ = tiny_bundle.samples(20_000, shift=1.0)
    with running(bundle, max_batch=20_000) as server, Client(server.endpoint) as client:
        expected = Model.open(bundle).predict(x[-1000:]).logits
        np.testing.assert_allclose(client.predict(x, adapt=False).logits[-1000:], expected, rtol=1e-5)


# --- what is refused: the batch ------------------------------------------------------------------

BAD_BATCHES = [
    ("wrong shape", np.zeros((4, 9), np.float32), runtime_errors.WrongShape),
    ("no batch dimension", np.zeros(8, np.float32), runtime_errors.WrongShape),
    ("wrong dtype", np.zeros((4, 8), np.float64), runtime_errors.WrongDtype),
    ("integers", np.zeros((4, 8), np.int64), runtime_errors.WrongDtype),
    (
        "NaN",
        np.where(np.arange(32).reshape(4, 8) == 9, np.nan, 0).astype(np.float32),
        runtime_errors.NonFinite,
    ),
    ("finite and yet too large", np.full((4, 8), 3e38, np.float32), runtime_errors.NonFinite),
    ("Inf", np.full((4, 8), np.inf, np.float32), runtime_errors.NonFinite),
    ("empty batch", np.zeros((0, 8), np.float32), runtime_errors.EmptyBatch),
    ("too many samples", np.zeros((1025, 8), np.float32), runtime_errors.TooLarge),
    ("objects", np.array([[object()]]), wire_errors.BadField),
    ("text", np.array([["a"]]), wire_errors.BadField),
]


@pytest.mark.parametrize(
    ("x", "expected"), [row[1:] for row in BAD_BATCHES], ids=[row[0] for row in BAD_BATCHES]
)
def test_a_bad_batch_is_refused_by_name(bundle, client, x, expected):
    with nothing_changes(client, bundle):
        for stream in ("default", "never-seen"):
            with pytest.raises(expected) as caught:
                client.predict(x, stream=stream)
            assert caught.value.cause
            assert caught.value.fix


def test_ten_times_the_size_limit_is_refused_by_the_client_before_sending(bundle):
    with running(bundle, max_request_bytes=4096) as server, Client(server.endpoint) as client:
        with nothing_changes(client, bundle), pytest.raises(runtime_errors.TooLarge, match="40960 bytes"):
            client.predict(np.zeros((1280, 8), np.float32))
        assert server.stats.figures().refused == {}


def test_ten_times_the_size_limit_on_the_wire_closes_that_connection_only(bundle):
    x = np.zeros((1280, 8), np.float32)
    with running(bundle, max_request_bytes=4096) as server, Client(server.endpoint) as client:
        client.predict(X)
        with nothing_changes(client, bundle), Raw(server.endpoint) as raw:
            monitor = raw.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            raw.ask(*wire.encode(wire.Info(id=1)))
            raw.socket.send_multipart(wire.encode(wire.Predict(id=2, x=wire.declare(x)), {"x": x}))
            assert monitor.poll(20_000), "the connection stays open"
            assert not raw.socket.poll(0)
            raw.socket.disable_monitor()
            monitor.close()


def test_a_size_limit_reached_by_several_frames_is_answered(bundle):
    with running(bundle, max_request_bytes=4096) as server, Client(server.endpoint) as client:
        client.predict(X)
        with nothing_changes(client, bundle), Raw(server.endpoint) as raw:
            reply = raw.ask(wire.PROTOCOL, b"", *[b"\0" * 2048] * 3)
            assert reply.code == "message-too-large"


# --- what is refused: the message ----------------------------------------------------------------

BAD_MESSAGES = [
    ("garbage", [b"\xff" * 100], "bad-framing"),
    ("one empty frame", [b""], "bad-framing"),
    ("HTTP", [b"GET / HTTP/1.1", b"Host: x"], "unsupported-protocol"),
    ("a later protocol", [b"TTA2", msgpack.packb({"type": "info", "id": 1})], "unsupported-protocol"),
    ("garbage header", [wire.PROTOCOL, b"\xc1\xff"], "malformed-header"),
    ("unknown message", [wire.PROTOCOL, msgpack.packb({"type": "shutdown", "id": 1})], "unknown-message"),
    (
        "unknown field",
        [wire.PROTOCOL, msgpack.packb({"type": "info", "id": 1, "verbose": True})],
        "unknown-field",
    ),
    ("wrong type", [wire.PROTOCOL, msgpack.packb({"type": "info", "id": "1"})], "bad-field"),
    ("tensor missing", wire.encode(wire.Predict(id=1, x=wire.declare(X)), {"x": X})[:-1], "tensor-mismatch"),
]


@pytest.mark.parametrize(
    ("frames", "code"), [row[1:] for row in BAD_MESSAGES], ids=[row[0] for row in BAD_MESSAGES]
)
def test_a_bad_message_is_answered_by_name(bundle, client, server, frames, code):
    with nothing_changes(client, bundle), Raw(server.endpoint) as raw:
        reply = raw.ask(*frames)
        assert isinstance(reply, wire.ErrorReply)
        assert reply.code == code
        assert reply.cause
        assert reply.fix
        assert isinstance(raw.ask(*wire.encode(wire.Info(id=3))), wire.InfoReply)


def test_bytes_that_are_not_zeromq_do_not_matter(bundle, client, server):
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    with nothing_changes(client, bundle):
        for data in (
            b"",
            b"\0" * 10_000,
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff" + b"\0" * 8 + b"\x7f" + b"A" * 70_000,
        ):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(data)


def test_an_answer_that_cannot_be_encoded_is_an_internal_error_and_the_daemon_goes_on(bundle, caplog):
    """What no number type of the wire holds, put where the answering thread puts its answers."""
    with running(bundle) as server, Raw(server.endpoint) as raw, Client(server.endpoint) as client:
        respond = server._responder.respond

        def broken(group):
            (arrived,) = group
            if isinstance(arrived.message, wire.Events):
                server._emit(arrived, wire.Generated(id=1, start=1 << 64, tokens=1, text=""), {})
                server._emit(
                    arrived,
                    wire.RollbackDone(id=1, stream="", theta_digest="", steps=1 << 64, to="source"),
                    {},
                )
            else:
                respond(group)

        server._responder.respond = broken
        error = raw.ask(*wire.encode(wire.Events(id=1)))
        assert (error.id, error.code) == (1, "internal")
        status = client.status()
        assert (status.requests.open, status.requests.failures) == (1, {"internal": 1})  # the status itself
        assert raw.ask(*wire.encode(wire.Info(id=1))).id == 1
    defects = [record for record in caplog.records if record.exc_info]
    assert ["generated" in record.getMessage() for record in defects] == [True, False]
    assert "rollback-done" in defects[1].getMessage()


def test_reset_of_a_stream_that_does_not_exist(bundle, client):
    with nothing_changes(client, bundle), pytest.raises(errors.UnknownStream, match="did you mean `default`"):
        client.reset("defualt")


def test_one_stream_too_many(bundle):
    with running(bundle, max_streams=2) as server, Client(server.endpoint) as client:
        client.predict(X, stream="a")
        with nothing_changes(client, bundle), pytest.raises(errors.TooManyStreams):
            client.predict(X, stream="b")


# --- clients that vanish, and load ---------------------------------------------------------------


def test_a_client_that_vanishes_before_its_answer_does_not_matter(bundle, client, server):
    before = client.status().streams[0].steps
    for _ in range(20):
        with Raw(server.endpoint) as raw:
            raw.ask(*wire.encode(wire.Info(id=1)))
            raw.socket.send_multipart(wire.encode(wire.Predict(id=2, x=wire.declare(X)), {"x": X}))
            raw.socket.close(linger=1000)
    reply = client.predict(X)
    assert reply.adapted
    assert reply.steps > before


def test_clients_that_vanish_with_full_queues_do_not_overfill_the_next_ones(bundle):
    x, _ = tiny_bundle.samples(5000)
    with running(bundle, max_batch=5000, max_queue=2) as server:
        for _ in range(15):
            with Raw(server.endpoint) as raw:
                raw.ask(*wire.encode(wire.Info(id=1000)))
                for number in range(6):
                    message = wire.Predict(id=number, x=wire.declare(x))
                    raw.socket.send_multipart(wire.encode(message, {"x": x}))
                raw.socket.poll(20_000)
        with Client(server.endpoint, timeout_s=30) as client:
            while True:
                try:
                    assert client.predict(X).adapted
                except errors.Busy:
                    continue
                break


def test_a_full_queue_answers_busy_with_a_time_and_later_serves_again(bundle):
    x, _ = tiny_bundle.samples(20_000)
    with running(bundle, max_batch=20_000, max_queue=1) as server, Raw(server.endpoint) as raw:
        for number in range(50):
            raw.socket.send_multipart(wire.encode(wire.Predict(id=number, x=wire.declare(x)), {"x": x}))
        replies = []
        while len(replies) < 50:
            assert raw.socket.poll(20_000)
            replies.append(wire.decode_reply(raw.socket.recv_multipart()).message)
        busy = [reply for reply in replies if isinstance(reply, wire.ErrorReply)]
        served = [reply for reply in replies if isinstance(reply, wire.Prediction)]
        assert {reply.code for reply in busy} == {"busy"}
        assert all(reply.retry_after_s > 0 for reply in busy)
        assert served
        assert {reply.id for reply in replies} == set(range(50))
        with Client(server.endpoint) as client:
            assert client.predict(X).steps == len(served) + 1


def test_a_client_that_never_reads_its_replies_does_not_hold_up_the_others(bundle):
    x, _ = tiny_bundle.samples(1000)
    with (
        running(bundle, max_queue=1000) as server,
        Raw(server.endpoint) as raw,
        Client(server.endpoint, timeout_s=20) as client,
    ):
        raw.socket.rcvhwm = 1
        for number in range(500):
            message = wire.Predict(id=number, stream="greedy", x=wire.declare(x))
            raw.socket.send_multipart(wire.encode(message, {"x": x}))
            if not raw.socket.poll(1, zmq.POLLOUT):
                break
        for attempt in range(20):
            assert client.predict(X).steps == attempt + 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.just(wire.PROTOCOL) | st.binary(max_size=60), min_size=1, max_size=8))
def test_any_frames_are_answered_with_a_typed_error(server, frames):
    with Raw(server.endpoint) as raw:
        assert isinstance(raw.ask(*frames), wire.ErrorReply)
        assert isinstance(raw.ask(*wire.encode(wire.Info(id=3))), wire.InfoReply)


def test_many_clients_at_once_each_get_their_own_answer(bundle, server):
    expected = Model.open(bundle)
    failures = []

    def work(number):
        x, _ = tiny_bundle.samples(16, seed=number)
        want = expected.predict(x, source=True).logits
        with Client(server.endpoint, timeout_s=30) as client:
            for _ in range(10):
                reply = client.predict(x, stream=f"s{number}", compare=True)
                if not np.array_equal(reply.source_logits, want):
                    failures.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    with Client(server.endpoint) as client:
        assert {s.id: s.steps for s in client.status().streams} == {
            "default": 0,
            **{f"s{n}": 10 for n in range(8)},
        }


# --- starting and stopping -----------------------------------------------------------------------


def test_stop_drains_what_is_open(bundle):
    x, _ = tiny_bundle.samples(20_000)
    with running(bundle, max_batch=20_000) as server, Raw(server.endpoint) as raw:
        raw.ask(*wire.encode(wire.Info(id=99)))
        for number in range(4):
            raw.socket.send_multipart(wire.encode(wire.Predict(id=number, x=wire.declare(x)), {"x": x}))
        # The reply to the first shows that the daemon has read from this connection; then it is told to stop.
        assert raw.socket.poll(20_000)
        server.stop()
        replies = []
        while len(replies) < 4 and raw.socket.poll(20_000):
            replies.append(wire.decode_reply(raw.socket.recv_multipart()).message)
        assert isinstance(replies[0], wire.Prediction)
        assert all(isinstance(r, wire.Prediction) or r.code == "draining" for r in replies)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_starting_and_stopping_leaves_no_open_file_or_thread_behind(bundle):
    def once():
        with running(bundle) as server, Client(server.endpoint) as client:
            client.predict(X)
        with pytest.raises(runtime_errors.UnknownMethod), running(bundle, method="nothing"):
            pass

    once()
    before = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    for _ in range(10):
        once()
    after = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    assert after[0] <= before[0] + 2  # a closed client socket may linger for a moment in the library
    assert after[1] <= before[1]


def test_a_port_in_use_is_named(bundle, server):
    with pytest.raises(errors.AddressInUse, match=server.endpoint), running(bundle, bind=server.endpoint):
        pass
    with Client(server.endpoint) as client:
        assert client.predict(X).adapted


@pytest.mark.parametrize(
    "bind", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://192.0.2.1:0", "tcp://eth0:0"]
)
def test_a_bind_that_others_can_reach_needs_a_flag(bundle, bind):
    with pytest.raises(errors.RemoteBindRefused, match="allow-remote"), running(bundle, bind=bind):
        pass


def test_with_the_flag_it_binds_everywhere(bundle):
    with running(bundle, bind="tcp://0.0.0.0:0", allow_remote=True) as server:
        port = server.endpoint.rpartition(":")[2]
        with Client(f"tcp://127.0.0.1:{port}") as client:
            assert client.info().model_id == "tiny"


def test_an_address_of_another_machine_cannot_be_bound(bundle):
    with (
        pytest.raises(errors.CannotBind, match=r"192\.0\.2\.1"),
        running(bundle, bind="tcp://192.0.2.1:0", allow_remote=True),
    ):
        pass


@pytest.mark.parametrize(
    "bind", ["127.0.0.1:5555", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "ipc:///x", "tcp://:1", ""]
)
def test_a_malformed_endpoint_is_named(bundle, bind):
    with pytest.raises(errors.BadEndpoint), running(bundle, bind=bind):
        pass
    with pytest.raises(errors.BadEndpoint):
        Client(bind)


def test_an_unknown_method_is_named_with_a_suggestion(bundle):
    with (
        pytest.raises(runtime_errors.UnknownMethod, match="did you mean `tent`"),
        running(bundle, method="tnet"),
    ):
        pass


@pytest.mark.parametrize(
    ("hyper", "expected"),
    [
        ({"learning_rate": 0.1}, runtime_errors.UnknownHyper),
        ({"tent": {"rl": 0.1}}, runtime_errors.UnknownHyper),
        ({"tnet": {"lr": 0.1}}, runtime_errors.UnknownMethod),
        ({"lr": -1.0}, runtime_errors.BadValue),
    ],
)
def test_wrong_hyper_parameters_stop_the_daemon_and_not_its_first_client(bundle, hyper, expected):
    with pytest.raises(expected), running(bundle, hyper=hyper):
        pass


def damage_truncate(bundle):
    file = bundle / "weights.bin"
    file.write_bytes(file.read_bytes()[:-1])


def damage_tamper(bundle):
    file = bundle / "step.tent.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def damage_version(bundle):
    file = bundle / "manifest.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))


def damage_missing(bundle):
    (bundle / "forward.onnx").unlink()


def damage_theta(bundle):
    file = bundle / "theta.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def damage_manifest(bundle):
    (bundle / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_truncate, runtime_errors.FileTruncated),
        (damage_tamper, runtime_errors.FileTampered),
        (damage_version, runtime_errors.NewerFormat),
        (damage_missing, runtime_errors.FileMissing),
        (damage_theta, runtime_errors.FileTampered),
        (damage_manifest, runtime_errors.ManifestMalformed),
    ],
)
def test_a_damaged_bundle_is_refused_at_the_start_and_left_as_it_is(tmp_path, damage, expected):
    bundle = tmp_path / "tiny"
    tiny_bundle.build(bundle)
    damage(bundle)
    before = files(bundle)
    with pytest.raises(expected), running(bundle):
        pass
    assert files(bundle) == before


def test_a_bundle_damaged_while_it_is_served_keeps_being_served(tmp_path):
    bundle = tmp_path / "tiny"
    tiny_bundle.build(bundle)
    with running(bundle) as server, Client(server.endpoint) as client:
        damage_manifest(bundle)
        damage_tamper(bundle)
        assert client.predict(X).adapted
