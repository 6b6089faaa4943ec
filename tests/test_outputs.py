"""Memory for large outputs: lent again only when nobody can reach it, bounded, private to a process."""

from __future__ import annotations

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import naive
import numpy as np
import pytest
import torch
from helpers import holding, internals

from msgdrop_numba import message_dropout, message_select, outputs
from msgdrop_numba.tensors import memory

SHAPE = (16, 16, 256)
NBYTES = 4 * 16 * 16 * 256
X = torch.from_numpy(np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32))


@pytest.fixture(autouse=True)
def _small(reset_outputs, monkeypatch):
    """Everything counts as large."""
    internals.large_outputs(monkeypatch, 1024)


def fresh() -> torch.Tensor:
    return message_dropout(X, 0.5, seed=1)


# ---- lent again


@pytest.mark.parametrize("numpy", [False, True])
def test_memory_of_a_dead_output_is_lent_again(numpy):
    x = X.numpy() if numpy else X

    def place():
        y = message_dropout(x, 0.5, seed=1)
        return y.ctypes.data if numpy else y.data_ptr()

    assert place() == place()
    assert outputs.idle_bytes() >= NBYTES
    both = [message_dropout(x, 0.5, seed=seed) for seed in (1, 2)]
    assert not np.shares_memory(np.asarray(both[0]), np.asarray(both[1]))


def test_removal_and_gradients_take_part():
    weight = X.clone().requires_grad_()
    for run in range(3):
        before = set(internals.lent_blocks())
        y, kept = message_select(weight, 0.5, seed=run)
        back = kept.restore(y)
        back.sum().backward()
        assert len(set(internals.lent_blocks()) - before) >= 2
        weight.grad = None
        del y, kept, back
    a, _ = message_select(X.numpy(), 0.5, exact=True, seed=1)
    assert not a.flags.owndata


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64, torch.bool, torch.uint16]
)
def test_outputs_of_every_dtype_are_ordinary_tensors(dtype):
    x = X.to(dtype)
    y = message_dropout(x, 0.5, seed=1)
    assert (y.dtype, y.shape, y.stride(), y.device) == (x.dtype, x.shape, x.stride(), x.device)
    assert not y._is_view()
    assert y.is_leaf
    assert y.untyped_storage().nbytes() == x.untyped_storage().nbytes()


def test_outputs_of_several_sizes_take_no_turns():
    """A model with two large outputs uses the memory of both again."""
    places = [{message_dropout(X[:rows], 0.5).data_ptr() for rows in (16, 8)} for _ in range(3)]
    assert len(places[0]) == 2
    assert places[0] == places[1] == places[2]


def test_outputs_of_nearly_one_size_share_blocks():
    """As batches that are padded to lengths of their own."""
    sizes = {outputs._block_size(nbytes) for nbytes in range(2**20, 2**21, 4096)}
    assert len(sizes) == 9
    for nbytes in (1024, 4097, 2**20, 2**20 + 1, 3 * 2**30 + 7):
        size = outputs._block_size(nbytes)
        assert nbytes <= size <= max(8192, nbytes * 9 // 8)
        assert size % 4096 == 0


def test_an_array_lies_as_numpy_lays_it():
    for view in (
        X.numpy(),
        X.numpy().T,
        X.numpy()[:, :, ::2],
        np.flip(X.numpy(), 1).transpose(1, 0, 2),
        X.numpy()[:1].T,
    ):
        assert outputs.array_like(view).strides == np.empty_like(view, subok=False).strides


# ---- never while somebody can read it


@pytest.mark.parametrize("hold", holding.TENSORS)
def test_memory_of_a_tensor_that_is_held_is_not_lent(hold):
    y = fresh()
    held = holding.TENSORS[hold](y)
    del y
    gc.collect()
    before = np.asarray(held()).tobytes()
    assert any(before)
    others = [memory.empty(SHAPE, torch.float32).fill_(7) for _ in range(3)]
    assert np.asarray(held()).tobytes() == before
    del held
    gc.collect()
    assert outputs.idle_bytes() >= NBYTES, "it is lent again once nobody holds it"
    del others


@pytest.mark.parametrize("hold", holding.ARRAYS)
def test_memory_of_an_array_that_is_held_is_not_lent(hold):
    y = message_dropout(X.numpy(), 0.5, seed=1)
    held = holding.ARRAYS[hold](y)
    del y
    gc.collect()
    before = np.asarray(held()).tobytes()
    assert any(before)
    others = [outputs.array(SHAPE, np.dtype(np.float32)) for _ in range(3)]
    for other in others:
        other.fill(7)
    assert np.asarray(held()).tobytes() == before
    del held
    gc.collect()
    assert outputs.idle_bytes() >= NBYTES, "it is lent again once nobody holds it"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda y: y.resize_(1, 2, 3), None),
        (lambda y: y.resize_(99, 99, 99), "not resizable"),
        (lambda y: y.untyped_storage().resize_(0), "not resizable"),
        (lambda y: y.set_(torch.ones(3)), None),
        (lambda y: y.set_(), None),
        (lambda y: y.share_memory_(), None),
        (lambda y: (y.untyped_storage().share_memory_(), y)[1], None),
        (lambda y: torch.add(torch.ones(40, 40, 999), 1, out=y), "not resizable"),
        (lambda y: (setattr(y, "data", torch.zeros(5)), y)[1], None),
        (lambda y: message_dropout(X.numpy(), 0.5).resize((3,), refcheck=False), "does not own its data"),
    ],
    ids=["smaller", "larger", "freed", "set", "emptied", "shared", "shared storage", "out", "data", "NumPy"],
)
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
def test_changes_of_an_output_are_torchs_and_reach_no_other(change, error):
    y, other = fresh(), message_dropout(X, 0.5, seed=2)
    want = other.clone()
    if error is None:
        change(y).fill_(9)
    else:
        with pytest.raises((RuntimeError, ValueError), match=error):
            change(y)  # after a refused resize_ torch leaves y with sizes that its storage doesn't have
    some = [fresh() for _ in range(3)]
    assert torch.equal(other, want)
    right = torch.from_numpy(naive.drop(X.numpy(), naive.keep_mask(SHAPE[:2], 0.5, seed=1)))
    assert all(torch.equal(each, right) for each in some)
    del y
    assert torch.equal(fresh(), some[0])


@pytest.mark.parametrize("first", [True, False])
def test_memory_goes_from_inference_mode_to_training_and_back(first):
    with torch.inference_mode(first):
        place = fresh().data_ptr()
    with torch.inference_mode(not first):
        y = fresh().fill_(2)
        assert y.data_ptr() == place
        assert y.is_inference() is not first
    if first:
        weight = torch.ones(SHAPE, requires_grad=True)
        (weight * y).sum().backward()  # what is made in inference mode can't be saved for backward
        assert torch.equal(weight.grad, y)


def test_a_default_device_does_not_matter():
    with torch.device("meta"):
        assert memory.empty(SHAPE, torch.float32).device.type == "cpu"


# ---- bounded


def test_idle_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(outputs, "KEPT_BYTES", 3 * NBYTES)
    held = [fresh() for _ in range(10)]
    assert len({y.data_ptr() for y in held}) == 10
    held.clear()
    assert outputs.idle_bytes() == 3 * NBYTES


def test_without_idle_memory_outputs_are_torchs_and_numpys_own(monkeypatch):
    y = fresh()
    monkeypatch.setattr(outputs, "KEPT_BYTES", 0)
    del y
    assert outputs.idle_bytes() == 0
    fresh().resize_(40, 40, 999)
    assert message_dropout(X.numpy(), 0.5).flags.owndata


def test_blocks_that_wait_long_are_given_back(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(outputs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(outputs, "_trim_time", 0.0)
    y, z = fresh(), message_dropout(X[:8], 0.5)
    del y
    now[0] += outputs.IDLE_SECONDS - 1
    message_dropout(X[:8], 0.5)
    assert outputs.idle_bytes() == NBYTES * 3 // 2
    now[0] += 10
    del z
    assert outputs.idle_bytes() == NBYTES


def test_without_mappings_outputs_are_torchs_and_numpys_own(monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(outputs.mmap, "mmap", refuse)
    x = X[:, :13]
    message_dropout(x, 0.5).resize_(40, 40, 999)
    want = naive.drop(x.numpy(), naive.keep_mask(x.shape[:2], 0.5, seed=1))
    assert np.array_equal(message_dropout(x, 0.5, seed=1), want)
    assert np.array_equal(message_dropout(x.numpy(), 0.5, seed=1), want)


# ---- threads, finalizers, processes


def test_outputs_are_right_while_their_memory_goes_round():
    want = [naive.drop(X.numpy(), naive.keep_mask(SHAPE[:2], 0.5, seed=seed)) for seed in range(5)]

    def work(first):
        kept = None
        for seed in [*range(first, 5), *range(first)] * 20:
            y = message_dropout(X if first % 2 else X.numpy(), 0.5, seed=seed)
            assert np.array_equal(y, want[seed])
            if kept is not None:
                assert np.array_equal(kept[1], want[kept[0]])
            kept = (seed, y)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_threads_that_share_outputs_while_others_drop():
    """A queue's feeder thread moves a storage into shared memory, and lets go of it."""
    wrong: list[int] = []
    sent: queue.Queue[tuple[int, torch.Tensor] | None] = queue.Queue(maxsize=4)

    def feed():
        while (item := sent.get()) is not None:
            number, y = item
            y.share_memory_()
            view = y.view(-1)
            del item, y
            if not bool((view == number).all()):
                wrong.append(number)

    feeders = [threading.Thread(target=feed) for _ in range(2)]
    [feeder.start() for feeder in feeders]
    for number in range(600):
        y = memory.empty(SHAPE, torch.float32).fill_(number)
        if not bool((y == number).all()):
            wrong.append(number)
        sent.put((number, y))
        del y
    [sent.put(None) for _ in feeders]
    [feeder.join() for feeder in feeders]
    assert wrong == []


def test_a_finalizer_in_the_middle_of_lending(monkeypatch):
    """The garbage collector may free outputs anywhere, and so may a signal's handler."""
    held = [fresh() for _ in range(3)]
    internals.when_a_block_is_lent(monkeypatch, lambda: held and held.pop())
    made = [memory.empty(SHAPE, torch.float32).fill_(number) for number in range(6)]
    assert [float(y.mean()) for y in made] == [0, 1, 2, 3, 4, 5]
    assert len({y.data_ptr() for y in made}) == 6


class Reviving:
    """Garbage in a cycle, whose finalizer makes outputs, reads what it holds, and gives it back to the living."""

    revived: ClassVar[list] = []

    def __init__(self, held, read):
        self.held, self.read, self.before, self.itself = held, read, read(held), self

    def __del__(self):
        others = [message_dropout(np.full(SHAPE, 7, np.float32), 0.5) for _ in range(3)]
        self.revived.append((self.held, self.before, self.read(self.held), others))


@pytest.mark.parametrize("what", ["base", "array", "tensor", "storage"])
def test_finalizers_of_garbage_may_read_and_revive_an_output(what):
    """The garbage collector clears weak references before finalizers run."""
    x = X if what in ("tensor", "storage") else X.numpy()
    y = message_dropout(x, 0.5, seed=1)
    held = y.base if what == "base" else y.untyped_storage() if what == "storage" else y

    def read(held):
        return (
            bytes(held[:4096].tolist()) if what == "storage" else bytes(memoryview(np.asarray(held)).cast("B")[:4096])
        )

    thing = Reviving(held, read)
    del y, held, thing
    gc.collect()
    revived, before, after, others = Reviving.revived.pop()
    assert before == after
    others += [message_dropout(np.full(SHAPE, 9, np.float32), 0.5) for _ in range(3)]
    assert read(revived) == before
    del revived, others
    gc.collect()
    assert outputs.idle_bytes() >= 4 * NBYTES, "and then it is lent again"


def test_an_output_in_a_cycle_that_frees_itself():
    for number in range(5):
        y = memory.empty(SHAPE, torch.float32).fill_(number)
        cycle: list = [y]
        cycle.append(cycle)
        del y, cycle
    gc.collect()
    assert outputs.idle_bytes() % NBYTES == 0
    assert len({memory.empty(SHAPE, torch.float32).fill_(1).data_ptr() for _ in range(3)}) == 1


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system never forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_writes_into_memory_of_its_own():
    """It has no idle blocks, and what it writes into an output that lived at the fork stays its own."""
    y, idle = fresh(), fresh()
    want, place = y.clone(), y.data_ptr()
    del idle
    assert outputs.idle_bytes() == NBYTES
    child = os.fork()
    if child == 0:
        code = 1
        try:
            started_empty = outputs.idle_bytes() == 0
            y.numpy().fill(7)  # torch's own operations may hang in a forked child
            del y
            again = memory.empty(SHAPE, torch.float32)
            again.numpy().fill(8)
            code = 0 if started_empty and again.data_ptr() == place else 2
        finally:
            os._exit(code)
    deadline, status = time.monotonic() + 60, (0, 0)
    while status[0] == 0 and time.monotonic() < deadline:
        status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    assert status == (child, 0)
    assert torch.equal(y, want)


@pytest.mark.processes
@pytest.mark.parametrize("jobs", ["exit", "exit in a thread", "queue", "pipe"])
def test_outputs_in_other_processes(jobs):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "helpers.sending", jobs], cwd=os.path.dirname(__file__),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["ok"]), done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
@pytest.mark.parametrize("strategy", sorted(torch.multiprocessing.get_all_sharing_strategies()))
@pytest.mark.parametrize("start", sorted({"fork", "spawn"} & set(torch.multiprocessing.get_all_start_methods())))
@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.long)])
def test_a_loader_whose_dataset_returns_outputs(start, strategy, seconds):
    """Memory that was guessed to be free changed 2 to 7 of some 20,000 items a minute: the long run is the proof."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.sending", "loader", start, strategy, str(seconds)],
        cwd=os.path.dirname(__file__), capture_output=True, text=True, timeout=seconds + 100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    items, wrong = map(int, done.stdout.split()[:2])
    assert items > 50
    assert wrong == 0
