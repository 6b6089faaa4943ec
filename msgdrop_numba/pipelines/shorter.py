"""Messages of a column filled, or removed from it and its companions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba.call.request import Request
from msgdrop_numba.call.select import DENSE, PACKED, Layout
from msgdrop_numba.functional import drop_messages
from msgdrop_numba.pipelines import columns
from msgdrop_numba.pipelines.columns import ColumnBlocks, Field
from msgdrop_numba.pipelines.rows import Name
from msgdrop_numba.select import Kept, select


class Remains(NamedTuple):
    """The messages of each row that remain.

    Fields:
        sizes, counts: int64, one a row: how many messages it had, and has.
        within: int64, their positions, those of all rows one behind the other.
        even: whether all rows of one array are known to keep as many, so that they remain one.
    """

    sizes: np.ndarray
    counts: np.ndarray
    within: np.ndarray
    even: bool


class Done(NamedTuple):
    """A column without its dropped messages.

    Fields:
        rows: what it was read as.
        masks: the keep masks of its blocks.
        indices: the positions of what is kept in its blocks, or in their rows one by one; remains: see there. Where
            messages were removed.
    """

    column: Any
    rows: ColumnBlocks
    masks: list[Any]
    indices: Any = ()
    remains: Remains | None = None


def drop(rows: ColumnBlocks, requests: list[Request]) -> Done:
    """Fill messages in the blocks of a column, as a request for each says."""
    pairs = [drop_messages(block, request) for block, request in zip(rows.blocks, requests, strict=True)]
    return Done(rows.join([y for y, _ in pairs]), rows, [mask for _, mask in pairs])


def shorten(rows: ColumnBlocks, requests: list[Request], even: bool) -> Done:
    """Remove them instead; `even`: what is one array remains one."""
    layout = Layout(DENSE if even and rows.one_array else PACKED, None)
    done, masks, indices, counts = [], [], [], []
    for block, request in zip(rows.blocks, requests, strict=True):
        y, kept = select(block, request, layout)
        assert kept is not None
        done.append(y)
        counts.append(_host(kept.lengths))
        masks.append(_with_padding(kept, request.lengths))
        indices.append(kept.indices if layout.name == DENSE else kept.indices % max(1, kept.size))
    sizes = [np.full(len(block), block.shape[1]) for block in rows.blocks]
    remains = Remains(_all(sizes), _all(counts), _all(indices), even)
    if layout.name == DENSE:
        return Done(rows.join(done), rows, masks, indices, remains)
    each = [columns.split_rows(index, count) for index, count in zip(indices, counts, strict=True)]
    return Done(rows.shorten(done, counts), rows, masks, each, remains)


def _all(parts: list[Any]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *(_host(part).ravel() for part in parts)])


def _host(values: Any) -> np.ndarray:
    array: np.ndarray = values.numpy(force=True) if columns.is_tensor(values) else values
    return array


def _with_padding(kept: Kept, lengths: np.ndarray | None) -> Any:
    """The keep mask, where padding counts as kept."""
    if lengths is None:
        return kept.mask
    behind = np.arange(kept.size) >= np.asarray(lengths)[:, None]
    return kept.mask | (kept.mask.new_tensor(behind) if columns.is_tensor(kept.mask) else behind)


def companion(name: str, field: Field, remains: Remains, called: Name) -> Any:
    """A column that has something for each message, without that of dropped ones."""
    try:
        return _companion(name, field, remains, called)
    except (TypeError, ValueError) as error:
        raise type(error)(f"column {name!r}: {error}") from error


def _companion(name: str, field: Field, remains: Remains, called: Name) -> Any:
    column, arrow_field = field
    if columns.is_arrow(column):
        from msgdrop_numba.pipelines import arrow

        if arrow.is_plain_list(column.type, arrow_field):
            _check(arrow.list_sizes(column), remains.sizes, called)
            return arrow.taken(column, arrow.short_type(column.type, arrow_field), remains.counts, remains.within)
    rows = columns.read_companion(column, arrow_field)
    _check(np.array([block.shape[1] for block in rows.blocks for _ in block], np.int64), remains.sizes, called)
    done, counts, first, at = [], [], 0, 0
    for block in rows.blocks:
        each = remains.counts[first : first + len(block)]
        within = remains.within[at : at + each.sum()]
        first, at = first + len(block), at + len(within)
        counts.append(each)
        done.append(_take(block, np.repeat(np.arange(len(block)) * block.shape[1], each) + within))
    if not (remains.even and rows.one_array):
        return rows.shorten(done, counts)
    (block,), (y,) = rows.blocks, done
    return y.reshape(len(block), len(y) // max(1, len(block)), *block.shape[2:])


def _check(sizes: np.ndarray, wanted: np.ndarray, called: Name) -> None:
    if len(sizes) != len(wanted):
        raise ValueError(f"it has {len(sizes)} rows, but the columns have {len(wanted)}")
    for row in np.flatnonzero(sizes != wanted)[:1].tolist():
        raise ValueError(
            f"{called(row)} must have {wanted[row]} values, one for each message, but has {sizes[row]}: companions "
            "lose the messages that columns lose"
        )


def _take(block: Any, numbers: np.ndarray) -> Any:
    flat = block.reshape(block.shape[0] * block.shape[1], *block.shape[2:])
    if columns.is_tensor(flat):
        import torch

        return flat[torch.from_numpy(numbers).to(flat.device)]
    return flat.take(numbers, axis=0)
