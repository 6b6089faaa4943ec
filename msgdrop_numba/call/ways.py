"""The ways that an array can take, in words: `msgdrop info` and LIMITS.md show this table."""

from __future__ import annotations

from typing import NamedTuple


class Way(NamedTuple):
    """What runs for a kind of array, and why."""

    array: str
    path: str
    why: str


ARRAY = Way("NumPy array", "compiled kernel", "its rows lie evenly, and so do its features")
ARRAY_APART = Way(
    "NumPy array, other layouts", "compiled mask, NumPy's where", "the kernel can't follow its strides or byte order"
)
TENSOR = Way(
    "CPU or CUDA tensor", "compiled kernel", "as for arrays, on a device with contiguous features; a backward of ours"
)
TENSOR_APART = Way(
    "CPU or CUDA tensor, other layouts",
    "compiled kernel on a copy",
    "in place, or where a new tensor lies so, too: torch's where",
)
COMPILED = Way("CPU or CUDA tensor, torch.compile", "compiled mask, torch's where", "one graph, fused by the compiler")
IN_TRANSFORMS = Way(
    "export, vmap, jvp, fake tensors", "tensor operations", "nothing of this package may be called there"
)
SHARDED = Way("DTensor", "that of its local tensor", "rows and positions have their numbers in the whole")
DEVICE_ARRAY = Way("CuPy or numba device array", "as a CUDA tensor", "on its own stream; needs torch")
WITHOUT_KERNELS = Way(
    "CUDA tensor without numba-cuda", "tensor operations", "the same mask; a log line says what to install"
)
ELSEWHERE = Way("ROCm, MPS and XPU tensors", "tensor operations", "no kernels for them")

WAYS = (
    ARRAY, ARRAY_APART, TENSOR, TENSOR_APART, COMPILED, IN_TRANSFORMS, SHARDED, DEVICE_ARRAY, WITHOUT_KERNELS,
    ELSEWHERE,
)  # fmt: skip


class Answer(NamedTuple):
    """Which way a call takes.

    Fields:
        way: one of WAYS.
        reason: why not the kernels, of this very call; empty: it takes them.
        nbytes: that its kernel writes; 0: none runs.
    """

    way: Way
    reason: str
    nbytes: int = 0
