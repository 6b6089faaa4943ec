"""What does dropout add to a training step? The step's time less that of the same step without it. float32, p = 0.3."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import machine, markdown
from msgdrop_numba import MessageDropout
from msgdrop_numba.command.bench import medians

P = 0.3
BATCH = (64, 128, 64)  # small models, so that the layer's part isn't lost in the noise of the rest
STEPS = 20  # a round


class Recurrent(nn.Module):
    """Two GRU layers with a layer of dropout between."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.first, self.drop, self.second = (
            nn.GRU(64, 64, batch_first=True),
            drop,
            nn.GRU(64, 64, batch_first=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The mean output."""
        return self.second(self.drop(self.first(x)[0]))[0].mean()


class Attention(nn.Module):
    """Two transformer layers with a layer of dropout between."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        options: Any = {"dim_feedforward": 128, "dropout": 0.0, "batch_first": True}
        self.layers = nn.Sequential(
            nn.TransformerEncoderLayer(64, 4, **options), drop, nn.TransformerEncoderLayer(64, 4, **options)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The mean output."""
        return self.layers(x).mean()


def step(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = lambda y: y) -> Callable[[], float]:
    """One step of training, and how many milliseconds it took."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def run_step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
        return 1e3 * (time.perf_counter() - start)

    return run_step


def run(rounds: int) -> dict[str, Any]:
    """Milliseconds of a step, the steps of all contestants taking turns."""
    x, times = torch.randn(BATCH), {}
    layers: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity, "message dropout": lambda: MessageDropout(P), "dropout1d": lambda: nn.Dropout1d(P),
    }  # fmt: skip
    for name, model in (("GRU", Recurrent), ("transformer", Attention)):
        steps = {}
        for layer, make in layers.items():
            torch.manual_seed(0)
            steps[f"{name}, {layer}"] = step(model(make()), x)
        times |= medians(steps, rounds * STEPS)
    print({label: round(t, 3) for label, t in times.items()}, flush=True)
    return {"machine": machine(), "p": P, "batch": BATCH, "rounds": rounds, "milliseconds": times}


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    rows = []
    for name in ("GRU", "transformer"):
        none, ours, theirs = (
            results["milliseconds"][f"{name}, {layer}"] for layer in ("none", "message dropout", "dropout1d")
        )
        rows.append([name, f"{none:.2f}", f"{ours - none:+.3f}", f"{theirs - none:+.3f}"])
    return markdown(["step", "without dropout, ms", "message dropout adds, ms", "`nn.Dropout1d` adds, ms"], rows)


def bars(results: dict[str, Any]) -> dict[str, float]:
    """A step's time with each layer over its time without."""
    t = results["milliseconds"]
    layers = ("message dropout", "dropout1d")
    return {
        f"{name}, {layer}": t[f"{name}, {layer}"] / t[f"{name}, none"]
        for name in ("GRU", "transformer")
        for layer in layers
    }
