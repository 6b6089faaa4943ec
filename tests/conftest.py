"""Fixtures for all tests. Those that change or clear the package's inner state do so through `helpers.internals`."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle OpenMP threads sleep: the suite is one of many small calls

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers import internals, simulator


@pytest.fixture(params=[1, 2, 3, 8], ids="{} chunks".format)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every kernel call is cut into this many chunks, however small: 1 is the serial kernel."""
    internals.cut_into(monkeypatch, request.param)
    return request.param


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The CUDA kernels, with so small a launch geometry that a handful of messages crosses threads and blocks."""
    yield from simulator.small_geometry(monkeypatch)


@pytest.fixture
def compiled() -> Callable[..., Any]:
    """`torch.compile` of whole functions, with nothing left of earlier ones."""
    import torch

    torch._dynamo.reset()
    return lambda f, **options: torch.compile(f, fullgraph=True, **options)


# ---- module state, cleared before and after


@pytest.fixture
def reset_plans() -> Iterator[None]:
    internals.reset_plans()
    yield
    internals.reset_plans()


@pytest.fixture
def reset_outputs() -> Iterator[None]:
    internals.reset_outputs()
    yield
    internals.reset_outputs()


@pytest.fixture
def reset_cuda() -> Iterator[None]:
    """Ask for it before `monkeypatch`, which then undoes its patches first."""
    internals.reset_cuda()
    yield
    internals.reset_cuda()


@pytest.fixture(autouse=True)
def _quiet_scalars() -> Iterator[None]:
    """Without the compiler the kernels run on NumPy scalars, which warn where compiled code overflows to infinity."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        yield
