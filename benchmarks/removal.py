"""How accurate is a transformer after so many seconds of training, with messages zeroed and with messages removed?

scikit-learn's digits, 1,797 images of 8 x 8: 64 messages of a pixel each, and a class token. p = 0.5; all messages at
test time. The seconds are those of training alone.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.measure import machine, markdown
from msgdrop_numba import MessageDropout, MessageSelect

P, WIDTH, EPOCHS, BATCH, SEEDS, TRAINED = 0.5, 64, 30, 64, 3, 1400
ARMS: dict[str, Any] = {
    "no dropout": nn.Identity,
    "messages zeroed": lambda: MessageDropout(P, exact=True, prefix=1),
    "messages removed": lambda: MessageSelect(P, exact=True, prefix=1, return_kept=False),
}


class Reader(nn.Module):
    """Reads a digit off its class token."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.embed, self.drop = nn.Linear(1, WIDTH), drop
        self.token, self.place = (nn.Parameter(0.1 * torch.randn(1, n, WIDTH)) for n in (1, 64))
        layers = (nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True) for _ in range(3))
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(WIDTH, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores of the ten digits."""
        x = torch.cat([self.token.expand(len(pixels), -1, -1), self.embed(pixels) + self.place], dim=1)
        return self.head(self.layers(self.drop(x))[:, 0])  # type: ignore[no-any-return]


def train(arm: str, seed: int, data: tuple[Tensor, Tensor]) -> list[tuple[float, float]]:
    """Seconds and test accuracy after each epoch."""
    pixels, digits = data
    torch.manual_seed(seed)
    model = Reader(ARMS[arm]())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    spent, points = 0.0, []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for chosen in torch.randperm(TRAINED).split(BATCH):
            loss = nn.functional.cross_entropy(model.train()(pixels[chosen]), digits[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spent += time.perf_counter() - start
        with torch.no_grad():
            right = model.eval()(pixels[TRAINED:]).argmax(1) == digits[TRAINED:]
        points.append((spent, right.float().mean().item()))
    return points


def run(rounds: int) -> dict[str, Any]:
    """The curves of all arms and seeds; `rounds` doesn't matter, each epoch is a round."""
    digits = load_digits()
    data = torch.tensor(digits.data, dtype=torch.float32).unsqueeze(-1) / 8 - 1, torch.tensor(digits.target)
    curves = {arm: [train(arm, seed, data) for seed in range(SEEDS)] for arm in ARMS}
    print({arm: [points[-1] for points in curve] for arm, curve in curves.items()}, flush=True)
    return {"machine": machine(), "p": P, "epochs": EPOCHS, "curves": curves}


def _means(curve: list[Any]) -> list[tuple[float, float]]:
    """The mean seconds and accuracy of the seeds, epoch by epoch."""
    epochs = zip(*curve, strict=True)
    return [(statistics.fmean(t for t, _ in points), statistics.fmean(a for _, a in points)) for points in epochs]


def chart(results: dict[str, Any], axes: Any) -> None:
    """Accuracy over seconds."""
    for arm, curve in results["curves"].items():
        seconds, accuracies = zip(*_means(curve), strict=True)
        axes.plot(seconds, [100 * a for a in accuracies], "o-", markersize=3, label=arm)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    rows = []
    for arm, curve in results["curves"].items():
        points = _means(curve)
        reached = next((f"{seconds:.1f}" for seconds, accuracy in points if accuracy >= 0.85), "–")
        last = [points_[-1][1] for points_ in curve]
        spread = f"{100 * statistics.fmean(last):.1f} ± {100 * statistics.stdev(last):.1f}"
        rows.append([arm, f"{points[-1][0]:.1f}", spread, reached])
    head = ["", f"{results['epochs']} epochs, s", "test accuracy, %", "s to 85%"]
    return markdown(head, rows)
