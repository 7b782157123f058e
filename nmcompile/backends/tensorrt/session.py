"""Run a TensorRT engine: memory and streams through the CUDA driver, no framework needed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from nmcompile.backends.tensorrt.cuda_driver import Cuda, Failure
from nmcompile.errors import InputError, NoDeviceError, PlanError
from nmcompile.guards import check as check_guards
from nmcompile.guards import read_guards
from nmcompile.roles import read_roles
from nmcompile.tensorinfo import check_feeds, chosen_outputs, converted, read_infos

Arrays = dict[str, np.ndarray]
TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "INT8": np.int8,
         "UINT8": np.uint8, "BOOL": np.bool_}  # fmt: skip


class Buffer:
    """Device memory that grows with what it must hold."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.size, self.address = cuda, 0, 0

    def fit(self, size: int) -> int:
        """The address of at least `size` bytes."""
        if size > self.size or not self.address:
            if self.address:
                self.cuda.free(self.address)
                self.address = 0
            self.address, self.size = self.cuda.alloc(size), size
        return self.address


class EngineSession:
    """An engine with its description. `run` may be called from several threads; runs follow one another on one stream.

    `inputs` and `outputs` describe the model's. NoDeviceError: no GPU or no TensorRT here. PlanError: the engine is for
    another GPU or version of TensorRT, or is damaged.
    """

    def __init__(self, path: Path, description: Mapping[str, Any], cuda: str = "libcuda.so.1") -> None:
        self.header: dict[str, Any] = dict(description)
        try:
            self.inputs = read_roles(description.get("roles", {}), read_infos(description["inputs"], "inputs"))
            self.outputs = read_infos(description["outputs"], "outputs")
            self.guards = read_guards(description.get("assumes", []), [info.name for info in self.inputs])
            built, gpu = str(description["tensorrt"]), description["gpu"]
            wanted = (str(gpu["name"]), tuple(gpu["sm"]))
        except (KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise PlanError(f"{path}.json is damaged ({why}); build the engine again") from None
        self._lock = threading.Lock()
        try:
            self._cuda = Cuda(cuda)  # before TensorRT, which may crash without a driver
            here = (self._cuda.name, tuple(self._cuda.sm))
            if here != wanted:
                raise PlanError(f"{path} was built for {_gpu(*wanted)}, this is {_gpu(*here)}; build it here: "
                                "nmcompile build-engine, from its recipe")  # fmt: skip
            trt = _tensorrt()
            if _release(trt.__version__) != _release(built):
                raise PlanError(f"{path} was built by TensorRT {built}, this is {trt.__version__}; build it again")
            self._logger = trt.Logger(trt.Logger.ERROR)
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise PlanError(f"TensorRT {trt.__version__} cannot read {path}; build it again")
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise PlanError(f"the GPU has no room for {path}; free its memory, or build with smaller --shapes")
            self._stream = self._cuda.stream()
        except Failure as error:
            raise _told(error) from None
        self._types = {}
        self._on_host = set()  # shapes that the engine reads on the CPU
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            kind = str(self._engine.get_tensor_dtype(name)).rsplit(".", 1)[-1]
            if kind not in TYPES:
                raise PlanError(f"{path}: tensor {name!r} is of type {kind}, which sessions do not hand over")
            self._types[name] = np.dtype(TYPES[kind])
            if str(self._engine.get_tensor_location(name)).rsplit(".", 1)[-1] == "HOST":
                self._on_host.add(name)
        self._buffers = {name: Buffer(self._cuda) for name in self._types}
        self.isa, self.threads = f"TensorRT {built}, {wanted[0]}", 1  # as plans for the CPU name theirs

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name for inputs by name; `outputs` picks some. InputError: names, types or shapes do not fit."""
        values = check_feeds(feeds, self.inputs)
        check_guards(self.guards, values)
        self._check_ranges(values)
        wanted = chosen_outputs(outputs, self.outputs)
        with self._lock:
            try:
                return self._run(values, wanted)
            except Failure as error:
                raise _told(error) from None

    def close(self) -> None:
        """Give the GPU's memory back; a closed session does not run any more."""
        with self._lock:
            self._context = self._engine = self._runtime = None
            self._cuda.close()

    def limits(self) -> tuple[dict[str, int], int | None]:
        """(rows of the table that each input looks up: not known of an engine, most tokens that it was built for)."""
        greatest = [ranges["max"] for ranges in (self.header.get("shapes") or {}).values()]
        return {}, min((int(sizes[1]) for sizes in greatest if len(sizes) > 1), default=None)

    def _check_ranges(self, values: Mapping[str, np.ndarray]) -> None:
        for name, ranges in (self.header.get("shapes") or {}).items():
            shape = values[name].shape
            if any(not a <= x <= b for a, x, b in zip(ranges["min"], shape, ranges["max"], strict=True)):
                raise InputError(f"input {name!r} of shape {list(shape)} is not between {ranges['min']} and "
                                 f"{ranges['max']}, which the engine was built for; build it with other --shapes")

    def _run(self, values: Mapping[str, np.ndarray], wanted: Sequence[str]) -> Arrays:
        self._cuda.activate()
        held = []  # until the stream has read it
        for name, values_in in values.items():
            if name not in self._types:
                continue  # an input that nothing reads
            integers = values_in.dtype.kind in "iu" and self._types[name].kind in "iu"
            fitting = converted(values_in, self._types[name], name) if integers else values_in
            array = np.ascontiguousarray(fitting, self._types[name])
            held.append(array)
            if not self._context.set_input_shape(name, tuple(array.shape)):
                raise InputError(f"the engine refuses input {name!r} of shape {list(array.shape)}")
            if name in self._on_host:
                self._context.set_tensor_address(name, array.ctypes.data)
                continue
            address = self._buffers[name].fit(array.nbytes)
            self._cuda.to_device(address, array.ctypes.data, array.nbytes, self._stream)
            self._context.set_tensor_address(name, address)
        made: Arrays = {}
        for info in self.outputs:
            shape = tuple(self._context.get_tensor_shape(info.name))
            if any(size < 0 for size in shape):
                raise PlanError(f"the size of output {info.name!r} depends on values, which sessions do not support")
            made[info.name] = np.empty(shape, self._types[info.name])
            host = info.name in self._on_host
            address = made[info.name].ctypes.data if host else self._buffers[info.name].fit(made[info.name].nbytes)
            self._context.set_tensor_address(info.name, address)
        if not self._context.execute_async_v3(self._stream):
            raise PlanError("TensorRT could not run the engine; its messages are above")
        for name in wanted:
            array = made[name]
            if name in self._on_host:
                continue
            self._cuda.to_host(array.ctypes.data, self._buffers[name].address, array.nbytes, self._stream)
        self._cuda.synchronize(self._stream)
        kinds = {info.name: info.dtype for info in self.outputs}
        return {name: made[name].astype(kinds[name], copy=False) for name in wanted}


def _tensorrt() -> Any:
    try:
        return import_module("tensorrt")
    except ImportError:
        raise NoDeviceError("engines need TensorRT in this Python: pip install tensorrt, in the version that built "
                            "them") from None  # fmt: skip


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:3])


def _gpu(name: str, sm: Sequence[int]) -> str:
    return f"{name} (compute capability {'.'.join(map(str, sm))})"


def _told(error: Failure) -> NoDeviceError | PlanError:
    return NoDeviceError(str(error)) if error.kind == "no-gpu" else PlanError(str(error))
