"""Operators of ours for compiled code, which can't follow a kernel: a mask from the kernels, and a seed.

Compiling Philox in tensor arithmetic takes 10 s; of a seed that is a constant, minutes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call import arguments
from msgdrop_numba.call.plan import mask_plan, row_arguments
from msgdrop_numba.call.request import Job
from msgdrop_numba.call.rule import DropRule, unpacked
from msgdrop_numba.tensors import cuda
from msgdrop_numba.tensors.write import draw_mask


def kernel_mask(
    shape: tuple[int, ...], rule: DropRule, seed: Tensor, keys: Tensor | None, lengths: Tensor | None, p: Tensor | None
) -> Tensor:
    """The keep mask, of the kernels of the seed's device; p is None where the rule has a number."""
    return torch.ops.msgdrop_numba.keep_mask(shape, seed, keys, lengths, p, rule.p, rule.packed)  # type: ignore[no-any-return]


def opaque_seed(bits: int, device: torch.device) -> Tensor:
    """A seed as a 0-d int64 tensor that the compiler can't see through."""
    return torch.ops.msgdrop_numba.seed(bits, device)  # type: ignore[no-any-return]


@torch.library.custom_op(
    "msgdrop_numba::keep_mask",
    mutates_args=(),
    schema="(SymInt[] shape, Tensor seed, Tensor? keys, Tensor? lengths, Tensor? p, float? number, SymInt[] rule) "
    "-> Tensor",
)
def _keep_mask(shape: Any, seed: Any, keys: Any, lengths: Any, p: Any, number: Any, rule: Any) -> Tensor:
    plan = mask_plan(tuple(shape), (number, *unpacked(rule)))
    if seed.device.type == "cpu":
        return draw_mask(Job(plan, row_arguments(plan, p, None, False, lengths, keys), arguments.check_seed(seed)))
    return draw_mask(Job(plan, cuda.row_arguments(plan, p, None, False, lengths, keys, seed.device), seed))


@_keep_mask.register_fake
def _(shape: Any, seed: Any, *_: Any) -> Tensor:
    return seed.new_empty(shape, dtype=torch.bool)  # type: ignore[no-any-return]


@torch.library.custom_op("msgdrop_numba::seed", mutates_args=(), schema="(SymInt bits, Device device) -> Tensor")
def _seed(bits: Any, device: Any) -> Tensor:
    return torch.full((), bits, dtype=torch.int64, device=device)


@_seed.register_fake
def _(bits: Any, device: Any) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)
