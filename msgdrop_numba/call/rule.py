"""What decides which messages drop: validated numbers, no arrays, no numba."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field, fields
from typing import Any

ONE = 2**32  # a threshold of 1.0: every 32-bit draw lies below it
MAX_ROW = 2**34  # messages: the contract's 32-bit counter numbers four draws each

P = float | tuple[float, float] | None  # a number, a range, or an array that is kept elsewhere


@dataclass(frozen=True, slots=True)
class DropRule:
    """The rule of a mask. Behind the public signatures only this and what computes the rule name its keywords.

    Args:
        p: probability that a message is dropped, a real number in [0, 1]; or a range, `(lo, hi)`, of which each row
            draws its own; None where it is an array, kept elsewhere.
        exact: drop a fixed count in each row, floor(n * p) of its n valid messages, instead of each on its own.
        span: drop runs of this many neighbouring messages together.
        min_keep: at least so many of the messages that take part are kept in a row.
        prefix: so many first messages of a row take no part.

    Raises:
        TypeError: `p` is no real number (a bool is none: it is most likely a misplaced `training`) and no pair of
            them, `exact` no bool, `span`, `min_keep` or `prefix` no integer.
        ValueError: one of them is out of range, or `exact` is combined with `span` or with an array of probabilities.

    Example:
        >>> DropRule(0.25).threshold == 2**30
        True
        >>> DropRule(0.8, exact=True, span=2)
        Traceback (most recent call last):
        ValueError: exact can't be combined with span=2: exact drops single messages

    Source: the mask contract, version 1.1 (CONTRACT.md).
    """

    p: P
    exact: bool = field(default=False, metadata={"help": "Drop exactly floor(n p) of a row's n messages."})
    span: int = field(default=1, metadata={"help": "Drop runs of so many messages together.", "least": 1})
    min_keep: int = field(default=0, metadata={"help": "Keep at least so many of a row.", "least": 0})
    prefix: int = field(default=0, metadata={"help": "Leave the first so many of a row alone.", "least": 0})

    def __post_init__(self) -> None:
        if self.p is not None:
            object.__setattr__(self, "p", check_p(self.p))
        if not isinstance(self.exact, bool):
            raise TypeError(f"exact must be True or False, but got {self.exact!r}")
        object.__setattr__(self, "span", _check_count("span", self.span, 1))
        object.__setattr__(self, "min_keep", _check_count("min_keep", self.min_keep, 0))
        object.__setattr__(self, "prefix", _check_count("prefix", self.prefix, 0))
        if self.exact and self.span > 1:
            raise ValueError(f"exact can't be combined with span={self.span}: exact drops single messages")
        if self.exact and self.p is None:
            raise ValueError(
                "exact needs p to be a single number or range (traced: a Python one), but got an array, a tensor or "
                "where each row has its own"
            )

    @property
    def rest(self) -> tuple[Any, ...]:
        """The fields behind p, checked, in their order."""
        return tuple(getattr(self, name) for name in KEYWORDS)

    @property
    def packed(self) -> list[int]:
        """The same as integers, which an operator of torch's takes."""
        return [int(value) for value in self.rest]

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers of p: one, the two of a range, none of an array."""
        return self.p if isinstance(self.p, tuple) else () if self.p is None else (self.p,)

    @property
    def threshold(self) -> int:
        """T(p) of the contract: a message drops where its draw lies below this. A range's least; 0 of an array."""
        return round(self.numbers[0] * ONE) if self.numbers else 0

    @property
    def spread(self) -> int:
        """What a row of its own p may add to the threshold, at most."""
        return round(self.numbers[-1] * ONE) - self.threshold if self.numbers else 0

    @property
    def ranged(self) -> bool:
        """Whether each row draws its own p."""
        return isinstance(self.p, tuple)

    @property
    def certain(self) -> bool:
        """Whether p is 1: all drops, and nothing that is kept all the same is scaled."""
        return self.p == 1

    @property
    def plain(self) -> bool:
        """Whether each message drops by a draw of its own, at one p."""
        return not self.ranged and self.rest == tuple(DEFAULTS.values())

    @property
    def limited(self) -> bool:
        """Whether fewer messages of a row may drop than the draws alone would say."""
        return bool(self.exact or self.min_keep)

    @property
    def scale(self) -> float:
        """What a kept message is multiplied by where p is one number and not exact: 1/(1-p), and 1 where p is 1."""
        return 1 / (1 - self.p) if isinstance(self.p, float) and self.p < 1 else 1.0


# What of a rule is given by keyword, wherever messages drop, and what holds where it isn't: a bool or an integer each.
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(DropRule)[1:]}
KEYWORDS = tuple(DEFAULTS)
_PREFIX = KEYWORDS.index("prefix")


def rule_of(told: tuple[Any, ...]) -> DropRule:
    """The rule of p and all keywords, in their order; one that is missing isn't taken for its default."""
    return DropRule(**dict(zip(("p", *KEYWORDS), told, strict=True)))


def unpacked(values: Any) -> tuple[Any, ...]:
    """What `packed` packed."""
    return tuple(type(default)(value) for default, value in zip(DEFAULTS.values(), values, strict=True))


def for_rows(rule: tuple[Any, ...], size: int, start: int = 0) -> tuple[Any, ...]:
    """The keywords of a rule for `size` messages of a row, from `start` on, which may be fewer than its prefix."""
    if not start and rule[_PREFIX] <= size:
        return rule
    return (*rule[:_PREFIX], min(max(rule[_PREFIX] - start, 0), size), *rule[_PREFIX + 1 :])


def check_p(p: Any) -> float | tuple[float, float]:
    """p as a float, or a range as two; refused where it is neither."""
    if not isinstance(p, tuple):
        return _check_probability(p)
    if len(p) != 2:
        raise TypeError(f"p must be a number, an array, or a range (lo, hi), but got {len(p)} numbers: {p!r}")
    low, high = map(_check_probability, p)
    if low > high:
        raise ValueError(f"p must be a range (lo, hi) with lo <= hi, but got {p!r}")
    return low if low == high else (low, high)


def _check_probability(p: Any) -> float:
    if isinstance(p, bool) or not isinstance(p, numbers.Real):
        raise TypeError(
            "p must be a number, the probability of dropping a message, or an array of them, or a range (lo, hi), "
            f"but got {p!r}"
        )
    number = float(p)
    if not 0 <= number <= 1:
        raise ValueError(f"p must be a probability of dropping, from 0 to 1, but got {p!r}")
    return number


def _check_count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, but got {value!r}")
    count = int(value)
    if not least <= count <= MAX_ROW:
        raise ValueError(f"{name} must be an integer from {least} to 2**34, but got {value!r}")
    return count
