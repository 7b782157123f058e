"""lookups: what ids are is derived exactly, for every length and every id."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.derive import Derivation
from nmcompile.derive.value import Underived
from nmcompile.lookups import Ids, build_ids, read_ids
from nmcompile.symbolic import Size, poly

IDS = "(int64[B,S] ids) => (int64[B,S] y) { y = Identity(ids) }"
CONSTANTS = """i0 = Constant <value_int = 0> ()  i1 = Constant <value_int = 1> ()  i2 = Constant <value_int = 2> ()
    i5 = Constant <value_int = 5> ()  i16 = Constant <value_int = 16> ()  a0 = Constant <value_ints = [0]> ()
    a1 = Constant <value_ints = [1]> ()  sizes = Shape(ids)  s = Gather(sizes, i1)  at = Range(i0, s, i1)  """
ROBERTA = """same = Equal(ids, {pad})  not = Not(same)  real = Cast <to = {to}> (not)  count = CumSum(real, i1)
    kept = Mul(count, real)  wide = Cast <to = 7> (kept)  y = Add(wide, {pad})"""


def read(text: str, rank: str = "B,S") -> Ids:
    graph = parse(f"(int64[B,S] ids, int64[B,T] other) => (int64[{rank}] y) {{ {CONSTANTS} {text} }}")
    return read_ids(Derivation(graph), graph.outputs[0])


@pytest.mark.parametrize(
    ("text", "rank", "first", "length"),
    [
        ("y = Identity(at)", "S", 0, "S"),
        ("y = Add(at, i2)", "S", 2, "S"),
        ("u = Unsqueeze(at, a0)  y = Expand(u, sizes)", "B,S", 0, "S"),
        ("z = Sub(s, s)  e = Add(s, i2)  y = Range(i2, e, i1)", "S", 2, "S"),
        ("n = Shape(other)  t = Gather(n, i1)  y = Range(i0, t, i1)", "T", 0, "T"),
    ],
)
def test_positions(text: str, rank: str, first: int, length: str) -> None:
    assert read(text, rank) == Ids("position", None, first, poly(Size(length)))


def test_positions_of_a_stored_row() -> None:
    graph = parse(f"""(int64[B,S] ids) => (int64[1,M] y) {{ {CONSTANTS} end = Unsqueeze(s, a0)
        y = Slice(ids, a0, end, a1) }}""")
    graph.nodes[-1].inputs[0] = gs.Constant("table", np.arange(64)[None])
    assert read_ids(Derivation(graph), graph.outputs[0]) == Ids("position", None, 0, poly(Size("S")))


@pytest.mark.parametrize("pad", [0, 1, 2, 50])
@pytest.mark.parametrize("to", [6, 7])
def test_the_count_of_roberta_with_any_pad(pad: int, to: int) -> None:
    found = read(f"pad = Constant <value_int = {pad}> ()  " + ROBERTA.format(pad="pad", to=to))
    assert (found.kind, found.source.name if found.source else "", found.first) == ("cumulative", "ids", pad)


def test_an_input_and_a_row() -> None:
    assert read("c = Cast <to = 6> (ids)  y = Cast <to = 7> (c)").kind == "input"
    assert read("y = ConstantOfShape <value = int64[1] {3}> (sizes)") == Ids("row", None, 3)
    assert read("z = Mul(ids, i0)  y = Add(z, i5)") == Ids("row", None, 5)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("y = Min(at, i16)", ">= 0"),
        ("y = Mod(at, i16)", "% 16"),
        ("r = Sub(s, i1)  y = Sub(r, at)", "-t + S - 1"),
        ("y = Add(ids, i1)", "ids[b, t] + 1"),
        ("l = Less(ids, i5)  y = Where(l, ids, i1)", "ids[b, t]"),
        ("y = CumSum(ids, i1)", "sum(ids[b, #]"),
        # a part of the input: its elements at their places, over other extents
        ("a8 = Constant <value_ints = [8]> ()  y = Slice(ids, a0, a8, a1)", "ids[b, t] over [B, min(8, S)]"),
        ("m = Constant <value_ints = [-1]> ()  y = Slice(ids, a0, m, a1)", "ids[b, t] over [B, S - 1]"),
        ("y = Slice(ids, a0, a1, a0)", "ids[0, t] over [1, S]"),
        ("same = Equal(ids, i1)  not = Not(same)  real = Cast <to = 7> (not)  count = CumSum(real, i1)"
         "  kept = Mul(count, real)  y = Add(kept, i2)", "sum("),
        ("same = Equal(ids, i1)  not = Not(same)  real = Cast <to = 7> (not)  count = CumSum(real, i0)"
         "  kept = Mul(count, real)  y = Add(kept, i1)", "sum("),
        ("y = CumSum <reverse = 1> (ids, i1)", "CumSum"),
    ],
    ids=["clipped", "periodic", "reversed", "offset", "out of vocabulary", "no count", "first columns",
         "all but the last", "first row", "another pad", "other axis",
         "from the end"],
)  # fmt: skip
def test_what_only_looks_like_it_is_said(text: str, stop: str) -> None:
    with pytest.raises(Underived) as error:
        read(text, "S" if "Range" in text or "at" in text.split("(")[1][:3] else "B,S")
    assert stop in str(error.value)


# ---- the canonical form ------------------------------------------------------------------------------------


def built(ids: Ids, graph: gs.Graph) -> gs.Graph:
    y = build_ids(Builder(graph, "p"), ids, {t.name: t for t in graph.inputs})
    g.rewire(graph, graph.outputs[0], y)
    g.cleanup(graph)
    return graph


@pytest.mark.parametrize("first", [0, 2])
def test_positions_count_columns(first: int) -> None:
    ids = Ids("position", None, first, poly(Size("S")))
    graph = built(ids, parse(IDS))
    assert read_ids(Derivation(graph), graph.outputs[0]) == ids
    assert g.run(graph, {"ids": np.zeros((2, 5), np.int64)})["y"].tolist() == list(range(first, first + 5))


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_the_count_skips_padding(dtype: str) -> None:
    graph = parse(IDS.replace("int64[B,S] ids", f"{dtype}[B,S] ids").replace("Identity(", "Cast <to = 7> ("))
    ids = Ids("cumulative", graph.inputs[0], 1, poly(Size("S")))
    found = read_ids(Derivation(built(ids, graph)), graph.outputs[0])
    assert found.kind == "cumulative" and found.source is graph.inputs[0] and found.first == 1
    rows = np.array([[5, 6, 1, 1], [1, 7, 1, 8]], dtype)
    assert g.run(graph, {"ids": rows})["y"].tolist() == [[2, 3, 1, 1], [1, 2, 1, 3]]


def test_positions_that_no_input_has() -> None:
    with pytest.raises(Underived, match="no input is of the 5 positions"):
        built(Ids("position", None, 0, poly(5)), parse(IDS))


@pytest.mark.parametrize("op", ["Gather <axis = 1> (table, ids)", "GatherElements <axis = 1> (table, ids)"])
def test_a_table_of_positions_that_is_picked_by_ids_is_not_the_ids(op: str) -> None:
    """An id below 0 counts from the end of the table that it picks from, and from that of another table otherwise."""
    graph = parse(f"(int64[1,S] ids) => (int64[1,S] y) {{ p = {op.replace('table', 'ids')}  y = Identity(p) }}")
    graph.nodes[0].inputs[0] = gs.Constant("table", np.arange(64)[None])
    if op.startswith("Gather <"):
        graph.outputs[0].shape = [1, 1, "S"]
    d = Derivation(graph)
    shape = d.value(graph.outputs[0]).shape
    value = str(d.element(graph.outputs[0], [poly(Size(f"i{axis}")) for axis in range(len(shape))]))
    assert value.startswith(("p[", "y["))
