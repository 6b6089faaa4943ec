"""A call on a DTensor, checked against the whole and cut to the piece that lies here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from msgdrop_numba.call import arguments
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import ArrayRule, P
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.tensors import operations
from msgdrop_numba.tensors.arguments import (
    check_target,
    fill_message,
    keys_on,
    lengths_on,
    positions_on,
    probabilities_on,
    protect_on,
    split_p_traced,
)
from msgdrop_numba.tensors.pieces import Piece, cutting, local_of, piece_of, placements_of, waited
from msgdrop_numba.tensors.traced import TRACED


class LocalCall(NamedTuple):
    """A call on a DTensor, cut to what this rank draws.

    Fields:
        piece: of x. dims: how many of its dims index messages.
        whole: the message dims of x. sizes: of the mask that is drawn here: the piece's, or its rows' whole.
        counted: whether rows are drawn whole: their masks count messages, and some of them lie elsewhere.
        request: the call's, of plain tensors alone.
    """

    piece: Piece
    dims: int
    whole: tuple[int, ...]
    sizes: tuple[int, ...]
    counted: bool
    request: Request


def cut(x: DTensor, request: Request) -> LocalCall:
    """A call on x; what it says of rows and messages is meant of the whole."""
    piece = piece_of("x", x)
    dims = arguments.message_dims(piece.shape, request.message_dims)
    request = replace(request, p=_replica("p", request.p, piece), seed=_replica("seed", request.seed, piece))
    rule, array = request.rule, None
    if isinstance(rule, ArrayRule):
        rule, array = rule.resolve(_split_p, request.p)
    if isinstance(request.seed, DTensor):
        raise ValueError(f"seed must be replicated, but got {request.seed.placements}: redistribute it")
    whole, rule = TRACED.plan(x, COPY, dims, rule)
    graph = has_graph(x, request)
    if isinstance(request.fill, Tensor):
        fill_message(request.fill, x, dims)
    fill, out = local_part("fill", request.fill, dims, piece), _local_out(x, request, rule.p != 0, piece)
    counted = rule.count_limited and piece.cuts(dims - 1)
    sizes = (*piece.sizes[: dims - 1], whole[-1] if counted else piece.sizes[dims - 1])
    call = LocalCall(piece, dims, whole, sizes, counted, request)
    local_request = replace(
        request, p=None if array is None else _part(call, "p", array, probabilities_on, x.device),
        rule=rule if counted else rule.for_rows(sizes[-1], piece.starts[dims - 1]),
        fill=fill, out=out, message_dims=dims, inplace=request.inplace and not graph,
        lengths=_lengths(call, x.device), keys=_keys(call, x.device), positions=_positions(call, x.device),
        protect=_part(call, "protect", request.protect, protect_on, x.device),
    )  # fmt: skip
    return call._replace(request=local_request)


def _split_p(p: Any) -> tuple[P, Any]:
    return (None, p) if isinstance(p, DTensor) else split_p_traced(p)


def has_graph(x: DTensor, request: Request) -> bool:
    """Whether autograd follows the call."""
    return torch.is_grad_enabled() and (x.requires_grad or getattr(request.fill, "requires_grad", False))


def _replica(name: str, value: Any, piece: Piece) -> Any:
    """What all ranks hold whole as the tensor that it is; anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    placements = placements_of(name, value)
    _check_mesh(name, value, piece)
    return waited(value.to_local()) if all(p.is_replicate() for p in cutting(piece.mesh, placements)) else value


def _check_mesh(name: str, value: DTensor, piece: Piece) -> None:
    if value.device_mesh != piece.mesh:
        raise ValueError(f"{name} must be on x's mesh, {piece.mesh}, but it is on {value.device_mesh}")


def _part(call: LocalCall, name: str, value: Any, read: Callable[..., Any], device: Any, leading: bool = False) -> Any:
    """An argument over messages or rows, read, checked, and cut to what lies here.

    Args:
        read: of the argument, the message dims and a device.
        leading: whether its dims are the first ones of x, else the last message dims.
    """
    value = _replica(name, value, call.piece)
    if value is None:
        return None
    if isinstance(value, DTensor):
        return read(_placed_as_x(call, name, value, 0 if leading else call.dims - value.ndim), call.sizes, device)
    values = read(value, call.whole, device)
    return _narrowed(call, values, 0 if leading else call.dims - values.ndim)


def _narrowed(call: LocalCall, values: Tensor, first: int, dims: int | None = None) -> Tensor:
    """A tensor over dims of the whole, from `first` on, cut where they are; all of them or the last `dims`."""
    for dim in range(0 if dims is None else values.ndim - dims, values.ndim):
        at = first + dim
        if call.piece.cuts(at) and not (call.counted and at == call.dims - 1):
            values = values.narrow(dim, call.piece.starts[at], call.piece.sizes[at])
    return values


def _placed_as_x(call: LocalCall, name: str, value: DTensor, first: int) -> Tensor:
    """What lies here of a DTensor whose dims are x's from `first` on, sharded as they are."""
    piece, dims = call.piece, value.ndim
    shared, given = piece.shape[max(0, first) : first + dims], tuple(value.shape)
    fits = [size == full or (size == 1 and name == "p") for size, full in zip(given, shared, strict=False)]
    if len(given) != len(shared) or not all(fits):
        raise ValueError(f"{name} must have shape {shared}, as x's dims that it goes along, but got {given}")
    wanted = [Replicate() if p.is_shard() and given[p.dim] != shared[p.dim] else p for p in piece.along(first, dims)]
    if cutting(piece.mesh, placements_of(name, value)) != cutting(piece.mesh, wanted):
        raise _misplaced(name, value, wanted)
    if call.counted:  # rows are needed whole
        last = call.dims - 1 - first
        wanted = [Replicate() if p.is_shard(last) else p for p in wanted]
        value = value.redistribute(placements=wanted)
    return waited(value.to_local())


def _misplaced(name: str, value: DTensor, wanted: list[Any]) -> ValueError:
    return ValueError(
        f"{name} must be placed as x is along the dims that they share, {tuple(wanted)}, or be replicated, "
        f"but got {tuple(value.placements)}: redistribute it"
    )


def _lengths(call: LocalCall, device: Any) -> Any:
    """How much of each row lies here."""

    def read(value: Any, shape: tuple[int, ...], device: Any) -> Tensor | None:
        return lengths_on(value, (*shape[:-1], call.whole[-1]), device)

    lengths = _part(call, "lengths", call.request.lengths, read, device, leading=True)
    if lengths is None or call.counted or not call.piece.cuts(call.dims - 1):
        return lengths
    return (lengths - call.piece.starts[call.dims - 1]).clamp(0, call.sizes[-1])


def _keys(call: LocalCall, device: Any) -> Any:
    """The rows' keys; those of rows that are cut have their numbers in the whole."""
    rows = range(call.dims - 1)
    if call.request.keys is None:
        return _row_numbers(call, device) if any(map(call.piece.cuts, rows)) else None
    keys = _part(
        call, "keys", call.request.keys, lambda v, shape, device: keys_on(v, shape[:-1], device), device, leading=True
    )
    missing = rows[keys.ndim :]
    if not any(map(call.piece.cuts, missing)):
        return keys
    folded = operations.row_keys(keys, (*keys.shape, *call.whole[keys.ndim : -1]), device)
    return _narrowed(call, folded, 0, len(missing))


def _row_numbers(call: LocalCall, device: Any) -> Tensor:
    """The numbers of the rows here, in C order over the whole."""
    numbers = torch.zeros((), dtype=torch.int64, device=device)
    for dim in range(call.dims - 1):
        start = call.piece.starts[dim]
        index = torch.arange(start, start + call.sizes[dim], device=device)
        numbers = numbers.unsqueeze(-1) * call.whole[dim] + index
    return numbers


def _positions(call: LocalCall, device: Any) -> Any:
    """The first position here, or all of them; None: 0."""
    value = _replica("positions", call.request.positions, call.piece)
    if isinstance(value, DTensor):
        return _part(call, "positions", value, lambda v, shape, device: positions_on(v, shape, device)[1], device)
    offset, values = positions_on(value, call.whole, device)
    if values is not None:
        return _narrowed(call, values, call.dims - values.ndim)
    if not call.sizes[-1]:  # behind the last position there may be none
        return None
    return offset + (0 if call.counted else call.piece.starts[call.dims - 1]) or None


def local_part(name: str, value: Any, first: int, piece: Piece) -> Any:
    """What lies here of a tensor over the whole's dims from `first` on; its gradient is the sum over all pieces.

    A plain tensor is the same on all ranks, and so is its gradient. What is no tensor is given back.
    """
    if not isinstance(value, Tensor):
        return value
    wanted = piece.along(first, len(piece.shape) - first)
    if not isinstance(value, DTensor):
        value = DTensor.from_local(value, piece.mesh, [Replicate()] * piece.mesh.ndim, run_check=False)
    _check_mesh(name, value, piece)
    placements = list(placements_of(name, value))
    if cutting(piece.mesh, placements) != cutting(piece.mesh, wanted):
        if any(p.is_shard() for p in cutting(piece.mesh, placements)):
            raise _misplaced(name, value, wanted)
        value = value.redistribute(placements=wanted)  # by cutting alone
    of_gradient = [
        Partial() if p.is_shard() and p.dim < first else w for p, w in zip(piece.placements, wanted, strict=True)
    ]
    return waited(value.to_local(grad_placements=of_gradient))


def _local_out(x: DTensor, request: Request, active: bool, piece: Piece) -> Tensor | None:
    """The memory of `out` that lies here; x and out are checked as what is to be written."""
    out = request.out
    check_target(x, request.inplace, out, request.training and active, request.fill if has_graph(x, request) else None)
    if out is None:
        return None
    if not isinstance(out, DTensor):
        raise TypeError(f"out must be a DTensor, as x is, but got {type(out).__name__}")
    elsewhere = out.device_mesh != piece.mesh
    if elsewhere or cutting(piece.mesh, placements_of("out", out)) != cutting(piece.mesh, piece.placements):
        raise ValueError(
            f"out must be placed as x is, {piece.placements} on {piece.mesh}, but got {tuple(out.placements)} on "
            f"{out.device_mesh}: redistribute it"
        )
    return local_of("out", out, piece)
