"""What do rules, dtypes and threads cost at 32 MB, with `out=`, and how near is it to the memory's speed? p = 0.3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from benchmarks.measure import machine, markdown
from msgdrop_numba import message_dropout
from msgdrop_numba.command.bench import seconds
from msgdrop_numba.kernels.memory import stream_line

P = 0.3
SHAPE = (64, 256, 512)
SMALLER, LARGER = (32, 64, 256), (64, 512, 1024)


def rules() -> dict[str, Callable[[], Any]]:
    """The default rule, and every other."""
    x, out = torch.randn(SHAPE), torch.empty(SHAPE)
    lengths = torch.full(SHAPE[:1], SHAPE[1] - 1)
    options: dict[str, dict[str, Any]] = {
        "default": {"p": P}, "span": {"p": P, "span": 4}, "lengths": {"p": P, "lengths": lengths},
        "array p, one a position": {"p": np.full(SHAPE[1], P)}, "array p, one a message": {"p": np.full(SHAPE[:2], P)},
        "exact": {"p": P, "exact": True}, "min_keep": {"p": P, "min_keep": 8},
        "min_keep that binds": {"p": P, "min_keep": 200}, "keys": {"p": P, "seed": 1, "keys": np.arange(SHAPE[0])},
        "scale": {"p": P, "scale": True}, "a vector fill": {"p": P, "fill": torch.ones(SHAPE[2])},
        "prefix": {"p": P, "prefix": 1}, "protect": {"p": P, "protect": torch.rand(SHAPE[:2]) < 0.1},
        "a range of p": {"p": (0.0, 2 * P)}, "positions, an offset": {"p": P, "positions": 4097},
        "positions, an array": {"p": P, "positions": torch.randint(0, 2**34, SHAPE[:2])},
    }  # fmt: skip
    return {name: (lambda o=o: message_dropout(x, out=out, **o)) for name, o in options.items()}


def dtypes() -> dict[str, Callable[[], Any]]:
    """Half the width, as many bytes; scaled and not, beside a copy."""
    calls: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(SHAPE[0], SHAPE[1], 2 * SHAPE[2]).to(dtype)
        out = torch.empty_like(x)
        name = str(dtype).removeprefix("torch.")
        calls[f"{name}, copy_"] = lambda x=x, out=out: out.copy_(x)
        calls[f"{name}, unscaled"] = lambda x=x, out=out: message_dropout(x, P, out=out)
        calls[f"{name}, scaled"] = lambda x=x, out=out: message_dropout(x, P, out=out, scale=True)
    return calls


def with_threads(count: int, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call under a budget of so many threads."""

    def limited() -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return call()
        finally:
            torch.set_num_threads(before)

    return limited


def threads() -> dict[str, Callable[[], Any]]:
    """One thread and two, at 2 MB and 32 MB; what two threads gain in mere copies is what the memory allows."""
    calls = {}
    for size, shape in (("2 MB", SMALLER), ("32 MB", SHAPE)):
        x, out = torch.randn(shape), torch.empty(shape)
        for count in (1, 2):
            for name, call in {
                "message_dropout": lambda x=x, out=out: message_dropout(x, P, out=out),
                "copy_": lambda x=x, out=out: out.copy_(x),
                "streaming copy": lambda x=x, out=out, count=count: stream(out, x, count),
            }.items():
                calls[f"{size}, {name}, {count} threads"] = with_threads(count, call)
    return calls


@numba.njit(parallel=True)
def _stream(target: int, source: int, lines: int, chunks: int) -> None:
    for c in numba.prange(chunks):
        for line in range(lines * c // chunks, lines * (c + 1) // chunks):
            stream_line(target + 64 * line, source + 64 * line)


def stream(out: torch.Tensor, x: torch.Tensor, chunks: int) -> None:
    """Copy past the cache."""
    assert x.data_ptr() % 64 == out.data_ptr() % 64 == 0
    _stream(out.data_ptr(), x.data_ptr(), x.numel() * x.itemsize // 64, chunks)


def bandwidth() -> dict[str, Callable[[], Any]]:
    """Ours beside the best copy of this machine, which writes past the cache."""
    x, out = torch.randn(LARGER), torch.empty(LARGER)
    return {
        "128 MB, message_dropout": lambda: message_dropout(x, P, out=out),
        "128 MB, streaming copy": lambda: stream(out, x, torch.get_num_threads()),
        "128 MB, copy_": lambda: out.copy_(x),
    }


@torch.no_grad()
def run(rounds: int) -> dict[str, Any]:
    """Milliseconds of everything."""
    times: dict[str, float] = {}
    for group in (rules(), dtypes(), threads(), bandwidth()):
        times |= {name: 1e3 * t for name, t in seconds(group, rounds, least=0.03).items()}
    print({name: round(t, 3) for name, t in times.items()}, flush=True)
    return {"machine": machine(), "p": P, "shape": SHAPE, "rounds": rounds, "milliseconds": times}


def bars(results: dict[str, Any]) -> dict[str, float]:
    """Every ratio that was asked for."""
    t, p = results["milliseconds"], results["p"]
    others = [name for name in list(t)[1:] if "," not in name or name.startswith(("array", "positions"))]
    ratios = {f"{name}: time, of the default rule's": t[name] / t["default"] for name in others}
    for dtype in ("bfloat16", "float16"):
        for kind in ("unscaled", "scaled"):
            ratios[f"{dtype}, {kind}: times as fast as its `copy_`"] = t[f"{dtype}, copy_"] / t[f"{dtype}, {kind}"]
    for size in ("2 MB", "32 MB"):
        for name in ("message_dropout", "copy_", "streaming copy"):
            one, two = (t[f"{size}, {name}, {count} threads"] for count in (1, 2))
            ratios[f"{size}, {name}: two threads, times as fast as one"] = one / two
    ours, best = (2 - p) / t["128 MB, message_dropout"], 2 / t["128 MB, streaming copy"]
    ratios["128 MB: bytes a second, of a streaming copy's"] = ours / best
    ratios["128 MB: a streaming copy, times as fast as `copy_`"] = t["128 MB, copy_"] / t["128 MB, streaming copy"]
    return ratios


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    return markdown(["at 32 MB, with `out=`", "ratio"], [[n, f"{r:.2f}"] for n, r in bars(results).items()])
