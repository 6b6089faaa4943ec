"""`python -m benchmarks QUESTION` measures, into benchmarks/results/; `readme` puts the results into the documents."""

from __future__ import annotations

import importlib
import json
from typing import Any

import click
import torch

from benchmarks import documents, measure
from benchmarks.documents import QUESTIONS, RESULTS, ROOT


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("questions", nargs=-1, type=click.Choice([*QUESTIONS, "readme"]))
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
def main(questions: tuple[str, ...], rounds: int) -> None:
    """Benchmarks of msgdrop_numba, each a ratio in one run; all of them by default. Run them on a quiet machine.

    `readme` measures nothing: it draws the charts of the results that are there, and fills the tables of README.md,
    benchmarks/README.md, msgdrop_numba/LIMITS.md and msgdrop_numba/RANKS.md.
    """
    for name in questions or [name for name in QUESTIONS if name != "gpu" or torch.cuda.is_available()]:
        if name == "readme":
            fill()
            continue
        question: Any = importlib.import_module(f"benchmarks.{name}")
        results = question.run(rounds)
        (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        measure.draw(RESULTS / f"{name}.png", question, results)
        click.echo(f"{results['machine']}\n{question.table(results)}")


def fill() -> None:
    """Make all charts and tables anew from the results."""
    for name in QUESTIONS:
        documents.draw(name)
    for name in documents.FILLED:
        file = ROOT / name
        file.write_text(documents.with_tables(file.read_text()))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
