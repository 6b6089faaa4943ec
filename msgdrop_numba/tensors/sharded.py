"""message_dropout and message_select on DTensors: a call speaks of the whole, and is cut to the piece on this rank.

Rows keep the keys that they have in the whole, messages their positions: so a piece has the whole's mask, and needs no
other rank. Where a row's mask counts its messages (`exact`, `min_keep`) and they lie on several ranks, each of these
draws the row's mask whole.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from msgdrop_numba.call.arguments import message_dims
from msgdrop_numba.call.request import Job, Library, Request, carry_out, prepare, prepare_mask, turned
from msgdrop_numba.call.rule import Rule
from msgdrop_numba.call.select import ARRAYS, DENSE, PACKED, Form, Layout, Selection, form_of
from msgdrop_numba.tensors import select
from msgdrop_numba.tensors.arguments import fill_message
from msgdrop_numba.tensors.backends import choose, choose_for_mask
from msgdrop_numba.tensors.pieces import (
    LocalCall,
    Piece,
    agreed,
    check_agreed,
    cut,
    cutting,
    is_outside,
    local_of,
    local_part,
    piece_of,
    placements_of,
    waited,
    whole,
)
from msgdrop_numba.torch_private import increment_versions


def message_dropout(x: DTensor, request: Request) -> Any:
    """`functional.message_dropout` for a DTensor."""
    return turned(_drop, DTensor, Tensor.permute, x, request)


def _drop(x: DTensor, request: Request) -> Any:
    if is_outside(x):
        piece, dims = piece_of("x", x), message_dims(tuple(x.shape), request.message_dims)
        y, keep = x if request.out is None else request.out, torch.empty(0, dtype=torch.bool, device=x.device)
    else:
        call = cut(x, request)
        piece, dims = call.piece, call.dims
        y, keep = _perform(x, call, request)
    return (y, whole(keep, piece, dims)) if request.return_mask else y


def _perform(x: DTensor, call: LocalCall, request: Request) -> tuple[Any, Any]:
    """The result, and the mask that lies here."""
    local, local_request = local_of("x", x, call.piece), call.request
    library, _ = choose(local, local_request)
    job = prepared(library, local, call)
    if call.counted and job.seed is not None:
        result = _by_whole_rows(local, job, call)
    else:
        result = carry_out(local, job, local_request)
    made, keep = result if isinstance(result, tuple) else (result, None)
    written = request.out if request.out is not None else x if local_request.inplace and job.seed is not None else None
    if written is not None:
        if not written.is_inference():
            increment_versions((written,))  # what was written is the local tensor, whose version is another
        return written, keep
    if made is local:
        return x, keep
    y = whole(made, call.piece, x.ndim, like=x.stride() if made.stride() == local.stride() else None)
    return (x.copy_(y) if request.inplace else y), keep


def prepared(library: Library, local: Tensor, call: LocalCall, form_of: Any = None) -> Job:
    """The job of the local tensor, its seed that of all ranks; `form_of` as for `prepare`.

    All is checked before a seed is drawn, and where ranks talk with one another.
    """
    local_request, device = call.request, local.device
    if call.counted:  # `_by_whole_rows` draws the mask: only p == 0 matters here, so that 0.5 stands for an array
        local_request = replace(
            local_request, p=None, rule=Rule(0.5 if local_request.rule.p is None else local_request.rule.p),
            **dict.fromkeys(("lengths", "keys", "protect", "positions")),
        )  # fmt: skip
    given, generator = local_request.seed, local_request.generator
    if given is None:
        library.check_seed(None, generator, device)
        local_request = replace(local_request, seed=0, generator=None)
    job = prepare(library, local, local_request, form_of)
    if job.seed is None:
        return job
    if given is None:
        return job._replace(seed=agreed(library.seed(None, generator, device), call.piece.mesh))
    check_agreed(job.seed, call.piece.mesh)
    return job


def _by_whole_rows(local: Tensor, job: Job, call: LocalCall) -> tuple[Tensor, Tensor]:
    """The result for this piece and its mask, if the rule counts messages on other ranks: draw whole rows, then cut."""
    local_request = replace(call.request, seed=job.seed)
    of_rows = choose_for_mask(local.device, local_request)
    rows = prepare_mask(of_rows, call.sizes, local_request, local.device)
    at = call.dims - 1
    part = (at, call.piece.starts[at], call.piece.sizes[at])
    keep = of_rows.draw_mask(rows).narrow(*part).contiguous()
    scales = of_rows.message_scales(rows).narrow(*part).contiguous() if local_request.scale else None
    return job.library.run_given(local, job, replace(local_request, return_mask=False), keep, scales), keep


# ---- messages removed and put back, where ranks hold whole rows and know the size of what remains; the numbers in a
# `Selection` count the messages of a rank


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
    job = prepared(choose(local, local_request)[0], local, call, partial(_form_of, layout, local_request))
    y, found = select.removed(local, job, local_request, layout)
    if found is not None:
        arrays = {name: getattr(found, name) for name in ARRAYS}
        arrays = {name: whole(each, piece, rows, tuple(each.shape[rows:])) for name, each in arrays.items()}
        found = found._replace(shape=call.whole, **arrays)
    return (x if y is local else _resized(y, piece, rows)), found


def _form_of(layout: Layout, request: Request, plan: Any) -> Form:
    """The form of what remains. Raises ValueError if its size isn't the same on all ranks."""
    form = form_of(layout, request, plan)
    if not request.training or plan.rule.p == 0:
        return form
    if form.name == PACKED:
        raise ValueError("layout 'packed' lays rows of all ranks one behind the other: take 'dense' or 'padded'")
    if form.name != DENSE and layout.capacity is None:
        raise ValueError(
            "what remains of a DTensor needs a size that all ranks know, but rows may keep different counts: "
            "give exact=True, or capacity"
        )
    return form


def _resized(local: Tensor, piece: Piece, dim: int) -> DTensor:
    """The DTensor of what was made of a piece by giving one dim, which isn't cut, another size."""
    shape = (*piece.shape[:dim], local.shape[dim], *piece.shape[dim + 1 :])
    return whole(local, piece._replace(shape=shape), len(shape))


def as_here(found: Selection, x: DTensor) -> Selection:
    """The selection, refused where it isn't of DTensors on x's mesh."""
    mesh = getattr(found.index, "device_mesh", None)
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
    rows = found.index.ndim - 1
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
    if cutting(x.device_mesh, given) != cutting(x.device_mesh, found.index.placements):
        raise ValueError(
            f"{name} must be placed by its rows as x was, {tuple(found.index.placements)}, but got "
            f"{piece.placements}: redistribute it"
        )
    return piece


def _local(found: Selection) -> Selection:
    local = {name: getattr(found, name).to_local() for name in ARRAYS}
    return found._replace(shape=tuple(local["inverse_index"].shape), **local)
