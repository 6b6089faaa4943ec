"""Which messages of a row drop: every rule (CONTRACT.md, 3), a block of positions at a time.

A position is a *candidate* where the rule by itself drops it. Where the number of dropped messages is limited (`exact`,
`min_keep`), a candidate drops only if its (draw, position) lies below a cutoff, found by radix selection. Both are
functions of the position alone, so that a row may be cut anywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba.kernels._jit import inlined_jit, inner_jit, jit
from msgdrop_numba.kernels.memory import view
from msgdrop_numba.kernels.philox import draw_block, fold_in

Array = np.ndarray[Any, Any]

# The rule, as the kernels read it from the plan. Each is an attribute of `DropRule`.
RULE = [
    ("threshold", np.int64),  # T(p)
    ("certain", np.int64),  # p = 1
    ("limited", np.int64),  # whether fewer may drop than the draws alone say
    ("exact", np.int64),
    ("span", np.int64),
    ("min_keep", np.int64),
]

# Positions drawn at a time: words and flags stay in the first-level cache.
BLOCK = 1024
# Draws are made and compared in whole groups, so that no vector loop leaves a rest to be done one by one.
GROUP = 64

STREAM_DRAW, STREAM_PHASE, STREAM_LIMIT = np.uint64(0), np.uint64(1), np.uint64(2)
EVERYTHING = np.uint64(2**32)  # a cutoff above all draws
_8, _255 = np.uint64(8), np.uint64(255)


@inlined_jit
def whole_groups(count: int) -> int:
    """`count` rounded up: as many positions are drawn."""
    return (count + GROUP - 1) & -GROUP


class Row(NamedTuple):
    """What a row's draws come from, and what they are compared with."""

    seed: Any
    key: Any
    thresholds: int  # where p is an array: uint64, one a position
    phase: Any  # where in a span the row begins


class Cutoff(NamedTuple):
    """Which candidates drop: those whose (draw, position) lies below."""

    draw: Any  # EVERYTHING: all of them
    position: Any


@inner_jit
def _draw(words: int, seed: Any, key: Any, stream: Any, first: int, count: int) -> int:
    """Make the draws of `count` positions from `first` on, and some more behind them; returns where they lie."""
    skip = first & 3
    draw_block(seed, key, stream, np.uint64(first >> 2), view(words, whole_groups(skip + count), np.uint32))
    return words + 4 * skip


@inlined_jit
def row_phase(words: int, plan: Any, seed: Any, key: Any) -> Any:
    """Where in a span the row begins, so that every position keeps the marginal probability p."""
    if plan["span"] == 1:
        return 0
    draws = view(_draw(words, seed, key, STREAM_PHASE, 0, 1), 1, np.uint32)
    return multiply_shift(plan["span"], np.int64(draws[0]), 32)


@jit
def multiply_shift(a: Any, b: Any, shift: int) -> Any:
    """(a * b) >> shift for a < 2**34, b < 2**34, 17 <= shift: the product may not fit into 64 bits."""
    high, low = b >> 17, b & 0x1FFFF
    return (a * high + ((a * low) >> 17)) >> (shift - 17)


@inner_jit
def dropped_exactly(plan: Any, valid: int) -> Any:
    """How many of `valid` messages the exact rule drops: floor(valid * p), in integers."""
    wanted = multiply_shift(valid, 2 * plan["threshold"] + 1, 33)
    return min(wanted, max(0, valid - plan["min_keep"]))


@inlined_jit
def row_scale(plan: Any, valid: int) -> float:
    """What the kept messages of a row are multiplied by: n / (n - d) where exactly d of n drop."""
    if not plan["exact"] or plan["certain"]:
        return float(plan["scale"])
    return valid / float(max(1, valid - dropped_exactly(plan, valid)))


@inner_jit
def _candidates(memory: int, words: int, plan: Any, row: Row, first: int, count: int) -> None:
    """Set the flags in `memory`: whether position first + j drops by the rule itself, before any limit."""
    drop = view(memory, whole_groups(count), np.bool_)
    if plan["exact"]:
        drop[:] = True
        return
    span, threshold = plan["span"], np.uint64(plan["threshold"])
    if span == 1 and not row.thresholds:
        draws = view(_draw(words, row.seed, row.key, STREAM_DRAW, first, count), drop.size, np.uint32)
        for j in range(drop.size):
            drop[j] = np.uint64(draws[j]) < threshold
        return
    group, inside = (first + row.phase) // span, (first + row.phase) % span
    groups = (first + row.phase + count - 1) // span - group + 1
    draws = view(_draw(words, row.seed, row.key, STREAM_DRAW, group, groups), groups, np.uint32)
    thresholds = view(row.thresholds + 8 * first, count if row.thresholds else 0, np.uint64)
    group = 0
    for j in range(count):
        drop[j] = np.uint64(draws[group]) < (thresholds[j] if row.thresholds else threshold)
        inside += 1
        if inside == span:
            inside = 0
            group += 1


@inlined_jit
def _limit_stream(plan: Any) -> Any:
    """The stream of the draws that decide which candidates drop, where not all of them may."""
    return STREAM_DRAW if plan["exact"] else STREAM_LIMIT


@inner_jit
def row_cutoff(memory: int, words: int, plan: Any, row: Row, valid: int) -> Cutoff:
    """What holds for a whole row of `valid` messages, so that no more of them drop than may.

    Radix selection on the 32-bit draws, eight bits a pass, drawn anew in each pass: O(n), no memory of size n.
    """
    if not plan["limited"]:
        return Cutoff(EVERYTHING, np.int64(0))
    stream = _limit_stream(plan)
    limit = dropped_exactly(plan, valid) if plan["exact"] else max(0, valid - plan["min_keep"])
    prefix, counts, drop = np.uint64(0), np.zeros(256, np.int64), view(memory, BLOCK, np.bool_)
    for shift in (24, 16, 8, 0):
        low = np.uint64(shift)
        counts[:] = 0
        for first in range(0, valid, BLOCK):
            count = min(BLOCK, valid - first)
            _candidates(memory, words, plan, row, first, count)
            draws = view(_draw(words, row.seed, row.key, stream, first, count), count, np.uint32)
            for j in range(count):
                digits = np.uint64(draws[j]) >> low
                if drop[j] and digits >> _8 == prefix:
                    counts[digits & _255] += 1
        if shift == 24 and counts.sum() <= limit:
            return Cutoff(EVERYTHING, np.int64(0))
        digit = 0
        while limit >= counts[digit]:
            limit -= counts[digit]
            digit += 1
        prefix = (prefix << _8) | np.uint64(digit)
        if limit == 0:
            return Cutoff(prefix << low, np.int64(0))
    return Cutoff(prefix, _after_ties(memory, words, plan, row, valid, prefix, limit))


@inlined_jit
def _after_ties(memory: int, words: int, plan: Any, row: Row, valid: int, draw: Any, ties: int) -> Any:
    """The position behind the first `ties` candidates with exactly this draw."""
    drop = view(memory, BLOCK, np.bool_)
    for first in range(0, valid, BLOCK):
        count = min(BLOCK, valid - first)
        _candidates(memory, words, plan, row, first, count)
        draws = view(_draw(words, row.seed, row.key, _limit_stream(plan), first, count), count, np.uint32)
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
    draws = view(_draw(words, row.seed, row.key, _limit_stream(plan), first, count), count, np.uint32)
    for j in range(count):
        draw = np.uint64(draws[j])
        keep[j] = not (keep[j] and (draw < cutoff.draw or (draw == cutoff.draw and first + j < cutoff.position)))


@inlined_jit
def keep_block(memory: int, words: int, plan: Any, row: Row, cutoff: Cutoff, first: int, count: int) -> None:
    """Set the flags in `memory`: whether a row's positions from `first` on are kept."""
    _candidates(memory, words, plan, row, first, count)
    _keep_candidates(memory, words, plan, row, cutoff, first, count)


@jit
def fold_rows(keys: Array, inner: int, first: int, folded: Array) -> None:
    """The keys of the rows from `first` on, from keys that lack their trailing dims, `inner` rows each."""
    for j in range(folded.size):
        row = first + j
        folded[j] = fold_in(keys[row // inner], np.uint64(row % inner))
