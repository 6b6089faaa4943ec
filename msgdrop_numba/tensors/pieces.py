"""What of a DTensor lies on this rank, by its mesh and its placements, and the seed that all ranks share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import DebugLevel, get_debug_level, is_initialized  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from msgdrop_numba.tensors.seeds import device_seed
from msgdrop_numba.torch_private import is_eager

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
        """Whether ranks hold different parts of a dim."""
        return any(p.is_shard(dim) and self.mesh.size(i) > 1 for i, p in enumerate(self.placements))

    def along(self, first: int, dims: int) -> list[Any]:
        """How a tensor is placed whose dims are `dims` of the whole, from `first` on: like it, other shards whole."""
        inside = range(first, first + dims)
        return [Shard(p.dim - first) if p.is_shard() and p.dim in inside else Replicate() for p in self.placements]


def is_outside(x: DTensor) -> bool:
    """Whether this rank isn't one of x's mesh, and so holds nothing of it."""
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
    """Where torch.distributed's debug level is on, refuse a seed that isn't the same on all ranks."""
    if mesh.size() == 1 or not is_eager() or get_debug_level() == DebugLevel.OFF:
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
    return torch.tensor(seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=mesh.device_type)


def _collected(ours: Tensor, mesh: Any, placement: Any) -> Tensor:
    """What all ranks hold, whole on each of them."""
    placements: list[Any] = [placement] * mesh.ndim
    spread = DTensor.from_local(ours, mesh, placements, run_check=False)
    for dim in reversed(range(mesh.ndim)):  # one by one: torch warns of gathers along several dims
        placements[dim] = Replicate()
        spread = spread.redistribute(placements=placements)
    return spread.to_local()
