"""Numba's CUDA simulator, which is chosen when numba is imported: test files run themselves again in another process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from helpers import internals

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

needs_numba_cuda = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason='numba-cuda isn\'t installed: pip install "numba-cuda[cu13]"'
)
simulated = pytest.mark.skipif(not SIMULATED, reason="runs in the process that a test of this file starts")
compiled = pytest.mark.skipif(SIMULATED, reason="the simulator has no compiler")


def in_the_simulator(path: str, folder: Path, *options: str) -> int:
    """Run a test file's simulated tests, which must pass, in a process of their own; returns how many did."""
    report = folder / "report.xml"
    command = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", f"--junitxml={report}", *options, path]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
    )  # fmt: skip
    said = done.stdout[-4000:] + done.stderr[-4000:]
    if not report.exists():
        pytest.fail(f"the run in the simulator ended with {done.returncode} before it made its report:\n{said}")
    cases, failed = list(ElementTree.parse(report).iter("testcase")), []
    for case in cases:
        for outcome in (*case.iter("failure"), *case.iter("error")):
            why = (outcome.get("message") or "").strip().splitlines()[:3]
            failed.append(f"{case.get('classname')}::{case.get('name')}: " + " ".join(why))
    if failed:
        pytest.fail(f"{len(failed)} of {len(cases)} failed in the simulator:\n" + "\n".join(failed) + "\n\n" + said)
    assert done.returncode == 0, said
    return sum(next(case.iter("skipped"), None) is None for case in cases)


def small_geometry(patch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The kernels with so small a launch geometry that a handful of messages crosses threads, tiles and blocks."""
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    from msgdrop_numba.kernels import cuda, cuda_launch, cuda_rules

    internals.reset_launches(patch)
    patch.setattr(FakeCUDAShared, "array", _shared_array)
    for module, name, value in [
        (cuda, "THREADS", 8), (cuda_launch, "THREADS", 8), (cuda_launch, "SELECT_THREADS", 3),
        (cuda_launch, "BLOCKS", 4), (cuda_launch, "MAX_GRID", (3, 2)), (cuda_rules, "BITS", 4), (cuda_rules, "BINS", 16),
    ]:  # fmt: skip
        patch.setattr(module, name, value)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # the simulator's threads are Python's, and its manager polls them
    yield cuda
    sys.setswitchinterval(interval)
    internals.reset_launches(patch)


def _shared_array(shared: Any, shape: Any, dtype: Any) -> np.ndarray:
    """Shared memory by the line that asks for it, in one step: two threads of numba's own may end up with one each."""
    frame = sys._getframe(1)
    return shared._allocations.setdefault((frame.f_code, frame.f_lineno), np.empty(shape, dtype))
