"""What `tensors/test_sharded.py` checks on the ranks of a world: pieces of DTensors against the call of one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from helpers.cases import OPTIONS, SHAPE
from helpers.world import Report
from msgdrop_numba import message_dropout

SEED = 2**63 + 5
FEATURES = torch.tensor([1.0, -2.0, 3.0, 0.5])
CASES: list[dict[str, Any]] = [
    *OPTIONS,
    {"fill": FEATURES, "p": 0.7},
    {"fill": FEATURES, "exact": True, "scale": True},
    {"p": np.array([[0.1], [0.9], [0.5]]), "min_keep": 2, "scale": True},
    {"keys": ["a", "b", "c"], "lengths": torch.tensor([7, 0, 5])},
    {"positions": torch.arange(7).flip(0), "protect": torch.arange(7) < 2, "min_keep": 3},
    {"lengths": torch.tensor([7, 3, 5]), "exact": True, "protect": torch.arange(21).reshape(3, 7) % 3 == 1},
    {"dtype": torch.bfloat16, "scale": True, "p": 0.3},
    {"dtype": torch.bfloat16, "scale": True, "p": 0.3, "exact": True, "fill": FEATURES.bfloat16()},
    {"dtype": torch.complex64, "scale": True, "p": 0.3, "min_keep": 6},
    {"dtype": torch.int16, "exact": True},
    {"shape": (2, 3, 5, 4), "message_dims": 3, "scale": True, "p": (0.1, 0.9)},
    {"shape": (2, 3, 5, 4), "message_dims": 3, "keys": ["a", "b"], "exact": True},
    {"shape": (2, 3, 5, 4), "message_dims": 3, "keys": torch.tensor([2**40, -1]), "span": 2},
    {"shape": (3, 2, 5, 4), "message_dims": 3, "p": np.linspace(0, 1, 10).reshape(2, 5), "keys": np.arange(6).reshape(3, 2)},
    {"shape": (2, 3, 5, 4), "message_dims": 3, "lengths": [[5, 0, 2], [3, 5, 1]], "min_keep": 1, "p": 0.8},
    {"shape": (6, 4)},
    {"shape": (6, 4), "min_keep": 4, "p": 0.9},
    {"shape": (0, 5, 4)},
    {"shape": (3, 0, 4), "exact": True},
    {"training": False, "exact": True},
    {"p": 0.0},
]  # fmt: skip


def meshes() -> Iterator[DeviceMesh]:
    """Of one to four ranks, flat and square; torch itself gathers in a wrong order where ranks aren't sorted."""
    for ranks in (
        torch.arange(1),
        torch.arange(2),
        torch.tensor([0, 2, 3]),
        torch.arange(4),
        torch.arange(4).reshape(2, 2),
    ):
        yield DeviceMesh("cpu", ranks)


def placements(mesh: DeviceMesh, ndim: int) -> Iterator[tuple[Any, ...]]:
    """All that there are: two dims of a mesh on one of a tensor, too."""
    return itertools.product([Replicate(), *map(Shard, range(ndim))], repeat=mesh.ndim)


def data(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(np.prod(shape))
    x = torch.arange(1, count + 1).reshape(shape)
    return torch.complex(x.float(), -x.float()) if dtype.is_complex else x.to(dtype)


def here(whole: torch.Tensor, mesh: DeviceMesh, placed: Any) -> DTensor:
    """The DTensor of what all ranks hold; nothing is sent."""
    return distribute_tensor(whole, mesh, placed, src_data_rank=None)


def same(got: DTensor, whole: torch.Tensor, placed: Any) -> bool:
    """Whether it is placed so, and what lies here are the bits of the whole that belong here."""
    there = here(whole, got.device_mesh, placed)
    return got.shape == whole.shape and tuple(got.placements) == tuple(placed) and _bits(got) == _bits(there)


def _bits(x: DTensor) -> bytes:
    local = x.to_local().detach()
    return (local.view(torch.int16) if local.dtype == torch.bfloat16 else local).numpy().tobytes()


def rows_alone(placed: Any, dims: int) -> tuple[Any, ...]:
    """The same placements for the first dims alone."""
    return tuple(p if p.is_shard() and p.dim < dims else Replicate() for p in placed)


def spread(name: str, value: Any, x: DTensor, dims: int, as_x: bool) -> Any:
    """An argument as a DTensor, replicated or sharded along the dims that it shares with x; what can't be as it is."""
    if isinstance(value, (tuple, str, int, float)) or (name == "keys" and isinstance(value[0], str)):
        return value
    if not isinstance(value, torch.Tensor):
        value = np.array([v % 2**64 for v in value], np.uint64) if isinstance(value, list) and name == "keys" else value
        value = torch.as_tensor(np.asarray(value))
    first = x.ndim - value.ndim if name == "fill" else 0 if name in ("keys", "lengths") else dims - value.ndim
    placed = [Replicate()] * x.device_mesh.ndim
    for i, p in enumerate(x.placements):
        if as_x and p.is_shard() and 0 <= p.dim - first < value.ndim and value.shape[p.dim - first] == x.shape[p.dim]:
            placed[i] = Shard(p.dim - first)
    made = here(value.detach(), x.device_mesh, placed)
    return made.requires_grad_() if value.requires_grad else made


def compare(report: Report, mesh: DeviceMesh, placed: Any, case: dict[str, Any], mode: int) -> None:
    """A case on a mesh; mode 0: its arguments are plain, 1: DTensors that are replicated, 2: placed as x is."""
    options = dict(case)
    x = data(options.pop("shape", SHAPE), options.pop("dtype", torch.float32))
    floating, fill = x.is_floating_point() or x.is_complex(), options.get("fill")
    if isinstance(fill, torch.Tensor):
        options["fill"] = fill.clone().requires_grad_()
    whole, there = x.clone().requires_grad_(floating), here(x, mesh, placed).requires_grad_(floating)
    want, mask = message_dropout(whole, seed=SEED, return_mask=True, **options)
    told = options
    if mode:
        told = {name: spread(name, value, there, mask.ndim, mode == 2) for name, value in options.items()}
        told["seed"] = here(torch.tensor(SEED - 2**64), mesh, [Replicate()] * mesh.ndim)
    elif isinstance(fill, torch.Tensor):
        told = {**options, "fill": fill.clone().requires_grad_()}
    got, keep = message_dropout(there, return_mask=True, **{"seed": SEED, **told})
    label = f"{tuple(mesh.mesh.shape)} {placed} {case} mode {mode}"
    report.expect(f"y: {label}", same(got, want.detach(), placed))
    report.expect(f"mask: {label}", same(keep, mask, rows_alone(placed, mask.ndim)))
    if not floating or mesh.get_coordinate() is None:  # torch itself has no gradients on ranks outside
        return
    g = torch.randint(-9, 9, x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)  # sums are exact
    want.backward(g)
    got.backward(here(g, mesh, placed))
    report.expect(f"gradient: {label}", same(there.grad, whole.grad, placed))
    if isinstance(fill, torch.Tensor):
        grad = told["fill"].grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        report.expect(f"gradient of the fill: {label}", grad.equal(options["fill"].grad))


def every_case(report: Report) -> None:
    """Each mesh, each placement, each case, each kind of its arguments."""
    for mesh in meshes():
        for case in CASES:
            for placed in placements(mesh, len(case.get("shape", SHAPE))):
                for mode in range(3):
                    report.attempt(compare, mesh, placed, case, mode)


def some_cases(report: Report) -> None:
    """Each case on each mesh, the placements and kinds of arguments by turns."""
    turn = itertools.count(1)
    for mesh in meshes():
        for case in CASES:
            placed = list(placements(mesh, len(case.get("shape", SHAPE))))
            report.attempt(compare, mesh, placed[next(turn) * 5 % len(placed)], case, next(turn) % 3)
