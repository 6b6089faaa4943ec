"""The usual call in one entry into compiled code: each entry costs as much as the messages of a small array."""

from __future__ import annotations

import numpy as np

from msgdrop_numba.kernels._jit import inner_jit, jit
from msgdrop_numba.kernels.memory import call, copy_bytes, stack, view, zero_bytes
from msgdrop_numba.kernels.records import DRAW

# What all usual calls by one plan share.
USUAL = np.dtype(
    [
        ("kernel", np.int64),  # `drop_range`, by its address
        ("plan", np.int64),  # a PLAN
        ("draw", np.int64),  # the DRAW of a call without arrays
        ("messages", np.int64),
        ("size", np.int64),  # messages in a row
        ("rule", np.int64),  # as for `drop_range`
    ]
)
ROWS = 1024  # so many may bring lengths and keys
BYTES = DRAW.itemsize
MEMORY = BYTES + 16 * ROWS


@jit
def lengths_fit(lengths: int, rows: int, size: int) -> bool:
    """True if all int64 at the address, one a row, are from 0 to `size`."""
    fit = True
    for length in view(lengths, rows, np.int64):
        fit &= 0 <= length <= size
    return fit


@inner_jit
def _make_draw(draw_address: int, lengths: int, keys: int, rows: int, size: int) -> bool:
    """Make a DRAW of lengths and keys, with copies of them behind it. False if the lengths don't fit."""
    zero_bytes(draw_address, BYTES)
    draw, behind, fit = view(draw_address, 1, DRAW)[0], draw_address + BYTES, True
    if lengths:
        copy_bytes(behind, lengths, 8 * rows)
        fit = lengths_fit(behind, rows, size)
        draw["lengths"] = behind
        behind += 8 * rows
    if keys:
        copy_bytes(behind, keys, 8 * rows)
        draw["keys"] = behind
    return fit


@jit
def drop_usual(usual: int, lengths: int, keys: int, seed: int, x: int, out: int, parallel: int, parts: int) -> bool:
    """Drop among all messages, by the USUAL at that address. False if lengths are out of range: nothing is written.

    Args:
        lengths, keys: addresses of int64, one a row, read before anything is written; 0: there are none.
        x, out: addresses.
        parallel: the address of `drop_parallel`, to do it in so many `parts`; 0: this thread does it.
    """
    call_plan = view(usual, 1, USUAL)[0]
    draw, memory = call_plan["draw"], stack(MEMORY)
    messages, size = call_plan["messages"], call_plan["size"]
    if lengths or keys:
        draw = memory
        if not _make_draw(draw, lengths, keys, messages // size, size):
            return False
    kernel, plan, rule = call_plan["kernel"], call_plan["plan"], call_plan["rule"]
    if parallel:
        call(parallel, kernel, messages, plan, draw, x, out, 0, seed, rule, parts)
    else:
        call(kernel, 0, messages, plan, draw, x, out, 0, seed, rule)
    return True
