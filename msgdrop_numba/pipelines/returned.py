"""Batches that a collate function of the user's returned: messages are dropped in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from msgdrop_numba.call.arguments import address
from msgdrop_numba.call.request import Options, Request
from msgdrop_numba.functional import drop_messages
from msgdrop_numba.pipelines.rows import Own


def request_in(options: Options, fields: dict[str, Any], seed: int, keys: np.ndarray, own: Own | None) -> Request:
    """The requests for the fields of one mask, by their labels."""
    sizes = set()
    for field, x in fields.items():
        if not isinstance(x, (Tensor, np.ndarray)) or x.ndim < 3 or len(x) != len(keys):
            shape = tuple(x.shape) if isinstance(x, (Tensor, np.ndarray)) else type(x).__name__
            raise ValueError(
                f"collate_fn must return (samples, messages, features) with {len(keys)} rows"
                f"{' in ' if field else ''}{field}, but got {shape}"
            )
        sizes.add(x.shape[1])
    if len(sizes) > 1:
        raise ValueError(
            f"{', '.join(fields)} must have as many messages each, but got {sorted(sizes)}: they share one mask; "
            "give them their own with fields={name: mask name, ...}"
        )
    (size,) = sizes
    request = Request.of(options.for_rows(size), inplace=True, seed=seed, keys=keys, return_mask=True)
    return request if own is None else own.requested(request, None, size, f" of {', '.join(fields)}")


def drop_in(fields: dict[str, Any], request: Request) -> Any:
    """Drop in those fields; their keep mask."""
    fill = request.fill
    once = {_memory(x): x for x in fields.values()}  # memory that has two names is dropped in once
    for x in once.values():
        like_x = fill.numpy() if isinstance(fill, Tensor) and isinstance(x, np.ndarray) else fill
        _, mask = drop_messages(x, replace(request, fill=like_x))
    return mask


def _memory(x: Any) -> tuple[Any, ...]:
    return address(x), tuple(x.shape), x.stride() if isinstance(x, Tensor) else x.strides, x.dtype
