"""SimplifyShapes: constant shapes for Reshape, and sizes that are read from graph inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile import ir as g
from nmcompile.contract import Context
from nmcompile.errors import NmcompileError
from nmcompile.passes import SimplifyShapes
from nmcompile.pipeline import Report

CONSTANTS = """i0 = Constant <value_int = 0> ()  i1 = Constant <value_int = 1> ()
    a0 = Constant <value_ints = [0]> ()  heads = Constant <value_ints = [2, 4]> ()"""
SPLIT = f"""(float[B,S,8] x) => (float[B,S,2,4] y) {{ {CONSTANTS}
    r = Relu(x)  shape = Shape(r)  b = Gather(shape, i0)  s = Gather(shape, i1)
    b1 = Unsqueeze(b, a0)  s1 = Unsqueeze(s, a0)  to = Concat <axis = 0> (b1, s1, heads)  y = Reshape(r, to) }}"""


def simplified(text: str, dims: dict[str, int] | None = None) -> tuple[gs.Graph, Report]:
    graph = parse(text)
    after, report = apply(SimplifyShapes(), graph)
    assert_same_outputs(graph, after, 0, dims)
    again, second = apply(SimplifyShapes(), after)
    assert second.changed == 0, g.to_text(again)
    return after, report


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_before_and_after(golden: Callable[[str], str]) -> None:
    assert g.to_text(parse(SPLIT)) == golden("simplify_shapes/before")
    after, report = simplified(SPLIT)
    assert (report.changed, ops(after), report.notes) == (3, ["Relu", "Reshape"], ())
    assert g.to_text(after) == golden("simplify_shapes/after")


@pytest.mark.parametrize(
    "node",
    [
        "t = Identity(r)",
        "t = Cast <to = 1> (r)",
        "t = Transpose <perm = [0, 1, 2]> (r)",
        "t = Dropout(r)",
        "n = Shape(r)  t = Expand(r, n)",
        "n = Shape(r)  t = Reshape(r, n)",
    ],
)
def test_nodes_that_change_nothing_go(node: str) -> None:
    after, report = simplified(f"(float[B,S,4] x) => (float[B,S,4] y) {{ r = Relu(x)  {node}  y = Neg(t) }}")
    assert report.changed >= 1 and ops(after) == ["Relu", "Neg"]


@pytest.mark.parametrize(
    "node",
    [
        "t = Cast <to = 11> (x)  y = Cast <to = 1> (t)",
        "t = Transpose <perm = [1, 0, 2]> (x)  y = Neg(t)",
        "t, kept = Dropout(x)  y = Where(kept, t, x)",
    ],
)
def test_nodes_that_change_something_stay(node: str) -> None:
    text = f"(float[4,4,4] x) => (float[4,4,4] y) {{ {node} }}"
    assert len(simplified(text)[0].nodes) == 2


def test_graph_outputs_keep_their_names_and_producers() -> None:
    after, report = simplified("""(float[N,4] x) => (float[N,4] y, float[N,4] z, float[N,4] w) {
        y = Identity(x)  r = Relu(x)  z = Identity(r)  w = Identity(z) }""")
    assert report.changed == 1
    assert sorted(ops(after)) == ["Identity", "Identity", "Relu"]


def test_sizes_in_the_middle_are_read_from_the_inputs() -> None:
    after, report = simplified(f"""(float[B,S,8] x) => (int64[] n, float[B,S,8] y) {{ {CONSTANTS}
        y = Relu(x)  shape = Shape(y)  n = Gather(shape, i1) }}""")
    assert report.changed == 1
    (shape,) = [node for node in after.nodes if node.op == "Shape"]
    assert shape.inputs[0].name == "x"


@pytest.mark.parametrize(
    ("shape", "index", "expected"),
    [("Shape(y)", "i2", ["Relu", "Range"]), ("Shape <start = -1> (y)", "i0", ["Relu", "Gather", "Range"]),
     ("Shape <start = 1, end = 3> (y)", "i0", ["Relu", "Shape", "Gather", "Range"])],
)  # fmt: skip
def test_start_and_end_of_shape(shape: str, index: str, expected: list[str]) -> None:
    after, _ = simplified(f"""(float[B,S,8] x) => (float[B,S,8] y, int64[M] n) {{ {CONSTANTS}
        i2 = Constant <value_int = 2> ()  y = Relu(x)  s = {shape}  e = Gather(s, {index})  n = Range(i0, e, i1) }}""")
    assert ops(after) == expected


def test_sizes_that_a_branch_reads() -> None:
    after, report = (
        simplified(f"""(float[B,S] x, bool flag) => (int64 y) {{ {CONSTANTS} r = Relu(x)  s = Shape(r)
        y = If(flag) <then_branch = yes () => (int64 z) {{ z = Gather(s, i1) }},
                      else_branch = no () => (int64 z) {{ z = Gather(s, i0) }} > }}""")
    )
    assert report.changed == 2 and "Relu" not in ops(after)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("(float[3,4] x) => (int64[2] s, float[3,4] y) { y = Relu(x)  s = Shape(y) }", 0),
        ("(float[N,4] x) => (int64 n, float[N,4] y) { y = Relu(x)  s = Shape(y)  i = Constant <value_int = 1> ()"
         "  n = Gather(s, i) }", 0),
    ],
    ids=["shape", "size"],
)  # fmt: skip
def test_sizes_that_are_graph_outputs(text: str, changed: int) -> None:
    assert simplified(text)[1].changed == changed


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        ("(float[N,0,4] x) => (float[0,N,4] y) { s = Constant <value_ints = [0, 2, 4]> ()"
         "  y = Reshape <allowzero = 1> (x, s) }", {"N": 2}),
        ("(float[N,0,4] x) => (float[N,0] y) { s = Constant <value_ints = [0, 0]> ()  y = Reshape(x, s) }", {}),
        ("(float[N,0] x) => (float[N,4] y) <float[0,4] w> { r = Identity(x)  y = MatMul(r, w) }", {}),
        ("(float[N,S] x) => (float[M] y) { s = Constant <value_ints = [-1]> ()  y = Reshape(x, s) }",
         {"N": 0, "S": 3}),
    ],
    ids=["allowzero", "zero copied", "empty product", "empty batch"],
)  # fmt: skip
def test_empty_dimensions(text: str, dims: dict[str, int]) -> None:
    simplified(text, dims)


def test_a_shape_that_two_free_sizes_make_stays_computed() -> None:
    after, report = simplified(
        """(float[A,B,C] x) => (float[C,A,B] y) { i = Constant <value_ints = [2, 0, 1]> ()
        s = Shape(x)  to = Gather(s, i)  y = Reshape(x, to) }""",
        {"A": 2, "B": 3, "C": 5},
    )
    assert (report.changed, ops(after)) == (0, ["Shape", "Gather", "Reshape"])


def test_a_shared_shape_serves_two_reshapes() -> None:
    after, _ = simplified(SPLIT.replace("float[B,S,2,4] y)", "float[B,S,2,4] y, float[B,S,2,4] z)").replace(
        "y = Reshape(r, to)", "y = Reshape(r, to)  n = Neg(r)  z = Reshape(n, to)"))  # fmt: skip
    assert ops(after) == ["Relu", "Reshape", "Neg", "Reshape"]


@pytest.mark.parametrize("shape", ["[0, 0, 2, 4]", "[2, 5, 2, 4]", "[0, 5, 2, 4]"])
def test_a_constant_shape_that_says_the_same_stays(shape: str) -> None:
    after, report = simplified(f"""(float[2,5,8] x) => (float[2,5,2,4] y) {{
        to = Constant <value_ints = {shape}> ()  y = Reshape(x, to) }}""")
    assert report.changed == 0
    assert str(after.nodes[0].inputs[1].values.tolist()) == shape


def test_dimensions_without_a_name_are_no_hindrance() -> None:
    graph = parse("(float[N,4] x) => (float[N,4] y) { r = Relu(x)  i = Identity(r)  y = Neg(i) }")
    graph.inputs[0].shape = [None, 4]
    after, report = apply(SimplifyShapes(), graph)
    assert report.changed == 1 and ops(after) == ["Relu", "Neg"] and report.notes == ()


def test_a_size_that_is_cut_is_not_the_inputs() -> None:
    """Up to 32 tokens the slice is all of x: runs at a few sizes took its length for the input's."""
    after, _ = simplified("""(float[B,S,8] x) => (float[B,M,2,4] y) { i0 = Constant <value_ints = [0]> ()
        i1 = Constant <value_ints = [1]> ()  i32 = Constant <value_ints = [32]> ()  c = Slice(x, i0, i32, i1)
        n = Shape(c)  i2 = Constant <value_ints = [2]> ()  lead = Slice(n, i0, i2)
        by = Constant <value_ints = [2, 4]> ()  to = Concat <axis = 0> (lead, by)  y = Reshape(c, to) }""")
    x = np.random.default_rng(0).standard_normal((2, 40, 8)).astype(np.float32)
    assert g.run(after, {"x": x})["y"].shape == (2, 32, 2, 4)


def test_a_shape_of_floats_is_left_to_whoever_refuses_it() -> None:
    graph = parse("(float[2,4] x) => (float[4,2] y) { to = Constant <value_ints = [4, 2]> ()  y = Reshape(x, to) }")
    reshape = next(node for node in graph.nodes if node.op == "Reshape")
    reshape.inputs[1] = gs.Constant("to", np.array([np.nan, 2.0], np.float32))
    assert SimplifyShapes().run(graph, Context()).changed == 0


def test_sizes_that_no_array_has_are_an_error_of_one_line() -> None:
    graph = parse("(float[N,4611686018427387904] x, int64[2] to) => (float[N,S] y) { c = Concat <axis = 1> (x, x)  "
                  "y = Reshape(c, to) }")  # fmt: skip
    with pytest.raises(NmcompileError, match=r"tensor 'c': no array is as large as \[9223372036854775808\]"):
        apply(SimplifyShapes(), graph)
