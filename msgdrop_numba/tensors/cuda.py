"""The CUDA kernels on torch's tensors: on their device, on its current stream, with a seed that stays there.

Nothing here waits for the device. Where the kernels can't be had, a log line says so once, and whoever asked takes
torch's own operations, which draw the same mask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.arguments import address
from msgdrop_numba.call.plan import MaskArgs, Places, Plan
from msgdrop_numba.call.request import Request
from msgdrop_numba.kernels.records import Addresses
from msgdrop_numba.tensors import operations
from msgdrop_numba.tensors.arguments import probabilities_on, rows_on
from msgdrop_numba.torch_private import raw_stream

_INSTALL = 'pip install "msgdrop_numba[cuda]"'
_broken: dict[int, str] = {}  # devices that a kernel couldn't be brought to, and why


def _look() -> tuple[Any, str, str]:
    """The module that launches the kernels; or None, why it can't be had, and what to do."""
    if torch.version.hip is not None:
        return None, "numba doesn't know ROCm, which calls itself CUDA", ""
    try:
        from msgdrop_numba.kernels import cuda_launch
    except Exception as error:  # whatever an old numba-cuda, or numba's built-in target, lacks
        return None, f"numba-cuda is missing or too old ({type(error).__name__}: {error})", _INSTALL
    if cuda_launch.SIMULATOR:
        reason = "numba's simulator would read addresses of the device on the host"
        return None, reason, "unset NUMBA_ENABLE_CUDASIM"
    return cuda_launch, "", ""


@cache
def _kernels() -> Any:
    """The module that launches the kernels, None where it can't be had."""
    module, reason, advice = _look()
    if advice:
        _say(reason, advice)
    return module


@cache
def _say(reason: str, advice: str) -> None:
    logging.getLogger("msgdrop_numba").warning(
        "CUDA tensors take torch's own operations, several times slower than the kernels, as %s: %s", reason, advice
    )


def obstacle(device: torch.device) -> str:
    """Why there are no kernels for a device; empty: there are."""
    if device.type != "cuda":
        return f"there are no kernels for the device {device.type}"
    return _broken.get(device.index, "") or ("" if _kernels() is not None else _look()[1])


def reset() -> None:
    """Look for the kernels again, and say again what is missing."""
    _broken.clear()
    _kernels.cache_clear()
    _say.cache_clear()


def row_arguments(plan: Plan, p: Any, fill: Tensor | None, request: Request, device: torch.device) -> MaskArgs:
    """`plan.row_arguments` on a device; keys keep their shape, which may lack trailing dims."""
    thresholds = scales = None
    if p is not None:
        p = probabilities_on(p, plan.shape, device)
        thresholds = operations.thresholds(p).contiguous()
        scales = operations.scales(p).contiguous() if request.scale else None
    rows = rows_on(request, plan.shape, device)
    keys, protect, positions = map(_copied, (rows.keys, rows.protect, rows.positions))
    lengths, eligible = None if rows.lengths is None else rows.lengths.contiguous(), None
    if protect is not None and plan.rule.count_limited:
        eligible = operations.eligible(plan.shape, plan.rule, rows, device).sum(-1).expand(plan.shape[:-1]).contiguous()
    places = Places(protect, eligible, rows.offset, positions)
    return MaskArgs(fill, lengths, keys, thresholds, scales, places=places)


def _copied(values: Tensor | None) -> Tensor | None:
    """In memory of its own: the caller's may be written."""
    return None if values is None else values.clone(memory_format=torch.contiguous_format)


def rows_of(args: MaskArgs) -> operations.RowArgs:
    """The arrays of a call for torch's operations."""
    protect, _, offset, positions = args.places
    return operations.RowArgs(args.lengths, args.keys, protect, offset, positions)


def launch(plan: Plan, args: MaskArgs, seed: Tensor, x: int, out: int, mask: int) -> bool:
    """`threads.launch` on the device of the seed. False if no kernel can do it: nothing was done."""
    if out and plan.numbers.pieces > 1:
        return False
    rows = plan.messages // plan.size
    inner = 0 if args.keys is None or args.keys.ndim == len(plan.shape) - 1 else rows // args.keys.numel()

    def start(kernels: Any, stream: int, index: int) -> None:
        limits = None
        if plan.numbers.count_limited and not args.given:
            limits = torch.empty((rows, 2), dtype=torch.int64, device=seed.device)
        addresses = Addresses(x, out, mask, seed.data_ptr(), address(limits))
        kernels.launch(plan.numbers, args.numbers, plan.messages, inner, addresses, stream, index)

    return _started(start, seed.device.index)


def gather(job: Any, messages: int, device: torch.device) -> bool:
    """As `call.select.move`, on a device; False, and nothing done, where there are no kernels."""
    return _started(lambda kernels, *where: kernels.gather(job, messages, *where), device.index)


def _started(start: Callable[[Any, int, int], None], index: int) -> bool:
    """Call `start` with the kernels and torch's current stream of that device. False if there are no kernels."""
    kernels = _kernels()
    if kernels is None or index in _broken:
        return False
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return _started(start, index)
    try:
        start(kernels, raw_stream(index), index)
    except kernels.NotLoadedError as needed:
        return _load(kernels, needed.args, index) and _started(start, index)
    return True


def _load(kernels: Any, variant: tuple[str, int, int, int], index: int) -> bool:
    """Bring a kernel to the current device; not while a graph is captured, which loading may break."""
    if torch.cuda.is_current_stream_capturing():
        _say("a kernel wasn't loaded before a graph was captured", "make the same calls once before capturing")
        return False
    try:
        kernels.load(*variant, torch.cuda.get_device_capability(index))
    except Exception as error:  # a driver that is too old, a device that the compiler doesn't know
        _broken[index] = f"a kernel can't be loaded ({type(error).__name__}: {error})"
        _say(_broken[index], f"update the driver, or {_INSTALL}")
        return False
    return True
