"""What the usual calls on tensors share, by how these lie: in C order, or dense but permuted, as an RNN's outputs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.plan import follow, make_plan
from msgdrop_numba.call.rule import DEFAULTS, Rule, cached_rule
from msgdrop_numba.call.usual import Usual, usual
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.outputs import HUGE_BYTES
from msgdrop_numba.tensors.arguments import WITHOUT_ZERO, scaled_kind
from msgdrop_numba.torch_private import Alike

_QUANTIZED = {torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4}


_LATEST = 4


@lru_cache(maxsize=256, typed=True)
def latest(scale: bool, message_dims: Any, *rule_arguments: Any) -> list[tuple[Any, Usual]]:
    """What tells the tensors of the latest calls of one rule, and what these were done by; the last one first.

    Asked before `find`: a guard looks at shape, dtype and strides in a third of the time that it takes to name them.
    """
    return []


def find(x: Tensor, scale: bool, message_dims: Any, *rule_arguments: Any) -> Usual | None:
    """What the usual call of an eager tensor is done by; None: it is another call.

    What the plan refuses is raised, and so is RuntimeError of a tensor without strides.

    Args:
        rule_arguments: p and the keywords of a rule; or a Rule and their defaults.
    """
    rule = cached_rule(*rule_arguments)
    if rule.p == 0:  # x itself comes back
        return None
    fast_path = _usual(x.shape, x.dtype, None if x.is_contiguous() else x.stride(), scale, message_dims, rule)
    if fast_path is None or not fast_path.alike.address(x):
        return None
    now = [(check, fast_path) for check in fast_path.alike.checks[x.requires_grad] if check(x)]
    before = latest(scale, message_dims, *rule_arguments)
    before[:] = [*now[:1], *before[: _LATEST - 1]]
    return fast_path


def find_as(fast_path: Usual, x: Tensor) -> Usual | None:
    """The same for a tensor of the shape and dtype that `how` is for, by its rule; it may lie otherwise."""
    if fast_path.alike.address(x):
        return fast_path
    *_, kind, message_dims, rule = fast_path.plan.arguments
    return find(x, kind != COPY, message_dims, rule, *DEFAULTS.values()) if x.layout is torch.strided else None


@lru_cache(maxsize=1024, typed=True)
def _usual(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    strides: tuple[int, ...] | None,
    scale: bool,
    message_dims: Any,
    rule: Rule,
) -> Usual | None:
    """None: the kernels can't do all of the call, or not best. Cached once more: what is asked here takes longer."""
    if isinstance(message_dims, tuple) or dtype.is_complex:  # which may be conjugated
        return None
    plan = in_order = make_plan(shape, dtype.itemsize, scaled_kind(dtype) if scale else COPY, message_dims, rule)
    if strides is not None:
        like = torch.empty_like(torch.empty_strided(shape, strides, device="meta"))
        if like.stride() != strides:
            return None
        steps = tuple(step * dtype.itemsize for step in strides)
        plan = follow(plan, steps, steps)
        if plan.nbytes >= HUGE_BYTES and not (plan.plain and plan.across):  # see `write`
            return None
    return usual(plan, Alike(strides), in_order) if plan.followed and dtype not in WITHOUT_ZERO | _QUANTIZED else None


def reset() -> None:
    """Forget all that is known of earlier calls."""
    latest.cache_clear()
    _usual.cache_clear()
