"""weights.bin: every large constant of a bundle's graphs, once on disk, as external data they all share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import onnx_ir as ir

WEIGHTS = "weights.bin"
_ALIGNMENT = 64
_INLINE_BYTES = 256


class WeightsWriter:
    """Appends constants to one file and points the graphs' initializers at them; equal bytes are stored once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = (directory / WEIGHTS).open("wb")
        self._offsets: dict[str, int] = {}

    def __enter__(self) -> WeightsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def externalise(self, model: ir.Model) -> None:
        """Moves the large initializers of ``model`` into the file, in place."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_BYTES:
                continue
            data = tensor.tobytes()
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                self._offset(data),
                len(data),
                tensor.dtype,
                name=str(value.name),
                shape=ir.Shape([int(axis) for axis in tensor.shape.numpy()]),
                base_dir=self._directory,
            )

    def _offset(self, data: bytes) -> int:
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._offsets[digest] = self._file.tell()
            self._file.write(data)
        return self._offsets[digest]
