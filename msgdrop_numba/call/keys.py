"""Sample ids to the 64-bit keys of the mask contract."""

from __future__ import annotations

import hashlib
import numbers
from typing import Any
from uuid import UUID

import numpy as np

from msgdrop_numba.call.arguments import check_key
from msgdrop_numba.kernels.rules import fold_rows


def sample_key(sample_id: Any) -> int:
    """The 64-bit key of a sample's id: an integer as it is, anything else hashed with BLAKE2b.

    Args:
        sample_id: an integer in [-2**63, 2**64) (a negative one stands for its two's complement), a string (its
            UTF-8 bytes), bytes, or a UUID (its 16 bytes).

    Returns:
        An integer in [0, 2**64).

    Raises:
        TypeError, ValueError: the id is of another type, a float or a bool say, or out of range.

    Example:
        >>> sample_key(-1) == 2**64 - 1
        True
        >>> sample_key("clip-0001")
        4734007382124388018

    Source: the mask contract, version 1 (CONTRACT.md); BLAKE2b is RFC 7693.
    """
    if type(sample_id) is int and 0 <= sample_id < 2**64:  # the usual one, asked first
        return sample_id
    if isinstance(sample_id, numbers.Integral):
        return check_key("a sample's key", sample_id)
    if isinstance(sample_id, str):
        return hash64(sample_id.encode())
    if isinstance(sample_id, UUID):
        return hash64(sample_id.bytes)
    if isinstance(sample_id, bytes):
        return hash64(sample_id)
    raise TypeError(f"a sample's key must be an integer, string, bytes or UUID, but got {sample_id!r}")


def sample_keys(ids: np.ndarray) -> np.ndarray:
    """The 64-bit keys of an array of ids: one of integers as it is."""
    if ids.dtype.kind in "iu":
        return ids
    if ids.dtype.kind not in "OUST":
        raise TypeError(f"sample ids must be integers or strings, but got {ids.dtype}")
    return np.array([sample_key(sample_id) for sample_id in ids.tolist()], np.uint64)


def numbered_keys(key: int, first: int, count: int) -> np.ndarray:
    """The keys of rows `first` and on that share a key, into which each folds its number (CONTRACT.md, 4)."""
    folded = np.empty(count, np.uint64)
    fold_rows(np.array([key], np.uint64), first + count, first, folded)
    return folded


def hash64(data: bytes) -> int:
    """The contract's hash of bytes: BLAKE2b of 8 bytes, little endian."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
