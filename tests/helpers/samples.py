"""Samples of loaders: tensors of messages, of several lengths and of one."""

from __future__ import annotations

import torch

LENGTHS = (5, 7, 3, 6, 7, 1, 4)


def frames(n: int, i: int = 0) -> torch.Tensor:
    return torch.arange(n * 4, dtype=torch.float32).reshape(n, 4) + 100 * i + 1


SAMPLES = [frames(n, i) for i, n in enumerate(LENGTHS)]
EVEN = [frames(5, i) for i in range(6)]
