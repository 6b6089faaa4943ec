"""Interleaved timing: every contestant once a round, medians over the rounds, ratios against ours."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy
import torch
from tabulate import tabulate
from torch.utils.benchmark import Timer

import msgdrop_numba


def seconds(contestants: dict[str, Callable[[], Any]], rounds: int, least: float) -> dict[str, float]:
    """The median time of a call of each contestant, in seconds; a round of each takes at least `least` seconds."""
    timers = {
        name: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()) for name, f in contestants.items()
    }
    calls = {}
    for name, timer in timers.items():
        timer.timeit(2)
        calls[name] = max(1, int(least / max(timer.timeit(3).mean, 1e-7)))
    return medians({name: lambda name=name: timers[name].timeit(calls[name]).mean for name in timers}, rounds)


def medians(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each case gives, once a round; a first round is for warming up."""
    values: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            value = case()
            if number:
                values[name].append(value)
    return {name: statistics.median(found) for name, found in values.items()}


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
