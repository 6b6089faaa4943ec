"""On which device things lie: one with x or on the host, and brought there without waiting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.torch_private import is_eager


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
    if not is_eager():
        return values.to(device, non_blocking=True)
    if _is_capturing(device):
        raise ValueError(f"{name} must be on {device} while a CUDA graph is captured, but it is on the host: move it")
    # Of pageable memory the copy may wait for the stream; pinned memory is read later, and the caller's may change.
    return values.clone().pin_memory().to(device, non_blocking=True)


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
