"""What people write today instead of message dropout, on tensors `(batch, sequence, features)`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def loop(x: Tensor, p: float) -> Tensor:
    """A Python loop over samples, a fixed count of messages zeroed in each."""
    y = x.clone()
    count = int(x.shape[1] * p)
    for sample in y:
        sample[torch.randperm(len(sample))[:count]] = 0
    return y


def ones_times_mask(x: Tensor, p: float) -> Tensor:
    """A mask of full size, made of ones and zeros, and a multiply."""
    mask = torch.ones_like(x) * (torch.rand(x.shape[:2], device=x.device) >= p).unsqueeze(-1)
    return x * mask


def multiply(x: Tensor, p: float) -> Tensor:
    """A multiply by a mask that is broadcast over the features."""
    return x * (torch.rand(x.shape[:2], device=x.device) >= p).unsqueeze(-1)


def masked_fill(x: Tensor, p: float) -> Tensor:
    """The dropped messages filled with zeros."""
    return x.masked_fill((torch.rand(x.shape[:2], device=x.device) < p).unsqueeze(-1), 0.0)


def dropout1d(x: Tensor, p: float) -> Tensor:
    """torch's own channel dropout, which scales."""
    return functional.dropout1d(x, p)


def dropout(x: Tensor, p: float) -> Tensor:
    """torch's dropout of single elements, which scales."""
    return functional.dropout(x, p)


compiled_multiply: Any = torch.compile(multiply, dynamic=False)
compiled_dropout1d: Any = torch.compile(dropout1d, dynamic=False)
compiled_multiply.__name__, compiled_dropout1d.__name__ = "compiled multiply", "compiled dropout1d"


def numpy_multiply(x: Any, p: float) -> Any:
    """The multiply on an array."""
    return x * (np.random.default_rng().random(x.shape[:2]) >= p)[..., None]


def numpy_index(x: Any, p: float) -> Any:
    """The dropped messages of a copy set to zero by a boolean index."""
    y = x.copy()
    y[np.random.default_rng().random(x.shape[:2]) < p] = 0
    return y


def clone(x: Tensor, p: float) -> Tensor:
    """No dropout: the cost of a copy into new memory."""
    return x.clone()


TENSORS = (
    loop, ones_times_mask, multiply, masked_fill, dropout1d, dropout, compiled_multiply, compiled_dropout1d, clone,
)  # fmt: skip
ARRAYS = (numpy_multiply, numpy_index)
