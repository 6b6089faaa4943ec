"""Ranks of a gloo world on this machine: `run` starts them and tells what failed where; forked, to import torch once."""

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
        self.checked, self.failed = 0, [""][:0]

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


def run(module: str, names: list[str], ranks: int = RANKS, limit: int = 150, **environment: str) -> dict[str, Any]:
    """Call functions of a module of the tests, `name(report)`, on all ranks of a world.

    Returns:
        For each name how many checks were made on all ranks together, or a list of what failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-W",
            "error",
            "-W",  # as in setup.cfg; here what it begins with, to the letter
            "ignore:`torch.jit.script:DeprecationWarning",
            "-X",
            "faulthandler",
            "-m",
            "helpers.world",
            module,
            ",".join(names),
            str(ranks),
            folder,
        ]
        # One thread each: idle OpenMP or BLAS threads wouldn't survive the fork.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        started = subprocess.Popen(
            command, env={**os.environ, **threads, "PYTHONPATH": path, **environment}, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = started.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # all ranks with it
            raise
        assert started.returncode == 0, said
        told = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    found: dict[str, Any] = {}
    for name in names:
        failed = [f"rank {rank}: {said}" for rank in range(ranks) for said in told[rank][name][1]]
        found[name] = failed or sum(each[name][0] for each in told)
    return found


def _rank(rank: int, module: str, names: list[str], ranks: int, folder: str) -> None:
    import torch

    store, limit = torch.distributed.FileStore(f"{folder}/store", ranks), timedelta(seconds=60)
    store.set_timeout(limit)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    told, checks = {}, importlib.import_module(module)
    for name in names:
        report = Report()
        try:
            getattr(checks, name)(report)
        except Exception:
            report.failed.append(traceback.format_exc())
        told[name] = report.checked, report.failed
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _main(module: str, names: str, ranks: str, folder: str) -> int:
    importlib.import_module(module)
    children = []
    for rank in range(int(ranks)):
        child = os.fork()
        if child == 0:
            try:
                _rank(rank, module, names.split(","), int(ranks), folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("ranks ended with", ended)
    return int(any(ended))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
