"""The backends of tensors, see call.request.Library: kernels on the host, kernels on a device, torch's operations.

`choose` names the backend of a call, and the reason if kernels can't take it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from msgdrop_numba.call import arguments
from msgdrop_numba.call.plan import (
    PLAIN,
    MaskArgs,
    Places,
    Plan,
    array_plan,
    check_prefix,
    follow,
    kept_scales,
    row_arguments,
)
from msgdrop_numba.call.plan import mask_plan as plan_of_mask
from msgdrop_numba.call.request import ARRAYS, Job, Library, Request, arrays_of
from msgdrop_numba.call.rule import DEFAULTS, ArrayRule, Rule
from msgdrop_numba.call.threads import launch
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.tensors import cuda, memory, operations, seeds
from msgdrop_numba.tensors.arguments import (
    byte_strides,
    can_look_at,
    check_apart,
    check_distinct,
    check_target,
    fill_message,
    own_fill,
    probabilities_on,
    rows_on,
    scaled_kind,
    split_p_of_device,
    split_p_traced,
)
from msgdrop_numba.tensors.autograd import kernel_mask, run_job
from msgdrop_numba.torch_private import (
    has_memory,
    in_transform,
    increment_versions,
    is_exporting,
    is_view,
    not_eager_reason,
    unreadable_reason,
)


class Tensors:
    """The primitives that all tensors share."""

    scales: Any  # (job): the factors, a number or float64, and the mask of messages that have them; None: all
    fill = staticmethod(fill_message)

    def kind(self, x: Tensor, scale: Any) -> int:
        return scaled_kind(x.dtype) if scale else COPY

    def target(self, x: Tensor, request: Request, active: bool, fill: Tensor | None) -> Tensor | None:
        target = check_target(x, request.inplace, request.out, active, fill)
        if target is not None and not torch.compiler.is_compiling():  # its sizes may be symbols
            name = "x, to be changed in place," if request.inplace else "out"
            if has_memory(x) and has_memory(target):
                check_apart(name, x, target)
            else:
                check_distinct(name, target)
        return target

    def mask(self, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        return torch.empty(shape, dtype=torch.bool, device=device)

    def kept(self, x: Tensor, plan: Any) -> Tensor:
        return torch.ones(plan.shape, dtype=torch.bool, device=x.device)

    def copy(self, x: Tensor, target: Tensor) -> Tensor:
        return target.copy_(x)

    def message_scales(self, job: Job) -> Tensor:
        """The factor of each message, float64 over the message dims; 0: it passes as it is."""
        scale, eligible = self.scales(job)
        if not isinstance(scale, Tensor):
            scale = torch.full((), scale, dtype=torch.float64, device=job.seed.device)
        return (scale if eligible is None else torch.where(eligible, scale, 0.0)).expand(job.plan.shape)


class Kernels(Tensors):
    """Tensors whose memory the kernels read by address. A subclass brings the kernels of one kind of device."""

    nothing = PLAIN
    lengths = staticmethod(lambda job: job.args.lengths)
    plan = staticmethod(array_plan)
    mask_plan = staticmethod(plan_of_mask)

    reads: Any  # (tensor): True if these kernels may read it
    launch: Any  # runs the kernel, see `threads.launch`. False if there is none for the plan: nothing was done
    device_of: Any  # (seed): its device
    row_memory: Any  # (tensor): the array for `MaskArgs` that holds its values

    def empty_like(self, x: Tensor) -> Tensor:
        """Memory for an output that lies as x does."""
        return torch.empty_like(x)

    def dense(self, x: Tensor, nbytes: int, strides: tuple[int, ...] | None) -> Tensor:
        """`empty_like` for a dense x of `nbytes` whose strides, in elements, are known. None: C order."""
        return torch.empty_like(x)

    def run(self, x: Tensor, job: Job, request: Request) -> Any:
        fill = job.args.fill
        graph = torch.is_grad_enabled() and (x.requires_grad or (fill is not None and fill.requires_grad))
        if job.seed is request.seed and isinstance(job.seed, Tensor) and (graph or job.target is not None):
            # The caller may change the seed before backward, or have it overwritten here.
            job = job._replace(seed=job.seed.clone())
        if not graph:
            result = self.write(job, x)
        elif request.inplace and is_view(x):
            result = x.copy_(self.where(job, x, self.draw_mask(job)))
        else:
            result = run_job(x, job) if fill is None else run_job(x, job, fill)
        return (result, job.mask) if request.return_mask else result

    def write(self, job: Job, x: Tensor) -> Tensor:
        """x with its messages dropped, in the job's target or in a new tensor."""
        return self.drop(job.plan, job.args, job.seed, x, job.target, job.mask if job.given is None else job.given)

    def drop(self, plan: Plan, args: MaskArgs, seed: Any, x: Tensor, target: Any = None, mask: Any = None) -> Tensor:
        """`write` without a `Job`, which small calls would feel. Writes the mask, or reads it if `args.given`."""
        made, result = plan, target
        fits = x.is_contiguous() if plan.strides is None else x.stride() == plan.strides
        if target is None:
            result = self.dense(x, plan.nbytes, plan.strides) if fits else self.empty_like(x)
        if not plan.messages:
            return result  # type: ignore[no-any-return]
        if not (fits and (target is None or (plan.strides is None and target.is_contiguous()))):
            plan, x = self._follow(plan, x, result)
        if plan.kernel_ok:
            start = x.data_ptr()
            if not start and plan.nbytes and x.numel():
                raise ValueError(f"x has no memory, though its shape is {tuple(x.shape)}: its storage was freed")
            if self.launch(plan, args, seed, start, result.data_ptr(), 0 if mask is None else mask.data_ptr()):
                if target is not None and not target.is_inference():
                    increment_versions((target,))  # torch can't see a write through a pointer
                return result  # type: ignore[no-any-return]
        job = Job(self, made, args, seed, None, mask, mask if args.given else None)
        return result.copy_(self.where(job, x, self.draw_mask(job)))  # type: ignore[no-any-return]

    def _follow(self, plan: Plan, x: Tensor, result: Tensor) -> tuple[Plan, Tensor]:
        """The plan for these strides, and x; or the plan for the result's strides, into which x was copied."""
        strides, out_strides = byte_strides(x), byte_strides(result)
        both = follow(plan, strides, out_strides)
        if both.kernel_ok and both.numbers.pieces == 1:
            return both, x
        alone = follow(plan, out_strides, out_strides)
        if alone.kernel_ok and not (both.kernel_ok and both.numbers.pieces <= alone.numbers.pieces):
            return alone, result.copy_(x)  # as of the gradient of a sum, whose strides are 0
        return both, x

    def run_given(self, x: Tensor, job: Job, request: Request, keep: Tensor, scales: Tensor | None) -> Any:
        """`run` by a keep mask and the factors of messages, float64, 0 for one that passes as it is."""
        places, each = PLAIN.places, scales
        if scales is not None:
            protect: Any = scales == 0
            each, protect = self.row_memory(scales), self.row_memory(protect)
            places = Places(protect)
        args = MaskArgs(job.args.fill, scales=each, given=True, places=places)
        return self.run(x, job._replace(args=args, mask=None, given=keep), request)

    def draw_mask(self, job: Job) -> Tensor:
        """The mask alone: the one given, or drawn into the job's memory, new where it has none."""
        if job.given is not None:
            return job.given  # type: ignore[no-any-return]
        mask: Tensor = job.mask
        if mask is None:
            mask = torch.empty(job.plan.shape, dtype=torch.bool, device=self.device_of(job.seed))
        if job.plan.messages and not self.launch(job.plan, job.args, job.seed, 0, 0, mask.data_ptr()):
            rows, thresholds = cuda.rows_of(job.args), job.args.thresholds
            mask.copy_(operations.keep_mask(job.plan.shape, job.plan.rule, job.seed, rows, thresholds))
        return mask

    def where(self, job: Job, x: Tensor, mask: Tensor) -> Tensor:
        """`write` in torch's operations, for layouts that kernels can't follow, and for a view written in place."""
        if job.plan.kind == COPY:
            return operations.where(x, mask, job.args.fill)
        return operations.where(x, mask, job.args.fill, *self.scales(job))


class _Host(Kernels):
    """Tensors in the CPU's memory. A seed is an integer."""

    split_p = staticmethod(arguments.split_p)
    check_seed = staticmethod(seeds.check_host_seed)
    launch = staticmethod(launch)
    empty_like = staticmethod(memory.empty_like)
    dense = staticmethod(memory.dense)

    reads = staticmethod(can_look_at)

    def mask_args(self, plan: Plan, p: Any, fill: Any, request: Request, device: torch.device) -> MaskArgs:
        return row_arguments(plan, p, own_fill(fill, request), request)

    def seed(self, given: int | None, generator: Any, device: torch.device) -> int:
        if given is not None:
            return given
        if generator is None:
            return seeds.fresh_seed(None)
        rank = seeds.rank_of(generator)
        return seeds.folded_int(seeds.fresh_seed(None if rank is not None else generator), rank)

    def device_of(self, seed: int) -> str:
        return "cpu"

    def row_memory(self, values: Tensor) -> Any:
        """The values as a field of `MaskArgs`."""
        return values.numpy()

    def opaque_seed(self, seed: int) -> Tensor:
        """The seed as a tensor that the compiler can't see through."""
        return seeds.opaque_seed(arguments.signed(seed), torch.device("cpu"))

    def scales(self, job: Job) -> tuple[Any, Tensor | None]:
        scales, eligible = (torch.from_numpy(np.array(each)) for each in kept_scales(job.plan, job.args, job.seed))
        return scales, eligible


class _Device(Kernels):
    """Tensors on a CUDA device. A seed is a 0-d tensor on the device, and its value is never read by the host."""

    split_p = staticmethod(split_p_of_device)
    check_seed = staticmethod(seeds.check_device_seed)
    seed = staticmethod(seeds.device_seed)
    launch = staticmethod(cuda.launch)

    def reads(self, tensor: Tensor) -> bool:
        return tensor.is_cuda and not unreadable_reason(tensor)

    def mask_args(self, plan: Plan, p: Any, fill: Any, request: Request, device: torch.device) -> MaskArgs:
        return cuda.row_arguments(plan, p, own_fill(fill, request), request, device)

    def device_of(self, seed: Tensor) -> torch.device:
        return seed.device

    def row_memory(self, values: Tensor) -> Tensor:
        return values

    def opaque_seed(self, seed: Tensor) -> Tensor:
        return seed

    def scales(self, job: Job) -> tuple[Any, Tensor | None]:
        args = job.args
        return operations.row_scales(job.plan.shape, job.plan.rule, job.seed, cuda.rows_of(args), args.scales)


class Outline(NamedTuple):
    """The part of a plan that operations need: sizes may be symbols."""

    shape: tuple[int, ...]  # the message dims
    rule: Rule


class TracedArgs(NamedTuple):
    """The `args` of a traced job: the arrays that torch's operations need, on x's device."""

    fill: Tensor | None = None
    p: Tensor | None = None  # float64; None: the rule has a number or a range
    rows: operations.RowArgs = operations.RowArgs()


class Traced(Tensors):
    """Torch's operations: under tracing and transforms, on other devices, for tensor subclasses.

    Values inside tensors on other devices or traced are clamped, not checked: to look would synchronise, or break a
    graph.
    """

    nothing = TracedArgs()
    lengths = staticmethod(lambda job: job.args.rows.lengths)
    split_p = staticmethod(split_p_traced)
    check_seed = staticmethod(seeds.check_device_seed)
    seed = staticmethod(seeds.device_seed)

    def plan(self, x: Tensor, kind: int, message_dims: Any, rule: Rule) -> Outline:
        return self.mask_plan(tuple(x.shape[: arguments.message_dims(x.shape, message_dims)]), rule)

    def mask_plan(self, shape: tuple[int, ...], rule: Rule) -> Outline:
        if not not_eager_reason():  # else sizes may be symbols, which a check would bind
            check_prefix(rule, shape[-1])
        return Outline(shape, rule)

    def mask_args(self, plan: Outline, p: Any, fill: Any, request: Request, device: torch.device) -> TracedArgs:
        shape = plan.shape
        p = None if p is None else probabilities_on(p, shape, device)
        return TracedArgs(fill, p, rows_on(request, shape, device))

    def mask(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Operations make their own."""

    def run(self, x: Tensor, job: Job, request: Request) -> Any:
        keep = self.draw_mask(job)
        scale, eligible = self.scales(job) if request.scale else (None, None)
        y = operations.where(x, keep, job.args.fill, scale, eligible)
        if job.target is not None:
            y = job.target.copy_(y)
        return (y, keep) if request.return_mask else y

    def run_given(self, x: Tensor, job: Job, request: Request, keep: Tensor, scales: Tensor | None) -> Any:
        y = operations.where(x if scales is None else operations.scaled(x, scales), keep, job.args.fill)
        return y if job.target is None else job.target.copy_(y)

    def draw_mask(self, job: Job) -> Tensor:
        """The mask in torch's operations; in compiled code from the kernels."""
        (shape, rule), (_, p, rows), seed = job.plan, job.args, job.seed
        compiled = torch.compiler.is_compiling() and not is_exporting()
        if compiled and not in_transform() and seed.device.type in ("cpu", "cuda"):
            return kernel_mask(shape, rule, seed, rows, p)
        return operations.keep_mask(shape, rule, seed, rows, None if p is None else operations.thresholds(p))

    def scales(self, job: Job) -> tuple[Any, Tensor | None]:
        (shape, rule), (_, p, rows), seed = job.plan, job.args, job.seed
        return operations.row_scales(shape, rule, seed, rows, None if p is None else operations.scales(p))


HOST, DEVICE, TRACED = _Host(), _Device(), Traced()
_NUMBERS = {int, float}


def choose(x: Tensor, request: Request) -> tuple[Library, str]:
    """The backend of a call on x, and why kernels can't take it; empty: they do."""
    if HOST.reads(x):
        reason = _beside_host(request)
        return (TRACED if reason else HOST), reason
    reason = unreadable_reason(x)
    return (TRACED, f"x: {reason}") if reason else _on_device(x.device, request)


def choose_for_mask(device: torch.device, request: Request) -> Library:
    """The backend of a call for a mask alone, on a device."""
    if not_eager_reason():
        return TRACED
    if device.type == "cpu":
        return TRACED if _beside_host(request) else HOST
    return _on_device(device, request)[0]


def _on_device(device: torch.device, request: Request) -> tuple[Library, str]:
    for name, value in zip(ARRAYS, arrays_of(request), strict=True):
        if isinstance(value, Tensor) and (reason := unreadable_reason(value)):
            return TRACED, f"{name}: {reason}"
    reason = cuda.obstacle(device)
    return (TRACED if reason else DEVICE), reason


def _beside_host(request: Request) -> str:
    """Why kernels can't take a call on the host because of its other tensors; empty: they can."""
    reason = ""
    for name, value in zip(ARRAYS, arrays_of(request), strict=True):
        # Torch's isinstance takes a microsecond for all of what usually is None or a number.
        if value is None or type(value) in _NUMBERS or not isinstance(value, Tensor) or HOST.reads(value):
            continue
        if hasattr(value, "device_mesh"):  # torch's operations follow no DTensor beside an ordinary x
            raise ValueError(
                f"{name} is a DTensor, but x is a plain tensor: make x a DTensor, or give {name}.full_tensor(), "
                "or what of it belongs to x"
            )
        reason = reason or unreadable_reason(value) or "x lies on the host, but another argument on a device"
    return reason


# Our operator for masks in compiled code, which can't follow a kernel; to compile Philox in operations takes 10 s.
@torch.library.custom_op(
    "msgdrop_numba::keep_mask",
    mutates_args=(),
    schema="(SymInt[] shape, Tensor seed, Tensor? p, float[] numbers, SymInt[] rule, Tensor? lengths, Tensor? keys, "
    "Tensor? protect, SymInt offset, Tensor? positions) -> Tensor",
)
def _keep_mask(shape: Any, seed: Any, p: Any, numbers: Any, rule: Any, *rows: Any) -> Tensor:
    keywords = {name: type(default)(value) for (name, default), value in zip(DEFAULTS.items(), rule, strict=True)}
    number = tuple(numbers) if len(numbers) == 2 else numbers[0] if numbers else None
    checked: Rule = ArrayRule(None, **keywords) if number is None else Rule(number, **keywords)
    plan = plan_of_mask(tuple(shape), checked.for_rows(shape[-1]))
    lengths, keys, protect, offset, positions = rows
    request = Request(
        checked, p, lengths=lengths, keys=keys, protect=protect, positions=offset if positions is None else positions
    )
    if seed.device.type == "cpu":
        return HOST.draw_mask(Job(HOST, plan, row_arguments(plan, p, None, request), arguments.check_seed(seed)))
    return DEVICE.draw_mask(Job(DEVICE, plan, cuda.row_arguments(plan, p, None, request, seed.device), seed))


@_keep_mask.register_fake
def _(shape: Any, seed: Any, *_: Any) -> Tensor:
    return seed.new_empty(shape, dtype=torch.bool)  # type: ignore[no-any-return]
