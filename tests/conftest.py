"""Fixtures for all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle OpenMP threads sleep: the suite is one of many small calls

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import simulator

from msgdrop_numba.call import threads


@pytest.fixture(params=[1, 2, 3, 8], ids="{} chunks".format)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every kernel call is cut into this many chunks, however small: 1 is the serial kernel."""
    monkeypatch.setattr(threads, "chunks", lambda nbytes: request.param)
    return request.param


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The CUDA kernels, with so small a launch geometry that a handful of messages crosses threads and blocks."""
    yield from simulator.small_geometry(monkeypatch)


@pytest.fixture(autouse=True)
def _quiet_scalars() -> Iterator[None]:
    """Without the compiler the kernels run on NumPy scalars, which warn where compiled code overflows to infinity."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        yield
