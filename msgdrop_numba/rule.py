"""What decides which messages drop: validated numbers, no arrays, no numba."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

ONE = 2**32  # a threshold of 1.0: every 32-bit draw lies below it


@dataclass(frozen=True, slots=True)
class DropRule:
    """The rule of a mask: `p`, the probability that a message is dropped.

    Args:
        p: a real number in [0, 1].

    Raises:
        TypeError: `p` is no real number (a bool is none: it is most likely a misplaced `training`).
        ValueError: `p` lies outside [0, 1] or is NaN.

    Example:
        >>> DropRule(0.25).threshold == 2**30
        True
    """

    p: float

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, numbers.Real):
            raise TypeError(f"p must be a number, the probability of dropping a message, but got {self.p!r}")
        if not 0 <= self.p <= 1:
            raise ValueError(f"p must be a probability of dropping, from 0 to 1, but got {self.p!r}")
        object.__setattr__(self, "p", float(self.p))

    @property
    def threshold(self) -> int:
        """T(p) of the contract: a message drops where its draw lies below this."""
        return round(self.p * ONE)

    @property
    def scale(self) -> float:
        """What a kept message is multiplied by to keep the expectation: 1/(1-p), and 1 where all drop."""
        return 1 / (1 - self.p) if self.p < 1 else 1.0
