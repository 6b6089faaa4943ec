"""What is the same for every call on arrays of one shape: how many messages, how wide, dropped by which rule."""

from __future__ import annotations

import math
import numbers
from functools import lru_cache
from typing import Any, NamedTuple

from msgdrop_numba.kernels.cpu import COPY
from msgdrop_numba.rule import DropRule

MAX_ROW = 2**34  # positions: the contract's 32-bit counter numbers four draws each


class Plan(NamedTuple):
    """The numbers of a kernel call that don't depend on the data."""

    shape: tuple[int, ...]  # the message dims
    messages: int
    size: int  # positions in a row
    width: int  # bytes in a message
    kind: int  # what is done to kept elements, see kernels.cpu
    threshold: int
    factor: float  # what kept elements are multiplied by, if kind says so


def plan(shape: tuple[int, ...], itemsize: int, kind: int, p: float, message_dims: int | None) -> Plan:
    """The plan for an array of `shape`, made once for each set of arguments: it costs as much as a small kernel.

    Args:
        shape: of the whole array, features included.
        itemsize: bytes in an element.
        kind: COPY, or the type that kept elements are scaled in.
        p: probability of dropping, read by `DropRule`.
        message_dims: how many leading dims index messages; None: 2 of 3 or more, else 1.
    """
    if type(p) is float:
        return _cached(shape, itemsize, kind, p, message_dims)
    return _make(shape, itemsize, kind, p, message_dims)


def mask_plan(shape: Any, p: float) -> Plan:
    """The plan for a mask alone: messages of no bytes."""
    dims = (shape,) if isinstance(shape, numbers.Integral) else tuple(shape)
    if not dims or any(isinstance(d, bool) or not isinstance(d, numbers.Integral) or d < 0 for d in dims):
        raise ValueError(f"shape must be the message dims, integers of 0 or more, but got {shape!r}")
    dims = tuple(int(d) for d in dims)
    return _make((*dims, 0), 0, COPY, p, len(dims))


def _make(shape: tuple[int, ...], itemsize: int, kind: int, p: float, message_dims: int | None) -> Plan:
    rule = DropRule(p)
    dims = _message_dims(shape, message_dims)
    messages, size = math.prod(shape[:dims]), shape[dims - 1]
    if size > MAX_ROW:
        raise ValueError(f"a row has at most 2**34 messages, but x has shape {tuple(shape)}")
    width = math.prod(shape[dims:]) * itemsize
    return Plan(tuple(shape[:dims]), messages, size, width, kind, rule.threshold, rule.scale)


_cached = lru_cache(maxsize=512, typed=True)(_make)


def _message_dims(shape: tuple[int, ...], message_dims: int | None) -> int:
    if message_dims is None:
        message_dims = 2 if len(shape) >= 3 else 1
    elif isinstance(message_dims, bool) or not isinstance(message_dims, numbers.Integral):
        raise TypeError(f"message_dims must be an integer or None, but got {message_dims!r}")
    elif message_dims < 1:
        raise ValueError(f"message_dims must be at least 1, but got {message_dims}")
    if len(shape) <= message_dims:
        raise ValueError(
            f"x must have {message_dims} message dims and at least one feature dim, but got shape {tuple(shape)}; "
            "add one with x[..., None], or set message_dims"
        )
    return int(message_dims)
