"""The usual call, in as few steps as it takes: numbers, a seed, a target, and int64 lengths and keys, all in C order.

Its steps are those of `perform`, less what such a call can't need; a library's `short` takes it, or leaves it to all
steps, which say what is wrong. Tests hold the two equal.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numba import config, types

from msgdrop_numba.call.arguments import address
from msgdrop_numba.call.plan import PLAIN, Plan
from msgdrop_numba.call.threads import launch, rule_address
from msgdrop_numba.kernels._jit import c_address
from msgdrop_numba.kernels.cpu import drop_range
from msgdrop_numba.kernels.usual import ROWS, USUAL, drop_usual

_INTEGERS = {np.dtype(np.int64), np.dtype(np.uint64)}


class Usual(NamedTuple):
    """What all usual calls of one plan share.

    Fields:
        small: whether its calls take lengths, keys and a source: they are too little for threads.
        drop: `drop_usual`, or as much of it as larger ones need.
        told: its first argument.
        rows: the shape of what is one a row.
    """

    plan: Plan
    small: bool
    drop: Any
    told: int
    nbytes: int
    rows: tuple[int, ...]
    record: Any


def usual(plan: Plan) -> Usual:
    """The same of a plan that the kernels follow, of an array that isn't empty."""
    small = plan.serial and plan.messages <= ROWS * plan.size
    shared = plan, small, partial(_launch, plan), 0, plan.nbytes, plan.shape[:-1], None
    if not small:
        return Usual(*shared)
    told = {"kernel": c_address(drop_range), "plan": plan.address, "draw": PLAIN.address}
    told |= {"messages": plan.messages, "size": plan.size, "rule": rule_address(plan, PLAIN)}
    record = np.array([tuple(told[name] for name in USUAL.names or ())], USUAL)
    return Usual(*shared)._replace(drop=direct(drop_usual), told=address(record), record=record)


def _launch(plan: Plan, told: int, lengths: int, keys: int, source: int, seed: int, x: int, out: int) -> int:
    launch(plan, PLAIN, seed, x, out, 0)
    return 0


@cache
def direct(kernel: Any) -> Any:
    """A kernel of integers without its dispatcher, which looks at their types each time: 0.7 us of a call.

    With the compiler off, the kernel as it is.
    """
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        return kernel
    signature = (types.int64,) * len(inspect.signature(kernel.py_func).parameters)
    kernel.compile(signature)
    return kernel.overloads[signature].entry_point


def seed_bits(seed: Any) -> int | None:
    """A seed as int64; None: it must be looked at."""
    if type(seed) is not int or not 0 <= seed < 2**64:
        return None
    return seed if seed < 2**63 else seed - 2**64


def row_address(values: Any, rows: tuple[int, ...]) -> int:
    """Where an array's integers of 64 bits lie, one a row; 0: it has others."""
    if type(values) is np.ndarray and values.dtype in _INTEGERS and values.shape == rows and values.flags.c_contiguous:
        return address(values)
    return 0
