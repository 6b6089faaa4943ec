"""The batch that removes messages from columns of every kind, and their companions, against naive.py."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from helpers import oracle
from helpers.columns import FIXED, FLOATS, IDS, RAGGED, UNEVEN, X, array_of, make, objects

rng = np.random.default_rng(7)
SIZES = [len(row) for row in RAGGED]
GUARD = rng.random((6, 4)) < 0.3
PLACES = rng.integers(0, 9, (6, 4))
LABELS = np.arange(24, dtype=np.int32).reshape(6, 4)
P = [0.0, 1.0, 0.5, 0.9, 0.25, 0.7]
RULES = [{}, {"exact": True}, {"span": 2}, {"min_keep": 2}, {"prefix": 2, "exact": True, "scale": True}, {"p": 0.0},
         {"p": 1.0}, {"p": (0.2, 0.9), "scale": True}]  # fmt: skip


def cut(array: Any) -> list[Any]:
    return [array[i][:n] for i, n in enumerate(SIZES)]


def expected(rows: Any, **told: Any) -> tuple[list[Any], list[Any]]:
    """What is kept of each row, and which messages that is."""
    lengths = told.get("lengths")
    done, masks = oracle.rows([np.asarray(row) for row in rows], IDS, **{"p": 0.5, "seed": 7, "epoch": 0, **told})
    valid = [np.arange(len(m)) < (len(m) if lengths is None else lengths[i]) for i, m in enumerate(masks)]
    return [y[m & v] for y, m, v in zip(done, masks, valid, strict=True)], masks


def rows_of(column: Any, dtype: Any) -> list[bytes]:
    """The bytes of each row."""
    if isinstance(column, (pa.Array, pa.ChunkedArray)):
        column = column.to_pylist()
    return [np.asarray(row.numpy() if isinstance(row, torch.Tensor) else row, dtype).tobytes() for row in column]


def check(column: Any, rows: list[Any]) -> None:
    assert rows_of(column, rows[0].dtype) == [np.ascontiguousarray(row).tobytes() for row in rows]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("kind", "x"), [*FIXED.items(), *(("uneven " + name, x) for name, x in UNEVEN.items())])
def test_columns_of_every_kind(kind, x, rule):
    rows = RAGGED if kind.startswith("uneven") else X
    kept, masks = expected(rows, **rule)
    drop = make(**rule, remove=True, return_mask=True, return_indices=True)
    for again in (drop, pickle.loads(pickle.dumps(drop))):
        got = again({"id": IDS, "x": x})
        assert list(got) == ["id", "x", "keep_mask", "indices"]
        check(got["x"], kept)
        check(got["keep_mask"], masks)
        check(got["indices"], [np.flatnonzero(mask) for mask in masks])
    even = bool(rule.get("exact"))
    if isinstance(x, np.ndarray) and x.dtype != object:
        assert isinstance(got["x"], np.ndarray if even else list)
        assert isinstance(got["indices"], np.ndarray if even else list)
        assert not even or got["x"].shape == (6, len(kept[0]), 3)
    if isinstance(x, torch.Tensor):
        assert isinstance(got["x"] if even else got["x"][0], torch.Tensor)
    np.testing.assert_array_equal(X, FIXED["transposed"])  # no input was written


LIST = pa.list_(pa.list_(FLOATS))
TYPES = [
    (pa.FixedShapeTensorArray.from_numpy_ndarray(X), pa.list_(pa.list_(FLOATS, 3))),
    (pa.FixedShapeTensorArray.from_numpy_ndarray(X.reshape(6, 4, 3, 1)), pa.list_(pa.list_(pa.list_(FLOATS, 1), 3))),
    (array_of(X, LIST), LIST),
    (array_of(X, pa.large_list(LIST.value_type)), pa.large_list(LIST.value_type)),
    (array_of(X, pa.list_(pa.list_(FLOATS), 4)), pa.list_(pa.list_(FLOATS))),
    (array_of(X, pa.list_(pa.list_(FLOATS, 3), 4)), pa.list_(pa.list_(FLOATS, 3))),
    (pa.chunked_array([array_of(X, LIST).slice(0, 2), array_of(X, LIST).slice(2)]), LIST),
    (array_of([X[0], *X, X[0]], pa.list_(pa.list_(FLOATS, 3), 4)).slice(1, 6), pa.list_(pa.list_(FLOATS, 3))),
]


@pytest.mark.parametrize(("x", "kind"), TYPES, ids=range(len(TYPES)))
def test_arrow_types(x, kind):
    """They don't depend on the rows: an empty batch has the same."""
    for rule in ({}, {"exact": True}):
        table = pa.table({"id": IDS, "x": x, "y": LABELS.tolist()}, metadata={"a": "b"})
        drop = make(remove=True, companions="y", **rule)
        got = drop(table)
        got.validate(full=True)
        kept, masks = expected(X, **rule)
        check(got["x"], kept)
        check(got["y"], [row[mask].astype(np.int64) for row, mask in zip(LABELS, masks, strict=True)])
        assert got.schema.field("x").type == kind
        assert got.schema.metadata == {b"a": b"b"}
        none = pa.table({"id": pa.array([], pa.string()), "x": x.slice(0, 0), "y": pa.array([], pa.list_(pa.int64()))})
        assert drop(none).schema.equals(got.schema)


def test_rays_tensors():
    """Ragged ones keep their type, even where Ray isn't there to know it; those of one shape become lists."""
    struct = pa.struct([("data", pa.large_list(FLOATS)), ("shape", pa.list_(pa.int64()))])
    ragged = pa.array([{"data": row.ravel().tolist(), "shape": list(row.shape)} for row in RAGGED], struct)
    got = make(remove=True)(pa.table({"id": IDS, "x": ragged}))["x"]
    assert got.type == struct
    kept, masks = expected(RAGGED)
    check(pa.array([row["data"] for row in got.to_pylist()]), [row.ravel() for row in kept])
    assert [row["shape"] for row in got.to_pylist()] == [list(row.shape) for row in kept]
    told = {"ARROW:extension:name": "ray.data.arrow_tensor_v2", "ARROW:extension:metadata": "[4, 3]"}
    field = pa.field("x", pa.list_(FLOATS), metadata=told)
    schema = pa.schema([("id", pa.string()), field])
    table = pa.Table.from_arrays([pa.array(IDS), array_of(X.reshape(6, 12), pa.list_(FLOATS))], schema=schema)
    got = make(remove=True)(table)
    check(got["x"], expected(X)[0])
    assert got.schema.field("x").equals(pa.field("x", pa.list_(pa.list_(FLOATS, 3))), check_metadata=True)
    assert [len(mask) for mask in masks] == SIZES


def test_arrays_of_hugging_face_become_lists():
    datasets = pytest.importorskip("datasets")
    x = pa.ExtensionArray.from_storage(
        datasets.features.features.Array2DExtensionType((4, 3), "float32"), array_of(X, LIST)
    )
    got = make(remove=True)(pa.table({"id": IDS, "x": x}))["x"]
    assert got.type == LIST
    check(got, expected(X)[0])


WORDS = np.array([[f"{i}-{j}" for j in range(4)] for i in range(6)])


def companions() -> dict[str, tuple[Any, Any]]:
    """Columns, and their values as arrays."""
    wide = rng.random((6, 4, 2, 2))
    return {
        "array": (LABELS, LABELS), "wide": (wide, wide), "words": (WORDS, WORDS), "bools": (GUARD, GUARD),
        "tensor": (torch.from_numpy(LABELS), LABELS), "list": (list(wide), wide), "objects": (objects(list(wide)), wide),
        "lists": (LABELS.tolist(), LABELS.astype(np.int64)), "arrow": (pa.array(LABELS.tolist(), pa.list_(pa.int32())), LABELS),
        "arrow words": (pa.array(WORDS.tolist(), pa.large_list(pa.string())), WORDS),
        "arrow fixed": (pa.array(LABELS.tolist(), pa.list_(pa.int32(), 4)), LABELS),
        "arrow slice": (pa.array([[0] * 4, *LABELS.tolist()], pa.list_(pa.int32(), 4)).slice(1), LABELS),
        "arrow chunks": (pa.chunked_array([LABELS[:4].tolist(), LABELS[4:].tolist()], pa.list_(pa.int32())), LABELS),
        "arrow wide": (pa.array(wide[..., 0].tolist(), pa.list_(pa.list_(pa.float64()))), wide[..., 0]),
        "arrow flat tensor": (
            pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.int32(), (4,)),
                                           pa.array(LABELS.tolist(), pa.list_(pa.int32(), 4))), LABELS),
    }  # fmt: skip


@pytest.mark.parametrize("name", companions())
def test_companions(name):
    column, values = companions()[name]
    for rule in ({}, {"exact": True}, {"p": 1.0}):
        for x in (X, FIXED["list"], FIXED["arrow lists"], torch.from_numpy(X)):
            got = make(**rule, remove=True, companions=["y"])({"id": IDS, "x": x, "y": column})
            kept, masks = expected(X, **rule)
            check(got["x"], kept)
            check(got["y"], [row[mask] for row, mask in zip(values, masks, strict=True)])
            one = isinstance(column, (np.ndarray, torch.Tensor)) and column.dtype != object
            assert not one or isinstance(got["y"], type(column) if rule.get("exact") else list)


def test_ragged_companions():
    told = {"list": cut(LABELS), "lists": [row.tolist() for row in cut(LABELS)], "tensors": cut(torch.from_numpy(LABELS)),
            "arrow": pa.array([row.tolist() for row in cut(LABELS)], pa.list_(pa.int32()))}  # fmt: skip
    _, masks = expected(RAGGED)
    for x in UNEVEN.values():
        got = make(remove=True, companions=list(told))({"id": IDS, "x": x, **told})
        for name in told:
            dtype = np.int64 if name == "lists" else np.int32
            check(got[name], [row[mask].astype(dtype) for row, mask in zip(cut(LABELS), masks, strict=True)])


@pytest.mark.parametrize("rule", [{}, {"span": 2, "min_keep": 1}, {"prefix": 1, "scale": True}], ids=str)
def test_what_rows_bring(rule):
    """Columns of protect and positions are companions, named so or not."""
    told = {"protect": GUARD, "positions": PLACES, "p": P, **rule}
    kept, masks = expected(X, **told)
    arguments = {"protect": "g", "positions": "q", "p": "p", "remove": True, **rule}
    for companions in (None, "g"):
        got = make(**arguments, companions=companions)({"id": IDS, "x": X, "g": GUARD, "q": PLACES.tolist(), "p": P})
        check(got["x"], kept)
        check(got["g"], [row[mask] for row, mask in zip(GUARD, masks, strict=True)])
        check(got["q"], [row[mask] for row, mask in zip(PLACES, masks, strict=True)])
        assert got["p"] is P
        few = make(**arguments, companions=companions, passthrough=False)(
            {"id": IDS, "x": X, "g": GUARD, "q": PLACES, "p": P}
        )
        assert list(few) == ["x"] if companions is None else ["x", "g"]


LENGTHS = [4, 3, 2, 1, 0, 4]


@pytest.mark.parametrize("rule", [{}, {"exact": True}, {"p": 0.0}], ids=str)
def test_lengths_come_back_as_what_is_kept(rule):
    kept, masks = expected(X, lengths=np.array(LENGTHS), **rule)
    counts = [len(row) for row in kept]
    for n in (LENGTHS, np.array(LENGTHS, np.int32), torch.tensor(LENGTHS), pa.array(LENGTHS, pa.int16())):
        for x in (X, torch.from_numpy(X), FIXED["arrow lists"], FIXED["list"]):
            batch = {"id": IDS, "x": x, "n": n, "y": LABELS}
            got = make(**rule, remove=True, lengths="n", return_mask=True, companions="y")(batch)
            check(got["x"], kept)
            check(got["keep_mask"], masks)
            assert [int(count) for count in (got["n"].to_pylist() if isinstance(n, pa.Array) else got["n"])] == counts
            assert type(got["n"]) is type(n)
            assert getattr(got["n"], "dtype", None) == getattr(n, "dtype", None)
            check(
                got["y"], [row[:count][mask[:count]] for row, count, mask in zip(LABELS, LENGTHS, masks, strict=True)]
            )
    frame = pd.DataFrame({"id": IDS, "x": list(X), "n": LENGTHS, "y": list(LABELS)})
    got = make(**rule, remove=True, lengths="n", companions="y", return_indices=True)(frame)
    check(got["x"], kept)
    assert got["n"].tolist() == counts
    assert [len(row) for row in got["indices"]] == counts


def test_columns_that_share_a_mask_and_dtypes():
    whole = (X * 9).astype(np.int16)
    batch = {"id": IDS, "x": X, "z": FIXED["list"], "w": whole, "v": X.astype(">f8")}
    got = make(columns=["x", "z", "w", "v"], remove=True)(batch)
    kept, masks = expected(X)
    check(got["x"], kept)
    check(got["z"], kept)
    for name in ("w", "v"):
        check(got[name], [row[mask] for row, mask in zip(batch[name], masks, strict=True)])


BAD = [
    ({"companions": "y", "remove": False}, ValueError, "companions='y' needs remove=True"),
    ({"return_indices": True, "remove": False}, ValueError, "return_indices=True needs remove=True"),
    ({"remove": "yes"}, TypeError, "remove must be True or False, but got 'yes'"),
    ({"fill": 2}, ValueError, "fill can't be used with remove=True, .* but got 2"),
    ({"fill": np.ones(3, np.float32)}, ValueError, "fill can't be used with remove=True"),
    ({"companions": 3}, TypeError, "companions must be a name or a list of names, but got 3"),
    ({"companions": ["x"]}, ValueError, "positions, companions must name different columns"),
    ({"companions": ["id"]}, ValueError, "positions, companions must name different columns"),
    ({"companions": ["p"], "p": "p"}, ValueError, "positions, companions must name different columns"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "said"), BAD, ids=range(len(BAD)))
def test_bad_options(options, error, said):
    with pytest.raises(error, match=said):
        make(**{"remove": True, **options})


BAD_COLUMNS = [
    (LABELS[:, :3], ValueError, r"column 'y': row 0 \(key 'clip-0'\) must have 4 values, one for each message, but has 3"),
    ([*LABELS[:2], LABELS[2][:1], *LABELS[3:]], ValueError, r"column 'y': row 2 \(key 'clip-2'\) must have 4 .* has 1"),
    (pa.array([[1]] * 6), ValueError, r"column 'y': row 0 \(key 'clip-0'\) must have 4 values, .* but has 1"),
    (LABELS[:5], ValueError, "column 'y': it has 5 rows, but the columns have 6"),
    (np.arange(6), ValueError, r"column 'y': it must be \(rows, messages, \*features\), but has the shape \(6,\)"),
    ([1] * 6, ValueError, r"column 'y': its rows must be \(messages, \*features\), but one is 1"),
    (pa.array([[1] * 4] * 5 + [None]), ValueError, "column 'y': there are 1 nulls"),
    (pa.array(IDS), TypeError, "column 'y': it must hold tensors or lists of lists"),
    (pa.array([[["a"]] * 4] * 6), TypeError, "column 'y': its messages must hold integers or floating-point numbers"),
    ("text", TypeError, "column 'y': it must be an array, a tensor, a list"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "error", "said"), BAD_COLUMNS, ids=range(len(BAD_COLUMNS)))
def test_bad_companions(column, error, said):
    with pytest.raises(error, match=said):
        make(remove=True, companions="y")({"id": IDS, "x": X, "y": column})


def test_more_bad_batches():
    with pytest.raises(ValueError, match="no column 'y': it has 'id', 'x'"):
        make(remove=True, companions="y")({"id": IDS, "x": X})
    with pytest.raises(ValueError, match="'indices' already: rename it, or leave return_indices out"):
        make(remove=True, return_indices=True)({"id": IDS, "x": X, "indices": 1})
