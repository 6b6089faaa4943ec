"""Memory for the tensors that we make on the CPU: torch's own, lent by `outputs`, or shared between processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba import outputs
from msgdrop_numba.torch_private import shared_storage


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor in C order."""
    count = math.prod(shape)
    buffer = outputs.lend(count * dtype.itemsize)
    if buffer is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(buffer, dtype=dtype, count=count).resize_(shape)


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised CPU tensor in the memory order of `torch.empty_like(x)`."""
    nbytes = x.numel() * x.element_size()
    if nbytes < outputs.LENT_BYTES:
        return torch.empty_like(x)
    return dense(x, nbytes, torch.empty_like(x, device="meta").stride())


def dense(x: Tensor, nbytes: int, strides: tuple[int, ...] | None) -> Tensor:
    """An uninitialised CPU tensor of x's shape and dtype with these dense strides.

    Args:
        nbytes: of x, which the caller knows.
        strides: in elements; None: those of x, which is in C order.
    """
    buffer = outputs.lend(nbytes)
    if buffer is None:
        return torch.empty_like(x)
    flat = torch.frombuffer(buffer, dtype=x.dtype, count=x.numel())
    return flat.as_strided_(x.shape, strides or x.stride())  # no view: users may change it in place


def shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor in C order, in memory that other processes can map."""
    return over(shared_storage(math.prod(shape) * dtype.itemsize), shape, dtype)


def over(storage: Any, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Tensor:
    """A tensor over the whole of a storage, in C order without `strides`."""
    if strides is None:
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, strides)
