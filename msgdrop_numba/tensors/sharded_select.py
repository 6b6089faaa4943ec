"""Messages of DTensors removed and put back, where ranks hold whole rows and know the size of what remains.

A `Selection` of them holds DTensors, placed as x's rows are; the numbers in them count what lies on a rank.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from msgdrop_numba.call.request import Request, turned
from msgdrop_numba.call.select import DENSE, PACKED, Layout, Selection, laid_out
from msgdrop_numba.tensors import select, ways
from msgdrop_numba.tensors.arguments import fill_message
from msgdrop_numba.tensors.cut import cut, local_part
from msgdrop_numba.tensors.pieces import Piece, cutting, is_outside, local_of, piece_of, placements_of, waited, whole
from msgdrop_numba.tensors.sharded import prepared


def message_select(x: DTensor, request: Request, layout: Layout) -> tuple[DTensor, Selection | None]:
    """`select.message_select` for a DTensor."""
    return turned(partial(_select, layout), DTensor, Tensor.permute, x, request)  # type: ignore[no-any-return]


def _select(layout: Layout, x: DTensor, request: Request) -> tuple[DTensor, Selection | None]:
    if is_outside(x):
        raise ValueError(f"messages can't be removed on a rank outside of x's mesh, {x.device_mesh}: call it on others")
    call = cut(x, request)
    piece, rows, local_request = call.piece, call.dims - 1, call.request
    if piece.cuts(rows):
        raise ValueError(
            f"messages are removed where a rank holds whole rows, but x is placed {piece.placements}, which cuts them: "
            f"redistribute it, with no Shard({rows})"
        )
    local = local_of("x", x, piece)
    job = prepared(ways.library(local, local_request), local, call, partial(_check_size, layout, local_request))
    if job.seed is not None:
        local_request = replace(local_request, seed=job.seed, generator=None)
    y, found = select.message_select(local, local_request, layout)
    if found is not None:
        numbers, slots = (whole(each, piece, rows, tuple(each.shape[rows:])) for each in (found.numbers, found.slots))
        lengths = whole(found.lengths, piece, rows)
        found = found._replace(shape=call.whole, numbers=numbers, slots=slots, lengths=lengths)
    return (x if y is local else _resized(y, piece, rows)), found


def _check_size(layout: Layout, request: Request, plan: Any) -> None:
    """Refuse what remains without a size that is the same on all ranks."""
    name, _ = laid_out(layout, request, plan)
    if not request.training or plan.rule.p == 0:
        return
    if name == PACKED:
        raise ValueError("layout 'packed' lays rows of all ranks one behind the other: take 'dense' or 'padded'")
    if name != DENSE and layout.capacity is None:
        raise ValueError(
            "what remains of a DTensor needs a size that all ranks know, but rows may keep different counts: "
            "give exact=True, or capacity"
        )


def _resized(local: Tensor, piece: Piece, dim: int) -> DTensor:
    """The DTensor of what was made of a piece by giving one dim, which isn't cut, another size."""
    shape = (*piece.shape[:dim], local.shape[dim], *piece.shape[dim + 1 :])
    return whole(local, piece._replace(shape=shape), len(shape))


def as_here(found: Selection, x: DTensor) -> Selection:
    """The selection, refused where it isn't of DTensors on x's mesh."""
    mesh = getattr(found.numbers, "device_mesh", None)
    if mesh is None:
        raise ValueError("what was kept is of a plain tensor or array, but got a DTensor: give x.full_tensor()")
    if mesh != x.device_mesh:
        raise ValueError(f"what was kept is on {mesh}, but the tensor on {x.device_mesh}: redistribute it")
    return found


def take(x: DTensor, dims: int, found: Selection) -> DTensor:
    """`select.take` for a DTensor."""
    piece = _rows_of("t", x, dims - 1, found)
    return _resized(select.take(local_of("t", x, piece), dims, _local(found)), piece, dims - 1)


def take_shared(x: DTensor, within: DTensor) -> DTensor:
    """`select.take_shared` for a DTensor, whose gradient is the sum over all ranks' rows."""
    placements, of_gradient = [], []
    for i, (ours, rows) in enumerate(zip(placements_of("t", x), within.placements, strict=True)):
        if x.device_mesh.size(i) > 1 and ours.is_shard() and (ours.dim == 0 or rows.is_shard()):
            raise ValueError(
                f"t must be replicated where x's rows are sharded, {tuple(within.placements)}, but got "
                f"{tuple(x.placements)}: redistribute it"
            )
        placements.append(Shard(ours.dim + within.ndim - 1) if ours.is_shard() and not rows.is_shard() else rows)
        of_gradient.append(Partial() if rows.is_shard() else ours)
    local = waited(x.to_local(grad_placements=of_gradient))
    y = select.take_shared(local, within.to_local())
    shape = (*within.shape, *x.shape[1:])
    return whole(y, Piece(x.device_mesh, tuple(placements), shape, (), ()), len(shape))


def restore(y: DTensor, fill: Any, found: Selection) -> DTensor:
    """`select.restore` for a DTensor."""
    rows = found.numbers.ndim - 1
    piece = _rows_of("y", y, rows, found)
    full = (*found.shape, *y.shape[rows + 1 :])
    piece, local = piece._replace(shape=full), local_of("y", y, piece)
    each = isinstance(fill, Tensor) and fill.ndim == len(full)
    if each:
        if tuple(fill.shape) != full or fill.dtype != y.dtype:
            raise ValueError(
                f"a fill of all messages must be {full} {y.dtype}, but got {tuple(fill.shape)} {fill.dtype}"
            )
    elif isinstance(fill, Tensor):
        fill_message(fill, y, rows + 1)
    fill = local_part("fill", fill, 0 if each else rows + 1, piece)
    return _resized(select.restore(local, fill, _local(found)), piece, rows)


def _rows_of(name: str, x: DTensor, rows: int, found: Selection) -> Piece:
    """The piece of a tensor, whose rows must be placed as those that were selected from."""
    piece = piece_of(name, x)
    given = [p if p.is_shard() and p.dim <= rows else Replicate() for p in piece.placements]
    if cutting(x.device_mesh, given) != cutting(x.device_mesh, found.numbers.placements):
        raise ValueError(
            f"{name} must be placed by its rows as x was, {tuple(found.numbers.placements)}, but got "
            f"{piece.placements}: redistribute it"
        )
    return piece


def _local(found: Selection) -> Selection:
    numbers, slots, lengths = (each.to_local() for each in (found.numbers, found.slots, found.lengths))
    return found._replace(shape=tuple(slots.shape), numbers=numbers, slots=slots, lengths=lengths)
