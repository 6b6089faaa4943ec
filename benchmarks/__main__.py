"""`python -m benchmarks cpu` measures, into benchmarks/results/cpu.json; `readme` puts its table into README.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from benchmarks import cpu

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Benchmarks of msgdrop_numba, each a ratio in one run. Run them on a quiet machine."""


@main.command(name="cpu")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
def run_cpu(rounds: int) -> None:
    """message_dropout on CPU tensors against what people write today."""
    results = cpu.run(rounds)
    (RESULTS / "cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    click.echo(cpu.table(results))


@main.command()
def readme() -> None:
    """Write the table of the committed results into README.md."""
    file = ROOT / "README.md"
    results = json.loads((RESULTS / "cpu.json").read_text())
    file.write_text(with_table(file.read_text(), cpu.table(results)))


def with_table(text: str, table: str) -> str:
    """The README with this table between its marks."""
    return re.sub(r"(<!-- cpu: .*? -->\n).*?(\n<!-- end cpu -->)", lambda m: m[1] + table + m[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
