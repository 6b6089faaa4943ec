"""Cached plans: everything about a call that depends on shape, dtype, strides and rule, and not on the data."""

from __future__ import annotations

import math
import numbers
from array import array
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba.call import arguments
from msgdrop_numba.call.arguments import address
from msgdrop_numba.call.keys import row_keys
from msgdrop_numba.call.rule import MAX_ROW, Rule, cached_rule
from msgdrop_numba.kernels.cpu import scale_rows
from msgdrop_numba.kernels.records import COPY, LINE, OTHER, PLAN, RULE, MaskNumbers, PlanNumbers

# Below this many bytes written, waking threads costs more than it saves.
PARALLEL_BYTES = 256 * 1024


def _last_level_cache() -> int:
    """Its bytes, as Linux tells them; elsewhere those of a usual server's core complex."""
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * 2**20


STREAM_BYTES = _last_level_cache()  # outputs as large, the cache would forget before anybody reads them

# Why the kernels can't follow an array.
FAR_APART = "its rows, or its features, don't lie evenly"
UNKNOWN_SCALE = "the kernels can't scale its dtype"


class RowPointers(NamedTuple):
    """Addresses of rows that each lie in memory of their own.

    Fields:
        starts: int64, one a row: the address of its messages.
        padding: one message for what lies behind them, an array or tensor; None: zeros.
    """

    starts: Any
    padding: Any = None


class Places(NamedTuple):
    """The eligible messages of a call, and the positions that number them.

    Fields:
        protect: bool, one a position or, with more dims, one a message. True: the message isn't eligible.
        eligible: int64, one a row: the number of eligible messages. None unless `protect` is given and the rule counts.
        offset: the position of a row's first message, if they are consecutive.
        positions: int64 as `protect`, if they aren't.
    """

    protect: Any = None
    eligible: Any = None
    offset: int = 0
    positions: Any = None


ALL = Places()
_NOWHERE = (0,) * 6  # the fields of a MASK_ARGS record for `ALL`


class MaskArgs:
    """The arrays of one call that decide its mask, beside plan and seed. They stay alive while a kernel reads them.

    Args:
        fill: one message, an array or tensor; None: zeros.
        lengths: int64, one a row. keys: uint64, one a row; None: the row's index.
        thresholds: uint64, for p one a position or, if two-dimensional, one a message. scales: float64, the same,
            where kept messages are multiplied by them.
        given: the mask is there already: nothing is drawn.
        rows: where the rows lie, if not in one array.
        places: which messages take part, and their positions.
    """

    __slots__ = (
        "_numbers", "address", "fill", "given", "is_bernoulli", "keys", "lengths", "places", "record", "rows", "scales",
        "seeded", "thresholds",
    )  # fmt: skip

    def __init__(
        self, fill: Any = None, lengths: Any = None, keys: Any = None, thresholds: Any = None, scales: Any = None,
        given: bool = False, rows: RowPointers | None = None, places: Places = ALL,
    ) -> None:  # fmt: skip
        self.fill, self.lengths, self.keys, self.thresholds = fill, lengths, keys, thresholds
        self.scales, self.given, self.rows, self.places = scales, given, rows, places
        # True if plan, seed and scalars decide the mask: backward then draws it again, and saves no array.
        self.seeded = lengths is None and keys is None and thresholds is None and not given
        per_row = (thresholds is not None and thresholds.ndim > 1) or (scales is not None and scales.ndim > 1)
        starts, padding = (0, 0) if rows is None else (address(rows.starts), address(rows.padding))
        stand = _NOWHERE
        self.is_bernoulli = thresholds is None  # False: `rules.decide` must read the arrays, whatever the plan says
        if places is not ALL:
            protect, eligible, offset, positions = places
            numbered = protect is None and positions is None
            self.seeded, self.is_bernoulli = self.seeded and numbered, self.is_bernoulli and numbered
            stand = (
                address(protect), _row_bytes(protect, 1), address(eligible), offset, address(positions),
                _row_bytes(positions, 8),
            )  # fmt: skip
        # One MASK_ARGS record, whose fields are all int64.
        self.record = array(
            "q", (fill is not None and address(fill), given, lengths is not None and address(lengths),
                  keys is not None and address(keys), thresholds is not None and address(thresholds), per_row,
                  scales is not None and address(scales), starts, padding, *stand),
        )  # fmt: skip
        self.address, _ = self.record.buffer_info()
        self._numbers: Any = None

    @property
    def numbers(self) -> Any:
        """The record's fields as Python integers, a `MaskNumbers`. CUDA kernels take them one by one."""
        if self._numbers is None:
            self._numbers = MaskNumbers._make(self.record)
        return self._numbers


def _row_bytes(values: Any, itemsize: int) -> int:
    """From row to row; 0 where all rows share one."""
    return itemsize * values.shape[-1] if values is not None and values.ndim > 1 else 0


PLAIN = MaskArgs()
GIVEN = MaskArgs(given=True)


class Plan(NamedTuple):
    """The numbers of a kernel call that don't depend on the data."""

    shape: tuple[int, ...]  # the message dims
    messages: int
    size: int  # messages in a row
    nbytes: int  # bytes of the output, an upper bound of what a call writes
    kind: int  # COPY, or the type to scale in, see kernels.records
    obstacle: str  # why the kernels can't follow the strides or scale the dtype; empty: they can
    kernel_ok: bool  # True if `obstacle` is empty
    is_bernoulli: bool  # True if every message drops independently, all with the same p
    rule: Rule
    arguments: tuple[Any, ...]  # of `_make`, without strides: `follow` makes the plan for other strides from them
    record: np.ndarray[Any, Any]  # one PLAN, what the kernels read
    address: int  # of the record
    numbers: Any  # the record's fields, a PlanNumbers
    strides: Any = None  # of the dense tensor that it is for, and of its output; None: C order


def make_plan(
    shape: tuple[int, ...], itemsize: int, kind: int, message_dims: int | None, rule: Rule,
    strides: tuple[int, ...] | None = None, out_strides: tuple[int, ...] | None = None,
) -> Plan:  # fmt: skip
    """The plan for arrays of `shape`, made once for each set of arguments: it costs as much as a small kernel.

    Args:
        shape: of the whole array, features included.
        itemsize: bytes in an element.
        kind: COPY, or the type that kept elements are scaled in.
        message_dims: how many leading dims index messages; None: 2 of 3 or more, else 1.
        strides, out_strides: of the array read and the one written, in bytes; None: C order.
    """
    try:
        return _cached(shape, itemsize, kind, message_dims, strides, out_strides, rule)
    except TypeError:  # of a wrong type, or unhashable: made again, to say which
        pass
    return _make(shape, itemsize, kind, message_dims, strides, out_strides, rule)


def _make(
    shape: tuple[int, ...], itemsize: int, kind: int, message_dims: int | None,
    strides: tuple[int, ...] | None, out_strides: tuple[int, ...] | None, rule: Rule,
) -> Plan:  # fmt: skip
    dims = arguments.message_dims(shape, message_dims)
    if shape[dims - 1] > MAX_ROW:
        raise ValueError(f"a row has at most 2**34 messages, but x has shape {tuple(shape)}")
    check_prefix(rule, shape[dims - 1])
    laid = layout(shape, itemsize, dims, strides, out_strides)
    obstacle = UNKNOWN_SCALE if kind == OTHER else "" if laid is not None else FAR_APART
    messages, message = math.prod(shape[:dims]), math.prod(shape[dims:]) * itemsize
    width, (x_row, x_step, x_piece), (out_row, out_step, out_piece) = laid or (message, (0, 0, 0), (0, 0, 0))
    # Past the cache only what the cache can't hold: reading it soon after would cost more than was saved.
    size, transposed = shape[dims - 1], width == message and 0 < x_row < x_step and 0 < out_row < out_step
    dense = x_row == out_row == width and x_step == out_step == messages // max(1, size) * width
    whole = x_step == out_step == width == message and x_row == out_row == width * size
    stream = (whole or (transposed and dense)) and width % LINE == 0 and messages * width >= STREAM_BYTES
    values = {
        "size": size, "width": width, "kind": kind, "scale": rule.scale, "stream": stream,
        "transposed": transposed,
        "x_row": x_row, "x_step": x_step, "out_row": out_row, "out_step": out_step,
        "pieces": message // width if width else 1, "x_piece": x_piece, "out_piece": out_piece,
        **{name: getattr(rule, name) for name, _ in RULE},
    }  # fmt: skip
    record = np.zeros(1, PLAN)
    record[0] = tuple(values[name] for name in PLAN.names or ())
    nbytes = messages * (message or 1)
    return Plan(
        tuple(shape[:dims]), messages, shape[dims - 1], nbytes, kind, obstacle, not obstacle,
        rule.is_bernoulli, rule, (shape, itemsize, kind, message_dims, rule), record,
        record.__array_interface__["data"][0], PlanNumbers._make(record[0].item()),
    )  # fmt: skip


class RecentPlans:
    """The plans of the latest calls with one rule, one `scale` and the same message dims.

    A small call finds its plan here in a third of the time that it takes to describe its array.

    Attributes:
        rule, scale, message_dims: of these calls.
        tensors: (guard, plan) pairs, newest first; a guard is a function that recognises a tensor.
        arrays: plans by the shape and dtype of NumPy arrays in C order.
    """

    KEPT = 4  # pairs: a forward and a backward, a tensor and a parameter take turns

    __slots__ = "arrays", "message_dims", "rule", "scale", "tensors"

    def __init__(self, rule: Rule, scale: bool, message_dims: Any) -> None:
        self.rule, self.scale, self.message_dims = rule, scale, message_dims
        self.tensors: list[tuple[Any, Plan]] = []
        self.arrays: dict[Any, Plan] = {}


@lru_cache(maxsize=256, typed=True)
def recent_plans(scale: bool, message_dims: Any, *rule_arguments: Any) -> RecentPlans:
    """The recent plans of one rule, `scale` and message dims. `rule_arguments` are those of `cached_rule`."""
    return RecentPlans(cached_rule(*rule_arguments), scale, message_dims)


def array_plan(x: Any, kind: int, message_dims: int | None, rule: Rule) -> Plan:
    """The plan for an array or tensor as if it were in C order."""
    try:
        return _cached(x.shape, x.itemsize, kind, message_dims, None, None, rule)
    except TypeError:  # as in `make_plan`
        return make_plan(x.shape, x.itemsize, kind, message_dims, rule)


def mask_plan(shape: tuple[int, ...], rule: Rule) -> Plan:
    """The plan for a mask alone, over the message dims `shape`."""
    return make_plan((*shape, 0), 0, COPY, len(shape), rule)


_cached = lru_cache(maxsize=1024, typed=True)(_make)


def reset() -> None:
    """Forget all plans."""
    _cached.cache_clear()
    recent_plans.cache_clear()


def check_prefix(rule: Rule, size: int) -> None:
    """Refuse a prefix that is longer than all rows."""
    if rule.prefix > size:
        raise ValueError(f"prefix must be at most {size}, the messages of a row, but got {rule.prefix}")


def row_arguments(plan: Plan, p: Any, fill: Any, request: Any) -> MaskArgs:
    """The arguments that are arrays over rows or messages, checked and laid out for the kernels; p None: no array."""
    shape = plan.shape
    thresholds = scales = None
    if p is not None:
        p = arguments.probabilities(p, shape)
        thresholds, scales = arguments.thresholds(p), arguments.scales(p) if request.scale else None
    lengths = arguments.row_lengths(request.lengths, shape[:-1], plan.size)
    keys, places = row_keys(request.keys, shape[:-1]), ALL
    if request.protect is not None or request.positions is not None:
        protect = None if request.protect is None else arguments.protected(request.protect, shape)
        offset, positions = arguments.split_positions(request.positions, plan.size)
        places = row_places(
            plan, lengths, protect, offset,
            None if positions is None else arguments.message_positions(positions, shape),
        )  # fmt: skip
    return MaskArgs(fill, lengths, keys, thresholds, scales, places=places)


def row_places(plan: Plan, lengths: Any, protect: Any, offset: int, positions: Any) -> Places:
    """`Places` of checked arrays."""
    counted = protect is not None and plan.rule.count_limited
    eligible = _eligible(plan, lengths, protect).sum(axis=-1, dtype=np.int64) if counted else None
    return Places(protect, None if eligible is None else np.ravel(eligible), offset, positions)


def _eligible(plan: Plan, lengths: Any, protect: Any) -> np.ndarray[Any, Any]:
    """True where a message is eligible: neither padding, nor in the prefix, nor protected. Over the message dims."""
    position = np.arange(plan.size)
    eligible = plan.rule.eligible(position)
    if lengths is not None:
        eligible = eligible & (position < lengths.reshape(plan.shape[:-1])[..., None])
    return np.broadcast_to(eligible if protect is None else eligible & ~protect, plan.shape)


def kept_scales(plan: Plan, args: MaskArgs, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The factor of each message (float64), and the mask of eligible messages, which alone are scaled."""
    scales = args.scales
    if scales is None:
        scales = np.empty((*plan.shape[:-1], 1))
        scale_rows(plan.address, args.address, arguments.signed(seed), scales.size, address(scales))
    return np.broadcast_to(scales, plan.shape), _eligible(plan, args.lengths, args.places.protect)


def follow(contiguous: Plan, strides: tuple[int, ...], out_strides: tuple[int, ...]) -> Plan:
    """The plan for the same shape and rule, but for these strides of x and of the output, in bytes."""
    *made_from, rule = contiguous.arguments
    return _cached(*made_from, strides, out_strides, rule)


def mask_shape(shape: Any) -> tuple[int, ...]:
    """The message dims that an integer or a sequence of them names."""
    try:
        dims = (shape,) if isinstance(shape, numbers.Integral) else tuple(shape)
    except TypeError:
        dims = ()
    if not dims or any(isinstance(d, bool) or not isinstance(d, numbers.Integral) or d < 0 for d in dims):
        raise ValueError(f"shape must be the message dims, integers of 0 or more, but got {shape!r}")
    return tuple(map(int, dims))


def steps(shape: tuple[int, ...], itemsize: int, dims: int, strides: tuple[int, ...]) -> tuple[int, int] | None:
    """Bytes from row to row and from position to position; None where rows or features don't lie so."""
    laid = layout(shape, itemsize, dims, strides, strides)
    if laid is None or laid[0] != math.prod(shape[dims:]) * itemsize:
        return None
    row, step, _ = laid[1]
    return row, step


def layout(shape: tuple[int, ...], itemsize: int, dims: int, *strides: tuple[int, ...] | None) -> Any:
    """Describe the messages of several arrays of one shape by three strides each.

    Returns:
        (bytes in a piece, then for each array a triple: bytes from row to row, from position to position, from piece to
        piece). A piece is the part of a message that is contiguous in all arrays. None if one stride isn't enough to
        reach all rows, or all pieces. Strides None: C order.
    """
    message = math.prod(shape[dims:]) * itemsize
    if strides == (None,) * len(strides):
        return message, *((message * shape[dims - 1], message, 0),) * len(strides)
    each = [c_order(shape, itemsize) if s is None else s for s in strides]
    width, within = itemsize, len(shape)
    while within > dims and all(shape[within - 1] == 1 or s[within - 1] == width for s in each):
        within -= 1
        width *= shape[within]
    if message == 0:
        width, within = 0, dims
    laid = [(_evenly(shape, s, 0, dims - 1), s[dims - 1], _evenly(shape, s, dims, within)) for s in each]
    return None if any(None in one for one in laid) else (width, *laid)


def c_order(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides of an array in C order, in bytes."""
    return tuple(math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape)))


def _evenly(shape: tuple[int, ...], strides: tuple[int, ...], first: int, last: int) -> int | None:
    """The one stride that walks over the dims first..last - 1 in C order, in bytes. None if one stride isn't enough."""
    step, above = None, 0
    for dim in reversed(range(first, last)):
        if shape[dim] > 1:
            if step is not None and strides[dim] != above:
                return None
            step = strides[dim] if step is None else step
            above = strides[dim] * shape[dim]
    return step or 0
