"""A job's bytes: the ways from a tensor to its output, by the kernels wherever they can follow.

A seed that is an integer belongs to the CPU's kernels, one that is a tensor to those of its CUDA device. A job may come
as the plain tuple of its fields, which spares the smallest calls a constructor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from msgdrop_numba import outputs
from msgdrop_numba.call.plan import Draw, follow, kept_scales, make_plan
from msgdrop_numba.call.request import Job
from msgdrop_numba.call.rule import BERNOULLI
from msgdrop_numba.call.threads import launch
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.tensors import cuda, memory, operations
from msgdrop_numba.torch_private import increment_versions


def write(job: Job, x: Tensor) -> Tensor:
    """x with its messages dropped, in the job's target or in a new tensor."""
    plan, draw, seed, target, mask, given = job
    if target is None and plan.followed and type(seed) is int and x.is_contiguous() and (start := x.data_ptr()):
        result, mask = memory.dense(x, plan.nbytes, None), mask if given is None else given
        launch(plan, draw, seed, start, result.data_ptr(), 0 if mask is None else mask.data_ptr())
        return result
    # A mask alone doesn't tell what to scale by.
    if plan.nbytes >= outputs.HUGE_BYTES and type(seed) is int and plan.kind == COPY and not x.is_contiguous():
        order = _memory_order(x, len(plan.shape))
        if order is not None:
            return _write_in_order(job, x, order)
    result = target
    if target is None:
        result = memory.empty_like(x) if type(seed) is int else torch.empty_like(x)
    return _write_over(job, x, result)


def _memory_order(x: Tensor, dims: int) -> list[int] | None:
    """How to permute the message dims so that x lies in C order, as an RNN's output with batch_first; or None."""
    order = [*sorted(range(dims), key=x.stride, reverse=True), *range(dims, x.ndim)]
    return order if x.permute(order).is_contiguous() else None


def _write_in_order(job: Job, x: Tensor, order: list[int]) -> Tensor:
    """The mask first, then the messages as they lie: from one of a row to its next would be far."""
    plan, draw, seed, target, _, _ = job
    keep = draw_mask(job).permute(order[: len(plan.shape)]).contiguous()
    turned = x.permute(order)
    as_turned = make_plan(turned.shape, x.itemsize, COPY, len(plan.shape), BERNOULLI)
    to = None if target is None else target.permute(order)
    y = write(Job(as_turned, Draw(draw.fill, given=True), seed, to, None, keep), turned)
    if to is not None:
        return target  # type: ignore[no-any-return]
    return memory.over(y.untyped_storage(), x.shape, x.dtype, x.stride())  # no view: it may be changed in place


def _write_over(job: Job, x: Tensor, result: Tensor) -> Tensor:
    """Into `result`, by the kernels where they can follow both, by operations where they can't."""
    plan, draw, seed, target, mask, given = job
    if not plan.messages:
        return result
    if not (x.is_contiguous() and result.is_contiguous()):
        strides, out_strides = (tuple(step * x.element_size() for step in t.stride()) for t in (x, result))
        plan, alone = follow(plan, strides, out_strides), follow(plan, out_strides, out_strides)
        if alone.followed and not (plan.followed and plan.numbers.pieces <= alone.numbers.pieces):
            plan, x = alone, result.copy_(x)  # as of the gradient of a sum, whose strides are 0
    if plan.followed and (plan.numbers.pieces == 1 or type(seed) is int):
        start, mask = x.data_ptr(), mask if given is None else given
        if start == 0 and plan.nbytes and x.numel():
            raise ValueError(f"x has no memory, though its shape is {tuple(x.shape)}: its storage was freed")
        run = launch if type(seed) is int else cuda.launch
        if run(plan, draw, seed, start, result.data_ptr(), 0 if mask is None else mask.data_ptr()):
            if target is not None and not target.is_inference():
                increment_versions((target,))  # torch can't see a write through a pointer
            return result
    return result.copy_(where(job, x, draw_mask(job)))


def draw_mask(job: Job) -> Tensor:
    """The mask alone: the one given, or drawn into the job's memory, new where it has none."""
    plan, draw, seed, _, mask, given = job
    if given is not None:
        return given  # type: ignore[no-any-return]
    if type(seed) is not int:
        return cuda.draw_mask(plan, draw, seed, mask)
    if mask is None:
        mask = torch.empty(plan.shape, dtype=torch.bool, device="cpu")
    if plan.messages:
        launch(plan, draw, seed, 0, 0, mask.data_ptr())
    return mask  # type: ignore[no-any-return]


def where(job: Job, x: Tensor, mask: Tensor) -> Tensor:
    """What the kernels do, in torch's operations: for layouts that they can't follow and what autograd must see."""
    plan, draw, seed, *_ = job
    if plan.kind == COPY:
        return operations.select(x, mask, draw.fill)
    scales: Any
    taking: Any
    if type(seed) is int:
        scales, taking = (torch.from_numpy(np.array(each)) for each in kept_scales(plan, draw, seed))
    else:
        scales, taking = operations.row_scales(plan.shape, plan.rule, seed, cuda.rows_of(draw), draw.scales)
    return operations.select(x, mask, draw.fill, scales, taking)
