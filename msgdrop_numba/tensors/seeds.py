"""Seeds of tensors' calls: drawn as torch draws, from the generator of the device; read, or left on the device."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call import arguments
from msgdrop_numba.tensors.operator import SEED_COUNT, drawn_seed, opaque_seed
from msgdrop_numba.tensors.placement import check_generator, move
from msgdrop_numba.torch_private import in_transform, is_exporting


class _SeedBuffer(threading.local):
    """A tensor to draw seeds into, each thread its own: one shared would be a race."""

    def __getattr__(self, name: str) -> Tensor:
        if name != "drawn":
            raise AttributeError(name)
        # Made at a thread's first draw, which is eager; an import may happen where all new tensors are fake ones.
        with torch.inference_mode(False):
            self.drawn = torch.empty((), dtype=torch.int64, device="cpu")
        return self.drawn


_buffer = _SeedBuffer()


def fresh_seed(generator: Any) -> int:
    """A seed of 63 bits from `generator`, or from torch's default generator of the CPU."""
    if generator is None:
        return _buffer.drawn.random_(SEED_COUNT).item()  # type: ignore[return-value]
    return _buffer.drawn.random_(SEED_COUNT, generator=generator).item()  # type: ignore[return-value]


def check_host_seed(seed: Any, generator: Any, device: torch.device) -> int | None:
    """The seed as a Python integer; None: to be drawn."""
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
    compiled = torch.compiler.is_compiling() and not is_exporting()
    if given is None:
        if compiled and generator is None and not in_transform():
            return drawn_seed(device)
        return torch.randint(0, SEED_COUNT, (), dtype=torch.int64, device=device, generator=generator)
    if isinstance(given, Tensor):
        return move("seed", given, device)
    bits = given if given < 2**63 else given - 2**64
    if compiled:
        return opaque_seed(bits, device)
    return torch.full((), bits, dtype=torch.int64, device=device)
