"""Does `msgdrop apply` keep up with copying and fsyncing the same files, in processes that have started? p = 0.3."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from benchmarks import copying
from benchmarks.measure import machine, markdown
from msgdrop_numba.call.rule import Rule
from msgdrop_numba.command import apply, engines, inputs
from msgdrop_numba.command.bench import medians
from msgdrop_numba.command.shards import Settings, Task, Written
from msgdrop_numba.command.shards import run as run_task

PLACES = {"disk": None, "tmpfs": "/dev/shm"}
SHARDS, ROWS, MESSAGES, FEATURES = 8, 1024, 64, 512  # 128 MiB each
BYTES = 4 * SHARDS * ROWS * MESSAGES * FEATURES
NPY = Settings(0.3, 1, Rule(0.3), None, None, None)
KINDS = {"npy": NPY, "parquet": NPY._replace(columns=("x",), key="id")}


def make(folder: Path, kind: str, shards: int, rows: int) -> None:
    """The shards, random numbers that nothing compresses."""
    folder.mkdir()
    x = np.random.default_rng(0).standard_normal((rows, MESSAGES, FEATURES), dtype=np.float32)
    for number in range(shards):
        if kind == "npy":
            np.save(folder / f"{number}.npy", x)
        else:
            ids = np.arange(number * rows, (number + 1) * rows)
            table = pa.table({"id": ids, "x": pa.FixedShapeTensorArray.from_numpy_ndarray(x)})
            parquet.write_table(
                table, folder / f"{number}.parquet", row_group_size=256, compression="none", use_dictionary=False
            )


def applied(pool: ProcessPoolExecutor, source: Path, output: Path, settings: Settings) -> float:
    """Seconds of a job, from finding the files to its journal's end."""

    def engine(tasks: list[Task]) -> Iterator[tuple[Task, Written]]:
        futures = {pool.submit(run_task, task): task for task in tasks}
        return ((futures[future], future.result()) for future in as_completed(futures))

    start = time.perf_counter()
    apply.make(source, inputs.find(source, settings), output, settings, 1, engine, lambda count: None)
    return _ended(start, output)


def copied(pool: ProcessPoolExecutor, how: Callable[[str, str], None], source: Path, output: Path) -> float:
    """Seconds to do this to all files of a folder."""
    start = time.perf_counter()
    output.mkdir()
    names = sorted(path.name for path in source.iterdir())
    list(pool.map(how, [str(source / name) for name in names], [str(output / name) for name in names]))
    return _ended(start, output)


def _ended(start: float, output: Path) -> float:
    # Deleted at once, so that the next one writes to the same memory: what is free for seconds goes back to the host
    # of a virtual machine, and fetching it anew takes several times as long as all the rest.
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    return seconds


def started(folder: Path) -> float:
    """Seconds of the whole command for one tiny shard: what starting costs."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "msgdrop_numba", "apply", str(folder / "tiny"), str(folder / "out")]
    subprocess.run([*command, "--p", "0.3", "--seed", "1", "--jobs", "1"], check=True, stdout=subprocess.DEVNULL)
    return _ended(start, folder / "out")


def run(rounds: int) -> dict[str, Any]:
    """Seconds of each, by place, kind of file and processes; a place at a time."""
    taken: dict[str, dict[str, float]] = {}
    start = 0.0
    for place, parent in PLACES.items():
        taken[place] = {}
        with tempfile.TemporaryDirectory(dir=parent) as name:
            folder = Path(name)
            for kind, settings in KINDS.items():
                source, output = folder / kind, folder / "out"
                make(source, kind, SHARDS, ROWS)
                for jobs in (1, 2):
                    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), engines._begin) as pool:
                        cases: dict[str, Callable[[], float]] = {
                            f"{kind}, {jobs}, apply": partial(applied, pool, source, output, settings),
                            f"{kind}, {jobs}, copy": partial(copied, pool, copying.copy, source, output),
                        }
                        if kind == "parquet":
                            rewrite = partial(copied, pool, copying.rewrite, source, output)
                            cases[f"{kind}, {jobs}, rewrite"] = rewrite
                        taken[place] |= medians(cases, rounds)
                shutil.rmtree(source)
            make(folder / "tiny", "npy", 1, 1)
            start = medians({"start": partial(started, folder)}, rounds)["start"]
    return {"machine": machine(), "bytes": BYTES, "rounds": rounds, "seconds": taken, "start": start}


def _rows(results: dict[str, Any]) -> list[tuple[str, str, str, float, dict[str, float]]]:
    """Kind, place, processes, seconds of ours, and of the others."""
    rows = []
    for place, taken in results["seconds"].items():
        for name, ours in taken.items():
            kind, jobs, how = name.split(", ")
            if how == "apply":
                names = {how: f"{kind}, {jobs}, {how}" for how in ("copy", "rewrite")}
                rows.append((kind, place, jobs, ours, {how: taken[n] for how, n in names.items() if n in taken}))
    return rows


def bars(results: dict[str, Any]) -> dict[str, float]:
    """speed of `msgdrop apply`, of copying's"""
    return {f"{kind}, {place}, {jobs}": others["copy"] / ours for kind, place, jobs, ours, others in _rows(results)}


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    lines = []
    for kind, place, jobs, ours, others in _rows(results):
        ratios = [f"{others[how] / ours:.2f}" if how in others else "–" for how in ("copy", "rewrite")]
        lines.append([kind, place, jobs, f"{results['bytes'] / 1e6 / ours:,.0f}", *ratios])
    start = [f"the command for one tiny shard takes {results['start']:.1f} s", "", "", "", "", ""]
    return markdown(["shards", "on", "processes", "MB/s", "of copying", "of pyarrow's read and write"], [*lines, start])
