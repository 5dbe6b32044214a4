"""What holds of every engine that keeps theta on its device: it agrees with the plain one, also while others ask."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from snapshots import unchanged
from tta_runtime import Engine, Model, errors
from tta_runtime.bundle import Bundle

Feed = dict[str, Any]


def check_steps(plain: Model, there: Model, batches: Iterable[NDArray[Any]]) -> None:
    """Both models, fresh, adapt to the same batches with the same numbers to the bit, and have moved at the end."""
    for x in batches:
        expected, found = plain.adapt(x), there.adapt(x)
        np.testing.assert_array_equal(found.logits, expected.logits)
        assert found.report == expected.report
        for source in (False, True):
            np.testing.assert_array_equal(
                there.predict(x, source=source).logits, plain.predict(x, source=source).logits
            )
    np.testing.assert_array_equal(there.theta, plain.theta)
    assert there.state.keys() == plain.state.keys()
    for name, value in plain.state.items():
        np.testing.assert_array_equal(there.state[name], value)
    assert (there.digest, there.distance) == (plain.digest, plain.distance)
    assert there.distance > 0


def check_answers_beside_steps(
    model: Model, replay: Model, batches: Sequence[NDArray[Any]], probe: NDArray[Any]
) -> None:
    """Two threads ask while `model` steps: each answer is that of one theta, as `replay` has them one by one."""
    allowed = [replay.predict(probe).logits.tobytes()]
    for x in batches:
        replay.adapt(x)
        allowed.append(replay.predict(probe).logits.tobytes())
    wrong: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            if model.predict(probe).logits.tobytes() not in allowed:
                wrong.append(1)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    for x in batches:
        model.adapt(x)
    done.set()
    for thread in asking:
        thread.join()
    assert not wrong


def check_refused(
    bundle: Bundle, forward: Engine, x: NDArray[Any], change: Callable[[Feed], object], says: str
) -> None:
    """The graph `forward` refuses changed inputs, names what is wrong with them, and runs the next time."""
    good: Feed = {"x": x, "theta": bundle.theta0}
    expected = forward.run(good)["logits"]
    bad = dict(good)
    change(bad)
    with unchanged(bundle.path), pytest.raises(errors.EngineFailed, match="forward") as refusal:
        forward.run(bad)
    assert says in str(refusal.value)
    np.testing.assert_array_equal(forward.run(good)["logits"], expected)
