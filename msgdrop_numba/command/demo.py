"""The demo: does message dropout in training help a speaker classifier when frames are lost at test time?

Japanese Vowels (Kudo, Toyama, Shimbo 1999, UCI; carried by sktime): 9 speakers, 270 training and 370 test utterances
of 7 to 29 frames of 12 cepstrum coefficients. A frame is a message.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from msgdrop_numba import KeyedDataset, MessageDropout, MessageDropoutCollate, message_dropout

RANGE = (0.0, 0.9)  # of which each utterance draws its p, in the last arm
ARMS = ("no dropout", "nn.Dropout", "message dropout", f"message dropout, p in ({RANGE[0]:g}, {RANGE[1]:g})")
LOST = (0.0, 0.2, 0.4, 0.6, 0.8)  # fractions of the frames lost at test time
BETWEEN = 0.2  # dropout between the recurrent layers, in the arms that have dropout
HIDDEN, BATCH, LEARNING_RATE = 64, 32, 3e-3

Sample = tuple[Tensor, int]


class Result(NamedTuple):
    """Test accuracy of one trained network at one fraction of lost frames."""

    arm: str
    seed: int
    lost: float
    accuracy: float


class SpeakerNet(nn.Module):
    """Two GRU layers, dropout before and between them, a linear readout of the last valid state."""

    def __init__(self, features: int, classes: int, before: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.before, self.between = before, between
        self.first = nn.GRU(features, HIDDEN, batch_first=True)
        self.second = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.readout = nn.Linear(HIDDEN, classes)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        states = self.between(self.first(self.before(frames))[0])
        # No dropout after the second layer: it would drop whole samples where the last state is read.
        states = self.second(states)[0]
        return self.readout(states[torch.arange(len(states)), lengths - 1])  # type: ignore[no-any-return]


def load(split: str) -> list[Sample]:
    """The utterances of `split` as (frames, speaker), frames (messages, 12) float32."""
    from sktime.datasets import load_japanese_vowels

    table, speakers = load_japanese_vowels(split=split, return_X_y=True, return_type="nested_univ")
    utterances = []
    for (_, row), speaker in zip(table.iterrows(), speakers, strict=True):
        frames = torch.tensor([column.to_list() for column in row], dtype=torch.float32).T.contiguous()
        utterances.append((frames, int(speaker) - 1))
    return utterances


def train_one(arm: str, train: list[Sample], p: float, epochs: int, seed: int, tick: Callable[[], None]) -> SpeakerNet:
    """One network of `arm`, trained from `seed`."""
    torch.manual_seed(seed)
    before: nn.Module = nn.Dropout(p) if arm == "nn.Dropout" else nn.Identity()
    between: nn.Module = nn.Identity()
    frames_p = dict(zip(ARMS[2:], (p, RANGE), strict=True)).get(arm, 0.0)
    if arm == "nn.Dropout":
        between = nn.Dropout(BETWEEN)
    elif arm in ARMS[2:]:
        between = MessageDropout(BETWEEN)
    net = SpeakerNet(train[0][0].shape[1], 1 + max(speaker for _, speaker in train), before, between)
    collate = MessageDropoutCollate(frames_p, pad=True, seed=seed)
    loader = DataLoader(KeyedDataset(train), batch_size=BATCH, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    for epoch in range(epochs):
        collate.set_epoch(epoch)
        for frames, speakers, lengths in loader:
            loss = nn.functional.cross_entropy(net(frames, lengths), speakers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tick()
    return net.eval()


@torch.no_grad()
def accuracy(net: SpeakerNet, test: tuple[Tensor, Tensor, Tensor], lost: float, seed: int) -> float:
    """The fraction of utterances whose speaker is found when `lost` of the frames are zeroed, the same in each arm."""
    frames, speakers, lengths = test
    frames = message_dropout(frames, lost, lengths=lengths, seed=seed)
    return float((net(frames, lengths).argmax(dim=1) == speakers).float().mean())


def run(p: float, epochs: int, seeds: int, tick: Callable[[], None]) -> list[Result]:
    """All arms and seeds; `tick` is called after every epoch. Torch's thread count and generator stay as they were."""
    train, test = load("train"), load("test")
    mean = torch.cat([frames for frames, _ in train]).mean(dim=0)
    spread = torch.cat([frames for frames, _ in train]).std(dim=0)
    train = [((frames - mean) / spread, speaker) for frames, speaker in train]
    test = [((frames - mean) / spread, speaker) for frames, speaker in test]
    batch = MessageDropoutCollate(0.0, pad=True)(test)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast as two on a network this small, and far steadier
    try:
        with torch.random.fork_rng(devices=[]):
            return [
                Result(arm, seed, lost, accuracy(net, batch, lost, seed))
                for arm in ARMS
                for seed in range(seeds)
                for net in [train_one(arm, train, p, epochs, seed, tick)]
                for lost in LOST
            ]
    finally:
        torch.set_num_threads(threads)


def summary(results: list[Result]) -> dict[str, list[tuple[float, float]]]:
    """Mean and standard deviation over the seeds, for each arm and fraction in `LOST`."""
    table: dict[str, list[tuple[float, float]]] = {}
    for arm in ARMS:
        columns = [[r.accuracy for r in results if r.arm == arm and r.lost == lost] for lost in LOST]
        table[arm] = [(statistics.fmean(c), statistics.stdev(c) if len(c) > 1 else 0.0) for c in columns]
    return table


def save(results: list[Result], settings: dict[str, Any], picture: Path) -> Path:
    """Write the plot to `picture` and the numbers beside it, as JSON; returns the latter's path."""
    from matplotlib.figure import Figure

    table = summary(results)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for arm, style in zip(ARMS, ("o:", "s--", "D-", "^-"), strict=True):
        means, spreads = zip(*table[arm], strict=True)
        axes.errorbar(
            [100 * lost for lost in LOST], [100 * m for m in means], [100 * s for s in spreads],
            fmt=style, capsize=3, label=arm,
        )  # fmt: skip
    axes.set_xlabel("frames lost at test time (%)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"Japanese Vowels, trained with p = {settings['p']:g}: mean and spread of {settings['seeds']} seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
    numbers = picture.with_suffix(".json")
    record = {"settings": settings, "lost": LOST, "accuracy": table, "runs": [r._asdict() for r in results]}
    numbers.write_text(json.dumps(record, indent=1) + "\n")
    return numbers
