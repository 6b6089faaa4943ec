"""What does the first call cost: the import, a warm and an empty cache, and the first batch of a spawned worker?"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, markdown
from msgdrop_numba.command.bench import medians

ROOT = Path(__file__).parents[1]

IMPORT = "import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"

CALL = """
import time
import {library}
x = {x}
import msgdrop_numba
start = time.perf_counter()
msgdrop_numba.message_dropout(x, 0.3)
print(time.perf_counter() - start)
"""

BATCH = """
import time, torch
from torch.utils.data import DataLoader, default_collate
from msgdrop_numba import MessageDropoutCollate
if __name__ == "__main__":
    data = [torch.ones(16, 128)] * 8
    loader = DataLoader(data, 8, num_workers=1, collate_fn={collate}, multiprocessing_context="spawn")
    start = time.perf_counter()
    next(iter(loader))
    print(time.perf_counter() - start)
"""

NUMPY = {"library": "numpy", "x": "numpy.ones((8, 16, 128), numpy.float32)"}
TORCH = {"library": "torch", "x": "torch.ones(64, 256, 512)"}  # large enough for the parallel kernel

CASES = {
    "import numba": IMPORT.format(module="numba"),
    "import msgdrop_numba": IMPORT.format(module="msgdrop_numba"),
    "first call, NumPy": CALL.format(**NUMPY),
    "first call, torch": CALL.format(**TORCH),
    "first batch of a spawned worker, default_collate": BATCH.format(collate="default_collate"),
    "first batch of a spawned worker, ours": BATCH.format(collate="MessageDropoutCollate(0.3)"),
}
COMPILED = {f"{name}, empty cache": CASES[name] for name in ("first call, NumPy", "first call, torch")}


def seconds(program: str, cache: str | None) -> float:
    """What a program prints, run in a process of its own with this folder for compiled code, or an empty one."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "program.py"
        script.write_text(program)
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache or folder, "PYTHONPATH": str(ROOT)}
        output = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment
        ).stdout
    return float(output)


def run(rounds: int) -> dict[str, Any]:
    """Seconds of every case."""
    with tempfile.TemporaryDirectory() as warm:
        cases = {name: (lambda program=program: seconds(program, warm)) for name, program in CASES.items()}
        cases |= {name: (lambda program=program: seconds(program, None)) for name, program in COMPILED.items()}
        return {"machine": machine(), "rounds": rounds, "seconds": medians(cases, rounds)}


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    return markdown(["what", "seconds"], [[name, f"{value:.2f}"] for name, value in results["seconds"].items()])


def bars(results: dict[str, Any]) -> dict[str, float]:
    """Seconds."""
    seconds_of: dict[str, float] = results["seconds"]
    return seconds_of
