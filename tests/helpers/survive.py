"""Programs that `call/test_survival.py` runs, each a process of its own: `python survive.py NAME ARGUMENTS`, prints "ok"."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from helpers import oracle

SHAPE = (16, 64, 512)  # a batch of 8 is 1 MB: parallel where it may be
SEED = 11


def data() -> Any:
    return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


def want(epoch: int) -> Any:
    """What naive.py keeps of the data."""
    return oracle.dropout(data(), 0.3, seed=SEED, epoch=epoch)[0]


def drop() -> Any:
    """The data, dropped in by the function in epoch 0."""
    from msgdrop_numba import fold_in, message_dropout

    return message_dropout(data(), 0.3, seed=fold_in(SEED, 0))


def right() -> bool:
    return np.array_equal(drop(), want(0))


def right_in_a_pool(count: int) -> bool:
    """Several Python threads at once, ten calls each."""
    expected = want(0)
    with ThreadPoolExecutor(count) as pool:
        return all(pool.map(lambda _: np.array_equal(drop(), expected), range(10 * count)))


class Pooled:
    """A collate that runs the kernels from a thread pool, too, in its worker."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, samples: list) -> Any:
        assert right_in_a_pool(4)
        with ThreadPoolExecutor(4) as pool:
            batches = list(pool.map(self.collate, [samples] * 4))
        assert all(batch.equal(batches[0]) for batch in batches)
        return batches[0]


def loaders(method: str, used: str, counts: str) -> None:
    """DataLoaders with `counts` workers, persistent or not, made by `method`, the parent having used the kernels or not."""
    import numba
    import torch

    from msgdrop_numba import KeyedDataset, MessageDropoutCollate

    warnings.filterwarnings("ignore", "This DataLoader will create 4 worker processes")  # torch's, on two cores
    if used == "used":
        assert right()
        assert right_in_a_pool(2)
        if numba.config.NUMBA_NUM_THREADS > 1:  # else nothing has started one
            assert numba.threading_layer() == os.environ["NUMBA_THREADING_LAYER"]
    dataset = KeyedDataset(list(data()))
    for workers in map(int, counts.split(",")):
        for persistent in (False, True)[: 1 + (workers > 0)]:
            collate = MessageDropoutCollate(0.3, seed=SEED)
            loader: Any = torch.utils.data.DataLoader(
                dataset, 8, num_workers=workers, persistent_workers=persistent, collate_fn=Pooled(collate),
                multiprocessing_context=method if workers else None, timeout=120 if workers else 0,
            )  # fmt: skip
            for epoch in (0, 1):
                collate.set_epoch(epoch)
                assert np.array_equal(torch.cat(list(loader)), want(epoch)), (workers, persistent, epoch)
            del loader
    assert right_in_a_pool(8)


def beside_own_kernels() -> None:
    """The user's own parallel kernel runs at the same time, in a thread and then in the main one."""
    import numba

    @numba.njit(parallel=True)
    def own(x: Any) -> None:
        for i in numba.prange(x.size):
            x[i] += 1

    stop = threading.Event()
    counts = np.zeros(10**6)

    def run() -> None:
        while not stop.is_set():
            own(counts)

    thread = threading.Thread(target=run)
    thread.start()
    assert right_in_a_pool(3)
    assert right()
    stop.set()
    thread.join()
    own(counts)
    assert counts.min() == counts.max() > 1


def check(_: Any) -> bool:
    return right()


def exit_when_right() -> None:
    sys.exit(0 if right() else 3)


def forked() -> int | None:
    """The exit code of a forked child that uses the kernels; None: it hangs."""
    child = multiprocessing.get_context("fork").Process(target=exit_when_right)
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    return code


def first_import_in_a_child() -> None:
    """The parent's own parallel kernel has started a layer; the package comes in with the child."""
    import numba

    @numba.njit(parallel=True)
    def own(x: Any) -> None:
        for i in numba.prange(len(x)):
            x[i] += 1

    own(np.zeros(100))
    assert "msgdrop_numba" not in sys.modules
    assert forked() == 0


def after_torchs_threads(package: str) -> None:
    """torch and numba share the OpenMP library: the child of a parent where torch alone used it may not either."""
    if package == "imported":
        import msgdrop_numba  # noqa: F401
    import torch

    torch.set_num_threads(2)
    torch.ones(10**7).sin()
    assert forked() == 0


def while_another_thread_compiles() -> None:
    assert right()
    import numba

    stop = threading.Event()

    def compile_on_and_on() -> None:
        while not stop.is_set():
            numba.njit(lambda x: x + 1)(1)

    thread = threading.Thread(target=compile_on_and_on)
    thread.start()
    codes = [forked() for _ in range(5)]
    stop.set()
    thread.join()
    assert codes == [0] * 5


def chunks_are(expected: str) -> None:
    from msgdrop_numba.call import threads

    assert threads.chunks(10**7) == int(expected)


def nothing_global_changes() -> None:
    import logging

    import numba
    import scipy.sparse  # noqa: F401  numba may import it as it compiles; it adds a filter of warnings
    import torch

    def state() -> Any:
        return (
            torch.get_num_threads(), numba.config.THREADING_LAYER, dict(os.environ), list(warnings.filters),
            logging.getLogger().level, np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        )  # fmt: skip

    before = state()
    import msgdrop_numba.nn
    import msgdrop_numba.pipelines.collate

    try:
        raise AssertionError(f"importing started the layer {numba.threading_layer()}")
    except ValueError:
        assert state() == before
    assert right()
    msgdrop_numba.keep_mask((2, 3), seed=1)
    assert state() == before
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS


def pool(method: str) -> None:
    """multiprocessing's own pool, before and after the parent used the kernels."""
    context = multiprocessing.get_context(method)
    for _ in range(2):
        with context.Pool(2) as processes:
            assert all(processes.map(check, range(6)))
        assert right()


class Endless:
    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Any:
        return data()[0]


def endless(method: str) -> None:
    """Says "started" and goes on until it is interrupted."""
    import torch

    from msgdrop_numba import KeyedDataset, MessageDropoutCollate

    assert right()
    collate = MessageDropoutCollate(0.3, seed=SEED)
    loader: Any = torch.utils.data.DataLoader(
        KeyedDataset(Endless()), 16, num_workers=2, collate_fn=collate, multiprocessing_context=method
    )
    for number, _ in enumerate(loader):
        if number == 3:
            print("started", flush=True)


def first_of_many(folder: str) -> None:
    """Several processes at once on an empty cache."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
    command = [sys.executable, "-W", "error", __file__, "check_alone"]
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(6)]
    assert [child.wait() for child in children] == [0] * 6


def check_alone() -> None:
    assert right()


def cached(method: str) -> None:
    """A worker compiles nothing: it reads the cache, or inherits what its parent has."""
    import torch

    from msgdrop_numba import KeyedDataset, MessageDropoutCollate

    collate = MessageDropoutCollate(0.3, seed=SEED)
    loader: Any = torch.utils.data.DataLoader(
        KeyedDataset(list(data())),
        8,
        num_workers=1,
        collate_fn=Watched(collate, method),
        multiprocessing_context=method,
    )
    assert np.array_equal(torch.cat(list(loader)), want(0))


class Watched:
    """A collate that looks at the compiler before and after."""

    def __init__(self, collate: Any, method: str) -> None:
        self.collate, self.method, self.parent = collate, method, os.getpid()

    def __call__(self, samples: list) -> Any:
        from msgdrop_numba.kernels.cpu import drop_parallel, drop_range

        assert drop_range.signatures or self.method != "fork"  # inherited
        batch = self.collate(samples)
        assert os.getpid() != self.parent
        assert not drop_range.stats.cache_misses, drop_range.stats
        assert not drop_parallel.signatures
        return batch


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    print("ok")
