"""The CUDA kernel that moves messages, without a GPU: bit for bit against naive.py in numba's simulator.

The simulator is chosen when numba is imported: this file runs itself again in a process of its own.
"""

from __future__ import annotations

import mmap
import random
from typing import Any

import naive
import numpy as np
import pytest
from helpers import internals, oracle
from helpers.simulator import compiled, in_the_simulator, needs_numba_cuda, simulated
from test_cuda import KINDS, numbers, placed

from msgdrop_numba.call.select import Source, moving, source
from msgdrop_numba.kernels import records


@pytest.mark.processes
@needs_numba_cuda
@compiled
def test_in_the_simulator(tmp_path):
    assert in_the_simulator(__file__, tmp_path) >= 26


def gather(
    x: np.ndarray, index: np.ndarray, start: int = 0, fill: Any = None, scales: Any = None, kind: int = records.COPY
) -> np.ndarray:
    """What one launch writes, `start` bytes off a multiple of 64; nothing around it may change."""
    from msgdrop_numba.kernels import cuda_launch

    features = x.shape[2:]
    width = int(np.prod(features)) * x.itemsize
    out = placed(np.zeros((1, index.size, *features), x.dtype), start, 0)
    storage = np.frombuffer(out.base, np.uint8)
    at, before = out.ctypes.data - storage.ctypes.data, storage.tobytes()
    each = width if fill is not None and fill.ndim > len(features) else 0
    apart = None if x.flags.c_contiguous else source(x.ctypes.data, x.shape, x.strides, x.itemsize, 2)
    where = apart or Source(x.ctypes.data)
    told = (0 if fill is None else fill.ctypes.data, each)
    job = moving(where, out.ctypes.data, index, width, told, scales, kind)
    try:
        cuda_launch.gather(job, index.size, 0, 0)
    except cuda_launch.NotLoadedError as needed:
        cuda_launch.load(*needed.args, (9, 0))
        cuda_launch.gather(job, index.size, 0, 0)
    after, end = storage.tobytes(), at + index.size * width
    assert (after[:at], after[end:]) == (before[:at], before[end:])
    return np.ascontiguousarray(out).reshape(*index.shape, *features)


def poisoned(x: np.ndarray, index: np.ndarray, rng: random.Random) -> np.ndarray:
    """The messages of x in some layout, those that the index doesn't name overwritten: they are never read."""
    far = rng.random() < 0.3
    there = placed(x, rng.choice([0, 0, 16, x.itemsize]), rng.choice([0, 0, 3, 16]), far)
    named = np.isin(np.arange(x.shape[0] * x.shape[1]), index).reshape(x.shape[:2])
    there[~named] = np.frombuffer(b"\xff" * x.itemsize, x.dtype)[0]
    return there


def case(rng: random.Random, dtype: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any], np.ndarray]:
    """Messages, which are kept, by which rule, and where each is put."""
    shape = (rng.randint(1, 3), rng.randint(1, 11))
    x = numbers(rng, (*shape, rng.choice([1, 3, 4, 8, 16, 20])), dtype)
    rule = {"p": rng.choice([0.3, 0.5, 0.8]), "seed": rng.getrandbits(64), "prefix": 1}
    lengths = np.array([rng.randint(1, shape[1]) for _ in range(shape[0])]) if rng.random() < 0.5 else None
    keep = naive.keep_mask(shape, lengths=lengths, **rule)
    layout, capacity = rng.choice([("padded", None), ("padded", 11), ("packed", None), ("packed", 33)])
    index, _ = naive.select(keep, layout, lengths=lengths, capacity=capacity)
    return x, keep, {**rule, "lengths": lengths}, index


@simulated
@pytest.mark.parametrize("scale", [False, True], ids=["as it is", "scaled"])
@pytest.mark.parametrize("dtype", KINDS)
def test_removed_and_put_back(dtype, scale, small):
    rng = random.Random(f"{dtype}{scale}")
    for _ in range(3):
        x, keep, rule, index = case(rng, dtype)
        dropped, _ = oracle.dropout(x, scale=scale, dtype=dtype, message_dims=2, **rule)
        scales, kind = None, records.COPY
        if scale:
            takes = naive.part(keep.shape, rule["lengths"], rule["prefix"])
            s = np.where(takes, naive.scales(keep, takes, rule["p"]), 0.0)
            scales, kind = np.append(s, 0.0)[index], KINDS[dtype]
        start = rng.choice([0, 16, x.itemsize])
        y = gather(poisoned(x, index, rng), index, start, scales=scales, kind=kind)
        assert y.tobytes() == naive.removed(dropped, 2, index).tobytes(), (x.shape, rule, index, start)
        slots = np.full(keep.size, -1)
        slots[index[index >= 0]] = np.flatnonzero(index.ravel() >= 0)
        messages = y.reshape(1, -1, x.shape[-1])
        for fill in (None, numbers(rng, x.shape[2:], dtype), numbers(rng, x.shape, dtype)):
            want = naive.restored(y, keep.shape, index, 0 if fill is None else fill.reshape(-1, x.shape[-1]))
            got = gather(poisoned(messages, slots, rng), slots, start, fill)
            assert got.tobytes() == want.tobytes(), (x.shape, rule, index, start)


@simulated
@pytest.mark.parametrize("start", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("width", [1, 6, 48, 304])
def test_bytes_at_any_address(width, start, small):
    rng = random.Random(100 * width + start)
    x = numbers(rng, (2, 5, width), "uint8")
    index = np.array([[9, -1, 0], [-1, 3, 3]])
    y = gather(placed(x, start, rng.choice([0, 4, 16])), index, start)
    assert np.array_equal(y, naive.removed(x, 2, index))


@simulated
def test_each_message_is_written_once(small, monkeypatch):
    stored = internals.watch_stores(monkeypatch)
    index = np.array([-1, 4, -1, 0, 2, -1, 5, 1])
    x = np.ones((2, 3, 100), np.float32)
    gather(x, index)
    assert len(stored) == 8 * 25
    first = min(stored)
    assert sorted(stored) == list(range(first, first + 8 * 400, 16))


@simulated
def test_rows_that_lie_billions_of_bytes_apart(small):
    """Only the pages that are touched take memory."""
    far = np.ndarray((2, 3, 4), np.float32, mmap.mmap(-1, 2**32 + 2**20), 0, (2**32 + 64, 2**15, 4))
    far[:] = x = numbers(random.Random(1), (2, 3, 4), "float32")
    index = np.array([[5, 2], [3, -1]])
    assert gather(far, index).tobytes() == naive.removed(x, 2, index).tobytes()


@simulated
@pytest.mark.parametrize(("shape", "slots"), [((1, 2, 0), 3), ((1, 2, 4), 0), ((0, 2, 4), 0)])
def test_nothing_is_loaded_for_nothing(shape, slots, small):
    from msgdrop_numba.kernels import cuda_launch

    assert gather(np.zeros(shape, np.float32), np.full(slots, -1)).size == 0
    assert not cuda_launch._loaded


@simulated
def test_elements_off_their_alignment_are_refused(small):
    x = placed(np.zeros((1, 4, 3), np.float32), 2, 0)
    with pytest.raises(ValueError, match="off by 2"):
        gather(x, np.arange(4), scales=np.ones(4), kind=records.FLOAT32)
