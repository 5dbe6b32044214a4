"""The methods by name, and how to build one with structural options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping

from tta_adapters.base import Method
from tta_adapters.methods.norm import Norm
from tta_adapters.methods.source import Source
from tta_adapters.methods.tent import Tent
from tta_adapters.norm import NormAdapter

METHODS: Mapping[str, Callable[..., Method]] = {"source": Source, "norm": Norm, "tent": Tent}

OptionValue = str | float | bool


class UnknownMethodError(ValueError):
    """No method of that name."""


class UnknownOptionError(ValueError):
    """The method has no such option, or not for such a value."""


def options_of(name: str) -> dict[str, OptionValue]:
    """The options of a method with their defaults: structure and default hyper values alike.

    Raises:
        UnknownMethodError: no such method.
    """
    signature = inspect.signature(_constructor(name))
    return {
        key: parameter.default
        for key, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def make_method(name: str, adapter: NormAdapter, options: Mapping[str, OptionValue] | None = None) -> Method:
    """Builds a method over an adapter.

    Args:
        name: a key of :data:`METHODS`.
        adapter: whose theta it changes.
        options: by name, as text or as the default's own type ("0.001", "adam", "false").

    Raises:
        UnknownMethodError: no such method; the message suggests the nearest.
        UnknownOptionError: no such option, or its value cannot be read.
    """
    known = options_of(name)
    chosen: dict[str, OptionValue] = {}
    for key, value in (options or {}).items():
        if key not in known:
            raise UnknownOptionError(f"method {name} has no option {key!r}{_nearest(key, known)}")
        chosen[key] = _coerce(f"{name}.{key}", value, known[key])
    try:
        return _constructor(name)(adapter, **chosen)
    except ValueError as error:
        raise UnknownOptionError(str(error)) from error


def _constructor(name: str) -> Callable[..., Method]:
    if name not in METHODS:
        raise UnknownMethodError(f"unknown method {name!r}{_nearest(name, METHODS)}")
    return METHODS[name]


def _nearest(word: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known) or 'none'}"


def _coerce(name: str, value: OptionValue, default: OptionValue) -> OptionValue:
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
