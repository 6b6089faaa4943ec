"""The mask contract (CONTRACT.md) in plain Python, slow and obvious. Imports nothing of the package."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

M32 = 2**32 - 1
M64 = 2**64 - 1


def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c0, c1, c2, c3


def halves(value: int) -> tuple[int, int]:
    """The low and high 32 bits of an integer taken modulo 2**64."""
    return value & M32, (value & M64) >> 32


def draw(seed: int, key: int, i: int, stream: int = 0) -> int:
    return philox4x32_10((i // 4, stream, *halves(key)), halves(seed))[i % 4]


def fold_in(seed: int, data: int) -> int:
    w = philox4x32_10((0, 0xFFFFFFFF, *halves(data)), halves(seed))
    return w[0] + 2**32 * w[1]


def hash64(name: str | bytes) -> int:
    """The key of an id that is no integer, and what a mask's name folds in."""
    data = name.encode() if isinstance(name, str) else name
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def threshold(p: float) -> int:
    return round(float(p) * 2**32)


def keep_row(
    size: int,
    p: Any,
    seed: int,
    key: int,
    *,
    n: int | None = None,
    exact: bool = False,
    span: int = 1,
    min_keep: int = 0,
) -> list[bool]:
    """One row of the mask; p a number, or one for each position."""
    n = size if n is None else n
    if exact:
        d = min((n * (2 * threshold(p) + 1)) >> 33, max(0, n - min_keep))
        dropped = set(sorted(range(n), key=lambda i: (draw(seed, key, i), i))[:d])
    else:
        thresholds = [threshold(v) for v in p] if isinstance(p, (list, tuple, np.ndarray)) else [threshold(p)] * size
        phase = (draw(seed, key, 0, stream=1) * span) >> 32 if span > 1 else 0
        dropped = {i for i in range(n) if draw(seed, key, (i + phase) // span) < thresholds[i]}
        if len(dropped) > max(0, n - min_keep):
            order = sorted(dropped, key=lambda i: (draw(seed, key, i, stream=2), i))
            dropped = set(order[: max(0, n - min_keep)])
    return [i not in dropped for i in range(size)]


def row_key(keys: Any, row_shape: Sequence[int], row: int) -> int:
    """The key of a row given in C order; keys may lack trailing dims."""
    if keys is None:
        return row
    keys = np.asarray(keys, dtype=object)
    inner = math.prod(row_shape[keys.ndim :])
    key = int(keys.ravel()[row // inner])
    return key if keys.ndim == len(row_shape) else fold_in(key, row % inner)


def keep_mask(
    shape: Sequence[int], p: Any, *, seed: int, keys: Any = None, lengths: Any = None, **rule: Any
) -> np.ndarray:
    *row_shape, size = shape
    rows = math.prod(row_shape)
    if not isinstance(p, (int, float)):
        p = np.broadcast_to(np.asarray(p, dtype=np.float64), shape).reshape(rows, size)
    mask = np.ones((rows, size), dtype=bool)
    for row in range(rows):
        n = size if lengths is None else int(np.asarray(lengths).ravel()[row])
        row_p = p[row] if isinstance(p, np.ndarray) else p
        mask[row] = keep_row(size, row_p, seed, row_key(keys, row_shape, row), n=n, **rule)
    return mask.reshape(shape)


def multiply(x: Any, s: float) -> Any:
    """x * s for one NumPy scalar: the factor rounded once to the accumulator, the product once to x's dtype."""
    if isinstance(x, np.complexfloating):
        return type(x)(complex(multiply(x.real, s), multiply(x.imag, s)))
    accumulator = np.float64 if isinstance(x, np.float64) else np.float32
    with np.errstate(all="ignore"):
        return type(x)(accumulator(x) * accumulator(s))


def scales(keep: np.ndarray, p: Any, lengths: Any, exact: bool, min_keep: int) -> np.ndarray:
    """What each message is multiplied by."""
    s = np.ones(keep.shape)
    p = np.broadcast_to(np.asarray(p, dtype=np.float64), keep.shape)
    for index in np.ndindex(keep.shape):
        n = keep.shape[-1] if lengths is None else int(np.asarray(lengths)[index[:-1]])
        if exact:
            d = min((n * (2 * threshold(p[index]) + 1)) >> 33, max(0, n - min_keep))
            s[index] = n / (n - d) if n > d and p[index] < 1 else 1
        else:
            s[index] = 1 / (1 - p[index]) if p[index] < 1 else 1
    return s


def drop(
    x: np.ndarray, keep: np.ndarray, *, fill: Any = 0, p: Any = 0.5, scale: bool = False, lengths: Any = None,
    exact: bool = False, span: int = 1, min_keep: int = 0,
) -> np.ndarray:  # fmt: skip
    """`where(keep, x * s, fill)`, message by message; padding is left as it is."""
    y = x.copy()
    s = scales(keep, p, lengths, exact, min_keep)
    for index in np.ndindex(keep.shape):
        n = keep.shape[-1] if lengths is None else np.asarray(lengths)[index[:-1]]
        if not keep[index]:
            y[index] = fill
        elif scale and index[-1] < n:
            for feature in np.ndindex(x.shape[keep.ndim :]):
                y[index + feature] = multiply(x[index + feature], s[index])
    return y
