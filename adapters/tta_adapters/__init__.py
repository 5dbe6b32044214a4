"""Adapters (what theta is) and methods (how it changes) as pure torch functions; see :mod:`tta_adapters.base`."""

from tta_adapters.base import Adapter, Batch, Forward, Hyper, Method, MethodSpec, State, StateSpec, Step
from tta_adapters.methods import METHODS, make_method
from tta_adapters.network import NetworkAdapter
from tta_adapters.norm import NormAdapter
from tta_adapters.shelf import ADAPTERS, make_adapter
from tta_adapters.testing import check_method

__all__ = [
    "ADAPTERS",
    "METHODS",
    "Adapter",
    "Batch",
    "Forward",
    "Hyper",
    "Method",
    "MethodSpec",
    "NetworkAdapter",
    "NormAdapter",
    "State",
    "StateSpec",
    "Step",
    "check_method",
    "make_adapter",
    "make_method",
]
