"""Memory for large outputs: a page fault for every 4 KB of fresh memory costs more than the whole kernel.

Two remedies, each for what it buys (benchmarks/README.md, In the cache and By size): memory of an earlier output that
nobody uses any more takes no fault; of what is fresh, huge pages take one for 2 MB. Small outputs are torch's alone.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
from collections import deque
from functools import cache
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.torch_private import TELLS_USES, handle, shared_storage, storage_uses

HUGE_BYTES = 4 * 2**20
REUSED_BYTES = 2**20  # below, the C library rarely gives memory back, so that there is little to spare

# The most memory that is held for use again, once no output uses it; 0 turns that off.
KEPT_BYTES = 512 * 2**20

_SWEPT = 16
_NONE: deque[tuple[Tensor, Any, Any]] = deque()
_PAGE = 2 * 2**20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone

try:
    _madvise: Any = ctypes.CDLL(None).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
except (OSError, AttributeError, TypeError):
    _madvise = None


@cache
def _references() -> int:
    """What getrefcount says of the storage of a tensor that is kept, where nobody else refers to it; torches differ."""
    with torch.inference_mode(False):
        tensor = torch.empty(1, device="cpu")
    kept = tensor, tensor.untyped_storage()
    _, storage = kept
    return sys.getrefcount(storage)


class Kept:
    """Tensors over the memory of earlier outputs, most of it still in use; what is given out is another one over it."""

    def __init__(self) -> None:
        self.nbytes = 0
        # By shape, dtype and strides, each with its storage and what tells that one's uses, the latest last.
        self.alike: dict[Any, deque[tuple[Tensor, Any, Any]]] = {}
        self.unswept = _SWEPT  # so many may be added before the next sweep
        # Who doesn't get it at once does without: another thread has it, or this one, in whose work a finaliser runs.
        self.lock = threading.Lock()

    def again(self, likeness: Any, nbytes: int) -> Tensor | None:
        """A tensor over memory that nobody uses, no tensor, view, array or saved tensor; None: there is none."""
        if not self.lock.acquire(blocking=False):
            return None
        try:
            waiting = self.alike.get(likeness, _NONE)
            # The latest is in the cache yet, where it is freed at once; a training step frees the oldest first. To ask
            # one takes as long as a page fault: no more are asked than memory of this size has pages.
            for turn in range(min(len(waiting), nbytes // mmap.PAGESIZE)):
                kept = waiting.popleft() if turn else waiting.pop()
                tensor, storage, use = kept
                if not _as_made(storage, nbytes):
                    self.nbytes -= nbytes
                    continue
                waiting.append(kept)
                # Uses are this tensor and the storage's Python object. Asked again behind the references to that:
                # another thread may have made one a use.
                if storage_uses(use) == 2 and sys.getrefcount(storage) == _references() and storage_uses(use) == 2:
                    return tensor.data
            return None
        finally:
            self.lock.release()

    def add(self, tensor: Tensor, likeness: Any, nbytes: int) -> None:
        """Keep a tensor, and for it let go of others that were kept long before."""
        if not self.lock.acquire(blocking=False):
            return
        try:
            self._add(tensor, likeness, nbytes)
        finally:
            self.lock.release()

    def _add(self, tensor: Tensor, likeness: Any, nbytes: int) -> None:
        self.unswept -= 1
        if self.unswept < 0:
            self._sweep()
        waiting = self.alike[likeness] = self.alike.pop(likeness, deque())  # these are the latest now
        storage = tensor.untyped_storage()
        waiting.append((tensor, storage, handle(storage)))
        self.nbytes += nbytes
        while self.nbytes > KEPT_BYTES:
            key, oldest = next(iter(self.alike.items()))
            if oldest:
                self.nbytes -= _bytes(oldest.popleft()[0])
            else:
                del self.alike[key]

    def _sweep(self) -> None:
        """Let go of what is never used again: of shapes that don't come again, nobody else would."""
        for key, waiting in list(self.alike.items()):
            whole = deque(kept for kept in waiting if _as_made(kept[1], _bytes(kept[0])))
            self.nbytes -= sum(_bytes(tensor) for tensor, *_ in waiting) - sum(_bytes(tensor) for tensor, *_ in whole)
            self.alike[key] = whole
            if not whole:
                del self.alike[key]
        self.unswept = max(_SWEPT, sum(map(len, self.alike.values())))  # one look for each that is added


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as_made(storage: Any, nbytes: int) -> bool:
    """Whether nobody has resized, shared or fixed it; what a worker has shared holds a file descriptor, too."""
    return storage.nbytes() == nbytes and storage.resizable() and not storage.is_shared()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor in C order."""
    return _empty(shape, dtype, math.prod(shape) * dtype.itemsize, None)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, nbytes: int, strides: tuple[int, ...] | None) -> Tensor:
    if nbytes < REUSED_BYTES or not TELLS_USES:
        return _fresh(shape, dtype, nbytes, strides)
    likeness = shape, dtype, strides
    again = _kept.again(likeness, nbytes) if KEPT_BYTES else None
    if again is None:
        with torch.inference_mode(False):  # what is made in it can't be used in training
            fresh = _fresh(shape, dtype, nbytes, strides)
        _kept.add(fresh, likeness, nbytes)
        again = fresh.data
    return again


def _fresh(shape: tuple[int, ...], dtype: torch.dtype, nbytes: int, strides: tuple[int, ...] | None) -> Tensor:
    if strides is None:
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
    else:
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    if nbytes >= HUGE_BYTES:
        advise(tensor.data_ptr(), nbytes)
    return tensor


def like(x: Tensor) -> Tensor:
    """An uninitialised CPU tensor in the order of memory of `torch.empty_like(x)`."""
    nbytes = x.numel() * x.element_size()
    return dense(x, nbytes, torch.empty_like(x, device="meta").stride() if nbytes >= REUSED_BYTES else None)


def dense(x: Tensor, nbytes: int, strides: tuple[int, ...] | None) -> Tensor:
    """The same of x with so many bytes, and with these strides, where they aren't those of C order."""
    return torch.empty_like(x) if nbytes < REUSED_BYTES else _empty(x.shape, x.dtype, nbytes, strides)


def shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor in C order, in memory that other processes can map."""
    return over(shared_storage(math.prod(shape) * dtype.itemsize), shape, dtype)


def over(storage: Any, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Tensor:
    """A tensor over the whole of a storage, in C order without `strides`."""
    if strides is None:
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, strides)


def advise(address: int, nbytes: int) -> None:
    """Ask for huge pages for the whole ones within a range of memory; a wish, which the system may ignore."""
    start = -(-address // _PAGE) * _PAGE
    length = (address + nbytes - start) // _PAGE * _PAGE
    if length > 0 and _madvise is not None and _ADVICE is not None:
        _madvise(start, length, _ADVICE)


_kept = Kept()


def reset() -> None:
    """Hold nothing."""
    global _kept
    _kept = Kept()


if hasattr(os, "register_at_fork"):
    # A child shares its parent's pages until it writes: it starts with none to use again, and a lock that nobody holds.
    os.register_at_fork(after_in_child=reset)
