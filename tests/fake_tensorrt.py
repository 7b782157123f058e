"""A tensorrt module without TensorRT: the names of one version's API table, and enough behaviour to build and run.

`load(script)` makes the module, `install(folder, script)` lets a process import it, `cuda_driver(folder)` compiles the
CUDA driver that goes with it. An engine is JSON: what it was built from.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tensorrt_names import DATA, Enum, Strict, Table, table

SIZES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "UINT8": 1, "BOOL": 1, "INT32": 4, "INT64": 8}


@dataclass
class Script:
    """What happens. `ms` has times of variants, the word before .onnx in a model's name; `cuda`: the driver's file."""

    profile: str = "10"
    cuda: str = ""
    version: str | None = None  # instead of the table's
    inputs: dict[str, tuple[str, list[int]]] = field(default_factory=lambda: {"x": ("FLOAT", [-1, 4])})
    outputs: dict[str, tuple[str, list[int]]] = field(default_factory=lambda: {"y": ("FLOAT", [-1, 3])})
    parse_errors: list[dict[str, Any]] = field(default_factory=list)  # {"node", "name", "op", "text"}
    build_errors: list[str] = field(default_factory=list)
    ms: dict[str, float] = field(default_factory=dict)
    inspector: str | None = None  # instead of the sample's
    sleep: float = 0  # seconds, in the build of the dense variant
    crash: bool = False  # in the first build
    loads: bool = True
    runs: bool = True
    record: str | None = None  # a file that gets a line of JSON per call


def cuda_driver(folder: Path) -> str:
    """The path of the fake driver, compiled."""
    library = folder / "libfakecuda.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-o", str(library), str(DATA / "fake_cuda.cc")]
    subprocess.run(command, check=True)
    return str(library)


def install(folder: Path, script: Script) -> dict[str, str]:
    """Environment variables with which a process imports the fake as tensorrt."""
    folder.mkdir(exist_ok=True)
    path = folder / "script.json"
    path.write_text(json.dumps(asdict(script)))
    lines = [
        "import json, sys", f"sys.path.insert(0, {str(Path(__file__).parent)!r})", "import fake_tensorrt as fake",
        f"sys.modules[__name__] = fake.load(fake.Script(**json.load(open({str(path)!r}))))",
    ]  # fmt: skip
    (folder / "tensorrt.py").write_text("\n".join(lines) + "\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


class Fake(ModuleType):
    """The module; `_calls` tells what was done with it."""

    def __init__(self, script: Script) -> None:
        super().__init__("tensorrt")
        rows = table(script.profile)
        self._script, self._calls = script, list[tuple[str, str, list[Any]]]()
        self._driver: Any = ctypes.CDLL(script.cuda) if script.cuda else None
        new_enum: Any = Enum
        self.__version__ = script.version or rows["version"]
        for name, members in rows["enums"].items():
            setattr(self, name, new_enum(name, members))
        behaviours = {kind.__name__: kind for kind in BEHAVIOURS}
        for name, row in rows["classes"].items():
            base = behaviours.get(name, Strict)
            setattr(self, name, Table(name, (base,), {"_row": frozenset(row), "_fake": self}))
        severity = new_enum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})
        for kind in (self.ILogger, self.Logger):
            kind.Severity = severity
            for member in severity:
                setattr(kind, member.name, member)

    def _note(self, kind: str, name: str, arguments: Any = None, *_: Any) -> None:
        self._calls.append((kind, name, arguments if isinstance(arguments, list) else [arguments]))
        if self._script.record:
            with open(self._script.record, "a") as stream:
                stream.write(json.dumps([kind, name, [str(argument) for argument in self._calls[-1][2]]]) + "\n")

    def _say(self, logger: Any, severity: str, text: str) -> None:
        logger.log(getattr(self.ILogger.Severity, severity), text)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"tensorrt {self.__version__} has no {name}")


class ILogger(Strict):
    def __init__(self) -> None:
        self._ready = True


class Logger(Strict):
    _ready = True

    def __init__(self, min_severity: Any = None) -> None: ...


class Builder(Strict):
    def __init__(self, logger: Any) -> None:
        if not getattr(logger, "_ready", False):
            raise TypeError("__init__() must be called when overriding __init__")
        self._logger = logger
        os.write(1, b"a native library prints\n")

    def create_network(self, flags: int = 0) -> Any:
        kind = self._fake.NetworkDefinitionCreationFlag
        network = self._fake.INetworkDefinition()
        network._flags = {member.name for member in kind if flags >> int(member) & 1}
        self._fake._note("Builder", "create_network", sorted(network._flags))
        return network

    def create_builder_config(self) -> Any:
        return self._fake.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._fake.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        fake, script, logger = self._fake, self._fake._script, self._logger
        variant, profile = network._model.name.split(".")[-2], config._profile
        fake._note("Builder", "build_serialized_network", [variant])
        if script.crash:
            os.kill(os.getpid(), signal.SIGSEGV)
        if variant == "dense":
            time.sleep(script.sleep)
        fake._say(logger, "VERBOSE", "=============== Computing costs for")
        errors = list(script.build_errors)
        flags = {flag.name for flag in config._flags}
        weak = "STRONGLY_TYPED" not in network._flags and script.profile != "11"
        if weak and "INT8" not in flags:
            errors.append("Q/DQ layers need kINT8 in the builder's flags")
        if not weak and flags & {"INT8", "FP16"}:
            errors.append("precision flags do not go with strong typing")
        if profile is None and any(-1 in shape for _, shape in script.inputs.values()):
            errors.append("Network has dynamic or shape inputs, but no optimization profile has been defined.")
        for text in errors:
            fake._say(logger, "ERROR", text)
        if errors:
            return None
        if "SPARSE_WEIGHTS" in flags:
            log = "made_log_8.6.txt" if script.profile == "8.6" else "made_log_10.txt"
            for line in (DATA / log).read_text().splitlines():
                fake._say(logger, "INFO", line)
        if config._cache is not None:
            config._cache._blob += f" {variant}".encode()
        shapes = profile._shapes if profile is not None else {}
        facts = {"version": fake.__version__, "variant": variant, "shapes": shapes, "flags": sorted(flags)}
        return fake.IHostMemory(json.dumps(facts).encode())


class INetworkDefinition(Strict):
    @property
    def num_inputs(self) -> int:
        return len(self._fake._script.inputs)

    def get_input(self, index: int) -> Any:
        name, (kind, shape) = list(self._fake._script.inputs.items())[index]
        tensor = self._fake.ITensor()
        tensor.name, tensor.shape, tensor.dtype = name, self._fake.Dims(shape), _dtype(self._fake, kind)
        return tensor


class OnnxParser(Strict):
    def __init__(self, network: Any, logger: Any) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        self._network._model = Path(path)
        self._fake._note("OnnxParser", "parse_from_file", [path])
        if self._fake._script.profile == "8.6" and "EXPLICIT_BATCH" not in self._network._flags:
            return False
        return Path(path).is_file() and not self._fake._script.parse_errors

    @property
    def num_errors(self) -> int:
        return len(self._fake._script.parse_errors)

    def get_error(self, index: int) -> Any:
        error = self._fake.ParserError()
        error._facts = self._fake._script.parse_errors[index]
        return error


class ParserError(Strict):
    _facts: dict[str, Any]

    def desc(self) -> str:
        return str(self._facts["text"])

    def node(self) -> int:
        return int(self._facts["node"])

    def node_name(self) -> str:
        return str(self._facts["name"])

    def node_operator(self) -> str:
        return str(self._facts["op"])


class IBuilderConfig(Strict):
    def __init__(self) -> None:
        self._flags: list[Any] = []
        self._profile: Any = None
        self._cache: Any = None

    def set_flag(self, flag: Any) -> None:
        if not isinstance(flag, self._fake.BuilderFlag):
            raise TypeError("set_flag(): incompatible function arguments")
        self._flags.append(flag)
        self._fake._note("IBuilderConfig", "set_flag", [flag.name])

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._fake._note("IBuilderConfig", "set_memory_pool_limit", [pool.name, size])

    def add_optimization_profile(self, profile: Any) -> int:
        self._profile = profile
        return 0 if profile._shapes else -1

    def create_timing_cache(self, blob: bytes) -> Any:
        if blob.startswith(b"damaged"):
            return None
        cache = self._fake.ITimingCache()
        cache._blob = bytes(blob) or self._fake.__version__.encode()
        return cache

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        fits = bool(cache._blob.startswith(self._fake.__version__.encode()))
        self._cache = cache if fits or ignore_mismatch else self._cache
        return fits

    def get_timing_cache(self) -> Any:
        return self._cache


class ITimingCache(Strict):
    _blob: bytes

    def serialize(self) -> Any:
        return self._fake.IHostMemory(self._blob)


class IHostMemory(Strict, bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Dims(Strict, tuple[int, ...]):
    pass


class IOptimizationProfile(Strict):
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
        self._shapes[name] = [list(least), list(best), list(most)]
        self._fake._note("IOptimizationProfile", "set_shape", [name, *self._shapes[name]])


class Runtime(Strict):
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        facts = json.loads(plan)
        if facts["version"] != self._fake.__version__ or not self._fake._script.loads:
            self._fake._say(self._logger, "ERROR", "The engine plan file is not compatible with this version")
            return None
        engine = self._fake.ICudaEngine()
        engine._facts = facts
        return engine


class ICudaEngine(Strict):
    _facts: dict[str, Any]

    def _tensors(self) -> dict[str, Any]:
        return {**self._fake._script.inputs, **self._fake._script.outputs}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors())

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors())[index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = self._fake.TensorIOMode
        return mode.INPUT if name in self._fake._script.inputs else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return _dtype(self._fake, self._tensors()[name][0])

    def get_tensor_shape(self, name: str) -> Any:
        return self._fake.Dims(self._tensors()[name][1])

    def get_tensor_location(self, name: str) -> Any:
        return self._fake.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        """Least, best and largest shape; the fixed one thrice."""
        shapes = self._facts["shapes"].get(name) or [self._tensors()[name][1]] * 3
        return [self._fake.Dims(shape) for shape in shapes]

    def create_execution_context(self) -> Any:
        context = self._fake.IExecutionContext()
        context._engine, context._shapes, context._places, context._first = self, {}, {}, True
        return context

    def create_engine_inspector(self) -> Any:
        return self._fake.EngineInspector()


class IExecutionContext(Strict):
    _engine: Any
    _shapes: dict[str, list[int]]
    _places: dict[str, int]
    _first: bool

    def set_input_shape(self, name: str, shape: Any) -> bool:
        """Within the profile; outputs of free sizes take those of the first input at the same axis."""
        least, _, most = self._engine.get_tensor_profile_shape(name, 0)
        fits = len(shape) == len(least) and all(least[i] <= shape[i] <= most[i] for i in range(len(shape)))
        if fits:
            self._shapes[name] = list(shape)
        return fits

    def get_tensor_shape(self, name: str) -> Any:
        shape = self._engine._tensors()[name][1]
        known = self._shapes.get(name) or self._shapes.get(next(iter(self._fake._script.inputs)), [])
        sizes = [known[i] if size == -1 and i < len(known) else size for i, size in enumerate(shape)]
        return self._fake.Dims(sizes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._places[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Ones to every output; False where a tensor has no place that holds it."""
        fake, tensors = self._fake, self._engine._tensors()
        if not fake._script.runs or not fake._driver.fakeIsStream(ctypes.c_void_p(stream_handle)):
            return False
        for name, (kind, _) in tensors.items():
            kind, count = _dtype(fake, kind).name, 1
            for size in self.get_tensor_shape(name):
                count *= size
            place, nbytes = self._places.get(name, 0), count * SIZES[kind]
            if count < 0 or not fake._driver.fakeHolds(ctypes.c_void_p(place), ctypes.c_size_t(nbytes)):
                return False
            if name in fake._script.outputs:
                one = struct.pack("<f", 1)[4 - SIZES[kind] :] if kind in ("FLOAT", "BF16") else b"\x01" + bytes(7)
                ctypes.memmove(place, (b"\x00\x3c" if kind == "HALF" else one[: SIZES[kind]]) * count, nbytes)
            elif self._first:
                fake._note("input", name, [ctypes.string_at(place, nbytes).hex()])
        self._first = False
        variant = self._engine._facts["variant"]
        fake._note("IExecutionContext", "execute_async_v3", [variant])
        fake._driver.fakeAdvance(ctypes.c_double(fake._script.ms.get(variant, 1.0)))
        return True


class EngineInspector(Strict):
    def get_engine_information(self, form: Any) -> str:
        if form is not self._fake.LayerInformationFormat.JSON:
            return "Engine"
        script = self._fake._script
        name = "made_inspector_11.json" if script.profile == "11" else "made_inspector_8.6.json"
        return (DATA / name).read_text() if script.inspector is None else script.inspector


def _dtype(fake: Fake, kind: str) -> Any:
    """8.6 has no INT64 and makes it INT32."""
    return getattr(fake.DataType, kind, None) or fake.DataType.INT32


BEHAVIOURS = (
    ILogger, Logger, Builder, INetworkDefinition, OnnxParser, ParserError, IBuilderConfig, ITimingCache, IHostMemory,
    Dims, IOptimizationProfile, Runtime, ICudaEngine, IExecutionContext, EngineInspector,
)  # fmt: skip


def load(script: Script) -> Fake:
    """The module for a script."""
    return Fake(script)
