"""Memory by address on a CUDA device: the primitives of the CUDA kernels, as memory.py's are of the CPU ones.

Each is an intrinsic that emits an LLVM operation; in the simulator, whose device is the host, a Python function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numba.cuda
import numpy as np
from llvmlite import ir

from msgdrop_numba.kernels.memory import brain_to_float, float_to_brain, view
from msgdrop_numba.kernels.records import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

SIMULATOR = bool(numba.config.ENABLE_CUDASIM)  # type: ignore[attr-defined]
types: Any = None
if not SIMULATOR:
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

Device = Callable[..., Any]
ELEMENT = {FLOAT32: 4, FLOAT64: 8, FLOAT16: 2, BFLOAT16: 2}  # bytes


def device(function: Device) -> Device:
    """A function for kernels alone, part of each; as it is in the simulator."""
    return function if SIMULATOR else numba.cuda.jit(device=True, inline="always")(function)


def number(dtype: Any) -> tuple[Device, Device]:
    """`load(address)` and `store(address, value)` of one number, or of 16 bytes where dtype is None."""
    lanes, scalar = (4, np.uint32) if dtype is None else (1, dtype)

    def plain_load(address: int) -> Any:
        words = view(address, lanes, scalar)
        return tuple(words) if dtype is None else words[0]

    def plain_store(address: int, value: Any) -> None:
        view(address, lanes, scalar)[:] = value

    if SIMULATOR:
        return plain_load, plain_store

    size = 16 if dtype is None else np.dtype(dtype).itemsize
    word = ir.DoubleType() if scalar is np.float64 else ir.IntType(8 * size // lanes)
    piece = _wide(word, lanes)
    kind = types.UniTuple(types.uint32, 4) if dtype is None else getattr(types, np.dtype(dtype).name)

    def pointer(builder: Any, address: Any) -> Any:
        return builder.inttoptr(address, piece.as_pointer(1))

    def emit_load(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _unpack(builder, builder.load(pointer(builder, values[0]), align=size))

    def emit_store(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(_pack(builder, values[1]), pointer(builder, values[0]), align=size)
        return context.get_dummy_value()

    load = intrinsic(lambda typingctx, address: (kind(types.int64), emit_load))
    store = intrinsic(lambda typingctx, address, value: (types.void(types.int64, kind), emit_store))
    return load, store


def _wide(element: Any, lanes: int) -> Any:
    return element if lanes == 1 else ir.VectorType(element, lanes)


def _pack(builder: Any, value: Any) -> Any:
    """A vector of the tuple that numba knows it as; a number is itself."""
    if not isinstance(value.type, ir.ArrayType):
        return value
    vector: Any = ir.VectorType(value.type.element, value.type.count)(ir.Undefined)
    for lane in range(value.type.count):
        vector = builder.insert_element(vector, builder.extract_value(value, lane), ir.IntType(32)(lane))
    return vector


def _unpack(builder: Any, vector: Any) -> Any:
    if not isinstance(vector.type, ir.VectorType):
        return vector
    value: Any = ir.ArrayType(vector.type.element, vector.type.count)(ir.Undefined)
    for lane in range(vector.type.count):
        value = builder.insert_value(value, builder.extract_element(vector, ir.IntType(32)(lane)), lane)
    return value


def scaler(unit: int, kind: int) -> Device:
    """`multiply(piece, scale)`: every element of a piece times the scale, as `kind` says, rounding to nearest even."""
    lanes = unit // ELEMENT[kind]

    def plain(piece: Any, scale: float) -> Any:
        words = np.array(piece)
        single = np.float32(scale)
        if kind == BFLOAT16:
            halves: list[Any] = [
                float_to_brain(brain_to_float(half) * single) for half in words.reshape(-1).view(np.uint16)
            ]
            scaled: Any = np.array(halves, np.uint16)
        elif kind == FLOAT16:
            scaled = (words.reshape(-1).view(np.float16).astype(np.float32) * single).astype(np.float16)
        else:
            x: Any = words.reshape(-1).view(np.float64 if kind == FLOAT64 else np.float32)
            scaled = x * x.dtype.type(scale)
        words = scaled.view(words.dtype)
        return tuple(words) if unit == 16 else words[0]

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        packed = _pack(builder, values[0])
        single, short, integer = (_wide(t, lanes) for t in (ir.FloatType(), ir.IntType(16), ir.IntType(32)))
        accumulator = _wide(ir.DoubleType(), lanes) if kind == FLOAT64 else single
        scale = values[1] if kind == FLOAT64 else builder.fptrunc(values[1], ir.FloatType())
        scales = _splat(builder, scale, lanes)
        if kind == FLOAT16:
            half = _wide(ir.HalfType(), lanes)
            product = builder.fmul(builder.fpext(builder.bitcast(packed, half), single), scales)
            scaled = builder.fptrunc(product, half)
        elif kind == BFLOAT16:
            bits = builder.shl(builder.zext(builder.bitcast(packed, short), integer), _constant(integer, 16))
            product = builder.fmul(builder.bitcast(bits, single), scales)
            scaled = builder.trunc(_round_to_brain(builder, product, integer), short)
        else:
            scaled = builder.fmul(builder.bitcast(packed, accumulator), scales)
        return _unpack(builder, builder.bitcast(scaled, packed.type))

    if SIMULATOR:
        return plain
    return intrinsic(lambda typingctx, piece, scale: (piece(piece, types.float64), emit))


def _constant(kind: Any, number: int) -> Any:
    return kind([number] * kind.count if isinstance(kind, ir.VectorType) else number)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    if lanes == 1:
        return value
    vector: Any = ir.VectorType(value.type, lanes)(ir.Undefined)
    for lane in range(lanes):
        vector = builder.insert_element(vector, value, ir.IntType(32)(lane))
    return vector


def _round_to_brain(builder: Any, value: Any, integer: Any) -> Any:
    """The bfloat16 bits of floats, in 32-bit integers; sm_75 has no instruction for it."""
    bits = builder.bitcast(value, integer)
    high = builder.lshr(bits, _constant(integer, 16))
    rounded = builder.add(builder.add(bits, _constant(integer, 0x7FFF)), builder.and_(high, _constant(integer, 1)))
    nan = builder.fcmp_unordered("uno", value, value)
    quiet = builder.or_(high, _constant(integer, 0x40))
    return builder.select(nan, quiet, builder.lshr(rounded, _constant(integer, 16)))
