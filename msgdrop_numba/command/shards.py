"""One shard of `msgdrop apply`, from file to file: what every engine runs, wherever it likes. Never imports torch."""

from __future__ import annotations

import io
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from msgdrop_numba.arrays import keep_mask
from msgdrop_numba.call.arguments import ZERO
from msgdrop_numba.call.keys import hash64, numbered_keys, sample_keys
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import Rule
from msgdrop_numba.call.select import DENSE, Layout, kept_of_each
from msgdrop_numba.command.errors import JobError, one_line
from msgdrop_numba.functional import drop_messages, fold_in
from msgdrop_numba.select import select

# Bytes read, dropped in and written at a time: they stay in the cache, where 16 MiB took up to 1.7 times as long.
CHUNK = 2 * 2**20
PARTIAL = ".msgdrop-partial"  # how the names end under which files are written


class Settings(NamedTuple):
    """The settings that decide the bytes of an output, beside its epoch and the input."""

    p: float | tuple[float, float] | str  # the rule's, or a column of Parquet
    seed: int
    rule: Rule
    columns: tuple[str, ...] | None  # of Parquet
    key: str | None  # likewise
    ids: str | None  # of .npy: the name of the file of ids in each folder
    lengths: str | None = None  # likewise of rows' lengths, or a column of Parquet
    protect: str | None = None  # a column of Parquet
    positions: int | str | None = None  # of a row's first message, or a column of Parquet
    remove: bool = False
    companions: tuple[str, ...] | None = None  # of Parquet
    scale: bool = False
    fill: float | None = None  # None: zeros
    mask: bool = False  # whether keep masks are written

    @property
    def beside(self) -> tuple[str, ...]:
        """The names of the .npy files that say something of the rows of those beside them; of Parquet, none."""
        return tuple(name for name in (self.ids, None if self.columns else self.lengths) if name is not None)

    def parameters(self) -> dict[str, Any]:
        """All by their names, as a journal holds them."""
        named = self._asdict()
        del named["rule"]
        return {"p": named.pop("p"), "seed": named.pop("seed"), **self.rule.keywords, **named}


class State(NamedTuple):
    """The state of a file that is read, as every machine sees it."""

    path: str
    size: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, path: str | Path) -> State:
        stat = os.stat(path)
        return cls(str(path), stat.st_size, stat.st_mtime_ns)


class Task(NamedTuple):
    """One file to make."""

    source: str
    target: str
    name: str  # of the source in INPUT, as a relative POSIX path: what its rows' keys are made from
    settings: Settings
    epoch: int
    first: int = 0  # which row of the files beside it is the shard's first
    is_mask: bool = False  # whether it is the keep mask of a shard of .npy
    states: tuple[State, ...] = ()  # of the files that it reads, when the job began

    @property
    def is_copy(self) -> bool:
        return Path(self.name).name in self.settings.beside

    def beside(self, name: str) -> np.ndarray:
        """The values of a file beside the shard for its rows, and for those behind."""
        whole: np.ndarray = np.lib.format.open_memmap(Path(self.source).with_name(name), mode="r")
        return whole[self.first :]


class Written(NamedTuple):
    """A written file."""

    bytes: int
    xxh3: str


class Npy(NamedTuple):
    """The header of a .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int  # where the numbers begin


def run(task: Task) -> Written:
    """Make one file; it has its name once it is whole and on the disk."""
    try:
        before = _check_states(task)
        with _new_file(Path(task.target)) as file:
            if task.name.endswith(".parquet"):
                _parquet(task, file)
            elif task.is_mask:
                _npy_mask(task, file)
            else:
                _npy(task, file)
            if _check_states(task) != before:  # before the file gets its name
                raise ValueError("a file changed while it was read, and came back: run the same command again")
        return Written(file.bytes, file.hash.hexdigest())
    except (OSError, TypeError, ValueError) as error:
        raise JobError(f"{task.name}, epoch {task.epoch}: {one_line(error)}") from error


def _check_states(task: Task) -> list[tuple[int, int]]:
    """The inodes of the files that a task reads, and when these changed, which `cp -p` can't restore.

    Raises:
        ValueError: a file isn't as it was when the job began.
    """
    for state in task.states:
        if State.of(state.path) != state:
            name = Path(state.path).name
            raise ValueError(
                f"{name} has changed since the job began: run the same command again; if it is to stay as it is now, "
                "give another OUTPUT"
            )
    stats = [os.stat(state.path) for state in task.states]
    return [(stat.st_ino, stat.st_ctime_ns) for stat in stats]


def read_header(path: str) -> Npy:
    """The header of a .npy file, whose length must be what it says.

    Raises:
        ValueError: the file isn't such, is truncated, holds objects, or lies in Fortran's order.
    """
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, of shapes that overflow
            mapped = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # a header is read as Python's literals, which fail in ways of their own
        raise ValueError(f"it is no .npy file that can be read: {one_line(error)}") from error
    header = Npy(mapped.shape, mapped.dtype, mapped.offset)
    if not mapped.flags.c_contiguous:
        raise ValueError("it lies in Fortran's order: save np.ascontiguousarray(x) instead")
    expected = header.offset + mapped.nbytes
    if (size := os.path.getsize(path)) != expected:
        raise ValueError(f"it must have {expected} bytes, as its header says, but has {size}: it was cut or added to")
    return header


@contextmanager
def _new_file(target: Path) -> Iterator[_Hashed]:
    """A file to write, renamed to `target` when it is on the disk, and gone if anything fails."""
    partial = target.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        with open(partial, "xb") as file:
            yield _Hashed(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        sync_folder(target.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    if os.name == "nt":  # opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Hashed:
    """A file to write, with the number and the hash of its bytes; what pyarrow takes for a file."""

    def __init__(self, file: Any) -> None:
        self._file, self.bytes, self.hash, self.closed = file, 0, xxhash.xxh3_64(), False

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return int(self._file.write(data))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """pyarrow closes what it wrote to; the file itself is closed after it was synchronised."""


def npy_request(settings: Settings) -> Request:
    """The requests for rows of .npy files."""
    return Request(
        settings.rule, None, settings.scale, ZERO if settings.fill is None else settings.fill, message_dims=2,
        seed=settings.seed, positions=settings.positions,
    )  # fmt: skip


def kept_shape(header: Npy, settings: Settings) -> tuple[int, ...]:
    """The shape of a .npy file without its dropped messages.

    Raises:
        ValueError: its rows may keep different counts.
    """
    rows, size, *features = header.shape
    kept = kept_of_each(settings.rule, size, replace(npy_request(settings), lengths=settings.lengths))
    if kept is None:
        raise ValueError(
            "--remove of .npy shards needs rows that keep as many messages each: give --exact and one number as --p, "
            "and no --lengths"
        )
    return (rows, kept, *features)


def _npy(task: Task, out: _Hashed) -> None:
    header = read_header(task.source)
    shape, dtype, offset = header
    with open(task.source, "rb", buffering=0) as source:
        head = bytearray(offset)
        _read(source, head)
        if task.is_copy:
            out.write(head)
            for piece in pieces(source):
                out.write(piece)
            return
        rows, settings = shape[0], task.settings
        out.write(_new_head(kept_shape(header, settings), dtype) if settings.remove else head)
        width = dtype.itemsize * int(np.prod(header.shape[1:], dtype=np.int64))
        buffer = np.empty((min(_rows_at_a_time(width), rows), *header.shape[1:]), dtype)
        for request, count in _requests(task, rows, width):
            block = buffer[:count]
            data: Any = block.reshape(-1).view(np.uint8)
            _read(source, data)
            if settings.remove:
                kept, _ = select(block, request, Layout(DENSE, None, wants_kept=False))
                data = np.ascontiguousarray(kept).reshape(-1).view(np.uint8)
            else:
                drop_messages(block, replace(request, inplace=True))
            out.write(data)


def _npy_mask(task: Task, out: _Hashed) -> None:
    rows, size = read_header(task.source).shape[:2]
    out.write(_new_head((rows, size), np.dtype(bool)))
    for request, count in _requests(task, rows, size):
        out.write(keep_mask((count, size), request).reshape(-1).view(np.uint8))


def _rows_at_a_time(width: int) -> int:
    return max(1, CHUNK // max(1, width))


def _requests(task: Task, rows: int, width: int) -> Iterator[tuple[Request, int]]:
    """The requests for the rows of a shard, `width` bytes each, piece by piece, and the number of rows of each."""
    request = replace(npy_request(task.settings), seed=fold_in(task.settings.seed, task.epoch))
    keys, lengths = _keys(task), task.settings.lengths
    of_rows = None if lengths is None else task.beside(lengths)
    at_a_time = _rows_at_a_time(width)
    for first in range(0, rows, at_a_time):
        count = min(at_a_time, rows - first)
        row_lengths = None if of_rows is None else np.array(of_rows[first : first + count])
        yield replace(request, keys=keys(first, count), lengths=row_lengths), count


def _new_head(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The header of a .npy file."""
    head = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, fields)
    return head.getvalue()


def _keys(task: Task) -> Callable[[int, int], np.ndarray]:
    """The keys of so many rows of a .npy file from one on: their ids', or made from its name and their number."""
    if task.settings.ids is not None:
        ids = task.beside(task.settings.ids)
        return lambda first, count: sample_keys(ids[first : first + count])
    name = hash64(os.fsencode(task.name))
    return lambda first, count: numbered_keys(name, first, count)


def _read(source: Any, data: Any) -> None:
    """Fill `data` from a file."""
    view = memoryview(data)
    while len(view):
        got = source.readinto(view)
        if not got:
            raise ValueError("it has become shorter while it was read")
        view = view[got:]


def pieces(source: Any) -> Iterator[memoryview]:
    """The rest of a file, in pieces of one buffer: fresh memory for each would cost more than reading it."""
    buffer = memoryview(bytearray(CHUNK))
    while count := source.readinto(buffer):
        yield buffer[:count]


def _parquet(task: Task, out: _Hashed) -> None:
    import pyarrow
    from pyarrow import parquet

    from msgdrop_numba.pipelines import arrow
    from msgdrop_numba.pipelines.batches import MASK

    drop = batch_of(task.settings, task.epoch)

    def schema_of(given: pyarrow.Schema) -> pyarrow.Schema:
        """The types of the columns in the output."""
        short = drop(arrow.empty(given, set(drop.needed))).schema
        fields = [short.field(f.name) if f.name in drop.needed else f for f in given]
        return pyarrow.schema([*fields, *([short.field(MASK)] if drop.return_mask else [])], given.metadata)

    # Opened here: pyarrow takes no name that isn't UTF-8.
    with open(task.source, "rb") as opened, parquet.ParquetFile(opened, pre_buffer=False) as source:
        groups = [source.metadata.row_group(i) for i in range(source.metadata.num_row_groups)]
        columns = [groups[0].column(i) for i in range(groups[0].num_columns)] if groups else []
        with parquet.ParquetWriter(
            pyarrow.PythonFile(out, "w"), schema_of(source.schema_arrow),
            compression={c.path_in_schema: c.compression.replace("UNCOMPRESSED", "NONE") for c in columns},
            use_dictionary=[c.path_in_schema for c in columns if any("DICTIONARY" in e for e in c.encodings)],
        ) as writer:  # fmt: skip
            for number, group in enumerate(groups):
                writer.write_table(drop(source.read_row_group(number)), row_group_size=max(1, group.num_rows))


def batch_of(settings: Settings, epoch: int) -> Any:
    """The batch that drops messages in the tables of a Parquet file."""
    from msgdrop_numba.pipelines.batches import MessageDropoutBatch

    p, keywords = (settings.rule, {}) if settings.rule.p is not None else (settings.p, settings.rule.arguments)
    return MessageDropoutBatch(
        p, **keywords,
        columns=settings.columns or (), key=settings.key or "", seed=settings.seed, epoch=epoch,
        protect=settings.protect, positions=settings.positions, remove=settings.remove,
        companions=settings.companions, lengths=settings.lengths, scale=settings.scale,
        fill=ZERO if settings.fill is None else settings.fill, return_mask=settings.mask,
    )  # fmt: skip
