"""NumPy arrays: the usual call takes fewer steps than the others, with the same results, and only where it may."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import internals

from msgdrop_numba import arrays, message_dropout

USUAL = [{}, {"scale": True}, {"exact": True}, {"span": 3}, {"min_keep": 4}, {"message_dims": 1},
         {"scale": True, "exact": True}]  # fmt: skip
DTYPES = ["float32", ">f4", "float16", "complex128", "longdouble", "int16", "bool", "object"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", USUAL, ids=str)
def test_the_fast_path_is_the_long_one(options, dtype, monkeypatch):
    monkeypatch.setattr("os.urandom", lambda count: bytes(range(count)))
    seed = int.from_bytes(bytes(range(8)), "little") >> 1
    x = np.random.default_rng(3).integers(0, 2, (4, 6, 3)).astype(dtype)
    for array in (x, x.swapaxes(0, 1), x[:, ::2], x[:0], x[..., :0], x.view(np.ndarray)[::-1]):
        results = []
        with monkeypatch.context() as patch:
            for more in ({}, {"seed": seed}):
                try:
                    results.append(message_dropout(array, 0.4, **options, **more))
                except TypeError as error:
                    results.append(str(error))
                internals.no_fast_path(patch)
        y, want = results
        if isinstance(want, str):
            assert y == want
            continue
        assert y.dtype == want.dtype
        assert y.strides == want.strides
        assert y.tobytes() == want.tobytes()


def test_a_call_without_arrays_takes_the_fast_path(monkeypatch):
    monkeypatch.setattr(arrays, "message_dropout", None)
    assert message_dropout(np.ones((4, 6, 3), np.float32), 0.5).shape == (4, 6, 3)
    assert message_dropout(np.ones((4, 6, 3), np.float32), fill=0).shape == (4, 6, 3)


def test_subclasses_take_the_long_way():
    class Frames(np.ndarray):
        pass

    y = message_dropout(np.ones((4, 6, 3), np.float32).view(Frames), 1.0)
    assert type(y) is np.ndarray
    assert not y.any()
