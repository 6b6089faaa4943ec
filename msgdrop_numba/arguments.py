"""What every array library shares: reading and checking the arguments that name rows, seeds and values."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from msgdrop_numba.kernels._jit import jit
from msgdrop_numba.philox import fold_in

_U64 = 2**64 - 1
_MAX_WORK: Any = 100_000  # steps of the exact search for shared memory; past them it counts as shared


def check_seed(seed: Any) -> int:
    """A seed as Python int: an integer in [0, 2**64), or a 0-d int64 tensor with the same bits."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(seed, torch.Tensor):
        if seed.ndim != 0 or seed.dtype != torch.int64:
            raise TypeError(f"a seed tensor must be 0-d int64, but got {seed!r}")
        return int(seed) & _U64
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an integer in [0, 2**64), but got {seed!r}")
    if not 0 <= int(seed) <= _U64:
        raise ValueError(f"seed must be an integer in [0, 2**64), but got {seed!r}")
    return int(seed)


def check_key(name: str, value: Any) -> int:
    """The 64 bits of an integer in [-2**63, 2**64), a negative one as its two's complement."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be integers, but got {value!r}")
    if not -(2**63) <= int(value) <= _U64:
        raise ValueError(f"{name} must be in [-2**63, 2**64), but got {value!r}")
    return int(value) & _U64


def check_source(seed: Any, generator: Any, kind: type) -> int | None:
    """The seed as Python int, or None where it is to be drawn from `generator`, None or of type `kind`."""
    if generator is not None:
        if seed is not None:
            raise ValueError(f"give seed or generator, not both: got seed={seed!r} and generator={generator!r}")
        if not isinstance(generator, kind):
            raise TypeError(f"generator must be a {kind.__module__}.{kind.__name__}, but got {generator!r}")
    return None if seed is None else check_seed(seed)


def _integers(name: str, values: Any) -> np.ndarray:
    """An integer array of anything array-like; Python integers are read one by one, so that none becomes a float."""
    if isinstance(values, (Sequence, numbers.Number)) and not isinstance(values, (str, bytes, np.generic)):
        values = np.array(values, dtype=object)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        if values.dtype.is_floating_point or values.dtype.is_complex:
            raise TypeError(f"{name} must be integers, but got dtype {values.dtype}")
        values = values.detach().cpu().clone().numpy()  # .numpy() of the user's own would fix its storage's size
    array = np.asarray(values)
    if array.dtype == object:
        bits = [check_key(name, value) for value in array.ravel()]
        return np.array(bits, dtype=np.uint64).reshape(array.shape).view(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, but got dtype {array.dtype}")
    return array


@jit
def _fold_rows(keys: Any, inner: int, folded: Any) -> None:
    for row in range(folded.size):
        folded[row] = fold_in(keys[row // inner], np.uint64(row % inner))


def row_keys(keys: Any, row_shape: tuple[int, ...]) -> np.ndarray | None:
    """One uint64 key a row (C order), or None for the default, the row's index.

    Args:
        keys: integers of the shape `row_shape` or a leading part of it; with dims missing, a row's key is
            `fold_in(key, C-order index in the missing dims)` (contract, section 2).
        row_shape: the message dims without the last.
    """
    if keys is None:
        return None
    array = _integers("keys", keys)
    if array.shape != row_shape[: array.ndim]:
        raise ValueError(f"keys must have shape {row_shape} or a leading part of it, but got {array.shape}")
    flat = np.ascontiguousarray(array, dtype=np.uint64 if array.dtype.kind == "u" else np.int64).ravel()
    flat = flat.view(np.uint64)
    if array.ndim == len(row_shape):
        return flat
    folded = np.empty(math.prod(row_shape), np.uint64)
    if folded.size:
        _fold_rows(flat, folded.size // flat.size, folded)
    return folded


def row_lengths(lengths: Any, row_shape: tuple[int, ...], size: int) -> np.ndarray | None:
    """One int64 count of valid messages a row, or None where all are."""
    if lengths is None:
        return None
    array = _integers("lengths", lengths)
    if array.shape != row_shape:
        raise ValueError(f"lengths must have shape {row_shape}, one a row, but got {array.shape}")
    if array.size and not (array.min() >= 0 and array.max() <= size):
        wrong = array[(array < 0) | (array > size)].flat[0]
        raise ValueError(f"lengths must be from 0 to {size}, the messages of a row, but got {wrong}")
    return np.ascontiguousarray(array, dtype=np.int64).ravel()


def address(array: np.ndarray | None) -> int:
    """Where an array's bytes begin; 0 for None."""
    return 0 if array is None else int(array.__array_interface__["data"][0])


def is_zero(fill: Any) -> bool:
    """Whether `fill` is plain zero, whose bytes are zeros in every dtype (-0.0 is not)."""
    return type(fill) in (int, float) and fill == 0 and math.copysign(1.0, fill) > 0


def check_number(name: str, fill: Any, kind: str, low: float, high: float, dtype: Any) -> None:
    """Refuse a `fill` that a dtype can't hold: `kind` as NumPy's (i: whole, f: real, c: complex), range [low, high]."""
    if not isinstance(fill, (numbers.Complex, np.bool_)):
        raise TypeError(f"{name} must be a number, but got {fill!r}")
    parts: list[Any] = [fill.real, fill.imag] if kind == "c" else [fill]
    for part in parts:
        if kind != "c" and not isinstance(fill, (numbers.Real, np.bool_)):
            fits = False
        elif math.isfinite(part):
            fits = bool(low <= float(part) <= high) and (kind != "i" or part == int(part))
        else:
            fits = kind != "i"
        if not fits:
            raise ValueError(f"{name} must be a number that {dtype} can hold, but got {fill!r}")


class _Bytes:
    """An array description that NumPy reads without touching the memory."""

    def __init__(self, start: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
        self.__array_interface__ = {
            "version": 3, "data": (start, True), "shape": shape, "strides": strides, "typestr": f"|V{itemsize}",
        }  # fmt: skip


def check_target(name: str, x: tuple[Any, ...], out: tuple[Any, ...]) -> None:
    """Refuse to write into memory that holds an element twice, or that x shares in part.

    Args:
        name: of the argument to be written.
        x, out: (address, shape, strides in bytes, itemsize) each; equal: in place.
    """
    _, shape, strides, _ = out
    if math.prod(shape) and any(step == 0 and dim > 1 for step, dim in zip(strides, shape, strict=True)):
        raise ValueError(f"{name} must not be expanded, but got strides {strides}: copy it first")
    if x == out:
        return
    try:
        overlap = np.shares_memory(np.asarray(_Bytes(*x)), np.asarray(_Bytes(*out)), max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        overlap = True
    if overlap:
        raise ValueError(f"{name} overlaps x in part; give x itself, or memory of its own")
