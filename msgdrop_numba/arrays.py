"""message_dropout and keep_mask on NumPy arrays. Never imports torch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from msgdrop_numba.call import arguments
from msgdrop_numba.call.arguments import address
from msgdrop_numba.call.plan import Draw, Plan, follow, kept_factors, row_arguments
from msgdrop_numba.call.plan import plan as make_plan
from msgdrop_numba.call.threads import launch
from msgdrop_numba.kernels.records import COPY, FLOAT16, FLOAT32, FLOAT64

_SCALED = {"f2": FLOAT16, "f4": FLOAT32, "c8": FLOAT32, "f8": FLOAT64, "c16": FLOAT64}


def keep_mask(
    shape: tuple[int, ...], p: Any, exact: bool, span: int, min_keep: int, lengths: Any, seed: Any, keys: Any
) -> np.ndarray:
    """The bool mask over the message dims `shape`."""
    number, array = arguments.split_p(p)
    plan = make_plan((*shape, 0), 0, COPY, len(shape), number, exact, span, min_keep)
    seed = arguments.check_seed(seed)
    return draw_mask(plan, row_arguments(plan, array, False, None, lengths, keys), seed)


def draw_mask(plan: Plan, draw: Draw, seed: int) -> np.ndarray:
    """The mask alone."""
    mask = np.empty(plan.shape, np.bool_)
    if plan.messages:
        launch(plan, draw, seed, 0, 0, address(mask))
    return mask


def message_dropout(
    x: np.ndarray, p: Any, training: bool, inplace: bool, scale: bool, exact: bool, span: int, min_keep: int,
    lengths: Any, fill: Any, message_dims: int | None, seed: Any, keys: Any, generator: Any, out: Any,
    return_mask: bool,
) -> Any:  # fmt: skip
    """`functional.message_dropout` for an array."""
    kind = _kind(x.dtype, scale)
    number, array = arguments.split_p(p)
    plan = make_plan(x.shape, x.itemsize, kind, message_dims, number, exact, span, min_keep)
    message = _fill_message(fill, x.dtype, x.shape[len(plan.shape) :])
    active = training and number != 0
    target = _target(x, inplace, out, active)
    seed = arguments.check_source(seed, generator, np.random.Generator)
    draw = row_arguments(plan, array, scale, message, lengths, keys)
    if not active:
        if target is None:
            target = x
        elif target is not x:
            np.copyto(target, x)
        return (target, np.ones(plan.shape, np.bool_)) if return_mask else target

    if seed is None:
        seed = _fresh_seed(generator)
    mask = np.empty(plan.shape, np.bool_) if return_mask else None
    result = np.empty_like(x, subok=False) if target is None else target
    if not (x.flags.c_contiguous and result.flags.c_contiguous):
        plan = follow(plan, x.strides, result.strides)
    if plan.messages and plan.followed and (kind == COPY or x.dtype.isnative):
        launch(plan, draw, seed, address(x), address(result), address(mask))
    elif plan.messages:
        mask = draw_mask(plan, draw, seed)
        _write(plan, draw, x, result, mask)
    return (result, mask) if return_mask else result


def _write(plan: Plan, draw: Draw, x: np.ndarray, result: np.ndarray, mask: np.ndarray) -> None:
    """What the kernels do, in NumPy's operations: for layouts and byte orders that they can't follow."""
    wide = (*plan.shape, *(1,) * (x.ndim - mask.ndim))
    kept = mask.reshape(wide)
    if plan.kind != COPY:
        by, valid = (array.reshape(wide) for array in kept_factors(plan, draw))
        real = np.float64 if plan.kind == FLOAT64 else np.float32
        parts = [(x.real, result.real), (x.imag, result.imag)] if x.dtype.kind == "c" else [(x, result)]
        with np.errstate(all="ignore"):
            for part, into in parts:
                np.multiply(part, by.astype(real), out=into, where=kept & valid, dtype=real, casting="same_kind")
        kept = kept & ~valid
    np.copyto(result, x, where=kept)
    fill = np.zeros((), x.dtype) if draw.fill is None else draw.fill
    np.copyto(result, fill, where=~mask.reshape(wide))


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
    """One message of `fill`, a number or an array over the features, of x's dtype; None: zeros."""
    if arguments.is_zero(fill):
        return None
    if isinstance(fill, np.ndarray):
        if fill.shape != features or fill.dtype != dtype:
            raise ValueError(
                f"fill must be a number or an array like one message of x, {features} {dtype}, "
                f"but got {fill.shape} {fill.dtype}"
            )
        return np.array(fill, order="C")  # the user's own memory may be what is written
    if dtype.kind in "fc":
        high = float(np.finfo(dtype).max)
        number = arguments.check_number("fill", fill, dtype.kind, -high, high, dtype)
    else:
        low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
        number = arguments.check_number("fill", fill, "i", low, high, dtype)
    return np.full(features, number, dtype)


def _target(x: np.ndarray, inplace: bool, out: Any, active: bool) -> np.ndarray | None:
    """The array to write, checked; None where it is still to be made, or x stays as it is."""
    if inplace and out is not None:
        raise ValueError(f"give inplace=True or out, not both: got out={type(out).__name__}")
    if inplace and active:
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
    arguments.check_memory(name, _memory(x), _memory(out))
    return out


def _memory(x: np.ndarray) -> tuple[Any, ...]:
    return address(x), x.shape, x.strides, x.itemsize
