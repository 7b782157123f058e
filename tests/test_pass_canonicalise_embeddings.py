"""CanonicaliseEmbeddings: what a table is read by, derived from the graph that computes its ids."""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile import ir as g
from nmcompile.derive import Derivation
from nmcompile.lookups import Ids, read_ids
from nmcompile.passes import CanonicaliseEmbeddings
from nmcompile.pipeline import Report

CONSTANTS = """i0 = Constant <value_int = 0> ()  i1 = Constant <value_int = 1> ()  i3 = Constant <value_int = 3> ()
    a0 = Constant <value_ints = [0]> ()  a1 = Constant <value_ints = [1]> ()  rows = Shape(ids)
    length = Gather(rows, i1)  length1 = Unsqueeze(length, a0)"""
RANGE = "at = Range(i0, length, i1)"
SLICED = """all = Constant <value = int64[1,9] {0, 1, 2, 3, 4, 5, 6, 7, 8}> ()  at0 = Slice(all, a0, length1, a1)
    at = Expand(at0, rows)"""
ROBERTA = """same = Equal(ids, pad)  not = Not(same)  real = Cast <to = 6> (not)
    count = CumSum(real, i1)  kept = Mul(count, real)  wide = Cast <to = 7> (kept)  at = Add(wide, pad)"""


def embedding(
    positions: str, *, inputs: str = "int64[B,S] ids, int64[B,S] token_type", outputs: str = "", pad: int = 1
) -> gs.Graph:
    return parse(f"""({inputs}) => (float[B,S,4] y{outputs}) <float[600,4] words, float[20,4] places> {{
        {CONSTANTS} pad = Constant <value_int = {pad}> ()
        w = Gather(words, ids)  {positions}  p = Gather(places, at)  y = Add(w, p) }}""")


def canonical(graph: gs.Graph, changed: int = 1) -> gs.Graph:
    after, report = apply(CanonicaliseEmbeddings(), graph)
    assert report == Report(changed=changed, detail={"matched": "2/2"})
    assert_same_outputs(graph, after, 0, {"B": 2, "S": 5})
    assert_same_outputs(graph, after, 0, {"B": 1, "S": 1})
    again, second = apply(CanonicaliseEmbeddings(), after)
    assert second.changed == 0 and g.to_text(again) == g.to_text(after)
    return after


def kept(graph: gs.Graph, reason: str) -> None:
    after, report = apply(CanonicaliseEmbeddings(), graph)
    assert (report.changed, report.detail) == (0, {"matched": "1/2"})
    assert len(report.notes) == 1 and reason in report.notes[0], report.notes
    assert_same_outputs(graph, after, 0, {"B": 2, "S": 5})


def ids_of(graph: gs.Graph) -> gs.Tensor:
    return next(node for node in graph.nodes if node.inputs[0].name == "places").inputs[1]


def read(graph: gs.Graph) -> Ids:
    return read_ids(Derivation(graph), ids_of(graph))


def test_before_and_after(golden: Callable[[str], str]) -> None:
    graph = embedding(SLICED)
    assert g.to_text(graph) == golden("canonicalise_embeddings/before")
    assert g.to_text(canonical(graph)) == golden("canonicalise_embeddings/after")


@pytest.mark.parametrize(
    ("text", "changed", "first"),
    [
        (RANGE, 0, 0),
        (SLICED, 1, 0),
        ("s0 = Range(i0, length, i1)  s1 = Add(s0, i3)  at = Unsqueeze(s1, a0)", 1, 3),
    ],
)
def test_positions(text: str, changed: int, first: int) -> None:
    found = read(canonical(embedding(text), changed))
    assert (found.kind, found.first) == ("position", first)


@pytest.mark.parametrize("pad", [0, 1, 2, 7])
def test_positions_of_roberta(pad: int) -> None:
    found = read(canonical(embedding(ROBERTA, pad=pad)))
    assert found.kind == "cumulative" and found.source is not None
    assert (found.source.name, found.first) == ("ids", pad)


@pytest.mark.parametrize(
    "text", ["at = Identity(token_type)", "c = Cast <to = 6> (token_type)  at = Cast <to = 7> (c)"]
)
def test_ids_that_are_an_input_by_another_name(text: str) -> None:
    assert ids_of(canonical(embedding(text))).name == "token_type"


def test_one_row_for_all() -> None:
    after = canonical(embedding("at = ConstantOfShape <value = int64[1] {3}> (rows)"))
    assert [node.op for node in after.nodes] == ["Gather", "Add"]


def test_a_table_that_is_sliced() -> None:
    graph = parse(f"""(int64[B,S] ids) => (float[B,S,4] y) <float[600,4] words, float[20,4] places> {{
        {CONSTANTS} w = Gather(words, ids)  p = Slice(places, a0, length1, a0)  y = Add(w, p) }}""")
    assert read(canonical(graph)).first == 0


def test_a_shared_table() -> None:
    graph = parse(f"""(int64[B,S] ids, int64[B,S] token_type) => (float[B,S,20] y) <float[20,4] places> {{
        {CONSTANTS} {SLICED} w = Gather(places, token_type)  p = Gather(places, at)  h = Add(w, p)
        t = Transpose(places)  y = MatMul(h, t) }}""")
    after = canonical(graph)
    assert len({id(t) for node in after.nodes for t in node.inputs if t.name == "places"}) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("m = Min(ids, i3)  at = Mod(m, i3)", "ids[b, t]"),
        ("ne = Equal(ids, i0)  not = Not(ne)  at = Cast <to = 7> (not)", "ids[b, t]"),  # as ids, on zeros and ones
        ("five = Constant <value_int = 5> ()  eq = Equal(ids, five)  at = Cast <to = 7> (eq)", "ids[b, t] + 5 == 0"),
        ("at0 = Range(i0, length, i1)  four = Constant <value_int = 4> ()  at = Mod(at0, four)", "(t % 4)"),
        ("at0 = Range(i0, length, i1)  at = Min(at0, i3)", "+ 3 >= 0"),  # as positions, up to the fourth
        ("back = Sub(length, i1)  at0 = Range(i0, length, i1)  at = Sub(back, at0)", "-t + S - 1"),
        ("high = Constant <value_int = 590> ()  l = Less(ids, high)  at = Where(l, token_type, ids)", "ids[b, t]"),
    ],
    ids=["clipped", "compared with 0", "compared with 5", "periodic", "positions clipped", "reversed", "high ids"],
)
def test_near_misses_say_why(text: str, reason: str) -> None:
    kept(embedding(text), reason)


def test_positions_of_other_tokens_stay() -> None:
    """As decoders' were taken for the encoder's: both inputs have two dimensions, the lengths differ."""
    graph = parse(f"""(int64[B,S] ids, int64[B,T] target) => (float[B,T,4] y)
        <float[600,4] words, float[20,4] places> {{
        {CONSTANTS} sizes = Shape(target)  count = Gather(sizes, i1)  from = Range(i0, count, i1)  at = Add(from, i3)
        w = Gather(words, target)  p = Gather(places, at)  y = Add(w, p) }}""")
    after, report = apply(CanonicaliseEmbeddings(), graph)
    assert report == Report(changed=1, detail={"matched": "2/2"})
    for sizes in ({"B": 2, "S": 5, "T": 3}, {"B": 1, "S": 1, "T": 7}):
        assert_same_outputs(graph, after, 0, sizes)


def test_rows_by_position_that_broadcast_over_one_token_keep_their_shape() -> None:
    """The other operand has one token: the sum takes its length from the positions."""
    graph = parse(f"""(int64[B,S] ids, int64[B,1] start) => (float[B,S,4] y) <float[600,4] words, float[20,4] places> {{
        {CONSTANTS} {SLICED}  w = Gather(words, start)  p = Gather(places, at)  y = Add(w, p) }}""")
    after, report = apply(CanonicaliseEmbeddings(), graph)
    assert report.changed == 0 and "not added to other embeddings" in report.notes[0]
    assert_same_outputs(graph, after, 0, {"B": 2, "S": 5})


def test_results_that_are_graph_outputs_keep_their_shape() -> None:
    kept(embedding(SLICED, outputs=", float[B,S,4] p"), "it gives rows by position")
    row = "at = ConstantOfShape <value = int64[1] {3}> (rows)"
    kept(embedding(row, outputs=", float[B,S,4] p"), "always gives row 3")
    graph = embedding("at = Identity(token_type)", outputs=", float[B,S,4] p")
    canonical(graph)


def test_no_embeddings() -> None:
    graph = parse("(float[B,S,4] x) => (float[B,S,4] y) { y = Relu(x) }")
    assert apply(CanonicaliseEmbeddings(), graph)[1] == Report()
