"""Steps in the background of a real daemon: answers do not wait for them, and each stream learns from its own."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import serving
import tiny_bundle
from running import daemon, running
from serving import PATIENCE_S, Pipe, steps, stream, until
from tta_edge import errors, wire
from tta_edge.client import Client
from tta_edge.config import BundleConfig, Config
from tta_edge.hosting import NICENESS, Threads, divide
from tta_runtime import EngineOptions, Model
from tta_runtime import errors as runtime_errors

ONE_THREAD = EngineOptions(threads=1)
BACKGROUND = {"policy": "always", "step_batch": 32, "window": 128}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Its step takes some tenths of a second, its answers as long as those of the tiny bundle."""
    path = tmp_path_factory.mktemp("bundles") / "slow"
    serving.slow(path, rounds=70)
    return path


def x(count, seed=0):
    return tiny_bundle.samples(count, seed=seed, shift=1.0)[0]


def theta_after(bundle, *batches):
    model = Model.open(bundle, method="tent", options=ONE_THREAD)
    for batch in batches:
        model.adapt(batch)
    return model.digest


@contextmanager
def serves(bundle, **settings):
    with (
        running(bundle, **{**BACKGROUND, **settings}) as server,
        Client(server.endpoint, timeout_s=PATIENCE_S) as client,
    ):
        yield server, client


# --- policies -------------------------------------------------------------------------------------


def test_always_answers_with_the_serve_graph_and_steps_behind(bundle):
    model = Model.open(bundle, method="tent", options=ONE_THREAD)
    batch = x(32)
    with serves(bundle) as (server, client):
        for part in np.split(batch, 4):
            reply = client.predict(part)
            np.testing.assert_array_equal(reply.logits, model.predict(part).logits)
            assert (reply.adapted, reply.collected, reply.steps) == (False, True, 0)
        model.adapt(batch)
        assert steps(client, 1).theta_digest == model.digest
        reply = client.predict(batch)
        np.testing.assert_array_equal(reply.logits, model.predict(batch).logits)
        figures = server.stats.figures()
        assert figures.samples["default"] == 64
        assert figures.runs["default"] == 5


def test_every_steps_once_for_so_many_samples_on_the_newest(bundle):
    batch = x(100)
    with serves(bundle, policy="every", every_samples=100) as (server, client):
        for part in np.split(batch, 10):
            assert client.predict(part).collected
        assert steps(client, 1).theta_digest == theta_after(bundle, batch[68:])
        assert (stream(client).window, server.stats.figures().dropped) == (0, 68)


def test_a_budget_is_kept(bundle):
    with serves(bundle, policy="budget", budget=0.25, step_batch=8) as (server, client):
        began_s = time.monotonic()
        until(lambda: (client.predict(x(8)), stream(client).steps)[1], lambda count: count >= 20)
        passed_s = time.monotonic() - began_s
        figures = server.stats.figures()
        used_s, count = figures.step_s["default"].total, figures.steps["default", "committed"]
        # Each is paid for before it begins, except for the first, and for what one takes longer than its like.
        assert used_s <= 0.25 * passed_s + 2 * used_s / count + 0.05


def test_inline_collects_from_requests_that_are_too_small(bundle):
    with serves(bundle, policy="inline", inline_min_batch=16) as (_, client):
        small, large = x(32, seed=1), x(16, seed=2)
        for part in np.split(small, 4):
            reply = client.predict(part)
            assert (reply.adapted, reply.collected) == (False, True)
        assert steps(client, 1).theta_digest == theta_after(bundle, small)
        reply = client.predict(large)
        assert (reply.adapted, reply.collected, reply.steps) == (True, False, 2)
        assert reply.theta_digest == theta_after(bundle, small, large)


def test_without_adapt_nothing_is_collected(bundle):
    with serves(bundle) as (_, client):
        reply = client.predict(x(32), adapt=False)
        assert (reply.collected, stream(client).window) == (False, 0)


@pytest.mark.parametrize(
    "settings", [{"step_batch": 129}, {"max_window_bytes": 1024, "step_batch": 33}, {"method": "source"}]
)
def test_where_no_step_can_ever_run_the_reply_says_that_nothing_is_collected(bundle, settings):
    with serves(bundle, **settings) as (_, client):
        reply = client.predict(x(16))
        assert (reply.collected, stream(client).window) == (False, 0)
        assert reply.logits.shape == (16, 3)


# --- a slow step ----------------------------------------------------------------------------------


def answers_during_a_step(client):
    """Begin a step, then ask until it is committed; how often that was answered before."""
    before = stream(client).steps
    client.predict(x(32))
    count = 0
    while client.predict(x(1), adapt=False).steps == before:
        count += 1
    return count


def test_a_slow_step_does_not_hold_up_answers(slow):
    with serves(slow) as (_, client):
        counts = [answers_during_a_step(client) for _ in range(3)]
        # A daemon that answered between steps only would give 0 or 1; how many more there are is a matter of the
        # machine, so no number of milliseconds is asked for.
        assert min(counts) >= 3


def test_inline_a_request_waits_for_the_step_before_it(slow):
    """The companion: the same count is low where a step runs in the answering thread."""
    with serves(slow, policy="inline", inline_min_batch=32) as (_, client):
        assert answers_during_a_step(client) == 0


# --- streams, bundles -----------------------------------------------------------------------------


def test_streams_of_clients_at_once_never_share_a_step(bundle):
    streams = {f"camera-{k}": x(96, seed=k) for k in range(6)}

    def send(name, samples):
        with Client(server.endpoint, timeout_s=PATIENCE_S) as client:
            for k in range(len(samples)):
                assert client.predict(samples[k : k + 1], stream=name).collected

    with serves(bundle) as (server, client):
        threads = [threading.Thread(target=send, args=item) for item in streams.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        for name, samples in streams.items():
            found = steps(client, 3, name)
            assert found.theta_digest == theta_after(bundle, samples[:32], samples[32:64], samples[64:])


def test_bundles_with_other_methods_serve_the_same_stream_name_apart(bundle, slow):
    named = {
        "second": BundleConfig(path=str(bundle), method="teacher"),
        "third": BundleConfig(path=str(slow), method="source"),
    }
    batch = x(32)
    with serves(bundle, bundles=named) as (_, client):
        for name in ("", "second", "third"):
            client.predict(batch, stream="camera", bundle=name)
        first, second = steps(client, 1, "camera"), steps(client, 1, "camera", "second")
        third = stream(client, "camera", "third")
        assert [found.method for found in (first, second, third)] == ["tent", "teacher", "source"]
        assert first.theta_digest == theta_after(bundle, batch)
        teacher = Model.open(bundle, method="teacher", options=ONE_THREAD)
        teacher.adapt(batch)
        assert second.theta_digest == teacher.digest
        assert (third.steps, third.state) == (0, "source")
        assert client.info("second").method == "teacher"
        client.reset("camera", "second")
        assert stream(client, "camera").theta_digest == first.theta_digest
        assert stream(client, "camera", "second").steps == 0
        with pytest.raises(errors.UnknownBundle, match="did you mean `second`"):
            client.predict(batch, bundle="secnd")


def test_a_window_is_bounded_in_samples_and_bytes(bundle):
    with serves(bundle, step_batch=64, window=64, max_window_bytes=100 * 32) as (server, client):
        for name in ("a", "b", "c"):
            client.predict(x(60), stream=name)
        held = {each.id: each.window for each in client.status().streams}
        assert (held["a"], held["b"], held["c"]) == (0, 0, 60)
        assert server.stats.figures().dropped == 120
        client.predict(x(4), stream="c")  # and the memory is not blocked for ever
        assert steps(client, 1, "c").window == 0


# --- switching ------------------------------------------------------------------------------------


def begun(server, client):
    """A step is under way, and samples wait: for two streams."""
    client.predict(x(32), stream="a")
    client.predict(x(30), stream="b")
    until(lambda: (client.info(), server._responder._stepper._stepping)[1])


def test_the_kill_switch_holds_for_the_step_under_way_and_for_what_waits(slow):
    with serves(slow) as (server, client):
        begun(server, client)
        source = stream(client, "a").theta_digest
        assert client.adapt(False).on is False
        assert client.predict(x(32), stream="a").collected is False
        until(lambda: (client.info(), server.stats.figures().dropped)[1], lambda count: count == 62)
        status = client.status()
        assert not status.adapt
        assert {(each.state, each.steps, each.window) for each in status.streams} == {("off", 0, 0)}
        assert {each.theta_digest for each in status.streams} == {source}
        client.adapt(True)
        batch = x(32, seed=9)
        client.predict(batch[:31], stream="b")
        assert stream(client, "b").window == 31  # nothing from before
        client.predict(batch[31:], stream="b")
        assert steps(client, 1, "b").theta_digest == theta_after(slow, batch)


def test_one_stream_is_switched_off_in_the_middle_of_its_step_and_the_other_goes_on(slow):
    with serves(slow) as (server, client):
        begun(server, client)
        client.adapt(False, "a")
        client.predict(x(2, seed=5), stream="b")
        steps(client, 1, "b")
        found = stream(client, "a")
        assert (found.state, found.steps, found.window) == ("off", 0, 0)
        assert client.predict(x(32), stream="a").collected is False
        client.adapt(True, "a")
        assert client.predict(x(32), stream="a").collected
        assert steps(client, 1, "a").theta_digest == theta_after(slow, x(32))


def test_a_reset_in_the_middle_of_a_step_wins(slow):
    with serves(slow) as (server, client):
        client.predict(x(32), stream="a")
        steps(client, 1, "a")
        begun(server, client)
        assert client.reset("a").theta_digest == Model.open(slow).digest
        found = until(lambda: stream(client, "a"), lambda found: "stale" in found.events)
        assert (found.steps, found.theta_digest) == (0, Model.open(slow).digest)


def test_stopping_in_the_middle_of_a_step_saves_what_is_committed(slow, tmp_path):
    with serves(slow, state_dir=str(tmp_path)) as (server, client):
        client.predict(x(32), stream="a")
        steps(client, 1, "a")
        begun(server, client)
    with serves(slow, state_dir=str(tmp_path)) as (_, client):
        found = stream(client, "a")
        assert found.steps in (1, 2)
        assert found.theta_digest == theta_after(slow, *[x(32)] * found.steps)


# --- requests that share a run --------------------------------------------------------------------


def test_waiting_requests_of_one_stream_share_a_run_and_get_what_single_ones_get(bundle):
    batch = x(48)
    want = Model.open(bundle, options=ONE_THREAD).predict(batch).logits
    with (
        serves(bundle, step_batch=48, batch_wait_ms=1000.0, batch_max=16, max_client_requests=64) as (
            server,
            client,
        ),
        Pipe(server.endpoint) as pipe,
    ):
        for number in range(48):
            pipe.send(number, batch[number : number + 1], stream="s")
        replies = pipe.replies(48)
        for number, received in replies.items():
            assert received.tensors["logits"].shape == (1, 3)
            np.testing.assert_allclose(received.tensors["logits"][0], want[number], rtol=1e-5, atol=1e-6)
            assert received.message.collected
        assert server.stats.figures().runs["default"] == 3
        assert steps(client, 1, "s").theta_digest == theta_after(bundle, batch)  # in the order of arrival


def test_eight_clients_on_one_stream_are_merged(bundle):
    model = Model.open(bundle, options=ONE_THREAD)
    wrong = []

    def send(seed):
        with Client(server.endpoint, timeout_s=PATIENCE_S) as client:
            for k in range(20):
                batch = x(1, seed=100 * seed + k)
                got = client.predict(batch, adapt=False, compare=True)
                want = model.predict(batch).logits
                for logits in (got.logits, got.source_logits):
                    if not np.allclose(logits, want, rtol=1e-5, atol=1e-6):
                        wrong.append((seed, k))

    with serves(bundle, batch_wait_ms=50.0, batch_max=8) as (server, _):
        threads = [threading.Thread(target=send, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert wrong == []
        figures = server.stats.figures()
        assert figures.samples["default"] == 160
        assert figures.runs["default"] < 80


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (np.full((1, 8), np.nan, np.float32), "non-finite"),
        (np.full((1, 8), 3e38, np.float32), "non-finite"),
    ],
)
def test_one_bad_request_among_merged_ones_fails_alone(bundle, bad, code):
    with (
        serves(bundle, batch_wait_ms=1000.0, batch_max=8) as (server, client),
        Pipe(server.endpoint) as pipe,
    ):
        before = stream(client).theta_digest
        want = Model.open(bundle, options=ONE_THREAD).predict(x(8)).logits
        for number in range(8):
            pipe.send(number, bad if number == 3 else x(8)[number : number + 1])
        for number, received in pipe.replies(8).items():
            if number == 3:
                assert (received.message.code, bool(received.message.fix)) == (code, True)
            else:
                np.testing.assert_allclose(received.tensors["logits"][0], want[number], rtol=1e-5)
        found = stream(client)
        assert (found.theta_digest, found.window) == (before, 7)


def test_a_full_queue_and_a_greedy_client_are_told_when_to_come_back(bundle):
    with (
        serves(bundle, max_client_requests=4, batch_wait_ms=1000.0, batch_max=64) as (server, client),
        Pipe(server.endpoint) as greedy,
    ):
        for number in range(12):
            greedy.send(number, x(1))
        replies = greedy.replies(12)
        busy = [each.message for each in replies.values() if isinstance(each.message, wire.ErrorReply)]
        assert {each.code for each in busy} == {"busy"}
        assert len(busy) == 8
        assert all(each.retry_after_s > 0 for each in busy)
        assert all("max_client_requests" in each.fix for each in busy)
        assert client.predict(x(1)).logits.shape == (1, 3)  # another client has places of its own
        assert server.stats.figures().refused == {"busy": 8}


def test_a_request_that_is_refused_is_not_collected(bundle):
    with serves(bundle) as (_, client):
        client.predict(x(1))
        for bad in (np.zeros((1, 9), np.float32), np.zeros((1, 8), np.float64)):
            with pytest.raises(runtime_errors.InputError):
                client.predict(bad)
        assert stream(client).window == 1


# --- cores ----------------------------------------------------------------------------------------


def niceness(pid):
    """Of every thread of a process, relative to this one."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return [int(text.rpartition(")")[2].split()[16]) - os.nice(0) for text in stats]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
@pytest.mark.parametrize(("policy", "nicer"), [("always", 3), ("inline", 1)])
def test_threads_of_background_steps_give_way_to_those_that_answer(bundle, policy, nicer):
    """The stepping thread, and with a background policy the two that its engine starts beside it."""
    arguments = ("--policy", policy, "--threads", "5", "--step-threads", "3", "--method", "tent")
    with daemon(bundle, *arguments) as process:
        found = niceness(process.process.pid)
        assert [each for each in found if each] == [NICENESS] * nicer


@pytest.mark.parametrize(
    ("settings", "cores", "expected"),
    [
        ({}, 4, Threads(4, 4)),  # inline: one follows the other
        ({"threads": 2}, 8, Threads(2, 2)),
        ({"policy": "always"}, 1, Threads(1, 1)),
        ({"policy": "always"}, 2, Threads(1, 1)),
        ({"policy": "budget"}, 5, Threads(3, 2)),
        ({"policy": "every", "threads": 8, "step_threads": 1}, 2, Threads(7, 1)),
        ({"policy": "always", "step_threads": 9}, 4, Threads(1, 9)),
    ],
)
def test_cores_are_divided_between_answers_and_steps_in_the_background(settings, cores, expected):
    assert divide(Config(**settings), cores) == expected
