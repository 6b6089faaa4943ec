"""Programs that `test_outputs.py` runs: outputs that go to other processes. `python -m helpers.sending NAME ...`."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import time
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import multiprocessing as torch_multiprocessing
from torch.utils.data import DataLoader, Dataset

from msgdrop_numba import message_dropout, message_select

SHAPE = (16, 64, 256)  # 1 MB of float32


def item(index: int) -> Any:
    """What the dataset returns: messages that hold the index, some of them dropped or removed."""
    x = torch.full(SHAPE, float(index + 1))
    if index % 2:
        return message_dropout(x, 0.5, seed=index)
    return message_select(torch.cat([x, x], 1), 0.5, exact=True, seed=index)[0]


def is_right(y: torch.Tensor, index: int) -> bool:
    if index % 2:
        return bool(torch.equal(y, message_dropout(torch.full(SHAPE, float(index + 1)), 0.5, seed=index)))
    return bool((y == index + 1).all())


class Returning(Dataset):
    """In a worker, signals stop its main thread every 3 ms, so that the queue's feeder thread runs on."""

    def __init__(self, count: int) -> None:
        self.count, self.stopped = count, False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        if not self.stopped:
            self.stopped = True
            signal.signal(signal.SIGALRM, lambda *_: time.sleep(0.0005))
            signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
        return item(index)


def loader(start: str, strategy: str, seconds: str) -> None:
    """Print how many items came, and how many were or became wrong while the main process held them."""
    torch.set_num_threads(1)
    torch_multiprocessing.set_sharing_strategy(strategy)
    end, items, wrong = float("inf"), 0, 0
    held: deque[tuple[int, torch.Tensor]] = deque()
    batches = DataLoader(
        Returning(10**6), batch_size=None, num_workers=2, prefetch_factor=8, multiprocessing_context=start,
        worker_init_fn=_use_strategy(strategy),
    )  # fmt: skip
    for index, y in enumerate(batches):
        items += 1
        end = min(end, time.monotonic() + float(seconds))  # from the first on: to start a worker takes long
        held.append((index, y))
        if len(held) > 24:
            index, y = held.popleft()
            wrong += not is_right(y, index)
        if time.monotonic() > end:
            break
    wrong += sum(not is_right(y, index) for index, y in held)
    print(items, wrong)


class _use_strategy:  # noqa: N801 (a function that spawn can send)
    def __init__(self, strategy: str) -> None:
        self.strategy = strategy

    def __call__(self, _: int) -> None:
        torch_multiprocessing.set_sharing_strategy(self.strategy)


def _send(connection: Any, count: int) -> None:
    for index in range(count):
        connection.put(item(index)) if hasattr(connection, "put") else connection.send(item(index).numpy())
    if hasattr(connection, "close"):
        time.sleep(1)


def queue() -> None:
    context = torch_multiprocessing.get_context("spawn")
    items = context.Queue()
    process = context.Process(target=_send, args=(items, 60))
    process.start()
    for index in range(60):
        assert is_right(items.get(timeout=60), index)
    process.join()
    print("ok")


def pipe() -> None:
    """Arrays are pickled on their way."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, 30))
    process.start()
    for index in range(30):
        assert is_right(torch.from_numpy(receiver.recv()), index)
    process.join()
    print("ok")


KEPT: list[Any] = []


def exit() -> None:
    """Outputs of every kind live when the interpreter ends: nothing hangs, and nothing is said."""
    for index in range(4):
        y = item(index)
        KEPT.extend([y, y.numpy(), memoryview(y.numpy()), message_dropout(y.numpy(), 0.5)])
    weight = torch.ones(SHAPE, requires_grad=True)
    KEPT.append((message_dropout(weight, 0.5) * weight).sum())
    np.kept = KEPT  # type: ignore[attr-defined]  # outlives this module
    torch.kept = list(KEPT)  # type: ignore[attr-defined]
    print("ok")


def exit_in_a_thread() -> None:
    """A daemon thread drops on while the interpreter ends: arrays, since torch's own operations end the process then."""
    x = item(1).numpy()

    def run() -> None:
        while True:
            message_dropout(x, 0.5)

    threading.Thread(target=run, daemon=True).start()
    time.sleep(0.5)
    exit()


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    globals()[name.replace(" ", "_")](*arguments)
