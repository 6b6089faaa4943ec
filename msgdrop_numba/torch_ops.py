"""message_dropout on CPU tensors: the kernels under torch's rules of autograd, versions and generators."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from msgdrop_numba import arguments, traced
from msgdrop_numba.arguments import is_zero
from msgdrop_numba.kernels import tensor
from msgdrop_numba.kernels.cpu import COPY
from msgdrop_numba.plan import Draw, Plan, follow, kept_factors, row_arguments
from msgdrop_numba.plan import plan as make_plan
from msgdrop_numba.tensors import check_target, fill_message, scaled_kind
from msgdrop_numba.threads import launch
from msgdrop_numba.torch_state import is_plain


def _write(plan: Plan, draw: Draw, x: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
    """Run the kernel from x into `target`, a new tensor where None; the mask is written, or read if given."""
    result = torch.empty_like(x) if target is None else target
    if not (x.is_contiguous() and result.is_contiguous()):
        size = x.element_size()
        plan = follow(plan, *(tuple(step * size for step in t.stride()) for t in (x, result)))
    if plan.messages and plan.followed:
        if x.data_ptr() == 0 and plan.nbytes and x.numel():
            raise ValueError(f"x has no memory, though its shape is {tuple(x.shape)}: its storage was freed")
        launch(plan, draw, x.data_ptr(), result.data_ptr(), 0 if mask is None else mask.data_ptr())
        if target is not None and not target.is_inference():
            increment_version(target)  # torch can't see a write through a pointer
    elif plan.messages:
        result.copy_(_where(plan, draw, x, draw_mask(plan, draw, mask)))
    return result


def draw_mask(plan: Plan, draw: Draw, mask: Tensor | None = None) -> Tensor:
    """The mask alone, in `mask` where there is one."""
    if mask is None:
        mask = torch.empty(plan.shape, dtype=torch.bool, device="cpu")
    if plan.messages and not draw.given:
        launch(plan, draw, 0, 0, mask.data_ptr())
    return mask


class _DropMessages(torch.autograd.Function):
    """Saves the keep mask, one byte a message, and nothing of the data."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fill: Tensor | None, mask: Tensor, plan: Plan, draw: Draw, inplace: bool
    ) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = _write(plan, draw, x, x if inplace else None, mask)
        ctx.save_for_backward(mask)
        # Unscaled, padding passes like any kept message.
        lengths = None if plan.kind == COPY else draw.lengths
        ctx.plan, ctx.draw = plan, Draw(lengths=lengths, factors=draw.factors, per_row=draw.per_row, given=True)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mask = ctx.saved_tensors[0].contiguous()  # hooks may have changed its layout
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        grad_x = grad_fill = None
        if ctx.needs_input_grad[1]:
            grad_fill = grad[~mask].sum(0)
        if ctx.needs_input_grad[0]:
            if not is_plain(grad):
                grad_x = _where(ctx.plan, ctx.draw, grad, mask)
            elif torch.is_grad_enabled() and grad.requires_grad:
                grad_x = _drop_messages(grad, None, mask, ctx.plan, ctx.draw, False)
            else:
                grad_x = _write(ctx.plan, ctx.draw, grad, None, mask)
        return grad_x, grad_fill, None, None, None, None


_drop_messages: Any = _DropMessages.apply


def _where(plan: Plan, draw: Draw, x: Tensor, mask: Tensor) -> Tensor:
    """What the kernels do, in torch's operations: for layouts that they can't follow and what autograd must see."""
    factors = valid = None
    if plan.kind != COPY:
        arrays = kept_factors(plan, draw)
        factors, valid = (torch.from_numpy(np.array(array)) for array in arrays)
    return tensor.select(x, mask, draw.fill, factors, valid)


def message_dropout(
    x: Tensor, p: Any, training: bool, inplace: bool, scale: bool, exact: bool, span: int, min_keep: int,
    lengths: Any, fill: Any, message_dims: int | None, seed: Any, keys: Any, generator: Any, out: Any,
    return_mask: bool,
) -> Any:  # fmt: skip
    """`functional.message_dropout` for a tensor."""
    if not is_plain(x) or not all(is_plain(t) for t in (lengths, fill, seed, keys, p, out) if isinstance(t, Tensor)):
        return traced.message_dropout(
            x, p, training, inplace, scale, exact, span, min_keep, lengths, fill, message_dims, seed, keys,
            generator, out, return_mask,
        )  # fmt: skip
    kind = scaled_kind(x.dtype) if scale else COPY
    number, array = (p, None) if type(p) is float else arguments.split_p(p)
    plan = make_plan(x.shape, x.itemsize, kind, message_dims, number, exact, span, min_keep)
    message = None if is_zero(fill) else fill_message(fill, x, len(plan.shape))
    active = training and number != 0
    target = check_target(x, inplace, out, active) if inplace or out is not None else None
    if target is not None:
        if message is not None:
            message = message.clone()  # the user's own memory may be what is written
        arguments.check_memory("x, to be changed in place," if inplace else "out", _memory(x), _memory(target))
    seed = arguments.check_source(seed, generator, torch.Generator)
    draw = row_arguments(plan, array, scale, message, lengths, seed, keys)
    if not active:
        if target is None:
            target = x
        elif target is not x:
            target.copy_(x)
        return (target, torch.ones(plan.shape, dtype=torch.bool, device="cpu")) if return_mask else target

    if seed is None:
        draw = draw._replace(seed=fresh_seed(generator))
    graph = torch.is_grad_enabled() and (x.requires_grad or (message is not None and message.requires_grad))
    mask: Any = torch.empty(plan.shape, dtype=torch.bool, device="cpu") if return_mask or graph else None
    if not graph:
        result = _write(plan, draw, x, target, mask)
    elif inplace and x._is_view():
        draw_mask(plan, draw, mask)
        result = x.copy_(_where(plan, draw, x, mask))
    else:
        result = _drop_messages(x, message, mask, plan, draw, inplace)
    return (result, mask) if return_mask else result


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
