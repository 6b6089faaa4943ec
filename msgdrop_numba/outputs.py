"""Memory for large outputs: a page fault for every 4 KB of fresh memory costs more than the whole kernel.

Two remedies, each for what it buys (benchmarks/README.md, By size): huge pages take one fault for 2 MB; memory of an
earlier output that nobody uses any more takes none. Outputs of less than `HUGE_BYTES` come from torch alone.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections import deque
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.torch_private import shared_storage, storage_uses

HUGE_BYTES = 4 * 2**20
REUSED_BYTES = 32 * 2**20  # from here on the C library hands freed memory back to the system at once

# The most memory that is held for use again, once no output uses it; 0 turns that off.
KEPT_BYTES = 512 * 2**20

_PAGE = 2 * 2**20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone
_kept: deque[Any] = deque()  # storages of earlier outputs, most of them still in use

try:
    _madvise: Any = ctypes.CDLL(None).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
except (OSError, AttributeError, TypeError):
    _madvise = None


def _references() -> int:
    """What getrefcount says of an object that a local variable alone refers to; Pythons differ."""
    alone = [object()].pop()
    return sys.getrefcount(alone)


_ALONE = _references()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor in C order."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    reused = _unused(nbytes) if nbytes >= REUSED_BYTES and KEPT_BYTES else None
    if reused is None:
        fresh = torch.empty(shape, dtype=dtype, device="cpu")
        advise(fresh.data_ptr(), nbytes)
        if nbytes >= REUSED_BYTES and storage_uses(fresh.untyped_storage()):
            _keep(fresh.untyped_storage())
        return fresh
    tensor = over(reused, shape, dtype)
    _keep(reused)
    return tensor


def like(x: Tensor) -> Tensor:
    """An uninitialised CPU tensor in the order of memory of `torch.empty_like(x)`."""
    if x.numel() * x.element_size() < HUGE_BYTES:
        return torch.empty_like(x)
    strides = torch.empty_like(x, device="meta").stride()
    return over(empty((x.numel(),), x.dtype).untyped_storage(), x.shape, x.dtype, strides)


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


def _keep(storage: Any) -> None:
    _kept.append(storage)
    while sum(kept.nbytes() for kept in list(_kept)) > KEPT_BYTES:
        try:
            _kept.popleft()
        except IndexError:
            return


def _unused(nbytes: int) -> Any:
    """A kept storage of this size that nobody else refers to, no tensor, view, array or saved tensor; or None."""
    for _ in range(len(_kept)):
        try:
            storage = _kept.popleft()  # taken out first: no other thread can ask for it meanwhile
        except IndexError:
            return None
        if storage.is_shared() or not storage.resizable() or storage.nbytes() < REUSED_BYTES:
            continue  # changed since, by somebody who used it
        # The one use is this Python object. Asked again behind the references: another thread may have made one a use.
        if (
            storage.nbytes() == nbytes and storage_uses(storage) == 1
            and sys.getrefcount(storage) == _ALONE and storage_uses(storage) == 1
        ):  # fmt: skip
            return storage
        _kept.append(storage)
    return None


reset = _kept.clear  # hold nothing

if hasattr(os, "register_at_fork"):
    # A child shares its parent's pages until it writes: it starts with none to use again.
    os.register_at_fork(after_in_child=reset)
