"""What inputs are for is found by what a graph does with them, whatever they are called."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx_text import parse, parse_model

import nmcompile
from nmcompile import input_roles
from nmcompile import ir as g
from nmcompile.bench import bench
from nmcompile.calibrate import open_data
from nmcompile.cli import cli
from nmcompile.errors import CalibrationError
from nmcompile.roles import Role, real_tokens

MODELS = Path(__file__).resolve().parent.parent / "models"
IDS = Role("ids", 40)

# One attention of two heads; {first} makes h of the words w, {scores} t of the scores s, {keys} k of kn and v of vn.
LAYER = """({inputs}) => ({outputs}float[B,S,8] y)
    <float[40,8] words, float[2,8] kinds, float[32,8] places, float[8,8] wq, float[8,8] wk, float[8,8] wv,
     float[8,8] wo> {{
    w = Gather(words, x0)
    {first}
    qm = MatMul(h, wq)  km = MatMul(h, wk)  vm = MatMul(h, wv)
    split = Constant <value_ints = [0, 0, 2, 4]> ()
    qr = Reshape(qm, split)  kr = Reshape(km, split)  vr = Reshape(vm, split)
    q = Transpose <perm = [0, 2, 1, 3]> (qr)  kn = Transpose <perm = [0, 2, 1, 3]> (kr)
    vn = Transpose <perm = [0, 2, 1, 3]> (vr)
    {keys}
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    product = MatMul(q, kt)  half = Constant <value_float = 0.5> ()  s = Mul(product, half)
    {scores}
    p = Softmax <axis = -1> (t)  c = MatMul(p, v)
    ct = Transpose <perm = [0, 2, 1, 3]> (c)  join = Constant <value_ints = [0, 0, 8]> ()  cr = Reshape(ct, join)
    o = MatMul(cr, wo)  y = Add(o, h)
}}"""
LOWEST = """low = Constant <value_float = -10000.0> ()  zero = Constant <value_float = 0.0> ()
    axes = Constant <value_ints = [1, 2]> ()"""
SUM = "kind = Gather(kinds, x2)  h = Add(w, kind)"
BINARY = f"""{LOWEST}  m = Unsqueeze(x1, axes)  f = Cast <to = 1> (m)  one = Constant <value_float = 1.0> ()
    away = Sub(one, f)  bias = Mul(away, low)  t = Add(s, bias)"""
INVERTED = f"{LOWEST}  m = Unsqueeze(x1, axes)  bias = Where(m, low, zero)  t = Add(s, bias)"


def layer(inputs: str, first: str = SUM, scores: str = "t = Identity(s)", outputs: str = "",
          keys: str = "k = Identity(kn)  v = Identity(vn)") -> str:  # fmt: skip
    return LAYER.format(inputs=inputs, first=first, scores=scores, keys=keys, outputs=outputs)


PLAIN = layer("int64[B,S] x0, int64[B,S] x1, int64[B,S] x2", scores=BINARY)
KEY_PADDING = layer("int64[B,S] x0, bool[B,S] x1, int64[B,S] x2", scores=INVERTED)
ADDED = layer("int64[B,S] x0, float[B,1,1,S] x1, int64[B,S] x2", scores="t = Add(s, x1)")
PLACES = layer("int64[B,S] x0, bool[B,S] x1, int64[B,S] idx", scores=INVERTED,
               first="place = Gather(places, idx)  h = Add(w, place)")  # fmt: skip
CACHED = layer("int64[B,S] x0, float[B,2,T,4] k0, float[B,2,T,4] x1", first="h = Identity(w)",
               outputs="float[B,2,L,4] k, float[B,2,L,4] v, ",
               keys="k = Concat <axis = 2> (k0, kn)  v = Concat <axis = -2> (x1, vn)")  # fmt: skip


def roles(text: str) -> dict[str, Role | None]:
    return {info.name: info.role for info in input_roles.inputs(parse(text))}


def test_ids_masks_and_types_of_any_name() -> None:
    assert roles(PLAIN) == {"x0": IDS, "x1": Role("mask"), "x2": Role("types", 2)}


def test_a_mask_where_true_hides_and_one_that_is_added_to_scores() -> None:
    assert roles(KEY_PADDING)["x1"] == Role("mask", keeps="zero")
    assert roles(ADDED)["x1"] == Role("mask", keeps="added")


def test_a_mask_of_rows_that_is_added_to_scores() -> None:
    """float [batch, tokens] is a mask of 0 and 1 by most names: here it is added."""
    text = layer("int64[B,S] x0, float[B,S] attention_mask", first="h = Identity(w)",
                 scores=f"{LOWEST}  m = Unsqueeze(attention_mask, axes)  t = Add(s, m)")  # fmt: skip
    infos = input_roles.inputs(parse(text))
    assert infos[1].role == Role("mask", keeps="added")
    (batch,) = open_data([{"x0": np.arange(n)} for n in COUNTS], infos)
    mask = batch["attention_mask"]
    assert (mask == 0).sum(axis=1).tolist() == list(COUNTS) and mask.min() < -5e3


def test_features_added_before_a_softmax_are_no_mask() -> None:
    text = """(float[B,S,4] x, float[B,2,S,S] bias) => (float[B,S,4] y, float[B,2,S,S] z) <float[4,4] w>
        { a = MatMul(x, w)  b = Add(x, a)  y = Softmax(b)
          n = Transpose <perm = [0, 2, 1]> (x)  o = Constant <value_ints = [1]> ()  p = MatMul(x, n)
          q = Unsqueeze(p, o)  r = Add(q, bias)  z = Softmax(r) }"""
    assert roles(text) == {"x": Role("features"), "bias": Role("features")}


def test_positions_are_looked_up_in_a_table_whose_rows_are_added_to_those_of_the_ids() -> None:
    assert roles(PLACES) == {"x0": IDS, "x1": Role("mask", keeps="zero"), "idx": Role("positions", 32)}
    apart = PLACES.replace("h = Add(w, place)", "one = ReduceSum(place)  h = Mul(w, one)")
    assert roles(apart)["idx"] == Role("ids", 32)  # of another text


def test_positions_that_turn_queries() -> None:
    text = layer("int64[B,S] x0, int64[B,S] x1", first="""a = Cast <to = 1> (x1)  last = Constant <value_ints = [2]> ()
        b = Unsqueeze(a, last)  f = Constant <value_float = 0.1> ()  c0 = Mul(b, f)  d = Cos(c0)  h = Mul(w, d)""")
    assert roles(text)["x1"] == Role("positions")


def test_a_cache_is_what_new_keys_are_joined_to() -> None:
    assert roles(CACHED) == {"x0": IDS, "k0": Role("cache"), "x1": Role("cache")}


def test_a_name_decides_where_use_tells_nothing() -> None:
    found = roles("(int64[B,S] segment_ids, int64[B,S] n, float[B,S,4] x) => (int64[B,S] y, float[B,S,4] z)"
                  "{ y = Add(segment_ids, n)  z = Relu(x) }")  # fmt: skip
    assert found == {"segment_ids": Role("types"), "n": Role("ids"), "x": Role("features")}


def test_a_name_does_not_decide_against_use() -> None:
    """What is called a mask is looked up in the table of words."""
    text = PLAIN.replace("x0", "the_mask").replace("x1", "position")
    assert roles(text) == {"the_mask": IDS, "position": Role("mask"), "x2": Role("types", 2)}


def test_a_mask_of_a_mean() -> None:
    text = """(int64[B,S] a, float[B,S,4] x) => (float[B,4] y) {{ f = Cast <to = 1> (a)
        last = Constant <value_ints = [2]> ()  m = Unsqueeze(f, last)  {0}  r = Relu(x)  k = Mul(r, n)
        over = Constant <value_ints = [1]> ()  s = ReduceSum <keepdims = 0> (k, over)
        c = ReduceSum <keepdims = 0> (n, over)  y = Div(s, c) }}"""
    assert roles(text.format("n = Identity(m)"))["a"] == Role("mask")
    inverted = "one = Constant <value_float = 1.0> ()  n = Sub(one, m)"
    assert roles(text.format(inverted)) == {"a": Role("mask", keeps="zero"), "x": Role("features")}


def test_rows_are_those_of_what_is_looked_up_as_it_is() -> None:
    moved = "two = Constant <value_int = 2> ()  j = Add(idx, two)  place = Gather(places, j)  h = Add(w, place)"
    text = PLACES.replace("place = Gather(places, idx)  h = Add(w, place)", moved)
    assert roles(text)["idx"] == Role("positions")


@pytest.mark.parametrize("name", ["bert-torchscript", "bert-ort", "bert-ort-transformers", "bert-dynamo-attention",
                                  "gpt2-dynamo", "roberta-torchscript", "t5-dynamo", "vit-dynamo"])  # fmt: skip
def test_names_change_nothing(name: str) -> None:
    """Exports of PyTorch and optimized ones, with operators of onnxruntime's, as they are called and as x0, x1, ..."""
    graph = g.load(MODELS / f"{name}.onnx")
    usual = [info.role for info in input_roles.inputs(graph)]
    for number, tensor in enumerate(graph.inputs):
        tensor.name = f"x{number}"
    assert [info.role for info in input_roles.inputs(graph)] == usual


# ---- data, loss and comparisons go by them --------------------------------------------------------------------------

COUNTS = (5, 3, 7, 2)  # tokens of four samples, of which the longest is 7


def samples(kind: str) -> list[dict[str, np.ndarray]]:
    """One batch in which three of four rows are padded, in the values of each model's mask."""
    rng = np.random.default_rng(0)
    keep = np.arange(7) < np.array(COUNTS)[:, None]
    lowest = np.float32(np.finfo(np.float32).min)
    masks = {"plain": keep.astype(np.int64), "inverted": ~keep,
             "added": np.where(keep, np.float32(0), lowest)[:, None, None]}  # fmt: skip
    return [{"x0": rng.integers(0, 40, keep.shape), "x1": masks[kind], "x2": rng.integers(0, 2, keep.shape)}]


MASKED = {"plain": PLAIN, "inverted": KEY_PADDING, "added": ADDED}


@pytest.mark.parametrize("kind", MASKED)
def test_the_loss_is_that_of_the_real_tokens(kind: str, tmp_path: Path) -> None:
    data = samples(kind)
    model, plan, path = tmp_path / "m.onnx", tmp_path / "m.plan", tmp_path / "data.npz"
    onnx.save(parse_model(MASKED[kind]), model)
    result = nmcompile.compile(model, plan, calibration=data, tuning="off", preset="fast", sparsity=0.0)
    assert result.loss["y"].values == sum(COUNTS) * 8

    np.savez(path, **data[0])  # type: ignore[arg-type]
    for pair in ((model, plan), (plan, plan)):  # of two plans only what they state is known
        done = CliRunner().invoke(cli, ["compare", *map(str, pair), "--data", str(path), "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["outputs"]["y"]["values"] == sum(COUNTS) * 8


def test_a_plan_states_the_roles_that_names_do_not_tell(tmp_path: Path) -> None:
    plan = tmp_path / "m.plan"
    nmcompile.compile(parse(KEY_PADDING), plan, calibration=samples("inverted"), tuning="off", preset="fast")
    session = nmcompile.load(plan)
    assert session.header["roles"] == {"x1": {"kind": "mask", "keeps": "zero"}, "x2": {"kind": "types"}}
    assert session.inputs[1].role == Role("mask", keeps="zero")
    usual = KEY_PADDING.replace("x0", "input_ids").replace("x1", "x").replace("x2", "token_type_ids")
    named = [{"input_ids": row["x0"], "x": row["x1"], "token_type_ids": row["x2"]} for row in samples("inverted")]
    nmcompile.compile(parse(usual), plan, calibration=named, tuning="off", preset="fast")
    assert list(nmcompile.load(plan).header["roles"]) == ["x"]


def test_bert_with_other_names_loses_what_bert_loses(tmp_path: Path) -> None:
    """Same weights, same data: the same figures over the same values."""
    rng, keep = np.random.default_rng(1), np.arange(9) < np.array([4, 9, 6])[:, None]
    values = [rng.integers(0, 256, keep.shape), keep.astype(np.int64), rng.integers(0, 2, keep.shape)]
    graph, found = g.load(MODELS / "bert-torchscript.onnx"), []
    for names in (["input_ids", "attention_mask", "token_type_ids"], ["x0", "x1", "x2"]):
        for tensor, name in zip(graph.inputs, names, strict=True):
            tensor.name = name
        data = [dict(zip(names, values, strict=True))]
        found.append(nmcompile.compile(graph, tmp_path / "m.plan", calibration=data, tuning="off", preset="fast").loss)
    assert found[0] == found[1] and found[0]["last_hidden_state"].values == keep.sum() * 64


def test_data_that_were_opened_for_the_names_alone_get_the_roles(tmp_path: Path) -> None:
    graph = parse(KEY_PADDING)
    data = open_data(samples("inverted"), g.inputs(graph))
    assert nmcompile.compile(graph, tmp_path / "m.plan", calibration=data, tuning="off", preset="fast",
                             sparsity=0.0).loss["y"].values == sum(COUNTS) * 8  # fmt: skip


def test_side_by_side_all_get_the_inputs_that_the_plan_states(tmp_path: Path) -> None:
    """By their names types are ids, of which the table has no such rows."""
    model, plan = tmp_path / "m.onnx", tmp_path / "m.plan"
    onnx.save(parse_model(PLAIN), model)
    nmcompile.compile(model, plan, calibration=samples("plain"), tuning="off", preset="fast", measure=False)
    found = bench([model, plan], shapes=[(2, 9)], seconds=0.05, threads=1)
    assert [item.latencies[0].tokens for item in found] == [9, 9]


@pytest.mark.parametrize(("text", "hides"), [(PLAIN, 0), (KEY_PADDING, True)])
def test_samples_of_unequal_length_are_padded_in_the_values_of_the_mask(text: str, hides: int) -> None:
    infos = input_roles.inputs(parse(text))
    data = open_data([{"x0": np.arange(1, n + 1)} for n in COUNTS], infos)  # mask and types are made
    (batch,) = data
    assert batch["x0"][1].tolist() == [1, 2, 3, 0, 0, 0, 0] and not batch["x2"].any()
    assert (batch["x1"] == hides).sum(axis=1).tolist() == [7 - n for n in COUNTS]
    real = real_tokens(batch, infos)
    assert real is not None and real.sum(axis=1).tolist() == list(COUNTS)


@pytest.mark.parametrize("text", [PLAIN, KEY_PADDING, ADDED, PLACES])
def test_made_up_inputs_suit_the_roles(text: str) -> None:
    """They run, a first row is full, and verifying passes on them sees padding."""
    graph = parse(text)
    infos = input_roles.inputs(graph)
    (feeds, *_) = open_data(None, infos, max_length=32)
    g.run(graph, feeds)
    real = real_tokens(feeds, infos)
    assert real is None or (real[0].all() and real.any(axis=1).all())
    assert (real is None) == (text is ADDED)  # masks of four axes are made full


@pytest.mark.parametrize(("name", "value", "rows"), [("x0", 40, 40), ("x2", 2, 2), ("x0", -41, 40)])
def test_numbers_that_no_table_has_are_told_whatever_the_inputs_are_called(
    name: str, value: int, rows: int, tmp_path: Path
) -> None:
    data = [{key: values.copy() for key, values in sample.items()} for sample in samples("plain")]
    data[0][name].reshape(-1)[0] = value
    with pytest.raises(CalibrationError, match=f"'{name}' holds {value}, the model's table has {rows} rows"):
        nmcompile.compile(parse(PLAIN), tmp_path / "m.plan", calibration=data, tuning="off", preset="fast")
