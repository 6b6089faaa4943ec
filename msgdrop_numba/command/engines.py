"""The engines of `msgdrop apply`: what runs its tasks, a file each, and hands back what was written as it is done."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from itertools import islice
from multiprocessing.connection import wait
from typing import Any
from urllib.parse import urlsplit

from msgdrop_numba.call import threads
from msgdrop_numba.command.errors import JobError, one_line
from msgdrop_numba.command.shards import Task, Written, run

Results = Generator[tuple[Task, Written], None, None]
Engine = Callable[[list[Task]], Results]

_THREADS = "OMP_NUM_THREADS"  # what call.threads reads


def local(jobs: int) -> Engine:
    """Processes on this machine. One alone is this one: another would first have to import all of it again."""

    def engine(tasks: list[Task]) -> Results:
        yield from _here(tasks) if min(jobs, len(tasks)) <= 1 else _in_processes(jobs, tasks)

    return engine


def _here(tasks: list[Task]) -> Results:
    for task in tasks:
        with _one_thread():
            written = run(task)
        yield task, written


def _in_processes(jobs: int, tasks: list[Task]) -> Results:
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    threads.load()  # compiled once, for the processes to read from the cache
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn"), _begin)
    try:
        with _deaf_from_birth():
            futures = {pool.submit(run, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise JobError("a process of the job died, of too little memory perhaps: run the same command again") from None
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _deaf_from_birth() -> Iterator[None]:
    """Processes that start meanwhile ignore interrupts before they can say so themselves."""
    if threading.current_thread() is not threading.main_thread():  # others may set no handler
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def _begin() -> None:
    """In each process: one thread, no interrupts but the parent's, and no life after it."""
    os.environ[_THREADS] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _knock(address: str) -> None:
    """Raise where nobody listens at HOST:PORT; Ray itself would try for many minutes."""
    if address == "auto":  # the cluster of this machine, which Ray finds
        return
    try:
        parts = urlsplit(f"//{address}")
        socket.create_connection((parts.hostname, parts.port or 0), timeout=5).close()
    except (OSError, ValueError) as error:
        raise JobError(f"no Ray answers at {address} ({one_line(error)}): give HOST:PORT of its head node") from error


def on_ray(jobs: int | None, address: str | None) -> Engine:
    """Ray's tasks, on this machine or on the cluster at an address, where it connects to at once.

    All machines see the same file system, under the same paths. A task whose node or process dies is run again as often
    as Ray does by itself, 3 times: a task that kills its process must not run for ever.
    """
    import ray

    if address is None:
        ray.init("local", num_cpus=jobs, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    else:
        _knock(address)
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise JobError(f"no Ray answers at {address} ({one_line(error)})") from error

    def engine(tasks: list[Task]) -> Results:
        # Ray tells on standard output of nodes that it lost, some of it as it is shut down
        with redirect_stdout(sys.stderr), ExitStack() as at_last:
            at_last.callback(ray.shutdown)
            remote, waiting = ray.remote(run), iter(tasks)
            running: dict[Any, Task] = {}
            try:
                while True:
                    for task in islice(waiting, (jobs or 1000) - len(running)):
                        running[remote.remote(task)] = task
                    if not running:
                        return
                    ready, _ = ray.wait(list(running))
                    yield running.pop(ready[0]), ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, JobError) else JobError(one_line(error)) from error
            except ray.exceptions.RayError as error:
                raise JobError(f"Ray gave a task up: run the same command again ({one_line(error)})") from error

    return engine
