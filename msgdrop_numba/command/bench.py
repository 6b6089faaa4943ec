"""A short benchmark on this machine: `message_dropout` against what people write today, interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.benchmark import Timer

from msgdrop_numba import message_dropout


def seconds(contestants: dict[str, Callable[[], Any]], rounds: int, least: float) -> dict[str, float]:
    """The median time of a call of each contestant, in seconds; a round of each takes at least `least` seconds."""
    timers = {
        name: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()) for name, f in contestants.items()
    }
    calls = {}
    for name, timer in timers.items():
        timer.timeit(2)
        calls[name] = max(1, int(least / max(timer.timeit(3).mean, 1e-7)))
    return medians({name: partial(_mean, timer, calls[name]) for name, timer in timers.items()}, rounds)


def _mean(timer: Timer, calls: int) -> float:
    return float(timer.timeit(calls).mean)


def medians(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each case gives, once a round, there and back; a first round is for warming up."""
    values: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name in list(cases)[:: 1 if number % 2 else -1]:  # each case leaves its traces in the cache for the next
            value = cases[name]()
            if number:
                values[name].append(value)
    return {name: statistics.median(found) for name, found in values.items()}


def run(shape: tuple[int, ...], p: float, rounds: int) -> dict[str, float]:
    """Median seconds of a call on a float32 tensor of `shape`, new outputs and masks each time."""
    x = torch.randn(shape)
    contestants: dict[str, Callable[[], Any]] = {
        "message_dropout": lambda: message_dropout(x, p),
        "F.dropout1d": lambda: F.dropout1d(x, p),
        "masked_fill": lambda: x.masked_fill(torch.rand(*shape[:2], 1) < p, 0),
        "x.clone(), drops nothing": x.clone,
    }
    return seconds(contestants, rounds, 0.02)
