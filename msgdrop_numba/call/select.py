"""Removal of messages: the form of the output, the index that gathers kept messages, and the moves along it.

A *number* counts messages in C order over the message dims, a *slot* counts places in what remains. Which of them
remain is drawn once, as a `Selection`; removing, putting back, companions and all gradients are moves along it.
"""

from __future__ import annotations

import math
import numbers
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba.call import plan as plans
from msgdrop_numba.call.arguments import address
from msgdrop_numba.call.plan import Plan, kept_scales, steps
from msgdrop_numba.call.rule import Rule
from msgdrop_numba.call.threads import run
from msgdrop_numba.kernels.gather import count_range, gather_range, place_range
from msgdrop_numba.kernels.records import COPY, LINE, GatherNumbers

DENSE, PADDED, PACKED = LAYOUTS = "dense", "padded", "packed"


class Layout(NamedTuple):
    """The form of what remains.

    Fields:
        name: one of LAYOUTS; None: dense if each row is known to keep the same count, else padded.
        capacity: the slots of a padded row, or of all that is packed; None: as many as are needed.
        wants_kept: False if the caller drops the `Kept`, which then needn't be made.
    """

    name: str | None
    capacity: int | None
    wants_kept: bool = True


class Selection(NamedTuple):
    """The messages that remain, and their places. NumPy arrays, or tensors of one device.

    Fields:
        layout: one of LAYOUTS.
        shape: the message dims.
        index: int64, for each slot the number of its message, -1 in padding: `(*rows, slots)`; packed: `(slots,)`.
        inverse_index: int64 over the message dims: the slot of each message, -1: it was removed.
        lengths: int64 over the rows: how many of each remain.
        max_length: no row has more.
        overflow: whether there were more than there is room for, on a device a 0-d bool tensor.
    """

    layout: str
    shape: tuple[int, ...]
    index: Any
    inverse_index: Any
    lengths: Any
    max_length: int
    overflow: Any = False


ARRAYS = "index", "inverse_index", "lengths"  # the fields of a Selection that are arrays


def read_layout(layout: Any, capacity: Any, wants_kept: bool = True) -> Layout:
    """A `Layout` of checked arguments."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be 'dense', 'padded', 'packed' or None, but got {layout!r}")
    if capacity is None:
        return Layout(layout, None, wants_kept)
    if isinstance(capacity, bool) or not isinstance(capacity, numbers.Integral):
        raise TypeError(f"capacity must be an integer or None, but got {capacity!r}")
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, but got {capacity}")
    if layout == DENSE:
        raise ValueError(f"capacity goes with layout 'padded' or 'packed', but got {capacity} with 'dense'")
    return Layout(layout or PADDED, int(capacity), wants_kept)


def kept_of_each(rule: Rule, size: Any, request: Any) -> Any:
    """The number of messages that each row keeps if it is the same for all, else None. `size` may be a symbol."""
    if request.lengths is not None:
        return None
    if rule.p == 0 or not request.training:
        return size
    if request.protect is not None or not (rule.drops_all or (rule.exact and not rule.ranged)):
        return None
    n = rule.count_eligible(size)
    wanted = n
    if rule.exact:  # (n * share) >> 33 in two steps, since a symbol's product may not fit into 64 bits
        share = 2 * rule.threshold + 1  # a symbol too where p is one, of which the compiler knows no divmod
        high, low = share // 2**17, share % 2**17
        wanted = (n * high + n * low // 2**17) // 2**16
    return size - min(wanted, max(0, n - rule.min_keep))


class Form(NamedTuple):
    """The form of what remains of one call.

    Fields:
        name: one of LAYOUTS.
        each: how many messages each row keeps; None: it isn't known beforehand, or rows differ.
    """

    name: str
    each: Any


def form_of(layout: Layout, request: Any, plan: Any) -> Form:
    """The form of a call. Raises ValueError for layout "dense" where rows may keep different counts."""
    each = kept_of_each(plan.rule, plan.shape[-1], request)
    if layout.name == DENSE and each is None:
        raise ValueError(
            "layout 'dense' needs rows that are known to keep as many each, but got "
            f"{_uneven(plan.rule, request)}, or layout 'padded' or 'packed'"
        )
    return Form(layout.name or (PADDED if each is None else DENSE), each)


def _uneven(rule: Rule, request: Any) -> str:
    """Why rows may keep different counts, and what to do."""
    for name in ("lengths", "protect"):
        if getattr(request, name) is not None:
            return f"{name}: give none"
    return f"p={rule.p} of each row: give one for all" if rule.ranged else "exact=False: give exact=True"


def place(form: Form, capacity: int | None, shape: tuple[int, ...], mask: int, lengths: Any) -> Selection:
    """The selection of a keep mask on the host, over the message dims `shape`.

    Args:
        mask: its address.
        lengths: int64, one a row: what lies behind isn't kept, whatever the mask says; None: all may be.
    """
    (layout, each), (*row_shape, size) = form, shape
    rows = math.prod(row_shape)
    counts = np.empty(rows, np.int64) if each is None else np.full(rows, each, np.int64)
    inverse_index, starts = np.empty(shape, np.int64), None
    record = [mask, address(lengths), size, 0, 0, address(counts), 0, address(inverse_index)]
    if each is None:
        _run(count_range, rows, record, inverse_index.size)
    longest = int(counts.max(initial=0)) if each is None else each
    if layout == PACKED:
        starts, needed = counts.cumsum() - counts, int(counts.sum())
        room = room_for(capacity, needed, "all rows")
        index: np.ndarray = np.empty(room, np.int64)
        index[needed:] = -1
    else:
        room = room_for(capacity, longest, "a row")
        index = np.empty((*row_shape, room), np.int64)
    record[3:5], record[6] = (room, address(starts)), address(index)
    _run(place_range, rows, record, 8 * (inverse_index.size + index.size))
    longest = longest if layout == PACKED else room
    return Selection(layout, shape, index, inverse_index, counts.reshape(row_shape), longest)


def room_for(capacity: int | None, needed: int, where: str) -> int:
    """The slots of a row, or of all; refused where they are too few."""
    if capacity is not None and needed > capacity:
        raise ValueError(f"capacity must be at least {needed}, the messages that {where} may keep, but got {capacity}")
    return needed if capacity is None else capacity


def _run(kernel: Any, count: int, record: Sequence[int], nbytes: int) -> None:
    fields = array("q", record)
    run(kernel, count, fields.buffer_info()[0], nbytes)


def slot_scales(plan: Plan, args: Any, seed: int) -> np.ndarray:
    """The factor of each message, float64, over the message dims. 0: the message isn't eligible, and is copied."""
    scales, eligible = kept_scales(plan, args, seed)
    return np.where(eligible, scales, 0.0)


def of_slots(scales: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The scales of the messages in the slots of an index; padding has any."""
    flat = scales.ravel()
    return flat.take(index, mode="clip") if flat.size else np.zeros(index.shape)


def load() -> None:
    """Compile these kernels, or read them from the cache."""
    kept, out = np.ones(1, np.uint8), np.empty(1, np.uint8)
    index = place(Form(PADDED, None), None, (1, 1), address(kept), None).index
    move(moving(Source(address(kept)), address(out), index, 1), index.size)


class Source(NamedTuple):
    """The memory that messages are read from: contiguous (size 0), strided rows, or rows at addresses of their own.

    Fields:
        starts: the address of an int64 for each row: where it lies; 0: `row` bytes behind the one before.
    """

    start: int
    size: int = 0
    row: int = 0
    step: int = 0
    starts: int = 0


def source(start: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, dims: int) -> Source | None:
    """The messages of an array whose strides are in bytes; None: its features aren't contiguous, or its rows uneven."""
    found = steps(shape, itemsize, dims, strides)
    return None if found is None else Source(start, max(1, shape[dims - 1]), *found)


def moving(
    x: Source, out: int, index: Any, width: int, fill: tuple[int, int] = (0, 0), scales: Any = None, kind: int = COPY
) -> Any:
    """`out[j] = x[index[j]]`, messages of `width` bytes, multiplied by `scales[j]`; or the fill where there is none.

    Args:
        index: int64 array or tensor in C order; scales: the same of float64, None: as they are.
        fill: the address of a message, and the bytes to the next where each of out has its own; 0: zeros.

    Returns:
        A GatherNumbers. The caller keeps alive what it names.
    """
    stream = 2 * math.prod(index.shape) * width >= plans.STREAM_BYTES and width % LINE == 0 and out % LINE == 0
    kind = COPY if scales is None else kind
    return GatherNumbers(x.start, out, address(index), width, *fill, address(scales), kind, stream, *x[1:])


def move(job: Any, count: int) -> None:
    """Move the `count` messages that a GatherNumbers writes, on the host."""
    if count and job.width:
        _run(gather_range, count, job, count * job.width)
