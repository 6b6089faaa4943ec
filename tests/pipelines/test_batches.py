"""MessageDropoutBatch: columns of every kind against naive.py."""

from __future__ import annotations

import pickle
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from helpers import oracle
from helpers.columns import FIXED, FLOATS, IDS, RAGGED, UNEVEN, X, array_of, make, objects, plain, plain_masks, same

from msgdrop_numba import KeyedDataset, MessageDropoutCollate, message_dropout

RULES = [{}, {"exact": True}, {"span": 2}, {"min_keep": 2}]


def expected(rows, ids, **options):
    """(rows, masks) of the first epoch, with the seed of `make`."""
    return oracle.rows(rows, ids, **{"seed": 7, "epoch": 0, **options})


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("column", FIXED.values(), ids=FIXED)
def test_columns(column, rule):
    done, masks = expected(X, IDS, **rule)
    got = make(return_mask=True, **rule)({"id": IDS, "x": column, "other": 5})
    same(got["x"], done)
    same(plain_masks(got["keep_mask"]), masks)
    assert got["other"] == 5
    assert type(got["x"]) is (list if isinstance(column, np.ndarray) and column.dtype == object else type(column))


@pytest.mark.parametrize("column", UNEVEN.values(), ids=UNEVEN)
def test_ragged_columns(column):
    done, masks = expected(RAGGED, IDS, exact=True)
    got = make(return_mask=True, exact=True)({"id": IDS, "x": column})
    same(got["x"], done)
    same(plain_masks(got["keep_mask"]), masks)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": True},
        {"scale": True, "exact": True},
        {"fill": 2.5},
        {"fill": np.array([1.0, -2.0, 3.0], np.float32)},
        {"p": np.array([0.9, 0.1, 0.5, 0.4])},
        {"p": np.array([0.9, 0.1, 0.5, 0.4]), "scale": True},
        {"epoch": 3},
        {"epoch": -1, "seed": 2**64 - 1},
        {"p": 0.0},
        {"p": 1.0, "fill": -1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", [FIXED, UNEVEN], ids=["fixed", "ragged"])
def test_options(options, columns):
    rows = X if columns is FIXED else RAGGED
    done, _ = expected(rows, IDS, **options)
    for column in columns.values():
        same(make(**options)({"id": IDS, "x": column})["x"], done)


def test_lengths_are_a_column():
    lengths = np.array([4, 3, 2, 1, 0, 4])
    done, masks = expected(X, IDS, lengths=lengths, exact=True, scale=True)
    for kind in (lengths, lengths.tolist(), pa.array(lengths), torch.from_numpy(lengths)):
        for column in FIXED.values():
            drop = make(lengths="n", exact=True, scale=True, return_mask=True)
            got = drop({"id": IDS, "n": kind, "x": column})
            same(got["x"], done)
            same(plain_masks(got["keep_mask"]), masks)


ID_COLUMNS = {
    "integers": [5, -1, 2**63 - 1, 0, 5, 7],
    "strings": IDS,
}


@pytest.mark.parametrize(
    ("ids", "make_column"),
    [
        (ids, f)
        for ids in ID_COLUMNS.values()
        for f in (list, np.array, objects, pa.array, lambda v: pa.chunked_array([v[:2], v[2:]]), pd.Series)
    ],
)
def test_ids(ids, make_column):
    same(make()({"id": make_column(ids), "x": X})["x"], expected(X, ids)[0])


def test_other_ids():
    unsigned = np.array([2**64 - 1, 2**63, 1, 2, 3, 4], np.uint64)
    same(make()({"id": unsigned, "x": X})["x"], expected(X, unsigned.tolist())[0])
    same(make()({"id": torch.arange(6), "x": X})["x"], expected(X, list(range(6)))[0])
    uuids = [uuid.UUID(int=i) for i in range(6)]
    same(make()({"id": uuids, "x": X})["x"], expected(X, [u.bytes for u in uuids])[0])
    encoded = pa.array(IDS).dictionary_encode()
    same(make()({"id": encoded, "x": X})["x"], expected(X, IDS)[0])
    assert len({mask.tobytes() for mask in expected(X, ID_COLUMNS["integers"])[1]}) > 2


def test_the_masks_are_those_of_the_collate():
    collate = MessageDropoutCollate(0.5, seed=7)
    collate.set_epoch(2)
    dataset = KeyedDataset(
        list(torch.from_numpy(X)), key=lambda row: IDS[int((torch.from_numpy(X) == row).all((1, 2)).nonzero())]
    )
    batch = collate([dataset[i] for i in range(6)])
    same(make(epoch=2)({"id": IDS, "x": X})["x"], batch.numpy())


def test_any_partition_gives_the_same_bytes():
    drop, order = make(0.5, min_keep=1), np.random.default_rng(1).permutation(6)
    whole = drop({"id": np.array(IDS), "x": X})["x"]
    for parts in (1, 2, 3, 6):
        for part in np.array_split(order, parts):
            same(drop({"id": np.array(IDS)[part], "x": X[part]})["x"], whole[part])


def test_columns_share_a_mask():
    done = make(columns=["x", "y"], return_mask=True)({"id": IDS, "x": X, "y": np.ones((6, 4, 2, 2))})
    assert np.array_equal(done["keep_mask"], (done["y"] == 1).all((2, 3)))
    assert np.array_equal(done["keep_mask"], (done["x"] == X).all(2))
    with pytest.raises(ValueError, match=r"'x' and 'y' must have as many messages in each row"):
        make(columns=["x", "y"])({"id": IDS, "x": X, "y": np.ones((6, 5, 2))})


def test_only_its_columns():
    assert list(make(passthrough=False)({"id": IDS, "x": X, "y": X})) == ["x"]
    assert list(make(passthrough=False, return_mask=True)({"id": IDS, "x": X})) == ["x", "keep_mask"]
    table = pa.table({"id": IDS, "x": FIXED["arrow lists"]})
    assert make(passthrough=False, return_mask=True)(table).column_names == ["x", "keep_mask"]
    assert list(make(passthrough=False)(pd.DataFrame({"id": IDS, "x": RAGGED})).columns) == ["x"]


@pytest.mark.parametrize("name", [name for name in FIXED if name.startswith("arrow")])
def test_tables_keep_their_schema_and_take_slices(name):
    column = FIXED[name]
    field = pa.field("x", column.type, metadata={"unit": "dB"})
    table = pa.Table.from_arrays(
        [pa.array(IDS), column], schema=pa.schema([pa.field("id", pa.string()), field], {"of": "me"})
    )
    done, _ = expected(X, IDS)
    for first, count in ((0, 6), (2, 3), (5, 1), (6, 0)):
        got = make()(table.slice(first, count))
        assert got.schema.equals(table.schema, check_metadata=True)
        got.validate(full=True)
        same(got.column("x"), done[first : first + count])
    same(table.column("x"), X)


MANY = np.arange(1, 4801, dtype=np.float32).reshape(400, 4, 3)
LARGE = {
    "tensors": pa.FixedShapeTensorArray.from_numpy_ndarray(MANY),
    "lists": array_of(MANY, pa.list_(pa.list_(FLOATS))),
    "fixed lists": array_of(MANY, pa.large_list(pa.list_(FLOATS, 3))),
    "fixed lists of lists": array_of(MANY, pa.list_(pa.list_(FLOATS), 4)),
    "fixed lists of fixed lists": array_of(MANY, pa.list_(pa.list_(FLOATS, 3), 4)),
}


@pytest.mark.parametrize("column", LARGE.values(), ids=LARGE)
def test_slices_of_large_tables(column):
    """Which are copied first; pyarrow's take() of a slice of fixed-size lists reads elsewhere."""
    whole = make()({"id": np.arange(400), "x": MANY})["x"]
    table = pa.table({"id": np.arange(400), "x": column})
    for first, count in ((0, 100), (100, 100), (399, 1), (250, 150), (1, 399)):
        got = make()(table.slice(first, count))["x"]
        same(got, whole[first : first + count])
        assert got.nbytes <= got.combine_chunks().get_total_buffer_size() < 1.1 * got.nbytes + 100


def test_nulls_outside_a_slice_are_none_of_its_business():
    table = pa.table({"id": [0, 1, 2], "x": pa.array([[[None, 1.0]], [[2.0, 3.0]], [[4.0, None]]])})
    assert len(make()(table.slice(1, 1))["x"]) == 1
    for first in (0, 2):
        with pytest.raises(ValueError, match="nulls among its numbers"):
            make()(table.slice(first, 1))


def test_lists_without_messages_among_arrays():
    """As Ray and Hugging Face hand out an empty list: it doesn't say how many features there would be."""
    rows = [X[0], np.array([], object), np.array([]), X[1]]
    got = make(return_mask=True)({"id": [1, 2, 3, 4], "x": objects(rows)})
    assert (got["x"][1] is rows[1], got["x"][2] is rows[2]) == (True, True)
    same([got["x"][0], got["x"][3]], expected([X[0], X[1]], [1, 4])[0])
    assert [len(mask) for mask in got["keep_mask"]] == [4, 0, 0, 4]


def test_names_that_occur_twice():
    table = pa.Table.from_arrays([pa.array(IDS), pa.array(range(6)), FIXED["arrow lists"]], ["id", "id", "x"])
    with pytest.raises(ValueError, match="2 columns 'id'"):
        make()(table)
    with pytest.raises(ValueError, match="2 columns 'x'"):
        make()(pd.DataFrame([["a", 1, 2]], columns=["id", "x", "x"]))


@pytest.mark.parametrize("name", ["ray.data.arrow_tensor", "ray.data.arrow_tensor_v2"])
def test_rays_tensors_where_ray_is_not_there(name):
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": "[4, 3]"}
    lists = pa.array([row.ravel().tolist() for row in X], pa.large_list(FLOATS))
    table = pa.Table.from_arrays(
        [pa.array(IDS), lists], schema=pa.schema([("id", pa.string()), pa.field("x", lists.type, metadata=metadata)])
    )
    got = make()(table)
    assert got.schema.equals(table.schema, check_metadata=True)
    same([np.array(row, np.float32).reshape(4, 3) for row in got.column("x").to_pylist()], expected(X, IDS)[0])


def test_rays_ragged_tensors():
    kind = pa.struct([("data", pa.large_list(FLOATS)), ("shape", pa.list_(pa.int64()))])
    rows = [{"data": row.ravel().tolist(), "shape": list(row.shape)} for row in RAGGED]
    got = make()(pa.table({"id": IDS, "x": pa.array(rows, kind)}).slice(1))["x"].to_pylist()
    assert [row["shape"] for row in got] == [row["shape"] for row in rows[1:]]
    same([np.array(r["data"], np.float32).reshape(r["shape"]) for r in got], expected(RAGGED, IDS)[0][1:])


def test_data_frames():
    frame = pd.DataFrame({"id": IDS, "x": RAGGED, "z": range(6)}, index=range(10, 16))
    got = make(return_mask=True)(frame)
    same(got["x"], expected(RAGGED, IDS)[0])
    same(got["keep_mask"], expected(RAGGED, IDS)[1])
    assert list(got.columns) == ["id", "x", "z", "keep_mask"]
    assert got.index.equals(frame.index)
    same(frame["x"], RAGGED)


def test_empty_batches():
    assert make()({"id": np.array([], str), "x": np.empty((0, 4, 3))})["x"].shape == (0, 4, 3)
    assert make()({"id": [], "x": []})["x"] == []
    empty = pa.table({"id": IDS, "x": FIXED["arrow lists"]}).slice(0, 0)
    assert make(return_mask=True)(empty).num_rows == 0
    assert make(return_mask=True)(empty.schema.empty_table()).num_rows == 0


def test_no_message_in_a_row():
    rows = [X[0], X[1, :0]]
    same(make()({"id": [1, 2], "x": rows})["x"], expected(rows, [1, 2])[0])
    column = pa.array([X[0].tolist(), []], pa.list_(pa.list_(FLOATS)))
    assert make()({"id": [1, 2], "x": column})["x"].to_pylist()[1] == []


def test_the_input_is_never_written():
    for column in (*FIXED.values(), *UNEVEN.values()):
        before = [row.tobytes() for row in plain(column) if not isinstance(row, np.ndarray) or row.dtype != object]
        make(1.0)({"id": IDS, "x": column})
        assert [
            row.tobytes() for row in plain(column) if not isinstance(row, np.ndarray) or row.dtype != object
        ] == before


def test_nan_does_not_leak():
    dirty = np.full_like(X, np.nan)
    assert not np.isnan(make(1.0)({"id": IDS, "x": dirty})["x"]).any()


def test_it_is_small_and_picklable():
    drop = make(np.array([0.5, 0.1, 0.9, 0.3]), min_keep=1, fill=np.zeros(3, np.float32), return_mask=True)
    data = pickle.dumps(drop)
    assert len(data) < 1000
    same(pickle.loads(data)({"id": IDS, "x": X})["x"], drop({"id": IDS, "x": X})["x"])


def test_dask_arrays():
    da = pytest.importorskip("dask.array")
    x, ids = np.ones((12, 8, 3), np.float32), np.arange(100, 112)
    keys = da.from_array(ids, chunks=5)
    blocks = da.from_array(x, chunks=(5, -1, -1))
    done = da.blockwise(
        lambda x, keys: message_dropout(x, 0.5, seed=1, keys=keys), "bsf", blocks, "bsf", keys, "b", dtype=x.dtype
    )
    same(done.compute(scheduler="threads"), message_dropout(x, 0.5, seed=1, keys=ids))


def test_dask_asks_what_comes_of_nothing():
    """Its call on empty arrays, whose failure it hides."""
    nothing = message_dropout(np.empty((0, 0, 0), np.float32), 0.5, seed=1, keys=np.empty(0, np.int64))
    assert (nothing.shape, nothing.dtype) == ((0, 0, 0), np.float32)
