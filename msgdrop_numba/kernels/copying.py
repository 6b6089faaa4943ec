"""Messages copied, multiplied and filled: what the CPU's kernels do to one, whichever it is."""

from __future__ import annotations

import numpy as np

from msgdrop_numba.kernels._jit import inlined_jit, inner_jit
from msgdrop_numba.kernels.memory import (
    brain_to_float,
    copy_bytes,
    copy_line,
    float_to_brain,
    float_to_half,
    half_to_float,
    prefetch,
    stream_line,
    view,
    zero_bytes,
    zero_line,
)
from msgdrop_numba.kernels.records import FLOAT16, FLOAT32, FLOAT64, LINE

SCRATCH = 4096  # bytes scaled at a time on their way


@inner_jit
def multiply(target: int, source: int, count: int, kind: int, scale: float) -> None:
    """Multiply `count` bytes of elements in the accumulator type, rounding to nearest even."""
    single = np.float32(scale)
    if kind == FLOAT32:
        x4, y4 = view(source, count // 4, np.float32), view(target, count // 4, np.float32)
        for j in range(x4.size):
            y4[j] = x4[j] * single
    elif kind == FLOAT64:
        x8, y8 = view(source, count // 8, np.float64), view(target, count // 8, np.float64)
        for j in range(x8.size):
            y8[j] = x8[j] * scale
    else:
        x2, y2 = view(source, count // 2, np.uint16), view(target, count // 2, np.uint16)
        if kind == FLOAT16:
            for j in range(x2.size):
                y2[j] = float_to_half(half_to_float(x2[j]) * single)
        else:
            for j in range(x2.size):
                y2[j] = float_to_brain(brain_to_float(x2[j]) * single)


@inner_jit
def copy(target: int, source: int, count: int, stream: bool, ahead: int) -> None:
    """Copy `count` bytes, with non-temporal stores if `stream`: the cache would evict a large output before it is read.

    Prefetch `count` bytes from address `ahead` meanwhile, unless it is 0.
    """
    if stream:
        for at in range(0, count, LINE):
            if ahead:
                prefetch(ahead + at)
            stream_line(target + at, source + at)
    elif count >= LINE:
        for at in range(0, count - LINE + 1, LINE):
            if ahead:
                prefetch(ahead + at)
            copy_line(target + at, source + at)
        if count % LINE:
            copy_line(target + count - LINE, source + count - LINE)  # the rest, and some of it again
    else:
        copy_bytes(target, source, count)


@inlined_jit
def copy_narrow(target: int, source: int, count: int) -> None:
    """Copy `count` bytes, a few, in pieces of one size, the last of which may overlap the one before."""
    if count >= LINE:
        for at in range(0, count - LINE, LINE):
            copy_line(target + at, source + at)
        copy_line(target + count - LINE, source + count - LINE)
    elif count >= 16:
        for at in range(0, count - 16, 16):
            copy_bytes(target + at, source + at, 16)
        copy_bytes(target + count - 16, source + count - 16, 16)
    elif count >= 4:
        for at in range(0, count - 4, 4):
            copy_bytes(target + at, source + at, 4)
        copy_bytes(target + count - 4, source + count - 4, 4)
    else:
        for at in range(count):
            copy_bytes(target + at, source + at, 1)


@inner_jit
def zero(target: int, count: int, stream: bool) -> None:
    """Set `count` bytes to zero, past the cache where `stream`."""
    if stream:
        for at in range(0, count, LINE):
            stream_line(target + at, 0)
    elif count >= LINE:
        for at in range(0, count - LINE + 1, LINE):
            zero_line(target + at)
        if count % LINE:
            zero_line(target + count - LINE)
    else:
        zero_bytes(target, count)


@inlined_jit
def multiply_by_way(target: int, source: int, count: int, kind: int, scale: float, scratch: int, stream: bool) -> None:
    """`multiply` through a scratch buffer, in order to stream, or if target and source are the same.

    The compiler vectorises `multiply` only if its target and source don't alias.
    """
    for at in range(0, count, SCRATCH):
        part = min(SCRATCH, count - at)
        multiply(scratch, source + at, part, kind, scale)
        copy(target + at, scratch, part, stream, 0)


@inner_jit
def fill_message(target: int, message: int, width: int, stream: bool) -> None:
    """One message: a copy of the one given, or zeros."""
    if message:
        copy(target, message, width, stream, 0)
    else:
        zero(target, width, stream)
