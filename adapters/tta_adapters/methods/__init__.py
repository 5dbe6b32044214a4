"""The methods by name, and how to build one with structural options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping

from tta_adapters.base import Method
from tta_adapters.methods.cotta import Cotta
from tta_adapters.methods.eta import Eata, Eta
from tta_adapters.methods.lame import Lame
from tta_adapters.methods.norm import Norm
from tta_adapters.methods.rdumb import Rdumb
from tta_adapters.methods.roid import Roid
from tta_adapters.methods.sar import Sar
from tta_adapters.methods.source import Source
from tta_adapters.methods.t3a import T3a
from tta_adapters.methods.tent import Tent
from tta_adapters.methods.zoa import Zoa
from tta_adapters.network import NetworkAdapter
from tta_adapters.select import SelectionError

METHODS: Mapping[str, Callable[..., Method]] = {
    "source": Source,
    "norm": Norm,
    "tent": Tent,
    "eta": Eta,
    "eata": Eata,
    "sar": Sar,
    "rdumb": Rdumb,
    "roid": Roid,
    "cotta": Cotta,
    "lame": Lame,
    "t3a": T3a,
    "zoa": Zoa,
}

OptionValue = str | float | bool


class UnknownMethodError(ValueError):
    """No method of that name."""


class UnknownOptionError(ValueError):
    """The method has no such option, or not for such a value."""


def options_of(method: str | Callable[..., Method]) -> dict[str, OptionValue]:
    """The options of a method with their defaults: structure and default hyper values alike.

    Args:
        method: a key of :data:`METHODS`, or a constructor taking an adapter and keyword-only options.

    Raises:
        UnknownMethodError: no such method.
    """
    signature = inspect.signature(_constructor(method))
    return {
        key: parameter.default
        for key, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def make_method(
    method: str | Callable[..., Method],
    adapter: NetworkAdapter,
    options: Mapping[str, OptionValue] | None = None,
) -> Method:
    """Builds a method over an adapter.

    Args:
        method: a key of :data:`METHODS`, or a constructor taking an adapter and keyword-only options.
        adapter: whose theta it changes.
        options: by name, as text or as the default's own type ("0.001", "adam", "false").

    Raises:
        UnknownMethodError: no such method; the message suggests the nearest.
        UnknownOptionError: no such option, or its value cannot be read.
        SelectionError: the method has nothing to work on in this network.
    """
    name = method if isinstance(method, str) else getattr(method, "__name__", "method")
    known = options_of(method)
    chosen: dict[str, OptionValue] = {}
    for key, value in (options or {}).items():
        if key not in known:
            raise UnknownOptionError(f"method {name} has no option {key!r}{_nearest(key, known)}")
        chosen[key] = _coerce(f"{name}.{key}", value, known[key])
    try:
        return _constructor(method)(adapter, **chosen)
    except SelectionError:
        raise
    except ValueError as error:
        raise UnknownOptionError(str(error)) from error


def _constructor(method: str | Callable[..., Method]) -> Callable[..., Method]:
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise UnknownMethodError(f"unknown method {method!r}{_nearest(method, METHODS)}")
    return METHODS[method]


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
