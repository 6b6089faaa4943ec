"""Random small cases, bit for bit against naive.py: NumPy and torch, serial and parallel, compiled or not."""

from __future__ import annotations

import random
from typing import Any

import naive
import numpy as np
import pytest

from msgdrop_numba import keep_mask, message_dropout, threads

torch = pytest.importorskip("torch")

DTYPES = ["float32", "float64", "float16", "complex64", "complex128", "int8", "uint16", "int32", "int64", "bool"]
P = [0.0, 1.0, 0.5, 0.3, 0.01, 0.99, 2.0**-33, 1 - 2.0**-33]


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def numbers(rng: random.Random, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Arbitrary finite numbers; for floats, of all magnitudes."""
    draws = np.random.default_rng(rng.getrandbits(32))
    if dtype == "bool":
        return draws.random(shape) < 0.5
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        return draws.integers(info.min, info.max, shape, dtype, endpoint=True)
    with np.errstate(over="ignore"):
        values = draws.standard_normal(shape) * 10.0 ** draws.integers(-9, 5, shape)
        return (values + 1j * draws.standard_normal(shape) if dtype.startswith("c") else values).astype(dtype)


def case(rng: random.Random, size: int) -> dict[str, Any]:
    dims = rng.choice([1, 1, 2, 2, 2, 3])
    shape = (*(rng.randint(0 if rng.random() < 0.1 else 1, 3) for _ in range(dims - 1)), rng.randint(0, size))
    rows = shape[:-1]
    lengths = keys = None
    if rng.random() < 0.3:
        lengths = np.array(
            [rng.randint(0, shape[-1]) for _ in range(np.prod(rows, dtype=int))], dtype=np.int64
        ).reshape(rows)
    if rng.random() < 0.5:
        named = rows[: rng.randint(0, len(rows))]
        keys = np.array([rng.getrandbits(64) for _ in range(np.prod(named, dtype=int))], dtype=np.uint64).reshape(named)
        keys = keys.view(np.int64) if rng.random() < 0.5 else keys
    p = rng.choice(P) if rng.random() < 0.5 else rng.random()
    return {"shape": shape, "p": p, "seed": rng.getrandbits(64), "keys": keys, "lengths": lengths}


def check(rng: random.Random, size: int) -> None:
    c = case(rng, size)
    shape, p, seed, keys, lengths = c.values()
    keep = naive.keep_mask(shape, p, seed=seed, keys=keys, lengths=lengths)
    assert np.array_equal(keep_mask(shape, p, seed=seed, keys=keys, lengths=lengths), keep), c
    dtype = rng.choice(DTYPES)
    scale = dtype[0] in "fc" and rng.random() < 0.5
    fill = (
        rng.choice([0, 1, 0.0]) if rng.random() < 0.7 or dtype[0] not in "fc" else rng.choice([-0.0, 2.5, float("inf")])
    )
    x = numbers(rng, (*shape, *rng.choice([(1,), (3,), (2, 2), (0,), (17,)])), dtype)
    want = naive.drop(x, keep, fill=fill, p=p, scale=scale, lengths=lengths) if p else x
    options = {"scale": scale, "fill": fill, "message_dims": len(shape), "seed": seed, "lengths": lengths}
    signed = None if keys is None else torch.from_numpy(keys.view(np.int64).copy())
    for make, row_keys in ((np.copy, keys), (lambda a: torch.from_numpy(a.copy()), signed)):
        y, mask = message_dropout(make(x), p, keys=row_keys, return_mask=True, **options)
        assert bits(mask) == bits(keep), c
        assert bits(y) == bits(want), (c, dtype, options)
        y = make(x)
        assert message_dropout(y, p, inplace=True, keys=row_keys, **options) is y
        assert bits(y) == bits(want), (c, dtype, options)
        out = make(np.zeros_like(x))
        assert message_dropout(make(x), p, out=out, keys=row_keys, **options) is out
        assert bits(out) == bits(want), (c, dtype, options)


@pytest.mark.kernels
@pytest.mark.parametrize("seed", range(4))
def test_few_cases(seed, chunks):
    rng = random.Random(seed)
    for _ in range(10):
        check(rng, 9)


@pytest.mark.kernels
@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_cases(seed, monkeypatch):
    rng = random.Random(1000 + seed)
    monkeypatch.setattr(threads, "chunks", lambda nbytes: rng.randint(1, 8))
    for _ in range(2500):
        check(rng, 40)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_rows_longer_than_a_block(start, chunks):
    """Rows cross the kernel's blocks, and chunks begin at every position of a Philox counter."""
    shape = (3, 2500 + start)
    mask = keep_mask(shape, 0.4, seed=start, keys=[5, 2**63, 7])
    assert np.array_equal(mask, naive.keep_mask(shape, 0.4, seed=start, keys=[5, 2**63, 7]))
    x = np.arange(3 * shape[1] * 2, dtype=np.int32).reshape(*shape, 2)
    y = message_dropout(x, 0.4, seed=start, keys=[5, 2**63, 7])
    assert np.array_equal(y, np.where(mask[..., None], x, 0))


@pytest.mark.kernels
def test_bfloat16_is_scaled_like_torch(chunks):
    bits16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = bits16.view(torch.bfloat16).reshape(64, 16, 64)
    y, mask = message_dropout(x, 0.3, scale=True, seed=1, return_mask=True)
    want = (x.float() * torch.tensor(1 / (1 - 0.3), dtype=torch.float32)).to(torch.bfloat16)
    want = torch.where(mask[..., None], want, torch.zeros((), dtype=torch.bfloat16))
    nan = want.isnan()
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(y.view(torch.int16)[~nan], want.view(torch.int16)[~nan])


@pytest.mark.kernels
def test_float16_is_scaled_like_numpy(chunks):
    x = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(64, 16, 64)
    y, mask = message_dropout(x, 0.3, scale=True, seed=1, return_mask=True)
    with np.errstate(all="ignore"):
        want = (x.astype(np.float32) * np.float32(1 / (1 - 0.3))).astype(np.float16)
    want = np.where(mask[..., None], want, np.float16(0))
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(y), nan)
    assert np.array_equal(y.view(np.uint16)[~nan], want.view(np.uint16)[~nan])
