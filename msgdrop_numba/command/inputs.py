"""The INPUT of `msgdrop apply`: found and checked before anything is written."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from msgdrop_numba.command.errors import JobError, one_line
from msgdrop_numba.command.shards import Npy, Settings, State, batch_of, kept_shape, npy_request, read_header
from msgdrop_numba.functional import drop_messages


class File(NamedTuple):
    """A file of the input."""

    name: str  # relative POSIX path
    path: Path
    bytes: int
    first: int = 0  # as a task has it
    mask_of: str | None = None  # of the keep mask that is made of a shard: the shard's name
    state: State | None = None


class Input(NamedTuple):
    """The files of an input, all of one kind, in the order of their names."""

    files: list[File]
    digest: str


def find(source: Path, settings: Settings) -> Input:
    """The shards of a folder, or a single one; names that begin with a dot or an underscore are left out.

    Raises:
        JobError: there are none, they don't fit together, or one of them can't be what it must be.
    """
    files, digest = look(source)
    kinds = {file.path.suffix for file in files}
    if len(kinds) != 1:
        what = "both .npy and .parquet files: give a folder of one kind" if kinds else "no .npy or .parquet file"
        raise JobError(f"{source} holds {what}")
    if kinds == {".npy"}:
        _refuse_columns(source, settings)
        files = _check_npy(files, settings)
        if settings.mask:
            files += _masks(files, settings)
    else:
        if not settings.columns or not settings.key or settings.ids:
            raise JobError(f"{source} holds Parquet files: give --columns and --key, and no --ids")
        _check_parquet(files, settings)
    return Input(files, digest)


def _refuse_columns(source: Path, settings: Settings) -> None:
    if settings.columns or settings.key or settings.companions:
        raise JobError(f"columns, key and companions are for Parquet, but {source} holds .npy files: leave them out")
    for name in ("p", "protect", "positions"):
        if isinstance(column := getattr(settings, name), str):
            raise JobError(
                f"--{name} {column} would be a column, which is for Parquet, but {source} holds .npy files: "
                f"{'leave it out' if name == 'protect' else 'give a number'}"
            )
    if settings.lengths is not None and not is_file_name(settings.lengths):
        raise JobError(
            f"--lengths {settings.lengths} would be a column, which is for Parquet, but {source} holds .npy files: "
            "give the name of .npy files that lie beside the shards"
        )
    if settings.lengths is not None and settings.lengths == settings.ids:
        raise JobError(f"--ids and --lengths must name different files, but both name {settings.ids}")


def is_file_name(name: str) -> bool:
    """True if it names .npy files beside shards."""
    return Path(name).name == name and name.endswith(".npy")


def look(source: Path) -> tuple[list[File], str]:
    """The files of an input, and what changes with any one's name, size or time."""
    files, stats = [], []
    for name, path in _walk(source):
        state = State.of(path.absolute())
        files.append(File(name, path, state.size, state=state))
        stats.append((name, state.size, state.modified))
    return files, xxhash.xxh3_64(json.dumps(stats).encode()).hexdigest()


def _walk(source: Path) -> list[tuple[str, Path]]:
    if not source.exists():
        raise JobError(f"there is no {source}")
    if not source.is_dir() and not source.is_file():
        raise JobError(f"{source} is no folder and no regular file")
    if source.is_file():
        return [(source.name, source)] if source.suffix in (".npy", ".parquet") else []
    found = []
    for folder, folders, names in os.walk(source, onerror=_raise):
        folders[:] = [name for name in folders if name[0] not in "._"]
        for name in names:
            path = Path(folder, name)
            if path.suffix in (".npy", ".parquet") and name[0] not in "._":
                if not path.is_file():  # to read a pipe would wait for a writer
                    raise JobError(f"{path} is no regular file: leave it out of INPUT")
                found.append((path.relative_to(source).as_posix(), path))
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _check_npy(files: list[File], settings: Settings) -> list[File]:
    """The files, with the ids of their rows."""
    headers = {file.name: _header(file) for file in files}
    shards = [file for file in files if file.path.name not in settings.beside]
    if not shards:
        raise JobError(f"there are no .npy files beside {' and '.join(settings.beside)}")
    first = headers[shards[0].name]
    for file in shards:
        header = headers[file.name]
        if (header.shape[1:], header.dtype) != (first.shape[1:], first.dtype):
            raise JobError(
                f"{file.name} has rows of {header.shape[1:]} {header.dtype}, but {shards[0].name} of "
                f"{first.shape[1:]} {first.dtype}: all shards must be alike"
            )
    try:
        _check_rule(first, settings)
    except (TypeError, ValueError) as error:
        raise JobError(f"{shards[0].name}: {error}") from error
    return _with_firsts(files, headers, settings) if settings.beside else files


def _header(file: File) -> Npy:
    try:
        return read_header(str(file.path))
    except ValueError as error:
        raise JobError(f"{file.name}: {error}") from error


def _check_rule(header: Npy, settings: Settings) -> None:
    if len(header.shape) < 3:
        raise ValueError(f"it must be (samples, messages, features), but has the shape {header.shape}")
    none = np.empty((0, *header.shape[1:]), header.dtype)
    drop_messages(none, npy_request(settings))
    if settings.remove:
        kept_shape(header, settings)


def _with_firsts(files: list[File], headers: dict[str, Npy], settings: Settings) -> list[File]:
    """The files with their rows of the files beside them: a folder's shards in the order of their names."""
    folders: dict[Path, list[File]] = defaultdict(list)
    for file in files:
        folders[file.path.parent].append(file)
    found = []
    for beside in folders.values():
        shards = [file for file in beside if file.path.name not in settings.beside]
        rows = sum(headers[file.name].shape[0] for file in shards)
        for name in settings.beside:
            named = [file for file in beside if file.path.name == name]
            option = "ids" if name == settings.ids else "lengths"
            if not named:
                raise JobError(f"{beside[0].name} has no {name} beside it, which --{option} names")
            _check_beside(named[0], headers, option, rows)
            if option == "lengths" and shards:
                _check_lengths(named[0], headers[shards[0].name].shape[1])
            found += named
        first = 0
        for file in shards:
            found.append(file._replace(first=first))
            first += headers[file.name].shape[0]
    return sorted(found, key=lambda file: file.name)


def _check_beside(file: File, headers: dict[str, Npy], option: str, rows: int) -> None:
    header = headers[file.name]
    kinds, wanted = ("iuUS", "integers or strings") if option == "ids" else ("iu", "integers")
    if header.dtype.kind not in kinds or len(header.shape) != 1:
        raise JobError(f"{file.name} must hold {wanted}, one a row, but is {header.shape} {header.dtype}")
    if rows != header.shape[0]:
        raise JobError(
            f"{file.name} has {header.shape[0]} {option}, but the shards beside it have {rows} rows together"
        )


def _check_lengths(file: File, size: int) -> None:
    lengths = np.load(file.path, mmap_mode="r")
    for row in np.flatnonzero((lengths < 0) | (lengths > size))[:1]:
        raise JobError(
            f"{file.name} must hold lengths from 0 to {size}, a row's messages, but row {row} has {lengths[row]}"
        )


def _masks(files: list[File], settings: Settings) -> list[File]:
    """The keep masks that are made beside the shards."""
    names, made = {file.name for file in files}, []
    for file in files:
        if file.path.name not in settings.beside:
            name = f"{file.name.removesuffix('.npy')}.keep_mask.npy"
            if name in names:
                raise JobError(f"--mask would write {name}, but there is such a shard: rename it, or leave --mask out")
            made.append(file._replace(name=name, bytes=0, mask_of=file.name))
    return made


def _check_parquet(files: list[File], settings: Settings) -> None:
    from pyarrow import parquet

    from msgdrop_numba.pipelines import arrow, columns
    from msgdrop_numba.pipelines.batches import MASK

    drop, kinds = batch_of(settings, 0), []
    for file in files:
        try:
            with open(file.path, "rb") as opened:  # pyarrow takes no name that isn't UTF-8
                schema = parquet.read_schema(opened)
            columns.check_names(schema.names, drop.needed, "the file")  # the table has no others
            if settings.mask and MASK in schema.names:
                raise ValueError(f"it has a column {MASK!r} already: rename it, or leave --mask out")
            if settings.lengths is not None:
                arrow.check_numbers(settings.lengths, schema.field(settings.lengths).type, integers=True)
            table = arrow.empty(schema, set(drop.needed))
            drop(table)
            kinds.append([(f.name, _kind(table, f, drop.columns)) for f in schema])
        except (TypeError, ValueError, OSError) as error:
            raise JobError(f"{file.name}: {one_line(error)}") from error
        if kinds[-1] != kinds[0]:
            raise JobError(f"{file.name} has other columns than {files[0].name}: all shards must be alike")


def _kind(table: Any, field: Any, columns: tuple[str, ...]) -> Any:
    """The type of a column; of one of messages the dtype alone: their number and size may differ from file to file."""
    from msgdrop_numba.pipelines import arrow

    if field.name not in columns:
        return field.type
    return arrow.leaf(table.column(field.name).chunk(0), field).values.dtype
