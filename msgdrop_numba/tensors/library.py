"""Torch's primitives, see call.request.Library: those of all tensors, and of ordinary ones that the kernels reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call import arguments
from msgdrop_numba.call.plan import PLAIN, Draw, Plan, array_plan, mask_plan, row_arguments
from msgdrop_numba.call.request import Job, Request
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.tensors import cuda
from msgdrop_numba.tensors.arguments import check_distinct, check_target, fill_message, scaled_kind, split_p_of_device
from msgdrop_numba.tensors.autograd import run_job
from msgdrop_numba.tensors.seeds import check_device_seed, check_host_seed, device_seed, folded, fresh_seed, rank_of
from msgdrop_numba.tensors.write import draw_mask, where, write
from msgdrop_numba.torch_private import is_plain_too, is_view


class Tensors:
    """What all tensors share."""

    def fill(self, fill: Any, x: Tensor, message_dims: int) -> Tensor | None:
        return fill_message(fill, x, message_dims)

    def kind(self, x: Tensor, scale: Any) -> int:
        return scaled_kind(x.dtype) if scale else COPY

    def target(self, x: Tensor, request: Request, active: bool, fill: Tensor | None) -> Tensor | None:
        target = check_target(x, request.inplace, request.out, active, fill)
        if target is not None and not torch.compiler.is_compiling():  # its sizes may be symbols
            self._check_memory("x, to be changed in place," if request.inplace else "out", x, target)
        return target

    def _check_memory(self, name: str, x: Tensor, target: Tensor) -> None:
        """Refuse a target without memory, or that holds elements twice or overlaps x; as far as addresses tell."""
        if is_plain_too(x) and is_plain_too(target):
            check_apart(name, x, target)
        else:
            check_distinct(name, target)

    def mask(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=torch.bool, device=device)

    def kept(self, x: Tensor, plan: Any) -> Tensor:
        return torch.ones(plan.shape, dtype=torch.bool, device=x.device)

    def copy(self, x: Tensor, target: Tensor) -> Tensor:
        return target.copy_(x)


class _Ordinary(Tensors):
    """Tensors whose memory the kernels read by address."""

    nothing = PLAIN
    plan = staticmethod(array_plan)
    mask_plan = staticmethod(mask_plan)

    def _check_memory(self, name: str, x: Tensor, target: Tensor) -> None:
        check_apart(name, x, target)

    def run(self, x: Tensor, job: Job, request: Request) -> Any:
        _, draw, seed, target, mask, _ = job
        fill = draw.fill
        graph = torch.is_grad_enabled() and (x.requires_grad or (fill is not None and fill.requires_grad))
        if seed is request.seed and type(seed) is not int and (graph or target is not None):
            job = job._replace(seed=seed.clone())  # the caller may change it before backward, or have it written here
        if not graph:
            result = write(job, x)
        elif request.inplace and is_view(x):
            result = x.copy_(where(job, x, draw_mask(job)))
        else:
            result = run_job(x, fill, job)
        return (result, mask) if request.return_mask else result


class _OnHost(_Ordinary):
    split_p = staticmethod(arguments.split_p)
    check_seed = staticmethod(check_host_seed)

    def draw(self, plan: Plan, p: Any, fill: Any, request: Request, device: torch.device) -> Draw:
        fill = _own_fill(fill, request)
        return row_arguments(plan, p, fill, request)

    def seed(self, given: int | None, generator: Any, device: torch.device) -> int:
        if given is not None:
            return given
        rank = rank_of(generator)
        return folded(fresh_seed(None if rank is not None else generator), rank)  # type: ignore[no-any-return]


class _OnDevice(_Ordinary):
    split_p = staticmethod(split_p_of_device)
    check_seed = staticmethod(check_device_seed)
    seed = staticmethod(device_seed)

    def draw(self, plan: Plan, p: Any, fill: Any, request: Request, device: torch.device) -> Draw:
        fill = _own_fill(fill, request)
        return cuda.row_arguments(plan, p, fill, request, device)


ON_HOST, ON_DEVICE = _OnHost(), _OnDevice()


def _own_fill(fill: Tensor | None, request: Request) -> Tensor | None:
    """The fill, in memory of its own where something else is written that may be the caller's fill too."""
    return fill.clone() if fill is not None and (request.inplace or request.out is not None) else fill


def check_apart(name: str, x: Tensor, target: Tensor) -> None:
    """Refuse a target that was freed, holds elements twice, or overlaps x in part."""
    if target.data_ptr() == 0 and target.numel():
        raise ValueError(f"{name} has no memory, though its shape is {tuple(target.shape)}: its storage was freed")
    if not _are_apart(x, target):
        arguments.check_memory(name, _memory(x), _memory(target))


def _are_apart(x: Tensor, target: Tensor) -> bool:
    """Whether it is plain that writing `target` can't disturb x, or that it is x: no need to look closer."""
    if not (x.is_contiguous() and (target is x or target.is_contiguous())):
        return False
    return target is x or abs(target.data_ptr() - x.data_ptr()) >= x.numel() * x.element_size()


def _memory(x: Tensor) -> tuple[Any, ...]:
    size = x.element_size()
    return x.data_ptr(), tuple(x.shape), tuple(step * size for step in x.stride()), size
