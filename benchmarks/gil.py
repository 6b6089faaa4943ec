"""Do other Python threads run on while a kernel runs, and do two threads collate twice as fast as one?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import machine, markdown
from msgdrop_numba import MessageDropoutCollate, message_dropout
from msgdrop_numba.command.bench import medians

SECONDS = 0.5
BATCH = (64, 256, 512)


def counted(beside: Callable[[], Any] | None) -> float:
    """Steps a second of a pure-Python loop while another thread runs `beside` again and again."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            assert beside is not None
            beside()

    worker = threading.Thread(target=work)
    if beside is not None:
        worker.start()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        for _ in range(1000):
            steps += 1
    elapsed = time.perf_counter() - start
    stop.set()
    if beside is not None:
        worker.join()
    return steps / elapsed


def batches(threads: int, collate: Callable[[], Any]) -> float:
    """Batches a second of so many Python threads, each collating its own."""
    done, ends = [0] * threads, time.perf_counter() + SECONDS
    taken = [0.0] * threads

    def work(number: int) -> None:
        start = time.perf_counter()
        while time.perf_counter() < ends:
            collate()
            done[number] += 1
        taken[number] = time.perf_counter() - start

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(count / seconds for count, seconds in zip(done, taken, strict=True))


def run(rounds: int) -> dict[str, Any]:
    """Steps and batches a second, one kernel thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(BATCH)
        samples, collate = list(x), MessageDropoutCollate(0.5)
        cases: dict[str, Callable[[], float]] = {
            "Python alone": lambda: counted(None),
            "Python beside message_dropout": lambda: counted(lambda: message_dropout(x, 0.5)),
            "batches of 1 thread": lambda: batches(1, lambda: collate(samples)),
            "batches of 2 threads": lambda: batches(2, lambda: collate(samples)),
        }
        speeds = medians(cases, rounds)
    finally:
        torch.set_num_threads(before)
    return {"machine": machine(), "batch": BATCH, "rounds": rounds, "per_second": speeds}


def bars(results: dict[str, Any]) -> dict[str, float]:
    """Both ratios."""
    speeds = results["per_second"]
    rows = [
        ("a Python thread beside `message_dropout`, of itself alone", "Python beside message_dropout", "Python alone"),
        ("two threads collating 64 × (256, 512), of one", "batches of 2 threads", "batches of 1 thread"),
    ]
    return {label: speeds[ours] / speeds[base] for label, ours, base in rows}


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    return markdown(["what", "ratio"], [[label, f"{ratio:.2f}"] for label, ratio in bars(results).items()])
