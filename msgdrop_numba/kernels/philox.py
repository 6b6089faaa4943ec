"""Philox4x32-10 and what the mask contract derives from it: scalar functions, one source for every kernel.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
All values are uint64 that hold 32-bit words, so that products never overflow, compiled or not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from msgdrop_numba.kernels._jit import inlined_jit, inner_jit, jit

U64 = Any  # np.uint64, compiled or not

_M32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_FOLD_STREAM = np.uint64(0xFFFFFFFF)
_0, _1, _2 = np.uint64(0), np.uint64(1), np.uint64(2)


@inlined_jit
def philox4x32_10(c0: U64, c1: U64, c2: U64, c3: U64, k0: U64, k1: U64) -> tuple[U64, U64, U64, U64]:
    """Four 32-bit words for a 128-bit counter (c0..c3) and a 64-bit key (k0, k1)."""
    for _ in range(10):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> _32) ^ c1 ^ k0,
            product_1 & _M32,
            (product_0 >> _32) ^ c3 ^ k1,
            product_0 & _M32,
        )
        k0 = (k0 + _WEYL_0) & _M32
        k1 = (k1 + _WEYL_1) & _M32
    return c0, c1, c2, c3


@jit
def fold_in(seed: U64, data: U64) -> U64:
    """A new uint64 seed from a uint64 seed and uint64 data (CONTRACT.md, 2)."""
    w0, w1, _, _ = philox4x32_10(_0, _FOLD_STREAM, data & _M32, data >> _32, seed & _M32, seed >> _32)
    return w0 | (w1 << _32)


@inner_jit
def draw_block(seed: U64, key: U64, stream: U64, counter: U64, words: np.ndarray[Any, Any]) -> None:
    """Fill `words` (uint32, its length a multiple of 4) with the draws of the counters from `counter` on."""
    k0, k1 = seed & _M32, seed >> _32
    c2, c3 = key & _M32, key >> _32
    for j in range(words.size // 4):  # a plain loop over counters: this is what vectorises
        w0, w1, w2, w3 = philox4x32_10(counter + np.uint64(j), stream, c2, c3, k0, k1)
        words[4 * j] = w0
        words[4 * j + 1] = w1
        words[4 * j + 2] = w2
        words[4 * j + 3] = w3


@jit
def draw_each(seed: U64, key: U64, stream: U64, positions: np.ndarray[Any, Any], words: np.ndarray[Any, Any]) -> None:
    """Fill `words` (uint32) with the draws of as many positions (int64), in any order: a Philox for each."""
    k0, k1 = seed & _M32, seed >> _32
    c2, c3 = key & _M32, key >> _32
    for j in range(words.size):
        position = np.uint64(positions[j])
        w0, w1, w2, w3 = philox4x32_10(position >> _2, stream, c2, c3, k0, k1)
        low, high = _0 - (position & _1), _0 - ((position >> _1) & _1)  # all bits or none: no branch on the word
        even, odd = w0 ^ ((w0 ^ w2) & high), w1 ^ ((w1 ^ w3) & high)
        words[j] = even ^ ((even ^ odd) & low)
