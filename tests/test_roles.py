"""What an input is for by its name, what is made up for it, and which tokens of a batch are real."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nmcompile.errors import CalibrationError, PlanError
from nmcompile.roles import Role, by_name, ids_input, made, read_roles, real_tokens, stated, written
from nmcompile.tensorinfo import TensorInfo

SOURCES = Path(__file__).resolve().parent.parent / "nmcompile"
INT, FLOAT, BOOL = np.dtype(np.int64), np.dtype(np.float32), np.dtype(bool)


def info(name: str, dtype: np.dtype = INT, shape: tuple[int | str, ...] = ("B", "S"), role: Role | None = None
         ) -> TensorInfo:  # fmt: skip
    return TensorInfo(name, dtype, shape, role)


@pytest.mark.parametrize(("given", "kind"), [
    (info("input_ids"), "ids"), (info("x"), "ids"), (info("masked_positions"), "positions"), (info("pos"), "positions"),
    (info("token_type_ids"), "types"), (info("segment_ids:0"), "types"), (info("input_mask:0"), "mask"),
    (info("purpose"), "ids"), (info("mask_features", FLOAT, ("B", "S", 8)), "features"),
    (info("flag", BOOL), "features"),
    (info("past.0.key", FLOAT, ("B", 2, "S", 4)), "cache"), (info("past.0", FLOAT, ("B", "S")), "features"),
    (info("mask", np.dtype(object)), "text"),
])  # fmt: skip
def test_names(given: TensorInfo, kind: str) -> None:
    assert by_name(given).kind == kind


def test_a_mask_by_name_is_added_where_it_is_of_floats_that_are_no_padding() -> None:
    assert by_name(info("mask", FLOAT)).keeps == by_name(info("mask", BOOL, ("B", 1, 1, "S"))).keeps == "nonzero"
    assert by_name(info("mask", FLOAT, ("B", 1, 1, "S"))).keeps == "added"


def test_the_tokens_are_those_called_so_or_the_first_ids() -> None:
    first, second = info("a"), info("input_ids")
    assert ids_input([info("mask"), first, second]) is second
    assert ids_input([info("mask"), first]) is first and ids_input([info("mask")]) is None
    assert ids_input([info("input_ids", role=Role("positions")), first]) is first


KEEP = np.array([[True, True, False], [True, True, True]])
ADDED = np.where(KEEP, 0, -1e4).astype(np.float32)


@pytest.mark.parametrize(("values", "role"), [
    (KEEP.astype(np.int64), Role("mask")), (KEEP.astype(np.int64) * 7, Role("mask")),
    (~KEEP, Role("mask", keeps="zero")), (ADDED, Role("mask", keeps="added")),
    (np.where(KEEP, 0, -np.inf)[:, None, None], Role("mask", keeps="added")),
    (np.where(np.tril(np.ones((3, 3), bool)) & KEEP[:, None], 0, -1e9)[:, None], Role("mask", keeps="added")),
])  # fmt: skip
def test_real_tokens_are_those_that_a_mask_keeps(values: np.ndarray, role: Role) -> None:
    real = real_tokens({"m": values}, [info("m", values.dtype, values.shape, role)])
    assert real is not None and (real == KEEP).all()


@pytest.mark.parametrize(("values", "role"), [
    (np.ones((2, 3), np.int64), Role("mask")), (np.zeros((2, 3), bool), Role("mask", keeps="zero")),
    (ADDED, Role("mask")), (np.full((2, 3), np.nan), Role("mask")),
    (np.full((2, 3), np.nan), Role("mask", keeps="added")), (np.zeros((0, 3), np.int64), Role("mask")),
    (KEEP.astype(np.int64), Role("types")),
    (np.zeros((2, 4, 3), bool), Role("mask")),
])  # fmt: skip
def test_nothing_is_padded_where_no_mask_says_so(values: np.ndarray, role: Role) -> None:
    assert real_tokens({"mask": values}, [info("mask", values.dtype, values.shape, role)]) is None


def test_a_mask_that_keeps_all_leaves_the_word_to_the_next() -> None:
    real = real_tokens({"attention_mask": np.ones((2, 5)), "decoder_attention_mask": KEEP.astype(np.int64)})
    assert real is not None and (real == KEEP).all()


def test_a_mask_that_keeps_nothing_is_a_fault_of_the_data() -> None:
    with pytest.raises(CalibrationError, match="'m' masks every token of a batch"):
        real_tokens({"m": np.ones((1, 3), bool)}, [info("m", BOOL, role=Role("mask", keeps="zero"))])


@pytest.mark.parametrize("role", [Role("mask"), Role("mask", keeps="zero"), Role("mask", keeps="added")])
def test_a_made_up_mask_keeps_a_prefix_in_its_own_values(role: Role) -> None:
    given = info("m", FLOAT if role.keeps == "added" else INT, role=role)
    values = made(given, (4, 9), np.random.default_rng(0), lengths=np.random.default_rng(5))
    real = real_tokens({"m": values}, [given])
    assert real is not None and real[0].all() and not real.all() and (np.diff(real.astype(int)) <= 0).all()
    assert real_tokens({"m": made(given, (4, 9), np.random.default_rng(0))}, [given]) is None


def test_made_up_numbers_lie_in_their_tables() -> None:
    rng = np.random.default_rng(0)
    for role, high in ((Role("ids", 3), 3), (Role("ids"), 20), (Role("types", 1), 1), (Role("types", 16), 2)):
        values = made(info("x", role=role), (50, 50), rng)
        assert (values.min(), values.max()) == (0, high - 1)
    assert made(info("x", role=Role("ids", 2)), (50, 50), rng, ids=(3, 9)).max() <= 1
    assert made(info("x", role=Role("positions", 9)), (2, 3), rng).tolist() == [[0, 1, 2]] * 2


def test_a_mask_that_is_added_fits_half_floats() -> None:
    values = written(KEEP, info("m", np.dtype(np.float16), role=Role("mask", keeps="added")))
    assert np.isfinite(values).all() and (values[0, 2], values[0, 0]) == (-1e4, 0)


def test_a_plan_states_what_names_do_not_tell() -> None:
    given = [info("input_ids", role=Role("ids", 9)), info("x", BOOL, role=Role("mask", keeps="zero")),
             info("attention_mask", role=Role("mask")), info("y", role=Role("types", 2)), info("z")]  # fmt: skip
    told = stated(given)
    assert told == {"x": {"kind": "mask", "keeps": "zero"}, "y": {"kind": "types"}}
    plain = [info("input_ids"), info("x", BOOL), info("attention_mask"), info("y"), info("z")]
    assert [item.role for item in read_roles(told, plain)] == [None, given[1].role, None, Role("types"), None]


@pytest.mark.parametrize("items", [[], 3, {"x": 1}, {"x": {"kind": "king"}}, {"w": {"kind": "ids"}}, {"x": {}},
                                   {"x": {"kind": ["ids"]}}, {"x": {"kind": "mask", "keeps": {}}}])  # fmt: skip
def test_what_a_plan_may_not_state(items: object) -> None:
    with pytest.raises(PlanError, match="damaged"):
        read_roles(items, [info("x")])


# ---- names are read in one place ------------------------------------------------------------------------------------

WORDS = re.compile(r"mask|token_type|segment|position|input_ids|past|cache|pixel")
NAMED = re.compile(r"\b(name|low|lower)\b")
SEARCHES = ("startswith", "endswith", "search", "match", "fullmatch", "find")


def guesses(source: str) -> Iterator[str]:
    """Where a source looks for such a word in a name, or puts a name in lower case to do so."""

    def has_word(node: ast.AST) -> bool:
        words = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
        return any(isinstance(word, str) and WORDS.search(word) for word in words)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            found = isinstance(node.left, ast.Constant) and has_word(node.left) and NAMED.search(ast.unparse(node))
        elif isinstance(node, ast.GeneratorExp):
            found = has_word(node.generators[0].iter) and NAMED.search(ast.unparse(node.elt))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            searched = node.func.attr in SEARCHES and has_word(node) and NAMED.search(ast.unparse(node))
            found = searched or re.search(r"\.name\.lower\(\)$", ast.unparse(node))
        else:
            continue
        if found:
            yield ast.unparse(node)


@pytest.mark.parametrize("text", [
    '"mask" in info.name', 'any(word in info.name.lower() for word in ("position", "segment"))',
    're.search(r"mask([:._]\\d+)?$", name.lower())', 'name.startswith("past")', "low = info.name.lower()",
    'not any(word in name for word in ("token_type", "mask"))',
])  # fmt: skip
def test_a_guess_is_seen(text: str) -> None:
    assert [*guesses(text)]


def test_no_other_module_guesses_by_names() -> None:
    found = {str(path.relative_to(SOURCES)): [*guesses(path.read_text("utf-8"))]
             for path in [*SOURCES.rglob("*.py"), *(SOURCES / "passes").glob("*.py")]}  # fmt: skip
    assert found.pop("roles.py")
    assert len(found) > 100 and {name: lines for name, lines in found.items() if lines} == {}
