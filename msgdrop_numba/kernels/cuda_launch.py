"""The CUDA kernels on a device: compiled by numba once for each variant, started by NVIDIA's cuda.core.

numba's own launch takes 30 us of Python for so many arguments, cuda.core's takes 3, and both end in the same call.
Compiling touches no device; only `load` must not happen while a graph is captured.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NoReturn

from msgdrop_numba.kernels import cuda
from msgdrop_numba.kernels.cpu import COPY
from msgdrop_numba.kernels.cuda import THREADS, UNROLL
from msgdrop_numba.kernels.cuda_memory import ELEMENT
from msgdrop_numba.kernels.cuda_memory import SIMULATOR as SIMULATOR

if not SIMULATOR:
    from cuda import core

# Launch geometry; tests make it small.
SELECT_THREADS = 512  # a block of `select`: more would leave a thread too few registers
BLOCKS = 1024  # enough to fill a device; fewer tiles share their messages' pieces out over more blocks
MAX_GRID = (2**31 - 1, 65535)


class NotLoadedError(Exception):
    """A kernel isn't on the device yet: call `load(*args)`, and launch again."""


class _Loaded(dict[tuple[int, int, int], Any]):
    def __missing__(self, variant: tuple[int, int, int]) -> NoReturn:
        raise NotLoadedError(*variant)


class _Bound(threading.local):
    def __init__(self) -> None:
        self.devices: set[int] = set()


_bound = _Bound()  # devices whose context this thread has had
_loaded = _Loaded()  # by bytes in a piece (0: `select`), kind and device


def load(unit: int, kind: int, device: int, capability: tuple[int, int]) -> None:
    """Bring a kernel to a device of that compute capability, which must be the current one."""
    if SIMULATOR:
        _loaded[unit, kind, device] = cuda.cuda.jit(cuda.function(unit, kind))
    else:
        name, code = _machine_code(unit, kind, capability)
        _loaded[unit, kind, device] = code.get_kernel(name)


@cache
def _machine_code(unit: int, kind: int, capability: tuple[int, int]) -> tuple[str, Any]:
    """A kernel's name and its code for a capability, linked here: the driver may be too old to take numba's PTX."""
    ptx, _ = cuda.cuda.compile_ptx(cuda.function(unit, kind), cuda.signature(bool(unit)), cc=capability)
    target = core.LinkerOptions(arch=f"sm_{capability[0]}{capability[1]}")
    name = re.search(r"\.entry\s+(\w+)", ptx)
    assert name is not None
    return name[1], core.Linker(core.ObjectCode.from_ptx(ptx.encode()), options=target).link("cubin")


@lru_cache(maxsize=1024)
def geometry(messages: int, width: int, unit: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block: threads along x over the pieces of a message, along y over messages, UNROLL for each.

    A block has at least as many threads as messages: a thread decides one at most.
    """
    pieces = max(1, -(-width // unit))
    across = max(UNROLL, -(-pieces // -(-pieces // THREADS)))
    down = max(1, THREADS // across)
    tiles = -(-messages // (UNROLL * down))
    shares = min(-(-pieces // across), -(-BLOCKS // tiles), MAX_GRID[1])
    return (tiles, shares), (across, down)


def piece_size(kind: int, *places: int) -> int:
    """Bytes that a thread moves at a time: 16 where all addresses, strides and the width allow."""
    every = 16
    for place in places:
        every |= place
    unit = every & -every
    if kind == COPY or unit == 16:
        return unit
    if unit < ELEMENT[kind]:
        raise ValueError(f"elements of {ELEMENT[kind]} bytes must lie at multiples of that, but one is off by {unit}")
    return ELEMENT[kind]


def launch(
    plan: Sequence[Any], draw: Sequence[int], messages: int, inner: int, x: int, out: int, mask: int, seed: int,
    limits: int, stream: int, device: int,
) -> None:  # fmt: skip
    """Drop among `messages` messages on a stream of the current device; nothing is copied, allocated or waited for.

    Args:
        plan: the fields of one PLAN; draw: those of one DRAW, its arrays on the device, without sources.
        inner: rows that share a key of draw's, into which their index is folded; 0: each row has its own.
        x, out, mask: addresses on the device. Equal x and out: in place; no out: the mask alone; `mask` is written,
            or read where `draw` says that it is given.
        seed: the address of an int64 on the device; 0 where the mask is given.
        limits: the address of 16 bytes a row, for `exact` and `min_keep`; else 0.
        stream: a cudaStream_t, 0 for the default one. The caller keeps all memory alive until it has run.

    Raises:
        NotLoadedError: a kernel must be loaded first. Nothing was started.
    """
    size, width, kind, factor, x_row, x_step, out_row, out_step, _, _, threshold, certain, exact, span, min_keep = plan
    fill, given, lengths, keys, thresholds, per_row, factors, _, _ = draw
    if not messages:
        return
    limited, own_row = bool((exact or min_keep) and not given), 8 * size * bool(per_row)
    if limited and not limits:
        raise ValueError("exact and min_keep need `limits`, 16 bytes a row")
    kind = kind if out else COPY
    unit = piece_size(kind, x, out, x_row, x_step, out_row, out_step, width, fill) if out else 16
    grid, block = geometry(messages, width if out else 1, unit)
    if not SIMULATOR and device not in _bound.devices:
        core.Device(device).set_current()  # torch's autograd thread, or a new one, may have no context yet
        _bound.devices.add(device)
    drop = _loaded[unit, kind, device]
    if limited:
        rows, threads = messages // size, min(SELECT_THREADS, -(-size // 32) * 32)
        _start(
            _loaded[0, COPY, device], (min(rows, MAX_GRID[0]), 1), (threads, 1), stream,
            rows, size, span, exact, min_keep, threshold, lengths, keys, inner, thresholds, own_row, seed, limits,
        )  # fmt: skip
    _start(
        drop, grid, block, stream,
        messages, size, width, x_row, x_step, out_row, out_step, span, exact, int(exact and not certain), min_keep,
        threshold, fill, given, lengths, keys, inner, thresholds, own_row, factors, x, out, mask, seed,
        limits if limited else 0, factor,
    )  # fmt: skip


def _start(kernel: Any, grid: tuple[int, int], block: tuple[int, int], stream: int, *arguments: Any) -> None:
    if SIMULATOR:
        kernel[grid, block](*arguments)
    else:
        core.launch(_stream(stream), _shape(grid, block), kernel, *arguments)


@lru_cache(maxsize=1024)
def _stream(handle: int) -> Any:
    return core.Stream.from_handle(handle or 1)  # 0 may mean a stream of the thread's, 1 the default one alone


@lru_cache(maxsize=1024)
def _shape(grid: tuple[int, int], block: tuple[int, int]) -> Any:
    return core.LaunchConfig(grid=grid, block=block)
