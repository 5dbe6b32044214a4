"""The methods by name, and how to build one with structural options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from tta_adapters.base import Method
from tta_adapters.methods.auto import Auto
from tta_adapters.methods.cotta import Cotta
from tta_adapters.methods.distill import Distill
from tta_adapters.methods.eta import Eata, Eta
from tta_adapters.methods.lame import Lame
from tta_adapters.methods.norm import Norm
from tta_adapters.methods.rdumb import Rdumb
from tta_adapters.methods.roid import Roid
from tta_adapters.methods.rotta import Rotta
from tta_adapters.methods.sar import Sar
from tta_adapters.methods.source import Source
from tta_adapters.methods.t3a import T3a
from tta_adapters.methods.tent import Tent
from tta_adapters.methods.vida import Vida
from tta_adapters.methods.zoa import Zoa
from tta_adapters.network import NetworkAdapter
from tta_adapters.options import OptionValue, UnknownOptionError, chosen, nearest
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
    "rotta": Rotta,
    "lame": Lame,
    "t3a": T3a,
    "zoa": Zoa,
    "auto": Auto,
    "distill": Distill,
    "vida": Vida,
}

ADAPTER_OF: Mapping[str, str] = {"vida": "vida"}
"""The methods that work on one adapter only; the others take any."""


class UnknownMethodError(ValueError):
    """No method of that name."""


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
    settings = chosen("method", name, options or {}, known)
    try:
        return _constructor(method)(adapter, **settings)
    except SelectionError:
        raise
    except ValueError as error:
        raise UnknownOptionError(str(error)) from error


def _constructor(method: str | Callable[..., Method]) -> Callable[..., Method]:
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise UnknownMethodError(f"unknown method {method!r}{nearest(method, METHODS)}")
    return METHODS[method]
