"""Launch of the CPU kernels: the number of threads, and whether a parallel kernel may start in this process.

Threads that go wrong take the process along: under omp a forked child that starts a parallel kernel is killed if its
parent did so, and hangs if its parent ran a parallel operation of torch, which shares the OpenMP library; under
workqueue two Python threads in parallel kernels abort. So a parallel kernel starts only where it may, and the serial
one, which writes the same bytes, runs everywhere else. No setting of the user's is changed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

import numba
from numba import config
from numba.core.compiler_lock import global_compiler_lock

from msgdrop_numba.call.plan import PARALLEL_BYTES, PLAIN, MaskArgs, Plan, make_plan
from msgdrop_numba.call.rule import BERNOULLI
from msgdrop_numba.kernels._jit import compiled, direct
from msgdrop_numba.kernels.cpu import drop_parallel, drop_range
from msgdrop_numba.kernels.gather import in_parallel
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.kernels.rules import decide

SEARCHED = 32  # the cost of deciding one message under a count-limited rule, in bytes written


class _Layer:
    """The threading layer of this process."""

    def __init__(self, forked: bool) -> None:
        # Whether parallel kernels may run on it; None until the first one asks. Not in a forked process: its parent's
        # threads are not here, nor can it know whether there were any.
        self.usable: bool | None = False if forked else None

    def may_start(self) -> bool:
        if self.usable is None:
            numba.get_num_threads()  # starts the layer, which alone tells its name
            self.usable = numba.threading_layer() != "workqueue"
        return self.usable


# Imported for the first time in a child of multiprocessing, a fork isn't seen; spawned children have this argument.
_layer = _Layer(forked=multiprocessing.parent_process() is not None and "--multiprocessing-fork" not in sys.orig_argv)


def chunks(nbytes: int) -> int:
    """The number of parts for a job that writes `nbytes`; 1 is the serial kernel."""
    return 1 if nbytes < PARALLEL_BYTES else _budget()


def _budget() -> int:
    """The number of parts for a large job.

    Torch's thread count where torch is loaded (1 in a DataLoader worker), else OMP_NUM_THREADS where that is set (Ray
    sets it to a task's CPUs), and at most numba's.
    """
    budget: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    of_torch = getattr(sys.modules.get("torch"), "get_num_threads", None)  # not there yet in a half-done import
    if of_torch is not None:
        budget = min(budget, of_torch())
    elif (asked := os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()).isdecimal():
        budget = min(budget, int(asked[:9]))
    return budget if budget > 1 and _layer.may_start() else 1


def launch(plan: Plan, args: MaskArgs, seed: int, x: int, out: int, mask: int) -> bool:
    """Run the kernel, serial or parallel, from address x to address out, 0: make the mask alone. True: it is done."""
    bits = seed if seed < 2**63 else seed - 2**64  # `arguments.signed`, without a call that a small one feels
    rule = 0 if (plan.is_bernoulli and args.is_bernoulli) or args.given else compiled(decide)
    nbytes = plan.nbytes
    if not out:  # a byte a message; where rows must be searched, it takes as long as writing more
        nbytes = plan.messages * (SEARCHED if plan.numbers.count_limited else 1)
    if nbytes < PARALLEL_BYTES or (parts := _budget()) == 1:  # `chunks`, without a call that a small one feels
        direct(drop_range)(0, plan.messages, plan.address, args.address, x, out, mask, bits, rule)
    else:
        records = plan.address, args.address
        direct(drop_parallel)(compiled(drop_range), plan.messages, *records, x, out, mask, bits, rule, parts)
    return True


def run(kernel: Any, count: int, job: int, nbytes: int) -> None:
    """Run a kernel of kernels.gather over 0..count - 1, serial or parallel, as the record at `job` says."""
    parts = chunks(nbytes)
    if parts == 1:
        direct(kernel)(0, count, job)
    else:
        direct(in_parallel)(compiled(kernel), count, job, parts)


def cache_folder() -> str | None:
    """The folder of compiled code; None: there is none."""
    return getattr(getattr(drop_range, "_cache", None), "cache_path", None)  # none without the compiler


def load() -> None:
    """Compile the serial kernel, or read it from the cache."""
    launch(_NOTHING, PLAIN, 0, 0, 0, 0)


_NOTHING = make_plan((1, 1), 1, COPY, 1, BERNOULLI)


def _after_fork_in_child() -> None:
    _layer.usable = False


if hasattr(os, "register_at_fork"):  # Windows never forks
    # A fork while another thread compiles would leave the child's first compile waiting for ever: no fork meanwhile.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )
    os.register_at_fork(after_in_child=_after_fork_in_child)
