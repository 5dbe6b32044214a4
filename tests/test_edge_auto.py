"""Method auto inside a stream and inside the daemon: what it steps on, what it refuses, what it tells."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import serving
from exported import options
from networks import CLASSES, NETWORKS, SIZE
from running import running
from tta_edge.adapt import STANDARD, Answer, Guards, Stream
from tta_edge.auto import SETTLED
from tta_edge.client import Client
from tta_edge.config import BundleConfig, Config
from tta_edge.doctor_bundle import check_bundle
from tta_edge.evaluate import Plan, evaluate
from tta_edge.events import Event, Reason
from tta_edge.gallery import Shelf
from tta_edge.status_view import state
from tta_edge.streams.sources import open_source
from tta_exporters.build import build
from tta_runtime import Bundle, Engines, Limits, Model
from tta_runtime.checks import Check, Verdict
from tta_runtime.errors import EngineFailed, NonFinite, StateError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def labelled(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Smooth scenes in 0..1, all different, three tenths of each the pattern of its class."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(0).random((CLASSES, 3, SIZE // 4, SIZE // 4), dtype=np.float32)
    y = rng.integers(0, CLASSES, count)
    coarse = 0.3 * patterns[y] + 0.7 * rng.random(patterns[y].shape, dtype=np.float32)
    return np.ascontiguousarray(coarse.repeat(4, axis=2).repeat(4, axis=3)), y


def images(count: int, seed: int) -> NDArray[np.float32]:
    return labelled(count, seed)[0]


def shifted(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Less contrast, more light."""
    return (0.4 + 0.4 * x).astype(np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual network that knows these scenes."""
    network = NETWORKS["resnet"]()
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for seed in range(60):
        x, y = labelled(64, seed)
        loss = F.cross_entropy(network(torch.from_numpy(x)), torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for seed in range(100, 140):  # running statistics lag behind weights that learn
            network(torch.from_numpy(images(64, seed)))
    network.eval()
    wanted = dataclasses.replace(
        options("resnet", ("source", "tent", "auto")), source_images=torch.from_numpy(images(320, 999))
    )
    return build(network, wanted, tmp_path_factory.mktemp("auto") / "bundle").path


@pytest.fixture(scope="module")
def engines(bundle: Path) -> Engines:
    return Engines.load(Bundle.open(bundle), methods=["auto"])


Made = tuple[Stream, list[Event]]


def made(engines: Engines, guards: Guards = STANDARD, *, shelf: Shelf | None = None) -> Made:
    events: list[Event] = []
    return Stream("s", Model(engines, "auto"), guards, tell=events.append, shelf=shelf), events


def told(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.action, event.reason) for event in events]


def play(stream: Stream, x: NDArray[np.float32], batch: int = 32) -> list[Answer]:
    return [stream.answer(x[start : start + batch]) for start in range(0, len(x), batch)]


# ------------------------------------------------------------------------------------------ one stream


def test_images_like_the_source_leave_the_source(engines: Engines) -> None:
    stream, events = made(engines)
    x = images(512, 1000)
    answers = play(stream, x)
    np.testing.assert_array_equal(
        np.concatenate([answer.logits for answer in answers]),
        np.concatenate([stream.model.predict(x[s : s + 32], source=True).logits for s in range(0, 512, 32)]),
    )
    assert stream.model.distance == 0
    assert stream.auto is not None
    assert stream.auto.held
    assert told(events) == [("wake", "shift"), ("hold", "no-gain")]


def test_a_shift_wakes_it_and_theta_moves_towards_what_undoes_it(engines: Engines) -> None:
    stream, events = made(engines)
    x = images(768, 1001)
    play(stream, x[:512])
    before = stream.model.steps
    assert stream.auto is not None
    assert stream.auto.resting
    first, *_ = play(stream, shifted(x[512:]), batch=64)
    assert first.adapted, "the batch that brings the shift is answered by a theta that knows it"
    assert not stream.auto.held
    assert stream.model.distance > 0.05
    assert stream.model.steps > before
    assert ("wake", "shift") in told(events)[1:]
    assert told(events)[-1] == ("release", "no-gain") or ("release", "no-gain") in told(events)
    same = x[512:]
    want = stream.model.predict(same, source=True).logits
    source = stream.model.predict(shifted(same), source=True).logits
    got = stream.model.predict(shifted(same)).logits
    assert np.abs(got - want).mean() < 0.5 * np.abs(source - want).mean()


def test_it_comes_back_to_the_source_with_the_source_s_images(engines: Engines) -> None:
    stream, _ = made(engines)
    x = images(768, 1002)
    play(stream, shifted(x[:384]))
    assert stream.model.distance > 0
    play(stream, x[384:])
    assert stream.model.distance == 0


def test_single_frames_are_enough(engines: Engines) -> None:
    stream, _ = made(engines)
    answers = play(stream, shifted(images(64, 1003)), batch=1)
    assert [answer.adapted for answer in answers].index(True) == 30
    assert stream.model.distance > 0


def test_it_rests_when_it_has_settled(engines: Engines) -> None:
    stream, _ = made(engines)
    play(stream, shifted(images(2048, 1004)), batch=64)
    assert stream.auto is not None
    assert stream.auto.resting
    assert stream.model.steps <= SETTLED + 2


def test_black_frames_and_a_frozen_frame_change_nothing(engines: Engines) -> None:
    stream, _ = made(engines)
    x = shifted(images(512, 1005))
    play(stream, x)
    assert stream.auto is not None
    before = stream.model.digest, len(stream.auto.gallery), stream.auto.shift
    play(stream, np.zeros_like(x[:256]))
    play(stream, np.repeat(x[-1:], 256, axis=0))
    assert (stream.model.digest, len(stream.auto.gallery), stream.auto.shift) == before


@pytest.mark.parametrize("share", [0.05, 0.2, 0.35])
def test_what_looks_unlike_the_rest_does_not_move_the_rest(engines: Engines, share: float) -> None:
    stream, _ = made(engines)
    x = images(512, 1006)
    hostile = np.random.default_rng(0).random(512) < share
    x[hostile] = np.random.default_rng(1).integers(0, 2, x[hostile].shape)
    play(stream, x)
    assert stream.model.distance == 0


def test_adapt_false_sees_nothing(engines: Engines) -> None:
    stream, events = made(engines)
    x = shifted(images(64, 1007))
    answer = stream.answer(x, adapt=False)
    np.testing.assert_array_equal(answer.logits, stream.model.predict(x, source=True).logits)
    assert stream.auto is not None
    assert (len(stream.auto.gallery), stream.model.steps, events) == (0, 0, [])


def test_serve_collects_only_what_it_may(engines: Engines) -> None:
    stream, _ = made(engines)
    x = shifted(images(64, 1008))
    assert stream.auto is not None
    stream.serve(x)
    assert len(stream.auto.gallery) == 0
    assert not stream.wants_step
    stream.serve(x, collect=True)
    assert len(stream.auto.gallery) == 64
    assert stream.wants_step
    assert stream.step_on_window() is True
    assert not stream.wants_step
    stream.switch(False)
    assert len(stream.auto.gallery) == 0
    stream.serve(x, collect=True)
    assert len(stream.auto.gallery) == 0
    assert stream.step_on_window() is None


def test_a_step_is_not_committed_when_the_switch_went_off_meanwhile(engines: Engines) -> None:
    stream, _ = made(engines)
    stream.serve(shifted(images(64, 1009)), collect=True)
    assert stream.step_on_window(allowed=lambda: False) is None
    assert stream.model.steps == 0


def test_the_ball_refuses_what_goes_too_far(engines: Engines) -> None:
    stream, events = made(engines, Guards(max_distance=1e-3, reset_every_steps=0))
    x = shifted(images(64, 1010))
    answer = stream.answer(x)
    assert (answer.adapted, answer.refused) == (False, True)
    assert ("refuse", "ball") in told(events)
    np.testing.assert_array_equal(answer.logits, stream.model.predict(x, source=True).logits)
    assert stream.model.distance == 0


def test_periodic_resets_are_not_for_steps_that_begin_at_the_source(engines: Engines) -> None:
    stream, events = made(engines, Guards(max_distance=1.0, reset_every_steps=2))
    play(stream, shifted(images(512, 1011)))
    assert stream.model.steps > 2
    assert ("reset", "periodic") not in told(events)


def test_an_engine_that_fails_leaves_everything(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, events = made(engines)

    def fail(*_: Any, **__: Any) -> None:
        raise EngineFailed("out of memory", "add some")

    monkeypatch.setattr(stream.model, "step", fail)
    x = shifted(images(64, 1012))
    answer = stream.answer(x)
    assert (answer.adapted, answer.refused) == (False, True)
    assert told(events)[-1] == ("refuse", "engine-failed")
    np.testing.assert_array_equal(answer.logits, stream.model.predict(x, source=True).logits)


def test_a_batch_with_nan_is_refused_and_leaves_no_trace(engines: Engines) -> None:
    stream, events = made(engines)
    x = images(32, 1013)
    x[3, 0, 0, 0] = np.nan
    with pytest.raises(NonFinite):
        stream.answer(x)
    assert stream.auto is not None
    assert (len(stream.auto.gallery), stream.samples, events) == (0, 0, [])


def test_reset_and_rollback_begin_anew(engines: Engines) -> None:
    stream, _ = made(engines)
    assert stream.auto is not None
    for back in (stream.reset, stream.roll_back):
        play(stream, shifted(images(256, 1014)))
        assert len(stream.auto.gallery) > 0
        back()
        assert (len(stream.auto.gallery), stream.auto.held, stream.model.distance) == (0, False, 0)
        assert not stream.auto.resting


def test_a_stream_that_comes_back_goes_on_from_its_theta(engines: Engines) -> None:
    stream, _ = made(engines, Guards(max_distance=1.0, reset_every_steps=0, checkpoint_steps=1))
    play(stream, shifted(images(256, 1015)))
    data = stream.model.encode(stream.model.checkpoint, notes=stream.notes())
    other, _ = made(engines)
    checkpoint, _, notes = other.model.decode(data)
    other.resume(checkpoint, notes, before=None, restored="slot")
    assert other.model.digest == stream.model.digest
    with pytest.raises(StateError):
        other.model.decode(data[:-1])


def test_little_memory_means_a_small_window_and_none_means_no_step(engines: Engines) -> None:
    sample = 4 * 3 * SIZE * SIZE
    small, _ = made(engines, shelf=Shelf(40 * sample))
    play(small, shifted(images(256, 1016)))
    assert small.auto is not None
    assert len(small.auto.gallery) == 40
    assert small.model.steps > 0
    none, _ = made(engines, shelf=Shelf(8 * sample))
    play(none, shifted(images(256, 1016)))
    assert none.model.steps == 0


@pytest.mark.parametrize("limits", [Limits(max_batch=40), Limits(max_bytes=40 * 4 * 3 * SIZE * SIZE)])
def test_the_window_is_no_larger_than_a_request_may_be(engines: Engines, limits: Limits) -> None:
    stream = Stream("s", Model(engines, "auto", limits=limits), STANDARD)
    play(stream, shifted(images(256, 1024)))
    assert stream.auto is not None
    assert len(stream.auto.gallery) == 40
    assert stream.model.distance > 0


def test_a_collapse_rolls_back_and_the_batch_is_answered(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, events = made(engines)
    x = shifted(images(320, 1025))
    play(stream, x[:256])
    monkeypatch.setattr(stream.monitor, "observe", lambda *_: "all in one class")
    answer = stream.answer(x[256:])
    assert answer.reason is Reason.COLLAPSE
    assert ("rollback", "collapse") in told(events)
    assert answer.logits.shape == (64, CLASSES)
    assert stream.auto is not None
    assert len(stream.auto.gallery) == 0
    assert stream.model.distance == 0


def test_streams_share_the_memory_and_the_quiet_one_gives_way(engines: Engines) -> None:
    shelf = Shelf(80 * 4 * 3 * SIZE * SIZE)
    quiet, busy = made(engines, shelf=shelf)[0], made(engines, shelf=shelf)[0]
    assert quiet.auto is not None
    assert busy.auto is not None
    quiet.serve(images(64, 1017), collect=True)
    busy.serve(images(64, 1018), collect=True)
    assert (len(quiet.auto.gallery), len(busy.auto.gallery)) == (0, 64)
    assert quiet.step_on_window() is None, "its samples are gone"
    assert shelf.nbytes <= 80 * 4 * 3 * SIZE * SIZE
    busy.close()
    assert shelf.nbytes == 0


def test_images_of_another_size_begin_a_new_window(engines: Engines) -> None:
    stream, _ = made(engines)
    assert stream.auto is not None
    stream.serve(images(32, 1019), collect=True)
    with pytest.raises(Exception, match="x"):
        stream.serve(np.zeros((4, 3, SIZE + 1, SIZE), np.float32), collect=True)
    assert len(stream.auto.gallery) == 32


# ------------------------------------------------------------------------------------------ the daemon


@pytest.mark.parametrize("policy", ["inline", "always", "budget"])
def test_the_daemon_serves_it_unless_told_otherwise_and_says_what_it_decides(
    bundle: Path, policy: str
) -> None:
    x = shifted(images(512, 1020))
    with running(bundle, policy=policy, budget=1.0) as server, Client(server.endpoint) as client:
        assert client.info().method == "auto"
        for start in range(0, 512, 8):
            reply = client.predict(x[start : start + 8], stream="cam")
        serving.until(lambda: serving.stream(client, "cam").steps, lambda steps: steps > 0)
        stream = serving.stream(client, "cam")
        assert stream.method == "auto"
        assert stream.steps > 0
        assert stream.distance > 0
        assert stream.window > 100
        assert stream.auto is not None
        assert stream.auto.mode in ("awake", "resting")
        assert stream.auto.gain is not None
        assert stream.auto.gain > 0
        assert stream.auto.share is not None
        assert 0 < stream.auto.share <= 1
        assert stream.events["shift"] >= 1
        assert state(stream).plain == f"auto: {stream.auto.mode}"
        page = server.exposition().decode()
        assert 'tta_events_total{action="wake",reason="shift"}' in page
        assert reply.logits.shape == (8, 7)
        assert {event.action for event in client.events(50).events} >= {"wake"}


def test_switched_off_it_keeps_no_samples(bundle: Path) -> None:
    with running(bundle) as server, Client(server.endpoint) as client:
        client.predict(images(8, 1021), stream="cam")
        client.adapt(False)
        client.predict(images(8, 1022), stream="cam")
        assert (serving.stream(client, "cam").window, serving.stream(client, "cam").state) == (0, "off")


def test_evaluate_plays_it_as_the_daemon_does(bundle: Path, tmp_path: Path) -> None:
    x = (images(256, 1023).transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    model = Model.open(bundle, method="source")
    y = model.predict(images(256, 1023)).logits.argmax(1)
    np.savez(tmp_path / "test.npz", x=x, y=y)
    plan = Plan(open_source(f"npz:{tmp_path / 'test.npz'}"), (None,), ["source", "auto"], batch=32)
    source, auto = evaluate(bundle, plan).rows
    np.testing.assert_array_equal(source.wrong, auto.wrong)
    assert auto.adapted > 0


def test_the_doctor_steps_on_a_window_and_warns_where_none_fits(bundle: Path) -> None:
    def words(**settings: int) -> dict[str, Check]:
        checks, _ = check_bundle("default", BundleConfig(path=str(bundle)), Config(threads=1, **settings), 1)
        return {check.name.split()[0]: check for check in checks}

    good = words()
    assert {name: check.verdict for name, check in good.items()} == dict.fromkeys(good, Verdict.OK)
    assert "128 samples" in good["step"].text
    assert "requests of any size" in good["batches"].text
    assert "holds 10 samples" in words(max_window_bytes=10 * 4 * 3 * SIZE * SIZE)["batches"].text
    assert words(max_window_bytes=10 * 4 * 3 * SIZE * SIZE)["batches"].verdict is Verdict.WARN
