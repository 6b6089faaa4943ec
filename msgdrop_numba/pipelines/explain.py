"""Why a sample's messages drop: what its mask is drawn from, and what each message's draw was held against."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba.call.arguments import split_positions
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import ONE, Rule
from msgdrop_numba.functional import keep_mask
from msgdrop_numba.kernels.philox import draw_each
from msgdrop_numba.kernels.rules import STREAM_DRAW, STREAM_PHASE, STREAM_RANGE

_SHOWN = 12  # runs of messages that are printed


class Explanation(NamedTuple):
    """Why some of a sample's messages drop.

    Fields:
        key, row_key: the sample's id, and the 64-bit key that it stands for.
        seed, epoch: as they were given.
        drawn_from: the seed of the draws, into which the epoch, and the mask's name, are folded.
        keep: bool, one a message: the keep mask.
        draws: float64, each message's draw as a fraction of 2**32.
        p: what the draws are held against, a number or an array of one a message.
        takes_part: bool, one a message: neither protected nor padding.
        saved: bool, one a message: the rule drops it, but for `min_keep`.
        rule: the rule in words.
    """

    key: Any
    row_key: int
    seed: int
    epoch: int
    drawn_from: int
    keep: np.ndarray
    draws: np.ndarray
    p: Any
    takes_part: np.ndarray
    saved: np.ndarray
    rule: str

    def __repr__(self) -> str:
        lines = [
            f"sample {self.key!r}, row key {self.row_key}; seed {self.seed}, epoch {self.epoch}: draws from "
            f"{self.drawn_from}",
            f"{int((~self.keep).sum())} of {len(self.keep)} messages drop: {_runs(~self.keep)}",
            f"because {self.rule}",
        ]
        lines += [f"saved by min_keep: {_runs(self.saved)}"] if self.saved.any() else []
        lines += [f"protected or padding: {_runs(~self.takes_part)}"] if not self.takes_part.all() else []
        return "\n".join(lines)


def explained(key: Any, given: tuple[int, int], request: Request, size: int) -> Explanation:
    """Why messages of one row of `size` messages drop.

    Args:
        key: the sample's id.
        given: seed and epoch.
        request: of this row alone, its seed that of the draws.
    """
    rule = request.rule
    arrays = {name: getattr(request, name) for name in ("lengths", "keys", "protect", "positions")}

    def mask(rule: Rule) -> np.ndarray:
        p, keywords = (rule, {}) if request.p is None else (request.p, rule.arguments)
        found: np.ndarray = keep_mask((1, size), p, seed=request.seed, **keywords, **arrays)[0]
        return found

    keep, takes_part = mask(rule), rule.eligible(np.arange(size))
    if request.lengths is not None:
        takes_part &= np.arange(size) < request.lengths[0]
    if request.protect is not None:
        takes_part &= ~np.broadcast_to(request.protect, (1, size))[0]
    saved = keep & ~mask(replace(rule, min_keep=0)) if rule.min_keep and not rule.exact else np.zeros(size, bool)
    row_key = int(np.asarray(request.keys).astype(np.uint64)[0])
    held_against, draws = _drawn(rule, request, row_key, size)
    words = _words(rule, held_against, int((~keep).sum()), int(takes_part.sum()))
    return Explanation(key, row_key, *given, request.seed, keep, draws, held_against, takes_part, saved, words)


def _drawn(rule: Rule, request: Request, row_key: int, size: int) -> tuple[Any, np.ndarray]:
    """The thresholds of the draws as probabilities, and the draws (CONTRACT.md, 3)."""

    def draw(stream: Any, positions: np.ndarray) -> np.ndarray:
        words = np.empty(len(positions), np.uint32)
        draw_each(np.uint64(request.seed), np.uint64(row_key), stream, positions, words)
        return words

    first = np.zeros(1, np.int64)
    p = request.given_p
    if isinstance(p, np.ndarray):
        p = float(p[0, 0]) if p.shape == (1, 1) else np.broadcast_to(p, (1, size))[0]
    if rule.ranged:
        p = (rule.threshold + (rule.spread * int(draw(STREAM_RANGE, first)[0]) >> 32)) / ONE
    offset, each = split_positions(request.positions, size)
    positions = np.arange(size) + offset if each is None else np.broadcast_to(each, (1, size))[0].astype(np.int64)
    if rule.span > 1:
        positions = (positions + (rule.span * int(draw(STREAM_PHASE, first)[0]) >> 32)) // rule.span
    return p, draw(STREAM_DRAW, positions) / ONE


def _words(rule: Rule, p: Any, dropped: int, n: int) -> str:
    """A rule in words."""
    if rule.exact:
        return f"the {dropped} smallest of {n} draws drop (exact, p = {p:g})"
    own = "its own p" if isinstance(p, np.ndarray) else f"p = {p:g}"
    own += f", which the row drew from {rule.p}" if rule.ranged else ""
    runs = f"; runs of {rule.span} neighbours share a draw" if rule.span > 1 else ""
    least = f"; at least {rule.min_keep} stay" if rule.min_keep else ""
    return f"a message drops where its draw lies below {own}{runs}{least}"


def _runs(flags: np.ndarray) -> str:
    """The indices of set flags: 0, 3-7, 9."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    pairs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    shown = [str(start) if end == start + 1 else f"{start}-{end - 1}" for start, end in pairs[:_SHOWN]]
    return ", ".join([*shown, *(["..."] if len(pairs) > _SHOWN else [])]) or "none"
