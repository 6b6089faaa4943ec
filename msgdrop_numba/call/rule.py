"""`Rule`: what decides which messages drop. Validated numbers alone, no arrays, no numba."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

from msgdrop_numba.call.shown import of_call

ONE = 2**32  # a threshold of 1.0: every 32-bit draw lies below it
MAX_ROW = 2**34  # messages: the contract's 32-bit counter numbers four draws each

LEAST = {"span": 1, "min_keep": 0, "prefix": 0}  # the least value of each integer keyword

P = float | tuple[float, float] | None  # a number, a range, or an array that is kept elsewhere
R = TypeVar("R", bound="Rule")


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Rule:
    """A rule that decides which messages drop. It serves training, the loader and the cluster: give it wherever p is.

    Args:
        p: probability that a message is **dropped**, a real number in [0, 1]; or a range, a tuple `(lo, hi)`, of which
            each row draws its own. Arrays are no part of a rule: give them as p, with the keywords beside them.
        exact: drop exactly floor(n * p) of the n messages of each row that take part; without `span`.
        span: drop runs of this many neighbouring messages together.
        min_keep: keep at least this many of the messages of each row that take part.
        prefix: the first messages of each row, this many, take no part: they pass as they are.

    Raises:
        TypeError: `p` is no real number (a bool is none: it is most likely a misplaced `training`) and no pair of
            them, `exact` no bool, `span`, `min_keep` or `prefix` no integer.
        ValueError: one of them is out of range, or `exact` is combined with `span`.

    Example:
        >>> rule = Rule(0.5, exact=True, prefix=1)
        >>> rule
        Rule(p=0.5, exact=True, prefix=1)
        >>> from msgdrop_numba import keep_mask
        >>> keep_mask((1, 5), rule, seed=0)
        array([[ True,  True, False, False,  True]])

    Source: the mask contract, version 1.1 (CONTRACT.md).
    """

    p: Any = 0.5
    exact: bool = field(
        kw_only=True, default=False, metadata={"help": "Drop exactly floor(n p) of a row's n messages."}
    )
    span: int = field(kw_only=True, default=1, metadata={"help": "Drop runs of so many messages together."})
    min_keep: int = field(kw_only=True, default=0, metadata={"help": "Keep at least so many of a row."})
    prefix: int = field(kw_only=True, default=0, metadata={"help": "Leave the first so many of a row alone."})

    _key: tuple[Any, ...] = field(init=False)  # all fields, built once: caches of plans hash and compare rules

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", check_p(self.p))
        self._check_keywords()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> Any:
        """A pickle names the fields, so that one made before there was a field loads with its default."""
        return partial(type(self), self.p, **self.keywords), ()

    def _check_keywords(self) -> None:
        if not isinstance(self.exact, bool):
            raise TypeError(f"exact must be True or False, but got {self.exact!r}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MAX_ROW:
                object.__setattr__(self, name, _check_count(name, value, least))
        if self.exact and self.span > 1:
            raise ValueError(f"exact can't be combined with span={self.span}: exact drops single messages")
        object.__setattr__(self, "_key", (self.p, *self.keywords.values()))

    def __repr__(self) -> str:
        return of_call("Rule", {"p": self.p, **self.keywords}, {"p": None, **DEFAULTS})

    @property
    def keywords(self) -> dict[str, Any]:
        """The fields behind p, by name."""
        return {name: getattr(self, name) for name in KEYWORDS}

    @property
    def arguments(self) -> dict[str, Any]:
        """The fields that public signatures have beside p, by name."""
        return {name: getattr(self, name) for name in ARGUMENTS}

    def for_rows(self: R, size: int, start: int = 0) -> R:
        """The rule for `size` messages of a row, from `start` on: the prefix ends with them."""
        if not start and self.prefix <= size:
            return self
        return replace(self, prefix=min(max(self.prefix - start, 0), size))

    def for_array(self) -> ArrayRule:
        """A rule with these keywords, for probabilities in an array."""
        return ArrayRule(None, **self.keywords)

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers of p: one, the two of a range, none of an array."""
        return self.p if isinstance(self.p, tuple) else () if self.p is None else (self.p,)

    @property
    def threshold(self) -> int:
        """T(p) of the contract: a message drops if its draw lies below this. Of a range's lower end; 0 for an array."""
        return round(self.numbers[0] * ONE) if self.numbers else 0

    @property
    def spread(self) -> int:
        """The most that a row's own p adds to the threshold."""
        return round(self.numbers[-1] * ONE) - self.threshold if self.numbers else 0

    @property
    def ranged(self) -> bool:
        """True if each row draws its own p."""
        return isinstance(self.p, tuple)

    @property
    def drops_all(self) -> bool:
        """True if p is 1: every message that takes part drops, and no message is scaled."""
        return bool(self.p == 1)

    @property
    def is_bernoulli(self) -> bool:
        """True if messages drop independently: no keyword is set and p isn't a range. p may be an array."""
        return not self.ranged and self.keywords == DEFAULTS

    def eligible(self, index: Any) -> Any:
        """True for indices in a row whose messages may drop. `index` is a number, an array, a tensor or a symbol."""
        return index >= self.prefix

    def count_eligible(self, n: Any) -> Any:
        """The number of eligible messages among the first `n` of a row, a number or a symbol."""
        return n - self.prefix

    @property
    def spares(self) -> bool:
        """True if some messages aren't eligible, whatever the arrays of a call say."""
        return self.prefix > 0

    @property
    def needs_whole_rows(self) -> bool:
        """True if `for_rows` can't make a rule for a piece of a row, because its mask depends on the whole row."""
        return self.count_limited

    @property
    def count_limited(self) -> bool:
        """True if a row's mask counts its messages, so that the whole row must be known."""
        return bool(self.exact or self.min_keep)

    @property
    def scale(self) -> float:
        """The factor of kept messages if p is one number and not exact: 1/(1-p), and 1 if p is 1."""
        return 1 / (1 - self.p) if isinstance(self.p, float) and self.p < 1 else 1.0


Rule.__module__ = "msgdrop_numba"  # where a pickle looks for it; dataclasses need the true one while they make it

# The keywords of a rule with their defaults, each a bool or an integer.
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Rule)[1:] if f.init}
KEYWORDS = tuple(DEFAULTS)
# The keywords of public signatures. A new field of Rule adds none: only a Rule can set it.
ARGUMENTS = "exact", "span", "min_keep", "prefix"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ArrayRule(Rule):
    """The keywords of a call whose p is an array, which the request holds. p is None here."""

    def __post_init__(self) -> None:
        self._check_keywords()

    def resolve(self, split: Callable[[Any], tuple[P, Any]], p: Any) -> tuple[Rule, Any]:
        """The rule and the array of a p with dims, or the rule of a p without dims and None.

        Args:
            split: gives (number, None) or (None, array); libraries differ in which numbers they may look at.
        """
        number, array = split(p)
        return (Rule(number, **self.keywords), None) if array is None else (self.check(), array)

    def check(self) -> ArrayRule:
        """The rule itself. Raises ValueError if exact is set, which needs one p for each row."""
        if self.exact:
            raise ValueError(
                "exact needs p to be a single number or range (traced: a Python one), but got an array, a tensor or "
                "where each row has its own"
            )
        return self


def read_rule(p: Any, *keywords: Any) -> tuple[Rule, Any]:
    """The rule of a call's p and keywords, and p itself if it is an array or tensor, else None.

    Args:
        keywords: the first fields of KEYWORDS, all of ARGUMENTS at least.
    """
    if type(p) is float and not _is_compiling():
        try:  # no `suppress`, which takes half a microsecond
            return cached_rule(p, *keywords), None
        except TypeError:  # unhashable: made below, to say which
            pass
    if isinstance(p, Rule):
        check_alone(*keywords)
        return p, None
    named = dict(zip(KEYWORDS, keywords, strict=False))
    # Numbers first: Dynamo can't ask a symbolic one for attributes.
    if isinstance(p, (int, float, tuple)) or not (hasattr(p, "ndim") or hasattr(p, "__cuda_array_interface__")):
        return Rule(p, **named), None
    return ArrayRule(None, **named), p


def _is_compiling() -> bool:
    """True in code that torch compiles."""
    compiler = getattr(sys.modules.get("torch"), "compiler", None)  # not there yet in a half-done import
    return compiler is not None and compiler.is_compiling()


@lru_cache(maxsize=1024, typed=True)
def cached_rule(p: float | Rule, *keywords: Any) -> Rule:
    """A rule of checked arguments, cached. Not for traced code: Dynamo warns of lru_cache."""
    if isinstance(p, Rule):
        check_alone(*keywords)
        return p
    return Rule(p, **dict(zip(KEYWORDS, keywords, strict=False)))


def check_alone(*keywords: Any) -> None:
    """Refuse keywords of a rule beside a Rule. One at its default can't be told from one that wasn't given."""
    for name, given in zip(KEYWORDS, keywords, strict=False):
        if type(given) is not type(DEFAULTS[name]) or given != DEFAULTS[name]:
            raise ValueError(
                f"p is a Rule, which says what {name} is, but got {name}={given!r} beside it: leave it out"
            )


def check_p(p: Any) -> float | tuple[float, float]:
    """p as a float, or a range as two; refused if it is neither."""
    if type(p) is float and 0 <= p <= 1:
        return p
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


BERNOULLI = ArrayRule(None)  # independent draws, whatever p is
