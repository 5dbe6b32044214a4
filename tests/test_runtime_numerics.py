"""Softmax, entropy, random numbers, and the errors' wording."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tta_runtime import errors
from tta_runtime.arrays import is_finite, owned
from tta_runtime.errors import TtaError, did_you_mean
from tta_runtime.numerics import entropy, log_softmax, softmax, uniforms

LOGITS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-1e4, 1e4, width=32)
)


@given(LOGITS)
def test_softmax_and_entropy_agree_with_float64_formulas(logits):
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(softmax(logits), p, atol=1e-6)
    np.testing.assert_allclose(np.exp(log_softmax(logits)), p, atol=1e-6)
    h = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1)
    np.testing.assert_allclose(entropy(logits), h, atol=1e-5)
    assert (entropy(logits) <= math.log(logits.shape[1]) + 1e-5).all()
    assert (entropy(logits) >= -1e-6).all()


def test_entropy_of_equal_logits_is_ln_of_the_classes():
    np.testing.assert_allclose(entropy(np.zeros((2, 7), np.float32)), math.log(7), rtol=1e-6)


def test_uniforms_are_a_function_of_seed_and_step_alone():
    np.testing.assert_array_equal(uniforms(7, 3, 100), uniforms(7, 3, 100))
    assert uniforms(7, 3, 100).dtype == np.float32
    assert not np.array_equal(uniforms(7, 3, 100), uniforms(8, 3, 100))
    np.testing.assert_array_equal(uniforms(7, 3, 10), uniforms(7, 3, 100)[:10])
    values = uniforms(0, 0, 100_000)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert abs(values.mean() - 0.5) < 0.01


def test_the_numbers_of_different_steps_have_nothing_in_common():
    """With the step's number as the counter itself, step k + 1 repeats step k shifted by one block."""
    steps = [uniforms(1, k, 4096) for k in range(8)]
    for i, a in enumerate(steps):
        for b in steps[:i]:
            assert len(np.intersect1d(a, b)) < 30  # by chance: 4096^2 / 2^24 = 1


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=5), elements=st.floats(width=32)))
def test_is_finite_is_exact(array):
    assert is_finite(array) == bool(np.isfinite(array).all())


def test_is_finite_when_the_sum_overflows():
    assert is_finite(np.full(8, 3e38, np.float32))
    assert not is_finite(np.array([np.inf, -np.inf], np.float32))
    assert is_finite(np.arange(3))


def test_owned_arrays_cannot_be_changed_by_anybody():
    mine = np.arange(4.0)
    view = mine[:2]
    view.flags.writeable = False
    safe = owned(view)  # read-only, but the array under it is not
    mine[0] = 9.0
    assert safe[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        safe[0] = 1.0
    assert owned(safe) is safe


def all_errors(cls: type[TtaError] = TtaError) -> list[type[TtaError]]:
    return [
        cls,
        *(e for sub in cls.__subclasses__() if sub.__module__ == errors.__name__ for e in all_errors(sub)),
    ]


def test_every_error_has_its_own_code_and_a_docstring():
    codes = [cls.code for cls in all_errors()]
    assert len(codes) == len(set(codes))
    for cls in all_errors():
        assert cls.__doc__
        assert cls.code == cls.code.lower()
        assert " " not in cls.code


def test_an_error_says_cause_and_fix_and_survives_pickling():
    error = errors.StaleBase("made for 3f9c, active is a107", "Fetch a snapshot")
    assert str(error) == "made for 3f9c, active is a107. Fetch a snapshot."
    question = "unknown key `a`, did you mean `b`?"
    assert str(errors.UnknownKey(question)) == question
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.cause, again.fix) == (errors.StaleBase, error.cause, error.fix)


def test_did_you_mean():
    assert did_you_mean("adapt_evry", ["adapt_every", "method"]) == ", did you mean `adapt_every`?"
    assert did_you_mean("zzz", ["b", "a"]) == "; known: `a`, `b`"
    assert did_you_mean("zzz", [str(i) for i in range(50)]) == ""
