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


def row_threshold(p: Any, seed: int, key: int) -> int:
    """T(p) of a row, its own where p is a range."""
    if not isinstance(p, tuple):
        return threshold(p)
    low, high = map(threshold, p)
    return low + (((high - low) * draw(seed, key, 0, stream=3)) >> 32)


def keep_row(
    size: int,
    p: Any,
    seed: int,
    key: int,
    *,
    taking: Sequence[int] | None = None,
    q: Sequence[int] | None = None,
    exact: bool = False,
    span: int = 1,
    min_keep: int = 0,
) -> list[bool]:
    """One row of the mask; p a number, a range, or one for each position; `taking` part at positions q."""
    taking = range(size) if taking is None else taking
    q = range(size) if q is None else q
    n = len(taking)
    if exact:
        d = min((n * (2 * row_threshold(p, seed, key) + 1)) >> 33, max(0, n - min_keep))
        dropped = set(sorted(taking, key=lambda i: (draw(seed, key, q[i]), i))[:d])
    else:
        each = isinstance(p, (list, np.ndarray))
        thresholds = [threshold(v) for v in p] if each else [row_threshold(p, seed, key)] * size
        phase = (draw(seed, key, 0, stream=1) * span) >> 32 if span > 1 else 0
        dropped = {i for i in taking if draw(seed, key, (q[i] + phase) // span) < thresholds[i]}
        if len(dropped) > max(0, n - min_keep):
            order = sorted(dropped, key=lambda i: (draw(seed, key, q[i], stream=2), i))
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


def part(shape: Sequence[int], lengths: Any = None, prefix: int = 0, protect: Any = None) -> np.ndarray:
    """Whether a message takes part: neither padding nor protected."""
    takes = np.ones(shape, bool)
    for index in np.ndindex(*shape):
        n = shape[-1] if lengths is None else np.asarray(lengths)[index[:-1]]
        spared = protect is not None and np.broadcast_to(protect, shape)[index]
        takes[index] = prefix <= index[-1] < n and not spared
    return takes


def keep_mask(
    shape: Sequence[int], p: Any, *, seed: int, keys: Any = None, lengths: Any = None, prefix: int = 0,
    protect: Any = None, positions: Any = None, **rule: Any,
) -> np.ndarray:  # fmt: skip
    *row_shape, size = shape
    rows = math.prod(row_shape)
    if not isinstance(p, (int, float, tuple)):
        p = np.broadcast_to(np.asarray(p, dtype=np.float64), shape).reshape(rows, size)
    takes = part(shape, lengths, prefix, protect).reshape(rows, size)
    q = np.arange(size) + (0 if positions is None else positions) if np.ndim(positions) == 0 else np.asarray(positions)
    q = np.broadcast_to(q, shape).reshape(rows, size)
    mask = np.ones((rows, size), dtype=bool)
    for row in range(rows):
        row_p, taking = p[row] if isinstance(p, np.ndarray) else p, [i for i in range(size) if takes[row, i]]
        key = row_key(keys, row_shape, row)
        mask[row] = keep_row(size, row_p, seed, key, taking=taking, q=[int(i) for i in q[row]], **rule)
    return mask.reshape(shape)


def multiply(x: Any, s: float) -> Any:
    """x * s for one NumPy scalar: the factor rounded once to the accumulator, the product once to x's dtype."""
    if isinstance(x, np.complexfloating):
        return type(x)(complex(multiply(x.real, s), multiply(x.imag, s)))
    accumulator = np.float64 if isinstance(x, np.float64) else np.float32
    with np.errstate(all="ignore"):
        return type(x)(accumulator(x) * accumulator(s))


def scales(
    keep: np.ndarray, takes: np.ndarray, p: Any, *, seed: int = 0, keys: Any = None, exact: bool = False,
    span: int = 1, min_keep: int = 0,
) -> np.ndarray:  # fmt: skip
    """What each message is multiplied by where it takes part."""
    s = np.ones(keep.shape)
    *row_shape, size = keep.shape
    each = p if isinstance(p, tuple) else np.broadcast_to(np.asarray(p, dtype=np.float64), keep.shape)
    for number, row in enumerate(np.ndindex(*row_shape)):
        n, ranged = int(takes[row].sum()), isinstance(p, tuple) and p[0] != p[1]
        t = row_threshold(p, seed, row_key(keys, row_shape, number)) if isinstance(p, tuple) else 0
        for i in range(size):
            p_i = t / 2**32 if ranged else p[0] if isinstance(p, tuple) else float(each[(*row, i)])
            d = min((n * (2 * (t if ranged else threshold(p_i)) + 1)) >> 33, max(0, n - min_keep))
            if p_i < 1 and takes[(*row, i)]:
                s[(*row, i)] = (n / (n - d) if n > d else 1) if exact else 1 / (1 - p_i)
    return s


def drop(
    x: np.ndarray, keep: np.ndarray, *, fill: Any = 0, p: Any = 0.5, scale: bool = False, lengths: Any = None,
    prefix: int = 0, protect: Any = None, positions: Any = None, **rule: Any,
) -> np.ndarray:  # fmt: skip
    """`where(keep, x * s, fill)`, message by message; what takes no part is left as it is."""
    y = x.copy()
    takes = part(keep.shape, lengths, prefix, protect)
    s = scales(keep, takes, p, **rule) if scale else np.ones(keep.shape)
    for index in np.ndindex(keep.shape):
        if not keep[index]:
            y[index] = fill
        elif scale and takes[index]:
            for feature in np.ndindex(x.shape[keep.ndim :]):
                y[index + feature] = multiply(x[index + feature], s[index])
    return y


def select(
    keep: np.ndarray, layout: str, *, lengths: Any = None, capacity: int | None = None
) -> tuple[np.ndarray, list[int]]:
    """For each slot the number of the message that remains there, -1 in padding; and how many each row keeps."""
    *row_shape, size = keep.shape
    kept: list[list[int]] = []
    for row, index in enumerate(np.ndindex(*row_shape)):
        n = size if lengths is None else np.asarray(lengths)[index]
        kept.append([row * size + i for i in range(n) if keep[(*index, i)]])
    counts = [len(row) for row in kept]
    if layout == "packed":
        numbers = [number for row in kept for number in row]
        return np.array(numbers + [-1] * ((capacity or 0) - len(numbers)), int), counts
    room = max(counts, default=0) if capacity is None else capacity
    return np.array([row + [-1] * (room - len(row)) for row in kept], int).reshape(*row_shape, room), counts


def removed(x: np.ndarray, dims: int, numbers: np.ndarray) -> np.ndarray:
    """The messages of x with these numbers, zeros where there is none."""
    flat, features = x.reshape(math.prod(x.shape[:dims]), *x.shape[dims:]), x.shape[dims:]
    zero = np.zeros(features, x.dtype)
    picked = [zero if number < 0 else flat[number] for number in numbers.ravel()]
    return np.array(picked, x.dtype).reshape(*numbers.shape, *features)


def restored(y: np.ndarray, shape: Sequence[int], numbers: np.ndarray, fill: Any = 0) -> np.ndarray:
    """The messages of y where they were among the message dims `shape`, the fill elsewhere."""
    features = y.shape[numbers.ndim :]
    x = np.empty((math.prod(shape), *features), y.dtype)
    x[...] = fill
    for slot, number in zip(np.ndindex(*numbers.shape), numbers.ravel(), strict=True):
        if number >= 0:
            x[number] = y[slot]
    return x.reshape(*shape, *features)
