"""The CUDA kernels on torch's tensors: on their device, on its current stream, with a seed that stays there.

Nothing here waits for the device. Where the kernels can't be had, a log line says so once, and whoever asked takes
torch's own operations, which draw the same mask.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.arguments import address, split_p
from msgdrop_numba.call.plan import PLAIN, Draw, Plan
from msgdrop_numba.kernels.records import Addresses
from msgdrop_numba.tensors import operations as tensor
from msgdrop_numba.tensors.arguments import keys_on, lengths_on, probabilities_on
from msgdrop_numba.torch_private import is_plain, is_plain_cuda, raw_stream

_INSTALL = 'pip install "msgdrop_numba[cuda]"'
_broken: set[int] = set()  # devices that a kernel couldn't be brought to


@cache
def _kernels() -> Any:
    """The module that launches the kernels, None where it can't be had."""
    if torch.version.hip is not None:  # calls itself CUDA; numba doesn't know it
        return None
    try:
        from msgdrop_numba.kernels import cuda_launch
    except Exception as error:  # whatever an old numba-cuda, or numba's built-in target, lacks
        _say(f"numba-cuda is missing or too old ({type(error).__name__}: {error})", _INSTALL)
        return None
    if cuda_launch.SIMULATOR:
        _say("numba's simulator would read addresses of the device on the host", "unset NUMBA_ENABLE_CUDASIM")
        return None
    return cuda_launch


@cache
def _say(reason: str, advice: str) -> None:
    logging.getLogger("msgdrop_numba").warning(
        "CUDA tensors take torch's own operations, several times slower than the kernels, as %s: %s", reason, advice
    )


def usable(device: torch.device) -> bool:
    """Whether kernels can be had on a device."""
    return device.type == "cuda" and device.index not in _broken and _kernels() is not None


def takes(x: Tensor, *others: Any) -> bool:
    """Whether x is an ordinary CUDA tensor, as the other arguments are, or on the host, and kernels can be had."""
    if not is_plain_cuda(x) or not all(is_ordinary(value) for value in others if isinstance(value, Tensor)):
        return False
    return usable(x.device)


def is_ordinary(value: Tensor) -> bool:
    """Whether a tensor is a dense eager one on the host or a CUDA device."""
    return is_plain(value) or is_plain_cuda(value)


def number_or_array(p: Any) -> tuple[float | None, Any]:
    """`arguments.split_p`; a tensor on the device is an array, as its value isn't looked at."""
    return (None, p) if isinstance(p, Tensor) and not p.is_cpu else split_p(p)


def row_arguments(
    plan: Plan, p: Any, scale: bool, fill: Tensor | None, lengths: Any, keys: Any, device: torch.device
) -> Draw:
    """`plan.row_arguments` on a device; keys keep their shape, which may lack trailing dims."""
    if p is None and fill is None and lengths is None and keys is None:
        return PLAIN
    own = scales = None
    if p is not None:
        _, p = probabilities_on(p, plan.shape, device)
        own, scales = tensor.thresholds(p).contiguous(), tensor.scales(p).contiguous() if scale else None
    row_keys, row_lengths = keys_on(keys, plan.shape[:-1], device), lengths_on(lengths, plan.shape, device)
    if row_keys is not None:
        row_keys = row_keys.clone(memory_format=torch.contiguous_format)  # the caller's memory may be written
    return Draw(fill, None if row_lengths is None else row_lengths.contiguous(), row_keys, own, scales)


def launch(plan: Plan, draw: Draw, seed: Tensor, x: int, out: int, mask: int) -> bool:
    """As `threads.launch`, on the device of the seed; False, and nothing done, where there are no kernels."""
    kernels, index = _kernels(), seed.device.index
    if kernels is None or index in _broken:
        return False
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(plan, draw, seed, x, out, mask)
    rows = plan.messages // plan.size
    inner = 0 if draw.keys is None or draw.keys.ndim == len(plan.shape) - 1 else rows // draw.keys.numel()
    limited = plan.numbers.limited and not draw.given
    limits = torch.empty((rows, 2), dtype=torch.int64, device=seed.device) if limited else None
    try:
        kernels.launch(
            plan.numbers, draw.numbers, plan.messages, inner, Addresses(x, out, mask, seed.data_ptr(), address(limits)),
            raw_stream(index), index,
        )  # fmt: skip
    except kernels.NotLoadedError as needed:
        return _load(kernels, needed.args, index) and launch(plan, draw, seed, x, out, mask)
    return True


def _load(kernels: Any, variant: tuple[int, int, int], index: int) -> bool:
    """Bring a kernel to the current device; not while a graph is captured, which loading may break."""
    if torch.cuda.is_current_stream_capturing():
        _say("a kernel wasn't loaded before a graph was captured", "make the same calls once before capturing")
        return False
    try:
        kernels.load(*variant, torch.cuda.get_device_capability(index))
    except Exception as error:  # a driver that is too old, a device that the compiler doesn't know
        _broken.add(index)
        _say(f"a kernel can't be loaded ({type(error).__name__}: {error})", f"update the driver, or {_INSTALL}")
        return False
    return True


def draw_mask(plan: Plan, draw: Draw, seed: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mask alone, in `mask` where there is one."""
    if mask is None:
        mask = torch.empty(plan.shape, dtype=torch.bool, device=seed.device)
    if plan.messages and not draw.given and not launch(plan, draw, seed, 0, 0, mask.data_ptr()):
        mask.copy_(tensor.keep_mask(plan.shape, plan.rule, seed, draw.keys, draw.lengths, draw.thresholds))
    return mask
