"""Seeds of tensors' calls: drawn as torch draws, from the generator of the device; read, or left on the device."""

from __future__ import annotations

import threading
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from msgdrop_numba.call import arguments
from msgdrop_numba.kernels import philox
from msgdrop_numba.tensors import operations
from msgdrop_numba.tensors.arguments import check_generator, move
from msgdrop_numba.torch_private import drawn_once, in_transform, is_exporting

SEED_COUNT = 2**63 - 1  # how many seeds may be drawn


class PerRank(NamedTuple):
    """Stands for torch's default generator; this process's rank is folded into each seed that is drawn.

    Fields:
        group: a layer's `per_rank`: True, a ProcessGroup or a DeviceMesh of one dim.
    """

    group: Any


class _Buffer(threading.local):
    """The memory that seeds are drawn into, one for each thread: one tensor for all would be a race.

    Attributes:
        place: what draws into a tensor, and its memory.
    """

    place: tuple[Any, memoryview]

    def __getattr__(self, name: str) -> Any:
        # Made at a thread's first draw, which is eager; an import may happen where all new tensors are fake ones.
        with torch.inference_mode(False):
            drawn = torch.empty(1, dtype=torch.int64, device="cpu")
        memory: Any = drawn.numpy()
        self.place = drawn.random_, memoryview(memory)
        return super().__getattribute__(name)


_buffer = _Buffer()


def fresh_seed(generator: Any) -> int:
    """A seed of 63 bits from `generator`, or from torch's default generator of the CPU."""
    draw, drawn = _buffer.place
    if generator is None:
        draw(SEED_COUNT)
    else:
        draw(SEED_COUNT, generator=generator)
    return drawn[0]


def check_host_seed(seed: Any, generator: Any, device: torch.device) -> int | None:
    """The seed as a Python integer; None: to be drawn."""
    if isinstance(generator, PerRank):
        return arguments.check_source(seed, None, torch.Generator)
    checked = arguments.check_source(seed, generator, torch.Generator)
    if generator is not None:
        check_generator(generator, device)
    return checked


def check_device_seed(seed: Any, generator: Any, device: torch.device) -> Any:
    """The seed as a Python integer, or the tensor that it is, whose value isn't looked at; None: to be drawn."""
    if not isinstance(seed, Tensor):
        return check_host_seed(seed, generator, device)
    arguments.check_seed_tensor(seed)
    if generator is not None:
        raise ValueError(f"give seed or generator, not both: got a seed tensor and generator={generator!r}")
    return seed


def device_seed(given: Any, generator: Any, device: torch.device) -> Tensor:
    """The seed as a 0-d int64 tensor on the device, drawn as torch draws where none was given."""
    compiled = _is_compiled()
    if given is None:
        rank = rank_of(generator)
        generator = None if rank is not None else generator
        if compiled and generator is None and not in_transform():
            drawn = torch.ops.msgdrop_numba.draw(device)
        else:
            drawn = torch.randint(0, SEED_COUNT, (), dtype=torch.int64, device=device, generator=generator)
        return _folded(drawn, rank)
    if isinstance(given, Tensor):
        return move("seed", given, device)
    bits = arguments.signed(given)
    if compiled:
        return opaque_seed(bits, device)
    return torch.full((), bits, dtype=torch.int64, device=device)


def folded_int(seed: int, data: int | None) -> int:
    """`fold_in(seed, data)` of a drawn seed; the seed itself if data is None."""
    return seed if data is None else int(philox.fold_in(np.uint64(seed), np.uint64(data)))


def _folded(seed: Tensor, data: int | None) -> Tensor:
    """`fold_in(seed, data)` of a seed tensor, without waiting for its device; the seed itself if data is None."""
    if data is None:
        return seed
    if _is_compiled() and not in_transform():
        return torch.ops.msgdrop_numba.fold_in(seed, data)  # type: ignore[no-any-return]
    return operations.fold_in(seed, torch.full_like(seed, data))


def check_ranks(per_rank: Any) -> Any:
    """A layer's `per_rank`, refused if it has no rank."""
    if isinstance(per_rank, bool):
        return per_rank
    if distributed.is_available():
        if isinstance(per_rank, DeviceMesh):
            if per_rank.ndim != 1:
                raise ValueError(
                    f"per_rank must be a mesh of one dim, but got {per_rank!r}: give one of its dims, mesh['name']"
                )
            return per_rank
        if isinstance(per_rank, distributed.ProcessGroup):
            return per_rank
    raise TypeError(
        "per_rank must be True, False, a torch.distributed.ProcessGroup or a DeviceMesh of one dim, "
        f"but got {per_rank!r}"
    )


def rank_of(generator: Any) -> int | None:
    """This process's rank if it is folded into a drawn seed, else None. Raises before a seed is drawn."""
    if not isinstance(generator, PerRank):
        return None
    ranks = generator.group
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            f"per_rank={ranks!r} needs to know this process's rank, but there is no process group: call "
            "torch.distributed.init_process_group first, or give a seed"
        )
    if isinstance(ranks, DeviceMesh):
        (rank,) = ranks.get_coordinate() or (-1,)
    else:
        rank = distributed.get_rank(None if ranks is True else ranks)
    if rank < 0:
        raise ValueError(f"this process isn't in per_rank={ranks!r}, so that it has no rank there: give a seed")
    return rank


def _is_compiled() -> bool:
    """True in compiled code that may hold operators of ours."""
    return torch.compiler.is_compiling() and not is_exporting()


# ---- operators of ours, which compiled code calls: of a seed that is a constant, compiling Philox takes minutes


def opaque_seed(bits: int, device: torch.device) -> Tensor:
    """A seed as a 0-d int64 tensor that the compiler can't see through."""
    return torch.ops.msgdrop_numba.seed(bits, device)  # type: ignore[no-any-return]


@torch.library.custom_op("msgdrop_numba::seed", mutates_args=(), schema="(SymInt bits, Device device) -> Tensor")
def _seed(bits: Any, device: Any) -> Tensor:
    return torch.full((), bits, dtype=torch.int64, device=device)


@_seed.register_fake
def _(bits: Any, device: Any) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


_library = torch.library.Library("msgdrop_numba", "FRAGMENT")
_library.define("draw(Device device) -> Tensor")
_numbers = count()


@torch.library.impl(_library, "draw", "CompositeImplicitAutograd")
def _draw(device: Any) -> Tensor:
    """Runs while forward and backward are traced, which is when their partitioner can be told of it.

    The number tells draws apart, which the compiler would else take for one.
    """
    with drawn_once():
        return torch.ops.msgdrop_numba.draw_now(next(_numbers), device=device)  # type: ignore[no-any-return]


# `device` by its name, and the tag: where backward computes all again, torch then restores that device's generator.
@torch.library.custom_op(
    "msgdrop_numba::draw_now",
    mutates_args=(),
    schema="(int number, *, Device device) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
def _draw_now(number: Any, *, device: Any) -> Tensor:
    return torch.randint(0, SEED_COUNT, (), dtype=torch.int64, device=device)


@_draw_now.register_fake
def _(number: Any, *, device: Any) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


@torch.library.custom_op("msgdrop_numba::fold_in", mutates_args=(), schema="(Tensor seed, SymInt data) -> Tensor")
def _fold_in(seed: Any, data: Any) -> Tensor:
    if seed.is_cpu:
        folded = philox.fold_in(np.uint64(arguments.check_seed(seed)), np.uint64(data))
        return torch.from_numpy(np.asarray(folded).view(np.int64))
    return operations.fold_in(seed, torch.full_like(seed, data))


@_fold_in.register_fake
def _(seed: Any, data: Any) -> Tensor:
    return torch.empty_like(seed)
