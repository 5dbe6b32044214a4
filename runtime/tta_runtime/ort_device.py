"""An ONNX Runtime session whose theta and state stay on its device (I/O binding).

Nothing is ever written over: each run gets new output buffers from the provider's arena, and a buffer returns there
when the last one who holds it lets go. A stream that keeps what it had before the last step so rotates three of them,
and a roll-back is the change of a reference.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import is_fixed
from .engine import FIXED, RESIDENT, Arrays
from .held import Held, Resident, Traffic, host
from .manifest import Graph
from .sum_graph import INPUT, OUTPUT, sum_graph

_UPLOADS = 8
"""Arrays of the host that a graph keeps on its device: the source theta, anchors, what streams were restored to."""


_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(int64)": "int64"}


class OrtResident(Resident):
    """An OrtValue that stays where it is."""

    def __init__(self, value: Any, device: OrtDevice, traffic: Traffic) -> None:
        super().__init__(tuple(value.shape()), np.dtype(_DTYPES[value.data_type()]), traffic)
        self.value = value
        self.device = device

    def _fetch(self) -> NDArray[Any]:
        with self.device.failures():
            return np.ascontiguousarray(self.value.numpy())

    def _total(self) -> float:
        self._traffic.to_host += 4
        return self.device.total(self.value)


class OrtDevice:
    """Where a provider keeps arrays, and what is asked of them there.

    Args:
        ort: the module onnxruntime.
        kind: "cuda" or "cpu".
        number: of the device.
        providers: as for a session.
        failures: a context manager that gives the errors of onnxruntime our name.
    """

    def __init__(self, ort: Any, kind: str, number: int, providers: list[Any], failures: Any) -> None:
        self.kind, self.number = kind, number
        self.failures = failures
        self._ort = ort
        self._providers = providers

    def total(self, value: Any) -> float:
        """Sum of a float32 OrtValue's elements; NaN or Inf where one is among them."""
        with self.failures():
            binding = self._summing.io_binding()
            binding.bind_ortvalue_input(INPUT, value)
            binding.bind_output(OUTPUT, "cpu")
            self._summing.run_with_iobinding(binding)
            return float(binding.get_outputs()[0].numpy())

    @cached_property
    def _summing(self) -> Any:
        settings = self._ort.SessionOptions()
        settings.log_severity_level = 4
        # TensorRT would build a plan for it.
        providers = [each for each in self._providers if each[0] != "TensorrtExecutionProvider"]
        return self._ort.InferenceSession(sum_graph(), settings, providers=providers, enable_fallback=0)


class BoundSession:
    """Runs a session with what is bound to theta and state on the device. For several threads at once.

    Args:
        session: of the graph.
        graph: its ports.
        device: where its provider keeps arrays.

    Attributes:
        traffic: bytes copied; counted without a lock.
    """

    def __init__(self, session: Any, graph: Graph, device: OrtDevice, ort: Any) -> None:
        self.traffic = Traffic()
        self._session = session
        self._graph = graph
        self._device = device
        self._ort = ort
        self._lock = threading.Lock()
        self._uploads: OrderedDict[int, tuple[NDArray[Any], Any]] = OrderedDict()

    def run(self, inputs: Arrays) -> dict[str, Held]:
        """Outputs by name; those bound to theta and state are `OrtResident`."""
        binding = self._session.io_binding()
        used = []  # a binding does not keep what it was given
        for port in self._graph.inputs:
            given = inputs[port.name]
            if isinstance(given, OrtResident) and self._same_place(given.device):
                value = given.value
            else:
                array = host(given)
                value = self._uploaded(array) if port.bind in FIXED and is_fixed(array) else None
                if value is None:
                    used.append(array)
                    binding.bind_cpu_input(port.name, array)
                    self.traffic.to_device += array.nbytes
                    continue
            used.append(value)
            binding.bind_ortvalue_input(port.name, value)
        for port in self._graph.outputs:
            place = (self._device.kind, self._device.number) if port.bind in RESIDENT else ("cpu", 0)
            binding.bind_output(port.name, *place)
        self._session.run_with_iobinding(binding)
        return dict(self._outputs(binding.get_outputs()))

    def _outputs(self, values: list[Any]) -> Any:
        for port, value in zip(self._graph.outputs, values, strict=True):
            if port.bind in RESIDENT:
                yield port.name, OrtResident(value, self._device, self.traffic)
            else:
                array = value.numpy()
                self.traffic.to_host += array.nbytes
                yield port.name, array

    def _same_place(self, other: OrtDevice) -> bool:
        return (other.kind, other.number) == (self._device.kind, self._device.number)

    def _uploaded(self, array: NDArray[Any]) -> Any:
        """The array on the device, from before if it was there; nobody can write to it, so it is known by identity."""
        with self._lock:
            known = self._uploads.get(id(array))
            if known is None:
                value = self._ort.OrtValue.ortvalue_from_numpy(array, self._device.kind, self._device.number)
                self.traffic.to_device += array.nbytes
                known = self._uploads[id(array)] = array, value
                if len(self._uploads) > _UPLOADS:
                    self._uploads.popitem(last=False)
            self._uploads.move_to_end(id(array))
            return known[1]
