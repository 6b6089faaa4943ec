"""message_dropout on DTensors: all that a call says is meant of the whole, and is cut to the piece that lies here.

Rows keep the keys that they have in the whole, messages their positions: so a piece has the whole's mask, and needs no
other rank. Where a row's mask counts its messages (`exact`, `min_keep`) and they lie on several ranks, each of these
draws the row's mask whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from msgdrop_numba.call.arguments import message_dims
from msgdrop_numba.call.plan import Draw, Places
from msgdrop_numba.call.request import Job, Library, Request, carry_out, prepare, prepare_mask, turned
from msgdrop_numba.call.rule import Rule
from msgdrop_numba.call.ways import SHARDED, Answer
from msgdrop_numba.tensors import operations, traced, ways
from msgdrop_numba.tensors.cut import LocalCall, cut
from msgdrop_numba.tensors.pieces import agreed, check_agreed, is_outside, local_of, piece_of, whole
from msgdrop_numba.tensors.select import scales_of
from msgdrop_numba.tensors.traced import TRACED
from msgdrop_numba.tensors.write import draw_mask
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


def explain(x: DTensor, request: Request) -> Answer:
    """Which way a call takes, and why; nothing is dropped."""
    call = cut(x, request)
    if call.counted:
        return Answer(SHARDED, "its rows' messages, which the rule counts, lie on several ranks")
    answer = ways.explain(local_of("x", x, call.piece), call.request)
    return answer._replace(way=SHARDED)


def _perform(x: DTensor, call: LocalCall, request: Request) -> tuple[Any, Any]:
    """The result, and the mask that lies here."""
    local, local_request = local_of("x", x, call.piece), call.request
    library = ways.library(local, local_request)
    job = prepared(library, local, call)
    if call.counted and job.seed is not None:
        result = _by_whole_rows(library, local, job, call)
    else:
        result = carry_out(library, local, job, local_request)
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


def prepared(library: Library, local: Tensor, call: LocalCall, check: Any = None) -> Job:
    """The job of the local tensor, its seed that of all ranks; `check` as for `prepare`.

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
    job = prepare(library, local, local_request, check)
    if job.seed is None:
        return job
    if given is None:
        return job._replace(seed=agreed(library.seed(None, generator, device), call.piece.mesh))
    check_agreed(job.seed, call.piece.mesh)
    return job


def _by_whole_rows(library: Library, local: Tensor, job: Job, call: LocalCall) -> tuple[Tensor, Tensor]:
    """What is kept of the piece, and its mask, by masks of whole rows."""
    local_request = replace(call.request, seed=job.seed)
    of_rows = ways.mask_library(local.device, local_request)
    rows = prepare_mask(of_rows, call.sizes, local_request, local.device)
    at = call.dims - 1
    part = (at, call.piece.starts[at], call.piece.sizes[at])
    keep = (traced.draw_mask(rows) if of_rows is TRACED else draw_mask(rows)).narrow(*part).contiguous()
    scales = scales_of(of_rows, rows).narrow(*part).contiguous() if local_request.scale else None
    if library is not TRACED:
        job = job._replace(draw=_as_drawn(job.draw.fill, scales), mask=None, given=keep)
        return library.run(local, job, replace(local_request, return_mask=False)), keep
    y = local if scales is None else operations.scaled(local, scales)
    y = operations.select(y, keep, job.draw.fill)
    return (y if job.target is None else job.target.copy_(y)), keep


def _as_drawn(fill: Tensor | None, scales: Tensor | None) -> Draw:
    """What decides beside a mask that is given; `scales` of 0: the message takes no part."""
    if scales is None:
        return Draw(fill, given=True)
    protect: Any = scales == 0
    each: Any = scales
    if scales.is_cpu:
        each, protect = scales.numpy(), protect.numpy()
    return Draw(fill, scales=each, given=True, places=Places(protect))
