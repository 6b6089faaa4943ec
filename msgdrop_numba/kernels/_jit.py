"""The one place for compiler flags, and for running where no compiler cache can be written."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding as llvm
import numba
from numba import config, types
from numba.core import caching

F = TypeVar("F", bound=Callable[..., Any])

# nogil: other Python threads run on. numpy error model: no zero-division branch in a loop. _nrt: no arrays that numba
# makes and counts references to, for which it would first start a runtime of its own.
_OPTIONS: Any = {"nogil": True, "error_model": "numpy", "_nrt": False}
_INNER: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **_OPTIONS}


def jit(function: F) -> F:
    """Compile at the first call, as a serial kernel."""
    return _cached(function, **_OPTIONS)


def inner_jit(function: F) -> F:
    """Compile for kernels alone, which call it in several places: nothing for Python to call, no cache of its own."""
    return numba.njit(**_INNER)(function)  # type: ignore[no-any-return]


def inlined_jit(function: F) -> F:
    """Compile into the caller: a loop vectorises there, what has one caller compiles once, and CUDA needs no linker."""
    return numba.njit(inline="always", **_OPTIONS)(function)  # type: ignore[no-any-return]


def parallel_jit(function: F) -> F:
    """Compile at the first call, its `prange` loops run by numba's threads."""
    return _cached(function, parallel=True, **_OPTIONS)


@cache
def compiled(kernel: Any) -> int:
    """Compile a kernel of integers, once. Returns the address of its C function, which `memory.call` calls."""
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        return id(kernel)
    overload = _compiled(kernel)
    address: int = overload.library.get_pointer_to_function(overload.fndesc.llvm_cfunc_wrapper_name)
    return address


@cache
def direct(kernel: Any) -> Any:
    """A kernel of integers without its dispatcher, which looks at their types each time: 0.7 us of a call.

    With the compiler off, the kernel as it is.
    """
    return kernel if config.DISABLE_JIT else _compiled(kernel).entry_point  # type: ignore[attr-defined]


def _compiled(kernel: Any) -> Any:
    signature = (types.int64,) * len(inspect.signature(kernel.py_func).parameters)
    kernel.compile(signature)
    return kernel.overloads[signature]


def _sources() -> str:
    """A digest of all compiled sources: numba looks at the file of a kernel alone, not at those that it calls."""
    folder = Path(__file__).parent
    files = sorted(folder.glob("*.py"))
    try:
        return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()
    except OSError:  # no files, as in a zip: no cache either
        return ""


_DIGEST = _sources()


_FunctionCache: Any = caching.FunctionCache


class _Cache(_FunctionCache):  # type: ignore[misc]
    """numba's cache, read without making numba ready to compile: that imports SciPy, and takes ten times as long."""

    def load_overload(self, signature: Any, target: Any) -> Any:
        try:
            file, key, rebuild = self._cache_file, self._index_key(signature, target.codegen()), self._impl.rebuild
        except AttributeError:  # names of numba's own, which another version may not have
            return super().load_overload(signature, target)
        with self._guard_against_spurious_io_errors():
            data = file.load(key)
            if data is None:
                return None
            if not _has_all(data):
                target.refresh()
            return rebuild(target, data)


def _has_all(data: Any) -> bool:
    """True if this process has all symbols that cached code calls: LLVM ends a process that lacks one."""
    (_, kind, code), *_ = data
    if kind != "object":
        return False
    bitcode = llvm.parse_bitcode(code[1])
    outside = (value for value in (*bitcode.functions, *bitcode.global_variables) if value.is_declaration)
    return all(value.name.startswith("llvm.") or llvm.address_of_symbol(value.name) for value in outside)


def _cached(function: F, **options: Any) -> F:
    function.__qualname__ += "-" + _DIGEST  # part of the cache file's name
    kernel: Any = numba.njit(**options)(function)
    if not config.DISABLE_JIT:  # type: ignore[attr-defined]
        with suppress(RuntimeError):  # raised where no folder can be written
            kernel._cache = _Cache(function)
    return kernel  # type: ignore[no-any-return]
