"""Builds TensorRT engines by a recipe, times them on the GPU and keeps the fastest.

    python worker.py --probe                      which GPU and which TensorRT there are
    python worker.py recipe.json [-o model.plan]

Standard output gets one JSON object per line: {"progress": [what, step, steps]}, and last {"result": {...}} (status 0)
or {"error": text, "kind": kind} (status 1, or 3 without a GPU or TensorRT).
Nothing but the standard library, tensorrt and cuda_driver.py beside it is imported and Python 3.8 will do, so that
copies of the two files run in any environment that has TensorRT. Integers of TensorRT's flags move between its
versions: flags go by name only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import statistics
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable  # noqa: UP035  # subscripted below, which Python 3.8 allows of this one only

if __package__:
    from nmcompile.backends.tensorrt.cuda_driver import Cuda, Failure
else:  # in another Python, which has no nmcompile: the folder of this file is the first that it imports from
    from cuda_driver import Cuda, Failure  # type: ignore[import-not-found, no-redef]

Say = Callable[[Any], None]  # writes an object as a line of JSON
PROFILES = ("8.6", "10", "11")  # versions that graphs are emitted for
VARIANTS = ("sparse", "mixed", "dense")
WARM_UP = 10  # untimed rounds
FASTER = 0.99  # a ratio of medians above this is noise
FORMATS = {"FLOAT": "f", "HALF": "e", "INT8": "b", "UINT8": "B", "INT32": "i", "INT64": "q", "BOOL": "?"}
DTYPES = {name: name for name in ("bool", "int4", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32")}
DTYPES.update({"fp8": "float8", "fp16": "float16", "half": "float16", "bf16": "bfloat16"})
DTYPES.update({"fp32": "float32", "float": "float32"})
KEPT: list[Any] = []  # TensorRT points to its first logger for as long as the process lives


@dataclass(frozen=True)
class Recipe:
    """What to build; `shapes` are {input: {"min", "opt", "max"}}, `fills` the values that inputs are timed with."""

    profile: str
    strong: bool
    models: dict[str, Path]
    plan: Path
    shapes: dict[str, dict[str, list[int]]]
    fills: dict[str, float]
    workspace: int | None
    level: int | None
    timing_cache: Path | None
    repeats: int


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file, its paths taken from the file's folder. Failure naming what is wrong with it."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise Failure("io", f"cannot read {path}: {error.strerror}; name a recipe that nmcompile wrote") from None
    except ValueError as error:
        raise Failure("recipe", f"{path} is not JSON ({error}); name a recipe that nmcompile wrote") from None
    data = data if isinstance(data, dict) else {}

    def wrong(why: str) -> Failure:
        return Failure("recipe", f"{path}: {why}; let nmcompile write the recipe anew")

    if data.get("format") != 1:
        version = data.get("nmcompile", "unknown")
        raise wrong(f"format {data.get('format')!r}, by nmcompile {version}, is not format 1, which this worker reads")
    required = {"version": str, "strong": bool, "models": dict, "plan": str}
    optional = {"shapes": dict, "inputs": dict, "workspace": int, "level": int, "timing_cache": str, "repeats": int}
    for key, kind in {**required, **optional}.items():
        if data.get(key) is None:
            if key in required:
                raise wrong(f"no {key!r}")
        elif type(data[key]) is not kind:
            raise wrong(f"{key!r} is {json.dumps(data[key])[:60]}, not {kind.__name__}")
    if data["version"] not in PROFILES:
        raise wrong(f"'version' is {data['version']!r}, not one of {', '.join(PROFILES)}")
    models = {name: path.parent / str(data["models"][name]) for name in VARIANTS if name in data["models"]}
    if not models or len(models) != len(data["models"]):
        raise wrong(f"'models' names {', '.join(data['models']) or 'nothing'}, not some of {', '.join(VARIANTS)}")
    for name, model in models.items():
        if not model.is_file():
            raise Failure("io", f"no file {model}, the {name} model of {path}; keep a recipe beside its models")
    for name, given in (data.get("shapes") or {}).items():
        if not _ordered(given):
            raise wrong(f"shapes of input {name!r} are {json.dumps(given)}, not min <= opt <= max; see --shapes")
    inputs = data.get("inputs") or {}
    fills: dict[str, Any] = {}
    for name, given in inputs.items():
        fills[name] = given.get("fill", 1) if isinstance(given, dict) else None
        if not isinstance(fills[name], (int, float)):
            raise wrong(f"'fill' of input {name!r} is no number")
    repeats = data.get("repeats")
    if repeats is not None and repeats < 1:
        raise wrong(f"'repeats' is {repeats}, not 1 or more")
    cache = data.get("timing_cache")
    return Recipe(
        data["version"], data["strong"], models, path.parent / data["plan"], data.get("shapes") or {}, fills,
        data.get("workspace"), data.get("level"), None if cache is None else path.parent / cache, repeats or 50,
    )  # fmt: skip


def _ordered(shapes: Any) -> bool:
    rows: list[Any] = [shapes.get(key) for key in ("min", "opt", "max")] if isinstance(shapes, dict) else [None]
    if not all(isinstance(row, list) and all(type(size) is int and size >= 0 for size in row) for row in rows):
        return False
    columns = range(len(rows[0]))
    return len({len(row) for row in rows}) == 1 and all(rows[0][i] <= rows[1][i] <= rows[2][i] for i in columns)


class Files:
    """Files beside their final places, which take them whole or vanish."""

    def __init__(self) -> None:
        self._partial: set[Path] = set()
        self._lock = threading.Lock()

    def write(self, path: Path, mark: str, content: Any) -> Path:
        """Bytes to a file beside `path`, for `publish` to move there or `clear` to remove. Failure naming `path`."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.{mark}.partial")
        try:
            with self._lock:
                self._partial.add(partial)
                stream = open(partial, "wb")  # noqa: SIM115  # the lock is for opening only
            with stream:
                stream.write(content)
        except OSError as error:
            raise _unwritten(path, error) from None
        return partial

    def publish(self, partial: Path, path: Path) -> None:
        """Put a file in its place."""
        try:
            os.replace(partial, path)
        except OSError as error:
            raise _unwritten(path, error) from None

    def clear(self) -> None:
        """Remove what was not published."""
        for partial in list(self._partial):
            with suppress(OSError):
                partial.unlink()

    def abandon(self, status: int) -> None:
        """Remove what was not published and end the process, whatever its other threads do."""
        self._lock.acquire()  # nothing new is opened from here on
        self.clear()
        os._exit(status)


def _unwritten(path: Path, error: OSError) -> Failure:
    return Failure("io", f"cannot write {path}: {error.strerror or error}; make room or choose another place with -o")


class Log:
    """What TensorRT said: the last errors, and every line on sparsity."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=20)
        self.sparsity: list[str] = []

    def add(self, severity: str, text: str) -> None:
        if "(Sparsity)" in text:
            self.sparsity.append(text)
        if severity == "VERBOSE":  # a build says hundreds of thousands of these
            return
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(text[:500])
        sys.stderr.write(f"{severity}: {text[:2000]}\n")

    def why(self) -> str:
        """The last errors, or that there are none."""
        return "; ".join(list(self.errors)[-3:]) or "it gave no reason"

    def logger(self, trt: Any) -> Any:
        """An ILogger that writes here."""

        def start(this: Any) -> None:
            trt.ILogger.__init__(this)

        def log(this: Any, severity: Any, text: str) -> None:
            self.add(severity.name, text)

        KEPT.append(type("WorkerLogger", (trt.ILogger,), {"__init__": start, "log": log})())
        return KEPT[-1]


def sparsity_lines(lines: Iterable[str]) -> dict[str, list[str]]:
    """The layers that a build log calls eligible for sparse tactics, and those it chose them for.

    8.6: (Sparsity) Layers eligible for sparse math: a, b
         (Sparsity) TRT inference plan picked sparse implementation for layers: a
    10:  (Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b
         (Sparsity) Chose 1 layer(s) using sparse tactics: a          a pair for each part of the graph
    """
    eligible = r"Layers eligible for sparse math|Found \d+ layer\(s\) eligible to use sparse tactics"
    chosen = r"TRT inference plan picked sparse implementation for layers|Chose \d+ layer\(s\) using sparse tactics"
    found: dict[str, dict[str, None]] = {"eligible": {}, "chosen": {}}
    for line in lines:
        match = re.search(rf"\(Sparsity\) (?:(?P<eligible>{eligible})|(?P<chosen>{chosen}))\s*:?(?P<names>.*)", line)
        if match is not None:
            key = "eligible" if match["eligible"] else "chosen"
            found[key].update(dict.fromkeys(_names(match["names"])))
    return {key: list(names) for key, names in found.items()}


def _names(text: str) -> list[str]:
    """Names between commas; commas in brackets, as in PWN(PWN(a), b), belong to a name."""
    names, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth <= 0:
            names.append("")
        else:
            names[-1] += sign
    return [name.strip() for name in names if name.strip()]


def layers_of(text: str) -> list[dict[str, Any]]:
    """The layers of an inspector's JSON: {"name", "type", "tactic", "sparse", "inputs", "outputs"}.

    `sparse` is what the tactic's name says, because a layer marked HasSparseWeights may still run a dense one; None
    where it has no name. Tensors are {"name", "dtype", "shape"}. ValueError: not JSON.
    """
    data = json.loads(text, strict=False)
    entries = data.get("Layers", []) if isinstance(data, dict) else data
    return [_layer({"Name": entry} if isinstance(entry, str) else entry) for entry in entries]


def _layer(entry: dict[str, Any]) -> dict[str, Any]:
    tactic = entry.get("TacticName") or None
    marked = entry.get("HasSparseWeights", entry.get("AllowSparse"))
    sparse = None if tactic is None else re.search("sparse|spgemm|spconv|sptensor", tactic, re.IGNORECASE) is not None
    if sparse is None and marked is not None and not marked:
        sparse = False
    return {
        "name": entry.get("Name", ""), "type": entry.get("LayerType"), "tactic": tactic or entry.get("TacticValue"),
        "sparse": sparse, "inputs": [_tensor(each) for each in entry.get("Inputs") or []],
        "outputs": [_tensor(each) for each in entry.get("Outputs") or []],
    }  # fmt: skip


def _tensor(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        return {"name": str(entry), "dtype": None, "shape": None}
    words = re.findall(r"[a-z0-9]+", str(entry.get("Datatype") or entry.get("Format/Datatype") or "").lower())
    dtype = next((DTYPES[word] for word in words if word in DTYPES), None)
    return {"name": entry.get("Name", ""), "dtype": dtype, "shape": entry.get("Dimensions")}


def import_tensorrt() -> Any:
    """The module. Failure: it cannot be imported here."""
    try:
        import tensorrt
    except Exception as error:  # a package without its libraries raises what it likes
        remedy = "install TensorRT there or name a Python that has it with --trt-python"
        raise Failure("no-tensorrt", f"{sys.executable} cannot import tensorrt: {error!r}; {remedy}") from None
    return tensorrt


def check_version(found: str, asked: str) -> int:
    """The major version of TensorRT. Failure: not the one that the graphs were emitted for."""
    numbers = [int(number) for number in re.findall(r"\d+", found)]
    wanted = [int(number) for number in asked.split(".")]
    if numbers[:1] != wanted[:1] or numbers < wanted:
        fitting = [other for other in PROFILES if other.split(".")[0] == str(numbers[0]) and other != asked]
        remedy = f"compile with --trt-version {fitting[0]}, or " if fitting else ""
        remedy += f"name a Python that has TensorRT {asked} with --trt-python"
        message = f"the graphs are for TensorRT {asked}, but {sys.executable} has TensorRT {found}"
        raise Failure("version", f"{message}; {remedy}")
    return numbers[0]


@dataclass(frozen=True)
class Toolbox:
    """TensorRT as it is here."""

    trt: Any
    major: int
    log: Log
    logger: Any

    def flag(self, kind: Any, name: str) -> Any:
        """A flag by its name. Failure: this TensorRT has none of that name."""
        value = getattr(kind, name, None)
        if value is None:
            raise Failure("version", f"TensorRT {self.trt.__version__} has no {name}; use another TensorRT")
        return value

    def weak(self, recipe: Recipe) -> bool:
        """Whether types are TensorRT's choice: always before 10, never from 11 on."""
        return self.major < 10 or (self.major == 10 and not recipe.strong)

    def network_flags(self, recipe: Recipe) -> int:
        """The bits for create_network."""
        kind = self.trt.NetworkDefinitionCreationFlag
        if self.major < 10:
            return 1 << int(self.flag(kind, "EXPLICIT_BATCH"))
        if self.weak(recipe):
            return 0
        if self.major == 10:
            return 1 << int(self.flag(kind, "STRONGLY_TYPED"))
        value = getattr(kind, "STRONGLY_TYPED", None)  # since 11 all networks are
        return 0 if value is None else 1 << int(value)

    def build(self, recipe: Recipe, variant: str, cache: bytes) -> tuple[Any, bytes, bool]:
        """The engine's bytes, the timing cache after the build, and whether the one given did fit."""
        trt = self.trt
        try:
            builder = trt.Builder(self.logger)
        except TypeError as error:  # what the binding makes of a null pointer
            remedy = "see whether its CUDA fits the driver"
            why = self.log.why() if self.log.errors else error
            raise Failure("build", f"TensorRT {trt.__version__} does not start: {why}; {remedy}") from None
        network = builder.create_network(self.network_flags(recipe))
        parser = self.parse(network, recipe.models[variant])
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        flags = ("INT8", "FP16") if self.weak(recipe) else ()
        for name in (*flags, "SPARSE_WEIGHTS") if variant != "dense" else flags:
            config.set_flag(self.flag(trt.BuilderFlag, name))
        if recipe.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace)
        if recipe.level is not None:
            config.builder_optimization_level = recipe.level
        _add_profile(builder, network, config, recipe)
        timings = config.create_timing_cache(cache)
        fits = timings is not None and bool(config.set_timing_cache(timings, False))
        if not fits:
            timings = config.create_timing_cache(b"")
            config.set_timing_cache(timings, False)
        plan = builder.build_serialized_network(network, config)
        del parser  # until here: weights of the network lie in its memory
        if plan is None:
            remedy = "try a larger --workspace, or leave the layers that it names unquantized"
            message = f"TensorRT {trt.__version__} cannot build the {variant} engine: {self.log.why()}"
            raise Failure("build", f"{message}; {remedy}")
        timings = config.get_timing_cache()
        return plan, b"" if timings is None else bytes(timings.serialize()), fits

    def parse(self, network: Any, model: Path) -> Any:
        """Read a model into the network; the parser. Failure: with the nodes that TensorRT refuses."""
        parser = self.trt.OnnxParser(network, self.logger)
        if parser.parse_from_file(str(model)):
            return parser
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [f"{_node_of(error)}: {error.desc()}" for error in errors[:5]] or [self.log.why()]
        more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
        message = f"TensorRT {self.trt.__version__} cannot read {model}: {'; '.join(said)}{more}"
        raise Failure("parse", f"{message}; compile for this TensorRT with --trt-version, or replace these operators")


def _node_of(error: Any) -> str:
    if not hasattr(error, "node_name"):  # before 10
        return f"node {error.node()}"
    return f"node {error.node_name() or error.node()!r} ({error.node_operator()})"


def _add_profile(builder: Any, network: Any, config: Any, recipe: Recipe) -> None:
    """Give each input of dynamic shape its shapes. Failure naming an input without, or with wrong ones."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    inputs = {str(tensor.name): [int(size) for size in tensor.shape] for tensor in tensors}
    for name in recipe.shapes:
        if name not in inputs:
            raise Failure("recipe", f"no input {name!r}, which --shapes names; the model has {', '.join(inputs)}")
    dynamic = {name: shape for name, shape in inputs.items() if -1 in shape}
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name, shape in dynamic.items():
        given = recipe.shapes.get(name)
        if given is None:
            raise Failure("recipe", f"input {name!r} has the dynamic shape {shape}; give its sizes with --shapes")
        rows = [given[key] for key in ("min", "opt", "max")]
        for row in rows:
            if len(row) != len(shape) or any(shape[axis] not in (-1, row[axis]) for axis in range(len(shape))):
                raise Failure("recipe", f"{row} does not fit input {name!r} of shape {shape}; correct --shapes")
        profile.set_shape(name, *rows)
    if config.add_optimization_profile(profile) < 0:
        raise Failure("recipe", f"TensorRT refuses the shapes {json.dumps(recipe.shapes)}; correct --shapes")


class Run:
    """An engine with buffers for the shapes that it is timed at."""

    def __init__(self, tools: Toolbox, runtime: Any, cuda: Cuda, stream: int, recipe: Recipe, plan: bytes) -> None:
        self.trt, self.cuda, self.stream = tools.trt, cuda, stream
        engine = runtime.deserialize_cuda_engine(plan)
        context = None if engine is None else engine.create_execution_context()
        if context is None:
            raise Failure("build", f"TensorRT cannot load the engine it built: {tools.log.why()}; free GPU memory")
        self.engine, self.context, self.log = engine, context, tools.log
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == tools.trt.TensorIOMode.INPUT]
        for name in self.inputs:
            shape = [int(size) for size in engine.get_tensor_shape(name)]
            shape = recipe.shapes[name]["opt"] if -1 in shape else shape
            if not context.set_input_shape(name, shape):
                raise Failure("build", f"the engine refuses {shape} for input {name!r}: {tools.log.why()}")
        self.shapes = {name: [int(size) for size in context.get_tensor_shape(name)] for name in names}
        self.host: list[Any] = []  # tensors that TensorRT wants in host memory
        for name in names:
            context.set_tensor_address(name, self._buffer(name, recipe.fills.get(name, 1)))
        cuda.synchronize(stream)

    def _buffer(self, name: str, fill: float) -> int:
        kind = self.engine.get_tensor_dtype(name).name
        item = _item(name, kind, fill)
        nbytes = len(item)
        for size in self.shapes[name]:
            nbytes *= size
        if nbytes < 0:  # the shape depends on values
            nbytes = self.context.get_max_output_size(name)
        values = item * (nbytes // len(item)) if name in self.inputs else b""
        if self.engine.get_tensor_location(name) == self.trt.TensorLocation.HOST:
            self.host.append(ctypes.create_string_buffer(values, max(nbytes, 1)))
            return ctypes.addressof(self.host[-1])
        pointer = self.cuda.alloc(nbytes)
        if values:
            self.cuda.to_device(pointer, values, nbytes, self.stream)
        return pointer

    def enqueue(self) -> None:
        """Put one inference into the stream."""
        if not self.context.execute_async_v3(self.stream):
            raise Failure("build", f"the engine does not run: {self.log.why()}; build it on this GPU and TensorRT")

    def layers(self) -> list[dict[str, Any]]:
        """What the engine is made of. ValueError: the inspector does not say."""
        inspector = self.engine.create_engine_inspector()
        inspector.execution_context = self.context  # for the shapes of this run
        return layers_of(inspector.get_engine_information(self.trt.LayerInformationFormat.JSON))


def _item(name: str, kind: str, fill: float) -> bytes:
    """One element, little endian."""
    try:
        if kind == "BF16":
            return struct.pack("<f", fill)[2:]
        return struct.pack("<" + FORMATS[kind], fill if kind in ("FLOAT", "HALF") else int(fill))
    except (KeyError, struct.error, OverflowError, ValueError):
        raise Failure("recipe", f"no value {fill} of type {kind} for tensor {name!r}; correct its 'fill'") from None


def time_in_turns(runs: dict[str, Run], cuda: Cuda, stream: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median, 10th and 90th percentile of each run in ms: rounds of one inference each, every other one in reverse."""
    start, end = cuda.event(), cuda.event()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-WARM_UP, repeats):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            cuda.record(start, stream)
            runs[name].enqueue()
            cuda.record(end, stream)
            elapsed = cuda.elapsed_ms(start, end)
            if turn >= 0:
                samples[name].append(elapsed)
    return {name: _summary(sorted(values)) for name, values in samples.items()}


def _summary(values: list[float]) -> dict[str, float]:
    last = len(values) - 1
    return {"median": statistics.median(values), "p10": values[round(0.1 * last)], "p90": values[round(0.9 * last)]}


def fastest(medians: dict[str, float]) -> str:
    """The variant to keep: the most exact, unless another takes less than 0.99 of its median time."""
    kept, *others = [name for name in ("dense", "mixed", "sparse") if name in medians]
    for name in others:
        if medians[name] < FASTER * medians[kept]:
            kept = name
    return kept


def make(recipe: Recipe, plan: Path, cuda_lib: str, say: Say, files: Files) -> dict[str, Any]:
    """Build and time the variants, keep one at `plan`, and tell the facts. Failure: none was kept."""
    if not plan.parent.is_dir() or plan.is_dir():
        raise Failure("io", f"cannot write {plan}: no such place; make its folder or choose another with -o")
    with closing(Cuda(cuda_lib)) as cuda:
        trt, log = import_tensorrt(), Log()
        tools = Toolbox(trt, check_version(trt.__version__, recipe.profile), log, log.logger(trt))
        steps, warnings = len(recipe.models) + 2, []
        variants: dict[str, dict[str, Any]] = {}
        engines: dict[str, Path] = {}
        cache = b""
        if recipe.timing_cache is not None:
            with suppress(FileNotFoundError):
                cache = recipe.timing_cache.read_bytes()
        for step, name in enumerate(recipe.models):
            say({"progress": [f"building {name}", step + 1, steps]})
            log.sparsity.clear()
            began = time.perf_counter()
            engine, cache, fitted = tools.build(recipe, name, cache)
            seconds = time.perf_counter() - began
            if not fitted and recipe.timing_cache is not None:
                warnings.append(f"timing cache {recipe.timing_cache} is not of this TensorRT and GPU; started anew")
            engines[name] = files.write(plan, name, engine)
            size = engines[name].stat().st_size
            variants[name] = {"bytes": size, "build_seconds": seconds, **sparsity_lines(log.sparsity)}
            del engine
        if recipe.timing_cache is not None:
            try:
                files.publish(files.write(recipe.timing_cache, "cache", cache), recipe.timing_cache)
            except Failure as error:  # the engines are none the worse for it
                warnings.append(str(error))
        say({"progress": ["timing", steps - 1, steps]})
        shapes = _time(tools, cuda, recipe, engines, variants, warnings)
        kept = fastest({name: facts["ms"]["median"] for name, facts in variants.items()})
        say({"progress": [f"writing {plan.name}", steps, steps]})
        files.publish(engines[kept], plan)
        files.clear()
        batch = next((shape[0] for shape in shapes.values() if shape), None)
        return {
            "tensorrt": trt.__version__, "gpu": _gpu(cuda), "variants": variants, "kept": kept, "engine": str(plan),
            "batch": batch, "shapes": shapes, "warnings": warnings,
        }  # fmt: skip


def _time(
    tools: Toolbox, cuda: Cuda, recipe: Recipe, engines: dict[str, Path],
    variants: dict[str, dict[str, Any]], warnings: list[str],
) -> dict[str, list[int]]:  # fmt: skip
    """Put times and layers into the variants' facts; the inputs' shapes that were timed."""
    runtime, stream = tools.trt.Runtime(tools.logger), cuda.stream()
    runs = {name: Run(tools, runtime, cuda, stream, recipe, path.read_bytes()) for name, path in engines.items()}
    for name, times in time_in_turns(runs, cuda, stream, recipe.repeats).items():
        variants[name]["ms"], variants[name]["layers"] = times, []
        try:
            variants[name]["layers"] = runs[name].layers()
        except ValueError as error:
            warnings.append(f"the layers of the {name} engine are unknown: TensorRT's inspector gave no JSON ({error})")
    run = next(iter(runs.values()))
    return {name: run.shapes[name] for name in run.inputs}


def _gpu(cuda: Cuda) -> dict[str, Any]:
    return {"name": cuda.name, "sm": list(cuda.sm), "memory": cuda.memory, "driver": cuda.driver}


def probe(cuda_lib: str) -> dict[str, Any]:
    """The GPU, the version of TensorRT (None: not installed) and what keeps the GPU from use. Failure: no GPU."""
    facts: dict[str, Any] = {"gpu": _gpu(Cuda(cuda_lib, context=False)), "python": sys.version.split()[0]}
    facts.update({"tensorrt": None, "tensorrt_error": None, "cuda_error": None})
    try:
        Cuda(cuda_lib).close()
    except Failure as error:
        facts["cuda_error"] = str(error)
    try:
        facts["tensorrt"] = import_tensorrt().__version__
    except Failure as error:
        facts["tensorrt_error"] = str(error)
    return facts


def main(arguments: Sequence[str], say: Say, files: Files) -> int:
    """The command line; the exit status."""
    command = argparse.ArgumentParser(description="Build TensorRT engines by a recipe of nmcompile.")
    command.add_argument("recipe", nargs="?", type=Path, help="the recipe, JSON")
    command.add_argument("-o", "--output", type=Path, help="the engine's file (default: the recipe's plan)")
    command.add_argument("--timing-cache", type=Path, help="times of kernels, if the recipe names no file for them")
    command.add_argument("--probe", action="store_true", help="tell which GPU and TensorRT there are")
    command.add_argument("--cuda", default="libcuda.so.1", help="the CUDA driver's library (default: %(default)s)")
    options = command.parse_args(arguments)
    if options.probe == (options.recipe is not None):
        command.error("give a recipe or --probe")
    try:
        if options.probe:
            say({"result": probe(options.cuda)})
        else:
            recipe = read_recipe(options.recipe)
            recipe = replace(recipe, timing_cache=recipe.timing_cache or options.timing_cache)
            say({"result": make(recipe, options.output or recipe.plan, options.cuda, say, files)})
    except Failure as error:
        say({"error": str(error), "kind": error.kind})
        return 3 if error.kind in ("no-gpu", "no-tensorrt") else 1
    except OSError as error:
        say({"error": f"{error}; see whether its place is readable and writable", "kind": "io"})
        return 1
    except Exception as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        say({"error": f"the worker failed: {text}; report this with the log above", "kind": "build"})
        return 1
    finally:
        files.clear()
    return 0


def run_as_script() -> None:
    """Standard output is for JSON alone, what native libraries print goes to standard error; signals leave no files."""
    sys.path[:] = [place for place in sys.path if place != str(Path(__file__).resolve().parent)]  # our neighbours
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    files = Files()
    ending = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    # A Python handler would run inside TensorRT's calls to the logger, and its exception abort the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    threading.Thread(target=lambda: files.abandon(128 + signal.sigwait(ending)), daemon=True).start()

    def say(line: dict[str, Any]) -> None:
        channel.write(json.dumps(line) + "\n")
        channel.flush()

    status = 1
    try:
        status = main(sys.argv[1:], say, files)
    except SystemExit as end:  # of argparse
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # what native libraries do on the way out would only cost a result that is told already


if __name__ == "__main__":
    run_as_script()
