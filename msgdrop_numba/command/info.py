"""`msgdrop info`: what is installed, how kernels run here, and which path each kind of array takes."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import numba
import numpy as np

from msgdrop_numba.arrays import NUMPY, obstacle
from msgdrop_numba.call import threads
from msgdrop_numba.call.plan import PARALLEL_BYTES
from msgdrop_numba.call.request import Library, Request, prepare
from msgdrop_numba.call.rule import Rule
from msgdrop_numba.command.errors import JobError, one_line
from msgdrop_numba.version import __version__

# Which path each kind of array takes, and why; LIMITS.md shows this table too.
PATHS = (
    ("NumPy array", "compiled kernel", "its rows lie evenly, and so do its features"),
    (
        "NumPy array, other layouts", "compiled mask, NumPy's where",
        "the kernel can't follow its strides or byte order",
    ),
    (
        "CPU or CUDA tensor", "compiled kernel",
        "as for arrays, on a device with contiguous features; a backward of ours",
    ),
    (
        "CPU or CUDA tensor, other layouts", "compiled kernel on a copy",
        "in place, or where a new tensor lies so, too: torch's where",
    ),
    ("CPU or CUDA tensor, torch.compile", "compiled mask, torch's where", "one graph, fused by the compiler"),
    ("export, vmap, jvp, fake tensors", "tensor operations", "nothing of this package may be called there"),
    ("DTensor", "that of its local tensor", "rows and positions have their numbers in the whole"),
    ("CuPy or numba device array", "as a CUDA tensor", "on its own stream; needs torch"),
    ("CUDA tensor without numba-cuda", "tensor operations", "the same mask; a log line says what to install"),
    ("ROCm, MPS and XPU tensors", "tensor operations", "no kernels for them"),
)  # fmt: skip

PACKAGES = ("numpy", "numba", "torch", "numba-cuda", "pyarrow", "ray", "xxhash")


def versions() -> dict[str, str]:
    """This package, Python, and what else there is of the packages that it knows."""
    found = {"msgdrop_numba": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def kernels() -> dict[str, str]:
    """Threads, threading layer, compiled code. Starts numba's threads, as the first large call would."""
    parts = threads.chunks(PARALLEL_BYTES)
    try:
        layer: str = numba.threading_layer()
    except ValueError:  # no parallel kernel may run here, so none was started
        layer = "not started"
    folder = threads.cache_folder()
    least = f"{PARALLEL_BYTES // 1024} KB"
    return {
        "threads": f"{parts} for outputs of {least} and more, else 1; this machine has {os.cpu_count()} CPUs",
        "threading layer": f"{layer}{' (serial kernels only)' if parts == 1 else ''}",
        "compiled code": folder or "can't be cached: no folder is writable, set NUMBA_CACHE_DIR",
    }


def gpu() -> str:
    """The GPU, as torch reports it."""
    try:
        import torch
    except ModuleNotFoundError:
        return "unknown: torch isn't installed"
    if not torch.cuda.is_available():
        return f"none that torch {torch.__version__} can use"
    from msgdrop_numba.tensors import cuda

    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    missing = cuda.obstacle(torch.device("cuda", 0))
    return f"{names}; {f'without kernels: {missing}' if missing else 'with numba-cuda'}"


def case(shape: tuple[int, ...], dtype: str, device: str) -> dict[str, str]:
    """The path of arrays of a shape and dtype on a device, and the reason, by kind of array.

    Raises:
        JobError: there are no such arrays here.
    """
    found = {}
    if device == "cpu" and (array := _array(shape, dtype)) is not None:
        found["NumPy array"] = array
    try:
        import torch
    except ModuleNotFoundError:
        torch = None  # type: ignore[assignment]
    if torch is not None:
        kind = getattr(torch, dtype, None)
        if isinstance(kind, torch.dtype):
            try:
                found["tensor"] = torch.empty(shape, dtype=kind, device=device)
            except (RuntimeError, AssertionError) as error:  # torch built without the device asserts
                raise JobError(f"there is no tensor of {shape} on {device} here: {one_line(error)}") from error
    if not found:
        raise JobError(f"neither NumPy nor torch, where it is installed, has {dtype} on {device}")
    request = Request(Rule(0.5), fill=1, seed=0)  # some dtypes have no zero
    return {name: _path(x, request) for name, x in found.items()}


def _array(shape: tuple[int, ...], dtype: str) -> Any:
    try:
        return np.empty(shape, dtype)
    except TypeError:  # no dtype of NumPy's
        return None


def _path(x: Any, request: Request) -> str:
    """The path that a new array takes, and the reason."""
    library: Library = NUMPY
    apart, reason = PATHS[1][1], ""
    if not isinstance(x, np.ndarray):
        from msgdrop_numba.tensors.backends import choose

        library, reason = choose(x, request)
        apart = PATHS[3][1]
    if reason:
        return f"tensor operations, as {reason}"
    plan = prepare(library, x, request).plan
    if reason := obstacle(plan, x.dtype) if library is NUMPY else plan.obstacle:
        return f"{apart}, as {reason}"
    parts = threads.chunks(plan.nbytes)
    return f"compiled kernel, {parts} thread{'s' if parts > 1 else ''}: {PATHS[0][2]}"
