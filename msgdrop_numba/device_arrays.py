"""message_dropout on any object with `__cuda_array_interface__`, CuPy's and numba's arrays: as tensors on its memory.

All work goes to the stream that the object names, so that it comes after what its library did before, and before what
that does next.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba import torch_ops


def message_dropout(
    x: Any, p: Any, training: bool, inplace: bool, scale: bool, exact: bool, span: int, min_keep: int,
    lengths: Any, fill: Any, message_dims: int | None, seed: Any, keys: Any, generator: Any, out: Any,
    return_mask: bool,
) -> Any:  # fmt: skip
    """`functional.message_dropout` for such an object; gives back one of the same library."""
    if inplace or out is not None:
        _check_writable("x" if inplace else "out", x if inplace else out)
    give_back, tensor = _importer(x), as_tensor("x", x)
    with _stream(x, tensor.device):
        result = torch_ops.message_dropout(
            tensor, as_tensor("p", p), training, inplace, scale, exact, span, min_keep, as_tensor("lengths", lengths),
            as_tensor("fill", fill), message_dims, as_tensor("seed", seed), as_tensor("keys", keys), generator,
            as_tensor("out", out), return_mask,
        )  # fmt: skip
        y, keep = result if return_mask else (result, None)
        given = x if y is tensor else out
        y = give_back(y) if given is None else given
        return (y, give_back(keep)) if return_mask else y


def is_device_array(value: Any) -> bool:
    """Whether an object that is no tensor describes memory on a CUDA device."""
    return not isinstance(value, Tensor) and hasattr(value, "__cuda_array_interface__")


class _Described:
    """What torch makes a tensor of; `owner` stays alive as long."""

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
        return _import(_Described(interface, value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be memory that torch can take, but {type(value).__name__} of type {interface['typestr']}, "
            f"shape {interface['shape']} and strides {interface.get('strides')} is not ({error}): copy it first"
        ) from error


def _import(described: _Described) -> Tensor:
    tensor = torch.as_tensor(described, device="cuda")
    if tensor.numel() and tensor.data_ptr() != described.__cuda_array_interface__["data"][0]:
        raise ValueError(f"it lies on another device than the current one, {tensor.device}")
    return tensor


def _check_writable(name: str, value: Any) -> None:
    if is_device_array(value) and value.__cuda_array_interface__["data"][1]:
        raise ValueError(f"{name} must be writable, but got a read-only {type(value).__name__}: give a copy")


def _stream(x: Any, device: torch.device) -> AbstractContextManager[Any]:
    """The stream that the object's library works on, as its interface says; none: torch's current one."""
    handle = x.__cuda_array_interface__.get("stream")
    if handle is None:
        return nullcontext()
    if handle == 1:  # the legacy default stream, which torch knows as 0
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(handle, device))


def _importer(x: Any) -> Any:
    """What makes an array of x's library of a tensor, on the same memory."""
    library = type(x).__module__.split(".")[0]
    if library == "cupy":
        import cupy

        return cupy.asarray
    if library in ("numba", "numba_cuda"):
        from numba import cuda

        return cuda.as_cuda_array
    raise TypeError(
        f"x must be a NumPy array, a torch tensor, or a CuPy or numba device array, but got {type(x).__name__}; "
        "make it a tensor first, with torch.as_tensor or torch.from_dlpack"
    )
