"""`msgdrop apply` and `verify`: engines that make the files of an OUTPUT, a task each, and what keeps them whole."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock
import xxhash

from msgdrop_numba import journal, threads
from msgdrop_numba.errors import JobError, one_line
from msgdrop_numba.inputs import Input
from msgdrop_numba.shards import PARTIAL, Settings, Task, Written, chunks, run, sync_folder
from msgdrop_numba.version import __version__

CONTRACT = 1
LOCK = ".msgdrop.lock"

Engine = Callable[[list[Task]], Iterator[tuple[Task, Written]]]


def make(
    source: Path,
    found: Input,
    output: Path,
    settings: Settings,
    epochs: int,
    engine: Engine,
    tick: Callable[[int], Any],
) -> int:
    """Make what is missing of an output.

    Args:
        source: the input, whose files are `found`.
        output: a folder, new or of the same job.
        epochs: how many, each in a folder of its own.
        engine: what runs the tasks.
        tick: called with the bytes of each input file that is done, those at the start too.

    Returns:
        How many files it wrote.

    Raises:
        JobError: the output belongs to another job, or is being written; or a task failed.
    """
    _check_place(source.resolve(), output.resolve())
    tasks = {
        Task(
            str(file.path.resolve()),
            str(output.resolve() / f"epoch-{epoch}" / file.name),
            file.name,
            settings,
            epoch,
            file.ids,
        ): file.bytes
        for epoch in range(epochs)
        for file in found.files
    }
    header = {
        "job": "msgdrop apply", "contract": CONTRACT, "version": __version__, "input": found.digest,
        "files": len(tasks), "parameters": {**settings._asdict(), "epochs": epochs},
    }  # fmt: skip
    with _locked(output):
        log = journal.Journal(output, header)
        todo = [task for task in tasks if not _is_done(task, log, output)]
        tick(sum(tasks.values()) - sum(tasks[task] for task in todo))
        for folder in sorted({parent for task in todo for parent in _folders(task, output)}):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
        try:
            for task, written in engine(todo):
                log.add(_name(task, output), written)
                tick(tasks[task])
        finally:
            for partial in output.rglob(f".*{PARTIAL}"):
                partial.unlink(missing_ok=True)
        log.finish()
    return len(todo)


def _check_place(source: Path, output: Path) -> None:
    if output == source or output in source.parents or source in output.parents:
        raise JobError(f"OUTPUT {output} and INPUT {source} must lie beside each other, not one in the other")
    if output.is_dir():
        others = {path.name for path in output.iterdir()} - {LOCK, journal.NAME}
        if others and not (output / journal.NAME).exists():
            raise JobError(f"{output} isn't empty, and no job of msgdrop's began it: give another OUTPUT")


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    output.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise JobError(f"another msgdrop writes to {output}: wait for it, or give another OUTPUT") from None
    try:
        yield
    finally:
        lock.release()


def _name(task: Task, output: Path) -> str:
    return Path(task.target).relative_to(output.resolve()).as_posix()


def _is_done(task: Task, log: journal.Journal, output: Path) -> bool:
    written = log.written.get(_name(task, output))
    path = Path(task.target)
    return written is not None and path.is_file() and path.stat().st_size == written.bytes


def _folders(task: Task, output: Path) -> Iterator[Path]:
    """The folders to make for a file."""
    for folder in Path(task.target).parents:
        if folder == output.resolve():
            return
        yield folder


def size(output: Path) -> int:
    """How many bytes the journal of an output speaks of."""
    return sum(written.bytes for written in journal.read(output)[1].values()) if output.is_dir() else 0


def verify(output: Path, tick: Callable[[int], Any]) -> list[str]:
    """What is wrong with an output, a line each: every byte of every file is looked at.

    Raises:
        JobError: it has no journal.
    """
    header, files = journal.read(output)
    if not header:
        raise JobError(f"{output} has no {journal.NAME}: it is no output of msgdrop apply")
    wrong = []
    if len(files) != header["files"]:
        wrong.append(f"{len(files)} of {header['files']} files are there: run msgdrop apply again to go on")
    there = {p.relative_to(output).as_posix() for p in output.rglob("*") if not p.is_dir()} - {LOCK, journal.NAME}
    wrong += [f"{name} is not in the journal" for name in sorted(there - files.keys())]
    for name, written in files.items():
        if name not in there:
            wrong.append(f"{name} is missing")
            continue
        found = _look(output / name)
        tick(found.bytes)
        if found != written:
            wrong.append(
                f"{name} has changed: {found.bytes} bytes, xxh3 {found.xxh3}, not {written.bytes}, {written.xxh3}"
            )
    return wrong


def _look(path: Path) -> Written:
    checksum, size = xxhash.xxh3_64(), 0
    with open(path, "rb", buffering=0) as file:
        for data in chunks(file):
            checksum.update(data)
            size += len(data)
    return Written(size, checksum.hexdigest())


def local(jobs: int) -> Engine:
    """Processes on this machine."""

    def engine(tasks: list[Task]) -> Iterator[tuple[Task, Written]]:
        if not tasks:
            return
        threads.load()  # compiled once, for the processes to read from the cache
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(jobs, len(tasks)), context, _begin)
        try:
            futures = {pool.submit(run, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise JobError(
                "a process of the job died, of too little memory perhaps: run the same command again"
            ) from None
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    return engine


def _begin() -> None:
    """In each process: one thread, no interrupts but the parent's, and no life after it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _knock(address: str) -> None:
    """Whether anybody listens at HOST:PORT or ray://HOST:PORT; Ray itself would try for minutes."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=5).close()
    except (OSError, ValueError, TypeError) as error:
        raise JobError(f"no Ray answers at {address} ({one_line(error)}): give HOST:PORT of its head node") from error


def on_ray(jobs: int | None, address: str | None) -> Engine:
    """Ray's tasks, on this machine or on the cluster at an address; all of them see the same file system."""
    import ray

    if address is not None:
        _knock(address)

    def engine(tasks: list[Task]) -> Iterator[tuple[Task, Written]]:
        local: dict[str, Any] = {"num_cpus": jobs, "include_dashboard": False} if address is None else {}
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        try:
            remote, waiting = ray.remote(run), iter(tasks)
            running: dict[Any, Task] = {}
            while True:
                for task in islice(waiting, (jobs or 1000) - len(running)):
                    running[remote.remote(task)] = task
                if not running:
                    return
                ready, _ = ray.wait(list(running))
                yield running.pop(ready[0]), ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, JobError) else JobError(one_line(error)) from error
        finally:
            ray.shutdown()

    return engine
