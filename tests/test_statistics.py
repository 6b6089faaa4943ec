"""The masks are random: rates and independence, on fixed seeds, so that nothing flickers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from msgdrop_numba import keep_mask

ALPHA = 1e-3
ROWS, SIZE = 1000, 10_000


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The p-value of observed counts."""
    return stats.chisquare(counts, probabilities * counts.sum()).pvalue


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.99])
def test_rate_in_ten_million_draws(p):
    dropped = ~keep_mask((ROWS, SIZE), p, seed=20)
    assert dropped.size == 10**7
    assert chi_square(np.bincount(dropped.ravel(), minlength=2), np.array([1 - p, p])) > ALPHA
    # and the same at every position, in every row
    for axis, n in ((0, ROWS), (1, SIZE)):
        counts = dropped.sum(axis=axis)
        spread = ((counts - n * p) ** 2 / (n * p * (1 - p))).sum()
        assert ALPHA < stats.chi2.sf(spread, counts.size) < 1 - ALPHA


def independence(a: np.ndarray, b: np.ndarray) -> float:
    """The p-value of two sets of flags being drawn independently."""
    table = np.bincount(2 * a.ravel().astype(int) + b.ravel(), minlength=4).reshape(2, 2)
    return stats.chi2_contingency(table, correction=False).pvalue


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.99])
def test_neighbours_rows_keys_and_seeds_are_independent(p):
    mask = keep_mask((ROWS, SIZE), p, seed=21)
    for distance in (1, 2, 3, 4, 5, 16):
        assert independence(mask[:, distance:], mask[:, :-distance]) > ALPHA
    assert independence(mask[1:], mask[:-1]) > ALPHA
    assert independence(mask, keep_mask((ROWS, SIZE), p, seed=22)) > ALPHA
    keys = np.arange(ROWS, dtype=np.uint64)
    assert independence(mask, keep_mask((ROWS, SIZE), p, seed=21, keys=keys + np.uint64(2**32))) > ALPHA
    assert independence(mask, keep_mask((ROWS, SIZE), p, seed=21 + 2**32)) > ALPHA


def test_consecutive_seeds_and_keys_give_uniform_patterns():
    """The first four positions of 100,000 consecutive keys, and of as many seeds: all 16 patterns equally often."""
    weights = np.array([1, 2, 4, 8])
    by_key = keep_mask((100_000, 4), 0.5, seed=3) @ weights
    by_seed = np.array([keep_mask(4, 0.5, seed=seed) @ weights for seed in range(100_000)])
    for patterns in (by_key, by_seed):
        assert chi_square(np.bincount(patterns, minlength=16), np.full(16, 1 / 16)) > ALPHA
