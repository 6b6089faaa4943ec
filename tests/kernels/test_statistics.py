"""The masks are random: rates and independence, on fixed seeds, so that nothing flickers."""

from __future__ import annotations

import itertools

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


def test_the_rates_of_a_range_are_uniform_and_rows_independent():
    """Of rows of 10,000 messages the share that drops tells a row's p within 0.005."""
    low, high = 0.2, 0.8
    dropped = ~keep_mask((ROWS, SIZE), (low, high), seed=24)
    rates = dropped.mean(axis=1)
    bins = np.histogram(rates, np.linspace(low, high, 7))[0]
    assert bins.sum() > 0.98 * ROWS
    assert stats.kstest(rates, stats.uniform(low, high - low).cdf).pvalue > ALPHA
    assert chi_square(bins, np.full(6, 1 / 6)) > ALPHA
    assert stats.spearmanr(rates[1:], rates[:-1]).pvalue > ALPHA
    # The mean of the range drops, of rows of their own each time; and at each position what the rows' rates say.
    p, counts, variance = (low + high) / 2, dropped.sum(axis=0), (rates * (1 - rates)).sum()
    one_row_each = dropped[np.arange(ROWS), 7 * np.arange(ROWS)]
    assert chi_square(np.bincount(one_row_each, minlength=2), np.array([1 - p, p])) > ALPHA
    spread = ((counts - rates.sum()) ** 2 / variance).sum()
    assert ALPHA < stats.chi2.sf(spread, SIZE - 1) < 1 - ALPHA


def test_consecutive_seeds_and_keys_give_uniform_patterns():
    """The first four positions of 100,000 consecutive keys, and of as many seeds: all 16 patterns equally often."""
    weights = np.array([1, 2, 4, 8])
    by_key = keep_mask((100_000, 4), 0.5, seed=3) @ weights
    by_seed = np.array([keep_mask(4, 0.5, seed=seed) @ weights for seed in range(100_000)])
    for patterns in (by_key, by_seed):
        assert chi_square(np.bincount(patterns, minlength=16), np.full(16, 1 / 16)) > ALPHA


@pytest.mark.parametrize(("size", "p"), [(5, 0.4), (6, 0.5), (4, 0.75)])
def test_exact_drops_every_subset_equally_often(size, p):
    mask = keep_mask((100_000, size), p, exact=True, seed=7)
    dropped = int(size * p)
    assert ((~mask).sum(axis=1) == dropped).all()
    counts = np.bincount(mask @ (1 << np.arange(size)), minlength=2**size)
    possible = [
        sum(1 << i for i in range(size) if i not in set(c)) for c in itertools.combinations(range(size), dropped)
    ]
    assert counts.sum() == counts[possible].sum()
    assert chi_square(counts[possible], np.full(len(possible), 1 / len(possible))) > ALPHA


@pytest.mark.parametrize("span", [2, 5, 16])
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_span_keeps_the_rate_at_every_position(span, p):
    rows, size = 100_000, 24
    dropped = ~keep_mask((rows, size), p, span=span, seed=7)
    counts = dropped.sum(axis=0)
    pvalues = [stats.binomtest(int(count), rows, p).pvalue for count in counts]
    assert min(pvalues) > ALPHA / size  # the edges too
    # and what drops are runs: neighbours agree unless a span ends between them
    agree = (dropped[:, 1:] == dropped[:, :-1]).mean()
    assert abs(agree - (1 - 2 * p * (1 - p) / span)) < 0.005


def test_min_keep_saves_every_message_equally_often():
    mask = keep_mask((100_000, 6), 1.0, min_keep=2, seed=7)
    assert (mask.sum(axis=1) == 2).all()
    assert chi_square(mask.sum(axis=0), np.full(6, 1 / 6)) > ALPHA


@pytest.mark.parametrize("rule", [{}, {"exact": True}, {"span": 4}, {"min_keep": 3}])
def test_masks_never_land_in_padding(rule):
    lengths = np.arange(200) % 31
    mask = keep_mask((200, 30), 0.9, lengths=lengths, seed=7, **rule)
    padding = np.arange(30) >= lengths[:, None]
    assert mask[padding].all()
    assert not mask[~padding].all()
