"""message_dropout where no kernel may run: under tracing and transforms, on other devices, for tensor subclasses.

Values inside tensors on other devices or traced are clamped here, not checked: to look would synchronise, or break
a graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from msgdrop_numba.call import arguments
from msgdrop_numba.call.plan import check_prefix
from msgdrop_numba.call.request import Job, Request
from msgdrop_numba.call.rule import Rule
from msgdrop_numba.tensors import operations
from msgdrop_numba.tensors.arguments import probabilities_on, rows_on, split_p_traced
from msgdrop_numba.tensors.library import Tensors
from msgdrop_numba.tensors.operator import kernel_mask
from msgdrop_numba.tensors.seeds import check_device_seed, device_seed
from msgdrop_numba.torch_private import in_transform, is_eager, is_exporting


class Outline(NamedTuple):
    """What of a plan operations need: sizes may be symbols here."""

    shape: tuple[int, ...]  # the message dims
    rule: Rule


class TracedArgs(NamedTuple):
    """What of a draw operations need, on x's device."""

    fill: Tensor | None = None
    p: Tensor | None = None  # float64; None: the rule has a number or a range
    rows: operations.Rows = operations.Rows()


class Traced(Tensors):
    """Torch's operations, see call.request.Library."""

    nothing = TracedArgs()
    split_p = staticmethod(split_p_traced)
    check_seed = staticmethod(check_device_seed)
    seed = staticmethod(device_seed)

    def plan(self, x: Tensor, kind: int, message_dims: Any, rule: Rule) -> Outline:
        return _outline(tuple(x.shape[: arguments.message_dims(x.shape, message_dims)]), rule)

    def mask_plan(self, shape: tuple[int, ...], rule: Rule) -> Outline:
        return _outline(shape, rule)

    def draw(self, plan: Outline, p: Any, fill: Any, request: Request, device: torch.device) -> TracedArgs:
        shape = plan.shape
        p = None if p is None else probabilities_on(p, shape, device)
        return TracedArgs(fill, p, rows_on(request, shape, device))

    def mask(self, shape: tuple[int, ...], device: torch.device) -> None:  # type: ignore[override]
        """Operations make their own."""

    def run(self, x: Tensor, job: Job, request: Request) -> Any:
        args: TracedArgs = job.draw
        keep = draw_mask(job)
        scale, taking = row_scales(job) if request.scale else (None, None)
        y = operations.select(x, keep, args.fill, scale, taking)
        if job.target is not None:
            y = job.target.copy_(y)
        return (y, keep) if request.return_mask else y


TRACED = Traced()


def _outline(shape: tuple[int, ...], rule: Rule) -> Outline:
    if is_eager():  # else sizes may be symbols, which a check would bind
        check_prefix(rule, shape[-1])
    return Outline(shape, rule)


def row_scales(job: Job) -> tuple[Any, Tensor | None]:
    """What each message is multiplied by, and where; see operations.row_scales."""
    (shape, rule), (_, p, rows), seed = job.plan, job.draw, job.seed
    return operations.row_scales(shape, rule, seed, rows, None if p is None else operations.scales(p))


def draw_mask(job: Job) -> Tensor:
    """The mask in torch's operations; in compiled code from the kernels."""
    (shape, rule), (_, p, rows), seed = job.plan, job.draw, job.seed
    compiled = torch.compiler.is_compiling() and not is_exporting()
    if compiled and not in_transform() and seed.device.type in ("cpu", "cuda"):
        return kernel_mask(shape, rule, seed, rows, p)
    return operations.keep_mask(shape, rule, seed, rows, None if p is None else operations.thresholds(p))
