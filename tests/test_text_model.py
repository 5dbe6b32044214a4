"""A language model on the runtime: the same as eager torch, and what it refuses leaves it as it was."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import tiny_bundle
import tiny_text
from tiny_text import BEGIN, CHUNK, CONTEXT, VOCABULARY
from tta_runtime import Engines, Model, Sampling, TextModel, errors
from tta_runtime.bundle import Bundle
from tta_runtime.model import Checkpoint
from tta_runtime.sampling import GREEDY, candidates, draw, surprise_nats
from tta_runtime.text_model import MOST_ABSORBED, PASS_TOKENS

TEXT = b"The quick brown fox jumps over the lazy dog, again and again and again."
OTHER = b"Sphinx of black quartz"


@pytest.fixture(scope="module")
def model(text_bundle):
    return TextModel.open(text_bundle)


def snapshot(session):
    now = session.checkpoint
    state = {name: array.tobytes() for name, array in now.state.items()}
    return now.theta.tobytes(), state, now.steps, session.pending, session.score(list(OTHER)).nats.tobytes()


def eager_nats(tokens, before, vector):
    """-ln p of tokens that follow others, by torch, without a cache."""
    logits = tiny_text.eager_logits([*before, *tokens][:-1], vector)[len(before) - 1 :]
    return -torch.log_softmax(logits.double(), -1)[torch.arange(len(tokens)), list(tokens)].numpy()


# --- the same as eager torch --------------------------------------------------------------------------


def test_a_new_session_scores_as_the_base_does_and_theta_zero_is_the_base(model):
    session = model.session()
    found = session.score(list(TEXT)).nats
    zero = torch.zeros(tiny_text.networks()[1].size)
    np.testing.assert_allclose(found, eager_nats(TEXT, [BEGIN], zero), atol=1e-4)
    decoder, _ = tiny_text.networks()
    with torch.no_grad():
        base = decoder(torch.tensor([[BEGIN, *TEXT]])).logits[0]
        assert torch.equal(base, tiny_text.eager_logits([BEGIN, *TEXT], zero))


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_score_after_absorbing_agrees_with_eager_torch(model, length):
    session = model.session()
    told = session.absorb(list(TEXT[:length]))
    vector = tiny_text.eager_absorb(list(TEXT[:length]))
    assert (told.tokens, told.pending, told.chunks) == (length, length % CHUNK, length // CHUNK)
    np.testing.assert_allclose(session.checkpoint.theta, vector.numpy(), atol=1e-5)
    before = [BEGIN, *TEXT[length - length % CHUNK : length]]
    np.testing.assert_allclose(session.score(list(OTHER)).nats, eager_nats(OTHER, before, vector), atol=1e-4)
    if length >= CHUNK:
        assert 0 < told.report["ratio"] <= 0.5 + 1e-5
        assert np.abs(session.score(list(OTHER)).nats - model.session().score(list(OTHER)).nats).max() > 1e-3


def test_the_comparison_above_objects_to_a_wrong_theta(model):
    session = model.session()
    session.absorb(list(TEXT[:CHUNK]))
    wrong = -tiny_text.eager_absorb(list(TEXT[:CHUNK]))
    assert np.abs(session.score(list(OTHER)).nats - eager_nats(OTHER, [BEGIN], wrong)).max() > 1e-3


def test_absorbing_in_pieces_is_absorbing_at_once_to_the_last_bit(model):
    whole, pieces = model.session(), model.session()
    whole.absorb(list(TEXT))
    for first in range(0, len(TEXT), 7):
        pieces.absorb(list(TEXT[first : first + 7]))
    assert snapshot(whole) == snapshot(pieces)


@pytest.mark.parametrize("more", [3, CHUNK])
def test_what_was_answered_before_does_not_linger_after_absorbing(model, more):
    session, fresh = model.session(), model.session()
    session.absorb(list(TEXT[:20]))
    before = snapshot(session)
    session.absorb(list(TEXT[20 : 20 + more]))
    fresh.absorb(list(TEXT[: 20 + more]))
    assert snapshot(session) == snapshot(fresh) != before
    session.reset()
    assert snapshot(session) == snapshot(model.session())


def test_a_context_is_seen_and_not_scored(model):
    session = model.session()
    found = session.score(list(OTHER), context=list(TEXT))
    zero = torch.zeros(tiny_text.networks()[1].size)
    np.testing.assert_allclose(found.nats, eager_nats(OTHER, [BEGIN, *TEXT], zero), atol=1e-4)
    assert len(found.nats) == len(OTHER)
    assert found.bits == pytest.approx(found.nats.sum() / math.log(2))


def test_greedy_generation_agrees_with_eager_torch_without_a_cache(model):
    session = model.session()
    session.absorb(list(TEXT[: 2 * CHUNK + 3]))
    vector = tiny_text.eager_absorb(list(TEXT[: 2 * CHUNK + 3]))
    expected = [BEGIN, *TEXT[2 * CHUNK : 2 * CHUNK + 3], *OTHER]
    start = len(expected)
    for _ in range(20):
        expected.append(int(tiny_text.eager_logits(expected, vector)[-1].argmax()))
    assert list(session.generate(list(OTHER), max_tokens=20)) == expected[start:]


def test_the_same_seed_gives_the_same_text_and_generating_changes_nothing(model):
    session = model.session()
    session.absorb(list(TEXT))
    before = snapshot(session)
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=7)
    first, again = (list(session.generate(list(OTHER), max_tokens=30, sampling=sampling)) for _ in range(2))
    assert first == again
    assert first != list(session.generate(list(OTHER), max_tokens=30, sampling=Sampling(seed=8)))
    assert snapshot(session) == before


def test_long_passes_are_cut_and_change_nothing(model, tmp_path):
    tiny_text.build(tmp_path / "long", context=4 * PASS_TOKENS)
    long = TextModel.open(tmp_path / "long").session()
    text = list(TEXT * 9)[: 2 * PASS_TOKENS + 3]
    steps = long.scoring(text)
    stops = sum(1 for _ in steps)
    assert stops == 3
    zero = torch.zeros(tiny_text.networks()[1].size)
    np.testing.assert_allclose(long.score(text).nats, eager_nats(text, [BEGIN], zero), atol=1e-3)


# --- endings ------------------------------------------------------------------------------------------


def ending(steps):
    tokens = []
    while True:
        try:
            tokens.append(next(steps))
        except StopIteration as stop:
            return tokens, stop.value


def test_a_text_ends_at_the_number_of_tokens_or_at_the_end_of_the_context(model):
    session = model.session()
    tokens, why = ending(session.generate(list(OTHER), max_tokens=5))
    assert (len(tokens), why) == (5, "max-tokens")
    tokens, why = ending(session.generate(list(OTHER), max_tokens=1000))
    assert why == "context"
    assert len(tokens) == CONTEXT - 1 - len(OTHER) + 1  # the last one need not be seen


def test_a_text_ends_with_the_end_token_which_is_not_part_of_it(model, tmp_path):
    hot = Sampling(temperature=3.0, seed=1)
    tokens = list(model.session().generate(list(OTHER), max_tokens=8, sampling=hot))
    assert tokens[3] not in tokens[:3]
    tiny_text.build(tmp_path / "ends", end=tokens[3])
    session = TextModel.open(tmp_path / "ends").session()
    assert ending(session.generate(list(OTHER), max_tokens=50, sampling=hot)) == (tokens[:3], "end")


def test_without_a_begin_token_the_first_token_is_not_scored(tmp_path):
    tiny_text.build(tmp_path / "bundle", begin=None)
    session = TextModel.open(tmp_path / "bundle").session()
    found = session.score(list(OTHER))
    assert (len(found.nats), found.skipped) == (len(OTHER) - 1, 1)
    zero = torch.zeros(tiny_text.networks()[1].size)
    np.testing.assert_allclose(found.nats, eager_nats(OTHER[1:], OTHER[:1], zero), atol=1e-4)
    with pytest.raises(errors.EmptyText, match="1 tokens and nothing stands before it"):
        session.score([65])
    with pytest.raises(errors.EmptyText):
        session.generate([]).send(None)
    session.absorb([66])
    assert session.score([65]).skipped == 0


# --- saved and loaded ---------------------------------------------------------------------------------


def test_a_session_comes_back_to_the_last_bit(model):
    session = model.session()
    session.absorb(list(TEXT))
    data = session.encode(session.checkpoint, generation=3)
    assert len(data) <= session.max_state_bytes
    again = model.session()
    checkpoint, generation, notes = again.decode(data)
    again.resume(checkpoint, notes)
    assert generation == 3
    assert snapshot(again) == snapshot(session)
    for each in (session, again):
        each.absorb(list(OTHER))
    assert snapshot(again) == snapshot(session)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tokenizer": "0" * 64}, errors.StateOfOtherTokenizer),
        ({"bundle": "0" * 64}, errors.StateOfOtherBundle),
        ({"tokenizer": "0" * 64, "bundle": "0" * 64}, errors.StateOfOtherTokenizer),
        ({"pending": [0] * CHUNK}, errors.StateMalformed),
        ({"pending": [VOCABULARY]}, errors.StateMalformed),
        ({"pending": [-1]}, errors.StateMalformed),
        ({"pending": "none"}, errors.StateMalformed),
        ({"penning": []}, errors.StateMalformed),
    ],
)
def test_a_session_of_another_model_is_refused_by_name(model, change, error):
    import json

    session = model.session()
    session.absorb(list(TEXT))
    before = snapshot(session)
    notes = json.dumps({**json.loads(session.notes()), **change})
    with pytest.raises(error):
        session.decode(session.encode(session.checkpoint, notes=notes))
    with pytest.raises(error):
        session.resume(session.checkpoint, notes)
    assert snapshot(session) == before


def test_a_session_of_another_bundle_of_the_same_shapes_is_refused(model, tmp_path):
    tiny_text.build(tmp_path / "other", context=CONTEXT + 1)
    other = TextModel.open(tmp_path / "other").session()
    other.absorb(list(TEXT))
    with pytest.raises(errors.StateOfOtherBundle, match="was saved with the bundle"):
        model.session().decode(other.encode(other.checkpoint))


def test_notes_that_are_not_json_are_refused(model):
    session = model.session()
    for notes in ("", "{", '{"pending": [' + "[" * 5000):
        with pytest.raises(errors.StateMalformed):
            session.decode(session.encode(session.checkpoint, notes=notes))


def test_a_session_that_has_absorbed_more_than_can_be_told_is_refused(model):
    session = model.session()
    session.absorb(list(TEXT))
    now, most = session.checkpoint, MOST_ABSORBED // CHUNK
    assert session.pending
    for steps in (most + 1, (1 << 63) - 1):
        with pytest.raises(errors.StateMalformed, match=f"{steps} chunks"):
            session.decode(session.encode(Checkpoint(now.theta, now.state, steps, now.seed)))
    again = model.session()
    checkpoint, _, notes = again.decode(session.encode(Checkpoint(now.theta, now.state, most - 1, now.seed)))
    again.resume(checkpoint, notes)
    before = snapshot(again)
    with pytest.raises(errors.StateMalformed, match=f"{MOST_ABSORBED + 1} tokens"):
        again.absorb([65] * (MOST_ABSORBED - again.absorbed + 1))
    assert snapshot(again) == before
    again.absorb([65] * (MOST_ABSORBED - again.absorbed))
    assert again.absorbed == MOST_ABSORBED
    model.session().decode(again.encode(again.checkpoint))


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "error", "says"),
    [
        (
            [65, VOCABULARY],
            errors.UnknownToken,
            f"token 1 is {VOCABULARY}, the vocabulary is 0 to {VOCABULARY - 1}",
        ),
        ([-1], errors.UnknownToken, "token 0 is -1"),
        ([65] * (CONTEXT + 1), errors.ContextTooLong, f"has {CONTEXT + 1} tokens, with 4 of live context"),
        ([], errors.EmptyText, "0 tokens"),
    ],
)
def test_what_a_text_must_not_be(model, tokens, error, says):
    session = model.session()
    session.absorb(list(TEXT[: CHUNK + 3]))
    before = snapshot(session)
    with pytest.raises(error, match=says):
        session.score(tokens)
    if tokens:
        with pytest.raises(error):
            list(session.generate(tokens))
    if len(tokens) <= CONTEXT:
        with pytest.raises(error):
            session.absorb(tokens)
    assert snapshot(session) == before


def test_the_longest_text_that_fits_is_taken(model):
    room = CONTEXT - 1
    assert len(model.session().score([65] * (room + 1)).nats) == room + 1
    with pytest.raises(errors.ContextTooLong, match=f"{room + 2} tokens, with 1 of .* than the {CONTEXT} "):
        model.session().score([65] * (room + 2))
    assert len(list(model.session().generate([65] * room, max_tokens=9))) == 1


class Broken:
    """An engine whose theta or logits are not finite: a real one with one value put in."""

    def __init__(self, engine, output):
        self.spec, self.provider, self._engine, self._output = engine.spec, engine.provider, engine, output

    def run(self, inputs):
        outputs = self._engine.run(inputs)
        outputs[self._output].ravel()[0] = np.nan
        return outputs


@pytest.mark.parametrize(
    ("graph", "output", "error"),
    [
        ("absorb", "theta_out", errors.NonFiniteTheta),
        ("absorb", "state_out.0_o", errors.NonFiniteState),
        ("forward", "logits", errors.NonFiniteLogits),
    ],
)
def test_what_is_not_finite_is_refused_and_the_session_goes_on(model, graph, output, error):
    def loader(bundle, key, options):
        engine = model.engines[key]
        return Broken(engine, output) if key == graph else engine

    broken = TextModel(Engines.load(model.engines.bundle, loader=loader, task="text"))
    good = model.session()
    good.absorb(list(TEXT[: CHUNK + 2]))
    session = broken.session()
    session.resume(good.checkpoint, good.notes())
    before = session.checkpoint, session.pending
    with pytest.raises(error):
        session.absorb(list(TEXT)) if graph == "absorb" else session.score(list(TEXT))
    assert (session.checkpoint, session.pending) == before


def test_an_absorption_that_was_overtaken_is_refused(model):
    session = model.session()
    slow = session.absorbing(list(TEXT))
    next(slow)
    session.absorb(list(OTHER))
    before = snapshot(session)
    with pytest.raises(errors.StaleBase):
        list(slow)
    assert snapshot(session) == before


def test_a_method_without_an_absorb_graph_absorbs_nothing(text_bundle):
    session = TextModel.open(text_bundle, method="source").session()
    for text in (TEXT, OTHER[:3]):
        with pytest.raises(errors.AbsorbUnsupported, match="Serve the bundle with stream"):
            session.absorb(list(text))
    assert session.absorbed == 0


def test_images_and_text_do_not_mix(text_bundle, tmp_path):
    tiny_bundle.build(tmp_path / "images")
    with pytest.raises(errors.WrongTask, match="TextModel"):
        Model.open(text_bundle)
    with pytest.raises(errors.WrongTask, match="TextModel"):
        Model(Engines.load(text_bundle, task="text"))
    with pytest.raises(errors.WrongTask, match="or the request predict"):
        TextModel.open(tmp_path / "images")
    with pytest.raises(errors.WrongTask):
        TextModel(Engines.load(tmp_path / "images"))
    with pytest.raises(errors.UnknownMethod, match="did you mean `stream`"):
        TextModel.open(text_bundle, method="strem")


# --- sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}, {"seed": -1}, {"seed": 1 << 63},
    ],
)  # fmt: skip
def test_bad_sampling_is_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(errors.BadSampling, match=name):
        Sampling(**bad)


def test_no_tokens_are_no_generation(model):
    with pytest.raises(errors.BadSampling, match="max_tokens is 0"):
        list(model.session().generate([65], max_tokens=0))


LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30).map(
    lambda values: np.array(values, np.float32)
)


@given(LOGITS, st.floats(0.01, 10), st.integers(0, 40), st.floats(0.01, 1))
def test_candidates_are_the_most_probable_ones(logits, temperature, top_k, top_p):
    tokens, p = candidates(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert p.sum() == pytest.approx(1)
    assert (np.diff(p) <= 1e-15).all()
    assert len(tokens) <= (top_k or len(logits))
    left = np.setdiff1d(np.arange(len(logits)), tokens)
    assert not len(left) or logits[left].max() <= logits[tokens].min()


@given(
    LOGITS,
    st.floats(min_value=0, max_value=100, exclude_min=True) | st.sampled_from([5e-324, 1e-310, 1e-300, 1e-9]),
    st.integers(0, 40),
    st.floats(0.01, 1),
)
@example(np.array([1, 2, 2, -3], np.float32), 1e-310, 0, 1.0)
@example(np.array([-3e38, 3e38], np.float32), 5e-324, 0, 0.5)
def test_no_temperature_is_too_small_for_probabilities(logits, temperature, top_k, top_p):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens, p = candidates(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert np.isfinite(p).all()
    assert p.sum() == pytest.approx(1)
    assert tokens[0] == np.argmax(logits)
    if temperature < 1e-300:
        assert set(tokens[p > 0]) <= set(np.flatnonzero(logits == logits.max()))


@given(LOGITS)
def test_temperature_zero_takes_the_first_of_the_largest(logits):
    assert draw(logits, GREEDY, 0) == int(np.argmax(logits))


def test_drawing_follows_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    counts = np.bincount([draw(logits, Sampling(seed=1), k) for k in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)
    nucleus = [draw(logits, Sampling(top_p=0.79, seed=1), k) for k in range(300)]
    assert set(nucleus) == {0, 1}
    assert {draw(logits, Sampling(top_k=1, seed=1), k) for k in range(50)} == {0}


@given(LOGITS)
def test_surprise_is_minus_the_logarithm_of_softmax(logits):
    found = surprise_nats(logits[None], np.array([0]))
    expected = -torch.log_softmax(torch.tensor(logits).double(), 0)[0]
    assert found[0] == pytest.approx(float(expected), abs=1e-9)


def test_a_bundle_of_text_opens_with_every_check(text_bundle):
    assert Bundle.open(text_bundle).manifest.text.chunk == CHUNK
