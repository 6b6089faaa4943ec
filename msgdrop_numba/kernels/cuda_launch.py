"""The CUDA kernels on a device: compiled by numba once for each variant, started by NVIDIA's cuda.core.

numba's own launch takes 30 us of Python for so many arguments, cuda.core's takes 3, and both end in the same call.
Compiling touches no device; only `load` must not happen while a graph is captured.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import islice
from operator import itemgetter
from typing import Any, NoReturn

from msgdrop_numba.kernels import cuda
from msgdrop_numba.kernels.cuda import THREADS, UNROLL
from msgdrop_numba.kernels.cuda_memory import ELEMENT
from msgdrop_numba.kernels.cuda_memory import SIMULATOR as SIMULATOR
from msgdrop_numba.kernels.records import COPY, Addresses, GatherNumbers, MaskNumbers, PlanNumbers

if not SIMULATOR:
    from cuda import core

# Launch geometry; tests make it small.
SELECT_THREADS = 512  # a block of `select`: more would leave a thread too few registers
BLOCKS = 1024  # enough to fill a device; fewer tiles share their messages' pieces out over more blocks
MAX_GRID = (2**31 - 1, 65535)


class NotLoadedError(Exception):
    """A kernel isn't on the device yet: call `load(*args)`, and launch again."""


class _Loaded(dict[tuple[str, int, int, int], Any]):
    def __missing__(self, variant: tuple[str, int, int, int]) -> NoReturn:
        raise NotLoadedError(*variant)


class _Bound(threading.local):
    def __init__(self) -> None:
        self.devices: set[int] = set()


_bound = _Bound()  # devices whose context this thread has had
_loaded = _Loaded()  # by name, bytes in a piece, kind and device


def load(name: str, unit: int, kind: int, device: int, capability: tuple[int, int]) -> None:
    """Bring a kernel to a device of that compute capability, which must be the current one."""
    function = cuda.function(name, unit, kind)
    if SIMULATOR:
        kernel = cuda.cuda.jit(function)
    else:
        entry, code = _machine_code(name, unit, kind, capability)
        kernel = code.get_kernel(entry)
    _loaded[name, unit, kind, device] = kernel, _picker(function, _GATHER if name == "gather" else _NAMES)


@cache
def _machine_code(name: str, unit: int, kind: int, capability: tuple[int, int]) -> tuple[str, Any]:
    """A kernel's entry and its code for a capability, linked here: the driver may be too old to take numba's PTX."""
    function = cuda.function(name, unit, kind)
    ptx, _ = cuda.cuda.compile_ptx(function, cuda.signature(function), cc=capability)
    target = core.LinkerOptions(arch=f"sm_{capability[0]}{capability[1]}")
    entry = re.search(r"\.entry\s+(\w+)", ptx)
    assert entry is not None
    return entry[1], core.Linker(core.ObjectCode.from_ptx(ptx.encode()), options=target).link("cubin")


# What the kernels' parameters are called, in the order of `launch`'s and `gather`'s values.
_GATHER = [*GatherNumbers._fields, "messages"]
_NAMES = [*PlanNumbers._fields, *MaskNumbers._fields, "messages", "rows", "inner", "row_bytes", *Addresses._fields]


def _picker(function: Callable[..., Any], values: list[str]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """A function that picks a kernel's arguments from the values of these names. It flattens named tuples."""
    kinds = cuda.parameters(function)
    fields = [getattr(kind, "_fields", (name,)) for name, kind in kinds.items()]
    flat = itemgetter(*(values.index(name) for names in fields for name in names))
    if not SIMULATOR:
        return flat

    def grouped(values: list[Any]) -> tuple[Any, ...]:
        rest = iter(flat(values))
        return tuple(
            kind._make(islice(rest, len(names))) if hasattr(kind, "_make") else next(rest)
            for kind, names in zip(kinds.values(), fields, strict=True)
        )

    return grouped


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


def piece_size(kind: int, places: int) -> int:
    """Bytes that a thread moves at a time: 16 where all addresses, strides and the width allow, given as their `|`."""
    unit = places & -places if places % 16 else 16
    if kind == COPY or unit == 16:
        return unit
    if unit < ELEMENT[kind]:
        raise ValueError(f"elements of {ELEMENT[kind]} bytes must lie at multiples of that, but one is off by {unit}")
    return ELEMENT[kind]


def launch(plan: Any, draw: Any, messages: int, inner: int, addresses: Addresses, stream: int, device: int) -> None:
    """Drop among `messages` messages on a stream of the current device; nothing is copied, allocated or waited for.

    Args:
        plan: a PlanNumbers. draw: a MaskNumbers with addresses on the device, without sources.
        inner: the number of rows that share one key, into which their index is folded. 0: each row has its own key.
        stream: a cudaStream_t, 0 for the default one. The caller keeps all memory alive until it has run.

    Raises:
        NotLoadedError: a kernel must be loaded first. Nothing was started.
    """
    if not messages:
        return
    out, size = addresses.out, plan.size
    limited, rows = plan.count_limited and not draw.given, messages // size
    if limited and not addresses.limits:
        raise ValueError("a rule that limits how many drop needs `limits`, 16 bytes a row")
    kind, width, unit = COPY, 1, 16
    if out:
        kind, width = plan.kind, plan.width
        steps = plan.x_row | plan.x_step | plan.out_row | plan.out_step
        unit = piece_size(kind, addresses.x | out | steps | width | draw.fill)
    grid, block = geometry(messages, width, unit)
    _bind(device)
    drop = _loaded["drop", unit, kind, device]
    values = [*plan, *draw, messages, rows, inner, 8 * size if draw.per_row else 0, *addresses]
    if limited:
        threads = min(SELECT_THREADS, -(-size // 32) * 32)
        _start(_loaded["select", 0, COPY, device], (min(rows, MAX_GRID[0]), 1), (threads, 1), stream, values)
    _start(drop, grid, block, stream, values)


def gather(job: Any, messages: int, stream: int, device: int) -> None:
    """Move the `messages` messages that the job, a GatherNumbers, writes; all else as for `launch`."""
    width = job.width
    if not messages or not width:
        return
    steps = job.row | job.step if job.size else 0
    unit = piece_size(job.kind, job.x | job.out | width | steps | job.fill | job.fill_step)
    grid, block = geometry(messages, width, unit)
    _bind(device)
    _start(_loaded["gather", unit, job.kind, device], grid, block, stream, [*job, messages])


def _bind(device: int) -> None:
    """Let this thread start kernels on the device: torch's autograd thread, or a new one, may have no context yet."""
    if not SIMULATOR and device not in _bound.devices:
        core.Device(device).set_current()
        _bound.devices.add(device)


def _start(loaded: Any, grid: tuple[int, int], block: tuple[int, int], stream: int, values: list[Any]) -> None:
    kernel, pick = loaded
    if SIMULATOR:
        kernel[grid, block](*pick(values))
    else:
        core.launch(_stream(stream), _shape(grid, block), kernel, *pick(values))


@lru_cache(maxsize=1024)
def _stream(handle: int) -> Any:
    return core.Stream.from_handle(handle or 1)  # 0 may mean a stream of the thread's, 1 the default one alone


@lru_cache(maxsize=1024)
def _shape(grid: tuple[int, int], block: tuple[int, int]) -> Any:
    return core.LaunchConfig(grid=grid, block=block)
