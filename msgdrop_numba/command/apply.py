"""`msgdrop apply` and `verify`: what is still to be made of an OUTPUT, and what keeps it whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import xxhash

from msgdrop_numba.command import journal
from msgdrop_numba.command.engines import Engine
from msgdrop_numba.command.errors import JobError, one_line
from msgdrop_numba.command.inputs import File, Input, look
from msgdrop_numba.command.shards import PARTIAL, Settings, State, Task, Written, pieces, sync_folder
from msgdrop_numba.version import __version__

CONTRACT = "1.1"
LOCK = ".msgdrop.lock"


def make(
    source: Path,
    found: Input,
    output: Path,
    settings: Settings,
    epochs: int,
    engine: Engine,
    tick: Callable[[int], Any],
) -> int:
    """Make what is missing of an output.

    Args:
        source: the input, whose files are `found`.
        output: a folder, new or of the same job.
        epochs: how many, each in a folder of its own; an output that has fewer goes on with the rest.
        engine: what runs the tasks.
        tick: called with the bytes of each input file that is done, those at the start too.

    Returns:
        How many files it wrote.

    Raises:
        JobError: the output belongs to another job, or is being written; or a task failed.
    """
    output = output.resolve()
    _check_place(source.resolve(), output)
    states = {str(file.path.absolute()): file.state for file in found.files if file.state is not None}
    tasks = {
        _task(file, output, settings, epoch, states): file.bytes for epoch in range(epochs) for file in found.files
    }
    header = {
        "job": "msgdrop apply", "contract": CONTRACT, "version": __version__, "input": found.digest,
        "epochs": epochs, "files": len(tasks), "parameters": settings.parameters(),
    }  # fmt: skip
    with _locked(output):
        log = journal.Journal(output, header)
        todo = [task for task in tasks if not _is_done(task, log, output)]
        tick(sum(tasks.values()) - sum(tasks[task] for task in todo))
        for folder in sorted({parent for task in todo for parent in _folders(task, output)}):
            if folder.is_symlink():
                raise JobError(f"{folder} is a link, which may lead anywhere: give another OUTPUT")
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
        try:
            with closing(engine(todo)) as results:
                for task, written in results:
                    log.add(_name(task, output), written)
                    tick(tasks[task])
        finally:
            for partial in output.rglob(f".*{PARTIAL}"):
                partial.unlink(missing_ok=True)
        if look(source)[1] != found.digest:
            raise JobError(f"{source} has changed while it was read: give another OUTPUT")
        log.finish()
    return len(todo)


def _task(file: File, output: Path, settings: Settings, epoch: int, states: dict[str, State]) -> Task:
    source, target = file.path.absolute(), output / f"epoch-{epoch}" / file.name
    is_mask, name = file.mask_of is not None, file.mask_of or file.name
    task = Task(str(source), str(target), name, settings, epoch, file.first, is_mask)
    read = [source, *(source.with_name(name) for name in settings.beside)]
    return task._replace(states=tuple(states[str(path)] for path in read))


def _check_place(source: Path, output: Path) -> None:
    if output == source or output in source.parents or source in output.parents:
        raise JobError(f"OUTPUT {output} and INPUT {source} must lie beside each other, not one in the other")
    if output.is_dir():
        others = {path.name for path in output.iterdir() if not path.name.endswith(PARTIAL)} - {LOCK, journal.NAME}
        if others and not (output / journal.NAME).exists():
            raise JobError(f"{output} isn't empty, and no job of msgdrop's began it: give another OUTPUT")


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    output.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise JobError(f"another msgdrop writes to {output}: wait for it, or give another OUTPUT") from None
    try:
        yield
    finally:
        lock.release()


def _name(task: Task, output: Path) -> str:
    return Path(task.target).relative_to(output).as_posix()


def _is_done(task: Task, log: journal.Journal, output: Path) -> bool:
    written = log.written.get(_name(task, output))
    path = Path(task.target)
    return written is not None and path.is_file() and path.stat().st_size == written.bytes


def _folders(task: Task, output: Path) -> Iterator[Path]:
    """The folders to make for a file."""
    for folder in Path(task.target).parents:
        if folder == output:
            return
        yield folder


def size(output: Path) -> int:
    """The number of bytes that the journal of an output names."""
    return sum(written.bytes for written in journal.read(output)[1].values()) if output.is_dir() else 0


class Verdict(NamedTuple):
    """The findings of `verify`, a line each.

    Fields:
        unfinished: what the same `msgdrop apply` again makes whole, as a job leaves it that was killed.
        wrong: what isn't as the journal says.
    """

    unfinished: list[str]
    wrong: list[str]


def verify(output: Path, tick: Callable[[int], Any]) -> Verdict:
    """Check every byte of every file of an output. Returns the files still to be made and the findings.

    Raises:
        JobError: it has no journal.
    """
    header, files = journal.read(output)
    if not header:
        raise JobError(f"{output} has no {journal.NAME}: it is no output of msgdrop apply")
    unfinished, wrong, missing = [], [], header["files"] - len(files)
    if missing:
        unfinished.append(f"{len(files)} of {header['files']} files are done")
    present = {p.relative_to(output).as_posix() for p in output.rglob("*") if not p.is_dir()} - {LOCK, journal.NAME}
    for name in sorted(present - files.keys()):
        if name.endswith(PARTIAL):
            unfinished.append(f"{name} was left when a job was stopped")
        elif missing > 0 and name.startswith("epoch-"):  # stopped between the file and its line in the journal
            missing -= 1
            unfinished.append(f"{name} is not in the journal yet")
        else:
            wrong.append(f"{name} is not in the journal")
    for name, written in files.items():
        if name not in present:
            wrong.append(f"{name} is missing: run the same msgdrop apply again")
            continue
        try:
            found = _hash(output / name)
        except OSError as error:
            wrong.append(f"{name}: {one_line(error)}")
            continue
        tick(found.bytes)
        if found != written:
            wrong.append(
                f"{name} has changed ({found.bytes} bytes, xxh3 {found.xxh3}, not {written.bytes}, {written.xxh3}): "
                "delete it, and run the same msgdrop apply again"
            )
    return Verdict(unfinished, wrong)


def _hash(path: Path) -> Written:
    checksum, size = xxhash.xxh3_64(), 0
    with open(path, "rb", buffering=0) as file:
        for data in pieces(file):
            checksum.update(data)
            size += len(data)
    return Written(size, checksum.hexdigest())
