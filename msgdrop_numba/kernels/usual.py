"""The usual call in one entry into compiled code: each entry costs as much as the messages of a small array."""

from __future__ import annotations

from typing import Any

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
# How compiled code draws a seed.
SOURCE = np.dtype(
    [
        ("draw", np.int64),  # a function of C, (tensor, low, high, shape, dims), that draws from low to high - 1
        ("tensor", np.int64),  # what it writes to
        ("seed", np.int64),  # where that one's only element lies
        ("count", np.int64),  # how many seeds may be drawn
        ("length", np.int64),  # of the tensor, 1
    ]
)
ROWS = 1024  # so many may bring lengths and keys
LENGTH, BYTES = 8 * (SOURCE.names or ()).index("length"), DRAW.itemsize  # where the length stands; bytes in a DRAW
MEMORY = BYTES + 16 * ROWS


@inner_jit
def _laid(draw_address: int, lengths: int, keys: int, rows: int, size: int) -> bool:
    """Make a DRAW of lengths and keys, with copies of them behind it; whether all lengths are from 0 to `size`."""
    zero_bytes(draw_address, BYTES)
    draw, behind, right = view(draw_address, 1, DRAW)[0], draw_address + BYTES, True
    if lengths:
        copy_bytes(behind, lengths, 8 * rows)
        for length in view(behind, rows, np.int64):
            right &= 0 <= length <= size
        draw["lengths"] = behind
        behind += 8 * rows
    if keys:
        copy_bytes(behind, keys, 8 * rows)
        draw["keys"] = behind
    return right


@inner_jit
def _drawn(address: int) -> Any:
    """A seed, from the SOURCE at the address; negative: none could be drawn."""
    source = view(address, 1, SOURCE)[0]
    seed = view(source["seed"], 1, np.int64)
    seed[0] = -1
    call(source["draw"], source["tensor"], 0, source["count"], address + LENGTH, 1)
    return seed[0]


@jit
def drop_usual(
    usual: int, lengths: int, keys: int, source: int, seed: int, x: int, out: int, parallel: int, parts: int
) -> int:
    """Drop among all messages, by the USUAL at that address. Returns the seed that it drew; negative: nothing is done.

    Args:
        lengths, keys: addresses of int64, one a row, read before anything is written; 0: there are none.
        source: of a SOURCE, to draw the seed from; 0: `seed` is it.
        x, out: addresses.
        parallel: the address of `drop_parallel`, to do it in so many `parts`; 0: this thread does it.
    """
    told = view(usual, 1, USUAL)[0]
    draw, memory = told["draw"], stack(MEMORY)
    if lengths or keys:
        draw = memory
        if not _laid(draw, lengths, keys, told["messages"] // told["size"], told["size"]):
            return -1
    drawn = 0
    if source:
        seed = drawn = _drawn(source)
        if drawn < 0:
            return -1
    kernel, messages, plan, rule = told["kernel"], told["messages"], told["plan"], told["rule"]
    if parallel:
        call(parallel, kernel, messages, plan, draw, x, out, 0, seed, rule, parts)
    else:
        call(kernel, 0, messages, plan, draw, x, out, 0, seed, rule)
    return drawn
