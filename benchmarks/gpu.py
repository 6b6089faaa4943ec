"""How fast is message_dropout on a GPU, against what people write today, and against a copy?"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import machine, markdown
from msgdrop_numba import message_dropout
from msgdrop_numba.command.bench import medians
from msgdrop_numba.tensors import cuda as torch_cuda

DEVICE = "cuda"
# Megabytes, features, dtype, p.
CASES = [
    *((megabytes, 512, dtype, 0.5) for dtype in ("float32", "bfloat16") for megabytes in (64, 256, 1024, 4096)),
    *((1024, 512, dtype, p) for dtype in ("float32", "bfloat16") for p in (0.1, 0.3)),
    *((1024, features, "float32", 0.5) for features in (64, 128, 256, 1024, 2048, 4096)),
]
SMALL = [(3, 5, 20), (8, 16, 128), (32, 64, 256)]
SEQUENCE, LEAST = 512, 0.05  # messages in a row; seconds that a round of calls takes, about

PEERS: dict[str, Any] = {
    "dropout1d": peers.dropout1d, "masked_fill": peers.masked_fill, "multiply": peers.multiply,
    "compiled dropout1d": peers.compiled_dropout1d, "compiled multiply": peers.compiled_multiply,
    "compiled masked_fill": torch.compile(peers.masked_fill, dynamic=False),
}  # fmt: skip


def on_device(call: Callable[[], Any], calls: int) -> float:
    """Seconds of the device for a call, between two events on the stream."""
    if DEVICE == "cpu":
        return on_host(call, calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def on_host(call: Callable[[], Any], calls: int) -> float:
    """Seconds of Python for a call, the device left behind."""
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _medians(contestants: dict[str, Callable[[], Any]], timer: Any, calls: int | None, rounds: int) -> dict[str, float]:
    cases = {}
    for name, call in contestants.items():
        timer(call, 3)  # loads kernels, compiles
        cases[name] = partial(timer, call, calls or max(1, int(LEAST / timer(call, 3))))
    return {name: 1e6 * seconds for name, seconds in medians(cases, rounds).items()}


def both_ways(drop: Callable[[Tensor, float], Tensor], x: Tensor, p: float) -> Callable[[], Any]:
    """A call and the gradient of its input."""
    grad, tracked = torch.ones_like(x), x.detach().requires_grad_()
    return lambda: torch.autograd.grad(drop(tracked, p), tracked, grad)


def contestants(x: Tensor, p: float) -> dict[str, Callable[[], Any]]:
    """Ours, the peers and the limits on one tensor."""
    y, out = x.clone(), torch.empty_like(x)
    calls: dict[str, Callable[[], Any]] = {
        "new": lambda: message_dropout(x, p),
        "scaled": lambda: message_dropout(x, p, scale=True),
        "exact": lambda: message_dropout(x, p, exact=True),
        "inplace": lambda: message_dropout(y, p, inplace=True),
        "copy_": lambda: out.copy_(x),
        "zero_": lambda: out.zero_(),
        "new, both ways": both_ways(message_dropout, x, p),
    }
    for name, peer in PEERS.items():
        calls |= {name: partial(peer, x, p), f"{name}, both ways": both_ways(peer, x, p)}
    return calls


def run(rounds: int) -> dict[str, Any]:
    """Microseconds of the device on large tensors, of the host on small ones."""
    found = machine()
    if DEVICE != "cpu":
        if not torch.cuda.is_available() or torch_cuda.obstacle(torch.device("cuda:0")):
            raise SystemExit("gpu: torch finds no GPU, or numba-cuda is missing")
        packages = {name: metadata.version(name) for name in ("numba-cuda", "cuda-core")}
        found |= {"gpu": torch.cuda.get_device_name(), "CUDA": torch.version.cuda, **packages}
    rows, small = [], []
    for megabytes, features, dtype, p in CASES:
        torch.compiler.reset()  # else the later cases would find the compiler's limit of versions reached
        kind = getattr(torch, dtype)
        count = max(1, round(megabytes * 2**20 / (SEQUENCE * features * kind.itemsize)))
        x = torch.randn(count, SEQUENCE, features, device=DEVICE, dtype=kind)
        times = _medians(contestants(x, p), on_device, None, rounds)
        rows.append({"megabytes": megabytes, "features": features, "dtype": dtype, "p": p, "microseconds": times})
        print(rows[-1], flush=True)
    for shape in SMALL:
        x = torch.randn(shape, device=DEVICE)
        calls = {"ours": partial(message_dropout, x, 0.3), "dropout1d": partial(peers.dropout1d, x, 0.3)}
        calls |= {f"{name}, both ways": both_ways(call.func, x, 0.3) for name, call in list(calls.items())}
        small.append({"shape": shape, "microseconds": _medians(calls, on_host, 200, rounds)})
    if torch_cuda._broken:
        raise SystemExit("gpu: a kernel couldn't be loaded, so these would be figures of torch's own operations")
    return {"machine": found, "rounds": rounds, "rows": rows, "small": small}


def table(results: dict[str, Any]) -> str:
    """Ours, how near to a copy's bandwidth, and how many times faster than the peers."""
    rows = []
    for row in results["rows"]:
        times, p = row["microseconds"], row["p"]
        peers_of = [times[name] / times["new"] for name in ("dropout1d", "masked_fill", "multiply")]
        compiled, both = (
            min(times[name + way] for name in PEERS if name.startswith("compiled")) / times["new" + way]
            for way in ("", ", both ways")
        )
        cells = [
            (2 - p) / 2 * times["copy_"] / times["new"], times["inplace"] / (p * times["zero_"]), *peers_of, compiled,
            times["dropout1d, both ways"] / times["new, both ways"], both, times["exact"] / times["new"],
        ]  # fmt: skip
        case = f"{row['megabytes']} MB {row['dtype']}, {row['features']} features, p = {p}"
        rows.append([case, f"{times['new']:.4g}", *(f"{cell:.2f}" for cell in cells)])
    for row in results["small"]:
        times = row["microseconds"]
        cells = ["–"] * 9
        cells[2] = f"{times['dropout1d'] / times['ours']:.2f}"
        cells[6] = f"{times['dropout1d, both ways'] / times['ours, both ways']:.2f}"
        rows.append([f"{' × '.join(map(str, row['shape']))}, host time", f"{times['ours']:.3g}", *cells])
    head = [
        "case", "ours, µs", "of copy_'s bandwidth", "in place / p · zero_", "dropout1d", "masked_fill", "multiply",
        "best compiled", "dropout1d, both ways", "best compiled, both ways", "exact / default",
    ]  # fmt: skip
    return markdown(head, rows)


def bars(results: dict[str, Any]) -> dict[str, float]:
    """How many times faster than F.dropout1d."""
    return {
        f"{row['megabytes']} MB {row['dtype']}, {row['features']} features, p = {row['p']}": row["microseconds"][
            "dropout1d"
        ]
        / row["microseconds"]["new"]
        for row in results["rows"]
    }
