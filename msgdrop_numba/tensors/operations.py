"""The mask contract in plain torch operations, for whatever follows operations: tracing, export, vmap, AD, any device.

Philox needs 32 x 32 -> 64 bit products in a signed int64. `c * (K - 2**32)` can't overflow where `c * K` does, which
C++ leaves undefined and Inductor then compiles wrongly; the product's high word is that of `c * K` less c.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.rule import DropRule

_M32 = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_FOLD_STREAM = 0xFFFFFFFF


def philox4x32_10(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Four 32-bit words, int64 in [0, 2**32), for a counter and a key of such words."""
    for _ in range(10):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        high_0, high_1 = (product_0 >> 32) + c0, (product_1 >> 32) + c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, product_1 & _M32, high_0 ^ c3 ^ k1, product_0 & _M32
        k0, k1 = (k0 + _WEYL_0) & _M32, (k1 + _WEYL_1) & _M32
    return c0, c1, c2, c3


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    return value & _M32, (value >> 32) & _M32


def fold_in(seed: Tensor, data: Tensor) -> Tensor:
    """A new int64 seed from int64 seed and data."""
    (c2, c3), (k0, k1) = _halves(data), _halves(seed)
    w0, w1, _, _ = philox4x32_10(torch.zeros_like(data), _FOLD_STREAM, c2, c3, k0, k1)
    folded: Tensor = w0 | (w1 << 32)
    return folded


def draws(seed: Tensor, keys: Tensor, count: int, stream: int) -> Tensor:
    """The draws of positions 0..count - 1, `(*keys.shape, count)`."""
    # The mask tells Inductor that these are 64-bit values, not indices that it may keep in 32 bits.
    counters = torch.arange((count + 3) // 4, device=keys.device) & _M32
    (c2, c3), (k0, k1) = _halves(keys), _halves(seed)
    words = philox4x32_10(counters, stream, c2.unsqueeze(-1), c3.unsqueeze(-1), k0, k1)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :count]


def row_keys(keys: Tensor | None, rows: tuple[int, ...], device: torch.device) -> Tensor:
    """One int64 key a row, `rows`; `keys` may lack trailing dims."""
    if keys is None:
        return torch.arange(math.prod(rows), device=device).reshape(rows)
    missing = rows[keys.ndim :]
    if not missing:
        return keys
    index = torch.arange(math.prod(missing), device=device).reshape(missing)
    return fold_in(keys.reshape(*keys.shape, *(1,) * len(missing)), index)


def _fewer(keys: Tensor, count: Tensor) -> Tensor:
    """Whether a position is among the `count` of its row with the smallest (key, position)."""
    order = torch.argsort(keys, dim=-1, stable=True)
    among = torch.arange(keys.shape[-1], device=keys.device) < count.unsqueeze(-1)
    return torch.zeros_like(among).scatter(-1, order, among)


def _exactly(valid: Tensor, rule: DropRule) -> Tensor:
    """How many of `valid` messages the exact rule drops, in two steps since the product may not fit into 64 bits."""
    share = 2 * rule.threshold + 1
    high, low = share // 2**17, share % 2**17  # what Inductor follows in symbolic integers
    wanted = (valid * high + ((valid * low) >> 17)) >> 16
    return torch.minimum(wanted, (valid - rule.min_keep).clamp(min=0))


def thresholds(p: Tensor) -> Tensor:
    """T(p) of the contract, int64, for each element of a float64 p."""
    return (p * 2.0**32).round().to(torch.int64)


def scales(p: Tensor) -> Tensor:
    """1/(1-p) for each element of a float64 p, and 1 where p is 1."""
    return 1 / torch.where(p < 1, 1 - p, 1)


def keep_mask(
    shape: tuple[int, ...], rule: DropRule, seed: Tensor, keys: Tensor | None, lengths: Tensor | None,
    thresholds: Tensor | None,
) -> Tensor:  # fmt: skip
    """The keep mask over the message dims `shape`, on the seed's device.

    Args:
        rule: its p is None where the tensor `thresholds`, broadcastable to `shape`, takes its place.
        seed: 0-d int64; keys: int64, one a row or lacking trailing dims; lengths: integers, one a row.
    """
    *rows, size = shape
    keys = row_keys(keys, tuple(rows), seed.device)
    position = torch.arange(size, device=seed.device)
    valid = torch.full(tuple(rows), size, device=seed.device) if lengths is None else lengths
    inside = position < valid.unsqueeze(-1)
    if rule.exact:
        drawn = torch.where(inside, draws(seed, keys, size, 0), 2**33)
        return ~(_fewer(drawn, _exactly(valid, rule)) & inside)
    threshold: Any = rule.threshold if thresholds is None else thresholds
    if rule.span > 1:
        first = draws(seed, keys, 1, 1)
        # In two steps since the product may not fit into 64 bits.
        phase = (first * (rule.span // 2**17) + ((first * (rule.span % 2**17)) >> 17)) >> 15
        # No more groups than positions: their exact number would bind the sizes of an exported program.
        drawn = draws(seed, keys, size, 0).gather(-1, (position + phase) // rule.span)
    else:
        drawn = draws(seed, keys, size, 0)
    dropped = (drawn < threshold) & inside
    if rule.min_keep:
        drawn = torch.where(dropped, draws(seed, keys, size, 2), 2**33)
        dropped = dropped & _fewer(drawn, (valid - rule.min_keep).clamp(min=0))
    return torch.logical_not(dropped)


def row_scales(
    shape: tuple[int, ...], rule: DropRule, lengths: Tensor | None, scales: Tensor | None, device: torch.device
) -> tuple[Any, Tensor | None]:
    """What each message is multiplied by (a number, or float64), and where, not in padding; None: everywhere.

    `scales` are those of a p that is an array.
    """
    valid = None if lengths is None else torch.arange(shape[-1], device=device) < lengths.unsqueeze(-1)
    if scales is not None:
        return scales, valid
    if rule.exact and lengths is not None and rule.p != 1:
        rest = lengths - _exactly(lengths, rule)
        return (lengths.to(torch.float64) / rest.clamp(min=1)).unsqueeze(-1), valid
    return rule.row_scale(shape[-1]), valid


def select(x: Tensor, keep: Tensor, fill: Any, scale: Any = None, valid: Tensor | None = None) -> Tensor:
    """`where(keep, x * scale, fill)`, padding unscaled; fill None is 0, scale a number or over the message dims."""
    features = (1,) * (x.ndim - keep.ndim)
    y = x
    if scale is not None:
        if isinstance(scale, Tensor):
            scale = scale.reshape(*scale.shape, *features)
        y = _multiply(x, scale)
        if valid is not None:
            y = torch.where(valid.reshape(*valid.shape, *features), y, x)
    if fill is None:
        fill = torch.zeros((), dtype=x.dtype, device=x.device)
    keep = keep.reshape(*keep.shape, *features)
    if x.dtype in _SIGNED:
        return torch.where(keep, y.view(_SIGNED[x.dtype]), fill.view(_SIGNED[x.dtype])).view(x.dtype)
    return torch.where(keep, y, fill)


# Words of the same bits, for `torch.where` before torch 2.13, which knows none of these on the CPU.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _multiply(x: Tensor, scale: Any) -> Tensor:
    """x * scale, the scale rounded once to the accumulator, the product once to x's dtype; complex as two reals."""
    if x.is_complex():
        if isinstance(scale, Tensor):
            scale = scale.unsqueeze(-1)
        return torch.view_as_complex(_multiply(torch.view_as_real(x.resolve_conj()), scale))
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(scale, Tensor):
        scale = scale.to(accumulator)
    product: Tensor = x.to(accumulator) * scale
    return product.to(x.dtype)
