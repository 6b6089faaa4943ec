"""Reading and checking what message_dropout is told of a tensor, and bringing it to the tensor's device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call import arguments
from msgdrop_numba.call.keys import row_keys
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import MAX_ROW, P
from msgdrop_numba.kernels.records import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, OTHER
from msgdrop_numba.tensors.operations import RowArgs
from msgdrop_numba.torch_private import base_of, not_eager_reason, unreadable_reason

_SCALED = {
    torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.float32: FLOAT32, torch.float64: FLOAT64,
    torch.complex32: FLOAT16, torch.complex64: FLOAT32, torch.complex128: FLOAT64,
}  # fmt: skip

WITHOUT_ZERO = {torch.float8_e8m0fnu}
_INFINITIES = (float("inf"), -float("inf"))


def scaled_kind(dtype: torch.dtype) -> int:
    """The type that the kernels scale `dtype` in; OTHER where torch's own operations do."""
    if not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"scale=True needs a floating or complex dtype, but x has {dtype}")
    return _SCALED.get(dtype, OTHER)


def fill_message(fill: Any, x: Tensor, message_dims: int) -> Tensor | None:
    """One message of `fill`, a number or a tensor over the features, of x's dtype; None: zeros."""
    if (fill is arguments.ZERO or arguments.is_zero(fill)) and x.dtype not in WITHOUT_ZERO:
        return None
    features = x.shape[message_dims:]
    if not isinstance(fill, Tensor):
        number = check_number("fill", fill, x.dtype)
        return torch.full(features, number, dtype=x.dtype, device=x.device)
    if fill.shape != features or fill.dtype != x.dtype or fill.device != x.device:
        raise ValueError(
            f"fill must be a number or a tensor like one message of x, {tuple(features)} {x.dtype} on {x.device}, "
            f"but got {tuple(fill.shape)} {fill.dtype} on {fill.device}"
        )
    return fill.contiguous()


def check_number(name: str, value: Any, dtype: torch.dtype) -> complex:
    """The Python number; refused where `dtype` can't hold it."""
    if dtype.is_floating_point or dtype.is_complex:
        info = torch.finfo(dtype)
        low, high = (info.tiny if dtype in WITHOUT_ZERO else -info.max), info.max
        number = arguments.check_number(name, value, "c" if dtype.is_complex else "f", low, high, dtype)
        if dtype.itemsize == 1 and number in _INFINITIES and torch.full((), number, dtype=dtype).float() != number:
            raise ValueError(f"{name} must be a number that {dtype} can hold, but got {value!r}")
        return number
    low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return arguments.check_number(name, value, "i", low, high, dtype)


def check_target(x: Tensor, inplace: bool, out: Any, active: bool, fill: Tensor | None) -> Tensor | None:
    """The tensor to write, x or out; None: a new one, or x stays as it is."""
    if inplace and out is not None:
        raise ValueError(f"give inplace=True or out, not both: got out={type(out).__name__}")
    if inplace and active:
        if x.requires_grad and torch.is_grad_enabled() and _is_of_leaf(x):
            raise ValueError(
                f"inplace=True can't change a leaf that requires grad, but x is of one, of shape {tuple(x.shape)}: "
                "drop out of place, or under torch.no_grad()"
            )
        _check_inference("x", x)
        return x
    if out is None:
        return None
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor like x, but got {type(out).__name__}")
    if not has_sizes(out):
        raise ValueError("out has no sizes, as nested tensors under vmap: leave out= away")
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"out must be like x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"but got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    _check_inference("out", out)
    tracked = x.requires_grad or out.requires_grad or (fill is not None and fill.requires_grad)
    if tracked and torch.is_grad_enabled():
        raise ValueError("out can't be used where a gradient is needed: leave it out, or call under torch.no_grad()")
    return out


def check_distinct(name: str, target: Tensor) -> None:
    """Refuse an expanded tensor, which has a stride of 0, as the target. torch does so too, after a seed was drawn."""
    if target.layout is not torch.strided:
        return
    strides = target.stride()
    if any(step == 0 and size > 1 for step, size in zip(strides, target.shape, strict=True)):
        raise ValueError(f"{name} must not hold elements twice, but got strides {strides}: copy it first")


def own_fill(fill: Tensor | None, request: Request) -> Tensor | None:
    """The fill, in memory of its own where the call writes to memory that may be the caller's fill too."""
    return fill.clone() if fill is not None and (request.inplace or request.out is not None) else fill


def check_apart(name: str, x: Tensor, target: Tensor) -> None:
    """Refuse a target that was freed, holds elements twice, or overlaps x in part."""
    if target.data_ptr() == 0 and target.numel():
        raise ValueError(f"{name} has no memory, though its shape is {tuple(target.shape)}: its storage was freed")
    in_order = x.is_contiguous() and (target is x or target.is_contiguous())
    if not in_order or not (target is x or abs(target.data_ptr() - x.data_ptr()) >= x.numel() * x.element_size()):
        arguments.check_memory(name, _memory(x), _memory(target))


def _memory(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), tuple(x.shape), byte_strides(x), x.element_size()


def byte_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of a tensor in bytes."""
    size = x.element_size()
    return tuple(step * size for step in x.stride())


def _is_of_leaf(x: Tensor) -> bool:
    base = x if torch.compiler.is_compiling() else base_of(x)
    return base.requires_grad and base.is_leaf


def _check_inference(name: str, target: Tensor) -> None:
    if torch.compiler.is_compiling():  # which can't ask, and has its own rules for them
        return
    if target.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} is an inference tensor, which can only be written under torch.inference_mode()")


def check_device(device: Any) -> torch.device:
    """A torch device that tensors can be made on."""
    try:
        found = torch.device(device)
        if found.type != "cpu" and not torch.compiler.is_compiling():
            torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:  # a torch that is built without a device asserts
        said = str(error).partition("\n")[0][:200]  # torch may list all of its backends
        raise ValueError(f"device must be one that torch has here, but got {device!r}: {said}") from error
    return found


def split_p_of_device(p: Any) -> tuple[P, Any]:
    """`arguments.split_p`; a tensor on a device is an array, as its value isn't looked at."""
    return (None, p) if isinstance(p, Tensor) and not p.is_cpu else arguments.split_p(p)


def split_p_traced(p: Any) -> tuple[P, Any]:
    """`arguments.split_p`; a tensor whose value can't be looked at is an array."""
    if isinstance(p, Tensor):
        return arguments.split_p(p) if can_look_at(p) else (None, p)
    if not isinstance(p, float) and torch.compiler.is_compiling() and getattr(p, "ndim", None):
        return None, _constant(p)
    return arguments.split_p(p)


def probabilities_on(p: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An array of probabilities as a float64 tensor on the device; clamped, not checked, where it can't be seen."""
    if not isinstance(p, Tensor) or can_look_at(p):
        return move("p", torch.from_numpy(arguments.probabilities(p, shape)), device)
    if p.dtype == torch.bool or p.is_complex():
        raise TypeError(f"p must hold floating-point numbers, but got dtype {p.dtype}")
    as_it_is = p.ndim > 0 and arguments.is_each(tuple(p.shape), shape)
    if not as_it_is:
        arguments.check_broadcast(tuple(p.shape), shape)
    values: Tensor = move("p", p.detach(), device).to(torch.float64).nan_to_num(nan=0.0).clamp(0, 1)
    return values if as_it_is else values.expand(shape if p.ndim else shape[-1:])


def keys_on(keys: Any, rows: tuple[int, ...], device: torch.device) -> Tensor | None:
    """int64 keys, one a row or lacking trailing dims, in memory that may be the caller's."""
    if keys is None:
        return None
    if torch.compiler.is_compiling():
        keys = _constant(keys)
    if not isinstance(keys, Tensor):
        host = row_keys(keys, rows)
        assert host is not None
        return move("keys", torch.from_numpy(host.view("int64")).reshape(rows), device)
    check_integers("keys", keys)
    arguments.check_keys_shape(tuple(keys.shape), tuple(rows))
    keys = move("keys", keys, device)
    return keys.view(torch.int64) if keys.dtype == torch.uint64 else keys.to(torch.int64)  # type: ignore[no-any-return]


def lengths_on(lengths: Any, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """int64 lengths, one a row."""
    if lengths is None:
        return None
    rows, size = shape[:-1], shape[-1]
    if torch.compiler.is_compiling():
        lengths = _constant(lengths)
    if not isinstance(lengths, Tensor) or can_look_at(lengths):
        host = arguments.row_lengths(lengths, rows, size)
        assert host is not None
        return move("lengths", torch.from_numpy(host).reshape(rows), device)
    check_integers("lengths", lengths)
    if lengths.shape != rows:
        raise ValueError(f"lengths must have shape {rows}, one a row, but got {tuple(lengths.shape)}")
    return move("lengths", lengths, device).to(torch.int64).clamp(0, size)


def rows_on(request: Request, shape: tuple[int, ...], device: torch.device) -> RowArgs:
    """A call's arrays over rows and messages, on the device."""
    lengths, keys = lengths_on(request.lengths, shape, device), keys_on(request.keys, shape[:-1], device)
    protect = protect_on(request.protect, shape, device)
    return RowArgs(lengths, keys, protect, *positions_on(request.positions, shape, device))


def protect_on(protect: Any, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The protected messages, bool over the message dims or the last one, in memory that may be the caller's."""
    if protect is None:
        return None
    if torch.compiler.is_compiling():
        protect = _constant(protect)
    if not isinstance(protect, Tensor):
        protect = torch.from_numpy(arguments.protected(protect, shape))
    arguments.check_protect(protect, shape)
    return move("protect", protect, device)


def positions_on(positions: Any, shape: tuple[int, ...], device: torch.device) -> tuple[Any, Tensor | None]:
    """The offset and None; or 0 and int64 positions over the message dims or the last one."""
    if isinstance(positions, Tensor) and not (positions.ndim == 0 and can_look_at(positions)):
        check_integers("positions", positions)
        if positions.ndim == 0:
            positions = positions.to(torch.int64) + torch.arange(shape[-1], device=positions.device)
    offset, values = arguments.split_positions(positions, shape[-1])
    if values is None:
        return offset, None
    if torch.compiler.is_compiling():
        values = _constant(values)
    if not isinstance(values, Tensor) or can_look_at(values):
        return 0, move("positions", torch.from_numpy(arguments.message_positions(values, shape)), device)
    check_integers("positions", values)
    arguments.check_each("positions", tuple(values.shape), shape)
    return 0, move("positions", values, device).to(torch.int64).clamp(0, MAX_ROW - 1)


def _constant(values: Any) -> Tensor:
    """Numbers in lists, or arrays, as a tensor, which the compiler follows: it can't look at them one by one."""
    if isinstance(values, (list, tuple)):
        return torch.stack([_constant(value) for value in values])
    return torch.as_tensor(values - 2**64 if isinstance(values, int) and values >= 2**63 else values)


def check_integers(name: str, values: Tensor) -> None:
    """Refuse a tensor of another kind; its values aren't looked at."""
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} must be integers, but got dtype {values.dtype}")


def has_sizes(tensor: Tensor) -> bool:
    """False for nested tensors, and for the batched ones of a vmap over them, which don't say that they are nested.

    Guards must not be asked about those: they look at sizes in C++, where the error ends the process.
    """
    try:
        tensor.shape  # noqa: B018
    except RuntimeError:
        return False
    return True


def can_look_at(tensor: Tensor) -> bool:
    """True if the values of a tensor can be looked at without waiting for a device or breaking a graph."""
    return tensor.is_cpu and not unreadable_reason(tensor)


def check_generator(generator: Any, device: torch.device) -> None:
    """Refuse a generator of another device than x."""
    if not _same(generator.device, device):
        raise ValueError(f"generator must be on {device}, as x is, but it is on {generator.device}")


def _same(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index == b.index or None in (a.index, b.index))


def move(name: str, values: Tensor, device: torch.device) -> Tensor:
    """A tensor on x's device or on the host, on the device; nothing waits for a copy to CUDA to be done."""
    if values.device.type != "cpu" and not _same(values.device, device):
        raise ValueError(f"{name} must be on {device}, as x is, or on the CPU, but it is on {values.device}: move it")
    if device.type != "cuda" or values.device.type == "cuda":
        return values.to(device)
    if not_eager_reason():
        return values.to(device, non_blocking=True)
    if _is_capturing(device):
        raise ValueError(f"{name} must be on {device} while a CUDA graph is captured, but it is on the host: move it")
    # Of pageable memory the copy may wait for the stream; pinned memory is read later, and the caller's may change.
    return values.clone().pin_memory().to(device, non_blocking=True)


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
