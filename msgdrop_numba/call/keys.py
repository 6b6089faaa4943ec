"""Rows' names to the 64-bit keys of the mask contract: integers, ids that are hashed, keys that lack dims."""

from __future__ import annotations

import hashlib
import math
import numbers
from typing import Any
from uuid import UUID

import numpy as np

from msgdrop_numba.call.arguments import address, check_key, check_keys_shape, integers
from msgdrop_numba.kernels.rules import fold_rows


def row_key(row_id: Any) -> int:
    """The 64-bit key of an id, a sample's say: an integer as it is, anything else hashed with BLAKE2b.

    Args:
        row_id: an integer in [-2**63, 2**64) (a negative one stands for its two's complement), a string (its
            UTF-8 bytes), bytes, or a UUID (its 16 bytes).

    Returns:
        An integer in [0, 2**64).

    Raises:
        TypeError, ValueError: the id is of another type, a float or a bool say, or out of range.

    Example:
        >>> row_key(-1) == 2**64 - 1
        True
        >>> row_key("clip-0001")
        4734007382124388018

    Source: the mask contract, version 1 (CONTRACT.md); BLAKE2b is RFC 7693.
    """
    if type(row_id) is int and 0 <= row_id < 2**64:  # the usual one, asked first
        return row_id
    return _read("a sample's key", row_id, "an integer, string, bytes or UUID")


def _read(name: str, row_id: Any, kinds: str = "integers, strings, bytes or UUIDs") -> int:
    if isinstance(row_id, numbers.Integral):
        return check_key(name, row_id)
    if isinstance(row_id, str):
        return hash64(row_id.encode())
    if isinstance(row_id, UUID):
        return hash64(row_id.bytes)
    if isinstance(row_id, bytes):
        return hash64(row_id)
    raise TypeError(f"{name} must be {kinds}, but got {row_id!r}")


def row_keys(keys: Any, row_shape: tuple[int, ...]) -> np.ndarray | None:
    """One uint64 key a row (C order), or None for the default, the row's index.

    Args:
        keys: integers or ids of the shape `row_shape` or a leading part of it; with dims missing, a row's key is
            `fold_in(key, C-order index in the missing dims)` (CONTRACT.md, 4).
        row_shape: the message dims without the last.
    """
    if keys is None:
        return None
    array = integers("keys", keys, _read)
    check_keys_shape(array.shape, row_shape)
    flat = np.ascontiguousarray(array, dtype=np.uint64 if array.dtype.kind == "u" else np.int64).ravel()
    flat = flat.view(np.uint64)
    if array.ndim == len(row_shape):
        return flat.copy()  # the user's own memory may be what is written
    folded = np.empty(math.prod(row_shape), np.uint64)
    if folded.size:
        fold_rows(address(flat), folded.size // flat.size, 0, folded.size, address(folded))
    return folded


def sample_keys(ids: np.ndarray) -> np.ndarray:
    """The 64-bit keys of an array of ids: one of integers as it is."""
    if ids.dtype.kind in "iu":
        return ids
    if ids.dtype.kind not in "OUST":
        raise TypeError(f"sample ids must be integers or strings, but got {ids.dtype}")
    return np.array([row_key(row_id) for row_id in ids.tolist()], np.uint64)


def numbered_keys(key: int, first: int, count: int) -> np.ndarray:
    """The keys of rows `first` and on that share a key, into which each folds its number (CONTRACT.md, 4)."""
    folded = np.empty(count, np.uint64)
    keys = np.array([key], np.uint64)
    if count:
        fold_rows(address(keys), first + count, first, first + count, address(folded))
    return folded


def hash64(data: bytes) -> int:
    """The contract's hash of bytes: BLAKE2b of 8 bytes, little endian."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
