"""The golden vectors against every backend, and against naive.py, which says how to make them again."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from helpers.vectors import MASKS, VECTORS, arguments, expected, probability

from msgdrop_numba import fold_in, keep_mask, message_dropout
from msgdrop_numba.call.keys import sample_key
from msgdrop_numba.kernels import philox

pytestmark = pytest.mark.kernels


def test_version():
    assert VECTORS["version"] == 1


@pytest.mark.parametrize("vector", VECTORS["philox4x32_10"])
def test_philox(vector):
    counter, key, out = ([int(word, 16) for word in vector[name]] for name in ("counter", "key", "out"))
    assert list(naive.philox4x32_10(counter, key)) == out
    assert list(philox.philox4x32_10(*map(np.uint64, counter + key))) == out


@pytest.mark.parametrize("vector", VECTORS["draw"])
def test_draws(vector):
    seed, key, stream, draws = (vector[name] for name in ("seed", "key", "stream", "draws"))
    assert [naive.draw(seed, key, i, stream) for i in range(len(draws))] == draws
    words = np.empty(12, np.uint32)
    philox.draw_block(np.uint64(seed), np.uint64(key % 2**64), np.uint64(stream), np.uint64(0), words)
    assert words[: len(draws)].tolist() == draws


@pytest.mark.parametrize("vector", VECTORS["fold_in"])
def test_fold_in(vector):
    assert naive.fold_in(vector["seed"], vector["data"]) == vector["out"]
    assert fold_in(vector["seed"], vector["data"]) == vector["out"]


@pytest.mark.parametrize("vector", VECTORS["string_keys"])
def test_string_keys(vector):
    assert sample_key(vector["id"]) == vector["key"]
    assert sample_key(vector["id"].encode()) == vector["key"]


@pytest.mark.parametrize("vector", VECTORS["keep_masks"])
def test_naive_masks(vector):
    mask = naive.keep_mask(vector["shape"], vector["p"], **arguments(vector))
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
