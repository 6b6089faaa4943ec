"""MessageDropoutBatch: dict of columns in, dict of columns out, for Ray Data, Hugging Face datasets and Dask."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba.call.arguments import ZERO, check_is_number, check_key, check_seed
from msgdrop_numba.call.keys import sample_keys
from msgdrop_numba.call.request import Options, Request
from msgdrop_numba.call.rule import DropRule
from msgdrop_numba.functional import drop_messages, fold_in
from msgdrop_numba.pipelines.rows import Own, read_each, read_p, sources

MASK = "keep_mask"


class MessageDropoutBatch:
    """Drop messages in the columns of a batch; the same sample gets the same mask in any batch, on any machine.

    For `ray.data.Dataset.map_batches` (functions, or actors by `fn_constructor_kwargs`), `dask.delayed`,
    `datasets.Dataset.map(batched=True)` with a format, best Arrow's, or by hand. A mask depends on seed, epoch and the
    sample's id alone, so partitions, order and retries don't matter.

    Args:
        p: probability that a message is **dropped**; a number, or a range, a tuple `(lo, hi)`, of which each row draws
            its own, or an array with one for each position, or the name of a column with one number a row. `exact`
            takes no array and no column.
        columns: name or names of the columns that hold messages. They share one mask: as many messages in each row.
        key: name of the column of sample ids, integers or strings (bytes and UUIDs too). Needed: a position in a
            block is no id. Rows with equal ids get equal masks. Floats, bools and nulls are refused (a null among
            integers makes all of them floats).
        seed: integer in [0, 2**64).
        epoch: integer in [-2**63, 2**64); the masks are those of `fold_in(seed, epoch)`.
        lengths: name of a column with each row's count of valid messages. What lies behind is padding, left as it is.
        protect: name of a column with bools for each row's messages, True = takes no part and passes as it is: an array
            or tensor `(rows, messages)`, a list or object array of those of each row, Arrow's lists of bools.
        positions: what the draws number messages by in place of their index: an integer, the position of each row's
            first message, or the name of a column of such integers in [0, 2**34), of the same forms as `protect`.
        passthrough: give back all columns; with False `columns` (and the mask) alone.
        scale, exact, span, min_keep, fill: as for `message_dropout`.
        prefix: the first so many messages of each row take no part, all where it has fewer.
        return_mask: add the keep mask as the column `"keep_mask"`, True = kept.

    Called with a batch, a mapping from names to columns (pandas DataFrames and Arrow tables do too), it gives back a
    dict (a DataFrame, a table) and never writes its input; with p = 0 the columns are the input's own. A column may be

    - an array or tensor `(rows, messages, *features)`;
    - ragged: a list or object array of arrays or tensors `(messages, *features)`; taken row by row, comes back as a
      list;
    - Arrow's: tensors or lists of lists of numbers, ragged or not; comes back with the same type. Bools, nulls and
      tensors with permuted dims are refused. A table that is a slice is copied twice, others once.

    Raises:
        TypeError, ValueError: an argument is wrong; at a call: a column is missing, or isn't what it must be.

    Example:
        >>> import numpy as np
        >>> drop = MessageDropoutBatch(0.5, columns="frames", key="id", seed=7)
        >>> batch = {"id": np.array(["a", "b"]), "frames": np.ones((2, 4, 3), np.float32)}
        >>> drop(batch)["frames"].any(axis=-1)
        array([[False, False,  True,  True],
               [False,  True,  True, False]])

    Source: the mask contract, version 1.1 (CONTRACT.md), on ids, keys and epochs.
    """

    __module__ = "msgdrop_numba"  # where a pickle looks for it, wherever it stands

    def __init__(
        self,
        p: Any = 0.5,
        *,
        columns: str | Sequence[str],
        key: str,
        seed: int,
        epoch: int = 0,
        lengths: str | None = None,
        protect: str | None = None,
        positions: str | int | None = None,
        passthrough: bool = True,
        scale: bool = False,
        exact: bool = False,
        span: int = 1,
        min_keep: int = 0,
        prefix: int = 0,
        fill: Any = ZERO,
        return_mask: bool = False,
    ) -> None:
        number, array, self.offset, self.own = sources(p, protect, positions, _source)
        names = (columns,) if isinstance(columns, str) else columns
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"columns must be a name or a list of names, but got {columns!r}")
        if not isinstance(key, str) or not isinstance(lengths, (str, type(None))):
            raise TypeError(f"key and lengths must be names, but got {key!r} and {lengths!r}")
        self.columns, self.key, self.lengths = tuple(names), key, lengths
        if not self.columns or len(set(self.needed)) < len(self.needed):
            raise ValueError(
                f"columns, key, lengths, p, protect and positions must name different columns, but got {columns!r}, "
                f"{', '.join(map(repr, self.needed[len(self.columns) :]))}"
            )
        self.seed = fold_in(check_seed(seed), check_key("epoch", epoch))
        rule = DropRule(number, exact, span, min_keep, prefix)
        self.return_mask, self.passthrough = return_mask, passthrough
        if not isinstance(fill, np.ndarray):
            check_is_number("fill", fill)
        fill = fill.copy() if isinstance(fill, np.ndarray) else fill
        self.options = Options(rule.p if array is None else array, rule.rest, scale, fill, message_dims=2)

    def __getstate__(self) -> dict[str, Any]:
        """The options as a plain tuple: a pickle names no inner class."""
        return {**self.__dict__, "options": tuple(self.options)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, options=Options(*state["options"]))

    @property
    def needed(self) -> list[str]:
        """The columns that a batch must have."""
        return [*self.columns, self.key, *([] if self.lengths is None else [self.lengths]), *self.own.values()]

    def __call__(self, batch: Any) -> Any:
        there = _names(batch)
        check_names(there, self.needed)
        fields = {name: _field(batch, name) for name in self.needed}
        if self.return_mask and MASK in there:
            raise ValueError(f"the batch has a column {MASK!r} already: rename it, or leave return_mask out")
        keys = _keys(self.key, fields[self.key].column)
        own = self._read_own(fields) if self.own or self.offset else None
        lengths = None if self.lengths is None else _plain(self.lengths, fields[self.lengths].column)
        changed, masks, sizes = {}, {}, {}
        for name in self.columns:
            try:
                changed[name], masks[name], sizes[name] = self._drop(_read(*fields[name]), keys, lengths, own)
            except (TypeError, ValueError) as error:
                raise type(error)(f"column {name!r}: {error}") from error
            if sizes[name] != sizes[self.columns[0]]:
                raise ValueError(
                    f"columns {self.columns[0]!r} and {name!r} must have as many messages in each row, as they share a "
                    "mask; give each a MessageDropoutBatch of its own"
                )
        if self.return_mask:
            changed[MASK] = masks[self.columns[0]]
        return _answer(batch, changed, self.passthrough)

    def _read_own(self, fields: dict[str, _Field]) -> Own:
        """What the rows bring."""
        ids = _plain(self.key, fields[self.key].column).tolist()

        def called(row: int) -> str:
            return f"row {row} (key {ids[row]!r})" if row < len(ids) else f"row {row}"

        read: dict[str, Any] = {"p": None, "protect": None, "positions": self.offset}
        for argument, name in self.own.items():
            column, place = fields[name].column, f"column {name!r} of"
            if argument == "p":
                read["p"] = read_p(_probabilities(name, column), place, called)
            else:
                read[argument] = read_each(argument, _each(argument, name, column), place, called)
        return Own(called, **read)

    def _drop(
        self, rows: _Rows, keys: np.ndarray, lengths: np.ndarray | None, own: Own | None
    ) -> tuple[Any, Any, list[int]]:
        """One column without its dropped messages, its mask, and its rows' counts of messages."""
        count = sum(map(len, rows.blocks))
        arrays = {"key": keys, "lengths": lengths, **({} if own is None else own.arrays())}
        for what, array in arrays.items():
            if array is not None and len(array) != count:
                raise ValueError(f"it has {count} rows, but the {what} column has {len(array)}")
        done, masks, first = [], [], 0
        for block in rows.blocks:
            here, size = slice(first, first + len(block)), block.shape[1]
            first = here.stop
            options = self.options.of_rows(size)._replace(fill=_like(self.options.fill, block))
            request = Request(*options, inplace=rows.writable, seed=self.seed, keys=keys[here], return_mask=True)
            if own is not None:
                request = own.block(here).requested(request, [size] * len(block), size)
            y, mask = drop_messages(block, request._replace(lengths=None if lengths is None else lengths[here]))
            done.append(y)
            masks.append(mask)
        sizes = [block.shape[1] for block in rows.blocks for _ in range(len(block))]
        return rows.join(done), rows.join_masks(masks), sizes


class _Field(NamedTuple):
    """A column, and what Arrow says of it beside its type."""

    column: Any
    field: Any = None


class _Rows(NamedTuple):
    """A column as blocks `(rows, messages, *features)`, and how to make a column, or one of masks, of such again."""

    blocks: list[Any]
    join: Callable[[list[Any]], Any]
    join_masks: Callable[[list[Any]], Any]
    writable: bool = False  # whether the blocks are copies of ours


def check_names(there: list[str], needed: list[str]) -> None:
    """Refuse a batch of the columns `there` unless each that is needed is among them once."""
    for name in needed:
        if there.count(name) != 1:
            have = f"{there.count(name)} columns" if name in there else "no column"
            raise ValueError(f"the batch has {have} {name!r}: it has {', '.join(map(repr, there))}")


def _source(name: str, value: Any) -> str | None:
    """The column that an argument names, if it does."""
    if name == "protect" and not isinstance(value, str):
        raise TypeError(f"protect must be the name of a column, but got {value!r}")
    return value if isinstance(value, str) else None


def _names(batch: Any) -> list[str]:
    if _is("pyarrow", "Table", batch):
        return list(batch.column_names)
    if _is("pandas", "DataFrame", batch) or isinstance(batch, Mapping):
        return list(batch)
    raise TypeError(
        f"the batch must be a dict of columns, a DataFrame or an Arrow table, but got {type(batch).__name__}"
    )


def _field(batch: Any, name: str) -> _Field:
    if _is("pyarrow", "Table", batch):
        return _Field(batch.column(name), batch.schema.field(name))
    return _Field(batch[name].to_numpy() if _is("pandas", "DataFrame", batch) else batch[name])


def _answer(batch: Any, changed: dict[str, Any], passthrough: bool) -> Any:
    """What the batch becomes: of its own kind, a dict where it is any mapping."""
    if _is("pandas", "DataFrame", batch):
        import pandas

        columns = {name: pandas.Series(list(column), index=batch.index) for name, column in changed.items()}
        return batch.assign(**columns) if passthrough else pandas.DataFrame(columns)
    if isinstance(batch, Mapping):
        return {**({name: batch[name] for name in batch} if passthrough else {}), **changed}
    table = batch if passthrough else batch.select([])
    for name, column in changed.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), batch.schema.field(name), column)
        else:
            table = table.append_column(name if name == MASK else batch.schema.field(name), column)
    return table


def _is(module: str, name: str, value: Any) -> bool:
    """Whether `value` is of a library's class, without importing the library."""
    library = sys.modules.get(module)
    return library is not None and isinstance(value, getattr(library, name))


def _is_array(value: Any) -> bool:
    return (isinstance(value, np.ndarray) and value.dtype != object) or _is("torch", "Tensor", value)


def _read(column: Any, field: Any) -> _Rows:
    if _is_array(column):
        if column.ndim < 3:
            raise ValueError(f"it must be (rows, messages, *features), but has the shape {tuple(column.shape)}")
        return _Rows([column], lambda done: done[0], lambda masks: masks[0])
    if _is_arrow(column):
        return _read_arrow(column, field)
    if not isinstance(column, (list, np.ndarray)):
        raise TypeError(f"it must be an array, a tensor, a list of those or an Arrow column, but is a {type(column)}")
    rows = [_row(value) for value in column]
    return _Rows(
        [row[None] if row.ndim > 1 else np.empty((1, 0, 0)) for row in rows],
        lambda done: [y[0] if row.ndim > 1 else row for y, row in zip(done, rows, strict=True)],
        lambda masks: [mask[0] for mask in masks],
    )


def _row(value: Any) -> Any:
    """One row of a ragged column; Ray and pandas give lists of lists as arrays of arrays."""
    lists = isinstance(value, np.ndarray) and value.dtype == object and len(value) > 0
    if lists and all(isinstance(message, np.ndarray) for message in value):
        value = np.stack([_row(message) if message.dtype == object else message for message in value])
    if isinstance(value, np.ndarray) and value.shape == (0,):  # a list without messages, which tells no features
        return value
    if not _is_array(value):
        raise TypeError(
            f"its rows must be arrays or tensors, but one is a {type(value).__name__}; "
            'of Hugging Face datasets, ask for Arrow: with_format("arrow")'
        )
    if value.ndim < 2:
        raise ValueError(f"its rows must be (messages, *features), but one has the shape {tuple(value.shape)}")
    return value


def _read_arrow(column: Any, field: Any) -> _Rows:
    """An Arrow column: a copy of its numbers to drop in, and blocks of rows that lie evenly among them."""
    import pyarrow

    from msgdrop_numba.pipelines import arrow

    whole = not hasattr(column, "chunks")
    chunks = [arrow.unsliced(chunk) for chunk in ([column] if whole else column.chunks)]
    blocks: list[np.ndarray] = []
    copies = []
    for chunk in chunks:
        found = arrow.leaf(chunk, field)
        values = found.values.copy()
        copies.append(values)
        row = 0
        for shape, same in groupby(found.shapes):
            count, size = len(list(same)), int(np.prod(shape))
            blocks.append(values[found.starts[row] :][: count * size].reshape(count, *shape))
            row += count

    def join(_: list[Any]) -> Any:
        done = [arrow.with_numbers(chunk, values) for chunk, values in zip(chunks, copies, strict=True)]
        return done[0] if whole else pyarrow.chunked_array(done, column.type)

    kind = pyarrow.list_(pyarrow.bool_())
    return _Rows(blocks, join, lambda masks: pyarrow.array([row for mask in masks for row in mask], kind), True)


def _like(fill: Any, block: Any) -> Any:
    if isinstance(fill, np.ndarray) and not isinstance(block, np.ndarray):
        import torch

        return torch.from_numpy(fill).to(block.device)
    return fill


def _is_arrow(column: Any) -> bool:
    return _is("pyarrow", "Array", column) or _is("pyarrow", "ChunkedArray", column)


def _probabilities(name: str, column: Any) -> np.ndarray:
    """A column of numbers."""
    if _is_arrow(column):
        from msgdrop_numba.pipelines import arrow

        arrow.check_numbers(name, column.type)
    return _plain(name, column)


def _each(argument: str, name: str, column: Any) -> Any:
    """A column of values for each row's messages: one array, or one a row."""
    if _is_arrow(column):
        from msgdrop_numba.pipelines import arrow

        try:
            return arrow.lists(column, bools=argument == "protect")
        except (TypeError, ValueError) as error:
            raise type(error)(f"column {name!r}: {error}") from None
    if _is("torch", "Tensor", column):
        return column.numpy(force=True)
    if not isinstance(column, (list, np.ndarray)):
        raise TypeError(f"column {name!r} must be an array, a tensor, a list or an Arrow column, but is {type(column)}")
    return column


def _plain(name: str, column: Any) -> np.ndarray:
    """A column of numbers or strings as an array."""
    if _is("torch", "Tensor", column):
        column = column.numpy(force=True)
    if _is_arrow(column):
        if column.null_count:
            raise ValueError(f"column {name!r} has {column.null_count} nulls: filter those rows out before")
        column = column.to_numpy(zero_copy_only=False)
    if isinstance(column, np.ma.MaskedArray):
        raise TypeError(f"column {name!r} must be a plain array, but is a masked one")
    array = np.asarray(column, None if isinstance(column, np.ndarray) else object)
    if array.ndim != 1:
        raise ValueError(f"column {name!r} must have one value a row, but has the shape {array.shape}")
    return array


def _keys(name: str, column: Any) -> np.ndarray:
    """The keys of a column of ids."""
    ids = _plain(name, column)
    try:
        return sample_keys(ids)
    except TypeError as error:
        why = "; a null among integers makes all of them floats: filter such rows out before"
        raise TypeError(f"column {name!r}: {error}{why}") from None
    except ValueError as error:
        raise ValueError(f"column {name!r}: {error}") from None
