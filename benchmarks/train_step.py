"""What does dropout add to a training step? The step's time less that of the same step without it. float32, p = 0.3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import machine, markdown, seconds
from msgdrop_numba import MessageDropout

P = 0.3
BATCH = (32, 64, 256)


class Recurrent(nn.Module):
    """Two GRU layers with a layer of dropout between."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.first, self.drop, self.second = (
            nn.GRU(256, 256, batch_first=True),
            drop,
            nn.GRU(256, 256, batch_first=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The mean output."""
        return self.second(self.drop(self.first(x)[0]))[0].mean()


class Attention(nn.Module):
    """Two transformer layers with a layer of dropout between."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        options: Any = {"dim_feedforward": 512, "dropout": 0.0, "batch_first": True}
        self.layers = nn.Sequential(
            nn.TransformerEncoderLayer(256, 4, **options), drop, nn.TransformerEncoderLayer(256, 4, **options)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The mean output."""
        return self.layers(x).mean()


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One step of training."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def run_step() -> None:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()

    return run_step


def run(rounds: int) -> dict[str, Any]:
    """Milliseconds of a step, and of the layer's part alone: its forward and backward."""
    x, times = torch.randn(BATCH), {}
    layers: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity, "message dropout": lambda: MessageDropout(P), "dropout1d": lambda: nn.Dropout1d(P),
    }  # fmt: skip
    for name, model in (("GRU", Recurrent), ("transformer", Attention)):
        steps = {}
        for layer, make in layers.items():
            torch.manual_seed(0)
            steps[f"{name}, {layer}"] = step(model(make()), x)
        times |= {label: 1e3 * t for label, t in seconds(steps, rounds, least=0.2).items()}
    print({label: round(t, 3) for label, t in times.items()}, flush=True)
    return {"machine": machine(), "p": P, "batch": BATCH, "rounds": rounds, "milliseconds": times}


def table(results: dict[str, Any]) -> str:
    """README's table."""
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
