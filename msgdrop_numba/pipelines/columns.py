"""Columns of a batch, of whatever kind: their rows as arrays, and columns of the same kind made of rows again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba import outputs
from msgdrop_numba.call.arguments import is_masked
from msgdrop_numba.call.keys import sample_keys


class Field(NamedTuple):
    """A column, and what Arrow says of it beside its type."""

    column: Any
    field: Any = None


class ColumnBlocks(NamedTuple):
    """A column as blocks of rows that are alike, and how to make columns of such again.

    Fields:
        blocks: arrays or tensors `(rows, messages, *features)`.
        join: a column like this one, of blocks like these.
        beside: a column of one value a message, flags or else integers, of such for each block or its rows.
        shorten: a column of fewer messages, of those of each block in a row, and the counts of its rows.
        writable: whether the blocks are copies of ours.
        one_array: whether the column is one, and its only block.
    """

    blocks: list[Any]
    join: Callable[[list[Any]], Any]
    beside: Callable[[list[Any], bool], Any]
    shorten: Callable[[list[Any], list[np.ndarray]], Any]
    writable: bool = False
    one_array: bool = False


def check_names(names_given: list[str], needed: list[str], noun: str = "the batch") -> None:
    """Refuse a batch, or what `noun` says, unless it has each column that is needed once."""
    for name in needed:
        if names_given.count(name) != 1:
            have = f"{names_given.count(name)} columns" if name in names_given else "no column"
            raise ValueError(f"{noun} has {have} {name!r}: it has {', '.join(map(repr, names_given))}")


def names(batch: Any) -> list[str]:
    """The columns that a batch has."""
    if _is("pyarrow", "Table", batch):
        return list(batch.column_names)
    if _is("pandas", "DataFrame", batch) or isinstance(batch, Mapping):
        return list(batch)
    raise TypeError(
        f"the batch must be a dict of columns, a DataFrame or an Arrow table, but got {type(batch).__name__}"
    )


def field(batch: Any, name: str) -> Field:
    """One of them."""
    if _is("pyarrow", "Table", batch):
        return Field(batch.column(name), batch.schema.field(name))
    return Field(batch[name].to_numpy() if _is("pandas", "DataFrame", batch) else batch[name])


def answer(batch: Any, changed: dict[str, Any], passthrough: bool) -> Any:
    """The batch that is given back: of its own kind, a dict if it is any mapping."""
    if _is("pandas", "DataFrame", batch):
        import pandas

        columns = {name: pandas.Series(list(column), index=batch.index) for name, column in changed.items()}
        return batch.assign(**columns) if passthrough else pandas.DataFrame(columns)
    if isinstance(batch, Mapping):
        return {**({name: batch[name] for name in batch} if passthrough else {}), **changed}
    table = batch if passthrough else batch.select([])
    for name, column in changed.items():
        new_field: Any = name
        if name in batch.column_names:
            new_field = batch.schema.field(name)
            if new_field.type != column.type:  # what the field says besides is of the type that was
                new_field = new_field.with_type(column.type).remove_metadata()
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), new_field, column)
        else:
            table = table.append_column(new_field, column)
    return table


def _is(module: str, name: str, value: Any) -> bool:
    """True if `value` is of a library's class, without importing the library."""
    library = sys.modules.get(module)
    return library is not None and isinstance(value, getattr(library, name))


def is_tensor(value: Any) -> bool:
    """True for torch's tensors, without importing torch."""
    return _is("torch", "Tensor", value)


def is_array(value: Any) -> bool:
    """True if a column is one array or tensor."""
    return (isinstance(value, np.ndarray) and value.dtype != object) or is_tensor(value)


def is_arrow(column: Any) -> bool:
    """True for Arrow's columns, without importing Arrow."""
    return _is("pyarrow", "Array", column) or _is("pyarrow", "ChunkedArray", column)


def read(column: Any, field: Any, copied: bool = True) -> ColumnBlocks:
    """A column of messages; `copied`: as blocks that may be written, where Arrow's may not."""
    return _read_arrow(column, field, copied) if is_arrow(column) else _read(column, 3, _row)


def read_companion(column: Any, field: Any) -> ColumnBlocks:
    """A column of one value or more a message, of any dtype; not of Arrow's lists that `arrow.taken` takes from."""
    return _read_arrow(column, field, False) if is_arrow(column) else _read(column, 2, _companion_row)


def _read(column: Any, dims: int, read_row: Callable[[Any], Any]) -> ColumnBlocks:
    """A column that isn't Arrow's, of so many dims at least."""
    if not is_array(column):
        return _ragged(column, read_row)
    if column.ndim < dims:
        raise ValueError(f"it must be (rows, messages, *features), but has the shape {tuple(column.shape)}")
    return _one_array(column)


def _one_array(column: Any) -> ColumnBlocks:
    return ColumnBlocks(
        [column], lambda done: done[0], lambda parts, _: parts[0], lambda done, counts: split_rows(done[0], counts[0]),
        one_array=True,
    )  # fmt: skip


def _ragged(column: Any, read_row: Callable[[Any], Any]) -> ColumnBlocks:
    if not isinstance(column, (list, np.ndarray)):
        raise TypeError(f"it must be an array, a tensor, a list of those or an Arrow column, but is a {type(column)}")
    rows = [read_row(value) for value in column]
    has_features = [row.shape != (0,) for row in rows]  # one without messages may not tell its features

    def join(done: list[Any]) -> list[Any]:
        return [y[0] if has else row for y, row, has in zip(done, rows, has_features, strict=True)]

    return ColumnBlocks(
        [row[None] if has else np.empty((1, 0, 0)) for row, has in zip(rows, has_features, strict=True)],
        join, lambda parts, _: [part[0] for part in parts],
        lambda done, _: join([[y] for y in done]),
    )  # fmt: skip


def split_rows(packed: Any, counts: np.ndarray) -> list[Any]:
    """The messages of each row, of those of all in a row."""
    ends = counts.cumsum().tolist()
    return [packed[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _row(value: Any) -> Any:
    """One row of a ragged column; Ray and pandas give lists of lists as arrays of arrays."""
    lists = isinstance(value, np.ndarray) and value.dtype == object and len(value) > 0
    if lists and all(isinstance(message, np.ndarray) for message in value):
        value = np.stack([_row(message) if message.dtype == object else message for message in value])
    if isinstance(value, np.ndarray) and value.shape == (0,):  # a list without messages, which tells no features
        return value
    if not is_array(value):
        raise TypeError(
            f"its rows must be arrays or tensors, but one is a {type(value).__name__}; "
            'of Hugging Face datasets, ask for Arrow: with_format("arrow")'
        )
    if value.ndim < 2:
        raise ValueError(f"its rows must be (messages, *features), but one has the shape {tuple(value.shape)}")
    return value


def _companion_row(value: Any) -> Any:
    row = value if is_array(value) else np.asarray(value)
    if row.dtype == object and len(row) and all(isinstance(message, np.ndarray) for message in row):
        row = np.stack(list(row))
    if row.ndim < 1:
        raise ValueError(f"its rows must be (messages, *features), but one is {value!r}")
    return row


def _read_arrow(column: Any, field: Any, copied: bool) -> ColumnBlocks:
    """An Arrow column: its numbers, a copy where they are written, and blocks of rows that lie evenly among them."""
    import pyarrow

    from msgdrop_numba.pipelines import arrow

    whole = not hasattr(column, "chunks")
    chunks = [arrow.unsliced(chunk) for chunk in ([column] if whole else column.chunks)]
    blocks: list[np.ndarray] = []
    numbers, owned = [], []
    for chunk in chunks:
        found = arrow.leaf(chunk, field)
        values = _copy(found.values) if copied else found.values
        numbers.append(values)
        row = len(blocks)
        blocks += _even_blocks(values, found)
        owned.append(slice(row, len(blocks)))

    def join(_: list[Any]) -> Any:
        done = [arrow.with_numbers(chunk, values) for chunk, values in zip(chunks, numbers, strict=True)]
        return done[0] if whole else pyarrow.chunked_array(done, column.type)

    def beside(parts: list[Any], flags: bool) -> Any:
        kind = pyarrow.list_(pyarrow.bool_() if flags else pyarrow.int64())
        return pyarrow.array([row for part in parts for row in part], kind)

    def shorten(done: list[Any], counts: list[np.ndarray]) -> Any:
        kind = arrow.short_type(column.type, field)
        made = [arrow.rebuilt(kind, done[own], counts[own]) for own in owned]
        return made[0] if whole else pyarrow.chunked_array(made, kind)

    return ColumnBlocks(blocks, join, beside, shorten, copied)


def _copy(values: np.ndarray) -> np.ndarray:
    copied = outputs.array(values.shape, values.dtype)
    copied[...] = values
    return copied


def _even_blocks(values: np.ndarray, found: Any) -> Iterator[np.ndarray]:
    row = 0
    for shape, same in groupby(found.shapes):
        count, size = len(list(same)), int(np.prod(shape))
        yield values[found.starts[row] :][: count * size].reshape(count, *shape)
        row += count


def probabilities(name: str, column: Any) -> np.ndarray:
    """A column of numbers."""
    if is_arrow(column):
        from msgdrop_numba.pipelines import arrow

        arrow.check_numbers(name, column.type)
    return plain(name, column)


def each(argument: str, name: str, column: Any) -> Any:
    """A column of values for each row's messages: one array, or one a row."""
    if is_arrow(column):
        from msgdrop_numba.pipelines import arrow

        try:
            return arrow.lists(column, bools=argument == "protect")
        except (TypeError, ValueError) as error:
            raise type(error)(f"column {name!r}: {error}") from None
    if is_tensor(column):
        return column.numpy(force=True)
    if not isinstance(column, (list, np.ndarray)):
        raise TypeError(f"column {name!r} must be an array, a tensor, a list or an Arrow column, but is {type(column)}")
    return column


def plain(name: str, column: Any) -> np.ndarray:
    """A column of numbers or strings as an array."""
    if is_tensor(column):
        column = column.numpy(force=True)
    if is_arrow(column):
        if column.null_count:
            raise ValueError(f"column {name!r} has {column.null_count} nulls: filter those rows out before")
        column = column.to_numpy(zero_copy_only=False)
    if is_masked(column):
        raise TypeError(f"column {name!r} must be a plain array, but is a masked one")
    array = np.asarray(column, None if isinstance(column, np.ndarray) else object)
    if array.ndim != 1:
        raise ValueError(f"column {name!r} must have one value a row, but has the shape {array.shape}")
    return array


def like(column: Any, counts: np.ndarray) -> Any:
    """Integers, one a row, as a column of the kind of one that held such."""
    if is_tensor(column):
        return column.new_tensor(counts.tolist())
    if is_arrow(column):
        import pyarrow

        return pyarrow.array(counts, column.type)
    return counts.astype(column.dtype) if isinstance(column, np.ndarray) else counts.tolist()


def keys(name: str, column: Any) -> np.ndarray:
    """The keys of a column of ids."""
    ids = plain(name, column)
    try:
        return sample_keys(ids)
    except TypeError as error:
        why = "; a null among integers makes all of them floats: filter such rows out before"
        raise TypeError(f"column {name!r}: {error}{why}") from None
    except ValueError as error:
        raise ValueError(f"column {name!r}: {error}") from None
