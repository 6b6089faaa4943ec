"""The mask in plain torch operations, which no kernel takes part in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.vectors import MASKS, arguments, expected, probability

from msgdrop_numba import keep_mask
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import ArrayRule, Rule
from msgdrop_numba.tensors import operations as tensor
from msgdrop_numba.tensors.arguments import rows_on


def tensor_mask(vector: dict) -> torch.Tensor:
    given, shape, p = arguments(vector), tuple(vector["shape"]), probability(vector)
    seed = given.pop("seed")
    own = {name: given.pop(name, None) for name in ("lengths", "keys", "protect", "positions")}
    array = tensor.thresholds(torch.from_numpy(p)) if isinstance(p, np.ndarray) else None
    rule = Rule(p, **given) if array is None else ArrayRule(None, **given)
    return tensor.keep_mask(
        shape,
        rule,
        torch.tensor(seed - 2**64 if seed >= 2**63 else seed),
        rows_on(Request(rule, **own), shape, torch.device("cpu")),
        array,
    )


@pytest.mark.kernels
@pytest.mark.parametrize("vector", MASKS)
def test_vectors(vector):
    assert np.array_equal(tensor_mask(vector), expected(vector))


@pytest.mark.parametrize("span", [2**31, 2**34])
def test_huge_spans(span):
    for seed in range(8):
        got = tensor.keep_mask((3, 50), Rule(0.5, span=span), torch.tensor(seed), tensor.RowArgs(), None)
        assert np.array_equal(got, keep_mask((3, 50), 0.5, span=span, seed=seed))
