"""The records that kernels read by address, and the kinds of elements."""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np

# The kind of a move: copy, or multiply in this type.
COPY, FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(5)
OTHER = -1  # multiply, as a type that the kernels don't know
BLOCK = 1024  # messages that are drawn and moved at a time: their draws and sources stay in the first-level cache
LINE = 64  # bytes that a streaming store writes at once; a line of the cache

# The rule, as the kernels read it from the plan. Each is an attribute of `Rule`.
RULE = [
    ("threshold", np.int64),  # T(p), of the least p where p is a range
    ("spread", np.int64),  # what a row may add to it
    ("ranged", np.int64),  # whether p is a range, of which each row draws its own
    ("drops_all", np.int64),  # p = 1
    ("count_limited", np.int64),  # True if `exact` or `min_keep` limits the number of dropped messages
    ("exact", np.int64),
    ("span", np.int64),
    ("min_keep", np.int64),
    ("prefix", np.int64),  # the first messages of a row, which aren't eligible
    ("spares", np.int64),  # whether some messages aren't eligible, whatever the arrays of a call say
]

# A plan: it depends on the array's shape, strides and dtype and on the rule alone.
PLAN = np.dtype(
    [
        ("size", np.int64),  # positions in a row
        ("width", np.int64),  # bytes in a message, or in each piece of it
        ("kind", np.int64),  # what is done to the elements of a kept message
        ("scale", np.float64),  # what they are multiplied by, where kind says so
        ("x_row", np.int64),  # bytes from row to row, and from position to position
        ("x_step", np.int64),
        ("out_row", np.int64),
        ("out_step", np.int64),
        ("pieces", np.int64),  # that a message lies in, 1: its features are contiguous; bytes from one to the next
        ("x_piece", np.int64),
        ("out_piece", np.int64),
        ("stream", np.int64),  # whether to write past the cache
        ("transposed", np.int64),  # whether rows lie beside each other, as in an RNN's outputs, batch first
        *RULE,
    ]
)

# The arrays of one call: addresses, 0 if there is no such array, and a few numbers.
MASK_ARGS = np.dtype(
    [
        ("fill", np.int64),  # one message; none: zeros
        ("given", np.int64),  # whether the mask is there already, to be read
        ("lengths", np.int64),  # int64, one a row
        ("keys", np.int64),  # uint64, one a row; none: the row's index
        ("thresholds", np.int64),  # uint64, one a position or, where per_row, one a message
        ("per_row", np.int64),
        ("scales", np.int64),  # float64 as the thresholds, where kept messages are scaled by them
        ("sources", np.int64),  # int64, one a row: where its messages lie, each row in memory of its own
        ("padding", np.int64),  # one message, for what lies behind a row that has a source; none: zeros
        ("protect", np.int64),  # bool, one a position or, where protect_row, one a message: which take no part
        ("protect_row", np.int64),  # bytes from row to row; 0: all share them
        ("taking", np.int64),  # int64, one a row: how many take part, where `protect` decides it and the rule counts
        ("offset", np.int64),  # the position of a row's first message, where they are consecutive
        ("positions", np.int64),  # int64, one a message of a row or, where positions_row, of all; none: consecutive
        ("positions_row", np.int64),
    ]
)


# What numbers the kept messages: addresses, and a number or two.
PLACE = np.dtype(
    [
        ("mask", np.int64),  # bool, one a message: which are kept
        ("lengths", np.int64),  # int64, one a row: what lies behind isn't kept; none: nothing does
        ("size", np.int64),  # messages of a row
        ("room", np.int64),  # slots of a row, where all have as many
        ("starts", np.int64),  # int64, one a row: its first slot in layout "packed"; none: every row has `room` slots
        ("counts", np.int64),  # int64, one a row: how many it keeps
        ("index", np.int64),  # int64, one a slot, written: the number of its message; -1: it has none
        ("inverse_index", np.int64),  # int64, one a message, written: its slot; -1: it has none
    ]
)

# What moves messages: `out[j] = x[index[j]]`, or a fill where that is negative.
GATHER = np.dtype(
    [
        ("x", np.int64),
        ("out", np.int64),
        ("index", np.int64),  # int64, one a message of out
        ("width", np.int64),  # bytes in a message
        ("fill", np.int64),  # a message, or the first of one a message of out; none: zeros
        ("fill_step", np.int64),  # bytes from one to the next
        ("scales", np.int64),  # float64, one a message of out: what it is multiplied by; 0: it passes as it is
        ("kind", np.int64),  # the type to multiply in, or COPY
        ("stream", np.int64),  # whether to write past the cache
        ("size", np.int64),  # messages in a row of x, where those don't lie side by side; else 0
        ("row", np.int64),  # then bytes from row to row, and from message to message
        ("step", np.int64),
        ("starts", np.int64),  # int64, one a row: where it lies, each row in memory of its own; none: `row` apart
    ]
)


def _named(name: str, record: np.dtype[Any]) -> Any:
    """A record's fields as a tuple of Python's numbers, which cost nothing to read."""
    return namedtuple(name, record.names or ())


PlanNumbers = _named("PlanNumbers", PLAN)
MaskNumbers = _named("MaskNumbers", MASK_ARGS)
GatherNumbers = _named("GatherNumbers", GATHER)


class Addresses(NamedTuple):
    """Addresses on a device for one launch; 0: none."""

    x: int
    out: int  # x: in place; 0: the mask alone is made
    mask: int  # written, or read where it is given
    seed: int  # an int64; 0 where nothing is drawn
    limits: int  # 16 bytes a row, where the rule is count_limited; else 0
