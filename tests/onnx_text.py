"""Graphs written in onnx's textual syntax, and what tests say about them."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.pipeline import Pass, Pipeline, Report

HEADER = '<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> graph '


def parse_model(text: str, opset: int = 20) -> onnx.ModelProto:
    """The model of `(float[N,4] x) => (float[N,8] y) <float[4,8] w> { y = MatMul(x, w) }`.

    Tensors declared between <> that no node computes become initializers, seeded by their names. Text that
    starts with < brings its own header.
    """
    whole = text if text.lstrip().startswith("<") else HEADER.format(opset=opset) + text
    model = onnx.parser.parse_model(whole)
    known = {name for node in model.graph.node for name in node.output} | {i.name for i in model.graph.input}
    declared = {info.name: info.type.tensor_type for info in model.graph.value_info}
    for name, kind in declared.items():
        if name not in known:
            values = seeded(name, [dim.dim_value for dim in kind.shape.dim], kind.elem_type)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    infos = [info for info in model.graph.value_info if info.name in known]
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
    return model


def parse(text: str, opset: int = 20) -> gs.Graph:
    """As parse_model, loaded."""
    return g.load(parse_model(text, opset))


def seeded(name: str, shape: list[int], element_type: int = 1) -> np.ndarray:
    """Values that depend on the name only: normal / 2 for floats, 0 to 7 for integers."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element_type)
    if np.dtype(dtype).kind in "iub":
        return rng.integers(0, 8, shape).astype(dtype)
    return (rng.standard_normal(shape) / 2).astype(dtype)


def apply(pass_: Pass, graph: gs.Graph) -> tuple[gs.Graph, Report]:
    """The graph after one pass, and its report; the graph given must stay as it is."""
    before = g.to_text(graph)
    changed, reports = Pipeline([pass_]).run(graph)
    assert g.to_text(graph) == before, f"{pass_.name} changes the caller's graph"
    return changed, reports[0]


def assert_same_outputs(a: gs.Graph, b: gs.Graph, atol: float = 1e-5, dims: dict[str, int] | None = None) -> None:
    """Both graphs give the same outputs in onnxruntime on seeded inputs."""
    for seed in (0, 1):
        feeds = g.random_feeds(g.inputs(a), seed, dims)
        expected, found = g.run(a, feeds), g.run(b, feeds)
        assert list(expected) == list(found)
        for name, values in expected.items():
            assert values.shape == found[name].shape, name
            assert values.dtype == found[name].dtype, name
            if values.dtype.kind in "fiub":
                np.testing.assert_allclose(found[name], values, rtol=0, atol=atol, err_msg=name)
            else:
                assert (values == found[name]).all(), name


class Golden(str):
    """Equal to any text, which it writes to the golden file: what --update-golden compares with."""

    path: Path

    def __eq__(self, other: object) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(str(other))
        return True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def read_golden(path: Path, update: bool) -> str:
    """The golden text at `path`; a missing file is an error unless it is being updated."""
    if not update and not path.exists():
        raise AssertionError(f"{path} does not exist; write it with pytest --update-golden")
    if not update:
        return path.read_text()
    text = Golden()
    text.path = path
    return text
