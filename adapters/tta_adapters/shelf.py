"""The adapters by name, and how to build one with structural options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from tta_adapters.full import FullAdapter
from tta_adapters.lora import LoraAdapter
from tta_adapters.network import NetworkAdapter
from tta_adapters.norm import NormAdapter
from tta_adapters.options import OptionValue, UnknownOptionError, chosen, nearest, options_in
from tta_adapters.select import SelectionError
from tta_adapters.side import SideAdapter
from tta_adapters.vida import VidaAdapter

ADAPTERS: Mapping[str, Callable[..., NetworkAdapter]] = {
    "norm": NormAdapter,
    "lora": LoraAdapter,
    "vida": VidaAdapter,
    "side": SideAdapter,
    "full": FullAdapter,
}


class UnknownAdapterError(ValueError):
    """No adapter of that name."""


def adapter_options(adapter: str) -> dict[str, OptionValue]:
    """The structural options of an adapter with their defaults.

    Raises:
        UnknownAdapterError: no such adapter; the message suggests the nearest.
    """
    if adapter not in ADAPTERS:
        raise UnknownAdapterError(f"unknown adapter {adapter!r}{nearest(adapter, ADAPTERS)}")
    return options_in(ADAPTERS[adapter])


def make_adapter(
    adapter: str,
    model: nn.Module,
    options: Mapping[str, OptionValue] | None = None,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    **common: Any,
) -> NetworkAdapter:
    """Builds an adapter of a network.

    Args:
        adapter: a key of :data:`ADAPTERS`.
        model: the network.
        options: by name, as text or as the default's own type ("8", "false").
        include: shell patterns of module paths.
        exclude: shell patterns to leave out.
        common: what :class:`tta_adapters.network.NetworkAdapter` takes.

    Raises:
        UnknownAdapterError: no such adapter; the message suggests the nearest.
        UnknownOptionError: no such option, or its value cannot be read.
        SelectionError: the adapter finds nothing to work on in this network.
    """
    settings = chosen("adapter", adapter, options or {}, adapter_options(adapter))
    try:
        return ADAPTERS[adapter](model, include=include, exclude=exclude, **settings, **common)
    except SelectionError:
        raise
    except ValueError as error:
        raise UnknownOptionError(str(error)) from error
