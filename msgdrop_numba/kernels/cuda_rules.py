"""The rules on a CUDA device, as rules.py has them for the CPU; `select`, a block a row, finds where limited rows stop.

It writes each row's cutoff, which `drop` of cuda.py then compares draws with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba.cuda
import numpy as np

from msgdrop_numba.kernels import philox, rules
from msgdrop_numba.kernels.cuda_memory import SIMULATOR, Device, device, number
from msgdrop_numba.kernels.rules import EVERYTHING, STREAM_DRAW, STREAM_LIMIT, STREAM_PHASE, STREAM_RANGE

cuda: Any = numba.cuda  # of which the simulator, the built-in target and numba-cuda each know other types

BITS, BINS = 8, 256  # of a draw, selected by in one pass; the counts of that pass; tests make them small
_M32, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def _shared_source(function: Device) -> Device:
    """A device function of the source that the CPU kernels are compiled from."""
    return function if SIMULATOR else device(getattr(function, "py_func", function))


_philox4x32_10 = _shared_source(philox.philox4x32_10)
_fold_in = _shared_source(philox.fold_in)
_row_phase = _shared_source(rules.row_phase)
_row_threshold = _shared_source(rules.row_threshold)
_may_drop = _shared_source(rules.may_drop)
_range_scale = _shared_source(rules.range_scale)
_exact_scale = _shared_source(rules.exact_scale)

_load_int, _store_int = number(np.int64)
_load_word, _store_word = number(np.uint64)
_load_float, _ = number(np.float64)
_load_byte, _ = number(np.uint8)


class Rule(NamedTuple):
    """The rule, as the kernels' arguments name it: `records.RULE`."""

    threshold: int
    spread: int
    ranged: int
    drops_all: int
    exact: int
    span: int
    min_keep: int
    prefix: int


class CudaArgs(NamedTuple):
    """The other arguments of a mask: counts, flags and addresses. Each field is a name in `cuda_launch._NAMES`."""

    size: int
    given: int
    lengths: int
    keys: int
    inner: int
    thresholds: int
    row_bytes: int
    protect: int
    protect_row: int
    taking: int  # the eligible messages of each row
    offset: int
    positions: int
    positions_row: int
    seed: int


class Row(NamedTuple):
    """The values of a whole row, as on the CPU. An address of 0 means none."""

    seed: Any
    key: Any
    valid: Any  # messages before its padding
    eligible: Any
    phase: Any
    threshold: Any
    thresholds: Any
    protect: Any
    offset: Any
    positions: Any


@device
def _row_key(keys: int, inner: int, row: Any) -> Any:
    """The key of a row, of keys that stand for `inner` rows each, into which its index is folded; 0: one each."""
    if not keys:
        return np.uint64(row)
    if not inner:
        return _load_word(keys + 8 * row)
    return _fold_in(_load_word(keys + 8 * (row // inner)), np.uint64(row % inner))


@device
def _draw(seed: Any, key: Any, i: Any, stream: Any) -> Any:
    counter = np.uint64(i >> 2)
    w0, w1, w2, w3 = _philox4x32_10(counter, stream, key & _M32, key >> _32, seed & _M32, seed >> _32)
    word = i & 3
    return (w0 if word == 0 else w1) if word < 2 else (w2 if word == 2 else w3)


@device
def _first_draw(seed: Any, key: Any, stream: Any) -> Any:
    """The draw that a row makes for itself, whatever its positions."""
    return np.uint64(_draw(seed, key, np.int64(0), stream))


@device
def make_row(rule: Rule, args: CudaArgs, index: Any) -> Row:
    """The `Row` of this index. Lengths are clamped, because the host can't check them without waiting."""
    seed = _load_word(args.seed) if args.seed else np.uint64(0)
    key, size = _row_key(args.keys, args.inner, index), np.int64(args.size)
    valid = min(max(_load_int(args.lengths + 8 * index), np.int64(0)), size) if args.lengths else size
    eligible = _load_int(args.taking + 8 * index) if args.taking else max(np.int64(0), valid - rule.prefix)
    phase, threshold = np.int64(0), np.uint64(rule.threshold)
    if rule.span > 1 and not args.given:
        phase = np.int64(_row_phase(rule.span, _first_draw(seed, key, STREAM_PHASE)))
    if rule.ranged:
        threshold = _row_threshold(threshold, rule.spread, _first_draw(seed, key, STREAM_RANGE))
    return Row(
        seed, key, valid, eligible, phase, threshold,
        args.thresholds + args.row_bytes * index if args.thresholds else np.int64(0),
        args.protect + args.protect_row * index if args.protect else np.int64(0),
        args.offset,
        args.positions + args.positions_row * index if args.positions else np.int64(0),
    )  # fmt: skip


@device
def is_eligible(rule: Rule, row: Row, i: Any) -> Any:
    """True if message i is neither padding nor protected."""
    if i < rule.prefix or i >= row.valid:
        return False
    return not row.protect or _load_byte(row.protect + i) == 0


@device
def _position(row: Row, i: Any) -> Any:
    return _load_int(row.positions + 8 * i) if row.positions else i + row.offset


@device
def _candidate(rule: Rule, row: Row, i: Any) -> Any:
    """True if message i, which is eligible, drops by the rule itself, before any limit."""
    if rule.exact:
        return True
    threshold = _load_word(row.thresholds + 8 * i) if row.thresholds else row.threshold
    position = _position(row, i)
    group = position if rule.span == 1 else (position + row.phase) // rule.span
    return _draw(row.seed, row.key, group, STREAM_DRAW) < threshold


@device
def _limit_draw(rule: Rule, row: Row, i: Any) -> Any:
    """The draw that ranks candidate i against the row's cutoff."""
    return _draw(row.seed, row.key, _position(row, i), STREAM_DRAW if rule.exact else STREAM_LIMIT)


@device
def keeps(rule: Rule, row: Row, i: Any, limit: Any) -> Any:
    """True if message i, which is eligible, is kept. `limit` is the address of the row's cutoff, 0: it has none."""
    if not _candidate(rule, row, i):
        return True
    if not limit:
        return False
    cutoff, end = _load_word(limit), _load_int(limit + 8)
    if cutoff == EVERYTHING:
        return False
    draw = _limit_draw(rule, row, i)
    return draw > cutoff or (draw == cutoff and i >= end)


@device
def _row_may_drop(rule: Rule, row: Row) -> Any:
    return _may_drop(row.eligible, row.threshold, rule.exact, rule.min_keep)


@device
def scale_of_kept(rule: Rule, row: Row, scale: float, place: Any) -> Any:
    """The factor of a kept message that is eligible; `place` is the address of its own scale, 0: it has none."""
    if rule.drops_all or (rule.ranged and row.threshold == EVERYTHING):
        return 1.0
    if rule.exact:
        return _exact_scale(row.eligible, _row_may_drop(rule, row))
    if rule.ranged:
        return _range_scale(row.threshold)
    return _load_float(place) if place else scale


@device
def _count(counts: Any, leading: Any, shift: Any, rule: Rule, row: Row) -> None:
    i = np.int64(cuda.threadIdx.x)
    while i < row.valid:
        if is_eligible(rule, row, i) and _candidate(rule, row, i):
            digits = _limit_draw(rule, row, i) >> shift
            if digits >> np.uint64(BITS) == leading:
                cuda.atomic.add(counts, np.int64(digits & np.uint64(BINS - 1)), 1)
        i += cuda.blockDim.x


@device
def _choose(counts: Any, chosen: Any, limit: Any) -> None:
    """The digit in which the limit is reached, and what is left of the limit there."""
    j = cuda.threadIdx.x
    while j < BINS:
        below = np.int64(0)
        for k in range(j):
            below += counts[k]
        if below <= limit < below + counts[j]:
            chosen[0] = j
            chosen[1] = limit - below
        j += cuda.blockDim.x


@device
def _next_tie(chosen: Any, after: Any, draw: Any, rule: Rule, row: Row) -> Any:
    """The first position from `after` on of a candidate with exactly this draw."""
    chosen[2] = row.valid
    cuda.syncthreads()
    i = after + cuda.threadIdx.x
    while i < row.valid:
        if is_eligible(rule, row, i) and _candidate(rule, row, i) and _limit_draw(rule, row, i) == draw:
            cuda.atomic.min(chosen, 2, i)
        i += cuda.blockDim.x
    cuda.syncthreads()
    found = chosen[2]
    cuda.syncthreads()
    return found


def select(rows: int, rule: Rule, args: CudaArgs, limits: int) -> None:
    """Write each row's cutoff to `limits`, 16 bytes a row: the (draw, position) below which candidates drop."""
    counts = cuda.shared.array(BINS, np.int64)
    chosen = cuda.shared.array(3, np.int64)
    index = np.int64(cuda.blockIdx.x)
    while index < rows:
        row = make_row(rule, args, index)
        limit = _row_may_drop(rule, row)
        leading, shift, end, digit = np.uint64(0), np.uint64(32), np.int64(0), np.int64(0)
        while shift > np.uint64(0) and digit >= 0:
            shift -= np.uint64(BITS)
            j = cuda.threadIdx.x
            while j < BINS:
                counts[j] = 0
                j += cuda.blockDim.x
            chosen[0] = -1
            cuda.syncthreads()
            _count(counts, leading, shift, rule, row)
            cuda.syncthreads()
            _choose(counts, chosen, limit)
            cuda.syncthreads()
            digit = chosen[0]
            if digit >= 0:  # only the first pass can find that all candidates may drop
                limit = chosen[1]
                leading = (leading << np.uint64(BITS)) | np.uint64(digit)
            cuda.syncthreads()
        while digit >= 0 and limit > 0:
            end = _next_tie(chosen, end, leading, rule, row) + 1
            limit -= 1
        if cuda.threadIdx.x == 0:
            _store_word(limits + 16 * index, leading if digit >= 0 else EVERYTHING)
            _store_int(limits + 16 * index + 8, end)
        index += cuda.gridDim.x
