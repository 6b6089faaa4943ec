"""The usual call, in as few steps as it takes: numbers, a seed, a target, and int64 lengths and keys, all in C order.

Its steps are those of `perform`, less what such a call can't need; a library's `short` takes it, or leaves it to all
steps, which say what is wrong. Tests hold the two equal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba.call.arguments import address
from msgdrop_numba.call.plan import PLAIN, Plan
from msgdrop_numba.call.threads import rule_address
from msgdrop_numba.kernels._jit import c_address, direct
from msgdrop_numba.kernels.cpu import drop_range
from msgdrop_numba.kernels.usual import ROWS, USUAL, drop_usual

_INTEGERS = {np.dtype(np.int64), np.dtype(np.uint64)}


class Usual(NamedTuple):
    """What all usual calls of one plan share.

    Fields:
        drop: `drop_usual`. told: its first argument, the address of `record`. The last two are from `threads.team`.
        nbytes: of an array.
        in_order: the plan of an array in C order, for gradients that lie otherwise; `make_plan` can't be traced.
        rows: the shape of what is one a row; None: there are too many.
        alike: tells tensors that lie as the plan says. strides: theirs; None: those of C order.
    """

    plan: Plan
    in_order: Plan
    drop: Any
    address: int
    record: Any
    nbytes: int
    rows: tuple[int, ...] | None
    alike: Any
    strides: tuple[int, ...] | None


def usual(plan: Plan, alike: Any = None, in_order: Plan | None = None) -> Usual:
    """The same of a plan that the kernels follow, of an array that isn't empty."""
    fields = {"kernel": c_address(drop_range), "plan": plan.address, "draw": PLAIN.address}
    fields |= {"messages": plan.messages, "size": plan.size, "rule": rule_address(plan, PLAIN)}
    record = np.array([tuple(fields[name] for name in USUAL.names or ())], USUAL)
    rows = plan.shape[:-1] if plan.messages <= ROWS * plan.size else None
    strides = None if alike is None else alike.strides
    return Usual(
        plan,
        plan if in_order is None else in_order,
        direct(drop_usual),
        address(record),
        record,
        plan.nbytes,
        rows,
        alike,
        strides,
    )


def seed_bits(seed: Any) -> int | None:
    """A seed as int64; None: it must be looked at."""
    if type(seed) is not int or not 0 <= seed < 2**64:
        return None
    return seed if seed < 2**63 else seed - 2**64


def row_address(values: Any, rows: tuple[int, ...] | None) -> int:
    """Where an array's integers of 64 bits lie, one a row; 0: it has others."""
    if type(values) is np.ndarray and values.dtype in _INTEGERS and values.shape == rows and values.flags.c_contiguous:
        return address(values)
    return 0
