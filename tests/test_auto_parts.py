"""The parts of auto on the edge, each by itself: sight, watch, prior, gallery, shelf, what is typical or gained."""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tiny_bundle
from tta_edge.auto import GAIN, LOSS, Auto, Task, Typical, information
from tta_edge.gallery import Contents, Gallery, Shelf
from tta_edge.prior import ON, PSEUDO, RECENT, ROUNDS, Prior, expectation_maximisation
from tta_edge.sight import CHUNK, MEMORY, OFFSET, WEAK_SAMPLES, Change, Watch, sight
from tta_runtime import Model, Step, bundle
from tta_runtime.manifest import Port
from tta_runtime.numerics import softmax

Floats = NDArray[np.float64]
Logits = NDArray[np.float32]

MEAN, SPREAD, FIRST, SECOND, COLOUR, CURVE, GRAIN = range(7)


def one_hot(classes: Any, count: int = 10, sharpness: float = 12.0) -> Logits:
    """[n, C] that are sure of the given classes."""
    rows: Logits = (sharpness * np.eye(count, dtype=np.float32))[np.asarray(classes)]
    return rows


def log(value: float) -> float:
    return math.log(value + OFFSET)


# --- sight ----------------------------------------------------------------------------------------


def scene(seed: int = 0, n: int = 4, size: int = 8, channels: int = 3) -> NDArray[np.float32]:
    """[n, C, H, W] in 0.3..0.7."""
    noise = np.random.default_rng(seed).random((n, channels, size, size), dtype=np.float32)
    return 0.3 + np.float32(0.4) * noise


def test_the_numbers_of_one_image_are_those_computed_by_hand() -> None:
    image = np.zeros((1, 2, 3, 3), np.float32)
    image[0, 0] = [[0.0, 0.5, 0.0], [0.0, 0.5, 0.0], [0.0, 0.5, 0.0]]
    image[0, 1] = [[0.2, 0.4, 0.6], [0.2, 0.4, 0.6], [0.2, 0.4, 0.6]]
    mean = (0.5 + 1.2) / 6
    spread = math.sqrt((0.25 + 0.04 + 0.16 + 0.36) / 6 - mean * mean)
    first = (0.5 + 0.5 + 0.2 + 0.2) / 4
    second = (1.0 + 0.0) / 2  # 0 - 2 * 0.5 + 0 and 0.2 - 2 * 0.4 + 0.6
    colour = (0.2 + 0.1 + 0.6) / 3
    expected = [mean, log(spread), log(first), log(second), log(colour)]
    expected += [log(second) - log(first), log(first) - log(spread)]
    np.testing.assert_allclose(sight(image, 0, 1), [expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "columns"),
    [
        ((5, 3, 8, 8), 7),
        ((5, 1, 3, 3), 7),
        ((1, 4, 3, 20), 7),
        ((5, 3, 2, 8), 2),  # too low
        ((5, 3, 8, 2), 2),  # too narrow for a second difference
        ((5, 3, 1, 1), 2),
        ((5, 8), 2),
        ((5,), 2),
        ((5, 8, 8), 2),
        ((5, 3, 4, 8, 8), 2),  # a clip is no image
    ],
)
def test_each_kind_of_input_has_its_numbers(shape: tuple[int, ...], columns: int) -> None:
    found = sight(np.random.default_rng(0).random(shape, dtype=np.float32), 0, 1)
    assert found.shape == (shape[0], columns)
    assert found.dtype == np.float64
    assert np.isfinite(found).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.25])
def test_an_image_without_contrast_has_finite_numbers(value: float) -> None:
    found = sight(np.full((2, 3, 8, 8), value, np.float32), 0, 1)
    assert found[0, MEAN] == pytest.approx(value)
    np.testing.assert_allclose(found[0, [SPREAD, FIRST, SECOND, COLOUR]], math.log(OFFSET), atol=1e-4)


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1.0, 1.0), (5.0, 5.5)])
def test_the_range_of_the_input_does_not_matter(low: float, high: float) -> None:
    x = scene()
    np.testing.assert_allclose(sight(low + (high - low) * x, low, high), sight(x, 0, 1), atol=1e-4)


def test_bytes_are_read_as_numbers() -> None:
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    np.testing.assert_allclose(sight(x, 0, 255), sight(x.astype(np.float32) / 255, 0, 1), atol=1e-5)


def test_one_sample_does_not_depend_on_its_neighbours() -> None:
    x = scene(n=5)
    alone = np.concatenate([sight(x[i : i + 1], 0, 1) for i in range(5)])
    np.testing.assert_allclose(sight(x, 0, 1), alone, rtol=1e-6)


def test_brightness_moves_the_mean_alone() -> None:
    moved = sight(scene() + np.float32(0.2), 0, 1) - sight(scene(), 0, 1)
    np.testing.assert_allclose(moved[:, MEAN], 0.2, atol=1e-5)
    np.testing.assert_allclose(moved[:, SPREAD:], 0, atol=1e-4)


def test_contrast_moves_what_is_measured_in_units_of_it_and_no_ratio() -> None:
    x = scene()
    centre = x.mean((1, 2, 3), keepdims=True)
    moved = sight(centre + np.float32(0.5) * (x - centre), 0, 1) - sight(x, 0, 1)
    np.testing.assert_allclose(moved[:, [SPREAD, FIRST, SECOND, COLOUR]], -math.log(2), atol=0.01)
    np.testing.assert_allclose(moved[:, [MEAN, CURVE, GRAIN]], 0, atol=0.01)


def test_blur_lowers_differences_and_grey_lowers_colour() -> None:
    x = scene()
    blurred = (x + np.roll(x, 1, 3)) / 2
    assert (sight(blurred, 0, 1)[:, CURVE] < sight(x, 0, 1)[:, CURVE]).all()
    grey = np.broadcast_to(x.mean(1, keepdims=True), x.shape)
    np.testing.assert_allclose(sight(grey, 0, 1)[:, COLOUR], math.log(OFFSET), atol=1e-3)


# --- watch ----------------------------------------------------------------------------------------


def sights(seed: int, n: int, shift: float = 0.0, columns: int = 7) -> Floats:
    """[n, S], standard normal; the second column is moved by so many standard deviations."""
    found = np.random.default_rng(seed).standard_normal((n, columns))
    found[:, SPREAD] += shift
    return found


def said(watch: Watch, rows: Floats, size: int) -> list[Change]:
    return [watch.observe(rows[i : i + size]) for i in range(0, len(rows), size)]


@pytest.mark.parametrize("size", [CHUNK, 64, 500])
def test_what_comes_first_is_a_strong_change_and_more_of_it_is_none(size: int) -> None:
    answers = said(Watch(), sights(0, 10 * 500), size)
    assert answers[0] is Change.STRONG
    assert set(answers[1:]) == {Change.NONE}


@pytest.mark.parametrize("size", [1, 3, 5, 15])
def test_small_batches_are_collected_until_there_are_enough(size: int) -> None:
    answers = said(Watch(), sights(0, 40 * size), size)
    full = -(-CHUNK // size)
    assert answers.index(Change.STRONG) == full - 1
    assert answers.count(Change.STRONG) == 1


@pytest.mark.parametrize("seed", range(5))
def test_thousands_of_like_images_are_no_strong_change(seed: int) -> None:
    answers = said(Watch(), sights(seed, 8000), CHUNK)[1:]
    assert Change.STRONG not in answers
    assert answers.count(Change.WEAK) <= 1  # four standard errors, in seven columns


def test_a_camera_that_shows_one_frame_is_no_change() -> None:
    watch = Watch()
    assert set(said(watch, np.tile(sights(0, 1), (2000, 1)), 1)[CHUNK:]) == {Change.NONE}
    assert watch.effect == pytest.approx(0, abs=1e-6)


def test_rounding_between_frames_that_are_alike_is_no_change() -> None:
    frames = np.tile(sights(0, 1), (2000, 1)) + 1e-3 * sights(1, 2000)
    assert set(said(Watch(), frames, CHUNK)[1:]) == {Change.NONE}


@pytest.mark.parametrize("column", range(7))
@pytest.mark.parametrize("sign", [-1, 1])
def test_one_number_that_moves_far_is_a_strong_change(column: int, sign: int) -> None:
    watch = Watch()
    said(watch, sights(0, 640), 32)
    moved = sights(1, CHUNK)
    moved[:, column] += 4 * sign
    assert watch.observe(moved) is Change.STRONG
    assert watch.effect == pytest.approx(4, abs=1)


def test_a_change_of_contrast_in_images_is_a_strong_one_and_going_back_too() -> None:
    generator = np.random.default_rng(0)
    contrast = generator.uniform(0.5, 1.0, (400, 1, 1, 1)).astype(np.float32)
    x = 0.5 + contrast * (scene(n=400) - np.float32(0.5))
    dull = 0.5 + np.float32(0.2) * (x - np.float32(0.5))
    watch = Watch()
    for images in (x, dull, x):
        answers = said(watch, sight(images, 0, 1), 32)
        assert answers[0] is Change.STRONG
        assert Change.STRONG not in answers[1:]


@pytest.mark.parametrize("size", [CHUNK, 128])
def test_what_classes_do_is_not_strong(size: int) -> None:
    watch = Watch()
    answers = said(watch, sights(0, 1024), size)
    for seed, shift in enumerate((1.0, -1.0, 1.0, -1.0)):
        answers += said(watch, sights(9 + seed, 128, shift), size)
    assert answers.count(Change.STRONG) == 1


def test_a_small_change_is_weak_after_enough_samples_and_not_before() -> None:
    watch = Watch()
    said(watch, sights(0, CHUNK + 16 * WEAK_SAMPLES), CHUNK)
    answers = said(watch, sights(1, WEAK_SAMPLES, 0.9), CHUNK)
    assert answers == [Change.NONE] * (WEAK_SAMPLES // CHUNK - 1) + [Change.WEAK]


def test_slow_drift_does_not_add_up_and_the_same_way_at_once_is_strong() -> None:
    rows, way = sights(0, 60_000), 6.0
    rows[:, SPREAD] += np.linspace(0, way, len(rows))
    watch = Watch()
    assert Change.STRONG not in said(watch, rows, 64)[1:]
    assert watch.observe(sights(1, 64, 0)) is Change.STRONG  # where it began is far by now


def test_the_reference_forgets_what_is_long_ago() -> None:
    watch = Watch()
    said(watch, sights(0, 2 * int(MEMORY)), 64)
    said(watch, sights(1, 6 * int(MEMORY), 0.9), 64)
    assert watch.observe(sights(2, 256, 0.9)) is Change.NONE
    assert watch.effect < 0.4


# --- prior ----------------------------------------------------------------------------------------


def log_posterior(p: Floats, pi: Floats) -> float:
    return float(np.log(p @ pi).sum() + PSEUDO / len(pi) * np.log(pi).sum())


def test_one_certain_sample_counts_beside_those_that_come_evenly() -> None:
    found = expectation_maximisation(np.array([[1.0, 0.0]]))
    np.testing.assert_allclose(found, [(1 + PSEUDO / 2) / (1 + PSEUDO), PSEUDO / 2 / (1 + PSEUDO)])


def test_certain_predictions_are_counted() -> None:
    found = expectation_maximisation(np.eye(4)[[0, 0, 0, 0, 0, 0, 1, 2]])
    np.testing.assert_allclose(found, (np.array([6, 1, 1, 0]) + PSEUDO / 4) / (8 + PSEUDO))


def test_the_rounds_are_those_of_the_paper() -> None:
    p = np.random.default_rng(3).dirichlet([0.5, 0.5, 0.5], 9)
    pi = [1 / 3] * 3
    for _ in range(ROUNDS):
        new = [PSEUDO / 3] * 3
        for row in p.tolist():
            total = sum(row[c] * pi[c] for c in range(3))
            for c in range(3):
                new[c] += row[c] * pi[c] / total
        pi = [value / (9 + PSEUDO) for value in new]
    np.testing.assert_allclose(expectation_maximisation(p), pi, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_no_proportions_on_a_grid_explain_predictions_better(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((24, 2)) + np.array([1.5 * seed - 3, 0])
    p = np.asarray(softmax(logits), dtype=np.float64)
    grid = np.linspace(0.001, 0.999, 999)
    best = grid[np.argmax([log_posterior(p, np.array([a, 1 - a])) for a in grid])]
    assert expectation_maximisation(p)[0] == pytest.approx(best, abs=0.004)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 20).flatmap(
        lambda c: st.lists(st.lists(st.floats(-1000, 1000), min_size=c, max_size=c), min_size=1, max_size=30)
    )
)
def test_proportions_sum_to_1_and_none_is_0(logits: list[list[float]]) -> None:
    p = np.asarray(softmax(np.array(logits)), dtype=np.float64)
    pi = expectation_maximisation(p)
    assert pi.sum() == pytest.approx(1)
    assert (pi > 0).all()
    even = np.full(p.shape[1], 1 / p.shape[1])
    assert log_posterior(p, pi) >= log_posterior(p, even) - 1e-9


def answered_by(prior: Prior, logits: Logits, usual: NDArray[np.bool_]) -> Logits:
    """What a batch is answered that is observed first."""
    prior.observe(logits, usual)
    return prior.correct(logits)


def play(prior: Prior, classes: NDArray[np.int64], size: int = 16) -> Iterator[tuple[Logits, Logits]]:
    """Given and answered logits of each batch."""
    for i in range(0, len(classes), size):
        logits = one_hot(classes[i : i + size])
        yield logits, answered_by(prior, logits, np.ones(len(logits), dtype=np.bool_))


def shuffled(seed: int, n: int, classes: int = 10) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, classes, n)


def runs(seed: int, n: int, length: int = 100) -> NDArray[np.int64]:
    """Neighbours share their class; no class follows itself."""
    steps = np.random.default_rng(seed).integers(1, 10, -(-n // length))
    return np.repeat(np.cumsum(steps) % 10, length)[:n]


@pytest.mark.parametrize("size", [1, 16, 200])
@pytest.mark.parametrize("seed", range(4))
def test_shuffled_labels_are_never_taken_for_runs_and_logits_stay_as_they_are(seed: int, size: int) -> None:
    prior = Prior(10)
    for given_, answered in play(prior, shuffled(seed, 3000), size):
        assert answered is given_
        assert not prior.correlated
    assert prior.evidence < 2


@pytest.mark.parametrize("size", [1, 16])
def test_runs_are_noticed_within_some_hundred_samples_and_forgotten_when_they_end(size: int) -> None:
    prior = Prior(10)
    for _ in play(prior, shuffled(0, 1024), size):
        pass
    noticed = [prior.correlated for _ in play(prior, runs(1, 512), size)]
    assert noticed[-1]
    assert size * noticed.index(True) <= 256
    assert all(prior.correlated for _ in play(prior, runs(2, 2000), size)), "runs go on"
    kept = [prior.correlated for _ in play(prior, shuffled(3, 4000), size)]
    assert not kept[-1]
    assert size * kept.index(False) <= 2000


def correlated() -> Prior:
    prior = Prior(10)
    for _ in play(prior, np.concatenate([shuffled(0, 512), runs(1, 1024, 128)])):
        pass
    assert prior.correlated
    return prior


def test_where_labels_come_in_runs_the_present_class_is_favoured_by_its_proportion() -> None:
    prior = correlated()
    for _ in play(prior, np.full(RECENT, 3)):
        pass
    doubtful = np.zeros((1, 10), np.float32)
    answered = answered_by(prior, doubtful, np.zeros(1, dtype=np.bool_))
    assert answered.dtype == np.float32
    pi = expectation_maximisation(np.asarray(softmax(one_hot([3] * RECENT).astype(np.float64))))
    np.testing.assert_allclose(answered[0], np.log(10 * pi), rtol=1e-5)
    assert answered[0].argmax() == 3
    assert not doubtful.any(), "what was given has changed"


def test_samples_that_are_not_usual_say_nothing_of_the_others() -> None:
    one, other = correlated(), correlated()
    logits = one_hot([4] * 8 + [7] * 8)
    usual = np.arange(16) < 8
    mixed = answered_by(one, logits, usual)
    alone = answered_by(other, logits[:8], usual[:8])
    np.testing.assert_array_equal(mixed[:8], alone)
    assert one.evidence == other.evidence


def test_an_attacker_of_unusual_samples_turns_nothing_on() -> None:
    prior = Prior(10)
    for given_, _ in play(prior, shuffled(0, 1024)):
        flood = np.concatenate([given_, one_hot([5] * 64)])
        answered_by(prior, flood, np.zeros(len(flood), dtype=np.bool_))
    assert not prior.correlated
    assert prior.evidence < ON


def test_another_world_says_nothing_of_the_present_classes_but_what_was_noticed_stays() -> None:
    prior = correlated()
    evidence = prior.evidence
    prior.forget()
    assert (prior.correlated, prior.evidence) == (True, evidence)
    logits = one_hot([1, 2])
    assert answered_by(prior, logits, np.zeros(2, dtype=np.bool_)) is logits
    answered = answered_by(prior, logits, np.ones(2, dtype=np.bool_))
    assert answered[0, 1] > logits[0, 1], "of the two that have come since"
    assert answered[0, 3] < logits[0, 3]


def test_what_another_model_predicts_is_compared_with_nothing_before() -> None:
    """A step out of a collapse: all were taken for one class, then for many. Labels have not come in runs."""
    told = np.concatenate([np.full(128, 1), shuffled(0, 512)])
    for anew in (True, False):
        prior = Prior(10)
        for place, _ in enumerate(play(prior, told, 64)):
            if anew and place == 1:
                prior.compare_anew()
            if prior.correlated:
                break
        assert prior.correlated is not anew


# --- gallery --------------------------------------------------------------------------------------


def numbered(first: int, count: int, size: int = 3) -> tuple[NDArray[np.float32], Floats]:
    """Samples [count, size] that hold their number, and sights that no other sample has."""
    x = np.repeat(np.arange(first, first + count, dtype=np.float32)[:, None], size, axis=1)
    return x, x[:, :2].astype(np.float64)


def put(gallery: Gallery, classes: list[int], first: int = 0, **options: Any) -> int:
    x, seen = numbered(first, len(classes))
    return gallery.add(x, one_hot(classes), seen, **options)


def predicted(gallery: Gallery) -> list[int]:
    return gallery.contents().logits.argmax(1).tolist() if len(gallery) else []


def level(counts: Counter[int], capacity: int) -> int:
    """The smallest number that the largest class of a full window can have."""
    wanted = min(capacity, sum(counts.values()))
    return next(m for m in range(wanted + 1) if sum(min(m, n) for n in counts.values()) >= wanted)


batches = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), max_size=12)


def test_where_labels_come_in_runs_samples_share_the_window_by_the_classes_of_their_time() -> None:
    """What the serving graph takes for many classes is of one, if its neighbours are: it must not fill the window."""
    gallery, present = Gallery(16), np.full(10, -10.0, np.float32)
    put(gallery, [0, 1, 2, 3] * 4)
    present[7] = 10.0
    put(gallery, [*range(4, 10)] * 4, 16, favour=present)
    assert Counter(predicted(gallery))[3] >= 3, "none of those it had has been crowded out"
    held = gallery.contents()
    late = (held.x[:, 0] >= 16).tolist()
    assert sum(late) in (3, 4), "they are of one class"
    np.testing.assert_array_equal(held.logits[late].argmax(1) >= 4, True)  # and look as they look
    again = held.logits.copy()
    again[late] = one_hot([0] * sum(late))
    gallery.relabel(held.keys, again, again)
    put(gallery, [6] * 4, 60, favour=present)
    kept = gallery.contents().x[:, 0]
    assert (kept < 16).sum() == 16 - sum(late), "a step says what samples look like, not when they came"


@settings(deadline=None, max_examples=150)
@given(batches, st.integers(1, 20))
def test_a_window_is_bounded_and_as_balanced_as_can_be_and_knows_its_size(
    stream: list[list[int]], capacity: int
) -> None:
    gallery, seen, first = Gallery(capacity), Counter[int](), 0
    for classes in stream:
        assert put(gallery, classes, first) == len(classes)
        first += len(classes)
        seen.update(classes)
        held = Counter(predicted(gallery))
        assert len(gallery) == min(capacity, sum(seen.values()))
        assert max(held.values()) == level(seen, capacity)
        assert gallery.nbytes == len(gallery) * 12 == gallery.contents().x.nbytes
        keys = gallery.contents().keys
        assert list(keys) == sorted(set(keys)), "oldest first, each once"


def test_the_oldest_of_the_class_that_has_most_leaves() -> None:
    gallery = Gallery(4)
    put(gallery, [0, 1, 1, 1])
    put(gallery, [2], 4)
    assert gallery.contents().x[:, 0].tolist() == [0, 2, 3, 4]
    put(gallery, [1], 5)  # its own class has most
    assert gallery.contents().x[:, 0].tolist() == [0, 3, 4, 5]
    put(gallery, [0, 2], 6)  # with one more each has as many as the class that has most: it replaces its own
    assert gallery.contents().x[:, 0].tolist() == [3, 5, 6, 7]
    put(gallery, [3, 4, 5], 8)  # no class has more than one, nor has the newcomer's any: the oldest leaves
    assert gallery.contents().x[:, 0].tolist() == [7, 8, 9, 10]


def test_a_sorted_stream_ends_balanced() -> None:
    gallery = Gallery(16)
    for c in range(4):
        put(gallery, [c] * 50, 50 * c)
    assert Counter(predicted(gallery)) == {0: 4, 1: 4, 2: 4, 3: 4}


@pytest.mark.parametrize("together", [True, False])
def test_what_a_window_holds_already_is_left_out(together: bool) -> None:
    gallery = Gallery(8)
    x, seen = numbered(0, 4)
    logits = one_hot([0, 1, 2, 3])
    if together:
        taken = gallery.add(*(np.concatenate([a, a]) for a in (x, logits, seen)))
    else:
        taken = gallery.add(x, logits, seen) + gallery.add(x, logits, seen)
    assert taken == len(gallery) == 4
    assert gallery.nbytes == 48


def test_samples_are_copies() -> None:
    gallery = Gallery(8)
    x, seen = numbered(1, 2)
    logits = one_hot([0, 1])
    gallery.add(x, logits, seen, source=True)
    x[:], logits[:], seen[:] = 0, 0, 0
    held = gallery.contents()
    assert held.x[:, 0].tolist() == held.sights[:, 0].tolist() == [1, 2]
    assert held.logits.argmax(1).tolist() == held.source.argmax(1).tolist() == [0, 1]
    held.x[:] = 0
    assert gallery.contents().x[:, 0].tolist() == [1, 2]


def test_what_the_source_says_is_nan_until_it_is_known() -> None:
    gallery = Gallery(8)
    put(gallery, [0, 1], source=True)
    put(gallery, [2], 2)
    source = gallery.contents().source
    np.testing.assert_array_equal(source[:2], one_hot([0, 1]))
    assert np.isnan(source[2]).all()


def test_those_that_left_are_passed_over_when_others_are_relabelled() -> None:
    gallery = Gallery(3)
    put(gallery, [0, 0, 0])
    keys = gallery.contents().keys
    put(gallery, [1, 2], 3)  # the two oldest leave
    gallery.relabel(keys, one_hot([5, 6, 7]), one_hot([8, 8, 9]))
    held = gallery.contents()
    assert held.logits.argmax(1).tolist() == [7, 1, 2]
    assert held.source[0].argmax() == 9
    assert np.isnan(held.source[1:]).all()
    assert held.x[:, 0].tolist() == [2, 3, 4]


def test_a_key_is_never_used_again() -> None:
    gallery = Gallery(3)
    put(gallery, [0, 0, 0])
    keys = gallery.contents().keys
    gallery.clear()
    assert (len(gallery), gallery.nbytes) == (0, 0)
    put(gallery, [1, 1, 1])
    gallery.relabel(keys, one_hot([5, 6, 7]), one_hot([5, 6, 7]))
    assert predicted(gallery) == [1, 1, 1]


def test_relabelled_samples_count_for_their_new_class() -> None:
    gallery = Gallery(4)
    put(gallery, [0, 0, 1, 2])
    gallery.relabel(gallery.contents().keys, one_hot([3, 1, 1, 1]), one_hot([0, 0, 1, 2]))
    put(gallery, [2], 4)
    assert predicted(gallery) == [3, 1, 1, 2]


@pytest.mark.parametrize(("keys", "source"), [(2, 3), (3, 2), (4, 3)])
def test_labels_that_do_not_fit_are_refused_and_change_nothing(keys: int, source: int) -> None:
    gallery = Gallery(4)
    put(gallery, [0, 1, 2])
    with pytest.raises(ValueError, match="zip"):
        gallery.relabel(range(keys), one_hot([5, 6, 7]), one_hot([8] * source))
    assert predicted(gallery) == [0, 1, 2]
    assert np.isnan(gallery.contents().source).all()


def test_samples_of_another_shape_begin_a_window_of_their_own() -> None:
    gallery = Gallery(8)
    put(gallery, [0, 1])
    x, seen = numbered(10, 3, size=5)
    assert gallery.add(x, one_hot([2, 3, 4]), seen) == 3
    assert gallery.contents().x.shape == (3, 5)
    assert gallery.nbytes == 60


@pytest.mark.parametrize("at_most", [0, 1, 3, 100])
def test_where_memory_is_short_a_window_holds_fewer(at_most: int) -> None:
    gallery = Gallery(5)
    assert put(gallery, [0, 1, 2, 3, 4, 5], at_most=at_most) == (6 if at_most else 0)
    assert len(gallery) == min(5, at_most)
    assert gallery.nbytes == 12 * min(5, at_most)


# --- shelf ----------------------------------------------------------------------------------------


def shelve(shelf: Shelf, gallery: Gallery, first: int, count: int) -> int:
    x, seen = numbered(first, count)
    return shelf.add(gallery, x, one_hot(np.arange(count) % 10), seen, source=False)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.booleans()), max_size=30), st.integers(0, 200)
)
def test_windows_hold_no_more_than_their_bound_together(
    feeds: list[tuple[int, int, bool]], max_bytes: int
) -> None:
    shelf, galleries, number = Shelf(max_bytes), [Gallery(6) for _ in range(4)], 0
    for which, count, clears in feeds:
        if clears:
            shelf.clear(galleries[which])
            assert len(galleries[which]) == 0
            continue
        shelve(shelf, galleries[which], number, count)
        number += count
        assert shelf.nbytes == sum(gallery.nbytes for gallery in galleries) <= max_bytes
        room = min(6, max_bytes // 12)
        assert min(count, room) <= len(galleries[which]) <= room, "the one that was fed keeps its samples"


def test_the_window_that_was_fed_least_recently_is_emptied_first() -> None:
    shelf, (a, b, c) = Shelf(12 * 6), (Gallery(4), Gallery(4), Gallery(4))
    shelve(shelf, a, 0, 2)
    shelve(shelf, b, 10, 2)
    shelve(shelf, c, 20, 2)
    shelve(shelf, a, 30, 1)
    assert [len(gallery) for gallery in (a, b, c)] == [3, 0, 2], "b was fed before c, and a again"
    shelve(shelf, b, 40, 3)
    assert [len(gallery) for gallery in (a, b, c)] == [3, 3, 0]


def test_a_window_that_is_cleared_makes_room() -> None:
    shelf, a, b = Shelf(12 * 4), Gallery(4), Gallery(4)
    shelve(shelf, a, 0, 3)
    shelf.clear(a)
    assert (shelf.nbytes, len(a)) == (0, 0)
    shelve(shelf, b, 10, 4)
    assert len(b) == 4
    shelf.clear(Gallery(4))  # one that was never fed
    assert len(b) == 4
    gone = weakref.ref(a)
    del a
    assert gone() is None, "the shelf holds the window of a stream that has ended"


@pytest.mark.parametrize(
    ("held", "least", "there"), [(0, 0, False), (0, 1, False), (3, 4, False), (3, 3, True)]
)
def test_too_few_samples_are_no_contents(held: int, least: int, there: bool) -> None:
    shelf, gallery = Shelf(1000), Gallery(8)
    if held:
        shelve(shelf, gallery, 0, held)
    found = shelf.contents(gallery, least)
    assert (found is not None) == there
    assert found is None or len(found.keys) == held


@pytest.mark.parametrize("max_bytes", [0, 11])
def test_a_shelf_without_room_for_one_sample_takes_none(max_bytes: int) -> None:
    shelf, gallery = Shelf(max_bytes), Gallery(8)
    assert shelve(shelf, gallery, 0, 5) == 0
    assert (shelf.nbytes, shelf.contents(gallery, 0)) == (0, None)


def test_threads_do_not_spoil_each_others_windows() -> None:
    shelf, galleries, rounds = Shelf(12 * 20), [Gallery(12) for _ in range(3)], 250

    def feed(which: int) -> None:
        for i in range(rounds):
            gallery = galleries[(which + i) % 3]
            shelve(shelf, gallery, 10 * (rounds * which + i), 7)
            found = shelf.contents(gallery, 1)
            if found is not None:
                assert len(found.keys) == len(found.x) == len(found.logits) == len(set(found.keys)) <= 12
                shelf.relabel(gallery, found.keys, found.logits[::-1], found.logits)
            assert shelf.nbytes <= 12 * 20
            if i % 50 == 49:
                shelf.clear(gallery)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(feed, which) for which in range(4)]:
                future.result(timeout=60)
    finally:
        sys.setswitchinterval(interval)
    assert [gallery.nbytes for gallery in galleries] == [12 * len(gallery) for gallery in galleries]
    assert shelf.nbytes == sum(gallery.nbytes for gallery in galleries)


# --- what is typical, what is gained ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "distance"),
    [(0.01, 9.0), (0.2, 9.0), (0.2, 1e6), (0.49, 40.0), (0.49, 1e6)],  # many must be further away to be found
)
@pytest.mark.parametrize("column", [0, 6])
def test_outliers_of_less_than_half_are_found(share: float, distance: float, column: int) -> None:
    rows = sights(0, 100)
    bad = np.arange(100) < 100 * share
    rows[bad, column] += distance
    held = Typical.of(rows).holds(rows)
    assert not held[bad].any()
    assert held[~bad].mean() > 0.95


@pytest.mark.parametrize("n", [16, 128])
def test_among_samples_that_are_alike_hardly_one_is_an_outlier(n: int) -> None:
    rates = [Typical.of(sights(seed, n)).holds(sights(seed, n)).mean() for seed in range(20)]
    assert np.mean(rates) > 0.93
    same = np.tile(sights(0, 1), (n, 1))
    assert Typical.of(same).holds(same).all()
    assert Typical.of(same).holds(same + 0.1).all(), "rounding is no distance"
    assert not Typical.of(same).holds(same + 0.3).any()


def test_half_and_more_of_something_else_is_typical_itself() -> None:
    rows = sights(0, 100)
    rows[:60, 0] += 50
    typical = Typical.of(rows)
    assert typical.holds(rows)[:60].mean() > 0.9
    assert not typical.holds(rows)[60:].any()


def test_information_of_known_predictions() -> None:
    assert information(np.zeros((8, 5), np.float32)) == pytest.approx(0, abs=1e-6)
    assert information(one_hot([0, 1, 2, 3], 4, 1e3)) == pytest.approx(math.log(4), rel=1e-6)
    assert information(one_hot([2] * 6, 4, 1e3)) == pytest.approx(0, abs=1e-6)
    assert information(one_hot([0, 0, 0, 1], 2, 1e3)) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), rel=1e-6
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4), min_size=1, max_size=20))
def test_information_lies_between_nothing_and_all_classes(values: list[list[float]]) -> None:
    logits = np.array(values, np.float32)
    assert -1e-4 <= information(logits) <= math.log(4) + 1e-4
    assert information(logits[:1]) == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(information(logits[::-1]), information(logits), atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose method has a window; judging needs no more of it."""
    path = tmp_path_factory.mktemp("auto") / "bundle"
    manifest = tiny_bundle.build(path)
    step = manifest.graphs["step.tent"]
    target = Port(name="target", dtype="float32", shape=["batch", tiny_bundle.C], bind="batch", key="target")
    proto = onnx.load(path / step.file, load_external_data=False)
    value = onnx.helper.make_tensor_value_info(target.name, onnx.TensorProto.FLOAT, target.shape)
    proto.graph.input.append(value)
    onnx.save(proto, path / step.file)
    graphs = {**manifest.graphs, "step.tent": msgspec.structs.replace(step, inputs=[*step.inputs, target])}
    windowed = msgspec.structs.replace(manifest.methods["tent"], window=32)
    methods = {**manifest.methods, "tent": windowed}
    bundle.seal(path, msgspec.structs.replace(manifest, graphs=graphs, methods=methods, files={}))
    return Model.open(path, method="tent")


def judged(
    model: Model, source: Logits, stepped: Logits, weight: list[float], **report: float
) -> tuple[Step, Any]:
    x, seen = numbered(0, len(weight), size=tiny_bundle.D)
    task = Task(
        Contents(x, stepped, source, seen, tuple(range(len(weight)))), np.array(weight, dtype=np.float32)
    )
    step = Step(stepped, model.theta0 + 1, {}, {"entropy": 0.5, **report})
    return step, Auto(model, Shelf(1000)).judge(task, step)


CLEAR, VAGUE = one_hot([0, 1, 2] * 2, 3, 8.0), one_hot([0, 1, 2] * 2, 3, 0.5)


def test_a_step_that_says_more_than_the_source_is_committed_as_it_is(model: Model) -> None:
    step, verdict = judged(model, VAGUE, CLEAR, [1.0] * 6)
    assert not verdict.held
    assert verdict.step is step
    assert verdict.gain == pytest.approx(information(CLEAR) - information(VAGUE))
    assert verdict.gain > GAIN


@pytest.mark.parametrize(
    ("source", "stepped"),
    [
        (CLEAR, VAGUE),
        (CLEAR, CLEAR),
        (CLEAR, one_hot([0] * 6, 3, 8.0)),  # collapsed: certain, but of one class
        (VAGUE, VAGUE + np.float32(1)),
    ],
)
def test_a_step_that_adds_nothing_returns_to_the_source(
    model: Model, source: Logits, stepped: Logits
) -> None:
    step, verdict = judged(model, source, stepped, [1.0] * 6)
    assert verdict.held
    assert verdict.gain < GAIN
    np.testing.assert_array_equal(verdict.step.theta, model.theta0)
    assert verdict.step.report == step.report
    np.testing.assert_array_equal(verdict.step.logits, stepped)


@pytest.mark.parametrize(
    ("shift", "less", "held"),
    [
        (0.9, 0.0, True),
        (1.1, 0.0, False),
        (1.1, 0.9 * LOSS, False),
        (1.1, 1.1 * LOSS, True),
        (50.0, 1.0, True),
    ],
)
def test_far_from_the_source_a_step_may_say_a_little_less(
    model: Model, shift: float, less: float, held: bool
) -> None:
    low, high = 0.5, 8.0  # the logits that say just so much less are between
    wanted = information(CLEAR) - less
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if information(one_hot([0, 1, 2] * 2, 3, middle)) < wanted else (low, middle)
        )
    _, verdict = judged(model, CLEAR, one_hot([0, 1, 2] * 2, 3, high), [1.0] * 6, shift=shift)
    assert verdict.gain == pytest.approx(-less, abs=1e-3)
    assert verdict.held == held


def test_samples_that_do_not_count_have_no_say_in_what_a_step_is_worth(model: Model) -> None:
    mixed = np.concatenate([VAGUE[:3], CLEAR[3:]])
    assert judged(model, VAGUE, mixed, [1.0] * 3 + [0.0] * 3)[1].held
    assert judged(model, VAGUE, mixed, [1.0] * 3 + [0.0] * 3)[1].gain == pytest.approx(0)
    assert not judged(model, VAGUE, mixed, [0.0] * 3 + [1.0] * 3)[1].held
