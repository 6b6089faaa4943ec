"""Messages removed and put back: `place_range` numbers those that are kept, `gather_range` moves them.

All of it is one map, `out[j] = x[index[j]]` where `index[j] >= 0`, else a fill: removing takes the numbers of kept
messages as `index`, putting back the slots that they went to, and each is the other's gradient. No other is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from msgdrop_numba.kernels._jit import inlined_jit, jit, parallel_jit
from msgdrop_numba.kernels.copying import (
    AHEAD,
    NARROW,
    PREFETCH_BYTES,
    SCRATCH,
    copy,
    copy_narrow,
    fill_message,
    multiply,
    multiply_by_way,
)
from msgdrop_numba.kernels.memory import call, prefetch, stack, view, zero_bytes
from msgdrop_numba.kernels.records import COPY, GATHER, LINE, PLACE


@jit
def count_range(first: int, last: int, address: int) -> None:
    """Count the kept messages of the rows first..last - 1, as the PLACE at `address` says."""
    place = view(address, 1, PLACE)[0]
    size, lengths = place["size"], place["lengths"]
    counts = view(place["counts"], last, np.int64)
    for row in range(first, last):
        valid = view(lengths + 8 * row, 1, np.int64)[0] if lengths else size
        keep, count = view(place["mask"] + row * size, valid, np.uint8), 0
        for i in range(valid):
            count += keep[i]
        counts[row] = count


@jit
def place_range(first: int, last: int, address: int) -> None:
    """Number the kept messages of the rows first..last - 1 and give each its slot, as the PLACE at `address` says."""
    place = view(address, 1, PLACE)[0]
    size, lengths, starts = place["size"], place["lengths"], place["starts"]
    counts = view(place["counts"], last, np.int64)
    for row in range(first, last):
        valid = view(lengths + 8 * row, 1, np.int64)[0] if lengths else size
        start = view(starts + 8 * row, 1, np.int64)[0] if starts else row * place["room"]
        room = counts[row] if starts else place["room"]
        keep, number = view(place["mask"] + row * size, valid, np.bool_), row * size
        index = view(place["index"] + 8 * start, room, np.int64)
        slots, at = view(place["slots"] + 8 * number, size, np.int64), 0
        i = 0
        while i < valid and at < room:  # written without a branch, of which half would be guessed wrong
            index[at] = number + i
            slots[i] = start + at if keep[i] else -1
            at += keep[i]
            i += 1
        for j in range(i, size):
            slots[j] = -1
        for j in range(at, room):
            index[j] = -1


@inlined_jit
def _source(job: Any, number: int) -> int:
    """Where a message of x lies."""
    size = job["size"]
    if size:
        row, starts = number // size, job["starts"]
        start = view(starts + 8 * row, 1, np.int64)[0] if starts else job["x"] + row * job["row"]
        return start + (number % size) * job["step"]  # type: ignore[no-any-return]
    return job["x"] + number * job["width"]  # type: ignore[no-any-return]


@inlined_jit
def _gather_narrow(first: int, last: int, job: Any, zeros: int) -> None:
    """Messages of a few bytes: without a branch, of which half would be guessed wrong."""
    index, width = view(job["index"], last, np.int64), job["width"]
    fill = job["fill"] if job["fill"] else zeros
    for j in range(first, last):
        src = _source(job, index[j]) if index[j] >= 0 else fill + j * job["fill_step"]
        copy_narrow(job["out"] + j * width, src, width)


@jit
def gather_range(first: int, last: int, address: int) -> None:
    """Write the messages first..last - 1 of the output, as the GATHER at `address` says."""
    job = view(address, 1, GATHER)[0]
    width, kind, stream = job["width"], job["kind"], job["stream"]
    index = view(job["index"], last, np.int64)
    scales = view(job["scales"], last if kind != COPY else 0, np.float64)
    scratch = stack(SCRATCH)
    if kind == COPY and width < NARROW and not stream:
        zero_bytes(scratch, NARROW)
        _gather_narrow(first, last, job, scratch)
    else:
        foresee = width >= 4 * LINE and (last - first) * width >= PREFETCH_BYTES
        distance = 1 + AHEAD // width if foresee else 0
        for j in range(first, last):
            dst, number = job["out"] + j * width, index[j]
            if number < 0:
                fill_message(dst, job["fill"] + j * job["fill_step"], width, stream)
                continue
            src, next_, ahead = _source(job, number), index[min(j + distance, last - 1)], 0
            if foresee and next_ >= 0:
                ahead = _source(job, next_)
            if kind == COPY or scales[j] == 0:
                copy(dst, src, width, stream, ahead)
                continue
            for at in range(0, width if ahead else 0, LINE):
                prefetch(ahead + at)
            if stream:
                multiply_by_way(dst, src, width, kind, scales[j], scratch, stream)
            else:
                multiply(dst, src, width, kind, scales[j])


@parallel_jit
def in_parallel(kernel: int, count: int, job: int, chunks: int) -> None:
    """Any of these kernels, by its address, over 0..count - 1 in `chunks` equal parts, on numba's threads."""
    for c in prange(chunks):
        call(kernel, count * c // chunks, count * (c + 1) // chunks, job)
