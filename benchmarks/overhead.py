"""What does a small call cost, forward and backward, against F.dropout1d? float32, p = 0.3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import machine, markdown
from msgdrop_numba import message_dropout
from msgdrop_numba.command.bench import seconds

P = 0.3
SHAPES = [(3, 5, 20), (8, 16, 128), (32, 64, 256), (64, 256, 512)]


def forward(drop: Callable[[Tensor, float], Tensor], x: Tensor) -> Callable[[], Any]:
    """A call whose result remembers how to go backward."""
    return lambda: drop(x, P)


def backward(drop: Callable[[Tensor, float], Tensor], x: Tensor) -> Callable[[], Any]:
    """A call and the gradient of its input."""
    grad = torch.ones_like(x)
    return lambda: torch.autograd.grad(drop(x, P), x, grad)


def run(rounds: int) -> dict[str, Any]:
    """Microseconds of every kind of call."""
    rows = []
    for shape in SHAPES:
        x = torch.randn(shape)
        tracked = x.clone().requires_grad_()
        calls: dict[str, Callable[[], Any]] = {}
        for name, drop in (("ours", message_dropout), ("dropout1d", peers.dropout1d)):
            calls[f"{name}, no grad"] = forward(drop, x)
            calls[f"{name}, forward"] = forward(drop, tracked)
            calls[f"{name}, forward + backward"] = backward(drop, tracked)
        times = seconds(calls, rounds, least=0.03)
        rows.append({"shape": shape, "microseconds": {name: 1e6 * t for name, t in times.items()}})
        print(shape, {name: round(1e6 * t, 1) for name, t in times.items()}, flush=True)
    return {"machine": machine(), "p": P, "dtype": "float32", "rounds": rounds, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md: microseconds of ours, and how many times faster than F.dropout1d."""
    kinds = ["no grad", "forward", "forward + backward"]
    rows = []
    for row in results["rows"]:
        times = row["microseconds"]
        cells = [
            f"{times[f'ours, {kind}']:.3g} µs, {times[f'dropout1d, {kind}'] / times[f'ours, {kind}']:.2f}"
            for kind in kinds
        ]
        rows.append([" × ".join(map(str, row["shape"])), *cells])
    return markdown(["shape", *kinds], rows)


def bars(results: dict[str, Any]) -> dict[str, float]:
    """How many times faster than F.dropout1d, forward and backward."""
    kind = "forward + backward"
    rows = [(row["shape"], row["microseconds"]) for row in results["rows"]]
    return {" × ".join(map(str, shape)): t[f"dropout1d, {kind}"] / t[f"ours, {kind}"] for shape, t in rows}
