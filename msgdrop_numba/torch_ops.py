"""message_dropout on CPU tensors: the kernels under torch's rules of autograd, versions and generators."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from msgdrop_numba import arguments
from msgdrop_numba.arguments import address, is_zero
from msgdrop_numba.kernels.cpu import BFLOAT16, COPY, FLOAT16, FLOAT32, FLOAT64
from msgdrop_numba.plan import Plan
from msgdrop_numba.plan import plan as make_plan
from msgdrop_numba.threads import launch
from msgdrop_numba.torch_state import is_plain

_SCALED = {
    torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.float32: FLOAT32, torch.float64: FLOAT64,
    torch.complex64: FLOAT32, torch.complex128: FLOAT64,
}  # fmt: skip


class _Draw(NamedTuple):
    """What decides a mask, and what its dropped messages become, beside the plan."""

    fill: Tensor | None
    lengths: np.ndarray | None
    seed: int
    keys: np.ndarray | None
    given: bool = False  # the mask is there already


def _write(plan: Plan, draw: _Draw, x: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
    """Run the kernel from x into `target`, a new tensor where None; the mask is written, or read if given."""
    fill, lengths, seed, keys, given = draw
    source = x.contiguous()
    buffer = torch.empty_like(source) if target is None or not target.is_contiguous() else target
    if plan.messages:
        launch(
            plan, source.data_ptr(), buffer.data_ptr(), 0 if fill is None else fill.data_ptr(),
            0 if mask is None else mask.data_ptr(), address(lengths), seed, address(keys), given,
        )  # fmt: skip
    if target is None:
        return buffer
    if buffer is not target:
        target.copy_(buffer)
    elif not target.is_inference():
        increment_version(target)  # torch can't see a write through a pointer
    return target


def _draw_mask(plan: Plan, draw: _Draw, mask: Tensor) -> None:
    """Write the mask alone: messages of no bytes."""
    launch(plan._replace(width=0), 0, 0, 0, mask.data_ptr(), address(draw.lengths), draw.seed, address(draw.keys))


class _DropMessages(torch.autograd.Function):
    """Saves the keep mask, one byte a message, and nothing of the data."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, plan: Plan, draw: _Draw, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = _write(plan, draw, x, x if inplace else None, mask)
        ctx.save_for_backward(mask)
        # The user may change lengths before backward; unscaled, padding passes like any kept message.
        lengths = None if draw.lengths is None or plan.kind == COPY else draw.lengths.copy()
        ctx.plan, ctx.draw = plan, _Draw(None, lengths, 0, None, given=True)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        if not is_plain(grad):
            grad = _where(ctx.plan, ctx.draw, grad, mask)
        elif torch.is_grad_enabled() and grad.requires_grad:
            grad = _drop_messages(grad, mask, ctx.plan, ctx.draw, False)
        else:
            grad = _write(ctx.plan, ctx.draw, grad, None, mask)
        return grad, None, None, None, None


_drop_messages: Any = _DropMessages.apply


def _where(plan: Plan, draw: _Draw, x: Tensor, mask: Tensor, inplace: bool = False) -> Tensor:
    """What the kernels do, in torch operations: for batched gradients and for views that autograd must follow."""
    features = (1,) * (x.ndim - mask.ndim)
    dropped = ~mask.reshape(*mask.shape, *features)
    fill = 0 if draw.fill is None else draw.fill.reshape(-1)[0]
    if plan.kind != COPY:
        factor: Any = plan.factor
        if draw.lengths is not None:
            valid = torch.arange(plan.size, device="cpu") < torch.from_numpy(draw.lengths)[:, None]
            real = torch.float64 if plan.kind == FLOAT64 else torch.float32
            factor = torch.where(valid, factor, 1.0).to(real).reshape(*mask.shape, *features)
        x = x.mul_(factor) if inplace else (x * factor).to(x.dtype)
    return x.masked_fill_(dropped, fill) if inplace else x.masked_fill(dropped, fill)


def message_dropout(
    x: Tensor, p: float, training: bool, inplace: bool, scale: bool, lengths: Any, fill: Any,
    message_dims: int | None, seed: Any, keys: Any, generator: Any, out: Any, return_mask: bool,
) -> Any:  # fmt: skip
    """`functional.message_dropout` for a tensor."""
    if not is_plain(x):
        raise TypeError(
            f"x must be an ordinary CPU tensor outside torch.compile and torch.func, but got {type(x).__name__} "
            f"on {x.device}; move it with x.cpu() or call this outside the transform"
        )
    kind = scaled_kind(x.dtype) if scale else COPY
    plan = make_plan(x.shape, x.itemsize, kind, p, message_dims)
    message = fill_message(fill, x.dtype, x.shape[len(plan.shape) :])
    target = _target(x, inplace, out) if inplace or out is not None else None
    row_keys = row_lengths = None
    if keys is not None:
        row_keys = arguments.row_keys(keys, plan.shape[:-1])
    if lengths is not None:
        row_lengths = arguments.row_lengths(lengths, plan.shape[:-1], plan.size)
    seed = arguments.check_source(seed, generator, torch.Generator)
    if not training or p == 0:
        if target is None:
            target = x
        elif target is not x:
            target.copy_(x)
        return (target, torch.ones(plan.shape, dtype=torch.bool, device="cpu")) if return_mask else target

    draw = _Draw(message, row_lengths, fresh_seed(generator) if seed is None else seed, row_keys)
    follow = x.requires_grad and torch.is_grad_enabled()
    mask: Any = torch.empty(plan.shape, dtype=torch.bool, device="cpu") if return_mask or follow else None
    if not follow:
        result = _write(plan, draw, x, target, mask)
    elif inplace and x._is_view():
        _draw_mask(plan, draw, mask)
        result = _where(plan, draw, x, mask, inplace=True)
    else:
        result = _drop_messages(x, mask, plan, draw, inplace)
    return (result, mask) if return_mask else result


def scaled_kind(dtype: torch.dtype) -> int:
    """The type that the kernels scale `dtype` in."""
    if dtype not in _SCALED:
        raise TypeError(f"scale=True needs a floating or complex dtype that can be multiplied, but x has {dtype}")
    return _SCALED[dtype]


def fill_message(fill: Any, dtype: torch.dtype, features: tuple[int, ...]) -> Tensor | None:
    """One message of `fill`, or None where that is zeros."""
    if is_zero(fill):
        return None
    check_number("fill", fill, dtype)
    return torch.full(features, fill, dtype=dtype, device="cpu")


def check_number(name: str, value: Any, dtype: torch.dtype) -> None:
    """Refuse a number that `dtype` can't hold."""
    if dtype.is_floating_point or dtype.is_complex:
        high = torch.finfo(dtype).max
        arguments.check_number(name, value, "c" if dtype.is_complex else "f", -high, high, dtype)
    else:
        low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        arguments.check_number(name, value, "i", low, high, dtype)


def _target(x: Tensor, inplace: bool, out: Any) -> Tensor:
    """The tensor to write, x or out, checked."""
    if inplace and out is not None:
        raise ValueError("give inplace=True or out, not both")
    if inplace:
        out = x
    name = "x, to be changed in place," if inplace else "out"
    if not isinstance(out, Tensor) or not is_plain(out):
        kind = f"{type(out).__name__} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"{name} must be an ordinary CPU tensor like x, but got {kind}")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"{name} must have x's shape {tuple(x.shape)} and dtype {x.dtype}, "
            f"but got {tuple(out.shape)} and {out.dtype}"
        )
    if torch.is_grad_enabled():
        if inplace and x.requires_grad and x.is_leaf:
            raise ValueError("inplace=True can't change a leaf that requires grad: drop out of place, or under no_grad")
        if not inplace and (x.requires_grad or out.requires_grad):
            raise ValueError("out can't be used where a gradient is needed: leave it out, or call under no_grad")
    arguments.check_target(name, _memory(x), _memory(out))
    return out


def _memory(x: Tensor) -> tuple[Any, ...]:
    size = x.element_size()
    return x.data_ptr(), tuple(x.shape), tuple(step * size for step in x.stride()), size


_local = threading.local()  # one shared seed buffer would be a race


def fresh_seed(generator: Any) -> int:
    """A seed of 63 bits from `generator`, or from torch's default generator of the CPU."""
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, as x is, but it is on {generator.device}")
    try:
        buffer = _local.seed
    except AttributeError:
        with torch.inference_mode(False):
            buffer = _local.seed = torch.empty((), dtype=torch.int64, device="cpu")
    return buffer.random_(0, 2**63 - 1, generator=generator).item()  # type: ignore[no-any-return]
