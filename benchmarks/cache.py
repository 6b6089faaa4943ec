"""How does it go within the cache, 128 KB to 16 MB, against copying and F.dropout1d? p = 0.3; green: ours is faster."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import machine, markdown
from msgdrop_numba import message_dropout
from msgdrop_numba.call.threads import chunks
from msgdrop_numba.command.bench import seconds
from msgdrop_numba.kernels._jit import direct
from msgdrop_numba.kernels.memory import copy_line, view, zero_line

P = 0.3
KILOBYTES = [128, 512, 2048, 8192, 16384]
FEATURES = [64, 256, 512, 2048]
DTYPES = [torch.float32, torch.bfloat16]
ROW = 64  # messages; fewer where a batch has fewer
ALIVE = 12  # outputs that are kept before all are freed, as those of a model's layers in a training step

# What stands in the table and the picture: a peer, ours, and what is to be seen of it.
RATIOS = {
    "new, freed at once: clone": ("clone", "new"),
    "new, freed at once: dropout1d": ("dropout1d", "new"),
    "a bare call, freed at once: clone": ("clone", "bare, new"),
    "empty_like and copy_, freed at once: clone": ("clone", "two calls"),
    "new, kept alive: clone": ("clone, kept", "new, kept"),
    "new, kept alive: dropout1d": ("dropout1d, kept", "new, kept"),
    "scaled: clone": ("clone", "scaled"),
    "x / 0.7, which drops nothing: clone": ("clone", "divided"),
    "out=: copy_": ("copy_", "out="),
    "a bare call, out=: copy_": ("copy_", "bare"),
    "two threads for one, out=": ("out=, one thread", "out="),
    "two threads for one, copy_": ("copy_, one thread", "copy_"),
}


@njit(nogil=True)
def bare(x: int, out: int, mask: int, width: int, first: int, last: int) -> None:
    """The memory's part alone, of a mask that is there: each message copied or zeroed, line by line."""
    keep = view(mask, last, np.bool_)
    for j in range(first, last):
        for at in range(j * width, (j + 1) * width, 64):
            if keep[j]:
                copy_line(out + at, x + at)
            else:
                zero_line(out + at)


@njit(nogil=True, parallel=True)
def bare_parallel(x: int, out: int, mask: int, width: int, messages: int, parts: int) -> None:
    """The same in several parts."""
    for part in prange(parts):
        bare(x, out, mask, width, messages * part // parts, messages * (part + 1) // parts)


def kept_alive(call: Callable[[], Any]) -> Callable[[], None]:
    """The same call, whose outputs are freed together."""
    held: list[Any] = []

    def run() -> None:
        held.append(call())
        if len(held) == ALIVE:
            held.clear()

    return run


def contestants(x: Tensor) -> dict[str, Callable[[], Any]]:
    """Calls on one batch."""
    out, messages = torch.empty_like(x), x.shape[0] * x.shape[1]
    masks = [torch.rand(messages) >= P for _ in range(16)]  # of one alone the processor would learn the branches
    width, parts = x.shape[2] * x.itemsize, chunks(x.nbytes)
    kernel, *told = (direct(bare), 0, messages) if parts == 1 else (direct(bare_parallel), messages, parts)

    def lines(y: Tensor) -> Tensor:
        masks.append(masks.pop(0))
        kernel(x.data_ptr(), y.data_ptr(), masks[0].data_ptr(), width, *told)
        return y

    calls: dict[str, Callable[[], Any]] = {
        "new": lambda: message_dropout(x, P),
        "dropout1d": lambda: peers.dropout1d(x, P),
        "clone": lambda: x.clone(),
    }
    return (
        calls
        | {f"{name}, kept": kept_alive(call) for name, call in calls.items()}
        | {
            "scaled": lambda: message_dropout(x, P, scale=True),
            "divided": lambda: x / (1 - P),
            "out=": lambda: message_dropout(x, P, out=out),
            "copy_": lambda: out.copy_(x),
            "bare": lambda: lines(out),
            "bare, new": lambda: lines(torch.empty_like(x)),
            "two calls": lambda: torch.empty_like(x).copy_(x),
        }
    )


@torch.no_grad()
def run(rounds: int) -> dict[str, Any]:
    """Microseconds of every call at every cell of the grid."""
    rows, threads = [], torch.get_num_threads()
    for dtype in DTYPES:
        for kilobytes in KILOBYTES:
            for features in FEATURES:
                messages = kilobytes * 1024 // (features * dtype.itemsize)
                row = min(ROW, messages)
                calls = contestants(torch.randn(messages // row, row, features).to(dtype))
                times = seconds(calls, rounds, least=0.01)
                torch.set_num_threads(1)
                alone = seconds({name: calls[name] for name in ("out=", "copy_")}, rounds, least=0.01)
                torch.set_num_threads(threads)
                times |= {f"{name}, one thread": time for name, time in alone.items()}
                times = {name: 1e6 * time for name, time in times.items()}
                rows.append({
                    "dtype": str(dtype).removeprefix("torch."), "kilobytes": kilobytes, "features": features,
                    "microseconds": times,
                })  # fmt: skip
                print(
                    rows[-1]["dtype"], kilobytes, features, {name: round(t, 1) for name, t in times.items()}, flush=True
                )
    return {"machine": machine(), "p": P, "rounds": rounds, "rows": rows}


def _ratio(row: dict[str, Any], name: str) -> float:
    peer, ours = RATIOS[name]
    return float(row["microseconds"][peer] / row["microseconds"][ours])


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md: of each comparison the lowest, the median and the highest ratio of a dtype."""
    rows = []
    for name in RATIOS:
        cells = []
        for dtype in dict.fromkeys(row["dtype"] for row in results["rows"]):
            ratios = [_ratio(row, name) for row in results["rows"] if row["dtype"] == dtype]
            cells.append(f"{min(ratios):.2f} – {statistics.median(ratios):.2f} – {max(ratios):.2f}")
        rows.append([name, *cells])
    return markdown(["ours: beside", *dict.fromkeys(row["dtype"] for row in results["rows"])], rows)


def chart(results: dict[str, Any], axes: Any) -> None:
    """All cells: a column for each width and size, a row for each comparison and dtype."""
    rows = results["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    lines = [[row for row in rows if row["dtype"] == dtype] for dtype in dtypes]
    values = np.array([[_ratio(row, name) for row in line] for name in RATIOS for line in lines])
    axes.figure.set_size_inches(14, 7)
    axes.imshow(np.log2(values), cmap="RdYlGn", vmin=-1, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(values)), [f"{name}, {dtype}" for name in RATIOS for dtype in dtypes], fontsize=8)
    columns = [f"{_size(row['kilobytes'])}\n{row['features']}" for row in lines[0]]
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_xlabel("size of the batch, features; each cell: time of the peer / ours")


def _size(kilobytes: int) -> str:
    return f"{kilobytes} KB" if kilobytes < 1024 else f"{kilobytes // 1024} MB"
