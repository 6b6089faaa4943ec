"""message_dropout on CPU and CUDA tensors: the kernels under torch's rules of autograd, versions and generators.

A seed that is an integer belongs to the CPU's kernels, one that is a tensor to those of its CUDA device.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from msgdrop_numba import arrays as numpy_ops
from msgdrop_numba import outputs
from msgdrop_numba.call import arguments
from msgdrop_numba.call.arguments import ZERO
from msgdrop_numba.call.plan import PLAIN, Draw, Plan, follow, row_arguments
from msgdrop_numba.call.plan import plan as make_plan
from msgdrop_numba.call.threads import launch
from msgdrop_numba.kernels.cpu import drop_range
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.tensors import cuda as torch_cuda
from msgdrop_numba.tensors import operations as tensor
from msgdrop_numba.tensors import traced
from msgdrop_numba.tensors.arguments import (
    WITHOUT_ZERO,
    check_generator,
    check_target,
    fill_message,
    scaled_kind,
    seed_on,
)
from msgdrop_numba.torch_private import dense_address, is_eager, is_plain, is_plain_cuda


def _write(
    plan: Plan, draw: Draw, seed: Any, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Run the kernel from x into `target`, a new tensor where None; the mask is written, or read if given."""
    if target is None and plan.followed and type(seed) is int and x.is_contiguous() and (address := x.data_ptr()):
        return _write_new(plan, draw, seed, x, address, mask)
    # A mask alone doesn't tell what to scale by.
    if plan.nbytes >= outputs.HUGE_BYTES and type(seed) is int and plan.kind == COPY and not x.is_contiguous():
        order = _memory_order(x, len(plan.shape))
        if order is not None:
            return _write_in_order(plan, draw, seed, x, target, mask, order)
    result = torch.empty_like(x) if target is None else target
    if not (x.is_contiguous() and result.is_contiguous()):
        size = x.element_size()
        strides, out_strides = (tuple(step * size for step in t.stride()) for t in (x, result))
        plan, alone = follow(plan, strides, out_strides), follow(plan, out_strides, out_strides)
        if alone.followed and not plan.followed:  # as of the gradient of a sum, whose strides are 0
            plan, x = alone, result.copy_(x)
    if plan.messages and plan.followed:
        if x.data_ptr() == 0 and plan.nbytes and x.numel():
            raise ValueError(f"x has no memory, though its shape is {tuple(x.shape)}: its storage was freed")
        if _launch(plan, draw, seed, x.data_ptr(), result.data_ptr(), 0 if mask is None else mask.data_ptr()):
            if target is not None and not target.is_inference():
                increment_version(target)  # torch can't see a write through a pointer
            return result
    if plan.messages:
        result.copy_(where(plan, draw, x, draw_mask(plan, draw, seed, mask)))
    return result


def _memory_order(x: Tensor, dims: int) -> list[int] | None:
    """How to permute the message dims so that x lies in C order, as an RNN's output with batch_first; or None."""
    order = [*sorted(range(dims), key=x.stride, reverse=True), *range(dims, x.ndim)]
    return order if x.permute(order).is_contiguous() else None


def _write_in_order(
    plan: Plan, draw: Draw, seed: int, x: Tensor, target: Tensor | None, mask: Tensor | None, order: list[int]
) -> Tensor:
    """`_write` by the mask first, then the messages as they lie: from one of a row to its next would be far."""
    keep = draw_mask(plan, draw, seed, mask).permute(order[: len(plan.shape)]).contiguous()
    turned = x.permute(order)
    as_turned = make_plan(turned.shape, x.itemsize, COPY, len(plan.shape), None, False, 1, 0)
    to = None if target is None else target.permute(order)
    y = _write(as_turned, Draw(draw.fill, given=True), seed, turned, to, keep)
    if target is not None:
        return target
    return outputs.over(y.untyped_storage(), x.shape, x.dtype, x.stride())  # no view: it may be changed in place


def _write_new(plan: Plan, draw: Draw, seed: int, x: Tensor, address: int, mask: Tensor | None = None) -> Tensor:
    """`_write` into a new tensor on the CPU, from x in C order at `address`."""
    if plan.serial and mask is None and seed < 2**63:  # what `launch` would do, for the smallest
        result = torch.empty_like(x)
        drop_range(0, plan.messages, plan.address, draw.address, address, result.data_ptr(), 0, seed)
        return result
    result = torch.empty_like(x) if plan.nbytes < outputs.HUGE_BYTES else outputs.empty(x.shape, x.dtype)
    launch(plan, draw, seed, address, result.data_ptr(), 0 if mask is None else mask.data_ptr())
    return result


def _launch(plan: Plan, draw: Draw, seed: Any, x: int, out: int, mask: int) -> bool:
    if type(seed) is not int:
        return torch_cuda.launch(plan, draw, seed, x, out, mask)
    launch(plan, draw, seed, x, out, mask)
    return True


def draw_mask(plan: Plan, draw: Draw, seed: Any, mask: Tensor | None = None) -> Tensor:
    """The mask alone, in `mask` where there is one."""
    if type(seed) is not int:
        return torch_cuda.draw_mask(plan, draw, seed, mask)
    if mask is None:
        mask = torch.empty(plan.shape, dtype=torch.bool, device="cpu")
    if plan.messages and not draw.given:
        launch(plan, draw, seed, 0, 0, mask.data_ptr())
    return mask


class _DropMessages(torch.autograd.Function):
    """Backward is the same map on the gradient, its fill 0.

    Nothing of the data is kept: the seed alone, or the mask, one byte a message, where arrays decide it too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fill: Tensor | None, job: tuple[Plan, Draw, Any, Tensor | None, bool]) -> Tensor:
        plan, draw, seed, mask, inplace = job
        if draw.seeded:
            ctx.job = plan, PLAIN, seed
        else:
            mask = torch.empty(plan.shape, dtype=torch.bool, device=x.device) if mask is None else mask
            ctx.save_for_backward(mask)
            # Unscaled, padding passes like any kept message.
            again = GIVEN if plan.kind == COPY else Draw(None, draw.lengths, None, None, draw.factors, given=True)
            ctx.job = plan, again, seed
        if inplace:
            ctx.mark_dirty(x)
        return _write(plan, draw, seed, x, x if inplace else None, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        plan, draw, seed = ctx.job
        needs_x, needs_fill, _ = ctx.needs_input_grad
        differentiable = grad.requires_grad and torch.is_grad_enabled()
        usual = plan.followed and draw is PLAIN and type(seed) is int and not (needs_fill or differentiable)
        if usual and (address := dense_address(grad)):
            return _write_new(plan, draw, seed, grad, address), None, None
        mask = ctx.saved_tensors[0].contiguous() if draw.given else None  # hooks may have changed its layout
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        grad_x = grad_fill = None
        if needs_fill:
            grad_fill = _fill_gradient(grad, draw_mask(plan, draw, seed, mask))
        if needs_x:
            if not (is_plain if type(seed) is int else is_plain_cuda)(grad):
                grad_x = where(plan, draw, grad, draw_mask(plan, draw, seed, mask))
            elif differentiable:
                grad_x = _drop_messages(grad, None, (plan, draw, seed, mask, False))
            else:
                grad_x = _write(plan, draw, seed, grad, None, mask)
        return grad_x, grad_fill, None


# Function.apply looks for the wrappers of torch.func, live and dead, which `is_plain` and `dense_address` exclude.
_drop_messages: Any = super(torch.autograd.Function, _DropMessages).apply


def _fill_gradient(grad: Tensor, keep: Tensor) -> Tensor:
    if grad.is_cpu:
        return grad[~keep].sum(0)
    return tensor.select(grad, ~keep, None).flatten(0, keep.ndim - 1).sum(0)  # picking them would synchronise


def keep_mask(
    shape: tuple[int, ...], p: Any, exact: bool, span: int, min_keep: int, lengths: Any, seed: Any, keys: Any,
    device: Any,
) -> Tensor:  # fmt: skip
    """`functional.keep_mask` on a device."""
    device = torch.device(device)
    if seed is None:
        arguments.check_seed(seed)
    compiling, tensors = torch.compiler.is_compiling(), [t for t in (p, lengths, seed, keys) if isinstance(t, Tensor)]
    if not compiling and device.type == "cpu" and all(map(is_plain, tensors)):
        return torch.from_numpy(numpy_ops.keep_mask(shape, p, exact, span, min_keep, lengths, seed, keys))
    if compiling or not (is_eager() and torch_cuda.usable(device) and all(map(torch_cuda.is_ordinary, tensors))):
        return traced.keep_mask(shape, p, exact, span, min_keep, lengths, seed, keys, device)
    number, array = torch_cuda.number_or_array(p)
    plan = make_plan((*shape, 0), 0, COPY, len(shape), number, exact, span, min_keep)
    draw = torch_cuda.row_arguments(plan, array, False, None, lengths, keys, device)
    return draw_mask(plan, draw, seed_on(seed, None, device, draw=True))


def where(plan: Plan, draw: Draw, x: Tensor, mask: Tensor) -> Tensor:
    """What the kernels do, in torch's operations: for layouts that they can't follow and what autograd must see."""
    factors = valid = None
    if plan.kind != COPY:
        lengths, own = _tensor(draw.lengths), _tensor(draw.factors)
        lengths = None if lengths is None else lengths.reshape(plan.shape[:-1])
        factors, valid = tensor.factors(plan.shape, plan.rule, lengths, own, x.device)
    return tensor.select(x, mask, draw.fill, factors, valid)


def _tensor(values: Any) -> Tensor | None:
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


def message_dropout(
    x: Tensor, p: Any, training: bool, inplace: bool, scale: bool, exact: bool, span: int, min_keep: int,
    lengths: Any, fill: Any, message_dims: int | None, seed: Any, keys: Any, generator: Any, out: Any,
    return_mask: bool,
) -> Any:  # fmt: skip
    """`functional.message_dropout` for a tensor: the usual call, of numbers alone, in as few steps as it takes."""
    if (
        lengths is None and keys is None and seed is None and generator is None and out is None
        and type(p) is float and p and (fill is ZERO or arguments.is_zero(fill))
        and training and not inplace and not return_mask and (address := dense_address(x))
    ):  # fmt: skip
        try:
            plan = _usual_plan(x.shape, x.dtype, p, bool(scale), exact, span, min_keep, message_dims)
        except TypeError:  # _in_full says what is wrong
            plan = None
        if plan is not None:
            seed = fresh_seed(None)
            if x.requires_grad and torch.is_grad_enabled():
                return _drop_messages(x, None, (plan, PLAIN, seed, None, False))
            return _write_new(plan, PLAIN, seed, x, address)
    return _in_full(
        x, p, training, inplace, scale, exact, span, min_keep, lengths, fill, message_dims, seed, keys, generator,
        out, return_mask,
    )  # fmt: skip


_QUANTIZED = {torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4}


@lru_cache(maxsize=1024, typed=True)
def _usual_plan(
    shape: tuple[int, ...], dtype: torch.dtype, p: float, scale: bool, exact: bool, span: int, min_keep: int,
    message_dims: int | None,
) -> Plan | None:  # fmt: skip
    """The plan where the kernels do it all; None otherwise. Cached once more: what is asked here takes longer."""
    plan = make_plan(
        shape, dtype.itemsize, scaled_kind(dtype) if scale else COPY, message_dims, p, exact, span, min_keep
    )
    return plan if plan.followed and dtype not in WITHOUT_ZERO | _QUANTIZED else None


def _in_full(
    x: Tensor, p: Any, training: bool, inplace: bool, scale: bool, exact: bool, span: int, min_keep: int,
    lengths: Any, fill: Any, message_dims: int | None, seed: Any, keys: Any, generator: Any, out: Any,
    return_mask: bool,
) -> Any:  # fmt: skip
    """`message_dropout` with every option, on every device."""
    on_cpu = is_plain(x) and _all_plain(lengths, fill, seed, keys, p, out)
    if not on_cpu and not torch_cuda.takes(x, lengths, fill, seed, keys, p, out):
        return traced.message_dropout(
            x, p, training, inplace, scale, exact, span, min_keep, lengths, fill, message_dims, seed, keys,
            generator, out, return_mask,
        )  # fmt: skip
    kind = scaled_kind(x.dtype) if scale else COPY
    number, array = (arguments.split_p if on_cpu else torch_cuda.number_or_array)(p)
    plan = make_plan(x.shape, x.itemsize, kind, message_dims, number, exact, span, min_keep)
    message = fill_message(fill, x, len(plan.shape))
    active = training and number != 0
    target = check_target(x, inplace, out, active, message) if inplace or out is not None else None
    if target is not None:
        if message is not None:
            message = message.clone()  # the user's own memory may be what is written
        if not _apart(x, target):
            arguments.check_memory("x, to be changed in place," if inplace else "out", _memory(x), _memory(target))
    graph = torch.is_grad_enabled() and (x.requires_grad or (message is not None and message.requires_grad))
    if on_cpu:
        seed = arguments.check_source(seed, generator, torch.Generator)
        draw = row_arguments(plan, array, scale, message, lengths, keys)
        seed = fresh_seed(generator) if seed is None and active else seed
    else:
        draw = torch_cuda.row_arguments(plan, array, scale, message, lengths, keys, x.device)
        own, seed = seed, seed_on(seed, generator, x.device, draw=active)
        if seed is own and seed is not None and (graph or target is not None):
            seed = seed.clone()  # the caller may change it before backward, or have it written here
    if not active:
        if target is None:
            target = x
        elif target is not x:
            target.copy_(x)
        return (target, torch.ones(plan.shape, dtype=torch.bool, device=x.device)) if return_mask else target

    mask = torch.empty(plan.shape, dtype=torch.bool, device=x.device) if return_mask else None
    if not graph:
        result = _write(plan, draw, seed, x, target, mask)
    elif inplace and x._is_view():
        result = x.copy_(where(plan, draw, x, draw_mask(plan, draw, seed, mask)))
    else:
        result = _drop_messages(x, message, (plan, draw, seed, mask, inplace))
    return (result, mask) if return_mask else result


def _apart(x: Tensor, target: Tensor) -> bool:
    """Whether it is plain that writing `target` can't disturb x, or that it is x: no need to look closer."""
    if not (x.is_contiguous() and target.is_contiguous()):
        return False
    return target is x or abs(target.data_ptr() - x.data_ptr()) >= x.numel() * x.element_size()


def _memory(x: Tensor) -> tuple[Any, ...]:
    size = x.element_size()
    return x.data_ptr(), tuple(x.shape), tuple(step * size for step in x.stride()), size


GIVEN = Draw(given=True)


class _SeedBuffer(threading.local):
    """A tensor to draw seeds into, each thread its own: one shared would be a race."""

    def __getattr__(self, name: str) -> Tensor:
        if name != "drawn":
            raise AttributeError(name)
        # Made at a thread's first draw, which is eager; an import may happen where all new tensors are fake ones.
        with torch.inference_mode(False):
            self.drawn = torch.empty((), dtype=torch.int64, device="cpu")
        return self.drawn


_own = _SeedBuffer()
_SEED_COUNT = 2**63 - 1


def _all_plain(*values: Any) -> bool:
    return all(is_plain(value) for value in values if isinstance(value, Tensor))


def fresh_seed(generator: Any) -> int:
    """A seed of 63 bits from `generator`, or from torch's default generator of the CPU."""
    if generator is None:
        return _own.drawn.random_(_SEED_COUNT).item()  # type: ignore[return-value]
    check_generator(generator, _own.drawn.device)
    return _own.drawn.random_(_SEED_COUNT, generator=generator).item()  # type: ignore[return-value]
