"""Checks of arguments that all array libraries share: rows, seeds and values."""

from __future__ import annotations

import ctypes
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from msgdrop_numba.call.rule import MAX_ROW, ArrayRule, P, Rule, check_p, read_rule
from msgdrop_numba.kernels._jit import direct
from msgdrop_numba.kernels.rules import lengths_fit

_U64 = 2**64 - 1
_MAX_WORK: Any = 100_000  # steps of the exact search for shared memory; past them it counts as shared


def message_dims(shape: tuple[int, ...], dims: Any) -> int:
    """The number of leading dims that index messages: `dims`, by default 2 of 3 or more, else 1."""
    if isinstance(dims, tuple):
        raise TypeError(f"message_dims must be an integer or None here, but got {dims}: permute x first")
    count: int = (2 if len(shape) >= 3 else 1) if dims is None else check_message_dims(dims)
    if len(shape) <= count:
        raise ValueError(
            f"x must have {count} message dims and at least one feature dim, but got shape {tuple(shape)}; "
            "add one with x[..., None], or set message_dims"
        )
    return count


def check_message_dims(dims: Any) -> Any:
    """message_dims as an int of at least 1, or a tuple of one int or more, none of them twice."""
    each = dims if isinstance(dims, tuple) else (dims,)
    if any(isinstance(dim, bool) or not isinstance(dim, numbers.Integral) for dim in each):
        raise TypeError(f"message_dims must be an integer, a tuple of dims or None, but got {dims!r}")
    if each is dims:
        if not dims or len(set(dims)) < len(dims):
            raise ValueError(f"message_dims must name one dim or more, none of them twice, but got {dims}")
        return tuple(map(int, dims))
    if dims < 1:
        raise ValueError(f"message_dims must be at least 1, but got {dims}")
    return int(dims)


def message_order(ndim: int, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that brings the named dims to the front, in their order."""
    named = tuple(dim + ndim if dim < 0 else dim for dim in check_message_dims(dims))
    if len(set(named)) < len(named) or not all(0 <= dim < ndim for dim in named):
        raise ValueError(f"message_dims must name dims of x, which has {ndim}, each once, but got {dims}")
    return (*named, *(dim for dim in range(ndim) if dim not in named))


def order_back(order: tuple[int, ...]) -> tuple[int, ...]:
    """The inverse of a permutation."""
    return tuple(map(order.index, range(len(order))))


def check_seed(seed: Any) -> int:
    """A seed as Python int: an integer in [0, 2**64), or a 0-d int64 tensor with the same bits."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(seed, torch.Tensor):
        check_seed_tensor(seed)
        return int(seed) & _U64
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an integer in [0, 2**64), but got {seed!r}")
    if not 0 <= int(seed) <= _U64:
        raise ValueError(f"seed must be an integer in [0, 2**64), but got {seed!r}")
    return int(seed)


def signed(bits: int) -> int:
    """64 bits as an int64."""
    return bits if bits < 2**63 else bits - 2**64


def check_seed_tensor(seed: Any) -> None:
    """Refuse a tensor that is no 0-d int64."""
    if seed.ndim != 0 or str(seed.dtype) != "torch.int64":
        raise TypeError(f"a seed tensor must be 0-d int64, but got {seed.dtype} of shape {tuple(seed.shape)}")


def check_key(name: str, value: Any) -> int:
    """The 64 bits of an integer in [-2**63, 2**64), a negative one as its two's complement."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be integers, but got {value!r}")
    if not -(2**63) <= int(value) <= _U64:
        raise ValueError(f"{name} must be in [-2**63, 2**64), but got {value!r}")
    return int(value) & _U64


def check_source(seed: Any, generator: Any, kind: type) -> int | None:
    """The seed as Python int, or None where it is to be drawn from `generator`, None or of type `kind`."""
    if generator is None and (seed is None or (type(seed) is int and 0 <= seed <= _U64)):  # the usual ones, asked first
        return seed
    if generator is not None:
        if seed is not None:
            raise ValueError(f"give seed or generator, not both: got seed={seed!r} and generator={generator!r}")
        if not isinstance(generator, kind):
            raise TypeError(f"generator must be a {kind.__module__}.{kind.__name__}, but got {generator!r}")
    return None if seed is None else check_seed(seed)


def is_masked(value: Any) -> bool:
    """True for NumPy's masked arrays, without importing them."""
    masked = sys.modules.get("numpy.ma")
    return masked is not None and isinstance(value, masked.MaskedArray)


def refuse_masked(name: str, values: Any) -> None:
    """NumPy's masked arrays: their masks would be lost."""
    if is_masked(values):
        raise TypeError(f"{name} must be a plain array, but got a masked one, whose mask would be lost: give filled()")


def integers(name: str, values: Any, read: Callable[[str, Any], int] = check_key) -> np.ndarray:
    """An integer array of anything array-like; Python objects are read one by one, so that none becomes a float."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        if values.dtype.is_floating_point or values.dtype.is_complex:
            raise TypeError(f"{name} must be integers, but got dtype {values.dtype}")
        # .numpy() of the user's own would fix its storage's size
        values = (values.clone() if values.is_cpu else values.cpu()).numpy()
    elif isinstance(values, (Sequence, numbers.Number)) and not isinstance(values, (str, bytes, np.generic)):
        values = np.array(values, dtype=object)
    refuse_masked(name, values)
    array: np.ndarray = np.asarray(values)
    if array.dtype.kind in "OUST":
        bits = [read(name, value) for value in array.ravel().tolist()]
        return np.array(bits, dtype=np.uint64).reshape(array.shape).view(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, but got dtype {array.dtype}")
    return array


def check_keys_shape(given: tuple[int, ...], rows: tuple[int, ...]) -> None:
    """Refuse keys that have neither the shape of the rows nor a leading part of it."""
    if given != rows[: len(given)]:
        more = len(given) > len(rows) and given[: len(rows)] == rows
        alone = ", or make each message a row with x[:, None]" if not rows else ""
        hint = f": keys name rows; number the messages of a row by positions{alone}" if more else ""
        raise ValueError(f"keys must have shape {rows} or a leading part of it, but got {given}{hint}")


def row_lengths(lengths: Any, row_shape: tuple[int, ...], size: int) -> np.ndarray | None:
    """One int64 count of valid messages a row, or None where all are."""
    if lengths is None:
        return None
    array = integers("lengths", lengths)
    if array.shape != row_shape:
        raise ValueError(f"lengths must have shape {row_shape}, one a row, but got {array.shape}")
    counts = np.array(array, dtype=np.int64, order="C").ravel()  # the user's own memory may be what is written
    if counts.size and not direct(lengths_fit)(address(counts), counts.size, size):
        wrong = array[(array < 0) | (array > size)].flat[0]
        raise ValueError(f"lengths must be from 0 to {size}, the messages of a row, but got {wrong}")
    return counts


def protected(protect: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The messages that take no part, as bools: one a position, or one a message of `shape`."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(protect, torch.Tensor):
        check_protect(protect, shape)
        protect = protect.detach().cpu().clone().numpy()  # .numpy() of the user's own would fix its storage's size
    refuse_masked("protect", protect)
    array: np.ndarray = np.asarray(protect)
    check_protect(array, shape)
    return np.array(array, order="C", subok=False)  # the user's own memory may be what is written


def check_protect(protect: Any, shape: tuple[int, ...]) -> None:
    """Refuse what isn't bool, or of another shape; for arrays and tensors."""
    if str(protect.dtype) not in ("bool", "torch.bool"):
        floats = "; a mask of 0 and -inf is mask == -inf" if "float" in str(protect.dtype) else ""
        raise TypeError(
            f"protect must be bool, True where a message takes no part, but got dtype {protect.dtype}{floats}"
        )
    check_each("protect", tuple(protect.shape), shape)


def is_each(given: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """True if a shape is that of the message dims, or of the last one alone."""
    return given == shape[-1:] or given == shape  # by `in`, Dynamo finds no symbol equal to a number


def check_each(name: str, given: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Refuse a shape that is neither that of the message dims nor that of the last one alone."""
    if not is_each(given, shape):
        either = " or ".join(str(tuple(s)) for s in dict.fromkeys((shape[-1:], shape)))
        raise ValueError(f"{name} must have shape {either}, as the message dims, but got {given}")


def split_positions(positions: Any, size: Any) -> tuple[Any, Any]:
    """The position of a row's first message where they are consecutive, and None; or (0, an array of positions)."""
    if positions is None:
        return 0, None
    offset = positions
    if not isinstance(positions, int):  # asked first: Dynamo can't ask a symbol for attributes
        if getattr(positions, "ndim", 0) or isinstance(positions, (list, tuple)):
            return 0, positions
        offset = positions.item() if hasattr(positions, "item") else positions
    if isinstance(offset, bool) or not isinstance(offset, numbers.Integral):
        raise TypeError(
            f"positions must be an integer, the first message's, or an array of them, but got {positions!r}"
        )
    if offset < 0 or offset + max(size, 1) > MAX_ROW:
        raise ValueError(f"positions must be from 0 to 2**34 - 1, but got {offset} for the first of {size} messages")
    return int(offset), None


def message_positions(positions: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of positions as int64, checked: one a message of a row, or of all rows."""
    array = integers("positions", positions)
    check_each("positions", array.shape, shape)
    if array.size and not (array.min() >= 0 and array.max() < MAX_ROW):
        wrong = array[(array < 0) | (array >= MAX_ROW)].flat[0]
        raise ValueError(f"positions must be from 0 to 2**34 - 1, but got {wrong}")
    torch = sys.modules.get("torch")
    copied = torch is not None and isinstance(positions, torch.Tensor)  # the user's own memory may be what is written
    return array.astype(np.int64, order="C", copy=not copied)


def split_p(p: Any) -> tuple[P, Any]:
    """p as (number or range, None) or, where it is an array or tensor, (None, array)."""
    if type(p) is float:
        return p, None
    if getattr(p, "ndim", 0) > 0:
        return None, p
    return check_p(p.item() if hasattr(p, "item") else p), None


def probabilities(p: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of probabilities as float64, checked: one a position, or one a message of `shape`."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(p, torch.Tensor):
        if p.dtype == torch.bool or p.is_complex():
            raise TypeError(f"p must hold floating-point numbers, but got dtype {p.dtype}")
        p = p.detach().cpu().to(torch.float64).numpy()
    refuse_masked("p", p)
    if p.dtype.kind not in "fiu":
        raise TypeError(f"p must hold floating-point numbers, but got dtype {p.dtype}")
    values: np.ndarray = np.array(p, dtype=np.float64, order="C")
    if not is_each(p.shape, shape):
        check_broadcast(p.shape, shape)
        values = np.broadcast_to(values, shape).copy()
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        wrong = values[~((values >= 0) & (values <= 1))].flat[0]
        raise ValueError(f"p must hold probabilities of dropping, from 0 to 1, but got {wrong}")
    return values


def check_broadcast(of_p: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Refuse a p whose shape doesn't broadcast to the message dims from the right."""
    fits, missing = len(of_p) <= len(shape), len(shape) - len(of_p)
    for dim, ours in enumerate(of_p if fits else ()):  # a plain loop, which every Dynamo follows
        fits = fits and (ours == 1 or ours == shape[missing + dim])
    if not fits:
        either = " or ".join(str(s) for s in dict.fromkeys((shape[-1:], shape)))
        raise ValueError(
            f"p must be a number or have shape {either}, or broadcast to the latter, but got {of_p}: give one a row as "
            "p[..., None], and expand what has other dims to the latter shape first"
        )


def split_rule(p: Any, exact: Any, span: Any, min_keep: Any, prefix: Any) -> tuple[Rule, Any]:
    """`read_rule` where values can be looked at: an array without dims is a number."""
    rule, given = read_rule(p, exact, span, min_keep, prefix)
    return rule.resolve(split_p, given) if isinstance(rule, ArrayRule) else (rule, None)


def position_rule(p: Any, *keywords: Any) -> tuple[Rule, np.ndarray | None]:
    """The rule of a pipeline, and probabilities with one for each position if p is an array, else None."""
    rule, array = split_rule(p, *keywords)
    if array is None:
        return rule, None
    if array.ndim > 1:
        raise ValueError(f"p must be a number or have one dim, a position each, but got {tuple(array.shape)}")
    return rule, probabilities(array, tuple(array.shape))


def thresholds(p: np.ndarray) -> np.ndarray:
    """T(p) of the contract, for each element."""
    rounded: np.ndarray = np.rint(p * 2.0**32)
    return rounded.astype(np.uint64)


def scales(p: np.ndarray) -> np.ndarray:
    """1/(1-p) for each element, and 1 where p is 1."""
    result: np.ndarray = 1 / np.where(p < 1, 1 - p, 1)
    return result


def address(array: Any) -> int:
    """The address of an array or a tensor; 0 for None."""
    if array is None:
        return 0
    if not isinstance(array, np.ndarray):
        return int(array.data_ptr())
    if array.flags.carray:
        try:
            return ctypes.addressof(_from_buffer(array))  # of what NumPy's own interface says, a description costs most
        except (TypeError, ValueError):  # it has no bytes, or its dtype no buffer
            pass
    return int(array.__array_interface__["data"][0])


_from_buffer: Any = ctypes.c_char.from_buffer


ZERO = 0.0  # the fill that nobody gave; known by its identity, which spares a call


def is_zero(fill: Any) -> bool:
    """True if `fill` is plain zero, whose bytes are zeros in every dtype (-0.0 is not)."""
    return type(fill) in (int, float) and fill == 0 and math.copysign(1.0, fill) > 0


def check_number(name: str, number: Any, kind: str, low: float, high: float, dtype: Any) -> complex:
    """The Python number; refused where a dtype can't hold it: `kind` i: whole, f: real, c: complex, in [low, high]."""
    check_is_number(name, number)
    value: Any = number.item() if isinstance(number, np.generic) else number
    if not isinstance(value, (int, float, complex)):
        value = float(value)
    parts: list[Any] = [value.real, value.imag] if kind == "c" else [value]
    for part in parts:
        if isinstance(part, complex):
            fits = False
        elif isinstance(part, float) and not math.isfinite(part):
            fits = kind != "i"
        else:
            fits = low <= part <= high and (kind != "i" or part == int(part))
        if not fits:
            raise ValueError(f"{name} must be a number that {dtype} can hold, but got {number!r}")
    return value  # type: ignore[no-any-return]


def check_is_number(name: str, value: Any) -> None:
    """Refuse what is no number."""
    if not isinstance(value, (numbers.Complex, np.bool_)):
        raise TypeError(f"{name} must be a number, but got {value!r}")


class _Bytes:
    """An array description that NumPy reads without touching the memory."""

    def __init__(self, start: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
        self.__array_interface__ = {
            "version": 3, "data": (start, True), "shape": shape, "strides": strides, "typestr": f"|V{itemsize}",
        }  # fmt: skip


def check_memory(name: str, x: tuple[Any, ...], out: tuple[Any, ...]) -> None:
    """Refuse to write into memory that may hold an element twice, or that x shares in part.

    Args:
        name: of the argument to be written.
        x, out: (address, shape, strides in bytes, itemsize) each; equal: in place.
    """
    x, out = ((start, *_long_dims(shape, strides), size) for start, shape, strides, size in (x, out))
    _, shape, strides, reach = out
    if math.prod(shape):
        for step, dim in sorted((abs(step), dim) for step, dim in zip(strides, shape, strict=True)):
            if step < reach:
                raise ValueError(f"{name} must not hold elements twice, but got strides {strides}: copy it first")
            reach += step * (dim - 1)
    if x == out:
        return
    try:
        overlap = np.shares_memory(np.asarray(_Bytes(*x)), np.asarray(_Bytes(*out)), max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        overlap = True
    if overlap:
        raise ValueError(f"{name} overlaps x in part, at {out[0]:#x} and {x[0]:#x}; give x itself, or other memory")


def _long_dims(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides without the dims of size 1, whose strides mean nothing."""
    kept = [dim for dim, size in enumerate(shape) if size != 1]
    return tuple(shape[dim] for dim in kept), tuple(strides[dim] for dim in kept)
