"""The gradient: backward is the same map, with fill 0. Nothing of the data is kept for it.

Kept is the seed alone, or the mask, one byte a message, where arrays decide it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.plan import GIVEN, PLAIN, Draw, Places, Plan
from msgdrop_numba.call.request import Job
from msgdrop_numba.call.threads import team
from msgdrop_numba.call.usual import Usual
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.tensors import operations
from msgdrop_numba.tensors.memory import dense
from msgdrop_numba.tensors.operator import kernel_mask, opaque_seed
from msgdrop_numba.tensors.usual import find_as
from msgdrop_numba.tensors.write import draw_mask, where, write
from msgdrop_numba.torch_private import is_plain, is_plain_cuda, is_watched, quick_apply


class _DropMessages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fill: Tensor | None, job: Job) -> Tensor:
        plan, draw, seed, target, mask, given = job
        if draw.seeded:
            ctx.again = plan, Draw(places=draw.places) if draw.places.offset else PLAIN, seed
        else:
            if given is None and mask is None:
                mask = torch.empty(plan.shape, dtype=torch.bool, device=x.device)
                job = tuple.__new__(Job, (plan, draw, seed, target, mask, None))
            ctx.save_for_backward(mask if given is None else given)
            # Unscaled, padding passes like any kept message.
            ctx.again = plan, GIVEN if plan.kind == COPY else _scales_again(plan, draw), seed
        if target is not None:
            ctx.mark_dirty(x)
        return write(job, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        plan, draw, seed = ctx.again
        needs_x, needs_fill, _ = ctx.needs_input_grad
        # Hooks may have changed the layout of what was saved.
        given = ctx.saved_tensors[0].contiguous() if draw.given else None
        job = tuple.__new__(Job, (plan, draw, seed, None, None, given))
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        grad_x = grad_fill = None
        if needs_fill:
            grad_fill = _fill_gradient(grad, _drawn_again(job))
        if needs_x:
            grad_x = _dropped(grad, job)
        return grad_x, grad_fill, None


class _DropUsual(torch.autograd.Function):
    """The same of the usual call, see `call.usual`: what plan and seed alone decide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: tuple[Usual, int, int]) -> Tensor:
        fast_path, seed, start = call
        result = dense(x, fast_path.nbytes, fast_path.strides)
        fast_path.drop(fast_path.address, 0, 0, seed, start, result.data_ptr(), *team(fast_path.nbytes))
        ctx.again = fast_path, seed
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        fast_path, seed = ctx.again
        if not (grad.requires_grad and torch.is_grad_enabled()) and not is_watched():
            of_grad = (
                fast_path if fast_path.alike.known(grad) else find_as(fast_path, grad)
            )  # it may lie otherwise than x
            if of_grad is not None:
                result = dense(grad, of_grad.nbytes, of_grad.strides)
                of_grad.drop(of_grad.address, 0, 0, seed, grad.data_ptr(), result.data_ptr(), *team(of_grad.nbytes))
                return result, None
        grad = grad.to_dense() if grad.layout != torch.strided else grad
        return _dropped(grad, Job(fast_path.in_order, PLAIN, seed % 2**64)), None


def _drawn_again(job: Job) -> Tensor:
    """The mask of forward. Compiled autograd traces this, and can't trace a kernel."""
    plan, draw, seed, _, _, given = job
    if given is not None or not torch.compiler.is_dynamo_compiling():
        return draw_mask(job)
    if type(seed) is int:
        seed = opaque_seed(seed if seed < 2**63 else seed - 2**64, torch.device("cpu"))
    return kernel_mask(plan.shape, plan.rule, seed, operations.Rows(offset=draw.places.offset), None)


def _dropped(grad: Tensor, job: Job) -> Any:
    """The gradient of x."""
    if not (is_plain if type(job.seed) is int else is_plain_cuda)(grad):
        return where(job, grad, _drawn_again(job))
    return run_job(grad, None, job) if grad.requires_grad and torch.is_grad_enabled() else write(job, grad)


def _scales_again(plan: Plan, draw: Draw) -> Draw:
    """What the scales come from where the mask is given."""
    keys, (protect, taking, *_) = draw.keys if plan.rule.ranged else None, draw.places
    return Draw(None, draw.lengths, keys, None, draw.scales, given=True, places=Places(protect, taking))


# What autograd runs for a tensor, its fill or None, and a job whose target is None or the tensor itself.
run_job: Any = quick_apply(_DropMessages)
# For a tensor and a tuple: its Usual, a seed, and the tensor's address.
run_usual: Any = quick_apply(_DropUsual)


def _fill_gradient(grad: Tensor, keep: Tensor) -> Tensor:
    if grad.is_cpu:
        return grad[~keep].sum(0)
    return operations.select(grad, ~keep, None).flatten(0, keep.ndim - 1).sum(0)  # picking them would synchronise
