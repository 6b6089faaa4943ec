"""Memory for the tensors that we make on the CPU: torch's own, lent by `outputs`, or shared between processes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msgdrop_numba import outputs
from msgdrop_numba.torch_private import shared_storage


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor in C order."""
    lent = _lent(math.prod(shape) * dtype.itemsize, shape, dtype, None)
    return torch.empty(shape, dtype=dtype, device="cpu") if lent is None else lent


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised CPU tensor in the memory order of `torch.empty_like(x)`."""
    nbytes = x.numel() * x.element_size()
    if nbytes < outputs.LENT_BYTES:
        return torch.empty_like(x)
    return dense(x, nbytes, torch.empty_like(x, device="meta").stride())


def dense(x: Tensor, nbytes: int, strides: tuple[int, ...] | None = None) -> Tensor:
    """An uninitialised CPU tensor of x's shape and dtype with these dense strides.

    Args:
        nbytes: of x, which the caller knows.
        strides: in elements; None: x is in C order.
    """
    small = nbytes < outputs.LENT_BYTES  # a small call feels each function
    lent = None if small else _lent(nbytes, x.shape, x.dtype, strides)
    return torch.empty_like(x) if lent is None else lent


# By way of NumPy, a tensor takes one call of torch's, which costs most.
_OF_NUMPY = {
    torch.from_numpy(np.empty(0, name)).dtype: np.dtype(name)
    for name in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
}


def _lent(nbytes: int, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None) -> Tensor | None:
    """A tensor over lent memory; None if there is none. No view: users may change it in place."""
    known = _OF_NUMPY.get(dtype)
    if known is not None:
        steps = None if strides is None else tuple(step * dtype.itemsize for step in strides)
        made = outputs.array_for_torch(nbytes, shape, known, steps)
        return None if made is None else torch.from_numpy(made)
    made = outputs.array_for_torch(nbytes, (nbytes,), _BYTE)
    if made is None:
        return None
    flat = torch.frombuffer(made, dtype=dtype)
    return flat.resize_(shape) if strides is None else flat.as_strided_(shape, strides)


_BYTE = np.dtype(np.uint8)


def shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor in C order, in memory that other processes can map."""
    return over(shared_storage(math.prod(shape) * dtype.itemsize), shape, dtype)


def over(storage: Any, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Tensor:
    """A tensor over the whole of a storage, in C order without `strides`."""
    if strides is None:
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, strides)
