"""Ranks of a gloo world on this machine: `held` starts them and tells what failed where; forked, to import torch once."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RANKS = 4


class Report:
    """What a rank's checks came to."""

    def __init__(self) -> None:
        self.checked = 0
        self.failed: list[str] = []

    def expect(self, label: Any, held: bool) -> None:
        """One check; the next ones go on, so that no rank waits for another."""
        self.checked += 1
        if not held:
            self.failed.append(str(label))

    def attempt(self, check: Callable[..., None], *arguments: Any) -> None:
        """`check(report, *arguments)`; what it raises has failed, and the next go on."""
        try:
            check(self, *arguments)
        except Exception:
            self.failed.append(f"{arguments}: {traceback.format_exc()}")

    def refuses(self, kind: type[Exception], said: str, call: Callable[[], Any]) -> None:
        """That a call raises, and that its message holds some words."""
        try:
            call()
        except kind as error:
            self.expect(f"{said!r} in {error!r}", said in str(error))
        else:
            self.expect(f"{said!r}: nothing was raised", False)


def held(*names: str, ranks: int = RANKS, limit: int = 150) -> None:
    """That functions beside this module, "module.name", hold on all ranks of one world, and that each checks something.

    By their names: what they import takes a second, which is the ranks' alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Of torch's own use of what it has deprecated, as in setup.cfg.
        warnings = ["-W", "error", "-W", "ignore:`torch.jit.script:DeprecationWarning"]
        # One thread each: idle OpenMP or BLAS threads wouldn't survive the fork.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        started = subprocess.Popen(
            [sys.executable, *warnings, "-X", "faulthandler", "-m", "helpers.world", str(ranks), folder, *names],
            env={**os.environ, **threads, "PYTHONPATH": path}, cwd=folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = started.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # all ranks with it
            raise
        assert started.returncode == 0, said
        told = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    failed = [f"{name}, rank {rank}: {said}" for name in names for rank in range(ranks) for said in told[rank][name][1]]
    assert failed == []
    assert all(sum(of_rank[name][0] for of_rank in told) for name in names)


def _rank(rank: int, ranks: int, folder: str, checks: dict[str, Callable[[Report], None]]) -> None:
    from torch import distributed

    store, limit = distributed.FileStore(f"{folder}/store", ranks), timedelta(seconds=60)
    store.set_timeout(limit)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    told = {}
    for name, check in checks.items():
        report = Report()
        try:
            check(report)
        except Exception:
            report.failed.append(traceback.format_exc())
            print(f"rank {rank}:", report.failed[-1], flush=True)  # should another one die of it
        told[name] = report.checked, report.failed
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _ready() -> None:
    """What every rank would import, and load or compile, for itself."""
    import torch._dynamo

    from msgdrop_numba import message_dropout, message_select

    message_select(message_dropout(torch.ones(1, 1, 1), return_mask=True)[0])


def _main(count: str, folder: str, *names: str) -> int:
    ranks, checks, children = int(count), {}, []
    for name in names:
        module, _, check = name.partition(".")
        checks[name] = getattr(importlib.import_module(f"helpers.{module}"), check)
    _ready()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                _rank(rank, ranks, folder, checks)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(ended):
        print("ranks ended with", ended)
    return int(any(ended))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
