"""The one place for compiler flags, and for running where no compiler cache can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])

# nogil: other Python threads run on. numpy error model: no zero-division branch in a loop.
_OPTIONS = {"nogil": True, "error_model": "numpy"}


def jit(function: F) -> F:
    """Compile at the first call, for use in a kernel or as a serial kernel."""
    return _cached(function, **_OPTIONS)


def parallel_jit(function: F) -> F:
    """Compile at the first call, its `prange` loops run by numba's threads."""
    return _cached(function, parallel=True, **_OPTIONS)


def _cached(function: F, **options: Any) -> F:
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # numba raises here, not at the first write, where no folder can be written
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
