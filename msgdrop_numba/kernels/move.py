"""The move step on the CPU: write messages to memory, each read from a source of its own, copied or multiplied.

Dropping, removing, restoring, collating and all gradients use this step. They differ only in their sources.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba.kernels._jit import inlined_jit
from msgdrop_numba.kernels.copying import SCRATCH, copy, copy_narrow, multiply, multiply_by_way, zero
from msgdrop_numba.kernels.memory import prefetch, view
from msgdrop_numba.kernels.records import BLOCK, COPY, LINE

Array = np.ndarray[Any, Any]

AHEAD = 2048  # bytes that are prefetched before they are copied
NARROW = 1024  # messages of fewer bytes are copied without a branch, zeros too
NARROW_AHEAD = 512  # the same where messages are prefetched
PREFETCH_BYTES = 4 * 2**20  # smaller ranges are in the cache that the processor fetches from by itself

# Memory of a move, by addresses: zeros, scratch, and the sources that are read.
MOVE_MEMORY = NARROW + SCRATCH + 8 * BLOCK


class Move(NamedTuple):
    """The parameters of the move step."""

    width: int  # bytes in a message
    kind: int  # the type to multiply in, or COPY
    scale: float  # the factor of all messages that have none of their own
    stream: bool  # bypass the cache
    ahead: Any  # messages that are prefetched; 0: none
    narrow: bool  # without a branch: each source is an address, zeros lie at `memory`
    memory: int  # MOVE_MEMORY bytes, which begin with zeros


@inlined_jit
def plan_move(width: int, kind: int, scale: float, stream: Any, nbytes: int, in_place: Any, memory: int) -> Move:
    """The way in which to write messages of a range of `nbytes`."""
    fetches = width >= LINE and nbytes >= PREFETCH_BYTES and not in_place
    narrow = width < (NARROW_AHEAD if fetches else NARROW) and not stream
    return Move(width, kind, scale, stream, 1 + AHEAD // width if fetches else 0, narrow, memory)


@inlined_jit
def move(dst: int, step: int, sources: Array, scales: Any, mode: Move) -> None:
    """Write message j to `dst + j * step`, for all sources: a copy of `sources[j]`, an address; 0: zeros.

    Args:
        scales: the address of one float64 factor a message, where 0.0 means copy. Address 0: all have `mode.scale`.
    """
    if mode.narrow and (mode.kind == COPY or not scales):
        _move_narrow(dst, step, sources, mode)
    else:
        _move_wide(dst, step, sources, view(scales, sources.size if scales else 0, np.float64), mode)


@inlined_jit
def _move_narrow(dst: int, step: int, sources: Array, mode: Move) -> None:
    """Move short messages without a branch, a third of which would be mispredicted. Zeros are multiplied, too."""
    width, last, ahead = mode.width, sources.size - 1, mode.ahead
    lines = width if ahead else 0
    for j in range(sources.size):
        for at in range(0, lines, LINE):
            prefetch(sources[min(j + ahead, last)] + at)
        if mode.kind == COPY:
            copy_narrow(dst + j * step, sources[j], width)
        else:
            multiply(dst + j * step, sources[j], width, mode.kind, mode.scale)


@inlined_jit
def _move_wide(dst: int, step: int, sources: Array, scales: Array, mode: Move) -> None:
    width, kind, stream, ahead, passed = mode.width, mode.kind, mode.stream, mode.ahead, 0
    scratch = mode.memory + NARROW
    # Dropped messages leave gaps that defeat the hardware prefetcher: prefetch by the list of those that are read.
    read = _that_are_read(sources[: sources.size if ahead else 0], scratch + SCRATCH)
    for j in range(sources.size):
        target, source = dst + j * step, sources[j]
        if source == 0:
            zero(target, width, stream)
            continue
        fetched: Any = np.int64(0)
        if ahead:
            fetched = read[min(passed + ahead, read.size - 1)]
            passed += 1
        factor: Any = np.float64(0)
        if kind != COPY:
            factor = scales[j] if scales.size else mode.scale
        if factor == 0:
            if source != target:
                copy(target, source, width, stream, fetched)
            continue
        for at in range(0, width if fetched else 0, LINE):
            prefetch(fetched + at)
        if stream or source == target:
            multiply_by_way(target, source, width, kind, factor, scratch, stream)
        else:
            multiply(target, source, width, kind, factor)


@inlined_jit
def _that_are_read(sources: Array, memory: int) -> Any:
    """The sources that are addresses, found without a branch."""
    found, count = view(memory, sources.size, np.int64), 0
    for j in range(sources.size):
        found[count] = sources[j]
        count += sources[j] != 0
    return view(memory, count, np.int64)
