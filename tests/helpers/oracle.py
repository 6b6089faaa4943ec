"""A call as `message_dropout` takes it, answered by naive.py: the one way from the tests' arguments to the oracle's."""

from __future__ import annotations

import uuid
from typing import Any

import naive
import numpy as np


def dropout(
    x: Any, p: Any = 0.5, *, seed: Any, epoch: int | None = None, name: str | None = None, keys: Any = None,
    lengths: Any = None, message_dims: int | None = None, fill: Any = 0, scale: bool = False,
    dtype: str | None = None, **rule: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What comes of a call, and which messages it keeps.

    Args:
        x, p, keys, lengths, fill: arrays, lists or CPU tensors; keys may be a loader's ids.
        epoch, name: of loaders: what they fold into their seed.
        dtype: what x's elements are where NumPy has no such type: "bfloat16", in uint16.
        rule: exact, span, min_keep, prefix, protect, positions.
    """
    x, p, lengths, fill = _host(x), _host(p), _host(lengths), _host(fill)
    rule = {name: _host(value) for name, value in rule.items()}
    dims = message_dims or (2 if x.ndim > 2 else 1)
    rule = {"seed": loader_seed(seed, epoch, name), "keys": row_keys(keys), "lengths": lengths, **rule}
    keep = naive.keep_mask(x.shape[:dims], p, **rule)
    return drop(x, keep, p=p, fill=fill, scale=scale, dtype=dtype, **rule), keep


def rows(
    data: Any,
    ids: Any,
    p: Any = 0.5,
    *,
    lengths: Any = None,
    protect: Any = None,
    positions: Any = None,
    **options: Any,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`dropout` of rows that needn't be of one length, a row at a time.

    Args:
        p: a number, a range, an array for the positions of the longest, or a list of each row's own.
        lengths, protect, positions: of each row; positions may be an integer.
    """
    done = []
    for i, (row, sample_id) in enumerate(zip(data, ids, strict=True)):
        told = {"keys": [sample_id], "lengths": None if lengths is None else lengths[i : i + 1], **options}
        told["protect"] = None if protect is None else _host(protect[i])[None]
        told["positions"] = _host(positions[i])[None] if hasattr(positions, "__getitem__") else positions
        own = p[i] if isinstance(p, list) else p[: len(row)] if isinstance(p, np.ndarray) else p
        done.append(dropout(row[None], own, message_dims=2, **told))
    return [y[0] for y, _ in done], [keep[0] for _, keep in done]


def drop(
    x: np.ndarray, keep: np.ndarray, *, p: Any = 0.5, fill: Any = 0, scale: bool = False, dtype: str | None = None,
    **rule: Any,
) -> np.ndarray:  # fmt: skip
    """The same where the mask is known; bfloat16, which naive.py hasn't got, as the contract says."""
    if dtype != "bfloat16" or not scale:
        return naive.drop(x, keep, p=p, fill=fill, scale=scale, **rule)
    ones = (1,) * (x.ndim - keep.ndim)
    takes = naive.part(keep.shape, rule.pop("lengths", None), rule.pop("prefix", 0), rule.pop("protect", None))
    rule.pop("positions", None)
    s = naive.scales(keep, takes, p, **rule).reshape(*keep.shape, *ones)
    wide = (x.astype(np.uint32) << 16).view(np.float32)
    y = np.where(takes.reshape(s.shape), bfloat16(wide * s.astype(np.float32)), x)
    return np.where(keep.reshape(s.shape), y, np.asarray(fill, x.dtype))


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits nearest to float32 numbers, ties to even, worked out with exact fractions of two."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def loader_seed(seed: Any, epoch: int | None, name: str | None = None) -> int:
    """The seed of an epoch, and in it of the mask of that name."""
    seed = int(seed) % 2**64
    if epoch is not None:
        seed = naive.fold_in(seed, epoch)
    return seed if name is None else naive.fold_in(seed, naive.hash64(name))


def row_keys(keys: Any) -> Any:
    """Keys as integers, ids as the integers that they stand for."""
    if keys is None:
        return None
    return np.frompyfunc(_key, 1, 1)(np.asarray(_host(keys), dtype=object))


def _key(sample_id: Any) -> int:
    if isinstance(sample_id, uuid.UUID):
        sample_id = sample_id.bytes
    return naive.hash64(sample_id) if isinstance(sample_id, (str, bytes)) else int(sample_id)


def _host(values: Any) -> Any:
    """A tensor as an array; everything else as it is."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else values
