"""Loaders of keyed samples, and the epoch that a batch's masks are of, found by the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from helpers import oracle
from helpers.samples import frames
from msgdrop_numba import KeyedDataset, MessageDropoutCollate

SEED, COUNT, BATCH = 11, 8, 2
STEPS = COUNT // BATCH  # of an epoch
DATA = [{"x": frames(24, i), "id": i} for i in range(COUNT)]
WANT = [
    torch.from_numpy(oracle.dropout(torch.stack([sample["x"] for sample in DATA]), seed=SEED, epoch=epoch)[0])
    for epoch in range(6)
]
for a, b in itertools.combinations(WANT, 2):
    assert not (a == b).all(dim=(1, 2)).any()  # each sample tells the epochs apart


def dataset() -> KeyedDataset:
    return KeyedDataset(DATA)


def collate() -> MessageDropoutCollate:
    return MessageDropoutCollate(0.5, fields="x", seed=SEED)


def epoch_of(batch: dict[str, Any]) -> int:
    """The epoch whose masks all samples of the batch have, as a plain loop with `set_epoch` makes them."""
    (epoch,) = [epoch for epoch, rows in enumerate(WANT) if torch.equal(batch["x"], rows[batch["id"]])]
    return epoch


def epochs_of(batches: Any) -> list[int]:
    return [epoch_of(batch) for batch in batches]


def ids_of(batches: Any) -> list[int]:
    return torch.cat([batch["id"] for batch in batches]).tolist()


def each_rank(seen: list[Any], ranks: int = 2, whole: Iterable[int] = range(3), first: int = 0) -> None:
    """Each rank's masks are the plain loop's, epoch for epoch, and the ranks share the samples of the `whole` epochs."""
    steps = STEPS // ranks
    assert len(seen) == ranks
    told = [first + epoch for epoch in range(3) for _ in range(steps)]
    assert [epochs_of(batches) for batches in seen] == [told] * ranks
    for epoch in whole:
        ids = [i for batches in seen for i in ids_of(batches[epoch * steps : (epoch + 1) * steps])]
        assert sorted(ids) == list(range(COUNT))
