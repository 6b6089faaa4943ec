"""What does dropout take of a training step? Its forward and its backward, timed within the step. float32, p = 0.3."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import machine, markdown
from msgdrop_numba import MessageDropout

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


class Timed(nn.Module):
    """A layer, and the milliseconds of its forward and its backward: what it adds to a step is lost in noise."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.forward_ms: list[float] = []
        self.backward_ms: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of x."""
        start = time.perf_counter()
        y: Tensor = self.layer(x)
        self.forward_ms.append(1e3 * (time.perf_counter() - start))
        started = [0.0]

        def before(*_: Any) -> None:
            started[0] = time.perf_counter()

        def after(*_: Any) -> None:
            self.backward_ms.append(1e3 * (time.perf_counter() - started[0]))

        node: Any = y.grad_fn
        node.register_prehook(before)
        node.register_hook(after)
        return y


def run(rounds: int) -> dict[str, Any]:
    """Milliseconds of each layer within a step, the steps of all contestants taking turns, and of the whole step."""
    x, rows = torch.randn(BATCH), []
    for name, model in (("GRU", Recurrent), ("transformer", Attention)):
        layers = {"message dropout": Timed(MessageDropout(P)), "dropout1d": Timed(nn.Dropout1d(P))}
        steps = {layer: step(model(timed), x) for layer, timed in layers.items()}
        turns = [random.sample(sorted(steps), len(steps)) for _ in range(rounds * STEPS)]
        whole = [steps[layer]() for turn in turns for layer in turn]
        row: dict[str, Any] = {"step": name, "whole": statistics.median(whole)}
        for layer, timed in layers.items():
            row[layer] = [statistics.median(times[2:]) for times in (timed.forward_ms, timed.backward_ms)]
        rows.append(row)
        print(row, flush=True)
    return {"machine": machine(), "p": P, "batch": BATCH, "rounds": rounds, "milliseconds": rows}


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    rows = []
    for row in results["milliseconds"]:
        layers = (" + ".join(f"{part:.3f}" for part in row[layer]) for layer in ("message dropout", "dropout1d"))
        rows.append([row["step"], f"{row['whole']:.1f}", *layers])
    return markdown(["step", "whole, ms", "message dropout, forward + backward, ms", "`nn.Dropout1d`, ms"], rows)


def bars(results: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as dropout1d, both ways."""
    return {
        f"{row['step']}: dropout1d / message dropout": sum(row["dropout1d"]) / sum(row["message dropout"])
        for row in results["milliseconds"]
    }
