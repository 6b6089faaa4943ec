"""The CPU kernels: `drop_range`, serial with the GIL released, and `drop_parallel` over the same scalar functions.

A message is `width` bytes, whatever its dtype: one compiled kernel serves them all. Only scaling looks at elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from msgdrop_numba.kernels._jit import inlined_jit, inner_jit, jit, parallel_jit
from msgdrop_numba.kernels.copying import (
    AHEAD,
    NARROW,
    PREFETCH_BYTES,
    SCRATCH,
    copy,
    copy_narrow,
    fill_message,
    multiply,
    multiply_past,
)
from msgdrop_numba.kernels.memory import call, copy_bytes, prefetch, view, zero_bytes
from msgdrop_numba.kernels.records import COPY, DRAW, LINE, PLAN
from msgdrop_numba.kernels.rules import (
    BLOCK,
    GROUP,
    Array,
    keep_block,
    make_row,
    message_scales,
    row_cutoff,
    row_scale,
    row_valid,
)

TOGETHER = 512  # messages of fewer bytes are scaled many at once, which passes over them once more
# One allocation for all of a call's own memory, since each costs as much as a small row: list, scratch, words, keep,
# scales.
MEMORY = 8 * BLOCK + SCRATCH + 4 * (BLOCK + GROUP) + BLOCK + 8 * BLOCK


class Writing(NamedTuple):
    """How a call writes: message by message, and then, where that is quicker, once more over many."""

    kind: int  # what is done to a kept message
    fill: int  # what a dropped one becomes: a message, 0: zeros
    then_kind: int  # the same of the second pass; COPY: there is none
    then_fill: int
    stream: bool  # past the cache
    foresee: bool  # asking for what is read next
    found: int  # memory for a block's list, or for its flags as words
    scratch: int  # memory of SCRATCH bytes, which begin with zeros


@inlined_jit
def _listed(keep: Array, wanted: bool, memory: int) -> Any:
    """Where `keep` is as wanted, found without a branch: a third of the guesses would be wrong."""
    found, count = view(memory, keep.size, np.int64), 0
    for j in range(keep.size):
        found[count] = j
        count += keep[j] == wanted
    return view(memory, count, np.int64)


@inner_jit
def _fill_dropped(target: int, step: int, keep: Array, fill: int, width: int, stream: bool, found: int) -> None:
    for j in _listed(keep, False, found):
        fill_message(target + j * step, fill, width, stream)


@inlined_jit
def _write_narrow(target: int, source: int, keep: Array, plan: Any, fill: int) -> None:
    """Write messages of a few bytes: without a branch, of which a third would be guessed wrong."""
    width, source_step, target_step = plan["width"], plan["x_step"], plan["out_step"]
    for j in range(keep.size):
        copy_narrow(target + j * target_step, fill + keep[j] * (source + j * source_step - fill), width)


@inlined_jit
def _write_each(target: int, source: int, keep: Array, plan: Any, how: Writing, scale: float, scales: int) -> None:
    """Write messages one by one, each with its own of the `scales`, if there are any; what is dropped isn't read."""
    width, source_step, target_step = plan["width"], plan["x_step"], plan["out_step"]  # not read again after a write
    each = view(scales, keep.size if scales else 0, np.float64)
    # With gaps between them, the processor doesn't foresee which messages are read next.
    kept, passed = _listed(keep[: keep.size if how.foresee else 0], True, how.found), 0
    distance = AHEAD // width if how.foresee else 0
    for j in range(keep.size):
        to, from_ = target + j * target_step, source + j * source_step
        if not keep[j]:
            fill_message(to, how.fill, width, how.stream)
            continue
        passed += 1
        ahead = source + kept[min(passed + distance, kept.size - 1)] * source_step if how.foresee else 0
        message_scale = each[j] if scales else scale
        if how.kind == COPY or message_scale == 0:
            if to != from_:
                copy(to, from_, width, how.stream, ahead)
            continue
        for at in range(0, width if ahead else 0, LINE):
            prefetch(ahead + at)
        if how.stream:
            multiply_past(to, from_, width, how.kind, message_scale, how.scratch)
        else:
            multiply(to, from_, width, how.kind, message_scale)


@inlined_jit
def _write_padding(target: int, source: int, messages: int, plan: Any, draw: Any, stream: bool) -> None:
    """What lies behind a row's messages: the padding given where rows have sources, else as it is in x."""
    beside = plan["out_step"] == plan["x_step"] == plan["width"] and not draw["sources"]
    if beside and target != source:
        copy(target, source, messages * plan["width"], stream, 0)
    for j in range(0 if beside else messages):
        to, from_ = target + j * plan["out_step"], source + j * plan["x_step"]
        if draw["sources"]:
            fill_message(to, draw["padding"], plan["width"], stream)
        elif to != from_:
            copy(to, from_, plan["width"], stream, 0)


@inner_jit
def _select(target: int, source: int, keep: Array, value: Any, word: Any) -> None:
    """Messages of one word each: no runs to find, no branch to predict. The loads are masked by `keep`."""
    x, y = view(source, keep.size, word), view(target, keep.size, word)
    if source == target:
        for j in range(keep.size):
            if not keep[j]:
                y[j] = value
    else:
        for j in range(keep.size):
            y[j] = x[j] if keep[j] else value


@inlined_jit
def _spread(keep: Array, flags: int, copies: int) -> Any:
    """Every flag `copies` times (2, 4 or 8), in the memory at `flags`."""
    if copies == 2:
        twos = view(flags, keep.size, np.uint16)
        for j in range(keep.size):
            twos[j] = np.uint16(0x0101) * keep[j]
    elif copies == 4:
        fours = view(flags, keep.size, np.uint32)
        for j in range(keep.size):
            fours[j] = np.uint32(0x01010101) * keep[j]
    else:
        eights = view(flags, keep.size, np.uint64)
        for j in range(keep.size):
            eights[j] = np.uint64(0x0101010101010101) * keep[j]
    return view(flags, keep.size * copies, np.bool_)


@inlined_jit
def _write_words(target: int, source: int, keep: Array, width: int, fill: int, flags: int) -> None:
    """Write neighbouring messages of 1 to 64 bytes, a power of two: word by word, since their runs are too short."""
    if width == 1:
        _select(target, source, keep, view(fill, 1, np.uint8)[0] if fill else np.uint8(0), np.uint8)
    elif width == 2:
        _select(target, source, keep, view(fill, 1, np.uint16)[0] if fill else np.uint16(0), np.uint16)
    elif width == 4:
        _select(target, source, keep, view(fill, 1, np.uint32)[0] if fill else np.uint32(0), np.uint32)
    elif width == 8:
        _select(target, source, keep, view(fill, 1, np.uint64)[0] if fill else np.uint64(0), np.uint64)
    else:
        _select(target, source, _spread(keep, flags, width // 8), np.uint64(0), np.uint64)


@inlined_jit
def _writing(plan: Any, draw: Any, x: int, out: int, messages: int, memory: int) -> Writing:
    """How a call that writes so many messages does it; `memory` is its own, of MEMORY bytes."""
    apart = draw["scales"] or draw["protect"] or plan["prefix"]  # messages have scales of their own
    width, kind, fill = plan["width"], plan["kind"], draw["fill"]
    stream = plan["stream"] and out % LINE == 0
    foresee = x != out and width >= 4 * LINE and messages * width >= PREFETCH_BYTES
    together = kind != COPY and width < TOGETHER and plan["out_step"] == width and not (apart or stream)
    first = (COPY, 0) if together else (kind, fill)
    then = (kind, fill) if together else (COPY, 0)
    return Writing(first[0], first[1], then[0], then[1], stream, foresee, memory, memory + 8 * BLOCK)


@inlined_jit
def _of_piece(how: Writing, at: int) -> Writing:
    """The same for the piece of each message that begins at this byte of it."""
    fill, then_fill = how.fill + at if how.fill else 0, how.then_fill + at if how.then_fill else 0
    return Writing(how.kind, fill, how.then_kind, then_fill, how.stream, how.foresee, how.found, how.scratch)


@inner_jit
def _write_part(
    to: int, from_: int, keep: Array, plan: Any, how: Writing, as_words: bool, scale: float, scales: int
) -> None:
    """Write the messages of `keep` in the way that is quickest for their width."""
    width = plan["width"]
    if as_words and how.kind == COPY:
        _write_words(to, from_, keep, width, how.fill, how.found)
    elif to == from_ and how.kind == COPY:
        _fill_dropped(to, plan["out_step"], keep, how.fill, width, how.stream, how.found)
    elif how.kind == COPY and width < NARROW and not (how.foresee or how.stream):
        _write_narrow(to, from_, keep, plan, how.fill if how.fill else how.scratch)
    else:
        _write_each(to, from_, keep, plan, how, scale, scales)
    if how.then_kind != COPY:
        multiply(to, to, keep.size * width, how.then_kind, scale)
        _fill_dropped(to, width, keep[: keep.size if how.then_fill else 0], how.then_fill, width, False, how.found)


@jit
def drop_range(
    first: int, last: int, plan_address: int, draw_address: int, x: int, out: int, mask: int, seed: int
) -> None:
    """Drop among the messages first..last - 1, counted in C order; there is one at least.

    Addresses are integers, 0 where there is none: `plan_address` (one PLAN), `draw_address` (one DRAW), `x` and `out`
    (equal: in place; without `out` only the mask is made), `mask` (bool a message, written, or read where given). All
    are Python integers, the seed as the int64 of its bits: one compiled version serves every call.
    """
    plan, draw = view(plan_address, 1, PLAN)[0], view(draw_address, 1, DRAW)[0]
    size, width, given = plan["size"], plan["width"], draw["given"]
    memory = np.empty(MEMORY, np.uint8)
    how = _writing(plan, draw, x, out, last - first, memory.ctypes.data)
    words = how.scratch + SCRATCH
    drawn = words + 4 * (BLOCK + GROUP)
    zero_bytes(how.scratch, NARROW)  # what narrow messages drop to; only `multiply_past` writes here, where none is
    bits, scales = np.uint64(np.int64(seed)), draw["scales"]
    for index in range(first // size, (last - 1) // size + 1):
        valid, row = row_valid(plan, draw, index), make_row(words, plan, draw, bits, index)
        source = view(draw["sources"] + 8 * index, 1, np.int64)[0] if draw["sources"] else x + index * plan["x_row"]
        as_words = plan["words"] and (source | out) & (min(width, 8) - 1) == 0 and (width <= 8 or draw["fill"] == 0)
        if draw["per_row"] and draw["scales"]:
            scales = draw["scales"] + 8 * size * index
        scale = row_scale(plan, row)
        if not given:
            cutoff = row_cutoff(drawn, words, plan, row, valid)
        stop = min(size, last - index * size)
        for position in range(max(0, first - index * size), stop, BLOCK):
            count, there = min(BLOCK, stop - position), mask + index * size + position
            inside = max(0, min(count, valid - position))
            keep = view(there if given else drawn, count, np.bool_)
            if not given:
                keep_block(drawn, words, plan, row, cutoff, position, inside)
                keep[inside:] = True
                if mask:
                    copy_bytes(there, drawn, count)
            if out:
                each = (
                    0 if how.kind == COPY else message_scales(drawn + BLOCK, plan, row, scale, scales, position, inside)
                )
                for piece in range(plan["pieces"]):
                    to = out + index * plan["out_row"] + position * plan["out_step"] + piece * plan["out_piece"]
                    from_ = source + position * plan["x_step"] + piece * plan["x_piece"]
                    _write_part(to, from_, keep[:inside], plan, _of_piece(how, piece * width), as_words, scale, each)
                    to, from_ = to + inside * plan["out_step"], from_ + inside * plan["x_step"]
                    _write_padding(to, from_, count - inside, plan, draw, how.stream)
    memory[0] = 0  # used until here: views don't keep it


@jit
def scale_rows(plan_address: int, draw_address: int, seed: int, rows: int, scales: int) -> None:
    """Write what each row's kept messages are multiplied by, float64, to the address `scales`."""
    plan, draw = view(plan_address, 1, PLAN)[0], view(draw_address, 1, DRAW)[0]
    memory, each = np.empty(4 * GROUP, np.uint8), view(scales, rows, np.float64)
    for index in range(rows):
        each[index] = row_scale(plan, make_row(memory.ctypes.data, plan, draw, np.uint64(np.int64(seed)), index))
    memory[0] = 0  # used until here: views don't keep it


@parallel_jit
def drop_parallel(
    kernel: int, messages: int, plan: int, draw: int, x: int, out: int, mask: int, seed: int, chunks: int
) -> None:
    """`drop_range` over all messages in `chunks` equal parts, on numba's threads.

    By its address, `kernel`: a call by name would compile it into this function once more.
    """
    for c in prange(chunks):
        start, stop = messages * c // chunks, messages * (c + 1) // chunks
        call(kernel, start, stop, plan, draw, x, out, mask, seed)
