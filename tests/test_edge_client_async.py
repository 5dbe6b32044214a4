"""The client library for asyncio: several requests on one connection, and what goes wrong with some of them."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading

import numpy as np
import pytest

import peers
import tiny_bundle
from peers import HANG_UP, Fake, coroutine
from running import daemon, running
from tta_edge import errors, wire
from tta_edge.calls import Ask
from tta_edge.client import Client
from tta_edge.client_async import AsyncClient
from tta_edge.retry import Retry
from tta_runtime import Model
from tta_runtime import errors as runtime_errors
from tta_runtime import errors as wire_errors

X = np.zeros((2, 8), np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


class Held:
    """Answers nothing until it holds `count` requests; then all of them by `answer(messages)`."""

    def __init__(self, count, answer):
        self.count, self.answer, self.messages = count, answer, []

    def __call__(self, message):
        self.messages.append(message)
        return self.answer(self.messages) if len(self.messages) == self.count else []


async def outcomes(*calls):
    return await asyncio.gather(*calls, return_exceptions=True)


# --- many at once -----------------------------------------------------------------------------------


@coroutine
async def test_a_hundred_requests_at_once_each_get_their_own_answer(bundle):
    batches = [tiny_bundle.samples(4, seed=seed)[0] for seed in range(100)]
    model = Model.open(bundle)
    with running(bundle) as server:
        async with AsyncClient(server.endpoint, timeout_s=30) as client:
            replies = await asyncio.gather(*(client.predict(x, adapt=False) for x in batches))
        assert server.stats.figures().failed == 0  # none was too much for the daemon
    for x, reply in zip(batches, replies, strict=True):
        np.testing.assert_allclose(reply.logits, model.predict(x).logits, rtol=1e-4, atol=1e-5)


@coroutine
async def test_replies_in_any_order_find_their_calls():
    def backwards(messages):
        return [peers.done(message, message.stream) for message in reversed(messages)]

    with Fake(Held(10, backwards)) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30) as client:
            dones = await asyncio.gather(*(client.reset(f"s{n}") for n in range(10)))
    assert [done.theta_digest for done in dones] == [f"s{n}" for n in range(10)]


@coroutine
async def test_no_more_requests_are_open_than_allowed():
    with Fake(Held(3, lambda messages: map(peers.done, messages))) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30, max_open=3) as client:
            waiting = [asyncio.create_task(client.reset("s")) for _ in range(4)]
            await asyncio.gather(*waiting[:3])
            assert not waiting[3].done()
            await asyncio.to_thread(fake.wait, 4)  # the fourth goes when the others are answered
            assert len(fake.requests) == 4
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(waiting[3], 0.05)


@coroutine
async def test_a_call_that_never_gets_its_turn_ends_at_its_deadline():
    with Fake(lambda _: []) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30, max_open=1) as client:
            first = asyncio.create_task(client.reset("s"))
            await asyncio.to_thread(fake.wait)
            with pytest.raises(errors.DeadlineExceeded, match="could not be sent"):
                await client.reset("s", timeout_s=0.2)
            assert not first.done()
            first.cancel()
    assert len(fake.requests) == 1


@coroutine
async def test_every_message_as_a_coroutine(bundle):
    with running(bundle) as server:
        async with AsyncClient(server.endpoint, timeout_s=30) as client:
            x, _ = tiny_bundle.samples(16)
            reply = await client.predict(x, "camera", compare=True)
            assert (reply.steps, reply.adapted, reply.collected) == (1, True, False)
            assert reply.source_logits.shape == (16, 3)
            assert (await client.predict(X, "camera")).collected
            assert (await client.info()).model_id == "tiny"
            assert "camera" in {stream.id for stream in (await client.status()).streams}
            assert (await client.rollback("camera")).to in ("checkpoint", "source")
            assert (await client.reset("camera")).stream == "camera"
            assert (await client.adapt(False)).on is False
            assert (await client.adapt(True, "camera")).stream == "camera"
            assert (await client.reload()).changed is False
            assert len((await client.events(2)).events) == 2
            with pytest.raises(errors.UnknownStream):
                await client.reset("nobody")


@coroutine
async def test_the_blocking_client_gives_the_same(bundle):
    x, _ = tiny_bundle.samples(16)
    with running(bundle) as server:
        async with AsyncClient(server.endpoint, timeout_s=30) as client:
            theirs = await client.predict(x, "a", compare=True)
        with Client(server.endpoint, timeout_s=30) as blocking:
            ours = await asyncio.to_thread(blocking.predict, x, "b", compare=True)
    assert vars(ours).keys() == vars(theirs).keys()
    np.testing.assert_array_equal(ours.logits, theirs.logits)
    assert ours.theta_digest == theirs.theta_digest


# --- cancelling -------------------------------------------------------------------------------------


@coroutine
async def test_a_cancelled_call_leaves_the_connection_usable_and_its_answer_is_dropped():
    def answer(messages):
        return [peers.done(messages[0], "cancelled"), peers.done(messages[1], "wanted")]

    with Fake(Held(2, answer)) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30) as client:
            call = asyncio.create_task(client.reset("s"))
            await asyncio.to_thread(fake.wait)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert (await client.reset("s")).theta_digest == "wanted"


@coroutine
async def test_a_call_cancelled_before_it_was_sent_is_never_sent():
    with Fake(Held(2, lambda messages: map(peers.done, messages))) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30, max_open=1) as client:
            first = asyncio.create_task(client.reset("first"))
            await asyncio.to_thread(fake.wait)
            second = asyncio.create_task(client.reset("second"))
            await asyncio.sleep(0)
            second.cancel()
            first.cancel()
            await outcomes(first, second)
            assert (await client.reset("third")).theta_digest == "digest"
        assert [message.stream for message in fake.requests] == ["first", "third"]


@coroutine
async def test_a_callers_own_time_limit_works():
    with Fake(lambda _: []) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.status(), 0.1)


def test_an_event_loop_that_ends_with_a_call_open_harms_nobody():
    with Fake(Held(2, lambda messages: map(peers.done, messages))) as fake:
        client = AsyncClient(fake.endpoint, timeout_s=30)
        loop = asyncio.new_event_loop()
        task = loop.create_task(client.reset("s"))
        loop.run_until_complete(loop.run_in_executor(None, fake.wait))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()  # the task is pending for ever

        async def again():
            async with client:
                return await client.reset("s")

        assert asyncio.run(again()).theta_digest == "digest"
        task._log_destroy_pending = False


# --- some fail --------------------------------------------------------------------------------------


@coroutine
async def test_deadlines_hold_for_each_call_by_itself():
    def answer(message):
        return [] if message.stream == "slow" else [peers.done(message)]

    with Fake(answer) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30) as client:
            slow, quick = await outcomes(client.reset("slow", timeout_s=0.3), client.reset("quick"))
            assert isinstance(slow, errors.DeadlineExceeded)
            assert quick.theta_digest == "digest"


@coroutine
async def test_nobody_listens():
    with Fake(lambda _: [HANG_UP]) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30) as client:
            with pytest.raises(errors.ConnectionLost):
                await client.reset("s")
            found = await outcomes(*(client.predict(X, timeout_s=0.2) for _ in range(20)))
            assert {type(error) for error in found} == {errors.Unreachable}


@coroutine
async def test_garbage_with_an_id_ends_that_call_only():
    def answer(messages):
        broken = [wire.PROTOCOL, b"\x82\xa4type\xa4pong\xa2id" + bytes([messages[0].id])]
        return [broken, peers.done(messages[1])]

    with Fake(Held(2, answer)) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30) as client:
            broken, good = await outcomes(client.reset("a"), client.reset("b"))
    assert isinstance(broken, wire_errors.UnknownMessage)
    assert good.theta_digest == "digest"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ([b"nonsense"], wire_errors.BadFraming),
        (
            wire.encode(wire.ErrorReply(code="unsupported-protocol", cause="c", fix="f")),
            wire_errors.UnsupportedProtocol,
        ),
    ],
)
@coroutine
async def test_what_belongs_to_no_call_ends_all_of_them(reply, expected):
    with Fake(Held(3, lambda _: [reply])) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30) as client:
            found = await outcomes(*(client.reset("s") for _ in range(3)))
    assert [type(error) for error in found] == [expected] * 3
    assert len({id(error) for error in found}) == 3


@coroutine
async def test_replies_to_nobody_are_dropped():
    def answer(message):
        foreign = [
            wire.encode(wire.ResetDone(id=message.id + k, stream="s", theta_digest="no")) for k in (5, 99)
        ]
        return [*foreign, peers.done(message), peers.done(message, "twice")]

    with Fake(answer) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30) as client:
            for _ in range(3):
                assert (await client.reset("s")).theta_digest == "digest"


@coroutine
async def test_a_lost_connection_ends_what_was_sent_and_sends_what_was_not():
    with Fake(Held(2, lambda _: [HANG_UP])) as first:
        client = AsyncClient(first.endpoint, timeout_s=30, max_open=2)
        calls = [asyncio.create_task(client.reset(f"s{n}")) for n in range(3)]
        found = await outcomes(*calls[:2])
        assert [type(error) for error in found] == [errors.ConnectionLost] * 2
    with Fake(lambda message: [peers.done(message)], first.endpoint) as second:
        async with client:
            assert (await calls[2]).theta_digest == "digest"
        assert [message.stream for message in second.requests] == ["s2"]


@coroutine
async def test_a_daemon_killed_with_requests_open(bundle):
    with daemon(bundle) as process:
        async with AsyncClient(process.endpoint, timeout_s=30) as client:
            await client.predict(X)
            process.process.send_signal(signal.SIGSTOP)
            calls = [asyncio.create_task(client.predict(X)) for _ in range(5)]
            # Requests go in the order of the calls, so when this one is late the others were sent.
            with pytest.raises(errors.DeadlineExceeded, match="may still be carried out"):
                await client.status(timeout_s=0.3)
            await asyncio.to_thread(process.stop, signal.SIGKILL)
            found = await asyncio.wait_for(outcomes(*calls), 8)
            assert [type(error) for error in found] == [errors.ConnectionLost] * 5


@coroutine
async def test_a_daemon_killed_and_restarted_on_its_port_is_found_by_trying_again(bundle):
    with daemon(bundle) as first:
        client = AsyncClient(
            first.endpoint, timeout_s=0.3, retry=Retry(attempts=200, wait_s=0.05, max_wait_s=0.3)
        )
        assert (await client.info(timeout_s=30)).model_id == "tiny"
        await asyncio.to_thread(first.stop, signal.SIGKILL)
    call = asyncio.create_task(client.info())
    with daemon(bundle, bind=first.endpoint):
        async with client:
            assert (await call).model_id == "tiny"


@coroutine
async def test_a_busy_daemon_is_asked_again():
    def answer(message):
        seen[message.stream] = seen.get(message.stream, 0) + 1
        first = seen[message.stream] == 1
        return [peers.error(message, "busy", 0.1) if first else peers.done(message)]

    seen = {}
    with Fake(answer) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30, retry=Retry(attempts=2)) as client:
            await asyncio.gather(*(client.reset(f"s{n}") for n in range(8)))
    assert set(seen.values()) == {2}


@coroutine
async def test_more_at_once_than_the_daemon_takes_of_one_client_succeeds_by_trying_again(bundle):
    with running(bundle, max_client_requests=2) as server:
        retry = Retry(attempts=1000, wait_s=0.01, max_wait_s=5)
        async with AsyncClient(server.endpoint, timeout_s=30, retry=retry, max_open=50) as client:
            replies = await asyncio.gather(*(client.predict(X, adapt=False) for _ in range(50)))
    assert len(replies) == 50


# --- refused here, closing --------------------------------------------------------------------------


@coroutine
async def test_what_the_daemon_would_not_take_is_refused_here():
    def answer(message):
        return [peers.info(message, max_request_bytes=63)]

    with Fake(answer) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30) as client:
            with pytest.raises(wire_errors.BadField):
                await client.predict(X, "../x")
            with pytest.raises(runtime_errors.TooLarge):
                await client.predict(X)
            with pytest.raises(runtime_errors.BadValue):
                await client.info(timeout_s=0)
    assert [type(message) for message in fake.requests] == [wire.Info]


@coroutine
async def test_a_request_that_cannot_be_encoded_ends_that_call_only():
    with Fake(lambda message: [peers.done(message)]) as fake:
        async with AsyncClient(fake.endpoint, timeout_s=30, max_open=1) as client:
            broken = Ask(wire.Events(id=0, limit=1 << 64), wire.EventsReply, None)
            calls = [client.reset("s"), client._call(broken, 30), client.reset("s"), client._call(broken, 30)]
            found = await asyncio.wait_for(outcomes(*calls), 20)
            assert [type(each) for each in found] == [wire.ResetDone, wire_errors.BadField] * 2
            assert client._io.losses == 0
    assert [type(message) for message in fake.requests] == [wire.Reset] * 2


@pytest.mark.parametrize("settings", [{"max_open": 0}, {"timeout_s": -1}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(runtime_errors.BadValue):
        AsyncClient("tcp://127.0.0.1:5555", **settings)


@coroutine
async def test_closing_ends_what_is_open():
    with Fake(lambda _: []) as fake:
        client = AsyncClient(fake.endpoint, timeout_s=30, max_open=2)
        calls = [asyncio.create_task(client.reset("s")) for _ in range(4)]
        await asyncio.to_thread(fake.wait, 2)
        await client.close()
        assert [type(error) for error in await outcomes(*calls)] == [errors.ClientClosed] * 4
        await client.close()
        with pytest.raises(errors.ClientClosed):
            await client.info()
        with pytest.raises(errors.ClientClosed):
            await client.predict(X)


def test_a_client_that_was_forgotten_leaves_no_thread():
    def threads():
        return {thread for thread in threading.enumerate() if thread.name == "tta-client"}

    before = threads()
    client = AsyncClient("tcp://127.0.0.1:5555")
    (thread,) = threads() - before
    del client
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
