"""message_dropout on any object with `__cuda_array_interface__`, CuPy's and numba's arrays: as tensors on its memory.

All work goes to the stream that x names, so that it comes after what its library did before, and before what that does
next; it waits for the streams of the other arguments, and that of `out` waits for it. The host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.request import ARRAYS, Request
from msgdrop_numba.tensors import dropout


def message_dropout(x: Any, request: Request) -> Any:
    """`functional.message_dropout` for such an object; gives back one of the same library, without a gradient."""
    if request.inplace or request.out is not None:
        _check_writable("x" if request.inplace else "out", x if request.inplace else request.out)
    give_back, tensor = _importer(x), as_tensor("x", x)
    current = _stream(x, tensor.device)
    streams = {name: _stream(getattr(request, name), tensor.device) for name in ARRAYS}
    waited = {stream for stream in streams.values() if stream not in (None, current)}
    with torch.cuda.stream(current) if current is not None else nullcontext(), torch.no_grad():
        for stream in waited:
            torch.cuda.current_stream(tensor.device).wait_stream(stream)
        result = dropout.message_dropout(tensor, _as_tensors(request))
        if (stream := streams["out"]) in waited:
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
        y, keep = result if request.return_mask else (result, None)
        given = x if y is tensor else request.out
        y = give_back(y) if given is None else given
        return y if keep is None else (y, give_back(keep))


def _as_tensors(request: Request) -> Request:
    """The request with tensors in place of device arrays."""
    return replace(request, **{name: as_tensor(name, getattr(request, name)) for name in ARRAYS})


def is_device_array(value: Any) -> bool:
    """True for an object that is no tensor and describes memory on a CUDA device."""
    return not isinstance(value, Tensor) and hasattr(value, "__cuda_array_interface__")


class _Described:
    """The description that torch makes a tensor of; `owner` stays alive as long."""

    def __init__(self, interface: dict[str, Any], owner: Any) -> None:
        self.__cuda_array_interface__ = interface
        self.owner = owner


def as_tensor(name: str, value: Any) -> Any:
    """A tensor on the memory of a device array; anything else as it is."""
    if not is_device_array(value):
        return value
    interface = dict(value.__cuda_array_interface__)
    if interface.get("mask") is not None:
        raise TypeError(f"{name} must be a plain array, but got a masked one, whose mask would be lost")
    interface["data"] = (interface["data"][0], False)  # torch takes no read-only memory; it is only read
    try:
        tensor = _import(_Described(interface, value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be memory that torch can take, but {type(value).__name__} of type {interface['typestr']}, "
            f"shape {interface['shape']} and strides {interface.get('strides')} is not ({error}): copy it first"
        ) from error
    if tensor.numel() and tensor.data_ptr() != interface["data"][0]:
        raise ValueError(
            f"{name} must lie on the current device, {tensor.device}, but it lies on another: call under "
            "torch.cuda.device(index)"
        )
    return tensor


def _import(described: _Described) -> Tensor:
    return torch.as_tensor(described, device="cuda")


def _check_writable(name: str, value: Any) -> None:
    if is_device_array(value) and value.__cuda_array_interface__["data"][1]:
        raise ValueError(f"{name} must be writable, but got a read-only {type(value).__name__}: give a copy")


def _stream(value: Any, device: torch.device) -> Any:
    """The stream that an argument was written on: what a device array names, torch's current one of a tensor."""
    if isinstance(value, Tensor):
        return torch.cuda.current_stream(device) if value.is_cuda else None
    handle = value.__cuda_array_interface__.get("stream") if is_device_array(value) else None
    if handle is None:
        return None
    if handle == 1:  # the legacy default stream, which torch knows as 0
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(handle, device)


def _importer(x: Any) -> Callable[[Tensor], Any]:
    """A function that makes an array of x's library on the memory of a tensor."""
    library = type(x).__module__.split(".")[0]
    if library == "cupy":
        import cupy

        return cupy.asarray  # type: ignore[no-any-return]
    if library in ("numba", "numba_cuda"):
        from numba import cuda

        # Else the array would forget its stream.
        more = {"version": 3, "stream": x.__cuda_array_interface__.get("stream")}
        return lambda y: cuda.from_cuda_array_interface(y.__cuda_array_interface__ | more, owner=y, sync=False)
    raise TypeError(
        f"x must be a NumPy array, a torch tensor, or a CuPy or numba device array, but got {type(x).__name__}; "
        "make it a tensor first, with torch.as_tensor or torch.from_dlpack"
    )
