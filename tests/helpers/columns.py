"""Columns of batches, of every kind that holds the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from msgdrop_numba import MessageDropoutBatch

IDS = [f"clip-{i}" for i in range(6)]
X = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
RAGGED = [X[i, : 1 + i % 4] for i in range(6)]


def make(p: Any = 0.5, *, columns: Any = "x", key: Any = "id", seed: Any = 7, **options: Any) -> MessageDropoutBatch:
    return MessageDropoutBatch(p, columns=columns, key=key, seed=seed, **options)


def objects(rows: Any) -> np.ndarray:
    """An object array of rows."""
    array = np.empty(len(rows), object)
    array[:] = rows
    return array


def nested(row: Any) -> np.ndarray:
    """A row as Ray gives lists of lists: an object array of arrays."""
    return objects(list(row))


def plain(column: Any) -> list[np.ndarray]:
    """Any column as a list of NumPy arrays."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.FixedShapeTensorArray):
        return list(column.to_numpy_ndarray())
    if isinstance(column, pa.Array):
        return [np.array(row, np.float32).reshape(len(row), -1) for row in column.to_pylist()]
    return [row.numpy() if isinstance(row, torch.Tensor) else np.asarray(row) for row in column]


def same(rows: Any, others: Any) -> None:
    """Bit for bit."""
    rows, others = plain(rows), plain(others)
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.dtype == other.dtype
        assert row.tobytes() == other.tobytes()


def array_of(rows: Any, kind: Any) -> pa.Array:
    return pa.array([row.tolist() for row in rows], kind)


FLOATS = pa.float32()
FIXED = {
    "array": X,
    "read-only": np.frombuffer(X.tobytes(), np.float32).reshape(X.shape),
    "transposed": np.asfortranarray(X),
    "tensor": torch.from_numpy(X),
    "list": list(X),
    "list of tensors": list(torch.from_numpy(X)),
    "objects": objects(list(X)),
    "objects of objects": objects([nested(row) for row in X]),
    "arrow tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(X),
    "arrow lists": array_of(X, pa.list_(pa.list_(FLOATS))),
    "arrow large lists": array_of(X, pa.large_list(pa.large_list(FLOATS))),
    "arrow fixed lists": array_of(X, pa.list_(pa.list_(FLOATS, 3))),
    "arrow fixed lists of lists": array_of(X, pa.list_(pa.list_(FLOATS), 4)),
    "arrow fixed lists of fixed lists": array_of(X, pa.list_(pa.list_(FLOATS, 3), 4)),
    "arrow chunks": pa.chunked_array([array_of(X[:1], pa.list_(pa.list_(FLOATS))), array_of(X[1:], pa.list_(pa.list_(FLOATS)))]),
}  # fmt: skip
UNEVEN = {
    "list": RAGGED,
    "objects": objects(RAGGED),
    "list of tensors": [torch.from_numpy(row) for row in RAGGED],
    "objects of objects": objects([nested(row) for row in RAGGED]),
    "arrow lists": array_of(RAGGED, pa.list_(pa.list_(FLOATS))),
    "arrow large lists of fixed ones": array_of(RAGGED, pa.large_list(pa.list_(FLOATS, 3))),
}


def plain_masks(column: Any) -> list[np.ndarray]:
    if isinstance(column, (pa.Array, pa.ChunkedArray)):
        column = column.to_pylist()
    return [np.array(row.tolist() if isinstance(row, torch.Tensor) else row, bool) for row in column]
