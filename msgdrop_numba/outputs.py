"""Memory for large outputs, lent and taken back: fresh pages cost more than the kernel that writes them.

A block is a private anonymous mapping of ours. Each output over it has a token, which NumPy or torch keeps alive as
long as anything can reach the memory: a view, an array, a storage, a tensor saved for backward. When they free the
token, and only then, the block waits to be lent again. Use counts couldn't tell this: another thread may share a
storage between two looks at them.
Measured in benchmarks/README.md, "In the cache" and "By size"; what it costs users is in LIMITS.md.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import time
import weakref
from collections import deque
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any

import numpy as np

LENT_BYTES = 2**20  # smaller outputs are the C library's, which rarely gives their pages back to the system
HUGE_BYTES = 4 * 2**20  # blocks of this size ask for huge pages: one fault for 2 MB

# At most this many bytes of idle blocks wait to be lent again. 0: outputs are torch's and NumPy's own memory.
KEPT_BYTES = 512 * 2**20
IDLE_SECONDS = 30.0  # a block that waited longer goes back to the system, when the next one is taken back or made

# mmap's default is a shared mapping, in which a forked child would write over its parent's outputs.
_FLAGS: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


# Blocks move between these by single operations of dicts and deques, which are atomic. No lock is held, because a
# finalizer may run in any thread, and in the middle of `_lend`.
_loans: dict[int, tuple[Any, mmap.mmap]] = {}  # by the id of the weak reference whose callback takes the block back
_idle: dict[int, deque[tuple[float, mmap.mmap]]] = {}  # by size, with the time of return, the latest last
_trim_time = 0.0  # when `_trim` is due
# An upper bound of the idle bytes, those of all blocks. A race may make it too low: then KEPT_BYTES holds again when
# `_trim` is due.
_mapped_bytes = 0


def array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """An uninitialised array in C order, of a dtype without Python objects."""
    block = _lend(math.prod(shape) * dtype.itemsize)
    if block is None:
        return np.empty(shape, dtype)
    # A ctypes array as its base: whatever reaches the memory keeps it alive. Over a memoryview, NumPy would keep the
    # mapping alive instead of the view. The token isn't followed by the garbage collector, which runs the callbacks of
    # what it follows while finalizers of the same garbage may still read the memory.
    base = _ctypes_array(len(block)).from_buffer(block)
    base.token = token = np.empty(0)
    _take_back_after(token, block)
    return np.ndarray(shape, dtype, base)


def array_for_torch(
    nbytes: int, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...] | None = None
) -> np.ndarray[Any, Any] | None:
    """An uninitialised array that a tensor alone may hold; None if the output is small, or KEPT_BYTES is 0.

    Its memory is lent again when it dies, though its base, the mapping, may live on: never give it to a user.

    Args:
        nbytes: of the array. strides: in bytes; None: C order.
    """
    block = _lend(nbytes)
    if block is None:
        return None
    made: np.ndarray[Any, Any] = np.ndarray(shape, dtype, block, 0, strides)
    _take_back_after(made, block)
    return made


def array_like(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An uninitialised array without gaps, with its dims in x's memory order, as `np.empty_like` makes it."""
    if x.flags.c_contiguous:
        return array(x.shape, x.dtype)
    if x.nbytes < LENT_BYTES:
        return np.empty_like(x, subok=False)
    order = sorted(range(x.ndim), key=lambda dim: -abs(x.strides[dim]))
    return array(tuple(x.shape[dim] for dim in order), x.dtype).transpose(np.argsort(order))


def idle_bytes() -> int:
    """Bytes of the blocks that wait to be lent again."""
    total: int = sum(size * len(blocks) for size, blocks in _idle.copy().items())
    return total


def reset() -> None:
    """Unmap all idle blocks."""
    for blocks in _idle.copy().values():
        blocks.clear()


def _lend(nbytes: int) -> mmap.mmap | None:
    """A block of at least `nbytes` uninitialised bytes, which nothing else uses."""
    if nbytes < LENT_BYTES or KEPT_BYTES <= 0:
        return None
    try:
        return _pool(nbytes).pop()[1]  # the latest: the cache may still hold it
    except IndexError:
        try:
            return _new_block(_block_size(nbytes))
        except OSError:  # no memory, or too many mappings: the library that asks raises its own error
            return None


def _take_back_after(token: Any, block: mmap.mmap) -> None:
    """Let the block be lent again when the token has died."""
    loan = weakref.ref(token, _take_back)
    _loans[id(loan)] = loan, block


def _block_size(nbytes: int) -> int:
    """`nbytes` rounded up to one of eight sizes between powers of two, so that outputs of varying lengths share blocks.

    The end of a block that no output has written yet costs no memory, up to the rest of a huge page.
    """
    step: int = max(mmap.PAGESIZE, 2 ** nbytes.bit_length() // 16)
    return -(-nbytes // step) * step


@lru_cache(maxsize=1024)
def _pool(nbytes: int) -> deque[tuple[float, mmap.mmap]]:
    """The idle blocks for outputs of this size."""
    return _idle.setdefault(_block_size(nbytes), deque())


@cache
def _ctypes_array(size: int) -> Any:
    return ctypes.c_char * size


def _new_block(size: int) -> mmap.mmap:
    global _mapped_bytes
    _trim()
    _mapped_bytes += size
    block = mmap.mmap(-1, size, **_FLAGS)
    if size >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):  # Linux alone
        with suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _take_back(loan: Any) -> None:
    """Called when a token has died."""
    (_, block), now = _loans.pop(id(loan)), time.monotonic()
    _idle[len(block)].append((now, block))
    if now >= _trim_time or _mapped_bytes > KEPT_BYTES:
        _trim()


def _trim() -> None:
    """Unmap the blocks that waited longest, while they are older than IDLE_SECONDS or exceed KEPT_BYTES together."""
    global _mapped_bytes, _trim_time
    now = time.monotonic()
    _trim_time = now + IDLE_SECONDS / 4
    while True:
        with suppress(IndexError):  # another thread took the last block of a size: look again
            since, oldest = min(
                ((blocks[0][0], blocks) for blocks in _idle.copy().values() if blocks),
                key=lambda pair: pair[0],
                default=(math.inf, None),
            )
            if oldest is None or (since > now - IDLE_SECONDS and idle_bytes() <= KEPT_BYTES):
                break
            oldest.popleft()
    _mapped_bytes = idle_bytes() + sum(len(block) for _, block in list(_loans.values()))


if hasattr(os, "register_at_fork"):
    # A child would copy an idle block page by page as it writes it: a fresh one costs less.
    os.register_at_fork(after_in_child=reset)
