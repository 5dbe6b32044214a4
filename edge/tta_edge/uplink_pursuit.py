"""What an edge follows by its number: patches, of which it wants the newest, and roots, of which it wants each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Number = TypeVar("Number", int, tuple[int, int])


class Pursuit(Generic[Number]):
    """What there is, what the edge has, and what it asks for next.

    Args:
        none: the number of nothing.
        wanted: from the newest number and the one that the edge has to the one that it asks for.

    Attributes:
        newest: the highest that it was told of.
        have: up to which nothing is asked for.
    """

    def __init__(self, none: Number, wanted: Callable[[Number, Number], Number]) -> None:
        self.newest: Number = none
        self.have: Number = none
        self._wanted: Callable[[Number, Number], Number] = wanted
        self._asking: Number = none
        self._answered: tuple[Number, float] | None = None

    def there_is(self, number: Number) -> None:
        """It was told of this one."""
        self.newest = max(self.newest, number)

    def has(self, number: Number) -> None:
        """The edge holds this one, or wants it no more."""
        self.have = max(self.have, number)

    def lacks(self, number: Number, held: Number) -> bool:
        """This one could not be kept, what is held is older; gives whether it is asked for again."""
        if self.have != number:
            return False
        self.have = held
        return True

    def ask(self) -> Number:
        """What is asked for now."""
        self._asking = self._wanted(self.newest, self.have)
        return self._asking

    def answered(self, now_s: float) -> None:
        """What was asked for has come, or is not to be had."""
        self._answered = self._asking, now_s

    def due_s(self, since_s: float, again_s: float) -> float | None:
        """When it is to ask, as long as it is not asking.

        Args:
            since_s: from when on it may.
            again_s: to wait after an answer, before the same is asked for again.
        """
        if self.newest <= self.have:
            return None
        if self._answered is not None and self._answered[0] == self._wanted(self.newest, self.have):
            return self._answered[1] + again_s
        return since_s
