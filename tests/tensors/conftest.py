"""Devices for tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import stand_in
from helpers.cases import no_gpu
from helpers.simulator import SIMULATED


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])
def device(request: pytest.FixtureRequest, reset_cuda: None, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device, or the CPU in its place: with stand-in kernels, in the simulator's process with the real ones."""
    if request.param == "cuda":
        return torch.device("cuda:0")
    kernels: Any = stand_in.Kernels()
    if SIMULATED:
        request.getfixturevalue("small")
        from msgdrop_numba.kernels import cuda_launch as kernels
    stand_in.install(monkeypatch, kernels)
    return torch.device("cpu")
