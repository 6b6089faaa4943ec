"""The one place for compiler flags, and for running where no compiler cache can be written."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba import config, types

F = TypeVar("F", bound=Callable[..., Any])

# nogil: other Python threads run on. numpy error model: no zero-division branch in a loop.
_OPTIONS = {"nogil": True, "error_model": "numpy"}
_INNER: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **_OPTIONS}


def jit(function: F) -> F:
    """Compile at the first call, as a serial kernel."""
    return _cached(function, **_OPTIONS)


def inner_jit(function: F) -> F:
    """Compile for kernels alone, which call it in several places: nothing for Python to call, no cache of its own."""
    return numba.njit(**_INNER)(function)  # type: ignore[no-any-return]


def inlined_jit(function: F) -> F:
    """Compile into the caller: a loop vectorises there, what has one caller compiles once, and CUDA needs no linker."""
    return _cached(function, inline="always", **_OPTIONS)


def parallel_jit(function: F) -> F:
    """Compile at the first call, its `prange` loops run by numba's threads."""
    return _cached(function, parallel=True, **_OPTIONS)


@cache
def c_address(kernel: Any) -> int:
    """Where a compiled kernel of integers begins, as a function of C that `memory.call` calls."""
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        return id(kernel)
    signature = (types.int64,) * len(inspect.signature(kernel.py_func).parameters)
    kernel.compile(signature)
    compiled = kernel.overloads[signature]
    address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)
    return address


def _sources() -> str:
    """A digest of all compiled sources: numba looks at the file of a kernel alone, not at those that it calls."""
    folder = Path(__file__).parent
    files = sorted(folder.glob("*.py"))
    try:
        return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()
    except OSError:  # no files, as in a zip: no cache either
        return ""


_DIGEST = _sources()


def _cached(function: F, **options: Any) -> F:
    function.__qualname__ += "-" + _DIGEST  # part of the cache file's name
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # numba raises here, not at the first write, where no folder can be written
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
