"""What MessageDropoutBatch refuses: bad batches, bad options."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers.columns import FLOATS, IDS, X, make, objects

BATCH = {"id": IDS, "x": X}
BAD_CALLS = [
    ({"x": X}, ValueError, "no column 'id': it has 'x'"),
    ({"id": IDS}, ValueError, "no column 'x'"),
    ({**BATCH, "id": np.arange(6.0)}, TypeError, "column 'id': sample ids must be integers or strings, but got float64"),
    ({**BATCH, "id": [1.0] * 6}, TypeError, r"column 'id': .*1\.0.*null"),
    ({**BATCH, "id": [True] * 6}, TypeError, "column 'id': .*True"),
    ({**BATCH, "id": np.array([True] * 6)}, TypeError, "column 'id': .*bool"),
    ({**BATCH, "id": [*IDS[:5], None]}, TypeError, "column 'id': .*None.*null"),
    ({**BATCH, "id": pa.array([*IDS[:5], None])}, ValueError, "column 'id' has 1 nulls"),
    ({**BATCH, "id": pa.array([1, 2, 3, 4, 5, None])}, ValueError, "column 'id' has 1 nulls"),
    ({**BATCH, "id": pd.array([1, 2, 3, 4, 5, None], "Int64")}, TypeError, "column 'id': .*null"),
    ({**BATCH, "id": np.arange(6).astype("M8[s]")}, TypeError, "column 'id': .*datetime64"),
    ({**BATCH, "id": np.ma.array(range(6), mask=[1] * 6)}, TypeError, "column 'id' .*masked"),
    ({**BATCH, "id": np.zeros((6, 2), int)}, ValueError, r"column 'id' .*\(6, 2\)"),
    ({**BATCH, "id": IDS[:5]}, ValueError, "column 'x': it has 6 rows, but the key column has 5"),
    ({**BATCH, "id": [2**64] * 6}, ValueError, "column 'id': .*18446744073709551616"),
    ({**BATCH, "x": X[..., 0]}, ValueError, r"column 'x': .*\(6, 4\)"),
    ({**BATCH, "x": X.tolist()}, TypeError, r"column 'x': .*list.*with_format"),
    ({**BATCH, "x": objects(X.tolist())}, TypeError, r"column 'x': .*list.*with_format"),
    ({**BATCH, "x": objects(IDS)}, TypeError, "column 'x': .*str"),
    ({**BATCH, "x": list(X[:, 0])}, ValueError, r"column 'x': .*\(3,\)"),
    ({**BATCH, "x": "text"}, TypeError, "column 'x': .*str"),
    ({**BATCH, "x": np.array([[["a"]]] * 6)}, TypeError, "column 'x': x must be an array of numbers"),
    ({**BATCH, "x": pa.array(IDS)}, TypeError, "column 'x': .*string"),
    ({**BATCH, "x": pa.array([[1.0]] * 6)}, TypeError, "column 'x': .*list of one"),
    ({**BATCH, "x": pa.array([[[1.0]]] * 5 + [None])}, ValueError, "column 'x': there are 1 nulls"),
    ({**BATCH, "x": pa.array([[[1.0]]] * 5 + [[None]])}, ValueError, "column 'x': there are nulls among its messages"),
    ({**BATCH, "x": pa.array([[[1.0]]] * 5 + [[[None]]])}, ValueError, "column 'x': there are nulls among its numbers"),
    ({**BATCH, "x": pa.array([[[1.0]]] * 5 + [[[1.0, 2.0]]])}, ValueError, r"column 'x': .*\[1, 2\]"),
    ({**BATCH, "x": pa.array([[["a"]]] * 6)}, TypeError, "column 'x': .*string"),
    ({**BATCH, "x": pa.array([[[True]]] * 6)}, TypeError, "column 'x': .*bool"),
    ([1, 2], TypeError, "the batch must be a dict of columns"),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "error", "words"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_batches(batch, error, words):
    with pytest.raises(error, match=words):
        make()(batch)


def test_more_bad_batches():
    with pytest.raises(ValueError, match="'keep_mask' already"):
        make(return_mask=True)({**BATCH, "keep_mask": 1})
    with pytest.raises(ValueError, match=r"column 'x': lengths must be from 0 to 4, .* but got 5"):
        make(lengths="n")({**BATCH, "n": [5] * 6})
    with pytest.raises(TypeError, match=r"column 'x': lengths must be integers"):
        make(lengths="n")({**BATCH, "n": [1.0] * 6})
    with pytest.raises(ValueError, match="the lengths column has 5"):
        make(lengths="n")({**BATCH, "n": [1] * 5})
    with pytest.raises(ValueError, match=r"column 'x': p must be a number or have shape \(4,\)"):
        make(np.array([0.5, 0.5]))(BATCH)
    permuted = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(FLOATS, (3, 4), permutation=[1, 0]),
        pa.FixedShapeTensorArray.from_numpy_ndarray(X).storage,
    )
    with pytest.raises(ValueError, match=r"column 'x': .*\[1, 0\]"):
        make()({**BATCH, "x": permuted})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"columns": []}, ValueError, "columns"),
        ({"columns": ["x", "x"]}, ValueError, "different columns"),
        ({"columns": "id"}, ValueError, "different columns"),
        ({"columns": [1]}, TypeError, "names"),
        ({"columns": 5}, TypeError, "columns must be a name or a list of names, but got 5"),
        ({"columns": None}, TypeError, "columns must be a name or a list of names, but got None"),
        ({"lengths": 5}, TypeError, "key and lengths must be names"),
        ({"key": None}, TypeError, "names"),
        ({"key": 5}, TypeError, "names"),
        ({"seed": None}, TypeError, "seed"),
        ({"seed": -1}, ValueError, "seed"),
        ({"epoch": 0.5}, TypeError, "epoch"),
        ({"p": 1.5}, ValueError, "p must be"),
        ({"p": np.ones((2, 2))}, ValueError, "one dim"),
        ({"exact": True, "span": 2}, ValueError, "exact"),
        ({"fill": "a"}, TypeError, "fill"),
        ({"lengths": "x"}, ValueError, "different columns"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        make(**options)
