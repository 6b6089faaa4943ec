"""The CUDA kernels that move messages: `drop` draws and copies at once, `gather` copies by index, as gather.py's does.

A tile of messages belongs to a block: each message is decided once, by one thread, which leaves in shared memory where
it is read from and written to; then all threads copy, 16 bytes at a time where alignment allows. Addresses are
integers, so that no argument costs more than a number. cuda_launch.py compiles and starts them, and cuda_rules.py's
`select`; the simulator wants all of a kernel that asks for its thread in one file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba.cuda
import numpy as np

from msgdrop_numba.kernels.cuda_memory import Device, device, number, scaler
from msgdrop_numba.kernels.cuda_rules import CudaArgs, Rule, is_eligible, keeps, make_row, scale_of_kept, select
from msgdrop_numba.kernels.records import COPY

cuda: Any = numba.cuda  # of which the simulator, the built-in target and numba-cuda each know other types

THREADS = 256  # a block, and its messages, at most; tests make it small
UNROLL = 4  # messages that a thread reads before it writes; `copy` writes them out

_load_int, _ = number(np.int64)
_load_float, _ = number(np.float64)
_load_byte, _store_byte = number(np.uint8)
_PIECES = {16: None, 8: np.uint64, 4: np.uint32, 2: np.uint16, 1: np.uint8}


def _make_copy(unit: int, kind: int) -> Device:
    """`copy(source, target, scales, width)`: all threads of a block write a tile's messages, UNROLL a line of them."""
    load, store = number(_PIECES[unit])
    multiply = None if kind == COPY else scaler(unit, kind)
    zero = (np.uint32(0),) * 4 if unit == 16 else _PIECES[unit](0)  # type: ignore[misc]

    @device
    def fetch(source: Any, j: Any, at: Any) -> Any:
        piece = zero
        if source[j]:
            piece = load(source[j] + at)
        return piece

    @device
    def put(target: Any, scales: Any, j: Any, at: Any, piece: Any) -> None:
        if target[j]:
            if kind != COPY and scales[j] != 0:
                piece = multiply(piece, scales[j])  # type: ignore[misc]
            store(target[j] + at, piece)

    @device
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


def _make_drop(unit: int, kind: int) -> Device:
    """The kernel that draws and copies in pieces of `unit` bytes, multiplying kept ones as `kind` says."""
    copy = _make_copy(unit, kind)
    scaled, places = kind != COPY, THREADS

    def drop(
        messages: int, width: int, x_row: int, x_step: int, out_row: int, out_step: int, rule: Rule, args: CudaArgs,
        fill: int, scales: int, x: int, out: int, mask: int, limits: int, scale: float,
    ) -> None:  # fmt: skip
        tile_source = cuda.shared.array(places, np.int64)
        tile_target = cuda.shared.array(places, np.int64)
        tile_scale = cuda.shared.array(places if scaled else 1, np.float64)
        j, tile = cuda.threadIdx.x + cuda.blockDim.x * cuda.threadIdx.y, UNROLL * cuda.blockDim.y
        if j < tile:  # no loop: what it carries would take half of the registers
            message, src, dst, kept_scale = np.int64(cuda.blockIdx.x) * tile + j, np.int64(0), np.int64(0), 0.0
            if message < messages:
                index = np.int64(np.uint64(message) // np.uint64(args.size))
                i, row, keep = message - index * args.size, make_row(rule, args, index), True
                eligible = is_eligible(rule, row, i)
                if eligible and args.given:
                    keep = _load_byte(mask + message) != 0
                elif eligible:
                    keep = keeps(rule, row, i, limits + 16 * index if limits else np.int64(0))
                if mask and not args.given and cuda.blockIdx.y == 0:
                    _store_byte(mask + message, np.uint8(keep))
                if out:
                    src = x + index * x_row + i * x_step
                    dst = out + index * out_row + i * out_step
                    if not keep:
                        src = np.int64(fill)
                    elif scaled and eligible:
                        place = scales + args.row_bytes * index + 8 * i if scales else np.int64(0)
                        kept_scale = scale_of_kept(rule, row, scale, place)
                    elif src == dst:
                        dst = np.int64(0)
            tile_source[j], tile_target[j] = src if dst else 0, dst
            if scaled:
                tile_scale[j] = kept_scale
        if out:
            cuda.syncthreads()
            copy(tile_source, tile_target, tile_scale, width)

    return drop


@device
def _source(x: Any, width: Any, size: Any, row: Any, step: Any, index: Any) -> Any:
    """The address of a message of x."""
    if not size:
        return x + index * width
    above = np.int64(np.uint64(index) // np.uint64(size))
    return x + above * row + (index - above * size) * step


def _make_gather(unit: int, kind: int) -> Device:
    """The kernel that moves messages in pieces of `unit` bytes, multiplying them as `kind` says."""
    copy = _make_copy(unit, kind)
    scaled, places = kind != COPY, THREADS

    def gather(
        messages: int, x: int, out: int, index: int, width: int, fill: int, fill_step: int, scales: int, size: int,
        row: int, step: int,
    ) -> None:  # fmt: skip
        tile_source = cuda.shared.array(places, np.int64)
        tile_target = cuda.shared.array(places, np.int64)
        tile_scale = cuda.shared.array(places if scaled else 1, np.float64)
        j, tile = cuda.threadIdx.x + cuda.blockDim.x * cuda.threadIdx.y, UNROLL * cuda.blockDim.y
        if j < tile:
            message, src, dst, scale = np.int64(cuda.blockIdx.x) * tile + j, np.int64(0), np.int64(0), 0.0
            if message < messages:
                origin, dst = _load_int(index + 8 * message), out + message * width
                if origin < 0:
                    src = fill + message * fill_step
                else:
                    src = _source(x, width, size, row, step, origin)
                    if scaled:
                        scale = _load_float(scales + 8 * message)
            tile_source[j], tile_target[j] = src, dst
            if scaled:
                tile_scale[j] = scale
        cuda.syncthreads()
        copy(tile_source, tile_target, tile_scale, width)

    return gather


def parameters(kernel: Device) -> dict[str, Any]:
    """A kernel's parameters by name: int, float, or a tuple of integers."""
    found = inspect.signature(kernel, eval_str=True).parameters
    return {name: parameter.annotation for name, parameter in found.items()}


def signature(kernel: Device) -> Any:
    """The one signature of a kernel: addresses and counts are int64; a tuple is passed field by field."""
    types = cuda.types
    numbers = {int: types.int64, float: types.float64}
    return types.void(
        *(
            numbers[kind] if kind in numbers else types.NamedUniTuple(types.int64, len(kind._fields), kind)
            for kind in parameters(kernel).values()
        )
    )


def function(name: str, unit: int, kind: int) -> Callable[..., Any]:
    """The source of "select", or of "drop" or "gather" for pieces of `unit` bytes."""
    if name == "select":
        return select
    return (_make_drop if name == "drop" else _make_gather)(unit, kind)
