"""Reading and checking what message_dropout is told of a tensor: dtype, fill and where to write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba import arguments
from msgdrop_numba.kernels.cpu import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, OTHER

_SCALED = {
    torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.float32: FLOAT32, torch.float64: FLOAT64,
    torch.complex32: FLOAT16, torch.complex64: FLOAT32, torch.complex128: FLOAT64,
}  # fmt: skip

_WITHOUT_ZERO = {torch.float8_e8m0fnu}
_INFINITIES = (float("inf"), -float("inf"))


def scaled_kind(dtype: torch.dtype) -> int:
    """The type that the kernels scale `dtype` in; OTHER where torch's own operations do."""
    if not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"scale=True needs a floating or complex dtype, but x has {dtype}")
    return _SCALED.get(dtype, OTHER)


def fill_message(fill: Any, x: Tensor, message_dims: int) -> Tensor | None:
    """One message of `fill`, a number or a tensor over the features, of x's dtype; None: zeros."""
    if arguments.is_zero(fill) and x.dtype not in _WITHOUT_ZERO:
        return None
    features = x.shape[message_dims:]
    if not isinstance(fill, Tensor):
        number = check_number("fill", fill, x.dtype)
        return torch.full(features, number, dtype=x.dtype, device=x.device)
    if fill.shape != features or fill.dtype != x.dtype or fill.device != x.device:
        raise ValueError(
            f"fill must be a number or a tensor like one message of x, {tuple(features)} {x.dtype} on {x.device}, "
            f"but got {tuple(fill.shape)} {fill.dtype} on {fill.device}"
        )
    return fill.contiguous()


def check_number(name: str, value: Any, dtype: torch.dtype) -> complex:
    """The Python number; refused where `dtype` can't hold it."""
    if dtype.is_floating_point or dtype.is_complex:
        info = torch.finfo(dtype)
        low, high = (info.tiny if dtype in _WITHOUT_ZERO else -info.max), info.max
        number = arguments.check_number(name, value, "c" if dtype.is_complex else "f", low, high, dtype)
        if dtype.itemsize == 1 and number in _INFINITIES and torch.full((), number, dtype=dtype).float() != number:
            raise ValueError(f"{name} must be a number that {dtype} can hold, but got {value!r}")
        return number
    low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return arguments.check_number(name, value, "i", low, high, dtype)


def check_target(x: Tensor, inplace: bool, out: Any, active: bool, fill: Tensor | None) -> Tensor | None:
    """The tensor to write, x or out; None: a new one, or x stays as it is."""
    if inplace and out is not None:
        raise ValueError(f"give inplace=True or out, not both: got out={type(out).__name__}")
    if inplace and active:
        if torch.is_grad_enabled() and x.requires_grad and x.is_leaf:
            raise ValueError(
                f"inplace=True can't change a leaf that requires grad, but x is one, of shape {tuple(x.shape)}: "
                "drop out of place, or under torch.no_grad()"
            )
        _check_inference("x", x)
        return x
    if out is None:
        return None
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor like x, but got {type(out).__name__}")
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"out must be like x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"but got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    _check_inference("out", out)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, out, fill)):
        raise ValueError("out can't be used where a gradient is needed: leave it out, or call under torch.no_grad()")
    return out


def _check_inference(name: str, target: Tensor) -> None:
    if torch.compiler.is_compiling():  # which can't ask, and has its own rules for them
        return
    if target.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} is an inference tensor, which can only be written under torch.inference_mode()")
