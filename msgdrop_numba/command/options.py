"""Options of the `msgdrop` command: how they are read, and those that say which messages drop."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from msgdrop_numba.call.arguments import split_positions
from msgdrop_numba.call.rule import KEYWORDS, LEAST, ArrayRule, Rule, check_p


class Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Integers with commas between them, of at least `least`."""

    name = "N,N"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, parameter: Any, context: Any) -> Any:
        if isinstance(value, tuple):
            return value
        parts = value.split(",")
        if not all(part.strip().isdecimal() and int(part) >= self.least for part in parts):
            self.fail(
                f"must be integers from {self.least} on with commas between them, but got {value!r}", parameter, context
            )
        return tuple(int(part) for part in parts)


class Names(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Ids with commas between them: what is written as an integer is one, all else a string."""

    name = "ID,ID"

    def convert(self, value: Any, parameter: Any, context: Any) -> Any:
        if isinstance(value, tuple):
            return value
        return tuple(int(part) if re.fullmatch(r"-?\d+", part) else part for part in value.split(","))


class Number(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number, an integer where it is written as one: the largest of int64 is no float."""

    name = "NUMBER"

    def convert(self, value: Any, parameter: Any, context: Any) -> Any:
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
        self.fail(f"must be a number, but got {value!r}", parameter, context)


class _OrColumn(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Numbers with commas between them, and where there are columns anything else as the name of one."""

    def __init__(self, name: str, columns: bool, kind: type, read: Callable[..., Any]) -> None:
        self.name = f"{name}|COLUMN" if columns else name
        self.columns, self.kind, self.read = columns, kind, read

    def convert(self, value: Any, parameter: Any, context: Any) -> Any:
        try:
            numbers = [self.kind(part) for part in value.split(",")]
        except ValueError:
            if self.columns and value.strip():
                return value
            self.fail(f"must be {self.name}, but got {value!r}", parameter, context)
        try:
            return self.read(*numbers)
        except (TypeError, ValueError) as error:
            self.fail(str(error), parameter, context)


def _p(*numbers: float) -> Any:
    return check_p(numbers[0] if len(numbers) == 1 else numbers)


def _offset(*numbers: int) -> Any:
    if len(numbers) > 1:
        raise TypeError(f"positions must be an integer, that of each row's first message, but got {numbers}")
    return split_positions(numbers[0], 1)[0]


def of_rule(columns: bool) -> Callable[..., Any]:
    """The options that say which messages drop; the command gets p, and the `Rule`, an `ArrayRule` if p is a column.

    Args:
        columns: whether p and positions may be columns.
    """
    return functools.partial(_with_rule, columns)


def _with_rule(columns: bool, command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def with_rule(p: Any, **options: Any) -> Any:
        keywords = {name: options.pop(name) for name in KEYWORDS}
        try:
            rule = ArrayRule(None, **keywords).check() if isinstance(p, str) else Rule(p, **keywords)
        except ValueError as error:
            named = re.sub(rf"\b({'|'.join(KEYWORDS)})\b", lambda m: "--" + m[0].replace("_", "-"), str(error))
            raise click.UsageError(named) from None
        return command(p=p, rule=rule, **options)

    for keyword in reversed([each for each in fields(Rule) if each.name in KEYWORDS]):
        more: dict[str, Any] = {"is_flag": True}
        if keyword.name in LEAST:
            more = {"type": click.IntRange(min=LEAST[keyword.name])}
        flag = "--" + keyword.name.replace("_", "-")
        with_rule = click.option(flag, default=keyword.default, help=keyword.metadata["help"], **more)(with_rule)
    in_parquet = " Parquet: or a column of {}." if columns else ""
    positions = click.option(
        "--positions", type=_OrColumn("OFFSET", columns, int, _offset),
        help="Position of each row's first message in the draws; 0 by default."
        + in_parquet.format("lists of integers, the position of each message"),
    )  # fmt: skip
    seed = click.option("--seed", required=True, type=click.IntRange(0, 2**64 - 1), help="Seed of the masks.")
    p = click.option(
        "--p", required=True, type=_OrColumn("P|LO,HI", columns, float, _p),
        help="Probability of dropping a message, or a range of which each row draws its own."
        + in_parquet.format("each row's own"),
    )  # fmt: skip
    return p(seed(positions(with_rule)))


def picture_path(context: Any, parameter: Any, path: Path | None) -> Path | None:
    """A path that a picture can be written to."""
    if path is not None and path.suffix.lower() != ".png":
        raise click.BadParameter(f"must end in .png, but got {str(path)!r}")
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(path.absolute().parent)!r}")
    return path
