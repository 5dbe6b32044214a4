"""When a refused call is made again: by the error, the count and a random number. The clients do the waiting."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tta_edge.errors import Busy, Draining, Unreachable
from tta_runtime.errors import BadValue, TtaError


@dataclass(frozen=True)
class Retry:
    """Make a call again that certainly was not carried out.

    That is so after three errors only: `Busy` and `Draining` are refusals, and `Unreachable` means that the
    request never left this process. After `DeadlineExceeded` or `ConnectionLost` nobody knows. `predict`
    changes theta, so one repeated on suspicion could adapt a stream twice to the same batch; whether that
    matters only the caller can say. Every other error would come again.

    The deadline of a call holds for each attempt.

    Attributes:
        attempts: most times that a call is made, the first one included.
        wait_s: before the second attempt; doubled before each further one, and shortened by up to a half at
            random, so that many clients of one daemon do not come back at the same moment.
        max_wait_s: longest wait. A `Busy` daemon is asked again when it said, not earlier and up to a tenth
            later; if it asked for a longer wait than this, the call fails at once.
        errors: after which a call is made again; of those that say that nothing was carried out.

    Raises:
        BadValue: fewer than one attempt, or waits that are not 0 <= wait_s <= max_wait_s.
    """

    attempts: int = 5
    wait_s: float = 0.1
    max_wait_s: float = 5.0
    errors: tuple[type[TtaError], ...] = (Busy, Draining, Unreachable)

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise BadValue(f"attempts is {self.attempts}", "Use 1 or more; 1 never repeats")
        if not 0 <= self.wait_s <= self.max_wait_s < float("inf"):
            raise BadValue(
                f"wait_s is {self.wait_s} and max_wait_s {self.max_wait_s}", "Use 0 <= wait_s <= max_wait_s"
            )

    def before_next(self, error: TtaError, attempt: int, draw: float) -> float | None:
        """How long to wait before the call is made again.

        Args:
            error: what the last attempt ended with.
            attempt: its number, from 1.
            draw: a random number in [0, 1).

        Returns:
            Seconds; `None` if the call has failed.
        """
        if attempt >= self.attempts or not isinstance(error, self.errors):
            return None
        if isinstance(error, Busy) and error.retry_after_s is not None:
            told_s = error.retry_after_s
            return told_s * (1 + 0.1 * draw) if 0 <= told_s <= self.max_wait_s else None
        return backoff_s(self.wait_s, self.max_wait_s, attempt, draw)


class Attempts:
    """The attempts at one call: counts those that failed, and says what follows each.

        attempts = Attempts(policy)
        while True:
            try:
                return attempt()
            except TtaError as error:
                wait_s = attempts.failed(error)
            sleep(wait_s)

    Args:
        policy: when a call is made again.
        draw: gives random numbers in [0, 1).
    """

    def __init__(self, policy: Retry, draw: Callable[[], float] = random.random) -> None:
        self._policy = policy
        self._draw = draw
        self._failed = 0

    def failed(self, error: TtaError, *, begun: bool = False) -> float:
        """How long to wait before the call is made again.

        Args:
            error: what this attempt ended with.
            begun: the caller has part of the answer already, and another attempt would begin it anew.

        Returns:
            Seconds.

        Raises:
            TtaError: `error` itself, where the call has failed.
        """
        self._failed += 1
        wait_s = None if begun else self._policy.before_next(error, self._failed, self._draw())
        if wait_s is not None:
            return wait_s
        try:
            raise error
        finally:
            del error  # else it and this frame hold each other, and with them what was to be sent


def backoff_s(wait_s: float, max_wait_s: float, attempt: int, draw: float) -> float:
    """How long to wait after the failed attempt of that number, from 1.

    Args:
        wait_s: after the first; doubled for each further one.
        max_wait_s: the longest.
        attempt: number of attempts that have failed.
        draw: a random number in [0, 1); it shortens the wait by up to a half.
    """
    return min(max_wait_s, wait_s * 2.0 ** min(attempt - 1, 1000)) * (1 - 0.5 * draw)


NEVER = Retry(attempts=1)
"""What clients do unless told otherwise."""
