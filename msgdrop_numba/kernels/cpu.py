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
    GAPS,
    NARROW,
    PREFETCH_BYTES,
    SCRATCH,
    copy,
    copy_narrow,
    fill_message,
    multiply,
    multiply_by_way,
)
from msgdrop_numba.kernels.memory import call, copy_bytes, prefetch, stack, view, zero_bytes
from msgdrop_numba.kernels.records import COPY, DRAW, LINE, PLAN
from msgdrop_numba.kernels.rules import (
    BLOCK,
    GROUP,
    Array,
    keep_plain,
    keep_rest,
    make_row,
    message_scales,
    row_scale,
    row_valid,
    whole_groups,
)

TOGETHER = 512  # messages of fewer bytes are scaled many at once, which passes over them once more
TILE = 8 * BLOCK  # flags of rows that are written across
PLAN_BYTES = PLAN.itemsize


class Memory(NamedTuple):
    """A call's own, on its thread's stack, where it costs nothing: addresses."""

    found: int  # a block's list, or its flags as words
    scratch: int  # SCRATCH bytes, which begin with zeros
    words: int  # the draws of a block
    known: int  # see `rules.decide`
    flags: int  # a block's; they are made in whole groups, a row's limit by a block of them behind those of the block
    scales: int  # of a block's messages
    tile: int  # flags of several rows, each in whole groups
    across: int  # the same by position
    turned: int  # a PLAN


SIZES = (8 * BLOCK, SCRATCH, 4 * (BLOCK + GROUP), 3 * 8, 2 * BLOCK + GROUP, 8 * BLOCK, TILE, TILE, PLAN_BYTES)
MEMORY = sum(SIZES)


class Writing(NamedTuple):
    """How a call writes: message by message, and then, where that is quicker, once more over many."""

    kind: int  # what is done to a kept message
    fill: int  # what a dropped one becomes: a message, 0: zeros
    then_kind: int  # the same of the second pass; COPY: there is none
    then_fill: int
    stream: bool  # past the cache
    foresee: bool  # asking for what is read next
    narrow: bool  # messages of a few bytes, without a branch
    zeros: bool  # what is dropped may be scaled, too, as zeros that stay such
    memory: Memory


@inlined_jit
def _memory(found: int) -> Memory:
    scratch = found + SIZES[0]
    words = scratch + SIZES[1]
    known = words + SIZES[2]
    flags = known + SIZES[3]
    scales, tile = flags + SIZES[4], flags + SIZES[4] + SIZES[5]
    return Memory(found, scratch, words, known, flags, scales, tile, tile + TILE, tile + 2 * TILE)


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
def _write_narrow(target: int, source: int, keep: Array, plan: Any, mode: Writing, scale: float) -> None:
    """Write messages of a few bytes: without a branch, of which a third would be guessed wrong. Scaled, 0 stays 0."""
    width, source_step, target_step = plan["width"], plan["x_step"], plan["out_step"]
    fill = mode.fill if mode.fill else mode.memory.scratch
    asked, distance = (width, AHEAD // width) if mode.foresee else (0, 0)
    for j in range(keep.size):
        dst, src = target + j * target_step, fill + keep[j] * (source + j * source_step - fill)
        for at in range(0, asked, LINE):
            prefetch(source + min(j + distance, keep.size - 1) * source_step + at)
        if mode.kind == COPY:
            copy_narrow(dst, src, width)
        else:
            multiply(dst, src, width, mode.kind, scale)


@inlined_jit
def _write_each(target: int, source: int, keep: Array, plan: Any, mode: Writing, scale: float, scales: int) -> None:
    """Write messages one by one, each with its own of the `scales`, if there are any; what is dropped isn't read."""
    width, source_step, target_step = plan["width"], plan["x_step"], plan["out_step"]  # not read again after a write
    each = view(scales, keep.size if scales else 0, np.float64)
    # With gaps between them, the processor doesn't foresee which messages are read next.
    kept, passed = _listed(keep[: keep.size if mode.foresee else 0], True, mode.memory.found), 0
    distance = AHEAD // width if mode.foresee else 0
    for j in range(keep.size):
        dst, src = target + j * target_step, source + j * source_step
        if not keep[j]:
            fill_message(dst, mode.fill, width, mode.stream)
            continue
        passed += 1
        ahead = source + kept[min(passed + distance, kept.size - 1)] * source_step if mode.foresee else 0
        message_scale = each[j] if scales else scale
        if mode.kind == COPY or message_scale == 0:
            if dst != src:
                copy(dst, src, width, mode.stream, ahead)
            continue
        for at in range(0, width if ahead else 0, LINE):
            prefetch(ahead + at)
        if mode.stream or dst == src:
            multiply_by_way(dst, src, width, mode.kind, message_scale, mode.memory.scratch, mode.stream)
        else:
            multiply(dst, src, width, mode.kind, message_scale)


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


@inner_jit
def _writing(plan: Any, draw: Any, x: int, out: int, messages: int, memory: Memory) -> Writing:
    """How a call that writes so many messages does it."""
    apart = draw["scales"] or draw["protect"] or plan["prefix"]  # messages have scales of their own
    width, kind, fill = plan["width"], plan["kind"], draw["fill"]
    stream = plan["stream"] and out % LINE == 0
    foresee = x != out and width >= LINE and messages * width >= PREFETCH_BYTES
    zeros = kind != COPY and x != out and fill == 0
    few = kind != COPY and width < (LINE if zeros else TOGETHER) and plan["out_step"] == width
    together = few and not (apart or stream)
    first = (COPY, 0) if together else (kind, fill)
    then = (kind, fill) if together else (COPY, 0)
    narrow = width < (GAPS if foresee else NARROW) and not stream
    return Writing(first[0], first[1], then[0], then[1], stream, foresee, narrow, zeros, memory)


@inlined_jit
def _is_alike(plan: Any, draw: Any) -> Any:
    """Whether what is done to a message is the same in all rows."""
    own = draw["scales"] or draw["protect"] or draw["lengths"] or plan["prefix"] or plan["exact"] or plan["ranged"]
    return not draw["sources"] and (plan["kind"] == COPY or not own)


@inlined_jit
def _is_even(plan: Any) -> Any:
    """Whether rows lie behind each other."""
    return plan["x_row"] == plan["size"] * plan["x_step"] and plan["out_row"] == plan["size"] * plan["out_step"]


@inner_jit
def _write_part(
    dst: int, src: int, keep: Array, plan: Any, mode: Writing, as_words: Any, scale: float, scales: Any
) -> None:
    """Write the messages of `keep` in the way that is quickest for their width."""
    width, memory = plan["width"], mode.memory
    if as_words and mode.kind == COPY:
        _write_words(dst, src, keep, width, mode.fill, memory.found)
    elif dst == src and mode.kind == COPY:
        _fill_dropped(dst, plan["out_step"], keep, mode.fill, width, mode.stream, memory.found)
    elif mode.narrow and (mode.kind == COPY or (mode.zeros and not scales)):
        _write_narrow(dst, src, keep, plan, mode, scale)
    else:
        _write_each(dst, src, keep, plan, mode, scale, scales)
    if mode.then_kind != COPY:
        multiply_by_way(dst, dst, keep.size * width, mode.then_kind, scale, memory.found, mode.stream)
        _fill_dropped(
            dst, width, keep[: keep.size if mode.then_fill else 0], mode.then_fill, width, mode.stream, memory.found
        )


@inlined_jit
def _write_block(
    dst: int, src: int, keep: Array, inside: int, plan: Any, draw: Any, mode: Writing, scale: float, scales: int
) -> None:
    """Write the messages of `keep`; those from `inside` on are padding, which passes as it is, or has a fill."""
    width = plan["width"]
    as_words = plan["words"] and (src | dst) & (min(width, 8) - 1) == 0 and (width <= 8 or mode.fill == 0)
    behind = view(mode.memory.flags + inside, keep.size - inside, np.bool_)
    for j in range(behind.size):
        behind[j] = not draw["sources"]
    for piece in range(plan["pieces"]):
        at, dst_at, src_at = piece * width, dst + piece * plan["out_piece"], src + piece * plan["x_piece"]
        fill, then_fill = mode.fill + at if mode.fill else 0, mode.then_fill + at if mode.then_fill else 0
        way = Writing(
            mode.kind, fill, mode.then_kind, then_fill, mode.stream, mode.foresee, mode.narrow, mode.zeros, mode.memory
        )
        part, some, as_some = keep[:inside], scales, as_words
        for _ in range(2 if behind.size else 1):
            _write_part(dst_at, src_at, part, plan, way, as_some, scale, some)
            dst_at, src_at = dst_at + inside * plan["out_step"], src_at + inside * plan["x_step"]
            fill = draw["padding"] + at if draw["padding"] else 0
            way = Writing(COPY, fill, COPY, 0, mode.stream, False, mode.narrow, False, mode.memory)
            part, some, as_some = behind, 0, 0


@inner_jit
def _decide(
    flags: int, plan_address: int, draw_address: int, seed: int, rule: int, index: int, position: int, count: int,
    memory: Memory,
) -> None:  # fmt: skip
    """Set the flags of messages of a row."""
    if rule:
        call(rule, flags, memory.words, plan_address, draw_address, seed, index, position, count, memory.known)
    else:
        plan, draw = view(plan_address, 1, PLAN)[0], view(draw_address, 1, DRAW)[0]
        keep_plain(flags, memory.words, plan, draw, seed, index, position, count)


@jit
def drop_across(
    index: int, rows: int, plan_address: int, draw_address: int, x: int, out: int, mask: int, seed: int, rule: int,
    found: int,
) -> None:  # fmt: skip
    """Drop among the messages of so many rows, decided row by row and written position by position, for `drop_range`.

    In that one's memory, at `found`. A kernel of its own, since few arrays need it and it is long to compile.
    """
    plan, draw, memory = view(plan_address, 1, PLAN)[0], view(draw_address, 1, DRAW)[0], _memory(found)
    copy_bytes(memory.turned, plan_address, PLAN_BYTES)
    turned, width, size = view(memory.turned, 1, PLAN)[0], plan["width"], plan["size"]
    turned["x_step"], turned["out_step"] = plan["x_row"], plan["out_row"]
    beside = turned["x_step"] == turned["out_step"] == width and width <= LINE and width & (width - 1) == 0
    aligned = (x | out | plan["x_step"] | plan["out_step"]) & (min(width, 8) - 1) == 0
    as_words = np.int64(beside and aligned and (width <= 8 or draw["fill"] == 0))
    mode = _writing(turned, draw, x, out, rows * size, memory)
    for position in range(0, size, BLOCK):
        count = min(BLOCK, size - position)
        pitch = whole_groups(count)
        for row in range(rows):
            flags, at = memory.tile + row * pitch, (index + row) * size + position
            inside = max(0, min(count, row_valid(plan, draw, index + row) - position))
            if draw["given"]:
                copy_bytes(flags, mask + at, count)
            else:
                _decide(flags, plan_address, draw_address, seed, rule, index + row, position, inside, memory)
                keep_rest(flags, inside, count)
                if mask:
                    copy_bytes(mask + at, flags, count)
        tile, across = view(memory.tile, rows * pitch, np.bool_), view(memory.across, rows * count, np.bool_)
        for j in range(count):
            for row in range(rows):
                across[j * rows + row] = tile[row * pitch + j]
        dst, src = out + index * plan["out_row"], x + index * plan["x_row"]
        for j in range(count):
            keep = view(memory.across + j * rows, rows, np.bool_)
            dst_at, src_at = dst + (position + j) * plan["out_step"], src + (position + j) * plan["x_step"]
            _write_part(dst_at, src_at, keep, turned, mode, as_words, plan["scale"], np.int64(0))  # a 0 is its own type


@jit
def drop_range(
    first: int, last: int, plan_address: int, draw_address: int, x: int, out: int, mask: int, seed: int, rule: int
) -> None:
    """Drop among the messages first..last - 1, counted in C order; there is one at least.

    Addresses are integers, 0 where there is none: `plan_address` (one PLAN), `draw_address` (one DRAW), `x` and `out`
    (equal: in place; without `out` only the mask is made), `mask` (bool a message, written, or read where given), and
    `rule` (of `rules.decide`, where more than a draw of its own decides on a message). All are Python integers, the
    seed as the int64 of its bits: one compiled version serves every call.

    Messages are decided row by row, and written a block of them at a time, of several rows where those are short, or
    position by position where rows lie beside each other.
    """
    plan, draw = view(plan_address, 1, PLAN)[0], view(draw_address, 1, DRAW)[0]
    size, given, alike, memory = plan["size"], draw["given"], _is_alike(plan, draw), _memory(stack(MEMORY))
    zero_bytes(memory.scratch, NARROW)  # what narrow messages drop to; `multiply_by_way` writes here where none is
    view(memory.known, 1, np.int64)[0] = -1
    even = alike and _is_even(plan)
    across = plan["across"] if alike and out and (size <= BLOCK or not rule) else 0  # each row's limit is found once
    mode = _writing(plan, draw, x, out, last - first, memory)
    index, position, count = first // size, first % size, 0
    while first < last:
        if across and position == 0 and last - first >= size:
            rows = min((last - first) // size, TILE // whole_groups(min(size, BLOCK)))
            call(across, index, rows, plan_address, draw_address, x, out, mask, seed, rule, memory.found)
            index, first = index + rows, first + rows * size
            continue
        valid, source = row_valid(plan, draw, index), x + index * plan["x_row"]
        if draw["sources"]:
            source = view(draw["sources"] + 8 * index, 1, np.int64)[0]
        stop = min(size, position + last - first - count)
        while position < stop:
            more, flags = min(stop - position, BLOCK - count), memory.flags + count
            inside = max(0, min(more, valid - position))
            if not given:
                _decide(flags, plan_address, draw_address, seed, rule, index, position, inside, memory)
            keep_rest(flags, inside, more)
            position, count = position + more, count + more
            if even and count < BLOCK and first + count < last:
                continue
            begin, inside = position - count, count if even else inside
            if mask and not given:
                copy_bytes(mask + first, memory.flags, count)
            if out:
                scale, scales = plan["scale"], 0
                if plan["kind"] != COPY and not even:
                    row = make_row(memory.words, plan, draw, seed, index)
                    scale = row_scale(plan, row)
                    scales = message_scales(memory.scales, plan, draw, row, scale, index, begin, inside)
                keep = view(mask + first if given else memory.flags, count, np.bool_)
                dst, src = out + index * plan["out_row"] + begin * plan["out_step"], source + begin * plan["x_step"]
                _write_block(dst, src, keep, inside, plan, draw, mode, scale, scales)
            first, count = first + count, 0
        index, position = index + 1, 0


@jit
def scale_rows(plan_address: int, draw_address: int, seed: int, rows: int, scales: int) -> None:
    """Write what each row's kept messages are multiplied by, float64, to the address `scales`."""
    plan, draw = view(plan_address, 1, PLAN)[0], view(draw_address, 1, DRAW)[0]
    words, each = stack(MEMORY), view(scales, rows, np.float64)
    for index in range(rows):
        each[index] = row_scale(plan, make_row(words, plan, draw, seed, index))


@parallel_jit
def drop_parallel(
    kernel: int, messages: int, plan: int, draw: int, x: int, out: int, mask: int, seed: int, rule: int, chunks: int
) -> None:
    """`drop_range` over all messages in `chunks` equal parts, on numba's threads.

    By its address, `kernel`: a call by name would compile it into this function once more.
    """
    for c in prange(chunks):
        start, stop = messages * c // chunks, messages * (c + 1) // chunks
        call(kernel, start, stop, plan, draw, x, out, mask, seed, rule)
