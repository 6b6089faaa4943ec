"""The `msgdrop` command."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from msgdrop_numba.__main__ import INSTALL


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="msgdrop_numba", prog_name="msgdrop")
def main() -> None:
    """Message dropout: drop whole messages (frames, tokens, agents' messages), the same ones everywhere."""


@main.command()
@click.option("--epochs", default=30, show_default=True, type=click.IntRange(min=1), help="Epochs for each network.")
@click.option(
    "--p", default=0.5, show_default=True, type=click.FloatRange(0, 1), help="Probability of dropping an input frame."
)
@click.option(
    "--seeds", default=5, show_default=True, type=click.IntRange(min=1), help="Networks trained for each arm."
)
@click.option(
    "--output", default="msgdrop-demo.png", show_default=True, type=click.Path(dir_okay=False, path_type=Path),
    help="Where the plot goes (PNG); the numbers go beside it, as JSON.",
)  # fmt: skip
def demo(epochs: int, p: float, seeds: int, output: Path) -> None:
    """Train a speaker classifier on real speech and lose frames at test time.

    Three arms on the Japanese Vowels utterances: without dropout, with nn.Dropout, and with message dropout (in the
    DataLoader's collate, with probability --p, and as a layer between the recurrent layers). Then 0-80% of the test
    frames are zeroed and the accuracy is measured. Takes about a minute with the defaults.
    """
    if output.suffix.lower() != ".png":
        raise click.BadParameter(f"must end in .png, but got {str(output)!r}", param_hint="--output")
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(output.absolute().parent)!r}", param_hint="--output")
    try:
        import matplotlib  # noqa: F401
        import sktime  # noqa: F401

        from msgdrop_numba import demo as experiment
    except ModuleNotFoundError as missing:
        raise click.ClickException(f"{INSTALL} (missing: {missing.name})") from None
    console = Console()
    with Progress(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs,"), TimeRemainingColumn(),
        TextColumn("left"), console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=len(experiment.ARMS) * seeds * epochs)
        results = experiment.run(p, epochs, seeds, lambda: progress.advance(task))
    table = Table(title=f"Test accuracy (%), mean ± spread of {seeds} seeds, p = {p:g}, {epochs} epochs")
    table.add_column("frames lost", no_wrap=True)
    for lost in experiment.LOST:
        table.add_column(f"{lost:.0%}", justify="right")
    for arm, row in experiment.summary(results).items():
        table.add_row(arm, *(f"{100 * mean:.1f}±{100 * spread:.1f}" for mean, spread in row))
    console.print(table)
    numbers = experiment.save(results, {"p": p, "epochs": epochs, "seeds": seeds}, output)
    click.echo(f"Plot: {output}\nNumbers: {numbers}")
