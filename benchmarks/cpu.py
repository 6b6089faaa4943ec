"""How fast is message_dropout on CPU tensors and arrays, against what people write today? float32, p = 0.3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import peers
from benchmarks.measure import machine, markdown
from msgdrop_numba import message_dropout
from msgdrop_numba.command.bench import seconds

P = 0.3
SHAPES = [(3, 5, 20), (8, 16, 128), (32, 64, 256), (64, 256, 512), (64, 512, 1024), (64, 4096, 4), (64, 4096, 1)]

# The columns of the table: a peer, and which of ours it is compared with.
COLUMNS = [
    ("loop", "exact"), ("ones_times_mask", "new"), ("multiply", "new"), ("compiled multiply", "new"),
    ("masked_fill", "new"), ("dropout1d", "new"), ("clone", "new"), ("copy_", "out="),
    ("dropout1d, inplace", "inplace"), ("p · zero_", "inplace"), ("numpy_index", "array"),
]  # fmt: skip


def contestants(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """A call of ours and of each peer, with new outputs that are freed and made again as in training."""
    x = torch.randn(shape)
    calls: dict[str, Callable[[], Any]] = {
        "new": lambda: message_dropout(x, P),
        "exact": lambda: message_dropout(x, P, exact=True),
    }
    for peer in peers.TENSORS:
        if peer is not peers.loop or x.numel() <= 2**20:  # the loop takes seconds on the large ones
            calls[peer.__name__] = lambda peer=peer: peer(x, P)
    array = x.numpy().copy()
    calls["array"] = lambda: message_dropout(array, P)
    for peer in peers.ARRAYS:
        calls[peer.__name__] = lambda peer=peer: peer(array, P)
    out, y, z = torch.empty_like(x), x.clone(), x.clone()
    calls["out="] = lambda: message_dropout(x, P, out=out)
    calls["copy_"] = lambda: out.copy_(x)
    calls["inplace"] = lambda: message_dropout(y, P, inplace=True)
    calls["dropout1d, inplace, and fill_"] = lambda: torch.nn.functional.dropout1d(z.fill_(1.0), P, inplace=True)
    calls["fill_"] = lambda: z.fill_(1.0)  # without it dropout1d in place would run into infinities
    calls["zero_"] = lambda: z.zero_()
    return calls


@torch.no_grad()
def run(rounds: int) -> dict[str, Any]:
    """Microseconds of every contestant on every shape."""
    rows = []
    for shape in SHAPES:
        times = seconds(contestants(shape), rounds, least=0.03)
        times["dropout1d, inplace"] = times.pop("dropout1d, inplace, and fill_") - times.pop("fill_")
        times["p · zero_"] = P * times.pop("zero_")
        rows.append({"shape": shape, "microseconds": {name: 1e6 * t for name, t in times.items()}})
        print(shape, {name: round(1e6 * t, 1) for name, t in times.items()}, flush=True)
    return {"machine": machine(), "p": P, "dtype": "float32", "rounds": rounds, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md: how many times faster ours is, median over median."""
    rows = []
    for row in results["rows"]:
        times = row["microseconds"]
        cells = [f"{times[peer] / times[ours]:.2f}" if peer in times else "–" for peer, ours in COLUMNS]
        rows.append([" × ".join(map(str, row["shape"])), f"{times['new']:.3g}", *cells])
    titles = [peer if ours == "new" else f"{peer} ({ours})" for peer, ours in COLUMNS]
    return markdown(["shape", "ours, µs", *titles], rows)


def bars(results: dict[str, Any]) -> dict[str, float]:
    """How many times faster than F.dropout1d."""
    rows = [(row["shape"], row["microseconds"]) for row in results["rows"]]
    return {" × ".join(map(str, shape)): times["dropout1d"] / times["new"] for shape, times in rows}
