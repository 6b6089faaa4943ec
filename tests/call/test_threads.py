"""How many threads a job gets; what becomes of them is in test_survival.py."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from msgdrop_numba.call import threads
from msgdrop_numba.call.plan import PARALLEL_BYTES


def test_the_budget(monkeypatch):
    monkeypatch.setattr(threads._layer, "forked", False)
    monkeypatch.setattr(threads._layer, "usable", True)
    monkeypatch.setattr(threads.config, "NUMBA_NUM_THREADS", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    big = PARALLEL_BYTES
    assert threads.chunks(big) == 3
    assert threads.chunks(big - 1) == 1
    monkeypatch.setattr(threads.config, "NUMBA_NUM_THREADS", 2)
    assert threads.chunks(big) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads.chunks(big) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert threads.chunks(big) == 2  # torch has read the variable, and may have been told otherwise since
    monkeypatch.delitem(sys.modules, "torch")
    for variable, parts in [("1", 1), ("2,3", 2), (" 8", 2), ("", 2), ("dynamic", 2)]:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        assert threads.chunks(big) == parts
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads.chunks(big) == 2
    monkeypatch.setattr(threads._layer, "usable", False)
    assert threads.chunks(big) == 1
    monkeypatch.setattr(threads._layer, "usable", True)
    monkeypatch.setattr(threads._layer, "forked", True)
    assert threads.chunks(big) == 1


@pytest.mark.kernels
def test_loading_warns_of_nothing():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        threads.load()
    assert not told
