"""Messages removed and put back: `place_range` numbers those that are kept, `gather_range` moves them.

Both directions are one map: `out[j] = x[index[j]]` if `index[j] >= 0`, else a fill. Removal takes the numbers of kept
messages as its index. Restoring takes their slots, the inverse index. Each is the gradient of the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from msgdrop_numba.kernels._jit import inlined_jit, jit, parallel_jit
from msgdrop_numba.kernels.memory import call, stack, view, zero_bytes
from msgdrop_numba.kernels.move import MOVE_MEMORY, NARROW, move, plan_move
from msgdrop_numba.kernels.records import BLOCK, COPY, GATHER, PLACE

MEMORY = MOVE_MEMORY + 16 * BLOCK  # and the sources and factors of a block


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
        inverse_index, at = view(place["inverse_index"] + 8 * number, size, np.int64), 0
        i = 0
        while i < valid and at < room:  # written without a branch, of which half would be guessed wrong
            index[at] = number + i
            inverse_index[i] = start + at if keep[i] else -1
            at += keep[i]
            i += 1
        for j in range(i, size):
            inverse_index[j] = -1
        for j in range(at, room):
            index[j] = -1


@inlined_jit
def _source(job: Any, number: int) -> int:
    """The address of a message of x."""
    size = job["size"]
    if size:
        row, starts = number // size, job["starts"]
        start = view(starts + 8 * row, 1, np.int64)[0] if starts else job["x"] + row * job["row"]
        return start + (number % size) * job["step"]  # type: ignore[no-any-return]
    return job["x"] + number * job["width"]  # type: ignore[no-any-return]


@jit
def gather_range(first: int, last: int, address: int) -> None:
    """Write the messages first..last - 1 of the output, as the GATHER at `address` says: the move step, by an index."""
    job, memory = view(address, 1, GATHER)[0], stack(MEMORY)
    width, kind, index = job["width"], job["kind"], view(job["index"], last, np.int64)
    zero_bytes(memory, NARROW)
    mode = plan_move(width, kind, 1.0, job["stream"], (last - first) * width, False, memory)
    scales = view(job["scales"], last if kind != COPY else 0, np.float64)
    for begin in range(first, last, BLOCK):
        count = min(BLOCK, last - begin)
        sources = view(memory + MOVE_MEMORY, count, np.int64)
        each = view(memory + MOVE_MEMORY + 8 * BLOCK, count if kind != COPY else 0, np.float64)
        for j in range(count):
            fill = job["fill"] + (begin + j) * job["fill_step"] if job["fill"] else np.int64(0)
            if fill == 0 and mode.narrow:
                fill = memory
            number = index[begin + j]
            sources[j] = _source(job, number) if number >= 0 else fill
        for j in range(each.size):
            each[j] = scales[begin + j] if index[begin + j] >= 0 else 0.0
        factors = memory + MOVE_MEMORY + 8 * BLOCK if kind != COPY else np.int64(0)
        move(job["out"] + begin * width, width, sources, factors, mode)


@parallel_jit
def in_parallel(kernel: int, count: int, job: int, chunks: int) -> None:
    """Any of these kernels, by its address, over 0..count - 1 in `chunks` equal parts, on numba's threads."""
    for c in prange(chunks):
        call(kernel, count * c // chunks, count * (c + 1) // chunks, job)
