"""Where a parallel kernel starts, and that no fork, thread or layer kills anybody."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from msgdrop_numba import keep_mask, message_dropout, threads

PRELUDE = """
import hashlib, multiprocessing, os, sys, threading
import numpy as np
SHAPE = (16, 64, 512)  # 2 MB: parallel where it may be

def digest(seed=5):
    from msgdrop_numba import message_dropout
    x = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    return hashlib.sha256(message_dropout(x, 0.3, seed=seed).tobytes()).hexdigest()

def child(queue):
    queue.put(digest())

def in_child(method):
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    result = queue.get() if not process.join(60) and process.exitcode == 0 else f"exit code {process.exitcode}"
    return result
"""


def want() -> str:
    scope: dict = {}
    exec(PRELUDE + "\nresult = digest()", scope)
    return scope["result"]


def run(tmp_path, body: str, **environment: str) -> str:
    """The output of a program of its own, which must end well and say nothing on stderr."""
    script = tmp_path / "program.py"
    script.write_text(
        PRELUDE + "\nif __name__ == '__main__':\n" + "\n".join("    " + line for line in body.splitlines())
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True, text=True, timeout=150, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


layers = pytest.mark.parametrize("layer", ["omp", "workqueue"])


@layers
@pytest.mark.parametrize(
    ("method", "torch_too"), [("fork", False), ("fork", True), ("spawn", True), ("forkserver", False)]
)
def test_children_of_a_parent_that_used_the_kernels(tmp_path, layer, method, torch_too):
    body = f"""
{"import torch" if torch_too else ""}
print(digest())
import numba
print(numba.threading_layer())
print(in_child({method!r}))
print(digest())
"""
    # two threads on any machine, so that the parent's kernel is parallel
    two = {"NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    assert run(tmp_path, body, NUMBA_THREADING_LAYER=layer, **two).split() == [want(), layer, want(), want()]


@layers
def test_a_child_that_imports_us_first_after_a_layer_started(tmp_path, layer):
    body = """
import numba
@numba.njit(parallel=True)
def own(x):
    for i in numba.prange(len(x)):
        x[i] += 1
own(np.zeros(100))
assert "msgdrop_numba" not in sys.modules
print(in_child("fork"))
"""
    assert run(tmp_path, body, NUMBA_THREADING_LAYER=layer).split() == [want()]


@layers
def test_python_threads_at_once(tmp_path, layer):
    body = """
results = []
threads = [threading.Thread(target=lambda: results.extend(digest() for _ in range(20))) for _ in range(6)]
[t.start() for t in threads]
[t.join() for t in threads]
print(len(results), len(set(results)), results[0])
"""
    assert run(tmp_path, body, NUMBA_THREADING_LAYER=layer).split() == ["120", "1", want()]


@pytest.mark.parametrize("imported", [False, True])
def test_children_of_a_parent_that_used_torchs_threads(tmp_path, imported):
    """torch and numba share the OpenMP library: the child of a parent where torch alone used it may not either."""
    body = f"""
{"import msgdrop_numba" if imported else ""}
import torch
torch.set_num_threads(2)
torch.ones(10**7).sin()
print(in_child("fork"))
"""
    assert run(tmp_path, body).split() == [want()]


def test_a_fork_while_another_thread_compiles(tmp_path):
    body = """
digest()
import numba
def compile_for_ever():
    while not done:
        numba.njit(lambda x: x + 1)(1)
done = False
thread = threading.Thread(target=compile_for_ever)
thread.start()
results = set()
for _ in range(5):
    results.add(in_child("fork"))
done = True
thread.join()
print(*results)
"""
    # a new cache folder: the children compile for themselves
    assert run(tmp_path, body, NUMBA_CACHE_DIR=str(tmp_path)).split() == [want()]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_after_the_parent_used_the_kernels(workers):
    message_dropout(torch.ones(16, 64, 512), 0.3)
    from msgdrop_numba import KeyedDataset, MessageDropoutCollate

    data = [torch.ones(64, 512) for _ in range(16)]
    collate = MessageDropoutCollate(0.3, seed=1)
    loader = torch.utils.data.DataLoader(KeyedDataset(data), 8, num_workers=workers, collate_fn=collate)
    got = torch.cat(list(loader))
    assert np.array_equal(got[..., 0].bool(), keep_mask((16, 64), 0.3, seed=_epoch_seed(1)))


def _epoch_seed(seed: int) -> int:
    from msgdrop_numba import fold_in

    return fold_in(seed, 0)


# ---- the decision


def test_the_budget(monkeypatch):
    monkeypatch.setattr(threads._layer, "forked", False)
    monkeypatch.setattr(threads._layer, "usable", True)
    monkeypatch.setattr(threads.config, "NUMBA_NUM_THREADS", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    big = threads.PARALLEL_BYTES
    assert threads.chunks(big) == 3
    assert threads.chunks(big - 1) == 1
    monkeypatch.setattr(threads.config, "NUMBA_NUM_THREADS", 2)
    assert threads.chunks(big) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads.chunks(big) == 1
    monkeypatch.delitem(sys.modules, "torch")
    assert threads.chunks(big) == 2
    monkeypatch.setattr(threads._layer, "usable", False)
    assert threads.chunks(big) == 1
    monkeypatch.setattr(threads._layer, "usable", True)
    monkeypatch.setattr(threads._layer, "forked", True)
    assert threads.chunks(big) == 1


@pytest.mark.parametrize(("layer", "parts"), [("omp", "2"), ("workqueue", "1")])
def test_parallel_kernels_run_on_omp_and_never_on_workqueue(tmp_path, layer, parts):
    body = "from msgdrop_numba import threads\nprint(threads.chunks(10**7))"
    assert run(tmp_path, body, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2").split() == [parts]


def test_nothing_global_is_changed(tmp_path):
    body = """
import logging, warnings
import numba, torch
def state():
    return (torch.get_num_threads(), numba.config.THREADING_LAYER, dict(os.environ), list(warnings.filters),
            logging.getLogger().level, np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
before = state()
import msgdrop_numba, msgdrop_numba.nn, msgdrop_numba.collate
try:
    numba.threading_layer()
except ValueError:
    print("no layer started", state() == before)
digest()
msgdrop_numba.keep_mask((2, 3), seed=1)
print(state() == before, numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS)
"""
    assert run(tmp_path, body).split() == ["no", "layer", "started", "True", "True", "True"]
