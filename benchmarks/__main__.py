"""`python -m benchmarks QUESTION` measures, into benchmarks/results/; `readme` puts the tables into README.md."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import measure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Each is a module here with `run(rounds)`, `table(results)` and `bars(results)` or its own `chart`. The table stands
# in README.md between its marks.
QUESTIONS = (
    "cpu", "curve", "overhead", "rules", "train_step", "loader", "gil", "cold_start", "apply", "ray_data", "gpu",
)  # fmt: skip


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("questions", nargs=-1, type=click.Choice([*QUESTIONS, "readme"]))
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
def main(questions: tuple[str, ...], rounds: int) -> None:
    """Benchmarks of msgdrop_numba, each a ratio in one run; all of them by default. Run them on a quiet machine."""
    for name in questions or [name for name in QUESTIONS if name != "gpu" or torch.cuda.is_available()]:
        if name == "readme":
            file = ROOT / "README.md"
            file.write_text(with_tables(file.read_text()))
            continue
        question: Any = importlib.import_module(f"benchmarks.{name}")
        results = question.run(rounds)
        (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        measure.draw(RESULTS / f"{name}.png", question, results)
        click.echo(f"{results['machine']}\n{question.table(results)}")


def with_tables(text: str) -> str:
    """The README with the tables of the committed results between their marks."""
    for name in QUESTIONS:
        file = RESULTS / f"{name}.json"
        if file.exists():
            question: Any = importlib.import_module(f"benchmarks.{name}")
            table = question.table(json.loads(file.read_text()))
            marks = rf"(<!-- {name}: .*? -->\n).*?(<!-- end {name} -->)"
            text = re.sub(marks, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
