"""What arrives in the streams of the suite: each generator, and every stream of the catalogue."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_edge.suite import order as orders
from tta_edge.suite.catalogue import BATCH, SCALES, chosen, limited, scale_of, streams
from tta_edge.suite.errors import TooFewImages, UnknownStreamName, UnknownSuite
from tta_edge.suite.order import NATURAL, Kind

CLASSES = 5
seeds = st.integers(0, 2**32)


def labels_of(count, classes=CLASSES, seed=0):
    return np.random.default_rng(seed).integers(0, classes, count)


def rng_of(seed):
    return orders.generator(seed, "test")


# --------------------------------------------------------------------------------------- which image


@given(st.integers(1, 50), st.integers(0, 200), seeds)
def test_drawn_takes_every_image_before_any_comes_again(count, samples, seed):
    index = orders.drawn(count, samples, rng_of(seed))
    assert len(index) == samples
    for start in range(0, samples, count):
        part = index[start : start + count]
        assert len(set(part.tolist())) == len(part)
    times = Counter(index.tolist())
    assert not times or max(times.values()) - min(times[k] for k in range(count)) <= 1


@given(st.integers(1, 80), st.data(), seeds)
def test_by_label_has_one_class_after_the_other(count, data, seed):
    labels = labels_of(count, seed=seed % 7)
    samples = data.draw(st.integers(1, count))
    index = orders.by_label(labels, samples, rng_of(seed))
    assert len(set(index.tolist())) == len(index) == samples
    runs = 1 + int((np.diff(labels[index]) != 0).sum())
    assert runs == len(np.unique(labels[index])), "no class comes a second time"


@given(st.integers(1, 120), st.data(), st.floats(0.05, 10), seeds)
def test_dirichlet_takes_each_image_once(count, data, concentration, seed):
    labels = labels_of(count, seed=seed % 7)
    samples = data.draw(st.integers(1, count))
    index = orders.dirichlet(labels, samples, concentration, rng_of(seed))
    assert len(set(index.tolist())) == len(index) == samples


def test_a_small_concentration_leaves_few_classes_at_a_time():
    labels = labels_of(2000, classes=10)

    def classes_at_a_time(index):
        truth = labels[index]
        return np.mean([len(set(truth[k : k + 50].tolist())) for k in range(0, 2000, 50)])

    few, many = (
        classes_at_a_time(orders.dirichlet(labels, 2000, concentration, rng_of(1)))
        for concentration in (0.1, 100.0)
    )
    assert few < 5 < 9 < many


@pytest.mark.parametrize(
    "make", [orders.by_label, lambda labels, n, rng: orders.dirichlet(labels, n, 0.1, rng)]
)
def test_more_samples_than_images_are_refused(make):
    with pytest.raises(TooFewImages, match="11 samples needs as many images, there are 10"):
        make(labels_of(10), 11, rng_of(0))


# --------------------------------------------------------------------------------------- laying out


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 16))
def test_a_series_cuts_batches_inside_its_parts(lengths, batch):
    parts = [(f"d{k % 2}", np.arange(length)) for k, length in enumerate(lengths)]
    order = orders.series(parts, batch=batch)
    assert order.sizes.sum() == order.samples == sum(lengths)
    assert ((order.sizes >= 1) & (order.sizes <= batch)).all()
    starts = np.concatenate([[0], np.cumsum(order.sizes)])
    assert {phase.start for phase in order.phases} <= set(starts.tolist())
    assert [phase.name for phase in order.phases] == [name for name, _ in parts]
    assert order.counted.all()
    assert (order.kind == Kind.IMAGE).all()


@given(st.integers(1, 100), st.integers(1, 6), seeds)
def test_mixed_domains_are_balanced(samples, domains, seed):
    names = tuple(f"d{k}" for k in range(domains))
    order = orders.mixed(names, np.arange(samples), batch=8, rng=rng_of(seed))
    times = np.bincount(order.domain, minlength=domains)
    assert times.max() - times.min() <= 1
    np.testing.assert_array_equal(order.index, np.arange(samples))


@given(st.integers(1, 40), st.lists(st.tuples(st.floats(0, 1), st.sampled_from(list(Kind))), max_size=20))
def test_inserted_frames_do_not_count_and_move_nothing(samples, frames):
    plain = orders.series([("a", np.arange(samples)), ("b", np.arange(samples))], batch=4)
    places = np.array([round(at * 2 * samples) for at, _ in frames], dtype=np.intp)
    kinds = np.array([kind for _, kind in frames], dtype=np.uint8)
    order = orders.insert(plain, places, kinds, batch=4)
    assert order.samples == 2 * samples + len(frames) == order.sizes.sum()
    assert (~order.counted).sum() == len(frames)
    np.testing.assert_array_equal(order.index[order.counted], plain.index)
    np.testing.assert_array_equal(order.domain[order.counted], plain.domain)
    assert sorted(order.kind[~order.counted].tolist()) == sorted(kinds.tolist())
    second = order.phases[1].start
    assert order.counted[:second].sum() == samples, "the phase begins with the first sample of its domain"


def test_a_frozen_camera_repeats_the_frame_before():
    plain = orders.series([("a", np.array([7, 8, 9]))], batch=3)
    order = orders.insert(plain, np.array([2, 2]), np.array([Kind.IMAGE] * 2, dtype=np.uint8), batch=3)
    np.testing.assert_array_equal(order.index, [7, 8, 8, 8, 9])
    np.testing.assert_array_equal(order.counted, [True, True, False, False, True])
    np.testing.assert_array_equal(order.sizes, [3, 2])


def test_ready_made_is_as_it_is():
    counted = np.array([True, False, True])
    order = orders.ready_made(counted, batch=2)
    np.testing.assert_array_equal(order.index, [0, 1, 2])
    np.testing.assert_array_equal(order.counted, counted)
    np.testing.assert_array_equal(order.sizes, [2, 1])


# --------------------------------------------------------------------------------------- the catalogue

COUNT = 1000
SMALL = limited(scale_of("quick"), 300)
SPECS = {spec.name: spec for spec in streams(SMALL, natural=True)}


def labels_for(spec, count=COUNT):
    return {name: labels_of(count, 10, seed=len(name)) for name in spec.domains}


@pytest.mark.parametrize("name", SPECS)
def test_every_stream_repeats_from_its_seed_and_changes_with_it(name):
    spec = SPECS[name]
    labels = labels_for(spec)
    order = spec.lay_out(labels, 3)
    assert order.fingerprint("i") == spec.lay_out(labels, 3).fingerprint("i")
    assert order.fingerprint("i") != spec.lay_out(labels, 4).fingerprint("i")
    assert order.fingerprint("i") != order.fingerprint("j")
    assert order.sizes.sum() == order.samples
    assert (order.sizes > 0).all()
    assert set(order.domains) <= set(spec.domains)
    assert order.counted.any()
    assert order.phases[0].start == 0
    for place, domain in enumerate(order.domains):
        index = order.index[order.domain == place]
        assert len(index)
        assert 0 <= index.min() <= index.max() < len(labels[domain])


def test_the_streams_that_were_asked_for_are_there():
    families = Counter(spec.family for spec in streams(scale_of("safety"), natural=True))
    assert families["online"] == 15 + 1
    assert {f"batch-{size}" for size in (1, 4, 16, 64, 200)} <= set(families)
    wanted = (
        "clean jpeg continual recurring gradual mixed sorted dirichlet poisoned nan dead-camera long series"
    )
    assert set(wanted.split()) <= set(families)
    assert not any(NATURAL in spec.domains for spec in streams(scale_of("safety")))


def test_lengths_of_the_safety_suite():
    specs = {spec.name: spec for spec in streams(scale_of("safety"))}
    long = specs["long"].lay_out({name: labels_of(5000) for name in specs["long"].domains}, 0)
    assert long.samples == 100_000
    assert [phase.start for phase in long.phases] == [0, 25_000, 50_000, 75_000]
    # 5,000 images came five times each in every quarter, in another order each time.
    first = long.index[:25_000]
    assert set(np.bincount(first).tolist()) == {5}
    assert (first[:5000] != first[5000:10_000]).any()
    batch = specs["batch-200/gaussian_noise:5"]
    assert set(batch.lay_out(labels_for(batch, 5000), 0).sizes.tolist()) == {200}


def test_gradual_goes_up_and_down():
    order = SPECS["gradual/fog"].lay_out(labels_for(SPECS["gradual/fog"]), 0)
    assert [phase.name[-1] for phase in order.phases] == list("123454321")


def test_recurring_comes_twice():
    spec = SPECS["recurring"]
    names = [phase.name for phase in spec.lay_out(labels_for(spec), 0).phases]
    assert names[:15] == names[15:]
    assert len(set(names)) == 15


def test_the_online_streams_share_their_order():
    """Then the mean over them can be compared image by image."""
    first, second = (
        SPECS[f"online/{name}:5"].lay_out({f"{name}:5": labels_of(COUNT)}, 0)
        for name in ("gaussian_noise", "fog")
    )
    np.testing.assert_array_equal(first.index, second.index)


def test_the_poison_is_a_batch_by_itself():
    order = SPECS["poisoned"].lay_out(labels_for(SPECS["poisoned"]), 0)
    assert order.sizes[0] == 10
    assert (order.kind[:10] == Kind.NOISE).all()
    assert not order.counted[:10].any()
    assert order.counted[10:].all()


def test_broken_frames():
    nan = SPECS["nan"].lay_out(labels_for(SPECS["nan"]), 0)
    assert (nan.kind[~nan.counted] == Kind.NAN).all()
    assert (~nan.counted).sum() >= 2 * BATCH
    dead = SPECS["dead-camera"].lay_out(labels_for(SPECS["dead-camera"]), 0)
    frozen = ~dead.counted & (dead.kind == Kind.IMAGE)
    assert frozen.sum() == 2 * BATCH
    assert len(set(dead.index[frozen].tolist())) == 1
    assert (dead.kind == Kind.BLACK).sum() >= 2 * BATCH


@given(st.integers(4, 400))
@settings(max_examples=20)
def test_a_limit_leaves_no_stream_longer(limit):
    scale = limited(scale_of("safety"), limit)
    assert max(scale.images, scale.online, scale.single) <= limit
    assert scale.long <= 4 * limit
    assert limited(scale, None) == scale


def test_names_patterns_and_misspellings():
    specs = streams(SCALES["quick"])
    assert [spec.name for spec in chosen(specs, ["sorted"])] == [
        s.name for s in specs if s.family == "sorted"
    ]
    assert {spec.name for spec in chosen(specs, ["online/f*", "clean"])} >= {"clean", "online/fog:5"}
    assert chosen(specs, []) == specs
    with pytest.raises(UnknownStreamName, match="did you mean `sorted`"):
        chosen(specs, ["sorteed"])
    with pytest.raises(UnknownSuite, match="did you mean `safety`"):
        scale_of("saftey")
