"""A GPU through the CUDA driver, by ctypes: what the builder of engines and sessions run on, without any framework.

Nothing but the standard library is imported and Python 3.8 will do: the builder takes this file along.
"""

from __future__ import annotations

import ctypes
from typing import Any

CUDA_REMEDIES = {
    2: "free memory of the GPU or ask for smaller shapes",
    100: "run this on a machine with an NVIDIA GPU, or make one visible with CUDA_VISIBLE_DEVICES",
    201: "call activate() in this thread first",
    803: "install the driver that belongs to the loaded kernel module, or reboot",
}


class Failure(Exception):
    """What ends the work: one line for people, a kind for programs."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.kind = kind


class Cuda:
    """A GPU through the CUDA driver, its primary context current in the thread that made it.

    Addresses, streams and events are ints, sizes are bytes; other threads call `activate` first. Without `context`
    only name, sm (compute capability), memory (bytes) and driver (13000 is CUDA 13.0) are to be had.
    Failure: what the driver refuses.
    """

    def __init__(self, lib: str = "libcuda.so.1", device: int = 0, context: bool = True) -> None:
        self._kind, self._context = "no-gpu", 0
        self._owned: dict[int, str] = {}  # address -> the function that gives it back
        try:
            self._lib = ctypes.CDLL(lib)
        except OSError as error:
            remedy = "run this on a machine with an NVIDIA GPU and its driver"
            raise Failure("no-gpu", f"no CUDA driver: {error}; {remedy}") from None
        self._call("cuInit", ctypes.c_uint(0))
        count = self._get(ctypes.c_int, "cuDeviceGetCount")
        if device >= count:
            raise Failure("no-gpu", f"no GPU {device}: the driver shows {count}; {CUDA_REMEDIES[100]}")
        self._device = ctypes.c_int(self._get(ctypes.c_int, "cuDeviceGet", ctypes.c_int(device)))
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, ctypes.c_int(256), self._device)
        self.name = name.value.decode(errors="replace")
        self.driver = self._get(ctypes.c_int, "cuDriverGetVersion")
        self.memory = self._get(ctypes.c_size_t, "cuDeviceTotalMem_v2", self._device)
        major, minor = (
            self._get(ctypes.c_int, "cuDeviceGetAttribute", ctypes.c_int(attribute), self._device)
            for attribute in (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        )
        self.sm = (major, minor)
        if context:
            self._context = self._get(ctypes.c_void_p, "cuDevicePrimaryCtxRetain", self._device)
            self.activate()
            self._kind = "build"

    def activate(self) -> None:
        """Make the context current in the calling thread."""
        self._call("cuCtxSetCurrent", ctypes.c_void_p(self._context))

    def alloc(self, nbytes: int) -> int:
        """Device memory, not zeroed; nothing (0 bytes) has an address too."""
        return self._own("cuMemFree_v2", "cuMemAlloc_v2", ctypes.c_size_t(max(nbytes, 1)))

    def free(self, ptr: int) -> None:
        """Give back what `alloc` gave."""
        self._call(self._owned.pop(ptr), ctypes.c_void_p(ptr))

    def to_device(self, ptr: int, source: int | bytes | bytearray | memoryview, nbytes: int, stream: int) -> None:
        """Copy from host memory, in the stream's order; pageable memory may be reused as soon as this returns."""
        if not isinstance(source, int):
            copy = ctypes.create_string_buffer(bytes(memoryview(source).cast("B")[:nbytes]), max(nbytes, 1))
            return self.to_device(ptr, ctypes.addressof(copy), nbytes, stream)
        where = (ctypes.c_void_p(ptr), ctypes.c_void_p(source))
        self._call("cuMemcpyHtoDAsync_v2", *where, ctypes.c_size_t(nbytes), ctypes.c_void_p(stream))

    def to_host(self, address: int, ptr: int, nbytes: int, stream: int) -> None:
        """Copy to host memory, in the stream's order: `synchronize` before reading it."""
        where = (ctypes.c_void_p(address), ctypes.c_void_p(ptr))
        self._call("cuMemcpyDtoHAsync_v2", *where, ctypes.c_size_t(nbytes), ctypes.c_void_p(stream))

    def zero(self, ptr: int, nbytes: int) -> None:
        """Fill with zeros, done when this returns."""
        self._call("cuMemsetD8_v2", ctypes.c_void_p(ptr), ctypes.c_ubyte(0), ctypes.c_size_t(nbytes))
        self.synchronize(0)  # our streams do not wait for the default one

    def stream(self) -> int:
        """A new stream, independent of the default one."""
        return self._own("cuStreamDestroy_v2", "cuStreamCreate", ctypes.c_uint(1))  # CU_STREAM_NON_BLOCKING

    def synchronize(self, stream: int) -> None:
        """Wait for all that was put into the stream."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def event(self) -> int:
        """A new event that keeps the time."""
        return self._own("cuEventDestroy_v2", "cuEventCreate", ctypes.c_uint(0))

    def record(self, event: int, stream: int) -> None:
        """Let the event happen when all before it in the stream is done."""
        self._call("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two recorded events; waits for the second."""
        self._call("cuEventSynchronize", ctypes.c_void_p(end))
        return float(self._get(ctypes.c_float, "cuEventElapsedTime", ctypes.c_void_p(start), ctypes.c_void_p(end)))

    def close(self) -> None:
        """Give back memory, streams, events and the context; closing twice is fine."""
        if not self._context:
            return
        self.activate()
        for address in list(self._owned):
            self.free(address)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)
        self._context = 0

    def _own(self, freeing: str, function: str, argument: Any) -> int:
        address = self._get(ctypes.c_void_p, function, argument)
        self._owned[address] = freeing
        return int(address)

    def _get(self, kind: Any, function: str, *arguments: Any) -> Any:
        value = kind()
        self._call(function, ctypes.byref(value), *arguments)
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._lib, function)(*arguments)
        if code == 0:
            return
        text = ctypes.c_char_p()
        named = getattr(self._lib, "cuGetErrorName", None)
        if named is not None:
            named(ctypes.c_int(code), ctypes.byref(text))
        name = f" ({text.value.decode()})" if text.value else ""
        remedy = CUDA_REMEDIES.get(code, "see whether nvidia-smi runs on this machine")
        raise Failure(self._kind, f"{function} failed with CUDA error {code}{name}; {remedy}")
