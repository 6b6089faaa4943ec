"""Calls that several test files make, on arrays, on tensors and on tensors of a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def tensor(array: Any) -> torch.Tensor:
    """A copy."""
    return torch.from_numpy(np.array(array))


both = pytest.mark.parametrize("make", [np.array, tensor], ids=["numpy", "torch"])

# On a device.
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch finds none")
SHAPE = (3, 7, 4)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"exact": True},
    {"span": 3},
    {"min_keep": 3},
    {"exact": True, "min_keep": 5, "scale": True, "lengths": [7, 0, 4]},
    {"span": 2, "min_keep": 2, "lengths": [1, 7, 5], "keys": [2**63 + 5, -1, 0]},
    {"scale": True, "fill": -2.5},
    {"scale": True, "lengths": [2, 7, 0]},
    {"p": np.array([0.1, 0.9, 0.0, 1.0, 0.3, 0.5, 0.7]), "scale": True},
    {"p": np.linspace(0, 1, 21).reshape(3, 7), "min_keep": 1},
    {"p": 1.0, "min_keep": 2, "scale": True},
    {"message_dims": 1},
    {"prefix": 2, "exact": True, "scale": True, "lengths": [7, 1, 5]},
    {"positions": 1000, "prefix": 1},
    {"positions": 2**34 - 7, "p": (0.2, 0.8), "scale": True},
    {
        "p": (0.3, 1.0),
        "protect": np.arange(21).reshape(3, 7) % 4 == 1,
        "exact": True,
        "keys": [7, -1, 0],
        "scale": True,
    },
    {"span": 2, "min_keep": 2, "protect": np.arange(7) == 3, "positions": 5 * np.arange(21)[::-1].reshape(3, 7) % 17},
]

# The same for tracing and transforms.
TRACED_OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": True},
    {"exact": True, "scale": True, "lengths": [9, 0, 4, 5]},
    {"span": 3, "min_keep": 4, "fill": 2.5},
    {"keys": [-1, 2, 2**63, 7], "lengths": [9, 0, 4, 5]},
    {"prefix": 2, "protect": np.arange(36).reshape(4, 9) % 5 == 1, "positions": 6, "span": 4, "scale": True},
    {
        "protect": torch.arange(9) % 4 == 1,
        "positions": torch.arange(36).reshape(4, 9) // 2,
        "exact": True,
        "scale": True,
    },
]
TRACED_IDS = [",".join(option) or "default" for option in TRACED_OPTIONS]
TRACED_X = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0))


def mask_alone(options: dict[str, Any]) -> dict[str, Any]:
    """Those of a call's options that `keep_mask` takes."""
    return {name: value for name, value in options.items() if name not in ("scale", "fill", "message_dims")}


def moved(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """The same options with their arrays as tensors on the device."""
    there = dict(options)
    for name in ("p", "lengths", "keys", "protect", "positions"):
        if np.ndim(there.get(name, 0)) and not isinstance(there[name], tuple):
            values = np.array([value % 2**64 for value in there[name]], np.uint64) if name == "keys" else there[name]
            there[name] = torch.from_numpy(np.array(values)).to(device)
    return there


def equal(got: torch.Tensor, expected: np.ndarray) -> None:
    """Bit for bit."""
    host = got.cpu().numpy()
    assert host.dtype == expected.dtype
    assert np.ascontiguousarray(host).tobytes() == np.ascontiguousarray(expected).tobytes()
