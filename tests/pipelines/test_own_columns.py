"""What a batch's rows bring in columns of their own: p, protected messages, positions; all against naive.py."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from helpers import oracle
from helpers.columns import FIXED, IDS, RAGGED, UNEVEN, X, make, objects, plain_masks, same

rng = np.random.default_rng(3)
GUARD = rng.random((6, 4)) < 0.3
PLACES = rng.integers(0, 9, (6, 4))
P = [0.0, 1.0, 0.5, 0.9, 0.25, 0.7]
RAGGED_GUARD = [GUARD[i, : 1 + i % 4] for i in range(6)]
RAGGED_PLACES = [PLACES[i, : 1 + i % 4] for i in range(6)]


def lists(rows: Any, kind: Any) -> pa.Array:
    return pa.array([np.asarray(row).tolist() for row in rows], kind)


def forms(array: np.ndarray, kind: pa.DataType) -> dict[str, Any]:
    """Everything that holds the same row for row."""
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(kind, (4,)), lists(array, pa.list_(kind, 4)))
    return {
        "array": array, "turned": np.asfortranarray(array), "tensor": torch.from_numpy(array), "list": list(array),
        "list of tensors": list(torch.from_numpy(array)), "objects": objects(list(array)), "lists": array.tolist(),
        "arrow": lists(array, pa.list_(kind)), "arrow large": lists(array, pa.large_list(kind)),
        "arrow fixed": lists(array, pa.list_(kind, 4)), "arrow tensors": tensors,
        "arrow chunks": pa.chunked_array([lists(array[:1], pa.list_(kind)), lists(array[1:], pa.list_(kind))]),
        "arrow slice": lists([array[0], *array, array[0]], pa.list_(kind)).slice(1, 6),
        "arrow fixed slice": lists([array[0], *array, array[0]], pa.list_(kind, 4)).slice(1, 6),
    }  # fmt: skip


def uneven(rows: list[np.ndarray], kind: pa.DataType) -> dict[str, Any]:
    struct = pa.struct([("data", pa.large_list(kind)), ("shape", pa.list_(pa.int64()))])
    return {
        "list": rows, "objects": objects(rows), "list of tensors": [torch.from_numpy(row) for row in rows],
        "arrow": lists(rows, pa.list_(kind)), "arrow large": lists(rows, pa.large_list(kind)),
        "ray": pa.array([{"data": row.tolist(), "shape": list(row.shape)} for row in rows], struct),
    }  # fmt: skip


RULES = [{}, {"exact": True}, {"span": 2}, {"min_keep": 2}, {"prefix": 2, "exact": True, "scale": True}]


def check(x: Any, batch: dict[str, Any], arguments: dict[str, Any], rows: Any, **told: Any) -> None:
    """The columns `x` of a batch, and their masks, are those of the oracle."""
    drop = make(**{"return_mask": True, **arguments})
    done, masks = oracle.rows(rows, IDS, **{"seed": 7, "epoch": 0, **told})
    for again in (drop, pickle.loads(pickle.dumps(drop))):
        got = again({"id": IDS, "x": x, **batch})
        same(got["x"], done)
        same(plain_masks(got["keep_mask"]), masks)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("form", forms(GUARD, pa.bool_()))
def test_protected(form, rule):
    column = forms(GUARD, pa.bool_())[form]
    for x in (X, torch.from_numpy(X), FIXED["arrow lists"], list(X)):
        check(x, {"g": column}, {"protect": "g", **rule}, X, protect=GUARD, **rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("form", uneven(RAGGED_GUARD, pa.bool_()))
def test_protected_where_rows_are_ragged(form, rule):
    column = uneven(RAGGED_GUARD, pa.bool_())[form]
    for x in UNEVEN.values():
        check(x, {"g": column}, {"protect": "g", **rule}, RAGGED, protect=RAGGED_GUARD, **rule)


@pytest.mark.parametrize("rule", [{}, {"span": 3}, {"exact": True}], ids=str)
def test_positions(rule):
    for column in forms(PLACES, pa.int64()).values():
        for x in (X, torch.from_numpy(X)):
            check(x, {"q": column}, {"positions": "q", **rule}, X, positions=PLACES, **rule)
    for column in uneven(RAGGED_PLACES, pa.int16()).values():
        check(UNEVEN["arrow lists"], {"q": column}, {"positions": "q", **rule}, RAGGED, positions=RAGGED_PLACES, **rule)
    for offset in (0, 1, 2**34 - 4):
        check(X, {}, {"positions": offset, **rule}, X, positions=offset, **rule)
        check(UNEVEN["objects"], {}, {"positions": offset, **rule}, RAGGED, positions=offset, **rule)


P_COLUMNS = [
    P, np.array(P), torch.tensor(P, dtype=torch.float64), pa.array(P), pa.chunked_array([P[:2], P[2:]]), objects(P),
    pd.Series(P),
]  # fmt: skip


@pytest.mark.parametrize("rule", [{}, {"span": 2, "scale": True}, {"min_keep": 1}], ids=str)
@pytest.mark.parametrize("number", range(len(P_COLUMNS)))
def test_each_rows_own_p(number, rule):
    for x in (X, torch.from_numpy(X), FIXED["arrow tensor"]):
        check(x, {"p": P_COLUMNS[number]}, {"p": "p", **rule}, X, p=P, **rule)
    for x in UNEVEN.values():
        check(x, {"p": P_COLUMNS[number]}, {"p": "p", **rule}, RAGGED, p=P, **rule)


@pytest.mark.parametrize("rule", [*RULES, {"scale": True}], ids=str)
def test_a_range_of_p(rule):
    check(X, {}, {"p": (0.2, 0.9), **rule}, X, p=(0.2, 0.9), **rule)
    check(UNEVEN["arrow lists"], {}, {"p": (0.2, 0.9), **rule}, RAGGED, p=(0.2, 0.9), **rule)


def test_all_at_once():
    lengths = np.array([4, 3, 2, 1, 0, 4])
    told = {"protect": GUARD, "positions": PLACES, "p": P, "lengths": lengths, "prefix": 1, "min_keep": 1}
    batch = {"n": lengths, "g": GUARD, "q": PLACES, "p": P}
    arguments = {"protect": "g", "positions": "q", "p": "p", "lengths": "n", "prefix": 1, "min_keep": 1}
    for scale in (False, True):
        check(X, batch, {**arguments, "scale": scale}, X, **told, scale=scale)
    frame = pd.DataFrame({"id": IDS, "x": list(X), "n": lengths, "g": list(GUARD), "q": list(PLACES), "p": P})
    table = pa.table(
        {"id": IDS, "x": FIXED["arrow lists"], "n": lengths, "g": lists(GUARD, pa.list_(pa.bool_())), "p": P,
         "q": lists(PLACES, pa.list_(pa.int64()))}
    )  # fmt: skip
    done, _ = oracle.rows(X, IDS, **{"seed": 7, "epoch": 0, **told})
    for whole in (frame, table):
        same(make(**arguments)(whole)["x"], done)
    same(make(**arguments)(table.slice(2, 3))["x"], done[2:5])


@pytest.mark.parametrize("prefix", [3, 4, 9])
def test_rows_shorter_than_the_prefix_are_left_alone(prefix):
    for options in ({}, {"exact": True}, {"min_keep": 1, "scale": True}):
        check(X, {}, {"prefix": prefix, **options}, X, prefix=prefix, **options)
        for x in UNEVEN.values():
            check(x, {}, {"prefix": prefix, **options}, RAGGED, prefix=prefix, **options)


def test_rows_without_messages():
    rows = [X[0], np.array([]), X[1, :0], X[1]]
    batch = {
        "id": [1, 2, 3, 4],
        "x": rows,
        "g": [GUARD[0], np.array([]), [], GUARD[1]],
        "q": [[1, 2, 3, 4], [], [], PLACES[1]],
    }
    got = make(protect="g", positions="q")(batch)["x"]
    told = {"protect": [GUARD[0], GUARD[1]], "positions": [np.arange(1, 5), PLACES[1]]}
    same([got[0], got[3]], oracle.rows([X[0], X[1]], [1, 4], seed=7, epoch=0, **told)[0])
    assert (len(got[1]), len(got[2])) == (0, 0)


def test_batches_without_rows():
    table = pa.table({"id": IDS, "x": FIXED["arrow lists"], "g": lists(GUARD, pa.list_(pa.bool_())), "p": P})
    assert make("p", protect="g")(table.slice(0, 0)).num_rows == 0
    assert make("p", protect="g")(table.schema.empty_table()).num_rows == 0
    assert make("p", protect="g")({"id": [], "x": [], "g": [], "p": []})["x"] == []


def test_the_columns_stay():
    got = make("p", protect="g", positions="q")({"id": IDS, "x": X, "g": GUARD, "q": PLACES, "p": P})
    assert (got["g"] is GUARD, got["q"] is PLACES, got["p"] is P) == (True, True, True)
    assert list(make("p", passthrough=False)({"id": IDS, "x": X, "p": P})) == ["x"]


BATCH = {"id": IDS, "x": X, "g": GUARD, "q": PLACES, "p": P}
SHORT = [*GUARD[:3], GUARD[3, :3], *GUARD[4:]]
BAD = [
    ({"p": "none"}, {}, ValueError, "no column 'none'"),
    ({"p": "p"}, {"p": [0.5, 2.0, *P[2:]]}, ValueError, r"column 'p' of row 1 \(key 'clip-1'\): p must be a probability, from 0 to 1, but got 2.0"),
    ({"p": "p"}, {"p": np.array([0.5, np.nan, *P[2:]])}, ValueError, r"column 'p' of row 1 .*but got .*nan"),
    ({"p": "p"}, {"p": [0.5, None, *P[2:]]}, TypeError, r"row 1 .*must be a number, a probability of dropping, but got None"),
    ({"p": "p"}, {"p": pa.array([0.5, None, *P[2:]])}, ValueError, "column 'p' has 1 nulls"),
    ({"p": "p"}, {"p": np.array([True] * 6)}, TypeError, r"row 0 .*must be a number.*True"),
    ({"p": "p"}, {"p": pa.array(IDS)}, TypeError, "column 'p' must hold numbers, but has the type string"),
    ({"p": "p"}, {"p": X}, ValueError, r"column 'p' must have one value a row"),
    ({"p": "p"}, {"p": P[:5]}, ValueError, "column 'x': it has 6 rows, but the p column has 5"),
    ({"protect": "g"}, {"g": GUARD[:5]}, ValueError, "it has 6 rows, but the protect column has 5"),
    ({"protect": "g"}, {"g": GUARD.astype(int)}, TypeError, "column 'g' of the rows: protect must be bool.*int64"),
    ({"protect": "g"}, {"g": list(np.zeros((6, 4)))}, TypeError, r"column 'g' of row 0 \(key 'clip-0'\): protect must be bool.*float64; a mask of 0 and -inf"),
    ({"protect": "g"}, {"g": GUARD[:, 0]}, ValueError, r"column 'g' of the rows: protect must be \(rows, messages\), but got shape \(6,\)"),
    ({"protect": "g"}, {"g": [GUARD] * 6}, ValueError, r"row 0 .*protect must be \(messages,\), but got shape \(6, 4\)"),
    ({"protect": "g"}, {"g": SHORT}, ValueError, r"column 'x': column 'g' of row 3 \(key 'clip-3'\): protect must have 4 values, one a message, but has 3"),
    ({"protect": "g"}, {"g": GUARD[:, :3]}, ValueError, r"row 0 \(key 'clip-0'\): protect must have 4 values, one a message, but has 3"),
    ({"protect": "g"}, {"g": [*GUARD[:5], None]}, TypeError, r"row 5 .*protect must be bool.*object"),
    ({"protect": "g"}, {"g": np.ma.array(GUARD, mask=GUARD)}, TypeError, "protect must be a plain array"),
    ({"protect": "g"}, {"g": "text"}, TypeError, "column 'g' must be an array.*str"),
    ({"protect": "g"}, {"g": lists(PLACES, pa.list_(pa.int64()))}, TypeError, "column 'g': it must hold lists of bools.*int64"),
    ({"protect": "g"}, {"g": pa.array([True] * 6)}, TypeError, "column 'g': it must hold lists of bools.*bool"),
    ({"protect": "g"}, {"g": pa.array([[True]] * 5 + [None])}, ValueError, "column 'g': there are 1 nulls among its rows"),
    ({"protect": "g"}, {"g": pa.array([[True]] * 5 + [[None]])}, ValueError, "column 'g': there are nulls among its values"),
    ({"positions": "q"}, {"q": PLACES * 1.0}, TypeError, "column 'q' of the rows: positions must be integers.*float64"),
    ({"positions": "q"}, {"q": GUARD}, TypeError, "column 'q' of the rows: positions must be integers.*bool"),
    ({"positions": "q"}, {"q": PLACES - 9}, ValueError, r"column 'q' of the rows: positions must be from 0 to 2\*\*34 - 1, but got -"),
    ({"positions": "q"}, {"q": [*PLACES[:5], [0, 1, 2, 2**34]]}, ValueError, rf"row 5 .*positions must be from 0 to 2\*\*34 - 1, but got {2**34}"),
    ({"positions": "q"}, {"q": lists(GUARD, pa.list_(pa.bool_()))}, TypeError, "column 'q': it must hold lists of integers"),
    ({"positions": 2**34 - 3}, {}, ValueError, r"column 'x': positions must be from 0 to 2\*\*34 - 1"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "change", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_columns(arguments, change, error, words):
    with pytest.raises(error, match=words):
        make(**arguments)({**BATCH, **change})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"protect": 5}, TypeError, "protect must be the name of a column, but got 5"),
        ({"positions": 1.5}, TypeError, "positions must be an integer.*1.5"),
        ({"positions": True}, TypeError, "positions must be an integer.*True"),
        ({"positions": -1}, ValueError, "positions must be from 0.*-1"),
        ({"positions": [1, 2]}, TypeError, r"positions must be an integer, or say where each row's own are, but got \[1, 2\]"),
        ({"p": "p", "exact": True}, ValueError, "exact needs p to be a single number or range.*each row has its own"),
        ({"p": "x"}, ValueError, "must name different columns"),
        ({"protect": "g", "positions": "g"}, ValueError, "must name different columns"),
        ({"p": (0.5, 0.1)}, ValueError, "lo <= hi"),
        ({"p": (0.5, 0.6, 0.7)}, TypeError, "range"),
    ],
)  # fmt: skip
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        make(**options)
