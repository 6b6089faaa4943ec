"""How fast does MessageDropoutBatch run on Ray Data, by workers, and against masked_fill? Blocks in memory. p = 0.3."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.measure import machine, markdown
from msgdrop_numba import MessageDropoutBatch
from msgdrop_numba.command.bench import medians

BLOCKS, ROWS, MESSAGES, FEATURES, P = 16, 128, 256, 512, 0.3  # 64 MiB each


def make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of random numbers, with ids."""
    x = np.random.default_rng(0).standard_normal((len(batch["id"]), MESSAGES, FEATURES), dtype=np.float32)
    return {"id": batch["id"], "x": x}


def masked_fill(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What people write, with masks that nobody can draw again."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the batch is read-only
        x = torch.from_numpy(batch["x"])
    drop = torch.rand(x.shape[:2]) < P
    return {**batch, "x": x.masked_fill(drop[..., None], 0).numpy()}


def seconds(data: Any, work: Any, workers: int) -> float:
    """Seconds to run `work` on all blocks in so many workers."""
    start = time.perf_counter()
    data.map_batches(work, batch_format="numpy", batch_size=ROWS, concurrency=workers).materialize()
    return time.perf_counter() - start


def run(rounds: int) -> dict[str, Any]:
    """Seconds of each job, interleaved."""
    import ray
    import ray.data

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ids = ray.data.from_numpy(list(np.arange(BLOCKS * ROWS).reshape(BLOCKS, ROWS))).rename_columns({"data": "id"})
        data = ids.map_batches(make, batch_format="numpy", batch_size=None).materialize()
        ours = MessageDropoutBatch(P, columns="x", key="id", seed=1)
        jobs: dict[str, Callable[[], float]] = {}
        for workers in (1, 2):
            jobs[f"ours, {workers}"] = partial(seconds, data, ours, workers)
            jobs[f"masked_fill, {workers}"] = partial(seconds, data, masked_fill, workers)
        taken = medians(jobs, rounds)
    finally:
        ray.shutdown()
    size = 4 * BLOCKS * ROWS * MESSAGES * FEATURES
    return {"machine": machine() | {"ray": ray.__version__}, "bytes": size, "rounds": rounds, "seconds": taken}


def bars(results: dict[str, Any]) -> dict[str, float]:
    """ratio of speeds"""
    taken = results["seconds"]
    return {
        "ours, 2 workers: times as fast as 1": taken["ours, 1"] / taken["ours, 2"],
        "masked_fill, 2 workers: times as fast as 1": taken["masked_fill, 1"] / taken["masked_fill, 2"],
        "1 worker: times as fast as masked_fill": taken["masked_fill, 1"] / taken["ours, 1"],
        "2 workers: times as fast as masked_fill": taken["masked_fill, 2"] / taken["ours, 2"],
    }


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    speed = results["bytes"] / 1e6 / results["seconds"]["ours, 2"]
    lines = [[label, f"{ratio:.2f}"] for label, ratio in bars(results).items()]
    return markdown(["on Ray Data", "ratio"], [*lines, ["(ours with 2 workers, MB/s)", f"{speed:,.0f}"]])
