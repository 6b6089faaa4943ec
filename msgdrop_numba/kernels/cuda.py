"""The CUDA kernels: `select`, a block a row, finds where limited rows stop dropping; `drop` draws and copies at once.

A tile of messages belongs to a block: each message is decided once, by one thread, which leaves in shared memory where
it is read from and written to; then all threads copy, 16 bytes at a time where alignment allows. Addresses are
integers, so that no argument costs more than a number. cuda_launch.py compiles and starts them; of the kernels' files
only these and cuda_memory.py know numba.cuda.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numba.cuda
import numpy as np

from msgdrop_numba.kernels import philox, rules
from msgdrop_numba.kernels.cuda_memory import SIMULATOR, number, scaler
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.kernels.rules import EVERYTHING, STREAM_DRAW, STREAM_LIMIT, STREAM_PHASE, STREAM_RANGE

cuda: Any = numba.cuda  # of which the simulator, the built-in target and numba-cuda each know other types

# Tests make these small.
THREADS = 256  # a block of `drop`, and its messages, at most
BITS, BINS = 8, 256  # of a draw, selected by in one pass; the counts of that pass

UNROLL = 4  # messages that a thread reads before it writes; `copy` writes them out
_M32, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)

Device = Callable[..., Any]


def _device(function: Device) -> Device:
    """A function for kernels alone, part of each; as it is in the simulator."""
    return function if SIMULATOR else cuda.jit(device=True, inline="always")(function)


def _shared_source(function: Device) -> Device:
    """A device function of the source that the CPU kernels are compiled from."""
    return function if SIMULATOR else _device(getattr(function, "py_func", function))


_philox4x32_10 = _shared_source(philox.philox4x32_10)
_fold_in = _shared_source(philox.fold_in)
_multiply_shift = _shared_source(rules.multiply_shift)


_load_int, _store_int = number(np.int64)
_load_word, _store_word = number(np.uint64)
_load_float, _ = number(np.float64)
_load_byte, _store_byte = number(np.uint8)
_PIECES = {16: None, 8: np.uint64, 4: np.uint32, 2: np.uint16, 1: np.uint8}


class Rule(NamedTuple):
    """The rule, as the kernels' arguments name it: `rules.RULE`."""

    threshold: int
    spread: int
    ranged: int
    certain: int
    exact: int
    span: int
    min_keep: int
    prefix: int


class Told(NamedTuple):
    """What else decides a mask, as the kernels' arguments name it: a count or a flag, or where an array lies."""

    size: int
    given: int
    lengths: int
    keys: int
    inner: int
    thresholds: int
    row_bytes: int
    protect: int
    protect_row: int
    taking: int
    offset: int
    positions: int
    positions_row: int
    seed: int


class Row(NamedTuple):
    """What holds for a whole row, as on the CPU. Of addresses 0 means none."""

    seed: Any
    key: Any
    valid: Any  # messages before its padding
    taking: Any
    phase: Any
    threshold: Any
    thresholds: Any
    protect: Any
    offset: Any
    positions: Any


@_device
def _row_key(keys: int, inner: int, row: Any) -> Any:
    """The key of a row, of keys that stand for `inner` rows each, into which its index is folded; 0: one each."""
    if not keys:
        return np.uint64(row)
    if not inner:
        return _load_word(keys + 8 * row)
    return _fold_in(_load_word(keys + 8 * (row // inner)), np.uint64(row % inner))


@_device
def _draw(seed: Any, key: Any, i: Any, stream: Any) -> Any:
    counter = np.uint64(i >> 2)
    w0, w1, w2, w3 = _philox4x32_10(counter, stream, key & _M32, key >> _32, seed & _M32, seed >> _32)
    word = i & 3
    return (w0 if word == 0 else w1) if word < 2 else (w2 if word == 2 else w3)


@_device
def _first_draw(seed: Any, key: Any, stream: Any) -> Any:
    """What a row draws for itself, whatever its positions."""
    return np.uint64(_draw(seed, key, np.int64(0), stream))


@_device
def _make_row(rule: Rule, told: Told, index: Any) -> Row:
    """What holds for the row of this index; nobody may have looked at what lies on the device."""
    seed = _load_word(told.seed) if told.seed else np.uint64(0)
    key, size = _row_key(told.keys, told.inner, index), np.int64(told.size)
    valid = min(max(_load_int(told.lengths + 8 * index), np.int64(0)), size) if told.lengths else size
    taking = _load_int(told.taking + 8 * index) if told.taking else max(np.int64(0), valid - rule.prefix)
    phase, threshold = np.int64(0), np.uint64(rule.threshold)
    if rule.span > 1 and not told.given:
        phase = np.int64(_multiply_shift(rule.span, np.int64(_first_draw(seed, key, STREAM_PHASE)), 32))
    if rule.ranged:
        threshold += (np.uint64(rule.spread) * _first_draw(seed, key, STREAM_RANGE)) >> _32
    return Row(
        seed, key, valid, taking, phase, threshold,
        told.thresholds + told.row_bytes * index if told.thresholds else np.int64(0),
        told.protect + told.protect_row * index if told.protect else np.int64(0),
        told.offset,
        told.positions + told.positions_row * index if told.positions else np.int64(0),
    )  # fmt: skip


@_device
def _takes_part(rule: Rule, row: Row, i: Any) -> Any:
    """Whether message i is neither padding nor protected."""
    if i < rule.prefix or i >= row.valid:
        return False
    return not row.protect or _load_byte(row.protect + i) == 0


@_device
def _position(row: Row, i: Any) -> Any:
    return _load_int(row.positions + 8 * i) if row.positions else i + row.offset


@_device
def _candidate(rule: Rule, row: Row, i: Any) -> Any:
    """Whether message i, which takes part, drops by the rule itself, before any limit."""
    if rule.exact:
        return True
    threshold = _load_word(row.thresholds + 8 * i) if row.thresholds else row.threshold
    position = _position(row, i)
    group = position if rule.span == 1 else (position + row.phase) // rule.span
    return _draw(row.seed, row.key, group, STREAM_DRAW) < threshold


@_device
def _limit_draw(rule: Rule, row: Row, i: Any) -> Any:
    """What decides whether candidate i drops, where not all of them may."""
    return _draw(row.seed, row.key, _position(row, i), STREAM_DRAW if rule.exact else STREAM_LIMIT)


@_device
def _may_drop(rule: Rule, row: Row) -> Any:
    """How many of a row may drop, where that is limited; with `exact`, how many do."""
    limit = max(np.int64(0), row.taking - rule.min_keep)
    if rule.exact:
        limit = min(limit, _multiply_shift(row.taking, 2 * np.int64(row.threshold) + 1, 33))
    return limit


@_device
def _keeps(rule: Rule, row: Row, i: Any, limit: Any) -> Any:
    """Whether message i, which takes part, is kept; `limit` is where `select` left the row's cutoff, 0: it has none."""
    if not _candidate(rule, row, i):
        return True
    if not limit:
        return False
    cutoff, end = _load_word(limit), _load_int(limit + 8)
    if cutoff == EVERYTHING:
        return False
    draw = _limit_draw(rule, row, i)
    return draw > cutoff or (draw == cutoff and i >= end)


@_device
def _count(counts: Any, leading: Any, shift: Any, rule: Rule, row: Row) -> None:
    i = np.int64(cuda.threadIdx.x)
    while i < row.valid:
        if _takes_part(rule, row, i) and _candidate(rule, row, i):
            digits = _limit_draw(rule, row, i) >> shift
            if digits >> np.uint64(BITS) == leading:
                cuda.atomic.add(counts, np.int64(digits & np.uint64(BINS - 1)), 1)
        i += cuda.blockDim.x


@_device
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


@_device
def _next_tie(chosen: Any, after: Any, draw: Any, rule: Rule, row: Row) -> Any:
    """The first position from `after` on of a candidate with exactly this draw."""
    chosen[2] = row.valid
    cuda.syncthreads()
    i = after + cuda.threadIdx.x
    while i < row.valid:
        if _takes_part(rule, row, i) and _candidate(rule, row, i) and _limit_draw(rule, row, i) == draw:
            cuda.atomic.min(chosen, 2, i)
        i += cuda.blockDim.x
    cuda.syncthreads()
    found = chosen[2]
    cuda.syncthreads()
    return found


def select(rows: int, rule: Rule, told: Told, limits: int) -> None:
    """Write each row's cutoff to `limits`, 16 bytes a row: the (draw, position) below which candidates drop."""
    counts = cuda.shared.array(BINS, np.int64)
    chosen = cuda.shared.array(3, np.int64)
    index = np.int64(cuda.blockIdx.x)
    while index < rows:
        row = _make_row(rule, told, index)
        limit = _may_drop(rule, row)
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


def _make_copy(unit: int, kind: int) -> Device:
    """`copy(source, target, scales, width)`: all threads of a block write a tile's messages, UNROLL a line of them."""
    load, store = number(_PIECES[unit])
    multiply = None if kind == COPY else scaler(unit, kind)
    zero = (np.uint32(0),) * 4 if unit == 16 else _PIECES[unit](0)  # type: ignore[misc]

    @_device
    def fetch(source: Any, j: Any, at: Any) -> Any:
        piece = zero
        if source[j]:
            piece = load(source[j] + at)
        return piece

    @_device
    def put(target: Any, scales: Any, j: Any, at: Any, piece: Any) -> None:
        if target[j]:
            if kind != COPY and scales[j] != 0:
                piece = multiply(piece, scales[j])  # type: ignore[misc]
            store(target[j] + at, piece)

    @_device
    def copy(source: Any, target: Any, scales: Any, width: int) -> None:
        j, lines = cuda.threadIdx.y, cuda.blockDim.y
        k, m, n = j + lines, j + 2 * lines, j + 3 * lines
        at = (np.int64(cuda.blockIdx.y) * cuda.blockDim.x + cuda.threadIdx.x) * unit
        while at < width:  # all loads before the first store: they are in flight together
            a, b, c, d = fetch(source, j, at), fetch(source, k, at), fetch(source, m, at), fetch(source, n, at)
            put(target, scales, j, at, a)
            put(target, scales, k, at, b)
            put(target, scales, m, at, c)
            put(target, scales, n, at, d)
            at += np.int64(cuda.gridDim.y) * cuda.blockDim.x * unit

    return copy


@_device
def _kept_scale(rule: Rule, row: Row, scale: float, place: Any) -> float:
    """What a kept message that takes part is multiplied by; `place` is where its own scale lies, 0: it has none."""
    if rule.certain or (rule.ranged and row.threshold == EVERYTHING):
        return 1.0
    if rule.exact:
        return float(row.taking) / float(max(np.int64(1), row.taking - _may_drop(rule, row)))
    if rule.ranged:
        return 2.0**32 / float(np.int64(EVERYTHING - row.threshold))
    return _load_float(place) if place else scale


def _make_drop(unit: int, kind: int) -> Device:
    """The kernel that draws and copies in pieces of `unit` bytes, multiplying kept ones as `kind` says."""
    copy = _make_copy(unit, kind)
    scaled, places = kind != COPY, THREADS

    def drop(
        messages: int, width: int, x_row: int, x_step: int, out_row: int, out_step: int, rule: Rule, told: Told,
        fill: int, scales: int, x: int, out: int, mask: int, limits: int, scale: float,
    ) -> None:  # fmt: skip
        tile_source = cuda.shared.array(places, np.int64)
        tile_target = cuda.shared.array(places, np.int64)
        tile_scale = cuda.shared.array(places if scaled else 1, np.float64)
        j, tile = cuda.threadIdx.x + cuda.blockDim.x * cuda.threadIdx.y, UNROLL * cuda.blockDim.y
        if j < tile:  # no loop: what it carries would take half of the registers
            message, from_, to, kept_scale = np.int64(cuda.blockIdx.x) * tile + j, np.int64(0), np.int64(0), 0.0
            if message < messages:
                index = np.int64(np.uint64(message) // np.uint64(told.size))
                i, row, keep = message - index * told.size, _make_row(rule, told, index), True
                taking = _takes_part(rule, row, i)
                if taking and told.given:
                    keep = _load_byte(mask + message) != 0
                elif taking:
                    keep = _keeps(rule, row, i, limits + 16 * index if limits else np.int64(0))
                if mask and not told.given and cuda.blockIdx.y == 0:
                    _store_byte(mask + message, np.uint8(keep))
                if out:
                    from_ = x + index * x_row + i * x_step
                    to = out + index * out_row + i * out_step
                    if not keep:
                        from_ = np.int64(fill)
                    elif scaled and taking:
                        place = scales + told.row_bytes * index + 8 * i if scales else np.int64(0)
                        kept_scale = _kept_scale(rule, row, scale, place)
                    elif from_ == to:
                        to = np.int64(0)
            tile_source[j], tile_target[j] = from_ if to else 0, to
            if scaled:
                tile_scale[j] = kept_scale
        if out:
            cuda.syncthreads()
            copy(tile_source, tile_target, tile_scale, width)

    return drop


def parameters(kernel: Device) -> dict[str, Any]:
    """A kernel's parameters by name: int, float, or a tuple of integers."""
    found = inspect.signature(kernel, eval_str=True).parameters
    return {name: parameter.annotation for name, parameter in found.items()}


def signature(kernel: Device) -> Any:
    """What a kernel is compiled for, once: addresses and counts are int64; a tuple is passed as its fields are."""
    types = cuda.types
    numbers = {int: types.int64, float: types.float64}
    return types.void(
        *(
            numbers[kind] if kind in numbers else types.NamedUniTuple(types.int64, len(kind._fields), kind)
            for kind in parameters(kernel).values()
        )
    )


def function(unit: int, kind: int) -> Callable[..., Any]:
    """The source of `drop` for pieces of `unit` bytes; 0: of `select`."""
    return _make_drop(unit, kind) if unit else select
