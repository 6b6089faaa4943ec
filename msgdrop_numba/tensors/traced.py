"""message_dropout where no kernel may run: under tracing and transforms, on other devices, for tensor subclasses.

Values inside tensors on other devices or traced are clamped here, not checked: to look would synchronise, or break
a graph. Nested tensors alone synchronise, for the length of the longest row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba import arrays as numpy_ops
from msgdrop_numba.call import arguments
from msgdrop_numba.call.plan import plan as make_plan
from msgdrop_numba.call.plan import row_arguments
from msgdrop_numba.call.rule import DropRule
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.tensors import cuda as torch_cuda
from msgdrop_numba.tensors import operations as tensor
from msgdrop_numba.tensors.arguments import (
    check_target,
    fill_message,
    keys_on,
    lengths_on,
    probabilities_on,
    scaled_kind,
    seed_on,
)
from msgdrop_numba.torch_private import in_transform


def message_dropout(
    x: Tensor, p: Any, training: bool, inplace: bool, scale: bool, exact: bool, span: int, min_keep: int,
    lengths: Any, fill: Any, message_dims: int | None, seed: Any, keys: Any, generator: Any, out: Any,
    return_mask: bool,
) -> Any:  # fmt: skip
    """`functional.message_dropout` in torch operations."""
    if x.is_nested:
        return _jagged(
            x, p, training, inplace, scale, exact, span, min_keep, lengths, fill, message_dims, seed, keys,
            generator, out, return_mask,
        )  # fmt: skip
    shape = tuple(x.shape[: arguments.message_dims(x.shape, message_dims)])
    number, array = probabilities_on(p, shape, x.device)
    rule = DropRule(number, exact, span, min_keep)
    if scale:
        scaled_kind(x.dtype)
    message = fill_message(fill, x, len(shape))
    active = training and number != 0
    target = check_target(x, inplace, out, active, message)
    row_keys, row_lengths = keys_on(keys, shape[:-1], x.device), lengths_on(lengths, shape, x.device)
    seed = seed_on(seed, generator, x.device, draw=active)
    if seed is None:
        y, keep = x, torch.ones(shape, dtype=torch.bool, device=x.device) if return_mask else None
    else:
        keep = _keep_mask(shape, rule, seed, row_keys, row_lengths, array)
        factor, valid = _factors(shape, rule, row_lengths, array, x.device) if scale else (None, None)
        y = tensor.select(x, keep, message, factor, valid)
    if target is not None and target is not y:
        y = target.copy_(y)
    return (y, keep) if return_mask else y


def keep_mask(
    shape: tuple[int, ...], p: Any, exact: bool, span: int, min_keep: int, lengths: Any, seed: Any, keys: Any,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """`functional.keep_mask` on a device, in torch operations."""
    number, array = probabilities_on(p, shape, device)
    rule = DropRule(number, exact, span, min_keep)
    bits = seed_on(seed, None, device, draw=True)
    assert bits is not None
    return _keep_mask(shape, rule, bits, keys_on(keys, shape[:-1], device), lengths_on(lengths, shape, device), array)


def _jagged(
    x: Tensor, p: Any, training: bool, inplace: bool, scale: bool, exact: bool, span: int, min_keep: int,
    lengths: Any, fill: Any, message_dims: int | None, seed: Any, keys: Any, generator: Any, out: Any,
    return_mask: bool,
) -> Any:  # fmt: skip
    """A nested tensor of jagged layout, (batch, messages, *features): values and offsets in, the same layout out."""
    ragged: Any = x
    even = x.layout == torch.jagged and ragged.lengths() is None and ragged._ragged_idx == 1
    if not even or message_dims not in (None, 2) or x.ndim < 3:
        raise ValueError(
            f"a nested x must be (batch, messages, *features), jagged and without holes, with message_dims 2, "
            f"but got {x.ndim} dims, layout {x.layout}, message_dims={message_dims}"
        )
    if inplace or out is not None or lengths is not None:
        raise ValueError("a nested x can't be changed in place or written to out, and has lengths of its own")
    values, offsets = ragged.values(), ragged.offsets()
    sizes = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(values):
        raise ValueError(f"a nested x must use all its {len(values)} values, but has offsets {offsets.tolist()}")
    shape = (len(sizes), int(sizes.max()) if len(sizes) else 0)
    number, array = probabilities_on(p, shape, x.device)
    rule = DropRule(number, exact, span, min_keep)
    if scale:
        scaled_kind(x.dtype)
    message = fill_message(fill, values, 1)
    seed = seed_on(seed, generator, x.device, draw=training and number != 0)
    inside = torch.arange(shape[1], device=x.device) < sizes.unsqueeze(-1)
    keep, y = torch.ones(len(values), dtype=torch.bool, device=x.device), values
    if seed is not None:
        keep = _keep_mask(shape, rule, seed, keys_on(keys, shape[:-1], x.device), sizes, array)[inside]
        factor = _factors(shape, rule, sizes, array, x.device)[0] if scale else None
        if isinstance(factor, Tensor):
            factor = factor.expand(shape)[inside]
        y = tensor.select(values, keep, message, factor)
    y, keep = (torch.nested.nested_tensor_from_jagged(part, offsets) for part in (y, keep))
    if seed is None:
        y = x
    return (y, keep) if return_mask else y


def _factors(
    shape: tuple[int, ...], rule: DropRule, lengths: Tensor | None, p: Tensor | None, device: torch.device
) -> tuple[Any, Tensor | None]:
    return tensor.factors(shape, rule, lengths, None if p is None else tensor.scales(p), device)


def _keep_mask(
    shape: tuple[int, ...], rule: DropRule, seed: Tensor, keys: Tensor | None, lengths: Tensor | None, p: Tensor | None
) -> Tensor:
    """The mask in torch operations; in compiled code from the kernels: compiling Philox itself takes 10 s."""
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if compiled and not in_transform() and seed.device.type in ("cpu", "cuda"):
        return torch.ops.msgdrop_numba.keep_mask(  # type: ignore[no-any-return]
            shape, seed, keys, lengths, p, rule.p, rule.exact, rule.span, rule.min_keep
        )
    return tensor.keep_mask(shape, rule, seed, keys, lengths, None if p is None else tensor.thresholds(p))


@torch.library.custom_op(
    "msgdrop_numba::keep_mask",
    mutates_args=(),
    schema="(SymInt[] shape, Tensor seed, Tensor? keys, Tensor? lengths, Tensor? p, float? number, bool exact, "
    "SymInt span, SymInt min_keep) -> Tensor",
)
def _keep_mask_op(
    shape: Any, seed: Any, keys: Any, lengths: Any, p: Any, number: Any, exact: Any, span: Any, min_keep: Any
) -> Tensor:
    plan = make_plan((*shape, 0), 0, COPY, len(shape), number, exact, span, min_keep)
    if seed.device.type != "cpu":
        draw = torch_cuda.row_arguments(plan, p, False, None, lengths, keys, seed.device)
        return torch_cuda.draw_mask(plan, draw, seed)
    draw = row_arguments(plan, p, False, None, lengths, keys)
    return torch.from_numpy(numpy_ops.draw_mask(plan, draw, arguments.check_seed(seed)))


@_keep_mask_op.register_fake
def _(shape: Any, seed: Any, *_: Any) -> Tensor:
    return seed.new_empty(shape, dtype=torch.bool)  # type: ignore[no-any-return]


@torch.library.custom_op("msgdrop_numba::seed", mutates_args=(), schema="(SymInt bits, Device device) -> Tensor")
def _seed_op(bits: Any, device: Any) -> Tensor:
    """A seed that the compiler can't see: it would fold Philox of a constant symbolically, which takes minutes."""
    return torch.full((), bits, dtype=torch.int64, device=device)


@_seed_op.register_fake
def _(bits: Any, device: Any) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)
