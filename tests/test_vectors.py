"""The golden vectors against every backend, and against naive.py, which says how to make them again."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from helpers.vectors import ADDED, MASKS, VECTORS, arguments, expected, probability

from msgdrop_numba import fold_in, keep_mask, message_dropout
from msgdrop_numba.call.keys import row_key

pytestmark = pytest.mark.kernels


def test_version():
    assert VECTORS["version"] == 1
    assert ADDED["version"] == "1.1"


@pytest.mark.parametrize("vector", ADDED["row_thresholds"])
def test_row_thresholds(vector):
    assert naive.row_threshold(tuple(vector["p"]), vector["seed"], vector["key"]) == vector["threshold"]


@pytest.mark.parametrize("vector", VECTORS["fold_in"])
def test_fold_in(vector):
    assert naive.fold_in(vector["seed"], vector["data"]) == vector["out"]
    assert fold_in(vector["seed"], vector["data"]) == vector["out"]


@pytest.mark.parametrize("vector", VECTORS["string_keys"])
def test_string_keys(vector):
    assert row_key(vector["id"]) == vector["key"]
    assert row_key(vector["id"].encode()) == vector["key"]


@pytest.mark.parametrize("vector", MASKS)
def test_naive_masks(vector):
    mask = naive.keep_mask(vector["shape"], probability(vector), **arguments(vector))
    assert np.array_equal(mask, expected(vector))


@pytest.mark.parametrize("vector", MASKS)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_keep_masks(vector, device, chunks):
    mask = keep_mask(tuple(vector["shape"]), probability(vector), device=device, **arguments(vector))
    assert mask.dtype == (np.bool_ if device is None else torch.bool)
    assert np.array_equal(np.asarray(mask), expected(vector))


@pytest.mark.parametrize("vector", MASKS)
@pytest.mark.parametrize("make", [np.ones, torch.ones])
def test_message_dropout(vector, make, chunks):
    y, mask = message_dropout(make((*vector["shape"], 2)), probability(vector), return_mask=True, **arguments(vector))
    assert np.array_equal(np.asarray(mask), expected(vector))
    assert np.array_equal(np.asarray(y), np.repeat(expected(vector)[..., None], 2, axis=2))
