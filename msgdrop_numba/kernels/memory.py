"""Memory by address: the primitives of the CPU kernels.

Each is a plain Python function that works with the compiler off, and is lowered to an LLVM operation where it is
called: as an overload it would be a function of its own, compiled once more for every kind of arguments. Addresses and
counts are int64, since pointers passed as integers cost the least on the way into a kernel.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, typing
from numba.extending import intrinsic, lower_builtin, overload, type_callable

BYTES = cgutils.voidptr_t


def view(address: int, count: int, dtype: Any) -> Any:
    """The `count` elements of `dtype` (a NumPy scalar type) from `address` on, as an array that owns nothing."""
    buffer = (ctypes.c_uint8 * (int(count) * np.dtype(dtype).itemsize)).from_address(int(address))
    return np.frombuffer(buffer, dtype)


def stack(count: int) -> int:
    """The address of `count` bytes, a constant, on the stack: theirs until the kernel that asks for them returns."""
    # Of each kernel the last few: it may call others, many times, and be called again where a finaliser runs in it.
    by_kernel = _held.__dict__.setdefault("memory", {})
    held = by_kernel.setdefault(sys._getframe(1).f_code, deque(maxlen=8))
    held.append(np.empty(count, np.uint8))
    return int(held[-1].ctypes.data)


def copy_bytes(target: int, source: int, count: int) -> None:
    """Copy `count` bytes between ranges that don't overlap."""
    ctypes.memmove(int(target), int(source), int(count))


def zero_bytes(target: int, count: int) -> None:
    """Set `count` bytes to zero."""
    ctypes.memset(int(target), 0, int(count))


def copy_line(target: int, source: int) -> None:
    """Copy 64 bytes, in place of a call for a message of a few of them."""
    ctypes.memmove(int(target), int(source), 64)


def zero_line(target: int) -> None:
    """Set 64 bytes to zero."""
    ctypes.memset(int(target), 0, 64)


def stream_line(target: int, source: int) -> None:
    """Copy 64 bytes to an address that is a multiple of 64, past the cache; from address 0: zeros."""
    if source:
        ctypes.memmove(int(target), int(source), 64)
    else:
        ctypes.memset(int(target), 0, 64)


def prefetch(source: int) -> None:
    """Ask for a cache line that will be read soon."""


def call(function: int, *arguments: int) -> None:
    """Call a function of C with int64 arguments by its address; with the compiler off, an object by its id."""
    ctypes.cast(int(function), ctypes.py_object).value(*arguments)


def half_to_float(value: Any) -> Any:
    """The float32 of float16 bits (uint16)."""
    return np.float32(np.uint16(value).view(np.float16))


def float_to_half(value: Any) -> Any:
    """The float16 bits (uint16) nearest to a float32, ties to even."""
    with np.errstate(over="ignore", under="ignore"):
        return np.float16(value).view(np.uint16)


def brain_to_float(value: Any) -> Any:
    """The float32 of bfloat16 bits (uint16)."""
    return np.uint32(int(value) << 16).view(np.float32)


def float_to_brain(value: Any) -> Any:
    """The bfloat16 bits (uint16) nearest to a float32, ties to even."""
    bits = int(np.float32(value).view(np.uint32))
    if value != value:  # rounding up could turn a NaN into an infinity
        return np.uint16(bits >> 16 | 0x40)
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def _lowered(function: Callable[..., Any], result: Any, arguments: tuple[Any, ...], emit: Callable[..., Any]) -> None:
    """Compile calls of the function to what `emit(builder, *values)` builds, of values of the given types."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        emitted = emit(builder, *values)
        return context.get_dummy_value() if result is types.void else emitted

    typed = typing.signature(result, *arguments)
    typers = lambda a: typed, lambda a, b: typed, lambda a, b, c: typed  # numba counts their arguments
    type_callable(function)(lambda context: typers[len(arguments) - 1])
    lower_builtin(function, *arguments)(lower)


def _emit_copy(builder: Any, target: Any, source: Any, count: Any) -> None:
    cgutils.raw_memcpy(builder, builder.inttoptr(target, BYTES), builder.inttoptr(source, BYTES), count, 1)


def _emit_zero(builder: Any, target: Any, count: Any) -> None:
    cgutils.memset(builder, builder.inttoptr(target, BYTES), count, 0)


def _emit_copy_line(builder: Any, target: Any, source: Any) -> None:
    value = builder.load(builder.inttoptr(source, _LINE.as_pointer()), align=1)
    builder.store(value, builder.inttoptr(target, _LINE.as_pointer()), align=1)


def _emit_zero_line(builder: Any, target: Any) -> None:
    builder.store(_LINE(None), builder.inttoptr(target, _LINE.as_pointer()), align=1)


def _emit_stream(builder: Any, target: Any, source: Any) -> None:
    zeros, copies, after = (builder.append_basic_block(name) for name in ("zeros", "copy", "store"))
    builder.cbranch(builder.icmp_unsigned("==", source, source.type(0)), zeros, copies)
    builder.position_at_end(zeros)
    builder.branch(after)
    builder.position_at_end(copies)
    value = builder.load(builder.inttoptr(source, _LINE.as_pointer()), align=1)
    builder.branch(after)
    builder.position_at_end(after)
    chosen = builder.phi(_LINE)
    chosen.add_incoming(_LINE(None), zeros)
    chosen.add_incoming(value, copies)
    store = builder.store(chosen, builder.inttoptr(target, _LINE.as_pointer()), align=64)
    one = builder.module.add_metadata([ir.IntType(32)(1)])
    store.set_metadata("nontemporal", one)


def _emit_prefetch(builder: Any, source: Any) -> None:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [BYTES, _I32, _I32, _I32]), "llvm.prefetch.p0"
    )
    builder.call(function, [builder.inttoptr(source, BYTES), _I32(0), _I32(3), _I32(1)])


def _emit_from_brain(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), _FLOAT)


def _emit_to_brain(builder: Any, value: Any) -> Any:
    # In 32 bits throughout, which vectorises; LLVM's own conversion may be an instruction that flushes subnormals.
    bits = builder.bitcast(value, _I32)
    high = builder.lshr(bits, _I32(16))
    rounded = builder.add(builder.add(bits, _I32(0x7FFF)), builder.and_(high, _I32(1)))
    nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(nan, builder.or_(high, _I32(0x40)), builder.lshr(rounded, _I32(16)))
    return builder.trunc(chosen, _I16)


def _calling(typingctx: Any, function: Any, arguments: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(BYTES, [cgutils.intp_t] * len(arguments))  # numba's None, in C
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), cgutils.unpack_tuple(builder, values[1]))
        return context.get_dummy_value()

    return types.void(function, arguments), codegen


def _viewing(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    from numba.np import arrayobj  # which imports SciPy, where it is

    made = arrayobj.make_array(signature.return_type)(context, builder)
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(made.data.type.pointee))
    arrayobj.populate_array(
        made, builder.inttoptr(values[0], made.data.type), shape=[values[1]], strides=[itemsize], itemsize=itemsize,
        meminfo=None,
    )  # fmt: skip
    return made._getvalue()


def _view_type(address: Any, count: Any, dtype: Any) -> Any:
    element = dtype.dtype if isinstance(dtype, types.DType) else dtype.instance_type
    return typing.signature(types.Array(element, 1, "C"), types.intp, types.intp, dtype)


def _stack(typingctx: Any, count: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.IntType(8), size=cgutils.intp_t(count.literal_value))
        memory.align = 64
        return builder.ptrtoint(memory, cgutils.intp_t)

    return types.intp(count), codegen


_held = threading.local()  # with the compiler off, what a thread's kernels asked for last
_LINE = ir.VectorType(ir.IntType(64), 8)
_FLOAT, _HALF, _I16, _I32 = ir.FloatType(), ir.HalfType(), ir.IntType(16), ir.IntType(32)
_call: Any = intrinsic(_calling)
_on_stack: Any = intrinsic(prefer_literal=True)(_stack)
overload(stack, prefer_literal=True)(lambda count: lambda count: _on_stack(count))
overload(call)(lambda function, *arguments: lambda function, *arguments: _call(function, arguments))
_lowered(copy_bytes, types.void, (types.intp,) * 3, _emit_copy)
_lowered(zero_bytes, types.void, (types.intp,) * 2, _emit_zero)
_lowered(copy_line, types.void, (types.intp,) * 2, _emit_copy_line)
_lowered(zero_line, types.void, (types.intp,), _emit_zero_line)
_lowered(stream_line, types.void, (types.intp,) * 2, _emit_stream)
_lowered(prefetch, types.void, (types.intp,), _emit_prefetch)
_lowered(half_to_float, types.float32, (types.uint16,), lambda b, v: b.fpext(b.bitcast(v, _HALF), _FLOAT))
_lowered(float_to_half, types.uint16, (types.float32,), lambda b, v: b.bitcast(b.fptrunc(v, _HALF), _I16))
_lowered(brain_to_float, types.float32, (types.uint16,), _emit_from_brain)
_lowered(float_to_brain, types.uint16, (types.float32,), _emit_to_brain)
type_callable(view)(lambda context: _view_type)
lower_builtin(view, types.intp, types.intp, types.Any)(_viewing)
