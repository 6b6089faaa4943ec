"""message_dropout where no kernel may run: under tracing and transforms, on other devices, for tensor subclasses.

Values inside tensors are clamped here, not checked: to look at them would synchronise, or break a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba import arguments
from msgdrop_numba.kernels import tensor
from msgdrop_numba.rule import DropRule
from msgdrop_numba.tensors import check_target, fill_message, scaled_kind


def message_dropout(
    x: Tensor, p: Any, training: bool, inplace: bool, scale: bool, exact: bool, span: int, min_keep: int,
    lengths: Any, fill: Any, message_dims: int | None, seed: Any, keys: Any, generator: Any, out: Any,
    return_mask: bool,
) -> Any:  # fmt: skip
    """`functional.message_dropout` in torch operations."""
    shape = tuple(x.shape[: arguments.message_dims(x.shape, message_dims)])
    number, array = _probabilities(p, shape, x.device)
    rule = DropRule(number, exact, span, min_keep)
    if scale:
        scaled_kind(x.dtype)
    message = fill_message(fill, x, len(shape))
    target = check_target(x, inplace, out)
    row_keys, row_lengths = _keys(keys, shape[:-1], x.device), _lengths(lengths, shape, x.device)
    seed = _seed(seed, generator, x.device, draw=training and number != 0)
    if seed is None:
        y, keep = x, torch.ones(shape, dtype=torch.bool, device=x.device) if return_mask else None
    else:
        keep = tensor.keep_mask(shape, rule, seed, row_keys, row_lengths, array)
        factor, valid = tensor.factors(shape, rule, row_lengths, array, x.device) if scale else (None, None)
        y = tensor.select(x, keep, message, factor, valid)
    if target is not None and target is not y:
        y = target.copy_(y)
    return (y, keep) if return_mask else y


def _probabilities(p: Any, shape: tuple[int, ...], device: torch.device) -> tuple[float | None, Tensor | None]:
    """p as a number or as a float64 tensor."""
    if not isinstance(p, Tensor):
        number, array = arguments.split_p(p)
        if array is None:
            return number, None
        return None, torch.from_numpy(arguments.probabilities(array, shape)).to(device)
    if p.dtype == torch.bool or p.is_complex():
        raise TypeError(f"p must hold floating-point numbers, but got dtype {p.dtype}")
    if p.ndim and p.shape not in (shape[-1:], shape):
        raise ValueError(f"p must be a number or have shape {shape[-1:]} or {shape}, but got {tuple(p.shape)}")
    return None, p.detach().to(device, torch.float64).nan_to_num(nan=0.0).clamp(0, 1)


def _seed(seed: Any, generator: Any, device: torch.device, draw: bool) -> Tensor | None:
    """The seed as a 0-d int64 tensor on the device, drawn as torch draws where there is none; None if not needed."""
    if isinstance(seed, Tensor):
        arguments.check_seed_tensor(seed)
        arguments.check_source(0, generator, torch.Generator)
        return seed.to(device) if draw else None
    seed = arguments.check_source(seed, generator, torch.Generator)
    if not draw:
        return None
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def _keys(keys: Any, rows: tuple[int, ...], device: torch.device) -> Tensor | None:
    """int64 keys, one a row or lacking trailing dims."""
    if keys is None:
        return None
    if not isinstance(keys, Tensor):
        host = arguments.row_keys(keys, rows)
        assert host is not None
        return torch.from_numpy(host.view("int64").copy()).reshape(rows).to(device)
    _check_rows("keys", keys)
    if keys.shape != rows[: keys.ndim]:
        raise ValueError(f"keys must have shape {rows} or a leading part of it, but got {tuple(keys.shape)}")
    return (keys.view(torch.int64) if keys.dtype == torch.uint64 else keys.to(torch.int64)).to(device)


def _lengths(lengths: Any, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """int64 lengths, one a row."""
    if lengths is None:
        return None
    rows, size = shape[:-1], shape[-1]
    if not isinstance(lengths, Tensor):
        host = arguments.row_lengths(lengths, rows, size)
        assert host is not None
        return torch.from_numpy(host.copy()).reshape(rows).to(device)
    _check_rows("lengths", lengths)
    if lengths.shape != rows:
        raise ValueError(f"lengths must have shape {rows}, one a row, but got {tuple(lengths.shape)}")
    return lengths.to(device, torch.int64).clamp(0, size)


def _check_rows(name: str, values: Tensor) -> None:
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} must be integers, but got dtype {values.dtype}")
