"""Options given as text: read as the type of their default, and a misspelt one answered with the nearest known."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping

OptionValue = str | float | bool


class UnknownOptionError(ValueError):
    """A method or an adapter has no such option, or not for such a value."""


def options_in(constructor: Callable[..., object]) -> dict[str, OptionValue]:
    """The keyword-only parameters whose defaults are text, numbers or truth values, with these defaults."""
    return {
        key: parameter.default
        for key, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        and isinstance(parameter.default, str | float | bool)
    }


def chosen(
    what: str, name: str, given: Mapping[str, OptionValue], known: Mapping[str, OptionValue]
) -> dict[str, OptionValue]:
    """The given options, each of the type of its default.

    Args:
        what: "method" or "adapter", for messages.
        name: whose options they are.
        given: by name, as text or as the default's own type ("0.001", "adam", "false").
        known: the defaults by name.

    Raises:
        UnknownOptionError: no such option, or its value cannot be read.
    """
    for key in given:
        if key not in known:
            raise UnknownOptionError(f"{what} {name} has no option {key!r}{nearest(key, known)}")
    return {key: _read(f"{name}.{key}", value, known[key]) for key, value in given.items()}


def nearest(word: str, known: Mapping[str, object]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known) or 'none'}"


def _read(name: str, value: OptionValue, default: OptionValue) -> OptionValue:
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false", "1", "0"):
            raise UnknownOptionError(f"{name}={value!r} is not true or false")
        return value.lower() in ("true", "1")
    try:
        return float(value)
    except ValueError as error:
        raise UnknownOptionError(f"{name}={value!r} is not a number") from error


def whole(name: str, value: float, low: int = 1) -> int:
    """An option that is a whole number.

    Raises:
        ValueError: it is not one, or below ``low``.
    """
    if not math.isfinite(value) or value != int(value) or value < low:
        raise ValueError(f"{name} is {value:g}: a whole number from {low}")
    return int(value)
