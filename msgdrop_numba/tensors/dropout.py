"""message_dropout and keep_mask on tensors: the usual small call, and all others by the way that `ways` names."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.plan import PLAIN, Plan, make_plan
from msgdrop_numba.call.request import Request, ShortDoor, perform, prepare_mask, turned
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.tensors import nested, traced, ways
from msgdrop_numba.tensors.arguments import WITHOUT_ZERO, check_device, scaled_kind
from msgdrop_numba.tensors.autograd import run_job
from msgdrop_numba.tensors.seeds import fresh_seed
from msgdrop_numba.tensors.write import draw_mask, write_new
from msgdrop_numba.torch_private import dense_address

_QUANTIZED = {torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4}


@lru_cache(maxsize=1024, typed=True)
def _usual_plan(shape: tuple[int, ...], dtype: torch.dtype, scale: bool, message_dims: Any, *rule: Any) -> Plan | None:
    """The plan where the kernels do it all; None otherwise. Cached once more: what is asked here takes longer."""
    if isinstance(message_dims, tuple):
        return None
    plan = make_plan(shape, dtype.itemsize, scaled_kind(dtype) if scale else COPY, message_dims, rule)
    return plan if plan.followed and dtype not in WITHOUT_ZERO | _QUANTIZED else None


def _run(plan: Plan, x: Tensor, address: int) -> Tensor:
    """The usual call, by a seed drawn from torch's default generator."""
    seed = fresh_seed(None)
    if x.requires_grad and torch.is_grad_enabled():
        return run_job(x, None, (plan, PLAIN, seed, None, None, None))  # type: ignore[no-any-return]
    return write_new(plan, PLAIN, seed, x, address)


SHORT_DOOR = ShortDoor(dense_address, _usual_plan, _run)
explain = ways.explain


def message_dropout(x: Tensor, request: Request) -> Any:
    """`functional.message_dropout` for a tensor."""
    return nested.message_dropout(x, request) if x.is_nested else turned(_perform, Tensor, Tensor.permute, x, request)


def _perform(x: Tensor, request: Request) -> Any:
    return perform(ways.library(x, request), x, request)


def keep_mask(shape: tuple[int, ...], request: Request, device: Any) -> Tensor:
    """`functional.keep_mask` on a device."""
    device = check_device(device)
    library = ways.mask_library(device, request)
    job = prepare_mask(library, shape, request, device)
    return traced.draw_mask(job) if library is traced.TRACED else draw_mask(job)
