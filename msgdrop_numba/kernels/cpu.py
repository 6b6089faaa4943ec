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
from msgdrop_numba.kernels.rules import BLOCK, PLAN, Array, dropped_exactly, keep_block, row_rule

# What is done to the elements of a kept message: nothing, or multiply as this type.
COPY, FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(5)
OTHER = -1  # multiply, as a type that the kernels don't know


@jit
def _scale(target: int, source: int, count: int, kind: int, factor: float) -> None:
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
def _keep_messages(target: int, source: int, messages: int, plan: Any, kind: int, factor: float, factors: int) -> None:
    """Copy or scale neighbouring messages, in one piece where they lie so."""
    width, source_step, target_step = plan["width"], plan["x_step"], plan["out_step"]
    if kind == COPY:
        if target == source:
            return
        if source_step == width and target_step == width:
            copy_bytes(target, source, messages * width)
            return
        for j in range(messages):
            copy_bytes(target + j * target_step, source + j * source_step, width)
        return
    own = view(factors, messages if factors else 0, np.float64)
    for j in range(messages):
        by = own[j] if factors else factor
        _scale(target + j * target_step, source + j * source_step, width, kind, by)


@jit
def _drop_messages(target: int, messages: int, plan: Any, fill: int) -> None:
    """Fill neighbouring messages, in one piece where they lie so."""
    width, step = plan["width"], plan["out_step"]
    if fill == 0 and step == width:
        zero_bytes(target, messages * width)
        return
    for j in range(messages):
        if fill:
            copy_bytes(target + j * step, fill, width)
        else:
            zero_bytes(target + j * step, width)


@jit
def _write_block(target: int, source: int, keep: Array, plan: Any, factor: float, factors: int, fill: int) -> None:
    """Write the messages of `keep`, run by run of equal flags; what is dropped is never read."""
    start = 0
    while start < keep.size:
        stop = start + 1
        while stop < keep.size and keep[stop] == keep[start]:
            stop += 1
        to = target + start * plan["out_step"]
        if keep[start]:
            by = factors + 8 * start if factors else 0
            _keep_messages(to, source + start * plan["x_step"], stop - start, plan, plan["kind"], factor, by)
        else:
            _drop_messages(to, stop - start, plan, fill)
        start = stop


@jit
def _row_factor(plan: Any, valid: int) -> float:
    """What the kept messages of a row are multiplied by: n / (n - d) where exactly d of n drop."""
    if not plan["exact"] or plan["certain"]:
        return float(plan["factor"])
    return valid / float(max(1, valid - dropped_exactly(plan, valid)))


@jit
def drop_range(
    first: int, last: int, plan_address: int, x: int, out: int, fill: int, mask: int, given: int, lengths: int,
    keys: int, thresholds: int, per_row: int, factors: int, seed: Any,
) -> None:  # fmt: skip
    """Drop among the messages first..last - 1, counted in C order.

    Addresses are integers, 0 where there is none: `plan_address` (one PLAN), `x` and `out` (equal: in place; without
    `out` only the mask is made), `fill` (one message; 0: zeros), `mask` (bool a message, written, or read where
    `given`), `lengths` (int64 a row), `keys` (uint64 a row), `thresholds` (uint64) and, if scaled, `factors`
    (float64), one a position or, where `per_row`, one a message. `seed` is a NumPy uint64, the rest are Python
    integers: one compiled version serves every call.
    """
    plan = view(plan_address, 1, PLAN)[0]
    size = plan["size"]
    words, scratch = np.empty(BLOCK + 8, np.uint32), np.empty(BLOCK, np.bool_)
    row, key, valid, factor, row_thresholds, row_factors = -1, np.uint64(0), size, plan["factor"], thresholds, factors
    phase, cutoff, ties_end = 0, np.uint64(0), 0
    while first < last:
        position = first % size
        if first // size != row:
            row = first // size
            valid = view(lengths + 8 * row, 1, np.int64)[0] if lengths else size
            key = view(keys + 8 * row, 1, np.uint64)[0] if keys else np.uint64(row)
            if per_row:
                row_thresholds, row_factors = thresholds + 8 * size * row, factors + 8 * size * row
            factor = _row_factor(plan, valid)
            if not given:
                phase, cutoff, ties_end = row_rule(scratch, words, plan, seed, key, valid, row_thresholds)
        count = min(BLOCK, size - position, last - first)
        keep = view(mask + first if mask else scratch.ctypes.data, count, np.bool_)
        inside = max(0, min(count, valid - position))
        if not given:
            keep_block(keep[:inside], words, plan, seed, key, phase, cutoff, ties_end, position, row_thresholds)
            keep[inside:] = True
        if out:
            to = out + row * plan["out_row"] + position * plan["out_step"]
            source = x + row * plan["x_row"] + position * plan["x_step"]
            _write_block(to, source, keep[:inside], plan, factor, row_factors + 8 * position if factors else 0, fill)
            to, source = to + inside * plan["out_step"], source + inside * plan["x_step"]
            _keep_messages(to, source, count - inside, plan, COPY, 1.0, 0)
        first += count


@jit
def drop_serial(
    messages: int, plan: int, x: int, out: int, fill: int, mask: int, given: int, lengths: int,
    keys: int, thresholds: int, per_row: int, factors: int, seed: Any,
) -> None:  # fmt: skip
    """`drop_range` over all messages, on this thread."""
    drop_range(0, messages, plan, x, out, fill, mask, given, lengths, keys, thresholds, per_row, factors, seed)


@parallel_jit
def drop_parallel(
    messages: int, plan: int, x: int, out: int, fill: int, mask: int, given: int, lengths: int,
    keys: int, thresholds: int, per_row: int, factors: int, seed: Any, chunks: int,
) -> None:  # fmt: skip
    """`drop_range` over all messages in `chunks` equal parts, on numba's threads."""
    for c in prange(chunks):
        start, stop = messages * c // chunks, messages * (c + 1) // chunks
        drop_range(start, stop, plan, x, out, fill, mask, given, lengths, keys, thresholds, per_row, factors, seed)
