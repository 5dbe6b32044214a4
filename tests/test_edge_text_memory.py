"""Memory of language models behind the daemon: who waits for it, who is refused, and what the disk is said to hold."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from contextlib import suppress

import numpy as np
import pytest
import torch

import tiny_text
from disks import Failing
from peers import coroutine
from running import running
from serving import Link, sessions, until
from tiny_text import BEGIN, CHUNK, CONTEXT, LONG, OTHER, TEXT
from tta_edge.client import Client
from tta_edge.client_async import AsyncClient
from tta_edge.errors import TooManySessions, UnknownSession
from tta_edge.hosting import pass_bytes
from tta_runtime import EngineOptions, TextModel, errors


def least(path):
    """Memory of a session and of the longest text, of a bundle."""
    found = TextModel.open(path, options=EngineOptions(threads=1))
    return found.session_bytes, pass_bytes(found, found.text.context)


def count(server, action, reason):
    return server.stats.figures().events.get((action, reason), 0)


def test_what_only_ones_own_session_leaves_no_room_for_is_refused_at_once(text_bundle):
    session_bytes, text_bytes = least(text_bundle)
    with (
        running(text_bundle, max_session_bytes=session_bytes + text_bytes) as server,
        Client(server.endpoint) as client,
    ):
        for name in ("a", "b"):
            client.absorb(TEXT, name)
        longest = "x" * (CONTEXT - 1 - len(TEXT) % CHUNK)
        with pytest.raises(TooManySessions, match="max_session_bytes"):
            client.score(longest, "a")
        assert client.score(OTHER, "a").bits > 0
        client.reset("b")
        assert client.score(longest, "a").bits > 0
        assert client.status().requests.open == 1  # this one


def test_who_waits_for_memory_lets_no_session_go_to_disk_in_vain(long_text_bundle, tmp_path):
    session_bytes, text_bytes = least(long_text_bundle)
    settings = {
        "max_session_bytes": text_bytes + 2 * session_bytes,
        "state_dir": str(tmp_path / "state"),
    }

    @coroutine
    async def check():
        async with AsyncClient(server.endpoint, timeout_s=60.0) as client:
            for name in ("a", "b"):
                await client.absorb(TEXT, name)
            async with client.generate("abc", max_tokens=LONG) as stream:
                await anext(stream)
                new = asyncio.create_task(client.absorb(TEXT * 999, "c"))
                waiting = [asyncio.create_task(client.score(OTHER, name)) for name in ("a", "b")]
                for _ in range(60):
                    await anext(stream)
                assert (await client.status()).requests.open == 5  # the text, those three, and this one
                assert count(server, "evict", "memory-cap") == 0
            assert all(score.bits > 0 for score in await asyncio.gather(*waiting))
            assert (await new).absorbed == len(TEXT) * 999

    with running(long_text_bundle, **settings) as server:
        check()


def test_a_large_text_waits_for_those_before_it_only(long_text_bundle):
    session_bytes, text_bytes = least(long_text_bundle)
    done = []

    @coroutine
    async def check():
        async with AsyncClient(server.endpoint, timeout_s=60.0) as client:

            async def score(name, text):
                await client.score(text)
                done.append(name)

            async with client.generate("abc", max_tokens=LONG // 2) as stream:
                await anext(stream)
                tasks = [asyncio.create_task(score("large", "x" * (LONG - 1)))]
                tasks += [asyncio.create_task(score("small", OTHER)) for _ in range(4)]
                for _ in range(60):
                    await anext(stream)
            await asyncio.gather(*tasks)

    with running(long_text_bundle, max_session_bytes=session_bytes + text_bytes) as server:
        check()
    assert done == ["large", *["small"] * 4]


def test_a_text_that_is_absorbed_counts_by_its_bytes_not_by_its_characters(long_text_bundle):
    text = "€" * 20_000

    @coroutine
    async def check():
        async with AsyncClient(server.endpoint, timeout_s=60.0) as client:
            absorbing = asyncio.create_task(client.absorb(text, "a"))
            while not (held := (await client.status()).text_bytes):
                assert not absorbing.done()
            assert held > 12 * len(text.encode())
            absorbing.cancel()

    with running(long_text_bundle) as server:
        check()


def test_whoever_sleeps_is_cancelled_like_others_and_the_next_goes_on(long_text_bundle):
    session_bytes, text_bytes = least(long_text_bundle)

    @coroutine
    async def check():
        async with (
            AsyncClient(server.endpoint, timeout_s=60.0) as client,
            client.generate("abc", max_tokens=LONG // 2) as first,
        ):
            await anext(first)
            async with client.generate("abc", max_tokens=LONG) as asleep:
                beginning = asyncio.create_task(anext(asleep))
                while (await client.status()).requests.open < 3:  # both texts and this one
                    pass
                behind = asyncio.create_task(client.score(OTHER))
                for _ in range(20):
                    await anext(first)
                assert not beginning.done()
                assert not behind.done()
                beginning.cancel()
                await asyncio.gather(beginning, return_exceptions=True)
            assert (await behind).bits > 0  # while the first text goes on
            await anext(first)
            assert (await client.status()).requests.failures == {"cancelled": 1}

    with running(long_text_bundle, max_session_bytes=session_bytes + text_bytes) as server:
        check()


def test_who_sleeps_for_a_client_that_has_gone_takes_no_place(long_text_bundle):
    session_bytes, text_bytes = least(long_text_bundle)
    with (
        running(long_text_bundle, max_session_bytes=session_bytes + text_bytes) as server,
        Client(server.endpoint) as two,
        Client(server.endpoint) as watcher,
    ):
        one = Client(server.endpoint)
        writing = [two.generate("abc", max_tokens=LONG // 2), one.generate("abc", max_tokens=LONG // 4)]
        for stream in writing:
            next(stream)
        first = two.generate("abc", max_tokens=LONG)
        threads = [threading.Thread(target=next_or_closed, args=(first,))]
        threads[0].start()
        until(lambda: watcher.status().requests.open, lambda open_: open_ == 4)
        sleeping = [one.generate("abc", max_tokens=LONG) for _ in range(3)]
        threads += [threading.Thread(target=next_or_closed, args=(stream,)) for stream in sleeping]
        for thread in threads[1:]:
            thread.start()
        until(lambda: watcher.status().requests.open, lambda open_: open_ == 7)
        one.close()
        until(lambda: watcher.status().requests.open, lambda open_: open_ == 3)
        assert next(writing[0])  # so what waits first still does
        for stream in (writing[0], first):
            stream.close()
        for thread in threads:
            thread.join()


def next_or_closed(stream):
    with suppress(errors.TtaError):
        next(stream, "")


def test_a_reset_holds_also_where_the_disk_could_not_forget(text_bundle, text_model, tmp_path):
    disk = Failing()
    settings = {"state_dir": str(tmp_path / "state"), "disk": disk}
    with running(text_bundle, **settings) as server, Client(server.endpoint) as client:
        assert client.absorb(TEXT, "a").durable
        disk.broken = True
        assert not client.reset("a").durable
        with pytest.raises(UnknownSession):
            client.score(OTHER, "a")
        assert client.status().stored_sessions == 0
        again = client.absorb(OTHER, "a")
        assert (again.absorbed, again.durable) == (len(OTHER), False)
        disk.broken = False
        until(lambda: sessions(client)["a"].durable, bool)
    with running(text_bundle, state_dir=str(tmp_path / "state")) as server, Client(server.endpoint) as client:
        session = text_model.session()
        session.absorb(list(OTHER.encode()))
        expected = session.score(list(OTHER.encode())).nats.astype(np.float32)
        np.testing.assert_array_equal(client.score(OTHER, "a").nats, expected)


def test_a_reset_that_the_disk_could_not_forget_stays_one_after_it_has(text_bundle, tmp_path):
    disk = Failing()
    settings = {"state_dir": str(tmp_path / "state"), "disk": disk}
    with running(text_bundle, **settings) as server, Client(server.endpoint) as client:
        client.absorb(TEXT, "a")
        disk.broken = True
        client.reset("a")
        disk.broken = False
        until(lambda: client.status().disk_error, lambda error: not error)
        with pytest.raises(UnknownSession):
            client.score(OTHER, "a")
        assert not (tmp_path / "state" / "streams" / "default" / "a").exists()


def test_durable_is_what_the_disk_holds(text_bundle, tmp_path):
    settings = {"max_sessions": 3, "max_stored_streams": 2, "state_dir": str(tmp_path / "state")}
    with running(text_bundle, **settings) as server, Client(server.endpoint) as client:
        for name in ("a", "b"):
            client.absorb(TEXT, name)
        client.score(OTHER, "a")  # so `b` is the one that was not used for the longest
        client.absorb(TEXT, "c")
        durable = {name: session.durable for name, session in sessions(client).items()}
        assert durable == {"a": True, "b": False, "c": True}
    with running(text_bundle, **settings) as server, Client(server.endpoint) as client:
        for name in ("a", "c"):  # at the end the two that were used last are kept
            client.score(OTHER, name)


def test_a_session_that_has_ended_with_its_model_is_no_reason_to_refuse_an_import(
    text_bundle, long_text_bundle, tmp_path
):
    with running(long_text_bundle) as server, Client(server.endpoint) as client:
        client.absorb(TEXT, "there")
        data = client.export_session("there")
    link = Link(tmp_path / "link", text_bundle)
    with (
        running(link.path, state_dir=str(tmp_path / "state")) as server,
        Client(server.endpoint, timeout_s=30.0) as client,
    ):
        client.absorb(TEXT, "a")
        link.point(long_text_bundle)
        assert client.reload().restarted_streams == 1
        assert client.import_session("a", data).absorbed == len(TEXT)
        assert client.score(OTHER, "a").bits > 0


def test_a_reloaded_model_leaves_memory_at_once(text_bundle, long_text_bundle, tmp_path):
    link = Link(tmp_path / "link", text_bundle)
    with running(link.path) as server, Client(server.endpoint, timeout_s=30.0) as client:
        client.score(OTHER)
        old = weakref.ref(server._responder._served.host("").text)
        link.point(long_text_bundle)
        assert client.reload().changed
        client.status()
        gc.collect()
        assert old() is None


def test_a_session_that_went_on_keeps_nothing_of_before(text_model):
    session = text_model.session()
    session.absorb(list(TEXT.encode()))
    session.score(list(OTHER.encode()))
    before = weakref.ref(session.checkpoint)
    assert session.digest
    session.absorb(list(TEXT.encode()))
    gc.collect()
    assert before() is None


def test_a_text_that_ends_before_it_has_begun_leaves_the_session_as_it_was(text_model, tmp_path):
    zero = torch.zeros(text_model.manifest.theta.size)
    first = int(tiny_text.eager_logits([BEGIN, *b"abc"], zero)[-1].argmax())
    tiny_text.build(tmp_path / "bundle", end=first)
    with running(tmp_path / "bundle") as server, Client(server.endpoint) as client:
        client.absorb("abc", "s")  # less than a chunk: it stands before the text as it is
        stream = client.generate("", "s", max_tokens=5, temperature=0, absorb=True)
        assert "".join(stream) == ""
        assert (stream.end.reason, stream.end.tokens, stream.end.absorbed) == ("end", 0, True)
        assert sessions(client)["s"].absorbed == 3


def test_a_file_too_large_for_a_session_is_said_to_be_none(text_bundle, text_model):
    with running(text_bundle) as server, Client(server.endpoint) as client:
        with pytest.raises(errors.TooLarge, match="no session of this bundle"):
            client.import_session("a", bytes(text_model.max_state_bytes + 1))
        assert sessions(client) == {}
