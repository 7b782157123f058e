"""Encoders drawn at random: what a graph is made of, as values that print as what they are.

`draw(seed)` gives a Recipe; random_graph_model builds its ONNX graph, random_graph_feeds its inputs. A recipe's repr is
Python, so that a graph that failed can be kept as text and built again, whole or cut down by hand.
"""

from __future__ import annotations

import random
from dataclasses import MISSING, dataclass, fields, replace


class Part:
    """Of a recipe; its repr is the call that makes it, without what is usual."""

    def __repr__(self) -> str:
        given = [field for field in fields(self) if getattr(self, field.name) != field.default]  # type: ignore[arg-type]
        short = all(field.default is MISSING for field in given)
        words = (repr(getattr(self, f.name)) if short else f"{f.name}={getattr(self, f.name)!r}" for f in given)
        return f"{type(self).__name__}({', '.join(words)})"

# ---- which keys a query sees -------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Padding(Part):
    """keep[b, k] by the values of an input; `test`: cast, == 1, != 0, > 0. picked: by GatherND at every (b, k)."""

    source: str = "attention_mask"
    test: str = "cast"
    picked: bool = False


@dataclass(frozen=True, repr=False)
class Causal(Part):
    """k <= q; `form`: range, triangle (a constant, cut to the length), trilu, cumsum."""

    form: str = "range"


@dataclass(frozen=True, repr=False)
class Window(Part):
    """q - k < width, or |q - k| <= width."""

    width: int
    both: bool = False


@dataclass(frozen=True, repr=False)
class Blocks(Part):
    """q // size == k // size."""

    size: int


@dataclass(frozen=True, repr=False)
class Prefix(Part):
    """k < length."""

    length: int


@dataclass(frozen=True, repr=False)
class Segments(Part):
    """source[b, q] == source[b, k], an integer input."""

    source: str = "segments"


@dataclass(frozen=True, repr=False)
class Both(Part):
    left: Keep
    right: Keep


@dataclass(frozen=True, repr=False)
class Either(Part):
    left: Keep
    right: Keep


Keep = Padding | Causal | Window | Blocks | Prefix | Segments | Both | Either


@dataclass(frozen=True, repr=False)
class Mask(Part):
    """How scores are masked. `put`: add (Where(keep, 0, value) is added), where (Where(keep, scores, value)), fill
    (Where(Not(keep), value, scores)), times ((1 - keep) * value is added), apart (of Both, each side's bias is added by
    itself), soft ((1 - input) * value: the padding is not tested at all, and `keep` is what else there is)."""

    keep: Keep | None
    put: str = "add"
    value: float | str = -1e4  # "lowest", "-inf" or a number
    soft: str = ""  # the input of a soft mask
    early: bool = False  # before the scale
    spread: bool = False  # the bias is expanded to [batch, 1, queries, keys]


# ---- the rest of a graph -----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Given(Part):
    """A mask, segment or position input: its type and shape (bs, 1s or b11s)."""

    name: str
    dtype: str = "int64"
    shape: str = "bs"


@dataclass(frozen=True, repr=False)
class Ids(Part):
    """Rows of the word table: plain, or offset, unknown (Where(ids < at, ids, 1)), clip, mod by `at`."""

    dtype: str = "int64"
    kind: str = "plain"
    at: int = 0
    words: int = 100  # rows of the table
    vocabulary: int = 100  # ids that the graph takes


@dataclass(frozen=True, repr=False)
class Positions(Part):
    """Rows of the position table: range, clip, mod, reversed, ids (RoBERTa), mask (OPT), real (Where(mask == 0, 1,
    count - 1)), given, buffer (a constant cut to the length), table (the table itself cut to the length). `at`: of clip
    and mod; clamped: Min(., rows - 1)."""

    kind: str = "range"
    at: int = 0
    first: int = 0
    rows: int = 700
    clamped: bool = False


@dataclass(frozen=True, repr=False)
class Style(Part):
    """How an exporter writes what every graph has."""

    opset: int = 17
    shapes: str = "constant"  # zeros, infer (-1), computed (Shape, Gather, Concat)
    sizes: str = "gather"  # slice, range (Shape's start and end)
    keys: str = "once"  # twice: two transposes
    merged: bool = False  # one product for q, k and v
    fused_norm: bool = True
    gelu: str = "Relu"
    guard: bool = False  # Where(IsNaN(p), 0, p)
    pre_norm: bool = False
    swapped: bool = False  # Add(bias, x)
    folded: bool = True  # weights as initializers, not behind a Transpose
    fused: str = ""  # attention as microsoft (Attention), mha (MultiHeadAttention), onnx (opset 23)
    embed: bool = False  # EmbedLayerNormalization


@dataclass(frozen=True, repr=False)
class Factor(Part):
    """Of the scores: constant or by the length; on scores, q, k, both (half each)."""

    kind: str = "constant"
    on: str = "scores"
    op: str = "Mul"


@dataclass(frozen=True, repr=False)
class Constant(Part):
    """A constant in a Mul or Add behind the first layer; its shape in letters: h (features), s (tokens), 1."""

    op: str
    shape: str


@dataclass(frozen=True, repr=False)
class Decoder(Part):
    """A second sequence with cross-attention to the first. `own`: positions by its own length, not the encoder's."""

    own: bool = True
    masked: bool = True
    causal: bool = True


@dataclass(frozen=True, repr=False)
class Recipe(Part):
    seed: int
    heads: int = 2
    share: int = 1  # heads that share their keys and values
    size: int = 16
    hidden: int = 32
    feed: int = 64
    static: int = 0  # tokens, where the length is fixed
    ids: Ids = Ids()
    positions: Positions | None = None
    types: str = ""  # zero, one, buffer, input
    masks: tuple[Mask | None, ...] = (None,)  # one per layer
    inputs: tuple[Given, ...] = ()
    factor: Factor = Factor()
    constant: Constant | None = None
    decoder: Decoder | None = None
    past: bool = False
    outputs: tuple[str, ...] = ("tokens",)
    style: Style = Style()


# ---- drawing -----------------------------------------------------------------------------------------------------

TYPES = ("int64", "int64", "int32", "float32", "bool")
COUNTED = ("mask", "real")  # positions by the mask's values
VALUES = (-1e4, -1e4, "lowest", "lowest", "-inf", -65504.0)
ODD = (
    "mask", "positions", "ids", "types", "factor", "outputs", "constant", "decoder", "past", "second", "layers",
    "fused", "share",
)  # fmt: skip


def draw(seed: int) -> Recipe:
    """The recipe of a seed: a usual encoder in which one to three things are unusual."""
    rng = random.Random(seed)
    odd = set(rng.sample(ODD, rng.choice((0, 1, 1, 2, 2, 3))))
    heads, size = rng.choice(((2, 16), (4, 8), (2, 8), (4, 16), (3, 12)))
    hidden = rng.choice((32, 48, heads * size, heads * size))
    inputs: dict[str, Given] = {}
    if rng.random() < 0.75 or {"mask", "second"} & odd:
        shape = rng.choice(("bs", "bs", "1s", "b11s")) if "mask" in odd else "bs"
        name = rng.choice(("attention_mask", "attention_mask", "input_mask", "mask"))
        inputs["mask"] = Given(name, rng.choice(TYPES), shape)
    decoder = None
    if "decoder" in odd:
        decoder = Decoder(rng.random() < 0.7, rng.random() < 0.7, rng.random() < 0.7)
    past = "past" in odd and decoder is None
    static = hidden if "constant" in odd and rng.random() < 0.6 and decoder is None and not past else 0
    style = _style(rng, "fused" in odd, merged=not past)
    if "second" in odd:
        inputs["second"] = Given(rng.choice(("visible", "global_mask")), rng.choice(TYPES))
    layers = 2 if "layers" in odd else rng.choice((1, 1, 2))
    masks = [_mask(rng, odd, inputs, style.opset)]
    while len(masks) < layers:
        masks.append(_mask(rng, odd, inputs, style.opset) if "layers" in odd else masks[0])
    outputs: tuple[str, ...] = ("tokens",)
    if "outputs" in odd:
        kinds = ["first", "first slice", "mean", "max"] + ["masked mean", "last"] * ("mask" in inputs)
        outputs = tuple(rng.sample([*kinds, "tokens"], rng.choice((1, 1, 2))))
    positions = _positions(rng, "positions" in odd, inputs, past)
    if positions is not None and style.fused == "microsoft":
        positions = replace(positions, first=0, clamped=False)
    if "mask" in inputs and positions is not None and positions.kind in COUNTED and inputs["mask"].shape != "bs":
        inputs["mask"] = Given(inputs["mask"].name, inputs["mask"].dtype)
    if {"masked mean", "last"} & set(outputs) and inputs["mask"].shape == "b11s":
        inputs["mask"] = Given(inputs["mask"].name, inputs["mask"].dtype)
    ids, types = _ids(rng, "ids" in odd), rng.choice(("zero", "one", "buffer", "input")) if "types" in odd else ""
    if _embeddable(style, positions) and decoder is None and not past and rng.random() < 0.6:
        style, ids, types = replace(style, embed=True), replace(ids, dtype="int32"), types and "input"
        if "positions" in inputs:
            inputs["positions"] = Given("position_ids", "int32")
    return Recipe(
        seed, heads,
        share=rng.choice([n for n in (2, 4, 3) if heads % n == 0]) if "share" in odd else 1,
        size=size,
        hidden=hidden,
        feed=rng.choice((32, 64, 96)),
        static=static,
        ids=ids,
        positions=positions,
        types=types,
        masks=tuple(masks),
        inputs=tuple(inputs.values()),
        factor=_factor(rng, "factor" in odd),
        constant=_constant(rng, static) if "constant" in odd else None,
        decoder=decoder,
        past=past,
        outputs=outputs,
        style=style,
    )  # fmt: skip


def _embeddable(style: Style, positions: Positions | None) -> bool:
    """onnxruntime's operator says the same."""
    if style.fused != "microsoft" or positions is None or positions.clamped:
        return False
    return positions.kind == "given" or (positions.kind == "range" and positions.first == 0)


def _style(rng: random.Random, odd: bool, merged: bool) -> Style:
    fused = rng.choice(("microsoft", "microsoft", "mha", "onnx")) if odd else ""
    return Style(
        opset=23 if fused == "onnx" else rng.choice((11, 13, 14, 17, 17, 18, 20, 21, 23)),
        shapes=rng.choice(("zeros", "infer", "computed")),
        sizes=rng.choice(("gather", "slice", "range")),
        keys=rng.choice(("once", "twice")),
        merged=merged and rng.random() < 0.2,
        fused_norm=rng.random() < 0.5,
        gelu=rng.choice(("Relu", "Relu", "Gelu", "erf")),
        guard=rng.random() < 0.2,
        pre_norm=rng.random() < 0.3,
        swapped=rng.random() < 0.3,
        folded=rng.random() < 0.8,
        fused=fused,
    )


def _mask(rng: random.Random, odd: set[str], inputs: dict[str, Given], opset: int) -> Mask | None:
    value = rng.choice(VALUES)
    early, keep, soft = rng.random() < 0.2, None, ""
    padding = _padding(rng, inputs["mask"]) if "mask" in inputs else None
    if padding is not None and inputs["mask"].dtype != "bool" and value != "-inf" and rng.random() < 0.4:
        padding, soft = None, inputs["mask"].name
    terms: list[Keep] = [] if padding is None else [padding]
    if "second" in inputs:
        terms.append(_padding(rng, inputs["second"]))
    if "mask" in odd:
        terms += [_term(rng, inputs, opset) for _ in range(rng.choice((1, 1, 2)))]
    elif rng.random() < 0.25:
        terms.append(_causal(rng, opset))
    rng.shuffle(terms)
    for term in terms:
        unusual = "mask" in odd and rng.random() < 0.3
        keep = term if keep is None else Either(keep, term) if unusual else Both(keep, term)
    if keep is None and not soft:
        return None
    puts = ["add", "add", "where", "fill"] + ["times"] * (value != "-inf") + ["apart"] * isinstance(keep, Both)
    return Mask(keep, "soft" if soft else rng.choice(puts), value, soft, early, rng.random() < 0.2)


def _padding(rng: random.Random, given: Given) -> Padding:
    tests = ("cast",) if given.dtype == "bool" else ("cast", "cast", "== 1", "!= 0", "> 0")
    return Padding(given.name, rng.choice(tests), given.shape == "bs" and rng.random() < 0.15)


def _causal(rng: random.Random, opset: int) -> Causal:
    return Causal(rng.choice(("range", "triangle", "cumsum", "trilu" if opset >= 14 else "range")))


def _term(rng: random.Random, inputs: dict[str, Given], opset: int) -> Keep:
    kind = rng.choice(("causal", "window", "window", "blocks", "prefix", "segments", "banded"))
    if kind == "causal":
        return _causal(rng, opset)
    if kind == "blocks":
        return Blocks(rng.choice((4, 16, 24, 64)))
    if kind == "prefix":
        return Either(Prefix(rng.choice((3, 13, 20, 50))), _causal(rng, opset))
    if kind == "segments":
        inputs["segments"] = Given("segments", rng.choice(("int64", "int32")))
        return Segments()
    width = rng.choice((2, 5, 9, 16, 32, 100))
    return Both(_causal(rng, opset), Window(width)) if kind == "banded" else Window(width, rng.random() < 0.5)


def _ids(rng: random.Random, odd: bool) -> Ids:
    dtype, words = rng.choice(("int64", "int64", "int32")), rng.choice((60, 100, 700, 2000))
    kind = rng.choice(("offset", "unknown", "clip", "mod")) if odd else "plain"
    at = {"plain": 0, "offset": rng.choice((1, 3, 20))}.get(kind, rng.choice((40, words // 2, words - 1, words)))
    vocabulary = words - at if kind == "offset" else words if kind == "plain" else rng.choice((words, 2 * words))
    return Ids(dtype, kind, at, words, vocabulary)


def _positions(rng: random.Random, odd: bool, inputs: dict[str, Given], past: bool) -> Positions | None:
    if not odd:
        plain = Positions("range", first=rng.choice((0, 0, 2)), rows=rng.choice((128, 256, 700)))
        return None if rng.random() < 0.25 else plain
    kinds = ["range", "clip", "mod", "reversed", "given", "buffer", "table", "ids", *COUNTED * ("mask" in inputs)]
    kind = "given" if past and rng.random() < 0.5 else rng.choice(kinds)
    if kind == "given":
        inputs["positions"] = Given("position_ids", rng.choice(("int64", "int32")), rng.choice(("bs", "1s")))
    first = rng.choice((0, 0, 1, 3)) if kind in ("range", "clip", "mod", "buffer") else 0
    return Positions(kind, rng.choice((4, 14, 15, 16, 40)), first, rng.choice((64, 128, 700)), rng.random() < 0.25)


def _factor(rng: random.Random, odd: bool) -> Factor:
    on, op = rng.choice(("scores", "scores", "q", "k", "both")), rng.choice(("Mul", "Div"))
    return Factor("length" if odd else "constant", on, op)


def _constant(rng: random.Random, static: int) -> Constant:
    shapes = ["h", "1h", "11h", "1", "", "11", "111h"] + ["s1", "1s1", "sh", "1sh"] * 2 * bool(static)
    return Constant(rng.choice(("Mul", "Add")), rng.choice(shapes))


# ---- what a recipe says ------------------------------------------------------------------------------------------


def parts(value: object) -> list[Part]:
    """The parts of a recipe, those within others too."""
    if isinstance(value, tuple):
        return [part for item in value for part in parts(item)]
    return [value, *(part for item in vars(value).values() for part in parts(item))] if isinstance(value, Part) else []


def constants(recipe: Recipe) -> tuple[int, ...]:
    """The numbers in a recipe at which what a graph does may change with the length."""
    found = {part.at for part in parts(recipe) if isinstance(part, Positions) and part.kind in ("clip", "mod")}
    found |= {part.width for part in parts(recipe) if isinstance(part, Window)}
    found |= {part.size for part in parts(recipe) if isinstance(part, Blocks)}
    found |= {part.length for part in parts(recipe) if isinstance(part, Prefix)}
    return tuple(sorted(found))
