"""A bundle is replaced while it is served: no request is lost, streams go on or start anew, damage changes nothing."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from contextlib import contextmanager

import numpy as np
import pytest

import serving
import tiny_bundle
from running import running
from serving import PATIENCE_S, Link, Pipe, steps, stream, until
from tta_edge import errors, wire
from tta_edge.client import Client
from tta_edge.config import BundleConfig
from tta_runtime import EngineOptions, Model
from tta_runtime import errors as runtime_errors
from tta_runtime.errors import TtaError

ONE_THREAD = EngineOptions(threads=1)
X, _ = tiny_bundle.samples(16, seed=1, shift=1.0)


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    root = tmp_path_factory.mktemp("variants")
    tiny_bundle.build(root / "tiny")
    for make in (serving.same_source, serving.other_source, serving.other_input):
        make(root / make.__name__)
    for name, file in (("damaged", "step.tent.onnx"), ("no_manifest", "manifest.json")):
        shutil.copytree(root / "tiny", root / name)
        data = (root / name / file).read_bytes()
        (root / name / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name == "damaged" else b"{")
    return root


@pytest.fixture
def link(variants, tmp_path):
    return Link(tmp_path / "current", variants / "tiny")


@contextmanager
def serves(link, **settings):
    with (
        running(link.path, **settings) as server,
        Client(server.endpoint, timeout_s=PATIENCE_S) as client,
    ):
        yield server, client


def told(client):
    return [(event.action, event.reason) for event in client.events().events]


def test_no_request_is_lost_while_the_bundle_is_replaced_again_and_again(link, variants):
    """Clients send without a pause; a stream's answers are those of a model that nobody ever replaced."""
    wrong, sent = [], [0] * 4
    ending = threading.Event()

    def hammer(number):
        model = Model.open(variants / "tiny", method="tent", options=ONE_THREAD)
        batch = tiny_bundle.samples(16, seed=number, shift=1.0)[0]
        with Client(server.endpoint, timeout_s=PATIENCE_S) as mine:
            while not ending.is_set():
                try:
                    reply = mine.predict(batch, stream=f"s{number}")
                except TtaError as error:
                    wrong.append(repr(error))
                    return
                step = model.adapt(batch)
                sent[number] += 1
                if not np.array_equal(reply.logits, step.logits) or reply.theta_digest != model.digest:
                    wrong.append(f"stream {number} after {sent[number]} steps")
                    return

    with serves(link, reset_every_steps=0, max_distance=1e9, min_diversity=0) as (server, client):
        threads = [threading.Thread(target=hammer, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for turn in range(10):
            before = list(sent)
            link.point(variants / ("same_source", "tiny")[turn % 2])
            done = client.reload()
            assert (done.changed, done.restarted_streams) == (True, 0)
            until(
                lambda before=before: (client.info(), all(b < s for b, s in zip(before, sent, strict=True)))[
                    1
                ]
            )
        ending.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert wrong == []
        assert server.stats.figures().refused == {}
        status = client.status()
        assert status.bundles[0].loads == 11
        assert {each.id: each.steps for each in status.streams if each.id != "default"} == {
            f"s{number}": sent[number] for number in range(4)
        }


def test_a_new_bundle_of_the_same_source_keeps_every_stream_bit_for_bit(link, variants, tmp_path):
    with serves(link, state_dir=str(tmp_path / "state"), checkpoint_steps=1) as (_, client):
        for name in ("a", "b"):
            client.predict(X, stream=name)
        client.adapt(False, "b")
        before = client.status()
        link.point(variants / "same_source")
        done = client.reload()
        assert (done.changed, done.kept_streams, done.restarted_streams) == (True, 3, 0)
        after = client.status()
        for one, other in zip(before.streams, after.streams, strict=True):
            assert (one.id, one.theta_digest, one.steps, one.samples, one.state, one.events) == (
                other.id, other.theta_digest, other.steps, other.samples, other.state, other.events
            )  # fmt: skip
        assert after.bundles[0].digest == done.bundle_digest != before.bundles[0].digest
        model = Model.open(variants / "same_source", method="tent", options=ONE_THREAD)
        model.adapt(X)
        np.testing.assert_array_equal(client.predict(X, stream="a").logits, model.adapt(X).logits)
        assert client.rollback("a").steps == 2  # the checkpoints came along
        assert told(client)[-2:] == [("reload", "requested"), ("rollback", "requested")]


def test_the_same_bundle_again_keeps_its_engines(link):
    with serves(link) as (server, client):
        client.predict(X)
        engines = server._responder._served.host("default").engines
        before = stream(client)
        done = client.reload()
        assert (done.changed, done.kept_streams) == (False, 1)
        assert server._responder._served.host("default").engines is engines
        assert stream(client) == before
        assert client.status().bundles[0].loads == 2


@pytest.mark.parametrize("policy", ["inline", "always"])
def test_the_engines_of_the_old_bundle_are_gone_afterwards(link, variants, policy):
    with serves(link, policy=policy, step_batch=16) as (server, client):
        client.predict(X)
        steps(client, 1)
        gone = threading.Event()
        weakref.finalize(server._responder._served.host("default").engines, gone.set)
        link.point(variants / "same_source")
        client.reload()
        client.info()  # the answering thread has turned to something else
        gc.collect()
        assert gone.wait(PATIENCE_S)


def test_streams_of_other_weights_start_anew_and_that_is_told(link, variants):
    with serves(link) as (_, client):
        client.predict(X, stream="a")
        client.adapt(False, "a")
        link.point(variants / "other_source")
        done = client.reload()
        assert (done.changed, done.kept_streams, done.restarted_streams) == (True, 0, 2)
        found = stream(client, "a")
        source = Model.open(variants / "other_source", options=ONE_THREAD)
        assert (found.steps, found.theta_digest, found.state) == (0, source.digest, "off")
        np.testing.assert_array_equal(client.predict(X, stream="a").logits, source.predict(X).logits)
        assert told(client)[-3:] == [("reset", "other-bundle")] * 2 + [("reload", "requested")]


def test_a_bundle_with_another_input_is_served_and_what_waits_is_never_mixed(link, variants):
    with serves(link, policy="always", step_batch=32) as (server, client):
        client.predict(X)
        assert stream(client).window == 16
        link.point(variants / "other_input")
        client.reload()
        assert (stream(client).window, server.stats.figures().dropped) == (0, 16)
        with pytest.raises(runtime_errors.WrongShape):
            client.predict(X)
        wide = np.ones((32, 9), np.float32)
        model = Model.open(variants / "other_input", options=ONE_THREAD)
        np.testing.assert_array_equal(client.predict(wide).logits, model.predict(wide).logits)
        model.adapt(wide)
        assert steps(client, 1).theta_digest == model.digest
        assert client.info().input.shape == ["batch", 9]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("damaged", runtime_errors.FileTampered),
        ("no_manifest", runtime_errors.ManifestMalformed),
        ("nowhere", runtime_errors.ManifestMissing),
    ],
)
def test_a_damaged_bundle_is_refused_by_name_and_the_old_one_goes_on(link, variants, variant, expected):
    model = Model.open(variants / "tiny", method="tent", options=ONE_THREAD)
    with serves(link) as (_, client):
        model.adapt(X)
        client.predict(X)
        before = client.status()
        link.point(variants / variant)
        for _ in range(2):  # the second one is not told that the first is under way
            with pytest.raises(expected):
                client.reload()
        after = client.status()
        assert (after.bundles, after.streams) == (before.bundles, before.streams)
        assert told(client)[-2:] == [("reload", "bundle-refused")] * 2
        np.testing.assert_array_equal(client.predict(X).logits, model.adapt(X).logits)
        link.point(variants / "same_source")
        assert client.reload().kept_streams == 1


def test_a_method_that_the_new_bundle_lacks_is_refused(link, variants, tmp_path):
    lacking = tmp_path / "lacking"
    tiny_bundle.build(lacking)
    form = {**serving.manifest(lacking)["methods"]}
    del form["teacher"]
    graphs = {
        key: graph for key, graph in serving.manifest(lacking)["graphs"].items() if key != "step.teacher"
    }
    (lacking / "step.teacher.onnx").unlink()
    serving.reseal(lacking, methods=form, graphs=graphs)
    with serves(link, method="teacher") as (_, client):
        client.predict(X)
        before = stream(client)
        link.point(lacking)
        with pytest.raises(runtime_errors.UnknownMethod):
            client.reload()
        assert stream(client) == before


def test_a_second_reload_of_a_bundle_is_refused_while_the_first_is_under_way(link, variants):
    busy = np.zeros((60_000, 8), np.float32)
    with (
        serves(link, max_batch=60_000, bundles={"other": BundleConfig(path=str(variants / "tiny"))}) as (
            server,
            client,
        ),
        Pipe(server.endpoint) as pipe,
    ):
        pipe.send(1, busy, adapt=False)  # so that the reloads wait together
        link.point(variants / "same_source")
        for number, name in ((2, ""), (3, "default"), (4, "other")):
            pipe.socket.send_multipart(wire.encode(wire.Reload(id=number, bundle=name)))
        replies = {number: each.message for number, each in pipe.replies(4).items()}
        assert isinstance(replies[2], wire.ReloadDone)
        assert replies[3].code == errors.ReloadUnderWay.code
        assert isinstance(replies[4], wire.ReloadDone)  # another bundle does not wait
        assert client.reload().changed is False


def test_a_reload_of_a_bundle_that_is_not_served(link):
    with serves(link) as (_, client):
        with pytest.raises(errors.UnknownBundle, match="did you mean `default`"):
            client.reload("defualt")
        assert client.predict(X).adapted


def test_hangup_reads_every_bundle_again(link, variants):
    with serves(link, bundles={"other": BundleConfig(path=str(variants / "tiny"))}) as (server, client):
        link.point(variants / "same_source")
        server.reload_all()
        loads = until(
            lambda: {each.name: each.loads for each in client.status().bundles},
            lambda found: min(found.values()) == 2,
        )
        assert set(loads) == {"default", "other"}
