"""Removing in random small cases, bit for bit against naive.py: all rules and layouts, NumPy and torch, cut anyhow."""

from __future__ import annotations

import random
from typing import Any

import naive
import numpy as np
import pytest
import torch
from helpers import internals, oracle
from test_against_naive import DTYPES, bits, case, laid_out, numbers

from msgdrop_numba import Kept, message_select, select_messages


def host(values: Any) -> np.ndarray:
    return values.numpy() if isinstance(values, torch.Tensor) else values


def layouts(rng: random.Random, keep: np.ndarray, lengths: Any) -> dict[str, Any]:
    """A layout, some with a capacity that suffices."""
    layout = rng.choice([None, "padded", "packed"])
    _, counts = naive.select(keep, "padded", lengths=lengths)
    if counts and rng.random() < 0.3:
        needed = sum(counts) if layout == "packed" else max(counts, default=0)
        return {"layout": layout, "capacity": max(1, needed) + rng.randint(0, 3)}
    return {"layout": layout}


def same(kept: Kept, index: np.ndarray, counts: list[int], keep: np.ndarray, lengths: Any) -> None:
    """What is known of a selection is what naive.py finds."""
    size = keep.shape[-1]
    within = np.where(index < 0, -1, index % max(1, size))
    assert bits(kept.indices) == bits(index if kept.layout == "packed" else within)
    valid = keep & naive.part(keep.shape, lengths)
    assert bits(kept.mask) == bits(valid)
    assert host(kept.lengths).shape == keep.shape[:-1]
    assert host(kept.lengths).ravel().tolist() == counts
    assert host(kept.cu_seqlens).tolist() == np.cumsum([0, *counts]).tolist()
    assert str(kept.cu_seqlens.dtype).endswith("int32")
    assert kept.max_length >= max(counts, default=0)
    assert kept.size == size
    assert not kept.overflow
    if kept.layout != "packed":
        assert bits(kept.key_padding_mask) == bits(index < 0)


def check(rng: random.Random, size: int) -> None:
    c = case(rng, size)
    shape, p, seed, keys, lengths = (c[name] for name in ("shape", "p", "seed", "keys", "lengths"))
    rules = {name: value for name, value in c.items() if name not in ("shape", "p", "seed", "keys", "lengths")}
    dims, dtype = len(shape), rng.choice(DTYPES)
    scale = dtype[0] in "fc" and rng.random() < 0.4
    x = numbers(rng, (*shape, *rng.choice([(1,), (3,), (2, 2), (0,), (17,), (1030,)])), dtype)
    options = {"scale": scale, "message_dims": dims, "seed": seed, "lengths": lengths, **rules}
    dropped, keep = oracle.dropout(x, p, keys=keys, **options)
    options |= layouts(rng, keep, lengths)
    nothing_drops = not isinstance(p, np.ndarray) and not np.any(p)
    if nothing_drops:
        options.pop("capacity", None)  # x itself comes back, whatever there is room for
    layout = options["layout"] or ("padded" if "capacity" in options else None)
    fill: Any = numbers(rng, x.shape[dims:], dtype) if rng.random() < 0.3 else 0
    array, tensor = laid_out(rng, x)
    signed = None if keys is None else torch.from_numpy(keys.view(np.int64).copy())
    operations = rng.random() < 0.3
    for x_, keys_ in ((array, keys), (tensor, signed)):
        with pytest.MonkeyPatch.context() as patch:
            if operations and x_ is tensor:
                internals.no_host_tensors(patch)
            y, kept = message_select(x_, p, keys=keys_, **options)
            told = (c, dtype, options, fill, kept)
            known = (nothing_drops or not keep.size) and kept.layout != "packed"  # whatever naive.py counts
            capacity = kept.indices.shape[-1] if known else options.get("capacity")
            assert layout in (None, kept.layout)
            index, counts = naive.select(keep, kept.layout, lengths=lengths, capacity=capacity)
            same(kept, index, counts, keep, lengths)
            if nothing_drops and kept.layout != "packed":
                assert y is x_
                continue
            assert bits(y) == bits(naive.removed(dropped, dims, index)), told
            fill_ = torch.from_numpy(fill) if x_ is tensor and isinstance(fill, np.ndarray) else fill
            assert bits(kept.restore(y, fill_)) == bits(naive.restored(host(y), shape, index, fill)), told
            assert bits(kept.take(x_)) == bits(naive.removed(x, dims, index)), told
    laid = {name: options[name] for name in ("layout", "capacity") if name in options}
    drawn = select_messages(shape, p, seed=seed, keys=keys, lengths=lengths, **laid, **rules)
    assert bits(drawn.indices) == bits(kept.indices)


@pytest.mark.kernels
@pytest.mark.parametrize("seed", range(4))
def test_few_cases(seed, chunks):
    rng = random.Random(seed)
    for _ in range(10):
        check(rng, 9)


@pytest.mark.parametrize("seed", range(2))
def test_a_thousand_cases(seed, monkeypatch):
    rng = random.Random(1000 + seed)
    internals.cut_into(monkeypatch, lambda: rng.randint(1, 8))
    for _ in range(500):
        check(rng, 40)


@pytest.mark.long
def test_twenty_thousand_cases(monkeypatch):
    rng = random.Random(7)
    internals.cut_into(monkeypatch, lambda: rng.randint(1, 8))
    for _ in range(20_000):
        check(rng, 40)
