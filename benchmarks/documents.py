"""What the documents hold between marks: the tables of the committed results, a summary of them, and msgdrop info's."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import measure
from msgdrop_numba.command.info import PATHS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Each is a module here with `run(rounds)`, `table(results)` and `bars(results)` or its own `chart`. Table and chart
# stand in benchmarks/README.md, the table between its marks.
QUESTIONS = (
    "cpu", "curve", "cache", "overhead", "rules", "select", "removal", "train_step", "loader", "gil", "cold_start",
    "apply", "ray_data", "ranks", "edges", "gpu",
)  # fmt: skip

# The documents with such marks.
FILLED = ("README.md", "benchmarks/README.md", "msgdrop_numba/LIMITS.md", "msgdrop_numba/RANKS.md")


def results(name: str) -> Any:
    """The committed results of a question; None where there are none."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def with_tables(text: str) -> str:
    """A document with everything between its marks made anew, but for what was never measured."""
    made = {"summary": summary(), "ways": ways(), "trained": trained()}
    for name in QUESTIONS:
        if (found := results(name)) is not None:
            made[name] = importlib.import_module(f"benchmarks.{name}").table(found)
    for name, table in made.items():
        marks = rf"(<!-- {name}: .*? -->\n).*?(<!-- end {name} -->)"
        text = re.sub(marks, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def summary() -> str:
    """README's table: how many times as fast in ten cases, good and bad, and on what."""
    found = {name: results(name) for name in ("cpu", "overhead", "loader", "ray_data", "select")}
    times = {tuple(row["shape"]): row["microseconds"] for row in found["cpu"]["rows"]}
    both_ways = {tuple(row["shape"]): row["microseconds"] for row in found["overhead"]["rows"]}[3, 5, 20]
    speeds = {
        (row["samples"], row["lengths"], row["workers"]): row["samples_per_second"] for row in found["loader"]["rows"]
    }
    large, middle, small = times[64, 256, 512], times[32, 64, 256], times[3, 5, 20]
    padded, step = speeds["64 × (256, 512)", "padded", 0], found["select"]["training"]
    tiny = speeds["32 × (16, 128)", "fixed", 0]
    seconds = found["ray_data"]["seconds"]
    rows = [
        ("tensor of 64 × 256 × 512, 32 MB", "`masked_fill`", large["masked_fill"] / large["new"]),
        ("the same", "`F.dropout1d`", large["dropout1d"] / large["new"]),
        ("tensor of 32 × 64 × 256, 2 MB", "`F.dropout1d`", middle["dropout1d"] / middle["new"]),
        ("tensor of 3 × 5 × 20, 1.2 KB", "`F.dropout1d`", small["dropout1d"] / small["new"]),
        (
            "the same, forward and backward", "`F.dropout1d`",
            both_ways["dropout1d, forward + backward"] / both_ways["ours, forward + backward"],
        ),
        ("NumPy array of 64 × 256 × 512", "a copy and a boolean index", large["numpy_index"] / large["array"]),
        (
            "`DataLoader`, 64 × (256, 512) padded, no workers", "`pad_sequence`, `masked_fill`",
            padded["ours"] / padded["masked_fill"],
        ),
        (
            "a transformer's training step, half of the messages removed", "half of them zeroed",
            step["MessageDropout"] / step["MessageSelect"],
        ),
        (
            "`DataLoader`, 32 × (16, 128), no workers", "`default_collate`, `F.dropout1d`",
            tiny["ours"] / tiny["dropout1d"],
        ),
        ("Ray Data, 2 workers", "`masked_fill`", seconds["masked_fill, 2"] / seconds["ours, 2"]),
    ]  # fmt: skip
    table = measure.markdown(["what", "beside", "times as fast"], [[what, by, f"{r:.2f}"] for what, by, r in rows])
    machines: dict[str, list[str]] = {}
    for name, one in found.items():
        m = one["machine"]
        machine = f"{m['threads']} threads of {m['processor']}, torch {m['torch']}, numba {m['numba']}"
        machines.setdefault(machine, []).append(name)
    p = f"float32, p = {found['cpu']['p']}, in a `DataLoader` {found['loader']['p']}"
    measured = ";\n".join(f"{', '.join(names)}: {machine}" for machine, names in machines.items())
    return f"{table}\n\n{p}; {measured}."


def ways() -> str:
    """The table of LIMITS.md: which way each kind of array takes, as `msgdrop info` says it."""
    return measure.markdown(["array", "path", "why"], [list(row) for row in PATHS])


def trained() -> str:
    """The table of RANKS.md: a model trained on several ranks, beside one."""
    return importlib.import_module("benchmarks.ranks").trained_table(results("ranks"))  # type: ignore[no-any-return]


def draw(name: str) -> None:
    """The chart of a question's committed results, if there are any."""
    if (found := results(name)) is not None:
        measure.draw(RESULTS / f"{name}.png", importlib.import_module(f"benchmarks.{name}"), found)
