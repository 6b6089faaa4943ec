"""The CPU kernels that drop: `drop_range`, serial with the GIL released, and `drop_parallel` over it.

Each tile of messages is drawn, then moved. A message is `width` bytes, whatever its dtype: one compiled kernel serves
them all. Only scaling looks at elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from msgdrop_numba.kernels._jit import inlined_jit, inner_jit, jit, parallel_jit
from msgdrop_numba.kernels.copying import fill_message, multiply_by_way
from msgdrop_numba.kernels.memory import call, copy_bytes, stack, view, zero_bytes
from msgdrop_numba.kernels.move import MOVE_MEMORY, NARROW, Move, move, plan_move
from msgdrop_numba.kernels.records import BLOCK, COPY, LINE, MASK_ARGS, PLAN
from msgdrop_numba.kernels.rules import (
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

TILE = 8 * BLOCK  # flags of rows that lie beside each other
# Scaled messages of fewer bytes are copied, then multiplied, a block at a time: with a fill, and in place.
TWO_PASSES, TWO_PASSES_IN_PLACE = 256, 512


class Memory(NamedTuple):
    """A call's own memory, on its thread's stack, where it costs nothing: addresses."""

    move: int  # MOVE_MEMORY bytes
    sources: int  # of a block's messages; or their flags as words
    scales: int  # of a block's messages
    words: int  # the draws of a block
    known: int  # the cutoffs of 8 rows, see `rules.decide`
    line: int  # flags of the messages at one position of several rows
    flags: int  # of a tile; draws are made in whole groups, a row's limit by a block of flags behind its own


SIZES = (MOVE_MEMORY, 8 * BLOCK, 8 * BLOCK, 4 * (BLOCK + GROUP), 8 * 24, BLOCK, TILE + BLOCK + GROUP)
MEMORY = sum(SIZES)


class Writing(NamedTuple):
    """The write strategy of one call."""

    mode: Move
    kind: int  # the type to multiply in, or COPY
    two_passes: bool  # copy, then multiply whole blocks
    own_scales: bool  # each message needs its factor: dropped ones must not be multiplied along


@inlined_jit
def _memory(move_memory: int) -> Memory:
    sources = move_memory + SIZES[0]
    scales = sources + SIZES[1]
    words = scales + SIZES[2]
    known = words + SIZES[3]
    line = known + SIZES[4]
    return Memory(move_memory, sources, scales, words, known, line, line + SIZES[5])


@inner_jit
def _writing(plan: Any, args: Any, x: int, out: int, messages: int, memory: Memory) -> Writing:
    """Choose the write strategy of a call for `messages` messages."""
    width, kind, fill, in_place = plan["width"], plan["kind"], args["fill"], x == out
    apart = args["scales"] or args["protect"] or plan["spares"]  # messages have scales of their own
    stream = plan["stream"] and out % LINE == 0
    zeros = fill == 0 and not in_place
    widest = LINE if zeros else TWO_PASSES_IN_PLACE if in_place else TWO_PASSES
    two_passes = kind != COPY and width < widest and plan["out_step"] == width and not (apart or stream)
    mode = plan_move(
        width, COPY if two_passes else kind, plan["scale"], stream, messages * width, in_place, memory.move
    )  # fmt: skip
    return Writing(mode, kind, two_passes, not zeros)


@inlined_jit
def _listed(keep: Array, wanted: bool, memory: int) -> Any:
    """The indices where `keep` is as wanted, found without a branch: a third of the guesses would be wrong."""
    found, count = view(memory, keep.size, np.int64), 0
    for j in range(keep.size):
        found[count] = j
        count += keep[j] == wanted
    return view(memory, count, np.int64)


@inner_jit
def _fill_dropped(dst: int, step: int, keep: Array, fill: int, mode: Move, memory: int) -> None:
    for j in _listed(keep, False, memory):
        fill_message(dst + j * step, fill, mode.width, mode.stream)


@inner_jit
def _select_words(dst: int, src: int, keep: Array, value: Any, word: Any) -> None:
    """Messages of one word each: no runs to find, no branch to predict. The loads are masked by `keep`."""
    x, y = view(src, keep.size, word), view(dst, keep.size, word)
    if src == dst:
        for j in range(keep.size):
            if not keep[j]:
                y[j] = value
    else:
        for j in range(keep.size):
            y[j] = x[j] if keep[j] else value


@inlined_jit
def _repeated(keep: Array, flags: int, copies: int) -> Any:
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
def _write_words(dst: int, src: int, keep: Array, width: int, fill: int, memory: int) -> None:
    """Write adjacent messages of 1 to 64 bytes, a power of two: word by word, since their runs are too short."""
    if width == 1:
        _select_words(dst, src, keep, view(fill, 1, np.uint8)[0] if fill else np.uint8(0), np.uint8)
    elif width == 2:
        _select_words(dst, src, keep, view(fill, 1, np.uint16)[0] if fill else np.uint16(0), np.uint16)
    elif width == 4:
        _select_words(dst, src, keep, view(fill, 1, np.uint32)[0] if fill else np.uint32(0), np.uint32)
    elif width == 8:
        _select_words(dst, src, keep, view(fill, 1, np.uint64)[0] if fill else np.uint64(0), np.uint64)
    else:
        _select_words(dst, src, _repeated(keep, memory, width // 8), np.uint64(0), np.uint64)


@inner_jit
def _are_words(dst: int, dst_step: int, src: int, src_step: int, width: int, fill: int) -> Any:
    """True if messages can be written as words: they are adjacent, aligned, and of 1, 2, 4 ... 64 bytes."""
    if dst_step != width or src_step != width or width > LINE or width & (width - 1):
        return False
    return (src | dst) & (min(width, 8) - 1) == 0 and (width <= 8 or fill == 0)


@inner_jit
def _write(
    dst: int, dst_step: int, src: int, src_step: int, keep: Array, scale: Any, scales: Any, fill: int, writing: Writing,
    memory: Memory,
) -> None:  # fmt: skip
    """Write the messages of `keep`: the move step, with a source for each flag.

    Args:
        scale: of all kept messages, where `scales` is 0; else `scales` is the address of a float64 for each.
    """
    mode = writing.mode
    if mode.kind == COPY and _are_words(dst, dst_step, src, src_step, mode.width, fill):
        _write_words(dst, src, keep, mode.width, fill, memory.sources)
    elif mode.kind == COPY and dst == src:
        _fill_dropped(dst, dst_step, keep, fill, mode, memory.sources)
    else:
        sources, blank = view(memory.sources, keep.size, np.int64), fill
        if blank == 0 and mode.narrow:
            blank = mode.memory
        for j in range(keep.size):
            sources[j] = src + j * src_step if keep[j] else blank
        if mode.kind != COPY and (writing.own_scales or scales):
            each, given = (
                view(memory.scales, keep.size, np.float64),
                view(scales, keep.size if scales else 0, np.float64),
            )
            for j in range(keep.size):  # which may be the same memory
                each[j] = (given[j] if scales else scale) if keep[j] else 0.0
            scales = memory.scales
        scaled = Move(mode.width, mode.kind, scale, mode.stream, mode.ahead, mode.narrow, mode.memory)
        move(dst, dst_step, sources, scales, scaled)
    if writing.two_passes:
        multiply_by_way(dst, dst, keep.size * mode.width, writing.kind, scale, mode.memory + NARROW, mode.stream)
        if fill:
            _fill_dropped(dst, dst_step, keep, fill, mode, memory.sources)


@inlined_jit
def _write_row(
    dst: int, src: int, keep: Array, inside: int, plan: Any, args: Any, scale: Any, scales: Any, writing: Writing,
    memory: Memory,
) -> None:  # fmt: skip
    """Write messages of one row, or of rows behind each other; from `inside` on they are padding.

    Padding passes as it is; behind a row in memory of its own it has a fill.
    """
    width, dst_step, src_step = plan["width"], plan["out_step"], plan["x_step"]
    behind = view(memory.line, keep.size - inside, np.bool_)
    for j in range(behind.size):
        behind[j] = not args["sources"]
    mode, narrow = writing.mode, width < NARROW and not writing.mode.stream
    passing = Move(width, COPY, mode.scale, mode.stream, np.int64(0), narrow, mode.memory)
    padding = Writing(passing, COPY, False, False)
    for piece in range(plan["pieces"]):
        at, dst_at, src_at = piece * width, dst + piece * plan["out_piece"], src + piece * plan["x_piece"]
        fill = args["fill"] + at if args["fill"] else 0
        _write(dst_at, dst_step, src_at, src_step, keep[:inside], scale, scales, fill, writing, memory)
        if behind.size:
            fill = args["padding"] + at if args["padding"] else 0
            dst_at, src_at = dst_at + inside * dst_step, src_at + inside * src_step
            _write(dst_at, dst_step, src_at, src_step, behind, scale, np.int64(0), fill, padding, memory)


@inlined_jit
def _write_across(
    dst: int, src: int, flags: int, pitch: int, rows: int, count: int, plan: Any, fill: int, writing: Writing,
    memory: Memory,
) -> None:  # fmt: skip
    """Write messages of rows that lie beside each other, position by position, as they lie."""
    line = view(memory.line, rows, np.bool_)
    keep = view(flags, rows * pitch, np.bool_)
    for j in range(count):
        for row in range(rows):
            line[row] = keep[row * pitch + j]
        _write(
            dst + j * plan["out_step"], plan["out_row"], src + j * plan["x_step"], plan["x_row"], line, plan["scale"],
            np.int64(0), fill, writing, memory,
        )  # fmt: skip


@inner_jit
def _draw_row(
    flags: int, plan_address: int, args_address: int, mask: int, seed: int, decide: int, index: int, position: int,
    count: int, known: int, memory: Memory,
) -> int:  # fmt: skip
    """Set the flags of `count` messages of a row, and the mask if there is one; returns how many aren't padding."""
    plan, args = view(plan_address, 1, PLAN)[0], view(args_address, 1, MASK_ARGS)[0]
    inside = max(0, min(count, row_valid(plan, args, index) - position))
    at = mask + index * plan["size"] + position
    if args["given"]:
        copy_bytes(flags, at, count)
    elif decide:
        call(decide, flags, memory.words, plan_address, args_address, seed, index, position, inside, known)
    else:
        keep_plain(flags, memory.words, plan, args, seed, index, position, inside)
    keep_rest(flags, inside, count)
    if mask and not args["given"]:
        copy_bytes(at, flags, count)
    return inside  # type: ignore[no-any-return]


@inlined_jit
def _write_tile(
    x: int, out: int, seed: int, tile: Any, plan: Any, args: Any, alike: Any, across: Any, writing: Writing,
    memory: Memory,
) -> None:  # fmt: skip
    """Write the messages of a tile: (row, position, rows, messages of a row, of those before padding, flags of a row).

    Args:
        alike: all messages have the same factor. across: write position by position.
    """
    index, position, rows, count, inside, pitch = tile
    source = x + index * plan["x_row"]
    if args["sources"]:
        source = view(args["sources"] + 8 * index, 1, np.int64)[0]
    src = source + position * plan["x_step"]
    dst = out + index * plan["out_row"] + position * plan["out_step"]
    if across:
        _write_across(dst, src, memory.flags, pitch, rows, count, plan, args["fill"], writing, memory)
        return
    keep = view(memory.flags, rows * count, np.bool_)
    scale: Any = plan["scale"]
    scales: Any = np.int64(0)
    if alike:
        inside = rows * count  # padding is kept, and passes as it is
    elif plan["kind"] != COPY:
        row = make_row(memory.words, plan, args, seed, index)
        scale = row_scale(plan, row)
        scales = message_scales(memory.scales, plan, args, row, scale, index, position, inside)
    _write_row(dst, src, keep, inside, plan, args, scale, scales, writing, memory)


@inlined_jit
def _scales_differ(plan: Any, args: Any) -> Any:
    """True if the messages of a call may have different factors."""
    own = args["scales"] or args["protect"] or args["lengths"]
    return own or plan["spares"] or plan["exact"] or plan["ranged"]


@jit
def drop_range(
    first: int, last: int, plan_address: int, args_address: int, x: int, out: int, mask: int, seed: int, decide: int
) -> None:
    """Drop among the messages first..last - 1, counted in C order; there is one at least.

    Addresses are integers, 0 where there is none: `plan_address` (one PLAN), `args_address` (one MASK_ARGS), `x`, `out`
    (equal: in place; without `out` only the mask is made), `mask` (bool a message, written, or read where given), and
    `decide` (of `rules.decide`, where more than a draw of its own decides on a message). All are Python integers, the
    seed as the int64 of its bits: one compiled version serves every call.

    A tile is a part of a row. It is several whole rows if all messages have the same factor, and the rows are adjacent
    in memory, or transposed (batch first outputs of an RNN).
    """
    plan, args, memory = view(plan_address, 1, PLAN)[0], view(args_address, 1, MASK_ARGS)[0], _memory(stack(MEMORY))
    zero_bytes(memory.move, NARROW)
    for row in range(8):
        view(memory.known + 24 * row, 1, np.int64)[0] = -1
    size, writing = plan["size"], _writing(plan, args, x, out, last - first, memory)
    alike = not args["sources"] and (plan["kind"] == COPY or not _scales_differ(plan, args))
    beside = alike and out and plan["transposed"]
    behind = alike and plan["x_row"] == size * plan["x_step"] and plan["out_row"] == size * plan["out_step"]
    while first < last:
        index, position, rows = first // size, first % size, 1
        stop = min(size, position + last - first)
        if position == 0 and last - first >= size and beside:
            rows = min((last - first) // size, min(BLOCK, TILE // whole_groups(min(size, BLOCK))))
        elif position == 0 and last - first >= size and behind and size < BLOCK:
            rows = min((last - first) // size, BLOCK // size)
        first += rows * (stop - position)
        while position < stop:
            count, inside = min(BLOCK, stop - position), 0
            pitch = whole_groups(count) if beside else count
            for row in range(rows):
                inside = _draw_row(
                    memory.flags + row * pitch, plan_address, args_address, mask, seed, decide, index + row, position,
                    count, memory.known + 24 * (row & 7), memory,
                )  # fmt: skip
            if out:
                tile = index, position, rows, count, inside, pitch
                _write_tile(x, out, seed, tile, plan, args, alike, beside and rows > 1, writing, memory)
            position += count


@jit
def scale_rows(plan_address: int, args_address: int, seed: int, rows: int, scales: int) -> None:
    """Write what each row's kept messages are multiplied by, float64, to the address `scales`."""
    plan, args = view(plan_address, 1, PLAN)[0], view(args_address, 1, MASK_ARGS)[0]
    words, each = stack(MEMORY), view(scales, rows, np.float64)
    for index in range(rows):
        each[index] = row_scale(plan, make_row(words, plan, args, seed, index))


@parallel_jit
def drop_parallel(
    kernel: int, messages: int, plan: int, args: int, x: int, out: int, mask: int, seed: int, decide: int, chunks: int
) -> None:
    """`drop_range` over all messages in `chunks` equal parts, on numba's threads.

    By its address, `kernel`: a call by name would compile it into this function once more.
    """
    for c in prange(chunks):
        start, stop = messages * c // chunks, messages * (c + 1) // chunks
        call(kernel, start, stop, plan, args, x, out, mask, seed, decide)
