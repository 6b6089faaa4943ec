"""`msgdrop show`: the masks of rows, epoch for epoch, in letters and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msgdrop_numba import Rule, fold_in, keep_mask


class Masks(NamedTuple):
    """The rows and masks that are shown.

    Fields:
        names: of the rows.
        keep: bool, (epochs, rows, messages): keep masks.
        valid: bool, (rows, messages): False in padding.
        epochs: whether they are those of epochs, of a collate or a batch.
    """

    names: list[str]
    keep: np.ndarray
    valid: np.ndarray
    epochs: bool


def draw(
    shape: tuple[int, ...], rule: Rule, seed: int, epochs: int | None, ids: tuple[Any, ...] | None,
    lengths: tuple[int, ...] | None, positions: int | None,
) -> Masks:  # fmt: skip
    """The masks of a call, or with `epochs` of a collate or batch in so many of them."""
    rows, size = shape
    seeds = [seed] if epochs is None else [fold_in(seed, epoch) for epoch in range(epochs)]
    keep = [keep_mask(shape, rule, seed=each, keys=ids, lengths=lengths, positions=positions) for each in seeds]
    valid = np.arange(size) < np.array(lengths or [size] * rows)[:, None]
    return Masks([str(i) for i in (ids or range(rows))], np.stack(keep), valid, epochs is not None)


def lines(masks: Masks, letters: tuple[str, str]) -> Iterator[str]:
    """A line for each row, and what they come to.

    Args:
        letters: of what is kept, and of what is dropped; padding is a blank.
    """
    names, keep, valid, epochs = masks
    width = max(map(len, names))
    for epoch, mask in enumerate(keep):
        if epochs:
            yield f"epoch {epoch}"
        for name, row, real in zip(names, mask, valid, strict=True):
            text = "".join(letters[not kept] if is_message else " " for kept, is_message in zip(row, real, strict=True))
            yield f"{name:>{width}} {text}".rstrip()
    every = np.broadcast_to(valid, keep.shape)
    yield f"kept {keep[every].mean() if every.any() else 1:.1%} of {every.sum()} messages"
    if not valid.all():
        yield f"dropped {(~keep[~every]).sum()} of {(~every).sum()} places of padding"
    if len(keep) > 1:
        changing = sum(len({mask.tobytes() for mask in keep[:, row]}) == len(keep) for row in range(len(names)))
        yield f"{changing} of {len(names)} rows have another mask in each epoch"


def picture(masks: Masks, path: Path) -> None:
    """Draw the masks as a PNG, one epoch above the other."""
    from matplotlib.figure import Figure

    names, keep, valid, epochs = masks
    rows, size = valid.shape
    height = max(1.5, 8 * rows / max(1, size) + 1)
    figure = Figure(figsize=(8, min(height * len(keep), 60)), layout="constrained")
    every = figure.subplots(len(keep), squeeze=False, sharex=True)[:, 0]
    for epoch, axes in enumerate(every):
        shades = np.where(valid, ~keep[epoch], 0.3)
        extent = (-0.5, max(1, size) - 0.5, rows - 0.5, -0.5)  # of no messages, one empty column
        axes.imshow(shades, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
        axes.set_ylabel(f"key, epoch {epoch}" if epochs else "key")
        if rows <= 32:
            axes.set_yticks(range(rows), names)
    padding = "" if valid.all() else ", grey: padding"
    every[-1].set_xlabel(f"message (white: kept, black: dropped{padding})")
    figure.savefig(path, dpi=150)
