"""Tables, charts and the machine; the timing is `msgdrop_numba.bench`'s."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numba
import numpy
import torch
from tabulate import tabulate

import msgdrop_numba


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return tabulate(rows, head, tablefmt="pipe", disable_numparse=True)


def draw(file: Path, question: Any, results: dict[str, Any]) -> None:
    """The question's chart: its own, or bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    if hasattr(question, "chart"):
        question.chart(results, axes)
    else:
        ratios = question.bars(results)
        axes.bar_label(axes.barh(list(ratios), list(ratios.values())), fmt="%.2f")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel(question.bars.__doc__)
    figure.suptitle(question.__doc__.splitlines()[0], wrap=True)
    figure.savefig(file, dpi=100)


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            model = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "numpy": numpy.__version__,
        "msgdrop_numba": msgdrop_numba.__version__,
    }
