"""The draw step on the CPU: every rule (CONTRACT.md, 3), a block of positions at a time.

A position is a *candidate* where the rule by itself drops it. Where the number of dropped messages is limited (`exact`,
`min_keep`), a candidate drops only if its (draw, position) lies below a cutoff, found by radix selection. Both are
functions of the position alone, so that a row may be cut anywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba.kernels._jit import inlined_jit, inner_jit, jit
from msgdrop_numba.kernels.memory import stack, view
from msgdrop_numba.kernels.philox import draw_block, draw_each, fold_in
from msgdrop_numba.kernels.records import BLOCK, MASK_ARGS, PLAN

Array = np.ndarray[Any, Any]

NUMBERS = 8 * BLOCK  # bytes of a number for each
COUNTS = 8 * 256
# Draws are made and compared in whole groups, so that no vector loop leaves a rest to be done one by one.
GROUP = 64

STREAM_DRAW, STREAM_PHASE, STREAM_LIMIT, STREAM_RANGE = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(3)
EVERYTHING = np.uint64(2**32)  # a cutoff above all draws
_8, _32, _255 = np.uint64(8), np.uint64(32), np.uint64(255)


@inlined_jit
def whole_groups(count: int) -> int:
    """`count` rounded up: as many positions are drawn."""
    return (count + GROUP - 1) & -GROUP


class Row(NamedTuple):
    """The numbers that all decisions on one row share. An address of 0 means that there is no such array."""

    seed: Any
    key: Any
    phase: Any  # where in a span the row begins
    threshold: Any  # T(p)
    thresholds: Any  # where p is an array: uint64, one a message
    protect: Any  # bool, one a message
    eligible: Any  # the number of eligible messages
    offset: Any  # the first message's position
    positions: Any  # int64, one a message, where they aren't consecutive


class Cutoff(NamedTuple):
    """The limit of a row: candidates drop if their (draw, position) lies below it."""

    draw: Any  # EVERYTHING: all of them
    position: Any


@inner_jit
def _draw_run(words: int, seed: Any, key: Any, stream: Any, first: Any, count: Any) -> Any:
    """Make the draws of `count` positions from `first` on, and some more behind them; returns where they lie."""
    skip = first & 3
    draw_block(seed, key, stream, np.uint64(first >> 2), view(words, whole_groups(skip + count), np.uint32))
    return words + 4 * skip


@inner_jit
def _draw(words: int, row: Row, stream: Any, first: int, count: int) -> Any:
    """Make the draws of a row's messages from `first` on; returns where they lie."""
    if not row.positions:
        return _draw_run(words, row.seed, row.key, stream, first + row.offset, count)
    draw_each(
        row.seed, row.key, stream, view(row.positions + 8 * first, count, np.int64), view(words, count, np.uint32)
    )
    return words


@inlined_jit
def _first_draw(words: int, seed: Any, key: Any, stream: Any) -> Any:
    """The draw at counter 0 of a stream. It belongs to the row, and doesn't depend on positions."""
    first, count = np.int64(0), np.int64(1)  # written as 0 and 1, these would be types of their own: compiled once more
    return np.uint64(view(_draw_run(words, seed, key, stream, first, count), 1, np.uint32)[0])


@inlined_jit
def make_row(words: int, plan: Any, args: Any, bits: int, index: int) -> Row:
    """The `Row` of this index. `bits` are those of the seed, as int64."""
    seed = np.uint64(np.int64(bits))
    key = view(args["keys"] + 8 * index, 1, np.uint64)[0] if args["keys"] else np.uint64(index)
    thresholds, protect, positions = args["thresholds"], args["protect"], args["positions"]
    if args["per_row"]:
        thresholds += 8 * plan["size"] * index
    phase, threshold = np.int64(0), np.uint64(plan["threshold"])
    if plan["span"] > 1:
        phase = row_phase(plan["span"], _first_draw(words, seed, key, STREAM_PHASE))
    if plan["ranged"]:
        threshold = row_threshold(threshold, plan["spread"], _first_draw(words, seed, key, STREAM_RANGE))
    eligible = max(0, row_valid(plan, args, index) - plan["prefix"])
    if args["taking"]:
        eligible = view(args["taking"] + 8 * index, 1, np.int64)[0]
    return Row(
        seed, key, phase, threshold, thresholds, protect + args["protect_row"] * index if protect else 0, eligible,
        args["offset"], positions + args["positions_row"] * index if positions else 0,
    )  # fmt: skip


@inlined_jit
def row_valid(plan: Any, args: Any, index: int) -> Any:
    """The messages of a row before its padding."""
    return view(args["lengths"] + 8 * index, 1, np.int64)[0] if args["lengths"] else plan["size"]


@inlined_jit
def multiply_shift(a: Any, b: Any, shift: int) -> Any:
    """(a * b) >> shift for a < 2**34, b < 2**34, 17 <= shift: the product may not fit into 64 bits."""
    high, low = b >> 17, b & 0x1FFFF
    return (a * high + ((a * low) >> 17)) >> (shift - 17)


# Scalar rules, compiled for the CPU and for CUDA devices from this one source.


@inlined_jit
def row_phase(span: Any, draw: Any) -> Any:
    """The place in a span where a row begins. Drawn so, every position keeps the marginal probability p."""
    return multiply_shift(span, np.int64(draw), 32)


@inlined_jit
def row_threshold(threshold: Any, spread: Any, draw: Any) -> Any:
    """T(p) of a row that draws its own p of a range."""
    return np.uint64(threshold) + ((np.uint64(spread) * draw) >> _32)


@inlined_jit
def may_drop(eligible: Any, threshold: Any, exact: Any, min_keep: Any) -> Any:
    """The number of a row's eligible messages that may drop; with `exact` the number that does, floor(n p)."""
    limit = max(np.int64(0), eligible - min_keep)
    if exact:
        limit = min(limit, multiply_shift(eligible, 2 * np.int64(threshold) + 1, 33))
    return limit


@inlined_jit
def range_scale(threshold: Any) -> Any:
    """1 / (1 - p) of a row that drew its own p, and 1 where that is 1."""
    return 1.0 if threshold == EVERYTHING else 2.0**32 / float(np.int64(EVERYTHING - threshold))


@inlined_jit
def exact_scale(eligible: Any, dropped: Any) -> Any:
    """n / (n - d) where exactly d of n messages drop."""
    return float(eligible) / float(max(np.int64(1), eligible - dropped))


@inlined_jit
def row_scale(plan: Any, row: Row) -> float:
    """The factor of the kept messages of a row that take part."""
    if plan["drops_all"] or (plan["ranged"] and row.threshold == EVERYTHING):
        return 1.0
    if plan["exact"]:
        return exact_scale(row.eligible, _row_may_drop(plan, row))  # type: ignore[no-any-return]
    if plan["ranged"]:
        return range_scale(row.threshold)  # type: ignore[no-any-return]
    return float(plan["scale"])


@inner_jit
def _row_may_drop(plan: Any, row: Row) -> Any:
    return may_drop(row.eligible, row.threshold, plan["exact"], plan["min_keep"])


@inner_jit
def _candidates(memory: int, words: int, plan: Any, row: Row, first: int, count: int) -> None:
    """Set the flags in `memory`: whether message first + j drops by the rule itself, before any limit."""
    drop = view(memory, whole_groups(count), np.bool_)
    if plan["exact"]:
        for j in range(drop.size):
            drop[j] = True
    elif plan["span"] == 1 and not row.thresholds:
        draws = view(_draw(words, row, STREAM_DRAW, first, count), drop.size, np.uint32)
        for j in range(drop.size):
            drop[j] = np.uint64(draws[j]) < row.threshold
    else:
        _candidates_of_spans(drop[:count], words, plan, row, first)
    if row.protect or first < plan["prefix"]:
        _spare_protected(drop[:count], plan, row, first)


@inner_jit
def _candidates_of_spans(drop: Array, words: int, plan: Any, row: Row, first: int) -> None:
    """`_candidates` for rules with a span, or with one threshold a message."""
    span, count, start = plan["span"], drop.size, first + row.offset + row.phase
    thresholds = view(row.thresholds + 8 * first, count if row.thresholds else 0, np.uint64)
    if row.positions:
        groups = view(stack(NUMBERS), count, np.int64)
        positions = view(row.positions + 8 * first, count, np.int64)
        for j in range(count):
            groups[j] = (positions[j] + row.phase) // span
        each = view(words, count, np.uint32)
        draw_each(row.seed, row.key, STREAM_DRAW, groups, each)
        for j in range(count):
            drop[j] = np.uint64(each[j]) < (thresholds[j] if row.thresholds else row.threshold)
        return
    group, inside = start // span, start % span
    run = (start + count - 1) // span - group + 1
    draws = view(_draw_run(words, row.seed, row.key, STREAM_DRAW, group, run), run, np.uint32)
    group = 0
    for j in range(count):
        drop[j] = np.uint64(draws[group]) < (thresholds[j] if row.thresholds else row.threshold)
        inside += 1
        if inside == span:
            inside = 0
            group += 1


@inner_jit
def _spare_protected(drop: Array, plan: Any, row: Row, first: int) -> None:
    for j in range(min(drop.size, plan["prefix"] - first)):
        drop[j] = False
    protect = view(row.protect + first, drop.size if row.protect else 0, np.bool_)
    for j in range(protect.size):
        drop[j] = drop[j] and not protect[j]


@inner_jit
def message_scales(
    memory: int, plan: Any, args: Any, row: Row, scale: float, index: int, first: int, count: int
) -> int:  # fmt: skip
    """The address of the factors of messages from `first` on, 0 for one that passes; address 0: all have `scale`.

    They are those of the draw, or in `memory` where some of the messages take no part.
    """
    scales = args["scales"]
    if scales and args["per_row"]:
        scales += 8 * plan["size"] * index
    if not (row.protect or first < plan["prefix"]):
        return scales + 8 * first if scales else 0
    each = view(memory, count, np.float64)
    given = view(scales + 8 * first, count if scales else 0, np.float64)
    protect = view(row.protect + first, count if row.protect else 0, np.bool_)
    for j in range(count):
        eligible = first + j >= plan["prefix"] and not (row.protect and protect[j])
        each[j] = (given[j] if scales else scale) if eligible else 0.0
    return memory


@inlined_jit
def _limit_stream(plan: Any) -> Any:
    """The stream of the draws that decide which candidates drop, where not all of them may."""
    return STREAM_DRAW if plan["exact"] else STREAM_LIMIT


@inner_jit
def row_cutoff(memory: int, words: int, plan: Any, row: Row, valid: int) -> Cutoff:
    """The cutoff of a row of `valid` messages: candidates at or above it are kept, so that no more drop than may.

    Radix selection on the 32-bit draws, eight bits a pass, drawn anew in each pass: O(n), no memory of size n.
    """
    if not plan["count_limited"]:
        return Cutoff(EVERYTHING, np.int64(0))
    stream = _limit_stream(plan)
    limit = _row_may_drop(plan, row)
    leading_bits, counts, drop = np.uint64(0), view(stack(COUNTS), 256, np.int64), view(memory, BLOCK, np.bool_)
    for shift in (24, 16, 8, 0):
        low = np.uint64(shift)
        for digit in range(256):
            counts[digit] = 0
        candidates = 0
        for first in range(0, valid, BLOCK):
            count = min(BLOCK, valid - first)
            _candidates(memory, words, plan, row, first, count)
            draws = view(_draw(words, row, stream, first, count), count, np.uint32)
            for j in range(count):
                digits = np.uint64(draws[j]) >> low
                if drop[j] and digits >> _8 == leading_bits:
                    counts[digits & _255] += 1
                    candidates += 1
        if shift == 24 and candidates <= limit:
            return Cutoff(EVERYTHING, np.int64(0))
        digit = 0
        while limit >= counts[digit]:
            limit -= counts[digit]
            digit += 1
        leading_bits = (leading_bits << _8) | np.uint64(digit)
        if limit == 0:
            return Cutoff(leading_bits << low, np.int64(0))
    return Cutoff(leading_bits, _after_ties(memory, words, plan, row, valid, leading_bits, limit))


@inlined_jit
def _after_ties(memory: int, words: int, plan: Any, row: Row, valid: int, draw: Any, ties: int) -> Any:
    """The position behind the first `ties` candidates with exactly this draw."""
    drop = view(memory, BLOCK, np.bool_)
    for first in range(0, valid, BLOCK):
        count = min(BLOCK, valid - first)
        _candidates(memory, words, plan, row, first, count)
        draws = view(_draw(words, row, _limit_stream(plan), first, count), count, np.uint32)
        for j in range(count):
            if drop[j] and draws[j] == draw:
                ties -= 1
                if ties == 0:
                    return first + j + 1
    return valid


@inner_jit
def _keep_candidates(memory: int, words: int, plan: Any, row: Row, cutoff: Cutoff, first: int, count: int) -> None:
    """Turn the flags of candidates into those of kept messages."""
    keep = view(memory, whole_groups(count), np.bool_)
    if cutoff.draw == EVERYTHING:
        for j in range(keep.size):
            keep[j] = not keep[j]
        return
    draws = view(_draw(words, row, _limit_stream(plan), first, count), count, np.uint32)
    for j in range(count):
        draw = np.uint64(draws[j])
        keep[j] = not (keep[j] and (draw < cutoff.draw or (draw == cutoff.draw and first + j < cutoff.position)))


@jit
def decide(
    memory: int,
    words: int,
    plan_address: int,
    args_address: int,
    seed: int,
    index: int,
    first: int,
    count: int,
    known: int,
) -> None:
    """Set the flags in `memory`: whether the positions first..first + count - 1 of a row are kept, by any rule.

    Addresses are integers, as for `cpu.drop_range`. `known` is a cache of one cutoff, three int64: (row index or -1,
    draw, position). A row that comes in several parts searches its cutoff once.
    """
    plan, args = view(plan_address, 1, PLAN)[0], view(args_address, 1, MASK_ARGS)[0]
    row = make_row(words, plan, args, seed, index)
    found, draws = view(known, 3, np.int64), view(known, 3, np.uint64)
    if found[0] != index:
        cutoff = row_cutoff(memory, words, plan, row, row_valid(plan, args, index))
        found[0], draws[1], found[2] = index, cutoff.draw, cutoff.position
    _candidates(memory, words, plan, row, first, count)
    _keep_candidates(memory, words, plan, row, Cutoff(draws[1], found[2]), first, count)


@inlined_jit
def keep_plain(memory: int, words: int, plan: Any, args: Any, seed: int, index: int, first: int, count: int) -> None:
    """`decide` where each message drops by a draw of its own, at the plan's p, and by nothing else."""
    key = view(args["keys"] + 8 * index, 1, np.uint64)[0] if args["keys"] else np.uint64(index)
    first_word = _draw_run(words, np.uint64(np.int64(seed)), key, STREAM_DRAW, first + args["offset"], count)
    keep, threshold = view(memory, whole_groups(count), np.bool_), np.uint64(plan["threshold"])
    draws = view(first_word, keep.size, np.uint32)
    for j in range(keep.size):
        keep[j] = np.uint64(draws[j]) >= threshold


@inlined_jit
def keep_rest(memory: int, inside: int, count: int) -> None:
    """Set the flags of padding, which is kept."""
    keep = view(memory, count, np.bool_)
    for j in range(inside, count):
        keep[j] = True


@jit
def lengths_fit(lengths: int, rows: int, size: int) -> bool:
    """True if all int64 at the address, one a row, are from 0 to `size`."""
    fit = True
    for length in view(lengths, rows, np.int64):
        fit &= 0 <= length <= size
    return fit


@jit
def fold_rows(keys: int, inner: int, first: int, last: int, folded: int) -> None:
    """The keys of the rows first..last - 1, from keys that lack their trailing dims, `inner` rows each; all uint64."""
    given, made = view(keys, (last - 1) // inner + 1, np.uint64), view(folded, last - first, np.uint64)
    for row in range(first, last):
        made[row - first] = fold_in(given[row // inner], np.uint64(row % inner))
