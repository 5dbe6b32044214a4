"""The full adapter: theta is every weight of the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tta_adapters.network import NetworkAdapter
from tta_adapters.select import SelectionError, matches


class FullAdapter(NetworkAdapter):
    """All parameters, in the order of the network, then the running statistics of all BatchNorms.

    For comparison with papers that train everything (CoTTA), on small networks: a step makes the gradient of every
    weight, and theta, the optimiser's state and a teacher are each as large as the network.

    Args:
        model: the network; see :class:`tta_adapters.network.NetworkAdapter`, as are the other keywords.
        include: shell patterns of paths of the parameters ("blocks.*", "*.weight").
        exclude: shell patterns to leave out.

    Raises:
        SelectionError: the patterns select no parameter.
    """

    name = "full"

    def __init__(
        self, model: nn.Module, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), **common: Any
    ) -> None:
        super().__init__(model, **common)
        candidates = {
            name: value for name, value in self.module.named_parameters() if value.is_floating_point()
        }
        for name, value in candidates.items():
            if matches(name, include) and not matches(name, exclude):
                self._add(name, name.rpartition(".")[2], value)
        if not self.tensors:
            raise SelectionError(
                f"no parameter selected: include={list(include)} exclude={list(exclude)} among {len(candidates)} "
                f"(first: {', '.join(list(candidates)[:8]) or 'none'})"
            )
        self._add_statistics()
