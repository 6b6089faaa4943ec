"""The values that rows of a batch bring of their own: p, protected messages, positions. Never imports torch."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba.call.arguments import (
    ZERO,
    is_zero,
    message_positions,
    position_rule,
    protected,
    split_positions,
)
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import ARGUMENTS, ArrayRule, Rule

Name = Callable[[int], str]  # what a row is called in an error, by its number in the batch

# How an argument's values are checked, and what stands behind the rows that are shorter than the longest.
_FORMS = {1: "(messages,)", 2: "(rows, messages)"}
_READERS = {"protect": protected, "positions": message_positions}
PADDING = {"protect": True, "positions": 0}


class Each(NamedTuple):
    """An argument of which each row has values of its own, one a message.

    Fields:
        name: of the argument.
        place: where they stand, in words that a row's name follows.
        rows: one-dimensional arrays, one a row; or one array `(rows, messages)`.
    """

    name: str
    place: str
    rows: Any


class RowValues(NamedTuple):
    """The values of a block of rows, for a request: p `(rows, 1)`, the others `(rows, messages)` or a number."""

    p: np.ndarray | None = None
    protect: np.ndarray | None = None
    positions: Any = None


class Own(NamedTuple):
    """The values that the rows of a batch bring.

    Fields:
        called: what a row is called.
        p: float64, one a row; None: all rows share one.
        protect: of each row; None: nothing is protected.
        positions: of each row, or the position of the first message of all of them.
    """

    called: Name
    p: np.ndarray | None
    protect: Each | None
    positions: Each | int

    def arrays(self) -> dict[str, Any]:
        """The arguments that have a value for each row, by name."""
        each = {"protect": self.protect, "positions": self.positions}
        return {"p": self.p, **{name: value.rows for name, value in each.items() if isinstance(value, Each)}}

    def block(self, part: slice) -> Own:
        """The values of some of the rows."""

        def cut(each: Any) -> Any:
            return each._replace(rows=each.rows[part]) if isinstance(each, Each) else each

        p = None if self.p is None else self.p[part]
        return Own(lambda row: self.called(part.start + row), p, cut(self.protect), cut(self.positions))

    def row_values(self, counts: Sequence[int] | None, size: int, of: str = "") -> RowValues:
        """The arguments of a request for rows of `size` messages, `counts` of them a row's own; None: all."""

        def laid(each: Any) -> Any:
            return laid_out(each, counts, size, self.called, of) if isinstance(each, Each) else each

        return RowValues(None if self.p is None else self.p[:, None], laid(self.protect), laid(self.positions))

    def requested(self, request: Request, counts: Sequence[int] | None, size: int, of: str = "") -> Request:
        """The request for such rows, with what they bring."""
        p, protect, positions = self.row_values(counts, size, of)
        request = replace(request, protect=protect, positions=positions)
        return request if p is None else request.with_p(p)


def sources(
    p: Any, keywords: tuple[Any, ...], protect: Any, positions: Any, source: Callable[[str, Any], Any]
) -> tuple[Rule, np.ndarray | None, int, dict[str, Any]]:
    """The arguments common to all rows, and the sources of each row's own values.

    Args:
        p, protect, positions: as users give them to a pipeline. keywords: those of the rule.
        source: where the values of an argument, by its name, are; None: it names no place.

    Returns:
        The rule and the array of `position_rule`; the position of a row's first message; the sources by their
        arguments' names.
    """
    given = {"p": None if isinstance(p, Rule) else p, "protect": protect, "positions": positions}
    found = {name: source(name, value) for name, value in given.items() if value is not None}
    own = {name: value for name, value in found.items() if value is not None}
    rule: Rule
    array = None
    if "p" in own:
        rule = ArrayRule(None, **dict(zip(ARGUMENTS, keywords, strict=True))).check()
    else:
        rule, array = position_rule(p, *keywords)
    offset, each = (0, None) if "positions" in own else split_positions(positions, 1)
    if each is not None:
        raise TypeError(f"positions must be an integer, or say where each row's own are, but got {positions!r}")
    return rule, array, offset, own


def check_removal(remove: Any, companions: Any, return_indices: Any, fill: Any) -> None:
    """Refuse what goes with removal alone where nothing is removed, and a fill where nothing is filled."""
    if not isinstance(remove, bool):
        raise TypeError(f"remove must be True or False, but got {remove!r}")
    if not remove:
        for name, value in (("companions", companions), ("return_indices", return_indices or None)):
            if value is not None:
                raise ValueError(f"{name}={value!r} needs remove=True: nothing else loses messages")
    elif fill is not ZERO and not is_zero(fill):
        raise ValueError(f"fill can't be used with remove=True, which leaves no message to fill, but got {fill!r}")


def read_p(values: Any, place: str, called: Name) -> np.ndarray:
    """Each row's own p, checked."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiu":
        array = values.astype(np.float64)
        if ((array >= 0) & (array <= 1)).all():
            return array
    read = []
    for row, value in enumerate(values):
        number = value.item() if getattr(value, "ndim", None) == 0 else value
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise TypeError(f"{place} {called(row)}: p must be a number, a probability of dropping, but got {value!r}")
        if not 0 <= float(number) <= 1:
            raise ValueError(f"{place} {called(row)}: p must be a probability, from 0 to 1, but got {value!r}")
        read.append(float(number))
    return np.array(read, np.float64)


def read_each(name: str, values: Any, place: str, called: Name) -> Each:
    """The values of an argument, of one row after the other, or in one array; checked but for their number."""
    if isinstance(values, np.ndarray) and values.dtype != object:
        return Each(name, place, _read(name, values, 2, f"{place} the rows"))
    return Each(name, place, [_read(name, row, 1, f"{place} {called(i)}") for i, row in enumerate(values)])


def _read(name: str, values: Any, dims: int, where: str) -> np.ndarray:
    try:
        shape = tuple(np.shape(values))
        if shape == (0,) and dims == 1:  # it may come without a dtype, as an empty list
            return np.full(0, PADDING[name])
        array = _READERS[name](values, shape)
        if len(shape) != dims:
            raise ValueError(f"{name} must be {_FORMS[dims]}, but got shape {shape}")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    return array


def laid_out(each: Each, counts: Sequence[int] | None, size: int, called: Name, of: str = "") -> np.ndarray:
    """The values of all rows, `(rows, size)`, padded where a row is shorter. See `Own.row_values` for the arguments."""
    name, place, rows = each
    if isinstance(rows, np.ndarray) and rows.shape[1] == size:
        return rows
    out = np.full((len(rows), size), PADDING[name])
    for row, values in enumerate(rows):
        count = len(values)
        if count > size or (counts is not None and count != counts[row]):
            wanted = f"{size} values at most" if counts is None else f"{counts[row]} values"
            raise ValueError(f"{place} {called(row)}: {name} must have {wanted}, one a message{of}, but has {count}")
        out[row, :count] = values
    return out
