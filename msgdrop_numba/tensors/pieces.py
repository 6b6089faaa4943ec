"""A DTensor's piece on this rank, calls cut to it, and the seed that all ranks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import DebugLevel, get_debug_level, is_initialized  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

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
from msgdrop_numba.tensors.backends import TRACED
from msgdrop_numba.tensors.seeds import device_seed
from msgdrop_numba.torch_private import not_eager_reason

_U64 = 2**64 - 1


class Piece(NamedTuple):
    """The box of a whole tensor that lies on this rank.

    Fields:
        mesh, placements: of the whole, Replicate and Shard alone, the dims of the latter from 0 on.
        shape: of the whole. starts, sizes: of the box, for each dim.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def cuts(self, dim: int) -> bool:
        """True if ranks hold different parts of a dim."""
        return any(p.is_shard(dim) and self.mesh.size(i) > 1 for i, p in enumerate(self.placements))

    def along(self, first: int, dims: int) -> list[Any]:
        """Placements of a tensor with `dims` of the whole's dims, from `first` on: sharded as those are."""
        inside = range(first, first + dims)
        return [Shard(p.dim - first) if p.is_shard() and p.dim in inside else Replicate() for p in self.placements]


def is_outside(x: DTensor) -> bool:
    """True if this rank isn't in x's mesh, and so holds nothing of x."""
    return x.device_mesh.get_coordinate() is None


def piece_of(name: str, x: DTensor) -> Piece:
    """The box of x that lies here; torch cuts as `torch.chunk` does, dim by dim of the mesh."""
    mesh, placements = x.device_mesh, placements_of(name, x)
    if x.device.type != mesh.device_type:
        raise ValueError(f"{name} must lie where its mesh does, on {mesh.device_type}, but it is on {x.device}")
    at = mesh.get_coordinate() or [0] * mesh.ndim  # a rank outside asks for the whole's shape alone
    starts, sizes = [0] * x.ndim, list(x.shape)
    for i, placement in enumerate(placements):
        if placement.is_shard():
            dim, parts = placement.dim, mesh.size(i)
            size = sizes[dim]
            each = (size + parts - 1) // parts
            begin = min(at[i] * each, size)
            starts[dim] += begin
            sizes[dim] = min(each, size - begin)
    return Piece(mesh, placements, tuple(x.shape), tuple(starts), tuple(sizes))


def placements_of(name: str, x: DTensor) -> tuple[Any, ...]:
    """Its placements, none but Replicate and Shard, whose dims count from 0."""
    placements: tuple[Any, ...] = tuple(x.placements)
    for placement in placements:
        if type(placement) is not Replicate and type(placement) is not Shard:
            raise ValueError(
                f"{name} must be placed by Replicate() and Shard(dim), but got {placements}: "
                "redistribute it first, x.redistribute(placements=[...])"
            )
    return tuple(Shard(p.dim % x.ndim) if p.is_shard() else p for p in placements)


def cutting(mesh: Any, placements: Any) -> list[Any]:
    """The placements with Replicate in place of a Shard along a mesh dim of one rank, which cuts nothing."""
    return [p if p.is_shard() and mesh.size(i) > 1 else Replicate() for i, p in enumerate(placements)]


def local_of(name: str, x: DTensor, piece: Piece) -> Tensor:
    """The memory that lies here, waited for."""
    local = waited(x.to_local())
    if tuple(local.shape) != piece.sizes:
        raise ValueError(
            f"{name} must be cut as torch.chunk cuts, here into {piece.sizes} of {piece.shape}, "
            f"but its local tensor has shape {tuple(local.shape)}: use distribute_tensor"
        )
    return local


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Any) -> Tensor:
        return local.wait()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def waited(local: Tensor) -> Tensor:
    """A local tensor that a collective may still be writing, once it is there."""
    if torch.compiler.is_compiling() or not hasattr(local, "wait"):
        return local
    return _Wait.apply(local)  # type: ignore[no-any-return,no-untyped-call]


def whole(local: Tensor, piece: Piece, dims: int, behind: tuple[Any, ...] = (), like: Any = None) -> DTensor:
    """The DTensor of what was made here of the first `dims` of a piece, and of other dims behind them.

    Args:
        behind: the sizes of those, which all ranks hold whole.
        like: strides of the whole; None: those of the order in which `local` lies.
    """
    shape = torch.Size((*piece.shape[:dims], *behind))
    strides = _strides(local, shape) if like is None else like
    placements = piece.along(0, dims)
    return DTensor.from_local(local, piece.mesh, placements, run_check=False, shape=shape, stride=strides)


def _strides(local: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    order = range(len(shape)) if local.is_contiguous() else sorted(range(len(shape)), key=local.stride, reverse=True)
    for dim in reversed(order):
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)


def agreed(seed: Any, mesh: Any) -> Any:
    """The seed of the mesh's first rank, on all of its ranks, each of which gives its own.

    Costs one sum of 8 bytes for each dim of the mesh, none where it has one rank; on a device nothing waits for it. A
    sum knows no order: torch's groups number their ranks otherwise than a mesh whose ranks aren't sorted.

    Args:
        seed: integer in [0, 2**64), or 0-d int64 tensor.

    Returns:
        The same kind.
    """
    if mesh.size() == 1:
        return seed
    ours = _on_mesh(seed, mesh)
    # All but the first give 0, by a factor unknown to the compiler: known zeros it would send once for several calls.
    ours = ours * device_seed(int(not any(mesh.get_coordinate())), None, ours.device)
    first = _collected(ours, mesh, Partial())
    return first if isinstance(seed, Tensor) else int(first.item()) & _U64


def check_agreed(seed: Any, mesh: Any) -> None:
    """Refuse a seed that differs between ranks. Checked only if torch.distributed's debug level is on."""
    if mesh.size() == 1 or not_eager_reason() or get_debug_level() == DebugLevel.OFF:
        return
    seeds = [bits & _U64 for bits in _collected(_on_mesh(seed, mesh).reshape(1), mesh, Shard(0)).tolist()]
    if len(set(seeds)) > 1:
        raise ValueError(f"seed must be the same on all ranks of x's mesh, but they were given {seeds}: give all one")


def _on_mesh(seed: Any, mesh: Any) -> Tensor:
    """The seed as a tensor on the device of the mesh, whose ranks are about to talk."""
    if not is_initialized():
        raise ValueError("x's mesh has no process group, as none is initialised: call init_process_group first")
    if isinstance(seed, Tensor):
        return seed
    return torch.tensor(arguments.signed(seed), dtype=torch.int64, device=mesh.device_type)


def _collected(ours: Tensor, mesh: Any, placement: Any) -> Tensor:
    """The values of all ranks, whole on each of them."""
    placements: list[Any] = [placement] * mesh.ndim
    spread = DTensor.from_local(ours, mesh, placements, run_check=False)
    for dim in reversed(range(mesh.ndim)):  # one by one: torch warns of gathers along several dims
        placements[dim] = Replicate()
        spread = spread.redistribute(placements=placements)
    return spread.to_local()


class LocalCall(NamedTuple):
    """A call on a DTensor, cut to what this rank draws.

    Fields:
        piece: of x. dims: how many of its dims index messages.
        whole: the message dims of x. sizes: of the mask that this rank draws: the piece's, or its rows' whole.
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
    graph = torch.is_grad_enabled() and (x.requires_grad or getattr(request.fill, "requires_grad", False))
    if isinstance(request.fill, Tensor):
        fill_message(request.fill, x, dims)
    fill, out = local_part("fill", request.fill, dims, piece), _local_out(x, request, rule.p != 0, graph, piece)
    counted = rule.needs_whole_rows and piece.cuts(dims - 1)
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


def _replica(name: str, value: Any, piece: Piece) -> Any:
    """The local tensor of a replicated DTensor, on x's mesh. Returns any other value unchanged."""
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
    """The local part of a DTensor whose dims are x's from `first` on, sharded as those are."""
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
    """The valid messages of each row on this rank."""

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
    """The numbers of this rank's rows, in C order over the whole."""
    numbers = torch.zeros((), dtype=torch.int64, device=device)
    for dim in range(call.dims - 1):
        start = call.piece.starts[dim]
        index = torch.arange(start, start + call.sizes[dim], device=device)
        numbers = numbers.unsqueeze(-1) * call.whole[dim] + index
    return numbers


def _positions(call: LocalCall, device: Any) -> Any:
    """The position of the first message on this rank, or all positions; None: 0."""
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
    """This rank's part of a tensor over the whole's dims from `first` on. Its gradient is summed over all pieces.

    A plain tensor must be the same on all ranks, and so is its gradient. Returns a value that is no tensor unchanged.
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


def _local_out(x: DTensor, request: Request, active: bool, graph: bool, piece: Piece) -> Tensor | None:
    """The memory of `out` that lies here; x and out are checked as what is to be written."""
    out = request.out
    check_target(x, request.inplace, out, request.training and active, request.fill if graph else None)
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
