"""How many samples a second does a DataLoader give, with dropout in its collate? float32, p = 0.5.

The datasets are lists in memory, larger than the cache, so that the collate is what takes the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, default_collate

from benchmarks import peers
from benchmarks.measure import machine, markdown
from msgdrop_numba import KeyedDataset, MessageDropoutCollate
from msgdrop_numba.command.bench import medians

P = 0.5
SIZES = {"64 × (256, 512)": (64, 256, 512, 12), "32 × (16, 128)": (32, 16, 128, 300)}  # and batches an epoch


class Peer:
    """A batch as torch makes it, with its lengths where it is padded, and what is done to it then."""

    def __init__(self, padded: bool, drop: Callable[[Tensor, float], Tensor] | None) -> None:
        self.padded, self.drop = padded, drop

    def __call__(self, samples: list[Tensor]) -> Any:
        batch = pad_sequence(samples, batch_first=True) if self.padded else default_collate(samples)
        if self.drop is not None:
            batch = self.drop(batch, P)
        return (batch, torch.tensor([len(sample) for sample in samples])) if self.padded else batch


def epoch(loader: Any, samples: int) -> float:
    """Samples a second over all batches of a loader; their data aren't looked at."""
    start = time.perf_counter()
    for _ in loader:
        pass
    return samples / (time.perf_counter() - start)


def loaders(size: str, padded: bool, workers: int) -> dict[str, Any]:
    """A loader for ours and for each peer."""
    count, messages, features, batches = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    shortest = messages // 2 if padded else messages
    lengths = torch.randint(shortest, messages + 1, (batches * count,), generator=generator)
    lengths[::count] = messages  # all batches are of one size
    data = [torch.randn(int(n), features, generator=generator) for n in lengths]
    collates = {
        "ours": MessageDropoutCollate(P, pad=padded),
        "masked_fill": Peer(padded, peers.masked_fill),
        "dropout1d": Peer(padded, peers.dropout1d),
        "no dropout": Peer(padded, None) if padded else default_collate,
    }
    made = {
        name: DataLoader(data, count, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate)
        for name, collate in collates.items()
    }
    keyed = KeyedDataset(data)
    keyed.set_epoch(0)
    made["ours, keyed"] = DataLoader(
        keyed, count, num_workers=workers, persistent_workers=workers > 0,
        collate_fn=MessageDropoutCollate(P, pad=padded, seed=1),
    )  # fmt: skip
    return made


def run(rounds: int) -> dict[str, Any]:
    """Samples a second of every contestant, size, kind of lengths and number of workers."""
    rows = []
    for size, (count, _, _, batches) in SIZES.items():
        for padded in (False, True):
            for workers in (0, 2):
                cases = {
                    name: partial(epoch, loader, count * batches)
                    for name, loader in loaders(size, padded, workers).items()
                }
                speeds = medians(cases, rounds)
                lengths = "padded" if padded else "fixed"
                rows.append({"samples": size, "lengths": lengths, "workers": workers, "samples_per_second": speeds})
                print(size, lengths, workers, {name: round(speed) for name, speed in speeds.items()}, flush=True)
    return {"machine": machine(), "p": P, "dtype": "float32", "rounds": rounds, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """How many times as many samples a second as each peer; with ids, of ours without."""
    rows, peers_measured = [], ["masked_fill", "dropout1d", "no dropout"]
    for row in results["rows"]:
        speeds = row["samples_per_second"]
        ratios = [f"{speeds['ours'] / speeds[name]:.2f}" for name in peers_measured]
        label = f"{row['samples']}, {row['lengths']}"
        with_ids = f"{speeds['ours, keyed']:,.0f}"
        rows.append([label, str(row["workers"]), f"{speeds['ours']:,.0f}", *ratios, with_ids])
    return markdown(["batch", "workers", "ours, samples/s", *peers_measured, "ours with ids, samples/s"], rows)


def bars(results: dict[str, Any]) -> dict[str, float]:
    """How many times as many samples a second as with default_collate and masked_fill."""
    rows = [(row, row["samples_per_second"]) for row in results["rows"]]
    return {
        f"{row['samples']}, {row['lengths']}, {row['workers']} workers": t["ours"] / t["masked_fill"] for row, t in rows
    }
