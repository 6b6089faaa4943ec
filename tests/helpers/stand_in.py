"""A CUDA device that is none: host memory in its place, the CPU's kernels behind the addresses that it is given.

What torch's side does for the device (seeds, arguments, autograd, streams) runs as it would there. In numba's simulator
the CUDA kernels themselves run. Where there is a GPU, the same tests run on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from helpers import internals
from msgdrop_numba.kernels import cpu, gather, rules
from msgdrop_numba.kernels._jit import compiled
from msgdrop_numba.kernels.memory import view
from msgdrop_numba.kernels.records import GATHER, MASK_ARGS, PLAN


class Kernels:
    """In the place of kernels.cuda_launch."""

    class NotLoadedError(Exception):
        pass

    def __init__(self) -> None:
        self.loaded: set[Any] = set()
        self.fails: Exception | None = None
        self.launches = self.loads = 0
        self.stream: Any = None

    def load(self, *variant: Any) -> None:
        self.loads += 1
        if self.fails is not None:
            raise self.fails
        self.loaded.add(variant[:-1])

    def started(self, name: str, kind: int, stream: int, device: Any) -> None:
        variant = (name, 16, kind, device)
        if variant not in self.loaded:
            raise self.NotLoadedError(*variant)
        self.launches += 1
        self.stream = stream

    def refuse_overlap(self, plan: Any, draw: Any, messages: int, inner: int, out: int, seed: int) -> None:
        """Blocks on a device read their arguments while others write."""
        rows = messages // plan.size
        end = out + (rows - 1) * plan.out_row + (plan.size - 1) * plan.out_step + plan.width
        written = range(out, end if out else out)
        read = {
            seed: 8, draw.fill: plan.width, draw.lengths: 8 * rows, draw.keys: 8 * rows // (inner or 1),
            draw.thresholds: 8, draw.scales: 8, draw.protect: rows * draw.protect_row or plan.size,
            draw.taking: 8 * rows, draw.positions: rows * draw.positions_row or 8 * plan.size,
        }  # fmt: skip
        for start, size in read.items():
            assert not start or start >= written.stop or start + size <= written.start

    def launch(
        self, plan: Any, draw: Any, messages: int, inner: int, addresses: Any, stream: int, device: Any
    ) -> None:  # fmt: skip
        x, out, mask, seed, limits = addresses
        self.started("drop", plan.kind if out else 0, stream, device)
        self.refuse_overlap(plan, draw, messages, inner, out, seed)
        record, arguments = np.zeros(1, PLAN), np.zeros(1, MASK_ARGS)
        record[0], arguments[0] = tuple(plan), tuple(draw)
        rows = messages // plan.size
        if draw.keys and inner:
            keys = np.empty(rows, np.uint64)
            rules.fold_rows(draw.keys, inner, 0, rows, keys.ctypes.data)
            arguments["keys"] = keys.ctypes.data
        if plan.count_limited and not draw.given:
            view(limits, 2 * rows, np.int64)[:] = -1  # memory that is there
        bits = int(view(seed, 1, np.int64)[0])
        addresses = record.ctypes.data, arguments.ctypes.data
        cpu.drop_range(0, messages, *addresses, x, out, mask, bits, 0 if draw.given else compiled(rules.decide))

    def gather(self, job: Any, messages: int, stream: int, device: Any) -> None:
        self.started("gather", job.kind, stream, device)
        record = np.zeros(1, GATHER)
        record[0] = tuple(job)
        gather.gather_range(0, messages, record.ctypes.data)


def install(patch: pytest.MonkeyPatch, kernels: Any) -> None:
    """Let CPU tensors take the way of CUDA tensors, with these kernels."""
    internals.cuda_tensors(patch, kernels)
    patch.setattr(torch.cuda, "current_device", lambda: None)
    patch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
