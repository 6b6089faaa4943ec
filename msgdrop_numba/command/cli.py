"""The `msgdrop` command. What a command needs is imported when it runs, so that `--help` comes at once."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from msgdrop_numba.call.rule import Rule
from msgdrop_numba.command.errors import JobError, one_line
from msgdrop_numba.command.install import install_line
from msgdrop_numba.command.options import Names, Number, Numbers, of_rule, picture_path


class _Group(click.Group):
    """Every error is one line, and a traceback with --debug."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            closed = isinstance(error, OSError) and error.errno == errno.EPIPE  # by `| head`: click ends quietly
            if context.params["debug"] or closed:
                raise
            said = install_line(error.name) if isinstance(error, ModuleNotFoundError) else one_line(error)
            raise click.ClickException(said) from error


_PATH = click.Path(path_type=Path, readable=False)  # whether it can be read is found out by reading it
_PNG = click.Path(dir_okay=False, path_type=Path)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="msgdrop_numba", prog_name="msgdrop")
@click.option("--debug", is_flag=True, help="Show the traceback of an error; stands before the command.")
def main(debug: bool) -> None:
    """Message dropout: drop whole messages (frames, tokens, agents' messages), the same ones everywhere."""


@main.command()
@click.argument("source", metavar="INPUT", type=_PATH)
@click.argument("output", type=_PATH)
@of_rule(columns=True)
@click.option(
    "--epochs", default=1, show_default=True, type=click.IntRange(min=1),
    help="Folders to make, an epoch each. More than OUTPUT has: it goes on with the rest.",
)  # fmt: skip
@click.option("--columns", help="Parquet: the columns of messages, with commas between them. They share a mask.")
@click.option("--key", help="Parquet: the column of sample ids, integers or strings. Equal ids get equal masks.")
@click.option(
    "--lengths", metavar="COLUMN|NAME.npy",
    help="Each row's count of valid messages, behind which nothing drops: a column of Parquet; of .npy shards the file "
    "in each folder that holds them, those of all its shards in a row, copied along.",
)  # fmt: skip
@click.option("--scale", is_flag=True, help="Multiply kept messages by 1/(1-p).")
@click.option("--fill", type=Number(), help="What a dropped message becomes; 0 by default.")
@click.option(
    "--mask", is_flag=True,
    help="Write the keep masks too, True where a message is kept: a column keep_mask; beside A.npy A.keep_mask.npy.",
)  # fmt: skip
@click.option(
    "--protect", metavar="COLUMN",
    help="Parquet: a column of lists of bools, True where a message is left alone.",
)  # fmt: skip
@click.option(
    "--remove", is_flag=True,
    help="Remove messages instead of zeroing them; .npy shards with --exact and one P alone, where rows keep as many.",
)  # fmt: skip
@click.option(
    "--companions", metavar="A,B",
    help="Parquet, with --remove: further columns with something for each message, which lose the same ones.",
)  # fmt: skip
@click.option("--ids", metavar="NAME.npy", help="The file of sample ids in each folder of .npy shards; copied along.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes (Ray: tasks at a time); by default one a CPU.")
@click.option(
    "--engine", default="local", show_default=True, type=click.Choice(["local", "ray"]), help="What runs them."
)
@click.option("--ray-address", metavar="ADDRESS", help="A Ray cluster that sees INPUT and OUTPUT under the same paths.")
def apply(
    source: Path, output: Path, p: Any, seed: int, rule: Rule, positions: Any, epochs: int,
    columns: str | None, key: str | None, lengths: str | None, scale: bool, fill: float | None, mask: bool,
    protect: str | None, remove: bool, companions: str | None, ids: str | None, jobs: int | None, engine: str,
    ray_address: str | None,
) -> None:  # fmt: skip
    """Drop messages in the files of a folder, into a folder an epoch.

    What is in INPUT goes into OUTPUT/epoch-0, OUTPUT/epoch-1 and so on. With --remove dropped messages are left out:
    rows of Parquet become shorter, lists of a fixed size and tensors become lists.

    INPUT is a folder of .npy shards (samples, messages, features), all alike, or of Parquet files with columns of
    tensors or lists of lists; or one such file. Files whose names begin with a dot or an underscore, and other kinds,
    are left out; links to files are followed, links to folders aren't.

    A row's mask depends on the seed, the epoch and the row's id alone. Without --ids a .npy row is named by its
    shard's path in INPUT (the file's name, where INPUT is one file) and its number.

    Run the same command again to go on after an interruption, or with more --epochs: what is done stays. An OUTPUT
    holds one job.
    """
    from msgdrop_numba.command import apply as job
    from msgdrop_numba.command import engines, inputs
    from msgdrop_numba.command.shards import Settings

    if ray_address is not None and engine != "ray":
        raise click.UsageError("--ray-address needs --engine ray")
    if ids is not None and not inputs.is_file_name(ids):
        raise click.UsageError(f"--ids must be the name of .npy files that lie beside the shards, but got {ids!r}")
    if companions is not None and not remove:
        raise click.UsageError("--companions needs --remove")
    if fill is not None and remove:
        raise click.UsageError("--fill can't be used with --remove, which leaves no message to fill")
    settings = Settings(
        p, seed, rule, _listed(columns), key, ids, lengths, protect, positions, remove, _listed(companions), scale,
        fill, mask,
    )  # fmt: skip
    found = inputs.find(source, settings)
    run = engines.on_ray(jobs, ray_address) if engine == "ray" else engines.local(jobs or _cpus())
    with _bytes_bar("dropping", epochs * sum(file.bytes for file in found.files)) as tick:
        made = job.make(source, found, output, settings, epochs, run, tick)
    click.echo(f"{made} files written, {epochs * len(found.files)} in {output}")


def _listed(names: str | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(name.strip() for name in names.split(","))


def _cpus() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@main.command()
@click.argument("output", type=_PATH)
def verify(output: Path) -> None:
    """Check every byte that `msgdrop apply` wrote against its journal."""
    from msgdrop_numba.command import apply as job

    with _bytes_bar("reading", job.size(output)) as tick:
        unfinished, wrong = job.verify(output, tick)
    for line in (*wrong, *unfinished):
        click.echo(line, err=True)
    if wrong:
        raise JobError(f"{output} is not as its journal says: {len(wrong)} differences")
    if unfinished:
        raise JobError(f"{output} is unfinished: run the same msgdrop apply again to go on")
    click.echo(f"{output} is as its journal says")


@contextmanager
def _bytes_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal's standard error, with rate and time left; its tick takes how many more are done."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich import progress as rich
    from rich.console import Console

    with rich.Progress(
        rich.TextColumn(what), rich.BarColumn(), rich.DownloadColumn(), rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(), rich.TextColumn("left"), console=Console(stderr=True),
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


@main.command()
@click.option("--shape", type=Numbers(), metavar="ROWS,MESSAGES", help="Rows and messages.  [default: 8,64]")
@of_rule(columns=False)
@click.option(
    "--ids", type=Names(), metavar="ID,ID",
    help="The rows' ids, integers or strings, in place of 0, 1, 2, ...",
)  # fmt: skip
@click.option("--lengths", type=Numbers(least=0), metavar="N,N", help="Each row's count of valid messages.")
@click.option(
    "--epochs", type=click.IntRange(min=1),
    help="Show the masks of a collate's or a batch's settings in so many epochs; else those of message_dropout's.",
)  # fmt: skip
@click.option("--output", type=_PNG, callback=picture_path, help="Draw it into a PNG file too.")
def show(
    shape: tuple[int, ...] | None, p: Any, seed: int, rule: Rule, positions: int | None,
    ids: tuple[Any, ...] | None, lengths: tuple[int, ...] | None, epochs: int | None, output: Path | None,
) -> None:  # fmt: skip
    """Show which messages of which rows drop, in which epoch.

    What is kept is full, what is dropped is a dot, padding is blank.
    """
    from msgdrop_numba.command import show as masks

    shape = shape or (len(ids or lengths or range(8)), max(lengths or (64,)))
    if len(shape) != 2:
        raise click.BadParameter(f"must be two numbers, rows and messages, but got {shape}", param_hint="--shape")
    for name, given in (("--ids", ids), ("--lengths", lengths)):
        if given is not None and len(given) != shape[0]:
            raise click.BadParameter(f"must be one for each of {shape[0]} rows, but got {len(given)}", param_hint=name)
    found = masks.draw(shape, rule, seed, epochs, ids, lengths, positions)
    encoding = sys.stdout.encoding or "ascii"
    for line in masks.lines(found, ("█", "·") if encoding.lower().startswith("utf") else ("#", ".")):
        click.echo(line)
    if output is not None:
        masks.picture(found, output)
        click.echo(f"Picture: {output}")


@main.command()
@click.option("--shape", type=Numbers(), metavar="N,N,N", help="Of an array to ask about, message dims and features.")
@click.option("--dtype", default="float32", show_default=True, help="Of that array, by its name in NumPy or torch.")
@click.option("--device", default="cpu", show_default=True, help="Where it lies, as torch names it.")
def info(shape: tuple[int, ...] | None, dtype: str, device: str) -> None:
    """Say what is installed, and which path each kind of array takes.

    With --shape: which path arrays of that shape and dtype take on that device, and why.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from msgdrop_numba.command import info as facts

    if shape is not None:
        for name, path in facts.case(shape, dtype, device).items():
            click.echo(f"{name}: {path}")
        return
    console = Console()
    for name, value in {**facts.versions(), **facts.kernels(), "GPU": facts.gpu()}.items():
        click.echo(f"{name}: {value}")
    table = Table(*(Column(name, overflow="fold") for name in ("array", "path", "why")))
    for row in facts.PATHS:
        table.add_row(*row)
    console.print(table)


@main.command()
@click.option("--shape", default=(64, 256, 512), type=Numbers(), metavar="N,N,N", help="Of x.  [default: 64,256,512]")
@click.option("--p", default=0.3, show_default=True, type=click.FloatRange(0, 1), help="Probability of dropping.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
def bench(shape: tuple[int, ...], p: float, rounds: int) -> None:
    """Time `message_dropout` beside what people write, on this machine.

    F.dropout1d and masked_fill: float32 tensors, medians of interleaved rounds.
    """
    from rich.console import Console
    from rich.table import Table

    from msgdrop_numba.command import bench as timing

    if len(shape) != 3:
        raise click.BadParameter(
            f"must be three numbers, as F.dropout1d needs them, but got {shape}", param_hint="--shape"
        )
    taken = timing.run(shape, p, rounds)
    ours = taken["message_dropout"]
    table = Table("what", "microseconds a call", "times as long as ours")
    for name, seconds in taken.items():
        table.add_row(name, f"{1e6 * seconds:,.1f}", f"{seconds / ours:.2f}")
    Console().print(table)


@main.command()
@click.option("--epochs", default=30, show_default=True, type=click.IntRange(min=1), help="Epochs for each network.")
@click.option(
    "--p", default=0.5, show_default=True, type=click.FloatRange(0, 1), help="Probability of dropping an input frame."
)
@click.option(
    "--seeds", default=5, show_default=True, type=click.IntRange(min=1), help="Networks trained for each arm."
)
@click.option(
    "--output", default="msgdrop-demo.png", show_default=True, type=_PNG, callback=picture_path,
    help="Where the plot goes (PNG); the numbers go beside it, as JSON.",
)  # fmt: skip
def demo(epochs: int, p: float, seeds: int, output: Path) -> None:
    """Train a classifier on speech, and lose frames at test time.

    Four arms on the Japanese Vowels utterances: without dropout, with nn.Dropout, and twice with message dropout (in
    the DataLoader's collate, with probability --p or with each utterance's own, drawn from 0 to 0.9; and as a layer
    between the recurrent layers). Then 0-80% of the test frames are zeroed and the accuracy is measured. Takes a minute
    or two with the defaults.
    """
    import matplotlib  # noqa: F401
    import sktime  # noqa: F401
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from msgdrop_numba.command import demo as experiment

    console = Console()
    with Progress(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs,"), TimeRemainingColumn(),
        TextColumn("left"), console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=len(experiment.ARMS) * seeds * epochs)
        results = experiment.run(p, epochs, seeds, lambda: progress.advance(task))
    table = Table(title=f"Test accuracy (%), mean ± spread of {seeds} seeds, p = {p:g}, {epochs} epochs")
    table.add_column("frames lost")
    for lost in experiment.LOST:
        table.add_column(f"{lost:.0%}", justify="right", no_wrap=True)
    for arm, row in experiment.summary(results).items():
        table.add_row(arm, *(f"{100 * mean:.1f}±{100 * spread:.1f}" for mean, spread in row))
    console.print(table)
    numbers = experiment.save(results, {"p": p, "epochs": epochs, "seeds": seeds}, output)
    click.echo(f"Plot: {output}\nNumbers: {numbers}")
