"""What goes wrong around a daemon: each fault ends with the next request answered and theta as it was."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import msgpack
import msgspec
import numpy as np
import pytest
import zmq

import tiny_bundle
from running import PATIENCE_S, REPOSITORY, daemon, process_environment, running
from serving import Pipe, steps, stream, until
from tta_edge import errors, wire
from tta_edge.client import Client
from tta_edge.config import Config
from tta_edge.service import Server
from tta_runtime import EngineOptions, Model
from tta_runtime.errors import TtaError

X, _ = tiny_bundle.samples(16, seed=1, shift=0.5)
MB = 1_000_000
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


class Process:
    """A daemon in a process of its own, with a client that has adapted it once.

    Attributes:
        pid: of the process.
        endpoint: where it listens.
        client: connected.
    """

    def __init__(self, running, client):
        self.running, self.client = running, client
        self.pid, self.endpoint = running.process.pid, running.endpoint

    def rss(self):
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))

    def peak(self):
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def address(self):
        host, port = self.endpoint.removeprefix("tcp://").rsplit(":", 1)
        return host, int(port)


@contextmanager
def process(bundle, *arguments):
    with (
        daemon(bundle, "--method", "tent", "--threads", "1", *arguments) as running,
        Client(running.endpoint, timeout_s=PATIENCE_S) as client,
    ):
        client.predict(X)
        yield Process(running, client)


@contextmanager
def unharmed(client):
    """After the block theta is as it was and the next request is answered as before."""
    before = client.predict(X, adapt=False)
    yield
    after = client.predict(X, adapt=False)
    np.testing.assert_array_equal(after.logits, before.logits)
    assert (after.theta_digest, after.steps) == (before.theta_digest, before.steps)


@contextmanager
def descriptors(count):
    """This process, and those it starts, may have so many open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"no more than {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- connections ----------------------------------------------------------------------------------


@needs_proc
def test_a_thousand_connections_that_say_nothing_do_not_matter(bundle):
    with descriptors(4096), process(bundle) as daemon, unharmed(daemon.client):
        idle = []
        context = zmq.Context()
        context.set(zmq.MAX_SOCKETS, 2048)
        try:
            for _ in range(500):
                idle.append(socket.create_connection(daemon.address(), timeout=20))
                speaker = context.socket(zmq.DEALER)  # one that shakes hands, then falls silent
                speaker.linger = 0
                speaker.connect(daemon.endpoint)
                idle.append(speaker)
            until(lambda: (daemon.client.info(), daemon.descriptors())[1], lambda count: count > 1000)
            for _ in range(20):
                with Client(daemon.endpoint, timeout_s=PATIENCE_S) as client:
                    assert client.predict(X, adapt=False).logits.shape == (16, 3)
        finally:
            for each in idle:
                each.close()
            context.term()
        until(lambda: (daemon.client.info(), daemon.descriptors())[1], lambda count: count < 100)


@needs_proc
def test_connections_beyond_the_limit_of_descriptors_wait_and_nobody_else_does(bundle):
    with process(bundle) as daemon, unharmed(daemon.client):
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (100, 100))
        idle = [socket.create_connection(daemon.address(), timeout=20) for _ in range(150)]
        until(lambda: (daemon.client.info(), daemon.descriptors())[1], lambda count: count >= 100)
        for _ in range(20):
            daemon.client.predict(X, adapt=False)
        for each in idle:
            each.close()
        with Client(daemon.endpoint, timeout_s=PATIENCE_S) as late:
            assert late.predict(X, adapt=False).logits.shape == (16, 3)


@needs_proc
def test_a_daemon_takes_as_many_descriptors_as_it_may_have(bundle):
    """A shell's usual limit is 1024, which a thousand connections reach."""
    with descriptors(256), process(bundle) as daemon:
        soft, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        assert soft == min(hard, 65_536) > 256


@needs_proc
def test_a_reader_that_does_not_read_costs_a_bounded_amount_of_memory(bundle):
    x = np.zeros((4096, 8), np.float32)
    with (
        process(bundle, "--max-batch", "4096") as daemon,
        unharmed(daemon.client),
        Pipe(daemon.endpoint) as greedy,
    ):
        before = daemon.rss()
        greedy.socket.rcvhwm = 1
        sent = 0
        while sent < 3000 and greedy.socket.poll(200, zmq.POLLOUT):
            greedy.send(sent, x, adapt=False)
            sent += 1
        assert daemon.client.predict(X, adapt=False).steps == 1
        assert daemon.rss() - before < 64 * MB


# --- size -----------------------------------------------------------------------------------------


@needs_proc
def test_a_hundred_megabytes_in_one_frame_are_refused_before_they_are_held(bundle):
    with process(bundle) as daemon, unharmed(daemon.client):
        before = daemon.peak()
        with Pipe(daemon.endpoint) as huge:
            monitor = huge.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            huge.socket.send_multipart(wire.encode(wire.Info(id=1)))
            assert huge.socket.poll(PATIENCE_S * 1e3)
            huge.send(2, np.zeros((100 * MB // 32, 8), np.float32))
            assert monitor.poll(PATIENCE_S * 1e3), "the connection stays open"
            huge.socket.disable_monitor()
            monitor.close()
        daemon.client.info()
        assert daemon.peak() - before < 32 * MB


@needs_proc
def test_shapes_beyond_what_is_sent_allocate_nothing(bundle):
    shapes = [(2**31 - 1,) * 8, (2**31 - 1, 8), (2**20, 2**20), (0, 2**31 - 1, 2**31 - 1, 2**31 - 1), (17, 8)]
    with process(bundle) as daemon, unharmed(daemon.client), Pipe(daemon.endpoint) as liar:
        before = daemon.peak()
        for number, shape in enumerate(shapes):
            frames = wire.encode(wire.Predict(id=number, x=wire.declare(X)), {"x": X})
            message = wire.Predict(id=number, x=wire.TensorInfo(dtype="float32", shape=shape))
            liar.socket.send_multipart([frames[0], msgpack.packb(msgspec.to_builtins(message)), frames[2]])
        replies = liar.replies(len(shapes))
        assert {each.message.code for each in replies.values()} == {"tensor-mismatch"}
        assert daemon.peak() - before < 8 * MB


@needs_proc
def test_a_request_over_the_size_limit_in_several_frames_is_refused(bundle):
    with (
        process(bundle, "--max-request-bytes", str(MB)) as daemon,
        unharmed(daemon.client),
        Pipe(daemon.endpoint) as huge,
    ):
        part = np.zeros(900_000, np.uint8)
        huge.socket.send_multipart([wire.PROTOCOL, b"", part, part])
        assert huge.socket.poll(PATIENCE_S * 1e3)
        assert wire.decode_reply(huge.socket.recv_multipart()).message.code == "message-too-large"


@needs_proc
def test_what_waits_is_bounded_in_bytes_over_all_clients(bundle):
    """Ten clients with requests of 8 MB each: one is served, and as many wait as the setting says."""
    x = np.zeros((250_000, 8), np.float32)
    arguments = ("--max-batch", "250000", "--max-queue-bytes", str(20 * MB))
    with process(bundle, *arguments) as daemon, unharmed(daemon.client):
        pipes = [Pipe(daemon.endpoint) for _ in range(10)]
        for pipe in pipes:
            pipe.send(1, x, adapt=False)
        messages = [pipe.replies(1)[1].message for pipe in pipes]
        served = [each for each in messages if isinstance(each, wire.Prediction)]
        assert served
        assert {each.code for each in messages if each not in served} <= {"busy"}
        for pipe in pipes:
            pipe.socket.close()


# --- time -----------------------------------------------------------------------------------------


class Clock:
    """Seconds that a test may move."""

    def __init__(self):
        self.offset_s = 0.0

    def __call__(self):
        return time.monotonic() + self.offset_s


@pytest.mark.parametrize("policy", ["inline", "always", "budget"])
def test_a_clock_that_jumps_changes_no_answer_and_blocks_nothing(bundle, policy):
    clock = Clock()
    config = Config(
        bundle=str(bundle), bind="tcp://127.0.0.1:0", http="off", threads=1, policy=policy, step_batch=16,
        batch_wait_ms=1.0, inline_min_batch=16,
    )  # fmt: skip
    server = Server(config, clock=clock)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert server.ready.wait(PATIENCE_S)
    model = Model.open(bundle, options=EngineOptions(threads=1))
    with Client(server.endpoint, timeout_s=PATIENCE_S) as client:
        for turn, jump_s in enumerate([0.0, 3600.0, -7200.0, 86_400.0, -1e6], 1):
            clock.offset_s += jump_s
            client.predict(X)
            model.adapt(X)
            if policy != "budget":  # which may have to save up again
                assert steps(client, turn).theta_digest == model.digest
            assert server.alive()
        assert client.predict(X, adapt=False).logits.shape == (16, 3)
        status = client.status()
        assert (status.requests.failed, stream(client).steps >= 1) == (0, True)
    server.stop()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def freeze(daemon, seconds):
    """Stop a daemon's process for so long at least, until a client notices; what the client is told."""
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        with pytest.raises((errors.ConnectionLost, errors.DeadlineExceeded)) as caught:
            daemon.client.predict(X, adapt=False, timeout_s=60.0)
        left_s = seconds - (time.monotonic() - began_s)
        if left_s > 0:
            threading.Event().wait(left_s)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    return caught.value


def settled(client):
    """An answer behind the steps that the first request has asked for, which run in the background."""
    while (now := client.predict(X, adapt=False)).steps < len(X) // 16:
        pass
    return now


def frozen(bundle, seconds):
    with process(bundle, "--policy", "always", "--step-batch", "16") as daemon:
        before = settled(daemon.client)
        error = freeze(daemon, seconds)
        assert isinstance(error, errors.ConnectionLost)
        after = daemon.client.predict(X, adapt=False)
        assert after.theta_digest == before.theta_digest
        with Client(daemon.endpoint, timeout_s=PATIENCE_S) as other:
            assert other.predict(X, adapt=False).theta_digest == before.theta_digest
        assert daemon.running.stop() == 0


def test_a_daemon_that_stands_still_is_noticed_and_found_again(bundle):
    """As long as a client takes to notice: three heartbeats."""
    frozen(bundle, 0.0)


@pytest.mark.slow
def test_a_daemon_that_stands_still_for_half_a_minute(bundle):
    frozen(bundle, 30.0)


def test_a_main_loop_that_hangs_is_not_alive_and_one_that_turns_is(bundle):
    clock = Clock()
    with running(bundle) as server:
        server._clock = clock
        assert server.alive()
        clock.offset_s += 3600.0  # nothing has turned for an hour, as after a SIGSTOP of the process
        turned = until(lambda: (time.sleep(0), server.alive())[1])  # and the next turn shows that it lives
        assert turned


# --- signals --------------------------------------------------------------------------------------

LIVES = """
import signal, sys
from tta_edge import service
from tta_edge.config import Config

service.TICK_S = 3600.0  # a signal that is slept through is slept through for an hour
for number in range(int(sys.argv[2])):
    config = Config(bundle=sys.argv[1], bind="tcp://127.0.0.1:0", http="off", threads=1)
    server = service.Server(config, on_ready=lambda endpoint: print("ready", endpoint, flush=True))
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    signal.set_wakeup_fd(server.wake_fd, warn_on_full_buffer=False)
    server.run()
    signal.set_wakeup_fd(-1)
    print("ended", number, flush=True)
"""


def test_sigterm_under_load_ends_the_daemon_every_time_and_answers_what_is_open(bundle):
    """Thirty lives: in each, clients send without a pause and the signal comes at another moment."""
    lives, wrong, hammers = 30, [], []
    child = subprocess.Popen(
        [sys.executable, "-c", LIVES, str(bundle), str(lives)],
        stdout=subprocess.PIPE, bufsize=0, env=process_environment(), cwd=REPOSITORY,
    )  # fmt: skip

    def line():
        # Without a buffer: of two lines that come together `select` would not see the second one behind it.
        assert select.select([child.stdout], [], [], PATIENCE_S)[0], "the signal was slept through"
        return child.stdout.readline().decode().split()

    def hammer(endpoint, first):
        with Client(endpoint, timeout_s=3.0) as client:
            while True:
                try:
                    client.predict(X)
                    first.set()
                except (errors.Draining, errors.ConnectionLost, errors.Unreachable):
                    return
                except TtaError as error:
                    wrong.append(repr(error))
                    return

    try:
        for number in range(lives):
            word, endpoint = line()
            assert word == "ready"
            firsts = [threading.Event() for _ in range(3)]
            threads = [
                threading.Thread(target=hammer, args=(endpoint, first), daemon=True) for first in firsts
            ]
            for thread in threads:
                thread.start()
            if number % 3:  # at once in every third life: before anybody has connected
                assert all(first.wait(PATIENCE_S) for first in firsts[: number % 3])
            child.send_signal(signal.SIGTERM)
            assert line() == ["ended", str(number)]
            hammers += threads
        for thread in hammers:
            thread.join(PATIENCE_S)
        assert child.wait(PATIENCE_S) == 0
        assert wrong == []
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_byte_at_the_wake_descriptor_ends_the_wait(bundle):
    """What `signal.set_wakeup_fd` does for a signal that comes just before the wait begins."""
    with running(bundle) as server, Client(server.endpoint, timeout_s=PATIENCE_S) as client:
        client.predict(X)
        server._stops += 1  # as a handler that ran, without its wake-up
        os.write(server.wake_fd, b"\0")
        until(lambda: (server.ready.is_set(), time.sleep(0))[0], lambda ready: not ready)


def test_sigterm_to_the_command_under_load(bundle, tmp_path):
    with process(bundle, "--state-dir", str(tmp_path / "state")) as daemon:
        seen = {}
        ended = threading.Event()

        def hammer():
            with Client(daemon.endpoint, timeout_s=3.0) as client:
                try:
                    while True:
                        seen["steps"] = client.predict(X).steps
                except (errors.Draining, errors.ConnectionLost, errors.Unreachable):
                    ended.set()

        thread = threading.Thread(target=hammer, daemon=True)
        thread.start()
        until(lambda: (daemon.client.info(), seen.get("steps", 0))[1], lambda count: count > 5)
        assert daemon.running.stop() == 0
        assert ended.wait(PATIENCE_S)
    with process(bundle, "--state-dir", str(tmp_path / "state")) as again:
        # Everything that was confirmed is there: one more step was made by `process` itself.
        assert stream(again.client).steps == seen["steps"] + 1
