"""Plans of committed models, changed: bytes of the file, of a member under a right checksum, values of plan.json."""

from __future__ import annotations

import copy
import json
import math
import random
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nmcompile
from nmcompile import _native
from nmcompile.archive import write_archive
from nmcompile.backends.cpu.onnx_blob import PLACEHOLDER, check_blob
from nmcompile.errors import NmcompileError, PlanError
from nmcompile.plan import DTYPES, _content, _npy_header
from nmcompile.tensorinfo import TensorInfo
from tools.fuzz.target import Attempt, Target, refused

MODELS = Path(__file__).resolve().parent.parent.parent / "models"
BASES: dict[str, dict[str, Any]] = {
    "bert-torchscript": {"pattern": "2x4", "sparsity": 0.6}, "gpt2-torchscript": {}, "vit-torchscript": {},
    "t5-torchscript": {},
}  # fmt: skip
DEEP = 100  # of lists and objects in one another that are changed
WILD: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 7, 63, 65, 255, 256, 1023, 1024, 4096, 2**16, 2**20, 2**31 - 1, 2**31, 2**40, -(2**62), 2**63),
    *(0.0, -0.0, 1e-45, 1e-38, 1e-8, 0.5, 64.5, 100.0, 1e4, 1e20, 3e38, 1e39, 1e300, -1.0),
    *("", "f32", "u8", "keys", "values", "tokens", "tokens1", "first", "gelu", "silu", "relu", "none", "input", "same"),
    *("position", "cumulative", "constant", "dense", "blocks", "gather", "squeeze", "\ud800", "é\n", "x" * 2000),
    *("m8[s/0]", 10**30, None, True, False, [], {}, [[]], {"array": "none"}, [1] * 70),
)
Content = tuple[dict[str, Any], dict[str, bytes]]  # plan.json and the other members


def base(folder: Path, name: str) -> Path:
    plan = folder / f"{name}.plan"
    if not plan.exists():
        folder.mkdir(parents=True, exist_ok=True)
        nmcompile.compile(MODELS / f"{name}.onnx", plan, preset="fast", measure=False, tuning="off", **BASES[name])
    return plan


def content(path: Path) -> Content:
    """plan.json, and the bytes of all other members."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    return json.loads(members.pop("plan.json")), members


def write(path: Path, header: Any, members: dict[str, bytes]) -> None:
    """As a plan whose checksums and sizes are right."""
    text = json.dumps(header).encode()
    write_archive(path, {"plan.json": (text,), **{name: (members[name],) for name in sorted(members)}})


# ---- changes -----------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every value inside lists and objects, down to DEEP of them in one another."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, item in items if len(path) < DEEP else ():
        found += places(item, (*path, key))
    return found


def value_at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _change_json(rng: random.Random, header: dict[str, Any], members: dict[str, bytes]) -> None:
    segments = [("segments", *path) for path in places(header.get("segments"))]
    chosen = (segments if rng.random() < 0.8 else []) or places(header)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(chosen)
        try:
            holder = value_at(header, path[:-1])
            old = holder[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
        if isinstance(holder, str):
            continue
        kind = rng.randrange(8)
        if kind == 0:
            del holder[path[-1]]
        elif kind == 1:
            holder[path[-1]] = copy.deepcopy(value_or_none(header, rng.choice(chosen)))
        elif kind == 2 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(old))
        elif kind == 3 and isinstance(holder, list):
            rng.shuffle(holder)
        elif isinstance(old, int | float) and not isinstance(old, bool) and kind < 6:
            near = (old + 1, old - 1, -old, old * 2, old // 2, old / 2, old * 1e10, old * 1e-10, old * 2**30)
            holder[path[-1]] = rng.choice(near)
        else:
            holder[path[-1]] = copy.deepcopy(rng.choice(WILD))


def value_or_none(header: Any, path: tuple[Any, ...]) -> Any:
    try:
        return value_at(header, path)
    except (KeyError, IndexError, TypeError):
        return None


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, left out, doubled or added."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(4)
        if kind == 0:
            changed[at : at + size] = rng.randbytes(len(changed[at : at + size]))
        elif kind == 1:
            del changed[at : at + size]
        elif kind == 2:
            changed[at:at] = changed[max(at - size, 0) : at]
        else:
            changed[at : at + size] = rng.choice((b"\xff", b"\x7f", b"\0", b"\x80")) * len(changed[at : at + size])
    return bytes(changed)


def _change_array(rng: random.Random, header: dict[str, Any], members: dict[str, bytes]) -> None:
    """Other values of the same size in an array: indices out of bounds, floats that are none."""
    name = rng.choice([name for name in members if name.endswith(".npy")] or [""])
    data = bytearray(members.get(name, b""))
    start = 10 + int.from_bytes(data[8:10], "little")
    if start >= len(data):
        return
    if rng.random() < 0.3:
        size = len(data) - start
        data[start:] = rng.randbytes(size) if rng.random() < 0.5 else rng.choice((b"\xff", b"\x80", b"\0")) * size
    else:
        at = rng.randrange(start, len(data))
        value = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\xff\xff\xff\xff"))
        data[at // 4 * 4 : at // 4 * 4 + 4] = value[: len(data[at // 4 * 4 : at // 4 * 4 + 4])]
    members[name] = bytes(data)


def _change_shape(rng: random.Random, header: dict[str, Any], members: dict[str, bytes]) -> None:
    """An array of another type or shape, described as it is."""
    names = [name for name in members if name.endswith(".npy")]
    if not names or not isinstance(header.get("members"), dict):
        return  # an earlier change took it away
    name = rng.choice(names)
    data = members[name][10 + int.from_bytes(members[name][8:10], "little") :]
    dtype = DTYPES[rng.choice([*DTYPES])]
    values = np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
    shape = rng.choice(((len(values),), (1, len(values)), (len(values), 1), (0,), (), (1, 1, 1, 1, 1)))
    if shape in ((), (1, 1, 1, 1, 1)):
        values = values[:1] if len(values) else np.zeros(1, dtype)
    values = values[: int(np.prod(shape))].reshape(shape)
    members[name] = _npy_header(dtype, values.shape) + values.tobytes()
    header["members"][name] = _content(dtype, values.shape)


def _change_blob(rng: random.Random, header: dict[str, Any], members: dict[str, bytes]) -> None:
    names = [name for name in members if name.endswith(".onnx")]
    if names and isinstance(header.get("members"), dict):
        name = rng.choice(names)
        members[name] = changed_bytes(rng, members[name])
        header["members"][name] = f"blob[{len(members[name])}]"


CHANGES: tuple[Callable[[random.Random, dict[str, Any], dict[str, bytes]], None], ...] = (
    _change_json, _change_json, _change_json, _change_array, _change_shape,
)  # fmt: skip


def fed(infos: Sequence[TensorInfo], batch: int, tokens: int) -> dict[str, np.ndarray] | None:
    """Small numbers for inputs of any description; None where these would be too many."""
    feeds = {}
    for info in infos:
        free = (batch, *[tokens] * len(info.shape))
        shape = [dim if isinstance(dim, int) else free[axis] for axis, dim in enumerate(info.shape)]
        if math.prod(max(size, 1) for size in shape) > 1 << 20 or len(shape) > 32:
            return None
        values = np.arange(math.prod(shape)) % 7
        feeds[info.name] = values.reshape(shape).astype(str if info.dtype.kind == "O" else info.dtype)
    return feeds


# ---- attempts ----------------------------------------------------------------------------------------------------


def attempt(path: Path, rng: random.Random) -> str:
    """Load a plan in some way and run it; the outcome."""
    isas = _native.available_isas()
    try:
        session = nmcompile.load(path, threads=rng.choice((1, 2)), isa=rng.choice(isas), copy=rng.random() < 0.3)
        session.limits()
        for batch, tokens in ((1, 3), (2, 17)):
            feeds = fed(session.inputs, batch, tokens)
            if feeds is None:
                return "inputs too large"
            session.run(feeds)
    except NmcompileError as error:
        return refused(error)
    return "runs"


def _check_blob(blob: bytes, weights: list[str]) -> str:
    """What the reader lets through has no data outside, says onnx."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors

    try:
        check_blob(blob, "blob", weights)
    except PlanError as error:
        return refused(error)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(blob)
    except Exception:  # protobuf's own refusal
        return "not ONNX"
    for tensor in [*model.graph.initializer, *_get_all_tensors(model)]:
        told = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location or told:
            ours = told == {"location": PLACEHOLDER.decode()} and tensor.name in weights
            assert ours, f"let through: {tensor.name} {told}"
    return "blob passes"


def prepare(folder: Path) -> Attempt:
    bases = {name: base(folder, name) for name in BASES}
    contents = {name: content(path) for name, path in bases.items()}
    files = {name: path.read_bytes() for name, path in bases.items()}

    def run(seed: int, now: Path) -> str:
        rng = random.Random(seed)
        name = rng.choice([*bases])
        path = now / "x.plan"
        kind = rng.random()
        if kind < 0.1:
            path.write_bytes(changed_bytes(rng, files[name]))
            return attempt(path, rng)
        header, members = copy.deepcopy(contents[name][0]), dict(contents[name][1])
        if kind < 0.25 and any(member.endswith(".onnx") for member in members):
            # onnxruntime's own reader is not under test: the changed model is only looked through
            _change_blob(rng, header, members)
            write(path, header, members)
            segments = [item for item in header["segments"] if item["kind"] == "onnxruntime"]
            found = {_check_blob(members[f"{item['model']}.onnx"], [*item["weights"]]) for item in segments}
            return "; ".join(sorted(found))
        for _ in range(rng.choice((1, 1, 2))):
            if isinstance(header.get("members"), dict):  # an earlier change may have put anything there
                rng.choice(CHANGES)(rng, header, members)
        try:
            write(path, header, members)
        except (NmcompileError, ValueError, TypeError):
            return "cannot be written"
        return attempt(path, rng)

    return run


TARGET = Target("plans", "plan files of the CPU", prepare)
