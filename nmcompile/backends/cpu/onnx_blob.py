"""What the ONNX of a plan's onnxruntime segment may hold: read off its bytes, without importing onnx.

onnxruntime follows what a model says of data outside it: a file of the current folder, or an address in memory. A plan
from a stranger must name neither. Its own large weights are declared as external, by name, and handed over from the
plan's arrays; everything else that is external, wherever it stands, is refused. So are functions and what belongs to
training: the writer has none, and functions that call each other twice are 2^n nodes once they are inlined.

Wire format and field numbers: protobuf's encoding guide and onnx.proto of ONNX 1.19 (IR version 12).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from nmcompile.errors import PlanError

PLACEHOLDER = b"elsewhere"  # the location that the writer gives weights that are arrays of the plan
MOST_FIELDS = 1_000_000  # a second of reading

# Message -> field -> message: all the ways that lead to a tensor, but for those that are refused.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "initializer", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_REFUSED = {20: "training", 25: "functions"}  # of the model
_NAME, _EXTERNAL, _LOCATION = 8, 13, 14  # of a tensor: its name, entries of external data, where its data are
_OP_TYPE = 4  # of a node
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}  # wire type -> bytes
_FOREIGN = b"\xff"  # begins no text, so no name of a weight
_ORT_FORMAT = b"ORTM"  # onnxruntime's own format, with files of its own

Field = tuple[int, int, int, int]  # number, wire type, value or first byte, end


def check_blob(blob: bytes, name: str, weights: Collection[str]) -> int:
    """The number of nodes. PlanError when the model could read a file or memory; `weights` are the plan's own."""
    if blob[4:8] == _ORT_FORMAT:
        raise PlanError(f"{name} of the plan is not ONNX; compile it again")
    try:
        declared, nodes = _walk(blob, name, {weight.encode() for weight in weights})
    except ValueError as error:
        raise PlanError(f"{name} of the plan is damaged ({str(error)[:80]}); compile it again") from None
    if len(set(declared)) < len(declared):
        raise PlanError(f"{name} of the plan declares a weight twice; compile it again")
    return nodes


def _walk(blob: bytes, name: str, weights: Collection[bytes]) -> tuple[list[bytes], int]:
    """Visits every message that may hold a tensor: the weights that are declared as external, the number of nodes."""
    declared: list[bytes] = []
    todo = [("model", 0, len(blob), True)]  # kind, first byte, end, whether it is not inside a node
    seen = nodes = 0
    while todo:
        kind, at, end, outside = todo.pop()
        fields = _fields(blob, at, end, MOST_FIELDS - seen)
        seen += len(fields) + 1
        if kind in ("tensor", "initializer"):
            found = _external(blob, fields)
            if found is not None and (kind == "tensor" or not outside or found not in weights):
                shown = found.lstrip(_FOREIGN)[:60].decode("utf-8", "replace")
                raise PlanError(f"{name} of the plan has data outside the plan (tensor {shown!r}), which are not read; "
                                "compile it again")  # fmt: skip
            declared += [] if found is None else [found]
            continue
        inside = _INSIDE[kind]
        nodes += kind == "node"
        for number, wire, value, last in fields:
            if wire != _BYTES:
                continue  # onnxruntime skips a field of another wire type than its own, too
            if kind == "model" and number in _REFUSED:
                raise PlanError(f"{name} of the plan has {_REFUSED[number]}, which plans do not; compile it again")
            if kind == "node" and number == _OP_TYPE and blob[value:last] == b"EPContext":
                raise PlanError(f"{name} of the plan has an EPContext, which reads files; compile it again")
            if number in inside:
                todo.append((inside[number], value, last, outside and inside[number] in ("graph", "initializer")))
    return declared, nodes


def _external(blob: bytes, fields: Iterable[Field]) -> bytes | None:
    """The name of a tensor whose data lie elsewhere, None where they lie in it.

    The entries may say no more than the writer's placeholder does.
    """
    name, entries, location = b"", [], 0
    for number, wire, value, last in fields:
        if number == _NAME and wire == _BYTES:
            name = blob[value:last]
        elif number == _EXTERNAL and wire == _BYTES:
            entries.append(blob[value:last])
        elif number == _LOCATION and wire == _VARINT:
            location |= value
    if not entries and not location:
        return None
    if entries != [_entry(b"location", PLACEHOLDER)] or location != 1:
        return _FOREIGN + name
    return name


def _entry(key: bytes, value: bytes) -> bytes:
    return b"\x0a" + bytes([len(key)]) + key + b"\x12" + bytes([len(value)]) + value


def _fields(blob: bytes, at: int, end: int, most: int) -> list[Field]:
    """The fields of a message. ValueError: they do not fill it, are too many, or are groups, which ONNX has none of."""
    fields: list[Field] = []
    while at < end:
        tag, at = _varint(blob, at, end)
        number, wire = tag >> 3, tag & 7
        if not number or tag >> 32:
            raise ValueError("a field has no number")
        value = at
        if wire == _VARINT:
            value, at = _varint(blob, at, end)
        elif wire == _BYTES:
            size, value = _varint(blob, at, end)
            at = value + size
        elif wire in _FIXED:
            at += _FIXED[wire]
        else:
            raise ValueError(f"a field is of wire type {wire}")
        if at > end:
            raise ValueError("a field is longer than its message")
        fields.append((number, wire, value, at))
        if len(fields) > most:
            raise ValueError(f"it has more than {MOST_FIELDS} fields")
    return fields


def _varint(blob: bytes, at: int, end: int) -> tuple[int, int]:
    """An integer of at most 10 bytes, and where what follows it begins."""
    value = shift = 0
    while at < end and shift < 70:
        byte = blob[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number does not end")
