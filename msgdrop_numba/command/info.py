"""`msgdrop info`: what is installed, how kernels run here, and which path each kind of array takes."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import numba

from msgdrop_numba.call import threads
from msgdrop_numba.call.plan import PARALLEL_BYTES
from msgdrop_numba.kernels.cpu import drop_range
from msgdrop_numba.version import __version__

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
    folder = getattr(getattr(drop_range, "_cache", None), "cache_path", None)  # none without the compiler
    least = f"{PARALLEL_BYTES // 1024} KB"
    return {
        "threads": f"{parts} for outputs of {least} and more, else 1; this machine has {os.cpu_count()} CPUs",
        "threading layer": f"{layer}{' (serial kernels only)' if parts == 1 else ''}",
        "compiled code": folder or "can't be cached: no folder is writable, set NUMBA_CACHE_DIR",
    }


def gpu() -> str:
    """What torch says of the GPU."""
    try:
        import torch
    except ModuleNotFoundError:
        return "unknown: torch isn't installed"
    if not torch.cuda.is_available():
        return f"none that torch {torch.__version__} can use"
    from msgdrop_numba.tensors import cuda as torch_cuda

    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    usable = torch_cuda.usable(torch.device("cuda", 0))
    return f"{names}; {'with' if usable else 'without'} numba-cuda"


# Kind of array, what runs, and why.
PATHS = [
    ("NumPy array", "compiled kernel", "its features are contiguous and its rows lie evenly"),
    ("NumPy array, other layouts", "compiled mask, NumPy's where", "the kernel can't follow its strides or byte order"),
    ("CPU or CUDA tensor", "compiled kernel", "as for arrays; under autograd with a backward of ours"),
    ("CPU or CUDA tensor, other layouts", "compiled kernel on a copy", "in place, or features apart: torch's where"),
    ("CPU or CUDA tensor, torch.compile", "compiled mask, torch's where", "one graph, fused by the compiler"),
    ("export, vmap, jvp, fake tensors", "tensor operations", "nothing of this package may be called there"),
    ("CuPy or numba device array", "as a CUDA tensor", "on its own stream; needs torch"),
    ("CUDA tensor without numba-cuda", "tensor operations", "the same mask; a log line says what to install"),
    ("ROCm, MPS and XPU tensors", "tensor operations", "no kernels for them"),
]
