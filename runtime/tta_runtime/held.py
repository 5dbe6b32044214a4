"""Arrays that an engine left on its device: what a step returns as theta' and state' goes into the next one from there.

Everything else sees ordinary arrays. A copy comes to the host when somebody looks, and only of what is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from .arrays import frozen, is_finite

_T = TypeVar("_T")


@dataclass
class Traffic:
    """Bytes that an engine has copied between host and device since it was loaded; for measurements."""

    to_host: int = 0
    to_device: int = 0


class Resident:
    """An array on an engine's device. Nobody writes to it as long as somebody holds it.

    Not an abstract class: whether an array is one is asked for every input of every run, which costs more of those.

    Args:
        shape: of the array.
        dtype: likewise.
        traffic: where the bytes that come to the host are counted.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], traffic: Traffic) -> None:
        self.shape = shape
        self.dtype = dtype
        self._traffic = traffic

    def _fetch(self) -> NDArray[Any]:
        """A copy of the values on the host."""
        raise NotImplementedError

    def _total(self) -> float | None:
        """Their sum, NaN or Inf where one is among them; None where nobody has it."""
        raise NotImplementedError

    def host(self) -> NDArray[Any]:
        """The values on the host, read-only; copied the first time only.

        Raises:
            EngineFailed: the device fails.
        """
        return self._host

    @cached_property
    def _host(self) -> NDArray[Any]:
        array = frozen(self._fetch())
        self._traffic.to_host += array.nbytes
        return array

    def is_finite(self) -> bool:
        """Whether every value is finite: where their sum is, every value is; else each is looked at, on the host.

        Raises:
            EngineFailed: the device fails.
        """
        if self.dtype.kind != "f":
            return True
        total = self._total()
        return (total is not None and math.isfinite(total)) or is_finite(self.host())


Held = NDArray[Any] | Resident
"""An array, wherever it is."""


def host(value: Held) -> NDArray[Any]:
    """The values on the host: the array itself, unless it is on a device."""
    return value.host() if isinstance(value, Resident) else value


def on_host(field: str) -> Callable[[type[_T]], type[_T]]:
    """Class decorator: a field may be given an array on a device (by `hidden`) and is read as one on the host."""

    def decorate(cls: type[_T]) -> type[_T]:
        setattr(cls, field, _OnHost(field))
        return cls

    return decorate


class _OnHost:
    def __init__(self, name: str) -> None:
        self._name = name

    def __set__(self, instance: object, value: Held) -> None:
        instance.__dict__[self._name] = value

    def __get__(self, instance: object, owner: type) -> object:
        return self if instance is None else host(instance.__dict__[self._name])


def hidden(value: Held) -> NDArray[np.float32]:
    """The array where it is, for a field that is read through `on_host`."""
    return cast("NDArray[np.float32]", value)


def unfetched(instance: object, field: str) -> Held:
    """What a field that is read through `on_host` was given, where it is."""
    value: Held = instance.__dict__[field]
    return value


def finite(value: Held) -> bool:
    """Whether every value is finite, asked where the array is."""
    return value.is_finite() if isinstance(value, Resident) else is_finite(value)


class HostView(Mapping[str, NDArray[Any]]):
    """Arrays by name, each fetched when it is looked at.

    Args:
        arrays: where they are; read-only from now on.
    """

    def __init__(self, arrays: Mapping[str, Held]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> NDArray[Any]:
        return host(self._arrays[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def where(self, name: str) -> Held:
        """The array where it is."""
        return self._arrays[name]


def where(arrays: Mapping[str, NDArray[Any]], name: str) -> Held:
    """An array of a mapping where it is, without fetching it."""
    return arrays.where(name) if type(arrays) is HostView else arrays[name]
