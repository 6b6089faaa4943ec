"""message_dropout and keep_mask on tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.arguments import row_lengths
from msgdrop_numba.call.keys import row_keys
from msgdrop_numba.call.plan import PLAIN, MaskArgs, Plan, RecentPlans, array_plan, follow, recent_plans
from msgdrop_numba.call.request import Job, Request, perform, prepare_mask, turned
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.tensors import nested
from msgdrop_numba.tensors.arguments import WITHOUT_ZERO, byte_strides, check_device, scaled_kind
from msgdrop_numba.tensors.autograd import run_job
from msgdrop_numba.tensors.backends import HOST, choose, choose_for_mask
from msgdrop_numba.tensors.seeds import fresh_seed
from msgdrop_numba.torch_private import make_guard, watched_reason


def message_dropout(x: Tensor, request: Request) -> Any:
    """`functional.message_dropout` for a tensor."""
    if x.is_nested:
        return nested.message_dropout(x, request)
    nested.check_sizes(x)
    return turned(_perform, Tensor, Tensor.permute, x, request)


def _perform(x: Tensor, request: Request) -> Any:
    return perform(choose(x, request)[0], x, request)


def fast_path(
    x: Tensor, options: tuple[Any, ...], lengths: Any, keys: Any, seed: int | None, inplace: Any, out: Any
) -> Tensor | None:  # fmt: skip
    """Drop by a plan that is known for tensors like x. None: the call takes all steps, and nothing was done.

    Args:
        options: of `recent_plans`.
    """
    if watched_reason():
        return None
    try:
        recent = recent_plans(*options)
        plan = _find(x, recent)
        target = x if inplace else out
        if plan is None or (target is not None and not _fits(target, x, recent, inplace and out is not None, plan)):
            return None
        args = PLAIN
        if lengths is not None or keys is not None:
            for each in (lengths, keys):
                if each is not None and isinstance(each, Tensor) and not HOST.reads(each):
                    return None
            rows = plan.shape[:-1]
            args = MaskArgs(None, row_lengths(lengths, rows, plan.size), row_keys(keys, rows))
    except (TypeError, ValueError, RuntimeError):  # all steps say what is wrong
        return None
    if seed is None:
        seed = fresh_seed(None)
    if x.requires_grad and torch.is_grad_enabled():
        return run_job(x, Job(HOST, plan, args, seed))  # type: ignore[no-any-return]
    return HOST.drop(plan, args, seed, x, target)


def _find(x: Tensor, recent: RecentPlans) -> Plan | None:
    """The plan of a dense CPU tensor. Raises RuntimeError for a tensor without sizes: a guard would end the process."""
    x.shape  # noqa: B018
    for matches, plan in recent.tensors:
        if matches(x):
            return plan
    rule, dims = recent.rule, recent.message_dims
    if rule.p == 0 or isinstance(dims, tuple) or x.dtype in WITHOUT_ZERO or not HOST.reads(x):
        return None
    made = array_plan(x, scaled_kind(x.dtype) if recent.scale else COPY, dims, rule)
    if not x.is_contiguous():
        if torch.empty_like(x, device="meta").stride() != x.stride():
            return None
        steps = byte_strides(x)
        made = follow(made, steps, steps)._replace(strides=x.stride())
    guard = make_guard([x])
    if guard is not None:
        recent.tensors = [(guard, made), *recent.tensors[: recent.KEPT - 1]]
    return made


def _fits(target: Any, x: Tensor, recent: RecentPlans, twice: bool, plan: Plan) -> bool:
    """True if a target needs no closer look: x in C order, or a tensor like it and apart; no gradient follows them."""
    if twice or type(target) is not Tensor or target.is_inference() or plan.strides is not None:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or target.requires_grad):
        return False
    start = target.data_ptr()
    if not start or target is x:
        return start != 0
    return _find(target, recent) is plan and abs(start - x.data_ptr()) >= plan.nbytes


def keep_mask(shape: tuple[int, ...], request: Request, device: Any) -> Tensor:
    """`functional.keep_mask` on a device."""
    device = check_device(device)
    library = choose_for_mask(device, request)
    return library.draw_mask(prepare_mask(library, shape, request, device))  # type: ignore[no-any-return]
