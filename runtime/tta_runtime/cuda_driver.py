"""The CUDA driver, as far as a plan needs it: which GPU is there, its memory, copies, streams.

It is called through `ctypes` and nothing has to be installed for that: every NVIDIA driver brings `libcuda`, on Jetson
as well, and its interface stays compatible. See docs/adr/0005-cuda-driver-by-ctypes.md for what else there is.
"""

from __future__ import annotations

import ctypes
import re
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BadValue, DriverMissing, EngineFailed, OutOfDeviceMemory

LIBRARY = "libcuda.so.1"
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_OUT_OF_MEMORY = 2
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NON_BLOCKING = 1  # a stream that does not wait for the default one
_NAME_BYTES = 256

_Handle = ctypes.c_void_p
_Pointer = ctypes.c_uint64  # CUdeviceptr
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [ctypes.c_uint],
    "cuDriverGetVersion": [ctypes.POINTER(ctypes.c_int)],
    "cuDeviceGetCount": [ctypes.POINTER(ctypes.c_int)],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDeviceGetName": [ctypes.c_char_p, ctypes.c_int, ctypes.c_int],
    "cuDeviceGetAttribute": [ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int],
    "cuDeviceTotalMem_v2": [ctypes.POINTER(ctypes.c_size_t), ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(_Handle), ctypes.c_int],
    "cuDevicePrimaryCtxRelease_v2": [ctypes.c_int],
    "cuCtxSetCurrent": [_Handle],
    "cuMemAlloc_v2": [ctypes.POINTER(_Pointer), ctypes.c_size_t],
    "cuMemFree_v2": [_Pointer],
    "cuMemcpyHtoDAsync_v2": [_Pointer, ctypes.c_void_p, ctypes.c_size_t, _Handle],
    "cuMemcpyDtoHAsync_v2": [ctypes.c_void_p, _Pointer, ctypes.c_size_t, _Handle],
    "cuMemcpyDtoH_v2": [ctypes.c_void_p, _Pointer, ctypes.c_size_t],
    "cuStreamCreate": [ctypes.POINTER(_Handle), ctypes.c_uint],
    "cuStreamSynchronize": [_Handle],
    "cuStreamDestroy_v2": [_Handle],
    "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
}


@dataclass(frozen=True)
class Gpu:
    """What the driver says of a GPU.

    Attributes:
        number: of the device.
        name: e.g. "NVIDIA GeForce RTX 4090".
        capability: compute capability, e.g. (8, 9).
        memory_bytes: of the device.
        driver: version of the kernel module where the system tells it, and of the newest CUDA that it knows.
    """

    number: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    driver: str


class CudaDriver:
    """The loaded driver.

    Args:
        library: name or path of the shared library.

    Raises:
        DriverMissing: it cannot be loaded, does not start, or finds no GPU.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, ctypes.c_int
        except (OSError, AttributeError) as error:
            raise DriverMissing(
                f"the NVIDIA driver cannot be loaded: {error}",
                "Install the driver (in a container: `docker run --gpus all`), or choose engine `cpu`",
            ) from error
        self._start("cuInit", 0)
        count = ctypes.c_int()
        self._start("cuDeviceGetCount", ctypes.byref(count))
        if count.value < 1:
            raise DriverMissing(
                "the NVIDIA driver finds no GPU", "Check `nvidia-smi`, or choose engine `cpu`"
            )
        self.count = count.value

    def gpus(self) -> list[Gpu]:
        """Every GPU that this process may use."""
        return [self.gpu(number) for number in range(self.count)]

    def gpu(self, number: int = 0) -> Gpu:
        """What is known of one GPU.

        Raises:
            BadValue: there is none of that number.
        """
        device = self.device(number)
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self.call("cuDeviceGetName", name, _NAME_BYTES, device)
        capability = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            capability.append(value.value)
        memory = ctypes.c_size_t()
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        text = name.value.decode(errors="replace")
        return Gpu(number, text, (capability[0], capability[1]), memory.value, self._version())

    def device(self, number: int) -> int:
        """The driver's handle of a GPU.

        Raises:
            BadValue: there is none of that number.
        """
        if not 0 <= number < self.count:
            raise BadValue(f"there is no GPU {number}, the driver finds {self.count}", "Numbers start at 0")
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), number)
        return device.value

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function of the driver.

        Raises:
            OutOfDeviceMemory: the GPU has no room.
            EngineFailed: any other error, by its name.
        """
        code = getattr(self._library, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise OutOfDeviceMemory(
                f"{name}: {self._words(code)}",
                "Send smaller batches, lower step_batch, or free the GPU's memory",
            )
        if code:
            raise EngineFailed(
                f"{name}: {self._words(code)}", "Read the kernel's log (dmesg) for NVRM messages"
            )

    def _start(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise DriverMissing(
                f"the NVIDIA driver does not start: {name}: {self._words(code)}",
                "Check `nvidia-smi`; after an update of the driver restart the machine; or choose engine `cpu`",
            )

    def _words(self, code: int) -> str:
        parts = []
        for ask in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            getattr(self._library, ask)(code, ctypes.byref(text))
            parts.append((text.value or b"?").decode(errors="replace"))
        return f"{parts[0]} ({code}): {parts[1]}"

    def _version(self) -> str:
        value = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(value))
        cuda = f"CUDA {value.value // 1000}.{value.value % 1000 // 10}"
        try:
            found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", KERNEL_MODULE.read_text())
        except OSError:  # Jetson has no such file, nor have some containers
            return cuda
        return f"{found[1]}, {cuda}" if found else cuda


class Buffer:
    """Memory of the device; goes back to its pool when nobody holds it any more."""

    def __init__(self, device: CudaDevice, pointer: int, nbytes: int, free: deque[int]) -> None:
        self.pointer = pointer
        self.nbytes = nbytes
        self._device = device  # whose pool must not be given back before
        # Appending to a deque is one operation, whatever thread the garbage collector interrupts.
        weakref.finalize(self, free.append, pointer).atexit = False


class CudaDevice:
    """One GPU, with a pool of its memory. For several threads at once; each that calls must have called `use`.

    The primary context is the one that TensorRT, ONNX Runtime and PyTorch use too.
    """

    def __init__(self, driver: CudaDriver, number: int = 0) -> None:
        self.driver = driver
        self.gpu = driver.gpu(number)
        device = driver.device(number)
        self._context = _Handle()
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._free: dict[int, deque[int]] = {}
        self._streams: list[int] = []
        end = weakref.finalize(self, _give_back, driver, device, self._context, self._free, self._streams)
        end.atexit = False  # then the driver itself may be gone

    def use(self) -> None:
        """Make this GPU the one that the calling thread means."""
        self.driver.call("cuCtxSetCurrent", self._context)

    def stream(self) -> int:
        """A new stream; it lives as long as this object."""
        stream = _Handle()
        self.driver.call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self._streams.append(int(stream.value or 0))
        return self._streams[-1]

    def take(self, nbytes: int) -> Buffer:
        """Memory of at least so many bytes: a buffer that was let go, or a new one.

        Raises:
            OutOfDeviceMemory: there is no room.
        """
        size = _size_class(nbytes)
        free = self._free.setdefault(size, deque())
        try:
            return Buffer(self, free.pop(), size, free)
        except IndexError:
            pass
        try:
            return Buffer(self, self._allocate(size), size, free)
        except OutOfDeviceMemory:
            self.trim()  # buffers of batch sizes that no longer come
            return Buffer(self, self._allocate(size), size, free)

    def trim(self) -> None:
        """Give back what the pool holds and nobody uses."""
        _empty(self.driver, self._free)

    def copy_in(self, buffer: Buffer, array: NDArray[Any], stream: int) -> None:
        """Begin to copy a C-contiguous array into a buffer; it must live until the stream was waited for."""
        self.driver.call("cuMemcpyHtoDAsync_v2", buffer.pointer, array.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: NDArray[Any], buffer: Buffer, stream: int) -> None:
        """Begin to copy a buffer into a C-contiguous array."""
        self.driver.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, buffer.pointer, array.nbytes, stream)

    def fetch(self, buffer: Buffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A buffer's values as a new array, waited for."""
        self.use()
        array = np.empty(shape, dtype)
        self.driver.call("cuMemcpyDtoH_v2", array.ctypes.data, buffer.pointer, array.nbytes)
        return array

    def wait(self, stream: int) -> None:
        """Until everything of a stream is done.

        Raises:
            EngineFailed: something of it failed.
        """
        self.driver.call("cuStreamSynchronize", stream)

    def _allocate(self, nbytes: int) -> int:
        pointer = _Pointer()
        self.driver.call("cuMemAlloc_v2", ctypes.byref(pointer), nbytes)
        return int(pointer.value)


def _empty(driver: CudaDriver, pool: dict[int, deque[int]]) -> None:
    for free in list(pool.values()):
        with suppress(IndexError):  # another thread may take the last one
            while True:
                driver.call("cuMemFree_v2", free.pop())


def _give_back(
    driver: CudaDriver, device: int, context: ctypes.c_void_p, pool: dict[int, deque[int]], streams: list[int]
) -> None:
    """When nobody holds a device any more, nor a buffer of it."""
    with suppress(EngineFailed):  # a GPU that has failed takes its memory with it
        driver.call("cuCtxSetCurrent", context)
        _empty(driver, pool)
        for stream in streams:
            driver.call("cuStreamDestroy_v2", stream)
        driver.call("cuDevicePrimaryCtxRelease_v2", device)


def _size_class(nbytes: int) -> int:
    """Bytes to take for so many: eight steps in each octave, so that batches of all sizes share buffers."""
    step = max(256, 1 << max(0, nbytes.bit_length() - 3))
    return max(1, -(-nbytes // step)) * step
