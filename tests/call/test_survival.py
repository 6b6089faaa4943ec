"""No fork, thread, layer, loader or signal kills or hangs anybody, and all give equal bytes (LIMITS.md, Threads and forks)."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.processes
PROGRAMS = TESTS / "helpers" / "survive.py"


def tbb_folder() -> str | None:
    """Where the tbb package has put its library, if it is installed."""
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    folders = {str(Path(str(file.locate())).resolve().parent) for file in files if file.name.startswith("libtbb.so")}
    return min(folders, default=None)


def environment(layer: str, **more: str) -> dict[str, str]:
    # two threads on any machine, so that kernels are parallel where they may be
    variables = {**os.environ, "NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    path = [str(TESTS), os.environ.get("PYTHONPATH", "")]  # for naive.py
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    if layer == "tbb":
        folder = tbb_folder()
        if folder is None:
            pytest.skip("tbb isn't installed here: there is no library for numba's tbb layer")
        variables["LD_LIBRARY_PATH"] = folder
    return {**variables, **more}


def run(layer: str, *arguments: str, **more: str) -> None:
    """A program of `survive.py` ends well, and says nothing but "ok"; tbb's own messages are allowed, on both streams."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAMS), *arguments],
        capture_output=True, text=True, timeout=400, check=False, env=environment(layer, **more),
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if layer != "tbb" or "Attempted to fork" not in line]
    told = [line for line in done.stdout.splitlines() if layer != "tbb" or "Unable to join threads" not in line]
    assert (done.returncode, said, "\n".join(told).split()) == (0, [], ["ok"])


layers = pytest.mark.parametrize("layer", ["omp", "workqueue", "tbb"])


@pytest.mark.parametrize(
    ("layer", "method", "used", "workers"),
    [
        ("omp", "fork", "used", "1,4,0"),
        ("workqueue", "fork", "used", "4,0"),
        ("tbb", "fork", "used", "4,0"),
        ("omp", "forkserver", "unused", "1"),
    ],
)
def test_loaders(layer, method, used, workers):
    run(layer, "loaders", method, used, workers)


@pytest.mark.long
@layers
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("used", ["used", "unused"])
def test_loaders_of_every_kind(layer, method, used):
    run(layer, "loaders", method, used, "1,4,0")


@layers
def test_beside_parallel_kernels_of_the_users_own(layer):
    run(layer, "beside_own_kernels")


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
@layers
def test_pools_of_multiprocessing(layer, method):
    run(layer, "pool", method)


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_a_child_that_imports_us_first_after_a_layer_started(layer):
    run(layer, "first_import_in_a_child")


@pytest.mark.parametrize("package", ["imported", "not imported"])
def test_children_of_a_parent_that_used_torchs_threads(package):
    run("omp", "after_torchs_threads", package)


def test_a_fork_while_another_thread_compiles(tmp_path):
    run("omp", "while_another_thread_compiles", NUMBA_CACHE_DIR=str(tmp_path))  # empty: the children compile, too


@pytest.mark.parametrize(("layer", "parts"), [("omp", "2"), ("workqueue", "1")])
def test_parallel_kernels_run_on_omp_and_never_on_workqueue(layer, parts):
    run(layer, "chunks_are", parts)


def test_nothing_global_is_changed():
    run("omp", "nothing_global_changes")


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_one_thread_for_numba(layer):
    run(layer, "loaders", "fork", "used", "1,0", NUMBA_NUM_THREADS="1")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_interrupt_in_mid_epoch_ends_it(method):
    """Ctrl-C goes to the whole group of processes; none of them is left."""
    program = subprocess.Popen(
        [sys.executable, str(PROGRAMS), "endless", method],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment("omp"),
    )  # fmt: skip
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "started\n"
        os.killpg(program.pid, signal.SIGINT)
        _, errors = program.communicate(timeout=60)
        assert errors.splitlines()[-1] == "KeyboardInterrupt"
        assert program.returncode in (1, -signal.SIGINT, 128 + signal.SIGINT)
        for _ in range(100):
            try:
                os.killpg(program.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("a process is left")
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_compile_nothing(method):
    run("omp", "check_alone")  # fills the cache, if nothing has before
    run("omp", "cached", method)


@pytest.mark.long
def test_many_processes_on_an_empty_cache(tmp_path):
    run("omp", "first_of_many", str(tmp_path))


@pytest.mark.long
def test_xdist():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "tests/test_vectors.py", "tests/pipelines/test_collate.py"],
        capture_output=True, text=True, timeout=400, check=False, cwd=TESTS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
