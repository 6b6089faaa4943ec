"""message_dropout and keep_mask on NumPy arrays. Never imports torch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from msgdrop_numba import arguments
from msgdrop_numba.arguments import address
from msgdrop_numba.kernels.cpu import COPY, FLOAT16, FLOAT32, FLOAT64
from msgdrop_numba.plan import Plan
from msgdrop_numba.plan import plan as make_plan
from msgdrop_numba.threads import launch

_SCALED = {"f2": FLOAT16, "f4": FLOAT32, "c8": FLOAT32, "f8": FLOAT64, "c16": FLOAT64}


def keep_mask(plan: Plan, seed: Any, keys: Any, lengths: Any) -> np.ndarray:
    """The bool mask of a plan."""
    row_keys = arguments.row_keys(keys, plan.shape[:-1])
    row_lengths = arguments.row_lengths(lengths, plan.shape[:-1], plan.size)
    mask = np.empty(plan.shape, np.bool_)
    if mask.size:
        launch(plan, 0, 0, 0, address(mask), address(row_lengths), arguments.check_seed(seed), address(row_keys))
    return mask


def message_dropout(
    x: np.ndarray, p: float, training: bool, inplace: bool, scale: bool, lengths: Any, fill: Any,
    message_dims: int | None, seed: Any, keys: Any, generator: Any, out: Any, return_mask: bool,
) -> Any:  # fmt: skip
    """`functional.message_dropout` for an array."""
    kind = _kind(x.dtype, scale)
    plan = make_plan(x.shape, x.itemsize, kind, p, message_dims)
    message = _fill_message(fill, x.dtype, x.shape[len(plan.shape) :])
    target = _target(x, inplace, out)
    row_keys = arguments.row_keys(keys, plan.shape[:-1])
    row_lengths = arguments.row_lengths(lengths, plan.shape[:-1], plan.size)
    seed = arguments.check_source(seed, generator, np.random.Generator)
    if not training or p == 0:
        if target is None:
            target = x
        elif target is not x:
            np.copyto(target, x)
        return (target, np.ones(plan.shape, np.bool_)) if return_mask else target

    if seed is None:
        seed = _fresh_seed(generator)
    mask = np.empty(plan.shape, np.bool_) if return_mask else None
    native = x.dtype if kind == COPY else x.dtype.newbyteorder("=")
    source = np.ascontiguousarray(x, native)
    result = np.empty(x.shape, x.dtype) if target is None else target
    buffer = result if result.flags.c_contiguous and result.dtype == native else np.empty(x.shape, native)
    if plan.messages:
        launch(
            plan, address(source), address(buffer), address(message), address(mask), address(row_lengths),
            seed, address(row_keys),
        )  # fmt: skip
    if buffer is not result:
        result[...] = buffer
    return (result, mask) if return_mask else result


def _fresh_seed(generator: np.random.Generator | None) -> int:
    if generator is None:
        return int.from_bytes(os.urandom(8), "little") >> 1
    return int(generator.integers(2**63 - 1))


def _kind(dtype: np.dtype[Any], scale: bool) -> int:
    if dtype.kind not in "biufc":
        raise TypeError(f"x must be an array of numbers or bools, but got dtype {dtype}")
    if not scale:
        return COPY
    if dtype.str[1:] not in _SCALED:
        raise TypeError(f"scale=True needs a floating or complex dtype of at most 64 bits a part, but x has {dtype}")
    return _SCALED[dtype.str[1:]]


def _fill_message(fill: Any, dtype: np.dtype[Any], features: tuple[int, ...]) -> np.ndarray | None:
    """One message of `fill`, or None where that is zeros."""
    if arguments.is_zero(fill):
        return None
    if dtype.kind in "fc":
        high = float(np.finfo(dtype).max)
        arguments.check_number("fill", fill, dtype.kind, -high, high, dtype)
    else:
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        arguments.check_number("fill", fill, "i", low, high, dtype)
    return np.full(features, fill, dtype)


def _target(x: np.ndarray, inplace: bool, out: Any) -> np.ndarray | None:
    """The array to write, checked; None where it is still to be made."""
    if inplace and out is not None:
        raise ValueError("give inplace=True or out, not both")
    if inplace:
        out = x
    if out is None:
        return None
    name = "x, to be changed in place," if inplace else "out"
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array like x, but got {type(out).__name__}")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"{name} must have x's shape {x.shape} and dtype {x.dtype}, but got {out.shape} and {out.dtype}"
        )
    if not out.flags.writeable:
        raise ValueError(f"{name} must be writable, but got a read-only array")
    arguments.check_target(name, _memory(x), _memory(out))
    return out


def _memory(x: np.ndarray) -> tuple[Any, ...]:
    return address(x), x.shape, x.strides, x.itemsize
