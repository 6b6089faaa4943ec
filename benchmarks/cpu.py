"""How fast is message_dropout on CPU tensors, against what people write today? float32, p = 0.3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import peers
from benchmarks.measure import machine, markdown, seconds
from msgdrop_numba import message_dropout

P = 0.3
SHAPES = [(3, 5, 20), (8, 16, 128), (32, 64, 256), (64, 256, 512), (64, 512, 1024), (64, 4096, 4)]


def contestants(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """A call of ours and of each peer, with new outputs that are freed and made again as in training."""
    x = torch.randn(shape)
    calls: dict[str, Callable[[], Any]] = {"message_dropout": lambda: message_dropout(x, P)}
    for peer in peers.ALL:
        if peer is not peers.loop or x.numel() <= 2**20:  # the loop takes seconds on the large ones
            calls[peer.__name__] = lambda peer=peer: peer(x, P)
    out, y, z = torch.empty_like(x), x.clone(), x.clone()
    calls["message_dropout, out="] = lambda: message_dropout(x, P, out=out)
    calls["copy_"] = lambda: out.copy_(x)
    calls["message_dropout, inplace"] = lambda: message_dropout(y, P, inplace=True)
    calls["dropout1d, inplace"] = lambda: torch.nn.functional.dropout1d(z.fill_(1.0), P, inplace=True)
    calls["fill_"] = lambda: z.fill_(1.0)  # dropout1d in place would run into infinities without it
    return calls


@torch.no_grad()
def run(rounds: int) -> dict[str, Any]:
    """Microseconds of every contestant on every shape."""
    rows = []
    for shape in SHAPES:
        times = seconds(contestants(shape), rounds, least=0.05)
        rows.append({"shape": shape, "microseconds": {name: 1e6 * t for name, t in times.items()}})
        print(shape, {name: round(1e6 * t, 1) for name, t in times.items()}, flush=True)
    return {"machine": machine(), "p": P, "dtype": "float32", "rounds": rounds, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """README's table: how many times faster ours is, median over median."""
    pairs = [(peer.__name__, "message_dropout", peer.__name__) for peer in peers.ALL]
    pairs.append(("copy_", "message_dropout, out=", "copy_ (ours with `out=`)"))
    rows = []
    for row in results["rows"]:
        times = row["microseconds"]
        cells = [f"{times[name] / times[ours]:.2f}" if name in times else "–" for name, ours, _ in pairs]
        rows.append([" × ".join(map(str, row["shape"])), f"{times['message_dropout']:.3g}", *cells])
    return markdown(["shape", "ours, µs", *(title for _, _, title in pairs)], rows)
