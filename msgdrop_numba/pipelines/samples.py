"""The memory of a batch's samples: found for all at once if they are alike, refused if they don't fit together."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from msgdrop_numba.call.arguments import address, is_masked
from msgdrop_numba.tensors.arguments import has_sizes
from msgdrop_numba.torch_private import make_guard, unreadable_reason

Name = Callable[[int], str]  # what a sample is called in an error, by its number in the batch

_shape, _writeable = attrgetter("shape"), attrgetter("flags.writeable")


class Words(array):  # type: ignore[type-arg]
    """64-bit integers whose address is told at once; of an array of NumPy's it takes as long as copying a sample."""

    __slots__ = ()

    def data_ptr(self) -> int:
        return self.buffer_info()[0]


class Samples(NamedTuple):
    """The samples of one field: contiguous memory, kept alive by `owners`.

    Fields:
        starts: each sample's address.
        lengths: how many messages each has.
    """

    owners: list[Any]
    starts: Words
    lengths: list[int]
    features: tuple[int, ...]
    dtype: torch.dtype


def read(samples: list[Any], dims: int, varying: bool, name: Name) -> Samples:
    """The memory of the samples. Raises if they don't fit together, or have fewer dims.

    Args:
        varying: whether their lengths may differ: it is what is asked first.
    """
    together = _read_together(samples, dims, varying)
    if together is not None:
        return together
    each = [_read_one(sample, row, name) for row, sample in enumerate(samples)]
    owners, starts, shapes, dtypes = map(list, zip(*each, strict=True))
    _check_alike(shapes, dtypes, dims, name)
    lengths, features = [shape[0] for shape in shapes], tuple(shapes[0][1:])
    if 0 in starts and math.prod(features):
        _check_memory(starts, lengths, name)
    return Samples(owners, Words("q", starts), lengths, features, dtypes[0])


def _read_together(samples: list[Any], dims: int, varying: bool) -> Samples | None:
    """`read` of ordinary tensors, or arrays, that are alike; None: they are others."""
    if type(samples[0]) is np.ndarray and {*map(type, samples)} == {np.ndarray} and all(map(_writeable, samples)):
        try:
            samples = [*map(torch.from_numpy, samples)]  # which warns of arrays that aren't writeable
        except (TypeError, ValueError):  # a dtype that torch lacks, another byte order, strides below 0
            return None
    if not _are_alike(samples, varying):
        return None
    try:
        starts = [*map(Tensor.data_ptr, samples)]
    except RuntimeError:  # a transform's wrapper
        return None
    first = samples[0]
    if not all(starts) or first.dim() < dims:
        return None
    size, *features = first.shape
    lengths = [shape[0] for shape in map(_shape, samples)] if varying else [size] * len(samples)
    return Samples(samples, Words("q", starts), lengths, tuple(features), first.dtype)


def _are_alike(tensors: list[Any], varying: bool) -> bool:
    """True if a guard recognises them all as ordinary CPU tensors in C order, alike in dtype and shape.

    One guard asks a whole batch at once: asking each tensor takes longer than to copy it, where it is small.
    """
    first = tensors[0]
    if {*map(type, tensors)} != {Tensor} or not all(map(has_sizes, tensors)):
        return False
    if not first.is_cpu or unreadable_reason(first) or not first.dim() or not first.is_contiguous():
        return False
    shape, inference = first.shape, torch.is_inference_mode_enabled()
    key = len(tensors), varying, len(shape), shape[varying:], first.dtype, first.requires_grad, inference
    guard = _guards.get(key)
    if guard is None:
        if len(_guards) >= 256:
            _guards.clear()
        guard = _guards[key] = make_guard([first] * len(tensors), varying)
    return guard is not None and guard(*tensors)


_guards: dict[Any, Any] = {}


def _read_one(sample: Any, row: int, name: Name) -> tuple[Any, int, Any, torch.dtype]:
    """A sample as contiguous memory: what owns it, its address, shape and dtype."""
    if isinstance(sample, Tensor):
        owner = sample.detach().resolve_conj().resolve_neg()
        if not owner.is_cpu or unreadable_reason(owner):
            raise TypeError(
                f"{name(row)} must be an ordinary CPU tensor, outside torch's transforms and "
                f"dispatch modes, but got {type(sample).__name__} on {sample.device}"
            )
        owner = owner.contiguous()
        return owner, owner.data_ptr(), owner.shape, owner.dtype
    if not isinstance(sample, np.ndarray) or is_masked(sample):
        raise TypeError(f"{name(row)} must be an array or a tensor, but got {type(sample).__name__}")
    try:
        native = np.ascontiguousarray(sample, sample.dtype.newbyteorder("="))
        dtype = torch_dtype(native.dtype)
    except TypeError:
        raise TypeError(f"{name(row)} must have a dtype that torch has, but got {sample.dtype}") from None
    return native, address(native), sample.shape, dtype


def _check_alike(shapes: list[Any], dtypes: list[torch.dtype], dims: int, name: Name) -> None:
    for row, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        if len(shape) < dims:
            raise ValueError(f"{name(row)} must be (messages, *features), but got shape {tuple(shape)}")
        if dtype != dtypes[0] or shape[1:] != shapes[0][1:]:
            raise ValueError(
                f"{name(row)} must be like the batch's first, {dtypes[0]} with features "
                f"{tuple(shapes[0][1:])}, but got {dtype} with {tuple(shape[1:])}"
            )


def _check_memory(starts: list[int], lengths: list[int], name: Name) -> None:
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length and not start:
            raise ValueError(f"{name(row)} must have memory behind its messages, but has none: copy it first")


@lru_cache(maxsize=64)
def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """torch's name of a dtype of NumPy's; TypeError: it has none."""
    return torch.from_numpy(np.empty(0, dtype)).dtype
