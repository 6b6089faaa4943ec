"""The mask contract in plain torch operations, for whatever follows operations: tracing, export, vmap, AD, any device.

Philox needs 32 x 32 -> 64 bit products in a signed int64. `c * (K - 2**32)` can't overflow where `c * K` does, which
C++ leaves undefined and Inductor then compiles wrongly; the product's high word is that of `c * K` less c.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msgdrop_numba.call.rule import Rule

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


def draws(seed: Tensor, keys: Tensor, first: int, count: int, stream: int) -> Tensor:
    """The draws of `count` positions from `first` on, `(*keys.shape, count)`."""
    skip = first % 4
    # The mask tells Inductor that these are 64-bit values, not indices that it may keep in 32 bits.
    counters = ((torch.arange((skip + count + 3) // 4, device=keys.device) & _M32) + first // 4) & _M32
    words = _words(seed, keys, counters, stream)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., skip : skip + count]


def draws_of(seed: Tensor, keys: Tensor, positions: Tensor, stream: int) -> Tensor:
    """The draws of positions that needn't be consecutive, over the rows of `keys` or the same for all."""
    w0, w1, w2, w3 = _words(seed, keys, (positions >> 2) & _M32, stream)
    word = positions & 3
    return torch.where(word < 2, torch.where(word == 0, w0, w1), torch.where(word == 2, w2, w3))


def _words(seed: Tensor, keys: Tensor, counters: Tensor, stream: int) -> tuple[Any, Any, Any, Any]:
    (c2, c3), (k0, k1) = _halves(keys), _halves(seed)
    return philox4x32_10(counters, stream, c2.unsqueeze(-1), c3.unsqueeze(-1), k0, k1)


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
    """True for the `count` positions of each row with the smallest (key, position)."""
    order = torch.argsort(keys, dim=-1, stable=True)
    among = torch.arange(keys.shape[-1], device=keys.device) < count.unsqueeze(-1)
    return torch.zeros_like(among).scatter(-1, order, among)


def _multiply_shift(a: Tensor, b: Any, shift: int) -> Tensor:
    """(a * b) >> shift for a < 2**34, b < 2**34, 17 <= shift: the product may not fit into 64 bits."""
    high, low = b // 2**17, b % 2**17  # what Inductor follows in symbolic integers
    product: Tensor = a * high + ((a * low) >> 17)
    return product >> (shift - 17)


def _exactly(eligible: Tensor, rule: Rule, threshold: Any) -> Tensor:
    """The number of `eligible` messages that the exact rule drops."""
    wanted = _multiply_shift(eligible, 2 * threshold + 1, 33)
    return torch.minimum(wanted, (eligible - rule.min_keep).clamp(min=0))


def thresholds(p: Tensor) -> Tensor:
    """T(p) of the contract, int64, for each element of a float64 p."""
    return (p * 2.0**32).round().to(torch.int64)


def scales(p: Tensor) -> Tensor:
    """1/(1-p) for each element of a float64 p, and 1 where p is 1."""
    return 1 / torch.where(p < 1, 1 - p, 1)


class RowArgs(NamedTuple):
    """The arrays of a call on one device, for torch's operations, as `plan.MaskArgs` is for the kernels.

    Fields:
        lengths: integers, one a row. keys: int64, one a row or lacking trailing dims.
        protect: bool, over the message dims or the last one. offset: the position of a row's first message.
        positions: int64 as `protect`, where they aren't consecutive.
    """

    lengths: Tensor | None = None
    keys: Tensor | None = None
    protect: Tensor | None = None
    offset: int = 0
    positions: Tensor | None = None


def keep_mask(shape: tuple[int, ...], rule: Rule, seed: Tensor, arrays: RowArgs, thresholds: Tensor | None) -> Tensor:
    """The keep mask over the message dims `shape`, on the seed's device.

    Args:
        rule: its p is None where the tensor `thresholds`, broadcastable to `shape`, takes its place.
        seed: 0-d int64.
    """
    *rows, size = shape
    keys = row_keys(arrays.keys, tuple(rows), seed.device)
    may_drop = eligible(shape, rule, arrays, seed.device)
    count: Any = may_drop.sum(-1).broadcast_to(rows) if rule.count_limited else None
    threshold = _row_threshold(rule, seed, keys) if thresholds is None else thresholds
    if rule.exact:
        drawn = torch.where(may_drop, _drawn(seed, keys, arrays, size, 0), 2**33)
        wanted = _exactly(count, rule, threshold.squeeze(-1) if rule.ranged else threshold)
        return ~(_fewer(drawn, wanted) & may_drop)
    dropped = (_drawn(seed, keys, arrays, size, 0, rule.span) < threshold) & may_drop
    if rule.min_keep:
        drawn = torch.where(dropped, _drawn(seed, keys, arrays, size, 2), 2**33)
        dropped = dropped & _fewer(drawn, (count - rule.min_keep).clamp(min=0))
    return torch.logical_not(dropped)


def eligible(shape: tuple[int, ...], rule: Rule, arrays: RowArgs, device: torch.device) -> Tensor:
    """The mask of eligible messages, neither padding nor protected; broadcastable to `shape`."""
    position = torch.arange(shape[-1], device=device)
    may_drop: Tensor = rule.eligible(position)
    if arrays.lengths is not None:
        may_drop = may_drop & (position < arrays.lengths.unsqueeze(-1))
    return may_drop if arrays.protect is None else may_drop & ~arrays.protect


def _row_threshold(rule: Rule, seed: Tensor, keys: Tensor) -> Any:
    """T(p): a number, or one a row where p is a range."""
    if not rule.ranged:
        return rule.threshold
    return rule.threshold + _multiply_shift(draws(seed, keys, 0, 1, 3), rule.spread, 32)


def _drawn(seed: Tensor, keys: Tensor, arrays: RowArgs, size: int, stream: int, span: int = 1) -> Tensor:
    """The draws of a row's messages, `span` neighbouring positions sharing one."""
    positions: Any = arrays.positions
    if span == 1:
        return (
            draws(seed, keys, arrays.offset, size, stream)
            if positions is None
            else draws_of(seed, keys, positions, stream)
        )
    phase = _multiply_shift(draws(seed, keys, 0, 1, 1), span, 32)
    if positions is not None:
        return draws_of(seed, keys, (positions + phase) // span, stream)
    start = arrays.offset // span
    index = (torch.arange(size, device=keys.device) + arrays.offset % span + phase) // span
    # No more groups than positions, and one: their exact number would bind the sizes of an exported program.
    return draws(seed, keys, start, size + (1 if arrays.offset % span else 0), stream).gather(-1, index)


def row_scales(
    shape: tuple[int, ...], rule: Rule, seed: Tensor, arrays: RowArgs, scales: Tensor | None
) -> tuple[Any, Tensor | None]:
    """The factors (a number, or float64), and the mask of eligible messages, which alone are scaled; None: all.

    `scales` are those of a p that is an array.
    """
    may_drop = None
    if rule.spares or arrays.lengths is not None or arrays.protect is not None:
        may_drop = eligible(shape, rule, arrays, seed.device)
    if scales is not None:
        return scales, may_drop
    if rule.drops_all or not (rule.exact or rule.ranged):
        return rule.scale, may_drop
    threshold = _row_threshold(rule, seed, row_keys(arrays.keys, tuple(shape[:-1]), seed.device))
    if rule.exact:
        n: Any = torch.full((1,), shape[-1], device=seed.device) if may_drop is None else may_drop.sum(-1, keepdim=True)
        scale = n.to(torch.float64) / (n - _exactly(n, rule, threshold)).clamp(min=1)
    else:
        scale = 1 / (1 - threshold.to(torch.float64) / 2**32)
    return (torch.where(threshold < 2**32, scale, 1.0) if rule.ranged else scale), may_drop


def where(x: Tensor, keep: Tensor, fill: Any, scale: Any = None, eligible: Tensor | None = None) -> Tensor:
    """`where(keep, x * scale, fill)`, unscaled where not `eligible`; fill None: 0, scale a number or one a message."""
    features = (1,) * (x.ndim - keep.ndim)
    y = x
    if scale is not None:
        if isinstance(scale, Tensor):
            scale = scale.reshape(*scale.shape, *features)
        y = multiply(x, scale)
        if eligible is not None:
            y = torch.where(eligible.reshape(*eligible.shape, *features), y, x)
    if fill is None:
        fill = torch.zeros((), dtype=x.dtype, device=x.device)
    keep = keep.reshape(*keep.shape, *features)
    if x.dtype in _SIGNED:
        return torch.where(keep, y.view(_SIGNED[x.dtype]), fill.view(_SIGNED[x.dtype])).view(x.dtype)
    return torch.where(keep, y, fill)


# Words of the same bits, for `torch.where` before torch 2.13, which knows none of these on the CPU.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def scaled(x: Tensor, scales: Tensor) -> Tensor:
    """Messages, each times its own of the scales, float64; where one is 0, as they are."""
    each = scales.reshape(*scales.shape, *(1,) * (x.ndim - scales.ndim))
    return torch.where(each != 0, multiply(x, each), x)


def multiply(x: Tensor, scale: Any) -> Tensor:
    """x * scale, the scale rounded once to the accumulator, the product once to x's dtype; complex as two reals."""
    if x.is_complex():
        if isinstance(scale, Tensor):
            scale = scale.unsqueeze(-1)
        return torch.view_as_complex(multiply(torch.view_as_real(x.resolve_conj()), scale))
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(scale, Tensor):
        scale = scale.to(accumulator)
    product: Tensor = x.to(accumulator) * scale
    return product.to(x.dtype)
