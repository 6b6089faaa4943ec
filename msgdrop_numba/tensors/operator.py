"""Operators of ours for compiled code, which can't follow a kernel: a mask from the kernels, and seeds.

Compiling Philox in tensor arithmetic takes 10 s; of a seed that is a constant, minutes.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msgdrop_numba.call import arguments
from msgdrop_numba.call.plan import mask_plan, row_arguments
from msgdrop_numba.call.request import Job, Request
from msgdrop_numba.call.rule import DEFAULTS, ArrayRule, Rule
from msgdrop_numba.kernels import philox
from msgdrop_numba.tensors import cuda, operations
from msgdrop_numba.tensors.operations import Rows
from msgdrop_numba.tensors.write import draw_mask
from msgdrop_numba.torch_private import drawn_once

SEED_COUNT = 2**63 - 1  # how many seeds may be drawn


def kernel_mask(shape: tuple[int, ...], rule: Rule, seed: Tensor, rows: Rows, p: Tensor | None) -> Tensor:
    """The keep mask, of the kernels of the seed's device; p is None where the rule has a number or a range."""
    keywords = [int(value) for value in rule.keywords.values()]
    return torch.ops.msgdrop_numba.keep_mask(shape, seed, p, rule.numbers, keywords, *rows)  # type: ignore[no-any-return]


def opaque_seed(bits: int, device: torch.device) -> Tensor:
    """A seed as a 0-d int64 tensor that the compiler can't see through."""
    return torch.ops.msgdrop_numba.seed(bits, device)  # type: ignore[no-any-return]


def drawn_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, which backward doesn't draw again."""
    return torch.ops.msgdrop_numba.draw(device)  # type: ignore[no-any-return]


def folded_seed(seed: Tensor, data: int) -> Tensor:
    """`fold_in` of a seed tensor."""
    return torch.ops.msgdrop_numba.fold_in(seed, data)  # type: ignore[no-any-return]


@torch.library.custom_op(
    "msgdrop_numba::keep_mask",
    mutates_args=(),
    schema="(SymInt[] shape, Tensor seed, Tensor? p, float[] numbers, SymInt[] rule, Tensor? lengths, Tensor? keys, "
    "Tensor? protect, SymInt offset, Tensor? positions) -> Tensor",
)
def _keep_mask(shape: Any, seed: Any, p: Any, numbers: Any, rule: Any, *rows: Any) -> Tensor:
    keywords = {name: type(default)(value) for (name, default), value in zip(DEFAULTS.items(), rule, strict=True)}
    number = tuple(numbers) if len(numbers) == 2 else numbers[0] if numbers else None
    checked: Rule = ArrayRule(None, **keywords) if number is None else Rule(number, **keywords)
    plan = mask_plan(tuple(shape), checked.for_rows(shape[-1]))
    lengths, keys, protect, offset, positions = rows
    request = Request(
        checked, p, lengths=lengths, keys=keys, protect=protect, positions=offset if positions is None else positions
    )
    if seed.device.type == "cpu":
        return draw_mask(Job(plan, row_arguments(plan, p, None, request), arguments.check_seed(seed)))
    return draw_mask(Job(plan, cuda.row_arguments(plan, p, None, request, seed.device), seed))


@_keep_mask.register_fake
def _(shape: Any, seed: Any, *_: Any) -> Tensor:
    return seed.new_empty(shape, dtype=torch.bool)  # type: ignore[no-any-return]


@torch.library.custom_op("msgdrop_numba::seed", mutates_args=(), schema="(SymInt bits, Device device) -> Tensor")
def _seed(bits: Any, device: Any) -> Tensor:
    return torch.full((), bits, dtype=torch.int64, device=device)


@_seed.register_fake
def _(bits: Any, device: Any) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


_library = torch.library.Library("msgdrop_numba", "FRAGMENT")
_library.define("draw(Device device) -> Tensor")
_numbers = count()


@torch.library.impl(_library, "draw", "CompositeImplicitAutograd")
def _draw(device: Any) -> Tensor:
    """Runs while forward and backward are traced, which is when their partitioner can be told of it.

    The number tells draws apart, which the compiler would else take for one.
    """
    with drawn_once():
        return torch.ops.msgdrop_numba.draw_now(next(_numbers), device=device)  # type: ignore[no-any-return]


# `device` by its name, and the tag: where backward computes all again, torch then restores that device's generator.
@torch.library.custom_op(
    "msgdrop_numba::draw_now",
    mutates_args=(),
    schema="(int number, *, Device device) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
def _draw_now(number: Any, *, device: Any) -> Tensor:
    return torch.randint(0, SEED_COUNT, (), dtype=torch.int64, device=device)


@_draw_now.register_fake
def _(number: Any, *, device: Any) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


@torch.library.custom_op("msgdrop_numba::fold_in", mutates_args=(), schema="(Tensor seed, SymInt data) -> Tensor")
def _fold_in(seed: Any, data: Any) -> Tensor:
    if seed.is_cpu:
        folded = philox.fold_in(np.uint64(arguments.check_seed(seed)), np.uint64(data))
        return torch.from_numpy(np.asarray(folded).view(np.int64))
    return operations.fold_in(seed, torch.full_like(seed, data))


@_fold_in.register_fake
def _(seed: Any, data: Any) -> Tensor:
    return torch.empty_like(seed)
