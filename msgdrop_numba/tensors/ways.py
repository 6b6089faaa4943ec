"""Which way a tensor takes, and why: by the kernels on the host, by those on its device, or by torch's operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from msgdrop_numba.call.plan import IN_PIECES, follow
from msgdrop_numba.call.request import ARRAYS, Library, Request, arrays_of, prepare
from msgdrop_numba.call.ways import COMPILED, ELSEWHERE, IN_TRANSFORMS, TENSOR, TENSOR_APART, WITHOUT_KERNELS, Answer
from msgdrop_numba.tensors import cuda
from msgdrop_numba.tensors.library import ON_DEVICE, ON_HOST
from msgdrop_numba.tensors.traced import TRACED
from msgdrop_numba.torch_private import is_eager, is_plain, is_plain_cuda, is_plain_too, not_plain_because

_NUMBERS = {int, float}


def library(x: Tensor, request: Request) -> Library:
    """The library of a call: that of the first kernels that reach x and all its tensors, else torch's operations."""
    if is_plain(x):
        return ON_HOST if _all_on_host(request) else _by_operations(request)
    if is_plain_cuda(x) and all(is_plain(t) or is_plain_cuda(t) for _, t in _tensors(request)):
        return ON_DEVICE if cuda.usable(x.device) else TRACED
    return TRACED


def _by_operations(request: Request) -> Library:
    """Torch's operations, which follow no DTensor beside an ordinary x."""
    for name, tensor in _tensors(request):
        if hasattr(tensor, "device_mesh"):
            raise ValueError(
                f"{name} is a DTensor, but x is a plain tensor: make x a DTensor, or give {name}.full_tensor(), "
                "or what of it belongs to x"
            )
    return TRACED


def mask_library(device: torch.device, request: Request) -> Library:
    """The same for a mask alone on a device."""
    if device.type == "cpu" and is_eager() and _all_on_host(request):
        return ON_HOST
    if is_eager() and cuda.usable(device) and all(is_plain(t) or is_plain_cuda(t) for _, t in _tensors(request)):
        return ON_DEVICE
    return TRACED


def explain(x: Tensor, request: Request) -> Answer:
    """Which way a call takes, and why; nothing is dropped."""
    reason = why_not_kernels(x, request)
    if reason:
        if torch.compiler.is_compiling():
            return Answer(COMPILED, reason)
        if x.device.type == "cuda" and torch.version.hip is None and not not_plain_because(x):
            return Answer(WITHOUT_KERNELS, reason)
        return Answer(ELSEWHERE if x.device.type not in ("cpu", "cuda") else IN_TRANSFORMS, reason)
    plan = prepare(library(x, request), x, replace(request, seed=0)).plan
    if not x.is_contiguous():
        strides = tuple(step * x.element_size() for step in x.stride())
        plan = follow(plan, strides, strides)
    reason = plan.obstacle or (IN_PIECES if plan.numbers.pieces > 1 and not x.is_cpu else "")
    return Answer(TENSOR_APART, reason) if reason else Answer(TENSOR, "", plan.nbytes)


def why_not_kernels(x: Tensor, request: Request) -> str:
    """Why `library` names torch's operations; empty: it names kernels."""
    for name, tensor in (("x", x), *_tensors(request)):
        if reason := not_plain_because(tensor):
            return f"{name}: {reason}"
    if x.is_cpu:
        return "" if _all_on_host(request) else "x lies on the host, but another argument on a device"
    return cuda.obstacle(x.device)


def _all_on_host(request: Request) -> bool:
    """Whether all tensors of a request are ordinary ones on the host, where operations are eager."""
    for value in arrays_of(request):
        # Torch's isinstance takes a microsecond for all of what usually is None or a number.
        if value is None or type(value) in _NUMBERS:
            continue
        if isinstance(value, Tensor) and not is_plain_too(value):
            return False
    return True


def _tensors(request: Request) -> Iterator[tuple[str, Tensor]]:
    named = zip(ARRAYS, arrays_of(request), strict=True)
    return ((name, value) for name, value in named if isinstance(value, Tensor))
