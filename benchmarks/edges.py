"""How fast are edges dropped, against torch_geometric's own dropout_edge? p = 0.5, with and without attributes and ids.

Attributes are 8 float32 an edge; torch_geometric leaves them to indexing with what it returns. Channels first is
`message_dims=(0, 2)` on (B, D, T), against masked_fill by a mask that is there already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import machine, markdown
from msgdrop_numba import message_dropout
from msgdrop_numba.command.bench import seconds
from msgdrop_numba.integrations.pyg import dropout_edge

P, EDGES, FEATURES, DEGREE = 0.5, [100_000, 1_000_000, 10_000_000], 8, 8
CHANNELS_FIRST = [(16, 80, 500), (32, 256, 400), (16, 512, 1000)]


def edges(count: int) -> dict[str, Callable[[], Any]]:
    """Calls on an undirected graph of about so many edges: ours, and theirs with what they need beside."""
    from torch_geometric.utils import dropout_edge as theirs

    half = torch.randint(max(2, count // DEGREE), (2, count // 2))
    half = half[:, half[0] != half[1]]
    edge_index, ids = torch.cat([half, half.flip(0)], dim=1), torch.arange(half.shape[1]).repeat(2)
    attr = torch.randn(edge_index.shape[1], FEATURES)

    def with_attr(undirected: bool) -> Any:
        left, told = theirs(edge_index, P, undirected)
        return left, attr[told]

    return {
        "edges, ours": lambda: dropout_edge(edge_index, P),
        "edges, theirs": lambda: theirs(edge_index, P),
        "undirected, ours": lambda: dropout_edge(edge_index, P, True),
        "undirected, theirs": lambda: theirs(edge_index, P, True),
        "attributes, ours": lambda: dropout_edge(edge_index, P, edge_attr=attr),
        "attributes, theirs": lambda: with_attr(False),
        "undirected, attributes, ours": lambda: dropout_edge(edge_index, P, True, edge_attr=attr),
        "undirected, attributes, theirs": lambda: with_attr(True),
        "ids, ours": lambda: dropout_edge(edge_index, P, edge_ids=ids, seed=1),
        "ids, theirs": lambda: theirs(edge_index, P),
    }


def channels_first(shape: tuple[int, int, int]) -> dict[str, Callable[[], Any]]:
    """Calls on (B, D, T): ours draws its mask, too."""
    x = torch.randn(shape)
    dropped = torch.rand(shape[0], 1, shape[2]) < P
    return {
        "channels first, ours": lambda: message_dropout(x, P, message_dims=(0, 2)),
        "channels first, theirs": lambda: x.masked_fill(dropped, 0),
    }


def run(rounds: int) -> dict[str, Any]:
    """Milliseconds of every kind of call."""
    rows = []
    for size in (*EDGES, *CHANNELS_FIRST):
        calls = edges(size) if isinstance(size, int) else channels_first(size)
        times = seconds(calls, rounds, least=0.03)
        rows.append({"size": size, "milliseconds": {name: 1e3 * t for name, t in times.items()}})
        print(size, {name: round(1e3 * t, 3) for name, t in times.items()}, flush=True)
    return {"machine": machine(), "p": P, "rounds": rounds, "rows": rows}


def _pairs(results: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """Size, kind, our time and theirs."""
    found = []
    for row in results["rows"]:
        size, times = row["size"], row["milliseconds"]
        told = f"{size:,} edges" if isinstance(size, int) else " × ".join(map(str, size))
        for name in times:
            if name.endswith(", ours"):
                kind = name.removesuffix(", ours")
                found.append((told, kind, times[name], times[f"{kind}, theirs"]))
    return found


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    rows = [[size, kind, f"{a:.3g}", f"{b:.3g}", f"{b / a:.2f}"] for size, kind, a, b in _pairs(results)]
    return markdown(["size", "what drops", "ours, ms", "theirs, ms", "times as fast"], rows)


def bars(results: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as torch_geometric's own, or as masked_fill."""
    return {f"{kind}, {size}": theirs / ours for size, kind, ours, theirs in _pairs(results)}
