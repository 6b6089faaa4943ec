"""How does it go with the size, from 1 KB to 512 MB, against F.dropout1d and clone? float32, p = 0.3."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import peers
from benchmarks.measure import machine, markdown
from msgdrop_numba import message_dropout
from msgdrop_numba.command.bench import seconds

P = 0.3
FEATURES = [4, 64, 512]
KILOBYTES = [4**n for n in range(10)] + [2 * 4**9]
MESSAGES = 64  # in a row; less where there are fewer


def shape(kilobytes: int, features: int) -> tuple[int, int, int]:
    """A batch of so many bytes."""
    messages = max(1, kilobytes * 256 // features)
    row = min(MESSAGES, messages)
    return messages // row, row, features


@torch.no_grad()
def run(rounds: int) -> dict[str, Any]:
    """Microseconds at every size."""
    rows = []
    for features in FEATURES:
        for kilobytes in KILOBYTES:
            x = torch.randn(shape(kilobytes, features))
            calls = {
                "ours": lambda x=x: message_dropout(x, P),
                "dropout1d": lambda x=x: peers.dropout1d(x, P),
                "clone": lambda x=x: x.clone(),
            }
            times = {name: 1e6 * t for name, t in seconds(calls, rounds, least=0.02).items()}
            rows.append({"features": features, "kilobytes": kilobytes, "microseconds": times})
            print(features, kilobytes, {name: round(t, 1) for name, t in times.items()}, flush=True)
    return {"machine": machine(), "p": P, "dtype": "float32", "rounds": rounds, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md: how many times faster than F.dropout1d."""
    ratios = {(row["features"], row["kilobytes"]): row["microseconds"] for row in results["rows"]}
    sizes = sorted({kilobytes for _, kilobytes in ratios})
    rows = [
        [f"{features} features", *(_ratio(ratios[features, kilobytes], "dropout1d") for kilobytes in sizes)]
        for features in sorted({features for features, _ in ratios})
    ]
    return markdown(["", *(f"{k} KB" if k < 1024 else f"{k // 1024} MB" for k in sizes)], rows)


def _ratio(times: dict[str, float], peer: str) -> str:
    return f"{times[peer] / times['ours']:.2f}"


def chart(results: dict[str, Any], axes: Any) -> None:
    """The ratios as lines over the size."""
    for peer, style in (("dropout1d", "-"), ("clone", "--")):
        for color, features in enumerate(sorted({row["features"] for row in results["rows"]})):
            rows = [row for row in results["rows"] if row["features"] == features]
            ratios = [row["microseconds"][peer] / row["microseconds"]["ours"] for row in rows]
            sizes = [row["kilobytes"] for row in rows]
            axes.plot(sizes, ratios, style, color=f"C{color}", label=f"{peer}, {features} features")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="size of the batch, KB", ylabel="time of the peer / ours")
    axes.legend(ncols=2)
