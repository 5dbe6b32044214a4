"""Many streams on one daemon, of which few are in memory: each is answered as if it were alone, and memory holds."""

from __future__ import annotations

import numpy as np
import pytest

from running import PATIENCE_S, daemon
from tta_edge import doctor_memory
from tta_edge.adapt import Guards, Stream
from tta_edge.builtin import builtin_bundle
from tta_edge.client import Client
from tta_edge.config import Config
from tta_edge.streams.shifts import corrupt
from tta_edge.streams.sources import open_source
from tta_runtime import EngineOptions, Engines, Model

STREAMS, IN_MEMORY, ROUNDS, BATCH = 32, 8, 6, 32
SHIFTS = (
    "gaussian_noise",
    "impulse_noise",
    "defocus_blur",
    "contrast",
    "brightness",
    "fog",
    "pixelate",
    "shot_noise",
)


@pytest.fixture(scope="module")
def batches():
    """Stream -> its batches: another shift and severity, and other images, for each."""
    source = open_source("digits")
    images = source.read(np.arange(source.count))
    streams = {}
    for number in range(STREAMS):
        name, severity = SHIFTS[number % len(SHIFTS)], 2 + number // len(SHIFTS)
        chosen = np.random.default_rng(number).integers(0, source.count, ROUNDS * BATCH)
        shifted = corrupt(images[chosen], name, severity, seed=number)
        x = np.ascontiguousarray(shifted.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
        streams[f"{name}-{severity}"] = np.split(x, ROUNDS)
    return streams


@pytest.fixture(scope="module")
def expected(batches):
    """What each stream is answered by itself, in one go, with the daemon's guards: logits and theta's digest."""
    config = Config()
    engines = Engines.load(builtin_bundle(), methods=["tent"], options=EngineOptions(threads=1))
    guards = Guards(
        max_distance=config.max_distance,
        reset_every_steps=config.reset_every_steps,
        min_diversity=config.min_diversity,
        checkpoint_steps=config.checkpoint_steps,
    )
    answers = {}
    for name, parts in batches.items():
        stream = Stream(name, Model(engines, "tent"), guards)
        answers[name] = [(stream.answer(x).logits, stream.model.digest) for x in parts]
    return answers


def test_thirty_two_streams_under_a_cap_of_eight_are_each_answered_as_if_alone(batches, expected, tmp_path):
    arguments = ("--method", "tent", "--threads", "1", "--max-streams", str(IN_MEMORY))
    config = Config(method="tent", threads=1, max_streams=IN_MEMORY, state_dir=str(tmp_path / "state"))
    predicted = doctor_memory.predict_for(config, doctor_memory.measure(config, BATCH)).total
    with (
        daemon(*arguments, "--state-dir", config.state_dir) as running,
        Client(running.endpoint, timeout_s=PATIENCE_S) as client,
    ):
        for turn in range(ROUNDS):
            # Turn by turn, and another order in each: every stream goes to disk and comes back again and again.
            for name in np.random.default_rng(turn).permutation(list(batches)).tolist():
                reply = client.predict(batches[name][turn], stream=name)
                logits, digest = expected[name][turn]
                np.testing.assert_array_equal(reply.logits, logits)
                assert (reply.theta_digest, reply.adapted) == (digest, True)
        status = client.status()
        assert (len(status.streams), status.stored_streams) == (IN_MEMORY, STREAMS - IN_MEMORY)
        assert status.requests.failed == 0
        assert {each.samples for each in status.streams} == {BATCH}  # each came back for its last batch
        assert abs(status.rss_bytes - predicted) <= 0.1 * predicted, (status.rss_bytes, predicted)


def test_streams_differ_so_that_a_mix_up_would_show(expected):
    assert len({answers[-1][1] for answers in expected.values()}) == STREAMS
