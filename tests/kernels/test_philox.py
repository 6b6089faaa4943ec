"""The generator of the kernels on the golden vectors, and naive.py's."""

from __future__ import annotations

import naive
import numba
import numpy as np
import pytest
from helpers.vectors import VECTORS

from msgdrop_numba.kernels import philox

pytestmark = pytest.mark.kernels


@numba.njit
def draw_block(seed, key, stream, counter, words):
    philox.draw_block(seed, key, stream, counter, words)


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
    draw_block(np.uint64(seed), np.uint64(key % 2**64), np.uint64(stream), np.uint64(0), words)
    assert words[: len(draws)].tolist() == draws
