"""The gradient of dropout: backward drops the same messages of the gradient, with fill 0.

Backward saves the seed and draws the mask again. If arrays decide the mask, it saves the mask, one byte a message.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.plan import GIVEN, PLAIN, MaskArgs, Places, Plan
from msgdrop_numba.call.request import Job
from msgdrop_numba.call.rule import Rule
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.tensors import operations
from msgdrop_numba.torch_private import quick_apply, unreadable_reason


class _DropMessages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, job: Job, *fill: Tensor) -> Tensor:
        args, again = job.args, job
        if not args.seeded:
            if job.given is None and job.mask is None:
                job = job._replace(mask=torch.empty(job.plan.shape, dtype=torch.bool, device=x.device))
            ctx.save_for_backward(job.mask if job.given is None else job.given)
            # Unscaled, padding passes like any kept message.
            again = _again(job, GIVEN if job.plan.kind == COPY else _scales_again(job.plan, args))
        elif args is not PLAIN or job.target is not None or job.mask is not None:
            again = _again(job, MaskArgs(places=args.places))
        ctx.again, ctx.has_fill = again, bool(fill)
        if job.target is not None:
            ctx.mark_dirty(x)
        mask = job.mask if job.given is None else job.given
        return job.library.drop(job.plan, args, job.seed, x, job.target, mask)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        job = ctx.again
        if job.args.given:  # hooks may have changed the layout of what was saved
            job = job._replace(given=ctx.saved_tensors[0].contiguous())
        if grad.layout is not torch.strided:
            grad = grad.to_dense()
        if not ctx.has_fill:
            return _dropped(grad, job), None
        needs_x, _, needs_fill = ctx.needs_input_grad
        grad_fill = _fill_gradient(grad, _drawn_again(job)) if needs_fill else None
        return (_dropped(grad, job) if needs_x else None), None, grad_fill


# Takes x, a job whose target is None or x, and the fill if there is one: each argument costs 0.5 us.
run_job: Any = quick_apply(_DropMessages)


def _again(job: Job, args: MaskArgs) -> Job:
    """The job of backward, which holds no data of forward's."""
    return Job(job.library, job.plan, args, job.seed)


def _drawn_again(job: Job) -> Tensor:
    """The mask of forward. Compiled autograd traces this, and can't trace a kernel."""
    if job.given is not None or not torch.compiler.is_dynamo_compiling():
        return job.library.draw_mask(job)  # type: ignore[no-any-return]
    rows = operations.RowArgs(offset=job.args.places.offset)
    return kernel_mask(job.plan.shape, job.plan.rule, job.library.opaque_seed(job.seed), rows, None)


def _dropped(grad: Tensor, job: Job) -> Any:
    """The gradient of x. Its steps are few: behind other operations each function called costs a microsecond."""
    if unreadable_reason(grad):
        return job.library.where(job, grad, _drawn_again(job))
    if grad.requires_grad and torch.is_grad_enabled():
        return run_job(grad, job)
    return job.library.drop(job.plan, job.args, job.seed, grad, None, job.given)


def _scales_again(plan: Plan, args: MaskArgs) -> MaskArgs:
    """The arrays that the scales come from where the mask is given."""
    keys, places = args.keys if plan.rule.ranged else None, args.places
    places = Places(places.protect, places.eligible)
    return MaskArgs(None, args.lengths, keys, None, args.scales, given=True, places=places)


def _fill_gradient(grad: Tensor, keep: Tensor) -> Tensor:
    if grad.is_cpu:
        return grad[~keep].sum(0)
    return operations.where(grad, ~keep, None).flatten(0, keep.ndim - 1).sum(0)  # picking them would synchronise


def kernel_mask(
    shape: tuple[int, ...], rule: Rule, seed: Tensor, rows: operations.RowArgs, p: Tensor | None
) -> Tensor:  # fmt: skip
    """The keep mask by our operator, for compiled code; p is None where the rule has a number or a range."""
    keywords = [int(value) for value in rule.keywords.values()]
    return torch.ops.msgdrop_numba.keep_mask(shape, seed, p, rule.numbers, keywords, *rows)  # type: ignore[no-any-return]
