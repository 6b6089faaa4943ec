"""MessageDropoutBatch: dict of columns in, dict of columns out, for Ray Data, Hugging Face datasets and Dask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba.call.arguments import ZERO, check_is_number, check_key, check_seed
from msgdrop_numba.call.request import Options, Request
from msgdrop_numba.functional import fold_in
from msgdrop_numba.pipelines import columns
from msgdrop_numba.pipelines.columns import ColumnBlocks, Field
from msgdrop_numba.pipelines.explain import Explanation, explained
from msgdrop_numba.pipelines.rows import Name, Own, check_removal, read_each, read_p, sources
from msgdrop_numba.pipelines.shorter import Done, companion, drop, shorten
from msgdrop_numba.pipelines.shown import of_batch

MASK, INDICES = "keep_mask", "indices"


class MessageDropoutBatch:
    """Drop messages in the columns of a batch; the same sample gets the same mask in any batch, on any machine.

    For `ray.data.Dataset.map_batches` (functions, or actors by `fn_constructor_kwargs`), `dask.delayed`,
    `datasets.Dataset.map(batched=True)` with a format, best Arrow's, or by hand. A mask depends on seed, epoch and the
    sample's id alone, so partitions, order and retries don't matter.

    Args:
        p: probability that a message is **dropped**; a number, or a range, a tuple `(lo, hi)`, of which each row draws
            its own, or an array with one for each position, or the name of a column with one number a row. `exact`
            takes no array and no column. Or a `Rule`, which holds `exact` to `prefix` too.
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
        passthrough: give back all columns; with False `columns` (and the mask) alone, with `remove` the companions that
            it names and `lengths` too.
        scale, exact, span, min_keep, fill: as for `message_dropout`.
        prefix: the first so many messages of each row take no part, all where it has fewer.
        return_mask: add the keep mask as the column `"keep_mask"`, True = kept.
        remove: take kept messages alone, in their order, by the same masks. An array or tensor comes back as a list of
            each row's; but with `exact`, p one number, no `protect` and no `lengths`, where all rows keep as many, as
            one `(rows, kept, *features)`. Ragged columns stay ragged, and Arrow's have the same type, but lists where
            rows had a fixed size (where they were tensors, of lists of a fixed size). The keep mask is over the rows as
            they were; the `lengths` column comes back with the counts of what is kept. Not with `fill`.
        companions: with `remove`, name or names of further columns that lose the same messages, of the same forms but
            with one value or more a message: `(rows, messages, *features)` or `(rows, messages)`, of any dtype; Arrow's
            lists of anything, lists of lists of numbers. The columns that `protect` and `positions` name are
            companions too.
        return_indices: with `remove`, add the position that each message had in its row as the column `"indices"`.

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
        remove: bool = False,
        companions: str | Sequence[str] | None = None,
        return_indices: bool = False,
    ) -> None:
        keywords = exact, span, min_keep, prefix
        rule, array, self.offset, self.own = sources(p, keywords, protect, positions, _source)
        if not isinstance(key, str) or not isinstance(lengths, (str, type(None))):
            raise TypeError(f"key and lengths must be names, but got {key!r} and {lengths!r}")
        self.columns, self.key, self.lengths = _listed("columns", columns), key, lengths
        check_removal(remove, companions, return_indices, fill)
        self.remove, self.return_indices = remove, return_indices
        self.companions = () if companions is None else _listed("companions", companions)
        if not self.columns or len(set(self.needed)) < len(self.needed) or self.own.get("p") in self.companions:
            more = ", companions" if self.companions else ""
            raise ValueError(
                f"columns, key, lengths, p, protect and positions{more} must name different columns, but got "
                f"{columns!r}, {', '.join(map(repr, self.needed[len(self.columns) :]))}"
            )
        self.seed = fold_in(check_seed(seed), check_key("epoch", epoch))
        self.given = check_seed(seed), int(epoch)
        self.return_mask, self.passthrough = return_mask, passthrough
        self.even = rule.exact and not rule.ranged and "protect" not in self.own and lengths is None
        if not isinstance(fill, np.ndarray):
            check_is_number("fill", fill)
        fill = fill.copy() if isinstance(fill, np.ndarray) else fill
        self.options = Options(rule, array, scale, fill, message_dims=2)

    def explain(self, batch: Any, row: int = 0) -> Explanation:
        """Why messages of a row of a batch drop.

        Args:
            batch: as at a call.
            row: its number in the batch.

        Returns:
            An object that prints it, and holds it as numbers, as that of `MessageDropoutCollate.explain`.

        Raises:
            TypeError, ValueError: the batch has no such row; or as at a call.

        Example:
            >>> import numpy as np
            >>> drop = MessageDropoutBatch(0.5, columns="frames", key="id", seed=7)
            >>> drop.explain({"id": ["a", "b"], "frames": np.ones((2, 4, 3))}, row=1)
            sample 'b', row key 8453121595177857668; seed 7, epoch 0: draws from 7430260224381777712
            2 of 4 messages drop: 0, 3
            because a message drops where its draw lies below p = 0.5
        """
        columns.check_names(columns.names(batch), self.needed)
        fields = {name: columns.field(batch, name) for name in self.needed}
        row_columns, rows = self._read(fields), columns.read(*fields[self.columns[0]], copied=False)
        first = 0
        for block, request in zip(rows.blocks, self._requests(rows, row_columns), strict=True):
            if 0 <= (at := row - first) < len(block):
                own: dict[str, Any] = {}
                for name in ("p", "lengths", "keys", "protect", "positions"):
                    value = getattr(request, name)
                    if isinstance(value, np.ndarray) and (name in ("lengths", "keys") or value.ndim == 2):
                        own[name] = value[at : at + 1]
                key = columns.plain(self.key, fields[self.key].column).tolist()[row]
                return explained(key, self.given, replace(request, **own), block.shape[1])
            first += len(block)
        raise ValueError(f"row must be from 0 to {first - 1}, a row of the batch, but got {row}")

    def __repr__(self) -> str:
        return of_batch(self)

    def __getstate__(self) -> dict[str, Any]:
        """The options as a plain tuple: a pickle names no inner class."""
        return {**self.__dict__, "options": self.options.state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, options=Options.of_state(state["options"]))

    @property
    def needed(self) -> list[str]:
        """The columns that a batch must have."""
        own = list(self.own.values())
        beside = [name for name in self.companions if name not in own]
        return [*self.columns, self.key, *([] if self.lengths is None else [self.lengths]), *own, *beside]

    @property
    def shorter(self) -> list[str]:
        """The columns that have something for each message beside `columns`, and so are shortened with them."""
        if not self.remove:
            return []
        own = [name for argument, name in self.own.items() if argument != "p" and self.passthrough]
        return list(dict.fromkeys([*self.companions, *own]))

    def __call__(self, batch: Any) -> Any:
        names_given = columns.names(batch)
        columns.check_names(names_given, self.needed)
        fields = {name: columns.field(batch, name) for name in self.needed}
        for name, wanted in ((MASK, self.return_mask), (INDICES, self.return_indices)):
            if wanted and name in names_given:
                option = "return_mask" if name == MASK else "return_indices"
                raise ValueError(f"the batch has a column {name!r} already: rename it, or leave {option} out")
        row_columns = self._read(fields)
        sizes: dict[str, list[int]] = {}
        done: dict[str, Done] = {}
        for name in self.columns:
            try:
                rows = columns.read(*fields[name], copied=not self.remove)
                requests = self._requests(rows, row_columns)
                done[name] = shorten(rows, requests, self.even) if self.remove else drop(rows, requests)
            except (TypeError, ValueError) as error:
                raise type(error)(f"column {name!r}: {error}") from error
            sizes[name] = [block.shape[1] for block in rows.blocks for _ in range(len(block))]
            if sizes[name] != sizes[self.columns[0]]:
                raise ValueError(
                    f"columns {self.columns[0]!r} and {name!r} must have as many messages in each row, as they share a "
                    "mask; give each a MessageDropoutBatch of its own"
                )
        changed = {name: column.column for name, column in done.items()}
        first = done[self.columns[0]]
        if first.remains is not None:
            for name in self.shorter:
                changed[name] = companion(name, fields[name], first.remains, row_columns.called)
            if self.lengths is not None:
                changed[self.lengths] = columns.like(fields[self.lengths].column, first.remains.counts)
        if self.return_mask:
            changed[MASK] = first.rows.beside(first.masks, True)
        if self.return_indices:
            changed[INDICES] = first.rows.beside(first.indices, False)
        return columns.answer(batch, changed, self.passthrough)

    def _read(self, fields: dict[str, Field]) -> _RowColumns:
        """The values that the rows bring."""
        column = fields[self.key].column
        keys = columns.keys(self.key, column)
        lengths = None if self.lengths is None else columns.plain(self.lengths, fields[self.lengths].column)

        def called(row: int) -> str:
            ids = columns.plain(self.key, column).tolist()  # looked at where something is wrong alone
            return f"row {row} (key {ids[row]!r})" if row < len(ids) else f"row {row}"

        read: dict[str, Any] = {"p": None, "protect": None, "positions": self.offset}
        for argument, name in self.own.items():
            values, place = fields[name].column, f"column {name!r} of"
            if argument == "p":
                read["p"] = read_p(columns.probabilities(name, values), place, called)
            else:
                read[argument] = read_each(argument, columns.each(argument, name, values), place, called)
        own = Own(called, **read) if self.own or self.offset else None
        return _RowColumns(keys, lengths, own, called)

    def _requests(self, rows: ColumnBlocks, row_columns: _RowColumns) -> list[Request]:
        """The request of each block of a column."""
        keys, lengths, own, _ = row_columns
        count = sum(map(len, rows.blocks))
        arrays = {"key": keys, "lengths": lengths, **({} if own is None else own.arrays())}
        for what, array in arrays.items():
            if array is not None and len(array) != count:
                raise ValueError(f"it has {count} rows, but the {what} column has {len(array)}")
        requests, first = [], 0
        for block in rows.blocks:
            part, size = slice(first, first + len(block)), block.shape[1]
            first = part.stop
            options = replace(self.options.for_rows(size), fill=_like(self.options.fill, block))
            request = Request.of(options, inplace=rows.writable, seed=self.seed, keys=keys[part], return_mask=True)
            if own is not None:
                request = own.block(part).requested(request, [size] * len(block), size)
            requests.append(replace(request, lengths=None if lengths is None else lengths[part]))
        return requests


def _listed(argument: str, names: Any) -> tuple[str, ...]:
    """One name, or several."""
    listed = (names,) if isinstance(names, str) else names
    if not isinstance(listed, (list, tuple)) or not all(isinstance(name, str) for name in listed):
        raise TypeError(f"{argument} must be a name or a list of names, but got {names!r}")
    return tuple(listed)


class _RowColumns(NamedTuple):
    """The columns beside those of messages: each row's key, length, own values and name."""

    keys: np.ndarray
    lengths: np.ndarray | None
    own: Own | None
    called: Name


def _source(name: str, value: Any) -> str | None:
    """The column that an argument names, if it does."""
    if name == "protect" and not isinstance(value, str):
        raise TypeError(f"protect must be the name of a column, but got {value!r}")
    return value if isinstance(value, str) else None


def _like(fill: Any, block: Any) -> Any:
    if isinstance(fill, np.ndarray) and not isinstance(block, np.ndarray):
        import torch

        return torch.from_numpy(fill).to(block.device)
    return fill
