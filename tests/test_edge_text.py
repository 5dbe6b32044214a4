"""Language models behind the daemon: real sockets, real processes, and what goes wrong touches nobody else."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
import zmq

import tiny_bundle
import tiny_text
from disks import Failing, Unsynced
from peers import coroutine
from running import PATIENCE_S, daemon, running
from serving import Link, sessions, until
from snapshots import files
from tiny_text import BEGIN, CHUNK, CONTEXT, LONG, OTHER, TEXT
from tta_edge import hosting, wire
from tta_edge.client import Client, Retry
from tta_edge.client_async import AsyncClient
from tta_edge.client_io import MAX_OPEN
from tta_edge.config import BundleConfig, Config
from tta_edge.errors import Cancelled, SessionExists, TooManySessions, UnknownSession
from tta_edge.hosting import pass_bytes
from tta_edge.metrics import METRICS
from tta_edge.saver import Saver
from tta_edge.sessions import AllInUse, Sessions
from tta_edge.store import StateStore
from tta_runtime import errors
from tta_runtime.model import Checkpoint


@pytest.fixture(scope="module")
def served(text_bundle):
    """A daemon for tests that leave nothing behind but sessions of their own names."""
    with running(text_bundle) as server, Client(server.endpoint, timeout_s=30.0) as client:
        yield client


def reference(text_model, *texts):
    session = text_model.session()
    for text in texts:
        session.absorb(list(text.encode()))
    return session


def answers(client, *names, bundle=""):
    """What sessions say of a text, to the last bit."""
    return {name: client.score(OTHER, name, bundle).nats.tobytes() for name in names}


def expected(session):
    return session.score(list(OTHER.encode())).nats.astype(np.float32).tobytes()


# --- what it says --------------------------------------------------------------------------------------


def test_it_says_what_it_serves(served):
    info = served.info()
    assert info.text == wire.TextInfo("bytes", tiny_digest(), CHUNK, CONTEXT, True, Config().max_text_bytes)
    assert (info.method, info.input.dtype, info.input.shape) == ("stream", "int64", [1, "tokens"])
    (status,) = served.status().bundles
    assert status.task == "text"
    assert served.status().streams == []


def tiny_digest():
    from tta_runtime.tokens import ByteTokenizer

    return ByteTokenizer.digest


def test_score_agrees_with_eager_torch_with_and_without_a_session(served, text_model):
    done = served.absorb(TEXT, "parity")
    ids = list(TEXT.encode())
    vector = tiny_text.eager_absorb(ids)
    whole = len(ids) - len(ids) % CHUNK
    assert (done.tokens, done.absorbed, done.pending, done.chunks) == (
        len(ids),
        len(ids),
        len(ids) - whole,
        whole // CHUNK,
    )
    assert not done.durable  # there is no state directory
    zero = torch.zeros_like(vector)
    for session, before, theta in (("parity", ids[whole:], vector), ("", [], zero)):
        found = served.score(OTHER, session)
        logits = tiny_text.eager_logits([BEGIN, *before, *OTHER.encode()][:-1], theta)[len(before) :]
        logp = torch.log_softmax(logits.double(), -1)[torch.arange(len(OTHER)), list(OTHER.encode())]
        np.testing.assert_allclose(found.nats, -logp.numpy(), atol=1e-4)
        assert found.bits == pytest.approx(float(-logp.sum()) / np.log(2), abs=1e-3)
        assert (found.bytes, found.skipped, found.before) == (len(OTHER), 0, 1 + len(before))
        assert found.bits_per_byte == found.bits / found.bytes
    seen = served.score(OTHER, context=TEXT)
    assert seen.before == 1 + len(TEXT)
    np.testing.assert_allclose(
        seen.nats, text_model.session().score(list(OTHER.encode()), list(TEXT.encode())).nats, atol=1e-5
    )


def test_generate_agrees_with_eager_torch(served):
    served.absorb(TEXT, "writer")
    ids = list(TEXT.encode())
    whole = len(ids) - len(ids) % CHUNK
    vector, tokens = tiny_text.eager_absorb(ids), [BEGIN, *ids[whole:], *OTHER.encode()]
    start = len(tokens)
    for _ in range(24):
        tokens.append(int(tiny_text.eager_logits(tokens, vector)[-1].argmax()))
    text = bytes(token for token in tokens[start:] if token < 256).decode("utf-8", "replace")
    stream = served.generate(OTHER, "writer", max_tokens=24, temperature=0)
    parts = list(stream)
    assert len(parts) > 1
    assert "".join(parts) == stream.end.text == text
    assert (stream.end.reason, stream.end.tokens, stream.end.prompt_tokens) == ("max-tokens", 24, len(OTHER))
    assert not stream.end.absorbed
    assert sessions(served)["writer"].absorbed == len(ids)


def test_the_same_seed_gives_the_same_text(served):
    def text(**sampling):
        return "".join(served.generate(OTHER, max_tokens=30, **sampling))

    first = text(seed=5, top_p=0.9, temperature=1.5)
    assert first == text(seed=5, top_p=0.9, temperature=1.5)
    assert first != text(seed=6, top_p=0.9, temperature=1.5)


def test_what_is_generated_becomes_part_of_the_session_on_request(served, text_model):
    served.absorb(TEXT, "talk")
    stream = served.generate(OTHER, "talk", max_tokens=20, temperature=0, absorb=True)
    text = "".join(stream)
    assert stream.end.absorbed
    session = reference(text_model, TEXT)
    tokens = list(session.generate(list(OTHER.encode()), max_tokens=20))
    session.absorb([*OTHER.encode(), *tokens])
    assert bytes(token for token in tokens if token < 256).decode("utf-8", "replace") == text
    assert sessions(served)["talk"].absorbed == len(TEXT) + len(OTHER) + 20
    assert answers(served, "talk") == {"talk": expected(session)}
    with pytest.raises(errors.BadField, match="no session is named"):
        list(served.generate(OTHER, absorb=True))


def test_metrics_tell_of_tokens_and_sessions(text_bundle):
    with running(text_bundle) as server, Client(server.endpoint) as client:
        assert 'tta_text_tokens_total{bundle="default",use="absorbed"} 0.0' in server.exposition().decode()
        client.absorb(TEXT, "s")
        client.score(OTHER, "s")
        list(client.generate(OTHER, "s", max_tokens=7))
        text = server.exposition().decode()
    for metric in METRICS:
        if metric.name.startswith(("tta_text_", "tta_session")):
            assert f"\n{metric.name}" in text, metric.name
    for use, tokens in (("absorbed", len(TEXT)), ("scored", len(OTHER)), ("generated", 7)):
        assert f'tta_text_tokens_total{{bundle="default",use="{use}"}} {tokens}.0\n' in text
    assert 'tta_text_first_token_seconds_count{bundle="default"} 1.0\n' in text
    assert 'tta_text_token_seconds_count{bundle="default"} 7.0\n' in text
    assert 'tta_sessions_held{place="memory"} 1.0\n' in text


# --- refusals -----------------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name_and_no_session_notices(served):
    for name in ("one", "two"):
        served.absorb(TEXT + name, name)
    before, listed = answers(served, "one", "two"), sessions(served)
    over = "x" * (CONTEXT + 1)
    refusals = [
        (errors.InvalidUtf8, "byte 3 is 0xff", lambda: served.score(b"abc\xff", "one")),
        (errors.InvalidUtf8, "the context is not", lambda: served.score("abc", "one", context=b"\xc3")),
        (errors.InvalidUtf8, "the prompt is not", lambda: list(served.generate(b"\x80", "one"))),
        (errors.InvalidUtf8, "byte 0", lambda: served.absorb(b"\xed\xa0\x80", "one")),
        (errors.InvalidUtf8, "surrogate", lambda: served.absorb("\ud800", "one")),
        (
            errors.ContextTooLong,
            f"{CONTEXT + 1} tokens, with .* {CONTEXT} that",
            lambda: served.score(over, "one"),
        ),
        (errors.ContextTooLong, "", lambda: served.score("abc", context=over)),
        (errors.ContextTooLong, "the prompt has", lambda: list(served.generate(over, "two"))),
        (errors.EmptyText, "0 tokens", lambda: served.score("", "one")),
        (errors.EmptyText, "empty", lambda: served.absorb("", "one")),
        (UnknownSession, "did you mean `one`", lambda: served.score("abc", "onne")),
        (UnknownSession, "first `absorb`", lambda: list(served.generate("abc", "nobody"))),
        (UnknownSession, "", lambda: served.export_session("nobody")),
        (UnknownSession, "", lambda: served.reset("nobody")),
        (
            errors.WrongTask,
            "score, generate and absorb",
            lambda: served.predict(np.zeros((1, 8), np.float32)),
        ),
        (errors.WrongTask, "", lambda: served.rollback("one")),
        (errors.BadField, "temperature", lambda: served.generate("abc", temperature=-1)),
        (errors.BadField, "top_p", lambda: served.generate("abc", top_p=0)),
        (errors.BadField, "top_k", lambda: served.generate("abc", top_k=-1)),
        (errors.BadField, "top_k", lambda: served.generate("abc", top_k=2**31)),
        (errors.BadField, "top_k", lambda: served.generate("abc", top_k=2**64)),
        (errors.BadField, "max_tokens", lambda: served.generate("abc", max_tokens=0)),
        (errors.BadField, "session", lambda: served.absorb("abc", "../etc")),
    ]
    for error, says, ask in refusals:
        with pytest.raises(error, match=says or None):
            ask()
    assert answers(served, "one", "two") == before
    assert sessions(served) == listed


def test_a_text_over_the_limit_is_refused(text_bundle):
    with running(text_bundle, max_text_bytes=100) as server, Client(server.endpoint) as client:
        client.absorb("x" * 100, "s")
        before = answers(client, "s")
        with pytest.raises(errors.TooLarge, match="101 bytes, the limit is 100"):
            client.absorb("x" * 101, "s")
        assert answers(client, "s") == before


def test_a_method_that_absorbs_nothing_says_so_before_it_generates(text_bundle):
    with running(text_bundle, method="source") as server, Client(server.endpoint) as client:
        for ask in (lambda: client.absorb(TEXT, "s"), lambda: next(client.generate(TEXT, "s", absorb=True))):
            with pytest.raises(errors.AbsorbUnsupported, match="stream"):
                ask()
        assert client.status().sessions == []
        assert client.score(TEXT).bits > 0


@pytest.mark.parametrize(
    ("array", "code"),
    [(np.zeros(3, np.int64), "wrong-dtype"), (np.zeros((2, 2), np.uint8), "wrong-shape")],
)
def test_a_text_that_is_no_row_of_bytes_is_refused(served, array, code):
    message = wire.Absorb(id=1, session="raw", text=wire.declare(array))
    assert raw(served.endpoint, message, {"text": array}).code == code
    assert "raw" not in sessions(served)


def raw(endpoint, message, tensors):
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(endpoint)
    try:
        socket.send_multipart(wire.encode(message, tensors))
        assert socket.poll(PATIENCE_S * 1e3)
        return wire.decode_reply(socket.recv_multipart()).message
    finally:
        socket.close()


def test_images_and_text_in_one_daemon(text_bundle, tmp_path, text_model):
    tiny_bundle.build(tmp_path / "images")
    x, _ = tiny_bundle.samples(16)
    both = {"lm": BundleConfig(path=str(text_bundle))}
    with running(tmp_path / "images", bundles=both) as server, Client(server.endpoint) as client:
        assert client.predict(x).adapted
        with pytest.raises(errors.WrongTask, match="or the request predict"):
            client.score(TEXT)
        with pytest.raises(errors.WrongTask):
            client.predict(x, bundle="lm")
        client.absorb(TEXT, "s", "lm")
        assert answers(client, "s", bundle="lm") == {"s": expected(reference(text_model, TEXT))}
        assert [bundle.task for bundle in client.status().bundles] == ["classification", "text"]
        assert client.predict(x).adapted


def test_a_first_bundle_of_text_is_not_taught_by_a_cloud(text_bundle, tmp_path):
    from tta_edge.errors import ModeRefused

    with (
        pytest.raises(ModeRefused, match="language model"),
        running(text_bundle, mode="cloud", state_dir=str(tmp_path)),
    ):
        pass


def test_a_memory_cap_below_one_session_stops_the_daemon(tmp_path):
    tiny_text.build(tmp_path / "bundle", context=4096)
    with (
        pytest.raises(errors.BadValue, match="max_session_bytes is 65536"),
        running(tmp_path / "bundle", max_session_bytes=65536),
    ):
        pass


# --- others meanwhile ---------------------------------------------------------------------------------


def test_others_are_served_between_two_tokens(long_text_bundle):
    with (
        running(long_text_bundle) as server,
        Client(server.endpoint) as client,
        Client(server.endpoint) as other,
    ):
        client.absorb(TEXT, "busy")
        with client.generate("abc", "busy", max_tokens=LONG) as stream:
            next(stream)
            other.absorb(TEXT, "other")
            scored = other.score(OTHER, "other").nats
            short = other.generate("abc", max_tokens=5)
            assert len("".join(short)) > 0
            assert other.status().requests.open >= 1
            assert stream.end is None
            assert next(stream)
        assert len(scored) == len(OTHER)
        until(lambda: other.status().requests.open, lambda open_: open_ == 1)  # the status itself
        assert 0 < generated(server) < LONG


def generated(server):
    return sum(n for (_, use), n in server.stats.figures().tokens.items() if use == "generated")


def test_a_client_that_goes_away_stops_its_text(long_text_bundle):
    with running(long_text_bundle) as server, Client(server.endpoint) as watcher:
        client = Client(server.endpoint)
        stream = client.generate("abc", max_tokens=LONG)
        next(stream)
        client.close()
        until(lambda: watcher.status().requests.open, lambda open_: open_ == 1)
        assert generated(server) < LONG


def test_a_task_closes_what_another_one_reads(long_text_bundle):
    @coroutine
    async def check():
        async with AsyncClient(server.endpoint, timeout_s=60.0) as client:
            stream = client.generate("abc", max_tokens=LONG)

            async def read():
                return [part async for part in stream]

            reading = asyncio.create_task(read())
            while not generated(server):
                await client.status()
            await stream.aclose()
            await stream.aclose()
            parts = await reading
            assert stream.end is None
            assert len(parts) < LONG
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            while (await client.status()).requests.open > 1:
                pass

    with running(long_text_bundle) as server:
        check()
        assert generated(server) < LONG


def test_a_task_that_is_cancelled_while_it_reads_ends_so(long_text_bundle):
    @coroutine
    async def check():
        async with AsyncClient(server.endpoint, timeout_s=60.0) as client:

            async def read():
                async with client.generate("abc", max_tokens=LONG) as stream:
                    return [part async for part in stream]

            reading = asyncio.create_task(read())
            while not generated(server):
                await client.status()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    with running(long_text_bundle) as server:
        check()


@pytest.mark.parametrize("draining", [False, True])
def test_w14_cancelled_by_hand_and_only_by_the_same_client(long_text_bundle, draining):
    prompt = np.frombuffer(b"abc", np.uint8)
    with running(long_text_bundle, drain_s=2 * PATIENCE_S) as server, Client(server.endpoint) as client:
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(server.endpoint)

        def heard():
            assert socket.poll(PATIENCE_S * 1e3)
            return wire.decode_reply(socket.recv_multipart()).message

        socket.send_multipart(
            wire.encode(wire.Generate(id=7, prompt=wire.declare(prompt), max_tokens=LONG), {"prompt": prompt})
        )
        assert isinstance(heard(), wire.Generated)
        assert raw(server.endpoint, wire.Cancel(id=1, request=7), {}) == wire.CancelDone(id=1, found=False)
        assert client.status().requests.open == 2  # with the status itself
        if draining:
            server.stop()
            until(lambda: isinstance(heard(), wire.Generated) and not server.accepting())
        socket.send_multipart(wire.encode(wire.Cancel(id=8, request=7)))
        last = []
        while len(last) < 2:
            message = heard()
            last += [] if isinstance(message, wire.Generated) else [message]
        socket.close()
        done, error = sorted(last, key=lambda each: -each.id)
        assert done == wire.CancelDone(id=8, found=True)
        assert (error.id, error.code) == (7, Cancelled.code)
        figures = server.stats.figures()
        assert (figures.answered["cancel"], figures.refused) == (2, {"cancelled": 1})


@pytest.mark.parametrize("bounds", [{}, {"max_queue": MAX_OPEN}])
def test_texts_are_cancelled_where_no_further_request_has_a_place(long_text_bundle, bounds):
    with running(long_text_bundle, **bounds) as server, Client(server.endpoint, timeout_s=30) as client:
        texts = [client.generate("abc", max_tokens=LONG, seed=seed) for seed in range(MAX_OPEN)]
        threads = [threading.Thread(target=next, args=(text,)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert server._session.open == MAX_OPEN
        for left in range(MAX_OPEN - 1, -1, -1):
            texts[left].close()
        with Client(server.endpoint, timeout_s=30, retry=Retry(attempts=1000, wait_s=0.05)) as watcher:
            until(lambda: watcher.status().requests.open, lambda open_: open_ == 1)
            assert watcher.status().requests.failures.get("cancelled") == MAX_OPEN
        assert generated(server) < LONG


# --- many sessions, little memory ---------------------------------------------------------------------


def test_64_sessions_under_a_memory_cap_come_back_to_the_last_bit(text_bundle, text_model, tmp_path):
    cap = 6 * text_model.session_bytes + pass_bytes(text_model, CONTEXT)
    names = [f"s{number}" for number in range(64)]
    texts = {
        name: [f"{name} {turn} {TEXT}"[: 20 + 3 * number] for turn in range(2)]
        for number, name in enumerate(names)
    }

    found = {}

    @coroutine
    async def use():
        async with AsyncClient(server.endpoint, timeout_s=60.0) as client:
            for turn in range(2):
                done = await asyncio.gather(*(client.absorb(texts[name][turn], name) for name in names))
                assert all(each.durable for each in done)
            replies = await asyncio.gather(*(client.score(OTHER, name) for name in names))
            found.update({name: reply.nats.tobytes() for name, reply in zip(names, replies, strict=True)})

    settings = {"state_dir": str(tmp_path / "state"), "max_session_bytes": cap, "disk": Unsynced()}
    with running(text_bundle, **settings) as server, Client(server.endpoint) as client:
        use()
        status = client.status()
        assert len(status.sessions) + status.stored_sessions == 64
        assert status.text_bytes == len(status.sessions) * text_model.session_bytes <= cap
        figures = server.stats.figures().events
        assert figures["evict", "memory-cap"] > 64
        assert figures["restore", "returned"] > 64
    assert found == {name: expected(reference(text_model, *texts[name])) for name in names}


def test_a_cap_without_a_state_directory_refuses_the_next_session_only(text_bundle):
    with running(text_bundle, max_sessions=2) as server, Client(server.endpoint) as client:
        for name in ("one", "two"):
            client.absorb(TEXT, name)
        before = answers(client, "one", "two")
        with pytest.raises(TooManySessions, match="max_sessions is 2"):
            client.absorb(TEXT, "three")
        assert answers(client, "one", "two") == before
        assert set(sessions(client)) == {"one", "two"}
        client.reset("one")
        client.absorb(TEXT, "three")
        with pytest.raises(UnknownSession):
            client.score(OTHER, "one")


def test_what_cannot_go_to_disk_stays_in_memory(text_bundle, tmp_path):
    disk = Failing()
    settings = {"max_sessions": 1, "state_dir": str(tmp_path / "state"), "disk": disk}
    with running(text_bundle, **settings) as server, Client(server.endpoint) as client:
        disk.broken = True
        assert not client.absorb(TEXT, "one").durable
        before = answers(client, "one")
        with pytest.raises(TooManySessions, match="none can go to disk"):
            client.absorb(TEXT, "two")
        assert answers(client, "one") == before
        assert client.status().disk_error


def test_a_session_that_was_pushed_off_the_disk_is_saved_when_it_leaves_memory(text_bundle, tmp_path):
    settings = {"max_sessions": 3, "max_stored_streams": 2, "state_dir": str(tmp_path / "state")}
    with running(text_bundle, **settings) as server, Client(server.endpoint) as client:
        for name in ("a", "b", "c"):
            client.absorb(name + TEXT, name)
        assert not (tmp_path / "state" / "streams" / "default" / "a").exists()
        before = answers(client, "a")
        answers(client, "b", "c")
        client.absorb(TEXT, "d")
        assert "a" not in sessions(client)
        assert answers(client, "a") == before


def test_a_session_in_use_is_not_what_makes_room(text_bundle, tmp_path):
    host = hosting.load("default", BundleConfig(path=str(text_bundle)), Config(threads=1))
    told = []
    store = StateStore(tmp_path / "state", told.append, disk=Unsynced())
    saver = Saver(store)
    room = Sessions(max_sessions=1, max_bytes=1 << 30, tell=told.append, store=store, saver=saver)
    held = room.begin(host, "a")
    held.model.absorb(list(TEXT.encode()))
    assert room.admit(held)
    held.in_use += 1
    with pytest.raises(AllInUse):
        room.begin(host, "b")
    assert room.all() == [held]
    held.in_use -= 1
    new = room.begin(host, "b")
    assert [event.action for event in told] == ["evict"]
    with pytest.raises(AllInUse):  # what was begun has its room already
        room.begin(host, "c")
    room.leave(new)
    assert room.nbytes == 0
    assert expected(room.find(host, "a").model) == expected(held.model)
    saver.close()
    store.close()


# --- restarts -----------------------------------------------------------------------------------------


def test_kill_9_keeps_what_was_confirmed(text_bundle, text_model, tmp_path):
    names = [f"s{number}" for number in range(8)]
    with (
        daemon(text_bundle, "--state-dir", tmp_path / "state", "--threads", "1") as served,
        Client(served.endpoint) as client,
    ):
        for name in names:
            assert client.absorb(name + TEXT, name).durable
        before = answers(client, *names)
        served.stop(signal.SIGKILL)
    with (
        daemon(text_bundle, "--state-dir", tmp_path / "state", "--threads", "1") as served,
        Client(served.endpoint) as client,
    ):
        assert client.status().stored_sessions == 8
        assert (
            answers(client, *names)
            == before
            == {name: expected(reference(text_model, name + TEXT)) for name in names}
        )
        assert sessions(client)["s3"].restored.endswith(".state")
        assert served.stop() == 0


def test_kill_9_at_any_moment_leaves_a_whole_session(text_bundle, text_model, tmp_path):
    pieces = [f"{number} {TEXT}" for number in range(400)]
    confirmed = 0
    state = ("--state-dir", tmp_path / "state", "--threads", "1")
    for kill_after in (3, 11):
        with daemon(text_bundle, *state) as served:
            killer = threading.Timer(
                random.random() * 0.05, lambda: os.kill(served.process.pid, signal.SIGKILL)
            )
            with Client(served.endpoint) as client:
                try:
                    for number, piece in enumerate(pieces[confirmed:]):
                        if number == kill_after:
                            killer.start()
                        client.absorb(piece, "s")
                        confirmed += 1
                except errors.TtaError:
                    pass
            killer.join()
            served.wait()
        with (
            daemon(text_bundle, "--state-dir", tmp_path / "state", "--threads", "1") as served,
            Client(served.endpoint) as client,
        ):
            found = answers(client, "s")["s"]
            done = sessions(client)["s"].absorbed
            lengths = np.cumsum([len(piece) for piece in pieces]).tolist()
            count = lengths.index(done) + 1
            assert confirmed <= count <= confirmed + 1
            assert found == expected(reference(text_model, *pieces[:count]))
            confirmed = count
            served.stop()


def test_a_daemon_that_is_told_to_stop_does_not_wait_for_a_long_text(long_text_bundle, tmp_path):
    state = ("--state-dir", tmp_path / "state", "--threads", "1", "--drain-s", "0.2")
    with daemon(long_text_bundle, *state) as served, Client(served.endpoint) as client:
        client.absorb(TEXT, "s")
        stream = client.generate("abc", "s", max_tokens=LONG, absorb=True)
        next(stream)
        assert served.stop() == 0
        with pytest.raises(errors.TtaError):
            list(stream)
    with daemon(long_text_bundle, *state) as served, Client(served.endpoint) as client:
        assert client.score(OTHER, "s").before == 1 + len(TEXT) % CHUNK
        assert sessions(client)["s"].absorbed == len(TEXT)


def test_a_damaged_session_is_set_aside_and_the_others_are_there(text_bundle, tmp_path):
    state = tmp_path / "state"
    with running(text_bundle, state_dir=str(state)) as server, Client(server.endpoint) as client:
        for name in ("good", "bad"):
            client.absorb(TEXT, name)
        before = answers(client, "good")
    for slot in (state / "streams" / "default" / "bad").iterdir():
        data = bytearray(slot.read_bytes())
        data[-5] ^= 1
        slot.write_bytes(data)
    with running(text_bundle, state_dir=str(state)) as server, Client(server.endpoint) as client:
        assert answers(client, "good") == before
        with pytest.raises(UnknownSession):
            client.score(OTHER, "bad")
        assert "quarantine" in {event.action for event in client.events().events}
        assert client.absorb(TEXT, "bad").absorbed == len(TEXT)


def test_a_reset_session_is_gone_after_a_restart(text_bundle, tmp_path):
    with running(text_bundle, state_dir=str(tmp_path / "state")) as server, Client(server.endpoint) as client:
        client.absorb(TEXT, "s")
        assert client.reset("s").durable
        assert client.status().stored_sessions == 0
    with running(text_bundle, state_dir=str(tmp_path / "state")) as server, Client(server.endpoint) as client:
        assert client.status().stored_sessions == 0
        with pytest.raises(UnknownSession):
            client.score(OTHER, "s")


def test_a_reload_ends_the_sessions_of_another_model_and_keeps_those_of_the_same(
    text_bundle, long_text_bundle, tmp_path
):
    link = Link(tmp_path / "link", text_bundle)
    settings = {"state_dir": str(tmp_path / "state")}
    with running(link.path, **settings) as server, Client(server.endpoint, timeout_s=60.0) as client:
        client.absorb(TEXT, "s")
        before = answers(client, "s")
        same = client.reload()
        assert (same.changed, same.kept_streams, same.restarted_streams) == (False, 1, 0)
        assert answers(client, "s") == before
        link.point(long_text_bundle)
        other = client.reload()
        assert (other.changed, other.kept_streams, other.restarted_streams) == (True, 0, 1)
        with pytest.raises(UnknownSession):
            client.score(OTHER, "s")
        told = {(event.action, event.reason) for event in client.events().events}
        assert {("reset", "other-bundle"), ("quarantine", "state-of-other-bundle")} <= told
        images = tmp_path / "images"
        tiny_bundle.build(images)
        link.point(images)
        with pytest.raises(errors.WrongTask):
            client.reload()
        client.absorb(TEXT, "t")


def test_a_reload_ends_what_is_written_with_the_old_model(text_bundle, long_text_bundle, tmp_path):
    link = Link(tmp_path / "link", long_text_bundle)
    with running(link.path) as server, Client(server.endpoint, timeout_s=60.0) as client:
        stream = client.generate("abc", max_tokens=LONG)
        next(stream)
        link.point(text_bundle)
        with Client(server.endpoint, timeout_s=60.0) as other:
            assert other.reload().changed
        with pytest.raises(Cancelled, match="reloaded"):
            list(stream)


# --- out of a daemon and into another ------------------------------------------------------------------


def test_a_session_moves_to_another_daemon_to_the_last_bit(text_bundle, tmp_path):
    one, two = running(text_bundle), running(text_bundle, state_dir=str(tmp_path / "state"))
    with one as first, two as second, Client(first.endpoint) as here, Client(second.endpoint) as there:
        here.absorb(TEXT, "s")
        data = here.export_session("s")
        done = there.import_session("moved", data)
        assert (done.absorbed, done.durable) == (len(TEXT), True)
        assert done.theta_digest == sessions(here)["s"].theta_digest
        assert sessions(there)["moved"].restored == "import"
        for client, name in ((here, "s"), (there, "moved")):
            client.absorb(OTHER, name)
        assert answers(here, "s")["s"] == answers(there, "moved")["moved"]


def test_what_another_model_exported_is_refused_by_name(long_text_bundle, served, tmp_path):
    import json

    from bad_text_bundles import WORDS, tokenizer

    words = tmp_path / "words"
    tiny_text.build(words)
    tokenizer(json.dumps(WORDS).encode())(words)
    served.absorb(TEXT, "mine")
    before, listed = answers(served, "mine"), sessions(served)
    exported = {}
    for name, path, text in (("bundle", long_text_bundle, TEXT), ("tokenizer", words, "hello world")):
        with running(path) as server, Client(server.endpoint) as client:
            client.absorb(text, "s")
            exported[name] = client.export_session("s")
    good = served.export_session("mine")
    refusals = [
        (errors.StateOfOtherBundle, "new", exported["bundle"]),
        (errors.StateOfOtherTokenizer, "new", exported["tokenizer"]),
        (errors.StateMalformed, "new", good[:-1]),
        (errors.StateMalformed, "new", b""),
        (errors.StateTampered, "new", good[:-1] + bytes([good[-1] ^ 1])),
        (errors.TooLarge, "new", good + bytes(2 << 20)),
        (SessionExists, "mine", good),
    ]
    for error, name, data in refusals:
        with pytest.raises(error):
            served.import_session(name, data)
    assert answers(served, "mine") == before
    assert sessions(served) == listed


def test_an_export_that_claims_more_tokens_than_can_be_told_is_refused_and_not_kept(
    text_bundle, text_model, tmp_path
):
    state = tmp_path / "state"
    session = reference(text_model, TEXT)
    now = session.checkpoint
    forged = session.encode(Checkpoint(now.theta, now.state, (1 << 63) - 1, now.seed))
    with running(text_bundle, state_dir=str(state)) as server, Client(server.endpoint) as client:
        with pytest.raises(errors.StateMalformed, match="chunks"):
            client.import_session("forged", forged)
        assert sessions(client) == {}
        assert client.absorb(TEXT, "forged").durable
    with running(text_bundle, state_dir=str(state)) as server, Client(server.endpoint) as client:
        assert client.score(OTHER, "forged").before == 1 + len(TEXT) % CHUNK
        assert sessions(client)["forged"].absorbed == len(TEXT)


def test_scores_write_nothing(text_bundle, tmp_path):
    state = tmp_path / "state"
    with running(text_bundle, state_dir=str(state)) as server, Client(server.endpoint) as client:
        client.absorb(TEXT, "s")
        before = files(state / "streams")
        client.score(OTHER, "s")
        list(client.generate(OTHER, "s", max_tokens=3))
        assert files(state / "streams") == before
    assert files(state / "streams") == before
