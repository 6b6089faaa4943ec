"""Ray for tests: here alone, or as a cluster of several nodes on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@contextmanager
def connected(address: str = "local", **options: Any) -> Iterator[Any]:
    """`ray`, with Ray Data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        import ray.data

        ray.init(address, log_to_driver=False, logging_level=40, **options)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """So many nodes of one CPU each, the head among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        started = Cluster()
    try:
        for number in range(nodes):
            started.add_node(**NODE, **({} if number else {"include_dashboard": False}))
        yield started
    finally:
        started.shutdown()
