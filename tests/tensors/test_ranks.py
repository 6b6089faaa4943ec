"""Ranks of a gloo world: own masks of a rank, the same ones with ids, and those of recomputed and sharded blocks."""

from __future__ import annotations

import pytest
import torch
from helpers import world

CHECKS = "helpers.on_ranks"

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes that talk"),
]


def all_held(names: list[str], ranks: int) -> None:
    found = world.run(CHECKS, names, ranks)
    assert {name: told for name, told in found.items() if not isinstance(told, int) or told == 0} == {}


def test_two_ranks():
    """In one world, since to start one takes seconds."""
    all_held(["own_masks", "strangers", "global_batches", "checkpoints", "fully_sharded", "pipelines"], 2)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 4])
def test_global_batches_of_any_number_of_ranks(ranks):
    all_held(["global_batches"], ranks)


@pytest.mark.long
def test_compiled_code_on_two_ranks():
    all_held(["compiled_checkpoints"], 2)
