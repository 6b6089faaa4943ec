"""Messages of tensors removed and put back, see call.select: by the kernels, or in torch's operations.

A move and its gradient are one map with the two indices swapped: each message is written once, in no order.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msgdrop_numba.call.request import Job, Request, prepare, prepare_mask, turned
from msgdrop_numba.call.select import (
    ARRAYS,
    DENSE,
    PACKED,
    Form,
    Layout,
    Selection,
    Source,
    form_of,
    move,
    moving,
    place,
    room_for,
    source,
)
from msgdrop_numba.kernels.records import COPY, OTHER
from msgdrop_numba.tensors import cuda, memory, nested, operations
from msgdrop_numba.tensors.arguments import byte_strides, check_device, fill_message, scaled_kind
from msgdrop_numba.tensors.backends import DEVICE, HOST, choose, choose_for_mask
from msgdrop_numba.torch_private import in_transform, is_exporting, is_view, quick_apply


class GatherIndex(NamedTuple):
    """The index of a move, and of its gradient.

    Fields:
        index: int64, for each message of the output the number of its source; -1: it has none.
        inverse_index: int64, for each message of the source the number of its place in the output; -1: it has none.
        full: True if every message of the output has a source.
        scales: float64, the factor of each message of the output, 0: it passes as it is; None: all do.
        inverse_scales: the factors by the messages of the source.
    """

    index: Any
    inverse_index: Any
    full: bool = False
    scales: Tensor | None = None
    inverse_scales: Tensor | None = None

    def inverted(self) -> GatherIndex:
        return GatherIndex(self.inverse_index, self.index, False, self.inverse_scales, self.scales)


def message_select(x: Tensor, request: Request, layout: Layout) -> tuple[Tensor, Selection | None]:
    """`select.message_select` for a tensor."""
    if x.is_nested:
        return message_select(*nested.padded(x, request), layout)
    nested.check_sizes(x)
    return turned(partial(_select, layout), Tensor, Tensor.permute, x, request)  # type: ignore[no-any-return]


def _select(layout: Layout, x: Tensor, request: Request) -> tuple[Tensor, Selection | None]:
    job = prepare(choose(x, request)[0], x, request, partial(form_of, layout, request))
    return removed(x, job, request, layout)


def removed(x: Tensor, job: Job, request: Request, layout: Layout) -> tuple[Tensor, Selection | None]:
    """The remaining messages of x, by a job whose form is a `Form`."""
    dims = len(job.plan.shape)
    passes = job.seed is None and (layout.name != PACKED or request.lengths is None)
    found = None if passes and not layout.wants_kept else _selection(job, layout.capacity, x.device)
    if passes:
        return (_in_a_row(x, dims) if layout.name == PACKED else x), found
    assert found is not None
    scales = job.library.message_scales(job) if request.scale and job.seed is not None else None
    return take(x, dims, found, scales), found


def select_messages(shape: tuple[int, ...], request: Request, layout: Layout, device: Any) -> Selection:
    """`select.select_messages` on a device."""
    device = check_device(device)
    library = choose_for_mask(device, request)
    job = prepare_mask(library, shape, request, device, partial(form_of, layout, request))
    return _selection(job, layout.capacity, device)


def _selection(job: Job, capacity: int | None, device: torch.device) -> Selection:
    shape, form, lengths = tuple(job.plan.shape), job.form, job.library.lengths(job)
    if job.seed is None or job.plan.rule.p == 0:  # x itself, in its own room
        mask, capacity = torch.ones(shape, dtype=torch.bool, device=device), None if form.name == PACKED else shape[-1]
    else:
        mask = job.library.draw_mask(job)
    if job.library is not HOST:
        return _placed(form, capacity, mask, lengths)
    name, _, *arrays, longest, _ = place(form, capacity, shape, mask.data_ptr(), lengths)
    index, inverse_index, counts = map(torch.from_numpy, arrays)
    return Selection(name, shape, index, inverse_index, counts, longest)


def on(found: Selection, device: Any) -> Selection:
    """A selection as tensors, on a device; None: where it is."""
    named: dict[str, Any] = {name: torch.as_tensor(getattr(found, name)) for name in ARRAYS}
    if isinstance(found.overflow, Tensor):
        named["overflow"] = found.overflow
    if device is not None:
        named = {name: value.to(device) for name, value in named.items()}
    return found._replace(**named)


def _placed(form: Form, capacity: Any, mask: Tensor, lengths: Tensor | None) -> Selection:
    """`call.select.place` in torch's operations; on a device nothing is looked at where the room is given."""
    (layout, each), shape, device = form, tuple(mask.shape), mask.device
    *rows, size = shape
    keep = mask if lengths is None else mask & (torch.arange(size, device=device) < lengths.unsqueeze(-1))
    counts, longest = keep.sum(-1), each
    packed = layout == PACKED
    number = torch.arange(math.prod(shape), device=device).reshape(shape)
    if packed:
        keep, number = keep.flatten(), number.flatten()
    room = capacity
    if room is None or HOST.reads(mask):
        total, longest = _totals(counts) if each is None else (each * math.prod(rows), each)
        room = room_for(capacity, total, "all rows") if packed else room_for(capacity, longest, "a row")
    at, fits, overflow = keep.cumsum(-1) - 1, keep, None
    if capacity is not None:
        fits = keep & (at < room)
        overflow = (keep & ~fits).any()
        counts = fits.reshape(shape).sum(-1)
    index = number.new_full((*number.shape[:-1], room + 1), -1)
    index = index.scatter(-1, torch.where(fits, at, room), number)[..., :room].contiguous()
    if not packed:
        at = at + room * torch.arange(math.prod(rows), device=device).reshape(*rows, 1)
        longest = room
    elif longest is None:
        longest = min(size, room)
    inverse_index = torch.where(fits, at, -1).reshape(shape)
    return Selection(layout, shape, index, inverse_index, counts, longest, False if overflow is None else overflow)


def _totals(counts: Tensor) -> tuple[int, int]:
    """The number of messages that remain, and of the longest row; waits for the device once."""
    if not counts.numel():
        return 0, 0
    both = torch.stack([counts.sum(), counts.max()])
    if not in_transform():
        return tuple(both.tolist())
    try:
        return tuple(both.tolist())
    except RuntimeError as error:  # vmap's tensors have no values
        raise ValueError(
            "what rows keep can't be counted under vmap, where each keeps another number: give exact=True, or capacity"
        ) from error


def take(x: Tensor, dims: int, found: Selection, scales: Tensor | None = None) -> Tensor:
    """The kept messages of x, times the `scales`; its leading `dims` index messages; zeros in padding."""
    gather = GatherIndex(found.index, found.inverse_index, found.layout == DENSE)
    if scales is not None:
        picked = _pick(scales.flatten(), found.index)
        gather = gather._replace(scales=picked, inverse_scales=scales.contiguous())
    return _move(x, gather)


def take_shared(x: Tensor, within: Tensor) -> Tensor:
    """The messages of the one row x with these numbers; zeros where one is negative."""
    return operations.where(_pick(x, within), within >= 0, None)


def restore(y: Tensor, fill: Any, found: Selection) -> Tensor:
    """The messages of y where they were, the fill where one was removed: one message, or one for each."""
    dims = found.index.ndim
    full = (*found.shape, *y.shape[dims:])
    if not isinstance(fill, Tensor) or fill.ndim != len(full):
        fill = fill_message(fill, y, dims)
    elif fill.shape != full or fill.dtype != y.dtype or fill.device != y.device:
        raise ValueError(
            f"a fill of all messages must be {full} {y.dtype} on {y.device}, "
            f"but got {tuple(fill.shape)} {fill.dtype} on {fill.device}"
        )
    return _move(y, GatherIndex(found.inverse_index, found.index), fill)


def as_here(found: Selection, x: Tensor) -> Selection:
    """A selection as tensors on x's device."""
    if hasattr(found.index, "device_mesh"):
        raise ValueError("what was kept is of a DTensor, and goes with DTensors alone: distribute_tensor(t, ...)")
    found = on(found, None)
    if found.index.device != x.device:
        raise ValueError(
            f"what was kept is on {found.index.device}, but the tensor on {x.device}: kept.to({str(x.device)!r})"
        )
    return found


def as_nested(y: Tensor, found: Selection) -> Tensor:
    """The remaining messages as a jagged tensor, a row for each of x's."""
    found = as_here(found, y)
    ends = found.lengths.flatten().cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    if found.layout == DENSE:
        values = _in_a_row(y, found.index.ndim)
    elif found.layout == PACKED:
        values = y[: int(offsets[-1])]
    else:
        values = y[found.index >= 0]
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def _move(x: Tensor, gather: GatherIndex, fill: Tensor | None = None) -> Tensor:
    """Along the gather; `fill` is one message, or one for each of the output's."""
    if not (_followed(x) and (fill is None or _followed(fill))):
        return _by_operations(x, gather, fill)
    if torch.is_grad_enabled() and (x.requires_grad or (fill is not None and fill.requires_grad)):
        return _run_move(x, fill, gather)  # type: ignore[no-any-return]
    return _write(x, gather, fill)


def _followed(x: Tensor) -> bool:
    return HOST.reads(x) or DEVICE.reads(x)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fill: Tensor | None, gather: GatherIndex) -> Tensor:
        dims = x.ndim - gather.inverse_index.ndim + gather.index.ndim
        ctx.gather, ctx.each = gather, fill is not None and fill.ndim >= dims
        y = _write(x, gather, fill)
        if is_view(y):  # which couldn't be changed in place
            y = y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gather, grad_x, grad_fill = ctx.gather, None, None
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        if ctx.needs_input_grad[0]:
            grad_x = _move(grad, gather.inverted())
        if ctx.needs_input_grad[1]:
            grad_fill = operations.where(grad, gather.index < 0, None)
            if not ctx.each:
                grad_fill = _in_a_row(grad_fill, gather.index.ndim).sum(0)
        return grad_x, grad_fill, None


_run_move: Any = quick_apply(_Move)


def _write(x: Tensor, gather: GatherIndex, fill: Tensor | None) -> Tensor:
    """The move by the kernels, where there are some that can follow."""
    kind, on_host = COPY if gather.scales is None else scaled_kind(x.dtype), HOST.reads(x)
    if kind == OTHER or not (on_host or not cuda.obstacle(x.device)):
        return _by_operations(x, gather, fill)
    dims, shape, size = gather.inverse_index.ndim, tuple(x.shape), x.element_size()
    made = (*gather.index.shape, *shape[dims:])
    out = memory.empty(made, x.dtype) if on_host else x.new_empty(made)
    where = Source(x.data_ptr())
    if not x.is_contiguous():
        found = source(where.start, shape, byte_strides(x), size, dims)
        if found is None:
            x = x.contiguous()
        where = found or Source(x.data_ptr())
    if where.start == 0 and x.numel():
        raise ValueError(f"x has no memory, though its shape is {shape}: its storage was freed")
    width, filled = math.prod(shape[dims:]) * size, (0, 0)
    if fill is not None:
        fill = fill.contiguous()
        filled = fill.data_ptr(), width if fill.ndim == out.ndim else 0
    job, count = moving(where, out.data_ptr(), gather.index, width, filled, gather.scales, kind), gather.index.numel()
    if on_host:
        move(job, count)
    elif not cuda.gather(job, count, x.device):
        return _by_operations(x, gather, fill)
    return out


def _by_operations(x: Tensor, gather: GatherIndex, fill: Tensor | None) -> Tensor:
    """The move in torch's operations, for whatever follows operations."""
    index = gather.index
    flat = _in_a_row(x, gather.inverse_index.ndim)
    if x.requires_grad and torch.compiler.is_compiling() and not (in_transform() or is_exporting()):
        y = _Pick.apply(flat, index.flatten(), gather.inverse_index.flatten()).reshape(*index.shape, *flat.shape[1:])  # type: ignore[no-untyped-call]
    else:
        y = _pick(flat, index)
    if gather.scales is not None:
        y = operations.scaled(y, gather.scales.reshape(index.shape))
    return y if gather.full else operations.where(y, index >= 0, fill)


def _in_a_row(x: Tensor, dims: int) -> Tensor:
    """The messages over the leading `dims` as one row."""
    return x.reshape(math.prod(x.shape[:dims]), *x.shape[dims:])  # batched gradients know no flatten


def _pick(flat: Tensor, index: Tensor) -> Tensor:
    """The messages with these numbers; any where one is negative."""
    if not flat.shape[0]:
        flat = flat.new_zeros((1, *flat.shape[1:]))
    words = None if flat.requires_grad else _WORDS.get(flat.dtype)  # a view of words has no gradient
    if words is not None:
        return _pick(flat.resolve_conj().resolve_neg().view(words), index).view(flat.dtype)
    return flat.index_select(0, index.clamp(min=0).flatten()).reshape(*index.shape, *flat.shape[1:])


class _Pick(torch.autograd.Function):
    """`_pick` for compiled code, whose own gradient of it would add up what needs no adding."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return _pick(flat, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (back,) = ctx.saved_tensors
        return operations.where(_pick(grad, back), back >= 0, None), None, None


# Types of the same bits, which every operation knows.
_WORDS = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64, torch.complex32: torch.int32}
_WORDS.update({dtype: torch.uint8 for name, dtype in vars(torch).items() if name.startswith("float8_")})
