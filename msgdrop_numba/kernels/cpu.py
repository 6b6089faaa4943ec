"""The CPU kernels: one serial (GIL released) and one parallel, over the same scalar functions.

A message is `width` bytes, whatever its dtype: one compiled kernel serves them all. Only scaling looks at elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from msgdrop_numba.kernels._jit import jit, parallel_jit
from msgdrop_numba.kernels.memory import (
    bits_to_float,
    copy_bytes,
    float_to_bits,
    float_to_half,
    half_to_float,
    view,
    zero_bytes,
)
from msgdrop_numba.philox import draw_block

Array = np.ndarray[Any, Any]

# What is done to the elements of a kept message: nothing, or multiply as this type.
COPY, FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(5)

# Positions drawn at a time: words and flags stay in the first-level cache.
BLOCK = 1024

# In place of a threshold: the keep mask is given, nothing is drawn.
GIVEN = -1


@jit
def _keep_block(keep: Array, words: Array, seed: Any, key: Any, first: int, threshold: Any) -> None:
    """Set `keep` for the positions of a row from `first` on: a message is kept where its draw reaches the threshold."""
    counter, skip = first // 4, first % 4
    draw_block(seed, key, np.uint64(0), np.uint64(counter), words[: (skip + keep.size + 3) // 4 * 4])
    for j in range(keep.size):
        keep[j] = np.uint64(words[skip + j]) >= threshold


@jit
def _scale_run(target: int, source: int, count: int, kind: int, factor: float) -> None:
    """Multiply `count` bytes of elements in the accumulator type, rounding to nearest even."""
    s = np.float32(factor)
    if kind == FLOAT32:
        x4, y4 = view(source, count // 4, np.float32), view(target, count // 4, np.float32)
        for j in range(x4.size):
            y4[j] = x4[j] * s
    elif kind == FLOAT64:
        x8, y8 = view(source, count // 8, np.float64), view(target, count // 8, np.float64)
        for j in range(x8.size):
            y8[j] = x8[j] * factor
    else:
        x2, y2 = view(source, count // 2, np.uint16), view(target, count // 2, np.uint16)
        if kind == FLOAT16:
            for j in range(x2.size):
                y2[j] = float_to_half(half_to_float(x2[j]) * s)
        else:
            for j in range(x2.size):
                y2[j] = _round_to_bfloat16(bits_to_float(np.uint32(x2[j]) << np.uint32(16)) * s)


@jit
def _round_to_bfloat16(value: Any) -> Any:
    bits = np.uint64(float_to_bits(value))
    if value != value:  # rounding up could turn a NaN into an infinity
        return np.uint16((bits >> np.uint64(16)) | np.uint64(0x40))
    return np.uint16((bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16))


@jit
def _keep_run(target: int, source: int, count: int, kind: int, factor: float) -> None:
    if kind != COPY:
        _scale_run(target, source, count, kind, factor)
    elif target != source:
        copy_bytes(target, source, count)


@jit
def _drop_run(target: int, messages: int, width: int, fill: int) -> None:
    if fill == 0:
        zero_bytes(target, messages * width)
    else:
        for j in range(messages):
            copy_bytes(target + j * width, fill, width)


@jit
def _write_block(target: int, source: int, keep: Array, width: int, kind: int, factor: float, fill: int) -> None:
    """Write the messages of `keep`, run by run of equal flags; what is dropped is never read."""
    start = 0
    while start < keep.size:
        stop = start + 1
        while stop < keep.size and keep[stop] == keep[start]:
            stop += 1
        if keep[start]:
            _keep_run(target + start * width, source + start * width, (stop - start) * width, kind, factor)
        else:
            _drop_run(target + start * width, stop - start, width, fill)
        start = stop


@jit
def drop_range(
    first: int, last: int, x: int, out: int, width: int, kind: int, factor: float, fill: int, mask: int,
    size: int, lengths: int, seed: Any, keys: int, threshold: int,
) -> None:  # fmt: skip
    """Drop among the messages first..last - 1, counted in C order over rows of `size` positions.

    Addresses are integers, 0 where there is none: `x` and `out` (equal: in place), `fill` (one message; 0: zeros),
    `mask` (bool a message, written; read where threshold is GIVEN), `lengths` (int64 a row), `keys` (uint64 a row).
    With width 0 only the mask is made. `seed` is a NumPy uint64, the rest Python numbers: one compiled version
    serves every call.
    """
    words, scratch = np.empty(BLOCK + 8, np.uint32), np.empty(BLOCK, np.bool_)
    while first < last:
        row, position = first // size, first % size
        count = min(BLOCK, size - position, last - first)
        keep = view(mask + first if mask else scratch.ctypes.data, count, np.bool_)
        valid = max(0, min(count, view(lengths + 8 * row, 1, np.int64)[0] - position)) if lengths else count
        if threshold != GIVEN:
            key = view(keys + 8 * row, 1, np.uint64)[0] if keys else np.uint64(row)
            _keep_block(keep[:valid], words, seed, key, position, np.uint64(threshold))
            keep[valid:] = True
        if width:
            to, source = out + first * width, x + first * width
            _write_block(to, source, keep[:valid], width, kind, factor, fill)
            _keep_run(to + valid * width, source + valid * width, (count - valid) * width, COPY, factor)
        first += count


@jit
def drop_serial(
    messages: int, x: int, out: int, width: int, kind: int, factor: float, fill: int, mask: int,
    size: int, lengths: int, seed: Any, keys: int, threshold: int,
) -> None:  # fmt: skip
    """`drop_range` over all messages, on this thread."""
    drop_range(0, messages, x, out, width, kind, factor, fill, mask, size, lengths, seed, keys, threshold)


@parallel_jit
def drop_parallel(
    messages: int, x: int, out: int, width: int, kind: int, factor: float, fill: int, mask: int,
    size: int, lengths: int, seed: Any, keys: int, threshold: int, chunks: int,
) -> None:  # fmt: skip
    """`drop_range` over all messages in `chunks` equal parts, on numba's threads."""
    for c in prange(chunks):
        start, stop = messages * c // chunks, messages * (c + 1) // chunks
        drop_range(start, stop, x, out, width, kind, factor, fill, mask, size, lengths, seed, keys, threshold)
