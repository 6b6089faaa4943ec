"""message_dropout where no kernel may run: under tracing and transforms, on other devices, for tensor subclasses.

Values inside tensors on other devices or traced are clamped here, not checked: to look would synchronise, or break
a graph. Nested tensors alone synchronise, for the length of the longest row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba import arguments, numpy_ops
from msgdrop_numba.kernels import tensor
from msgdrop_numba.kernels.cpu import COPY
from msgdrop_numba.plan import plan as make_plan
from msgdrop_numba.plan import row_arguments
from msgdrop_numba.rule import DropRule
from msgdrop_numba.tensors import check_target, fill_message, scaled_kind
from msgdrop_numba.torch_state import in_transform, is_plain


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
    number, array = _probabilities(p, shape, x.device)
    rule = DropRule(number, exact, span, min_keep)
    if scale:
        scaled_kind(x.dtype)
    message = fill_message(fill, x, len(shape))
    active = training and number != 0
    target = check_target(x, inplace, out, active, message)
    row_keys, row_lengths = _keys(keys, shape[:-1], x.device), _lengths(lengths, shape, x.device)
    seed = _seed(seed, generator, x.device, draw=active)
    if seed is None:
        y, keep = x, torch.ones(shape, dtype=torch.bool, device=x.device) if return_mask else None
    else:
        keep = _keep_mask(shape, rule, seed, row_keys, row_lengths, array)
        factor, valid = tensor.factors(shape, rule, row_lengths, array, x.device) if scale else (None, None)
        y = tensor.select(x, keep, message, factor, valid)
    if target is not None and target is not y:
        y = target.copy_(y)
    return (y, keep) if return_mask else y


def keep_mask(
    shape: tuple[int, ...], p: Any, exact: bool, span: int, min_keep: int, lengths: Any, seed: Any, keys: Any,
    device: Any,
) -> Tensor:  # fmt: skip
    """`functional.keep_mask` as a tensor on a device: from the kernels on the CPU, unless traced."""
    device = torch.device(device)
    if seed is None:
        arguments.check_seed(seed)
    eager = not torch.compiler.is_compiling() and all(
        is_plain(t) for t in (p, lengths, seed, keys) if isinstance(t, Tensor)
    )
    if device.type == "cpu" and eager:
        return torch.from_numpy(numpy_ops.keep_mask(shape, p, exact, span, min_keep, lengths, seed, keys))
    number, array = _probabilities(p, shape, device)
    rule = DropRule(number, exact, span, min_keep)
    bits = _seed(seed, None, device, draw=True)
    assert bits is not None
    return _keep_mask(shape, rule, bits, _keys(keys, shape[:-1], device), _lengths(lengths, shape, device), array)


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
    number, array = _probabilities(p, shape, x.device)
    rule = DropRule(number, exact, span, min_keep)
    if scale:
        scaled_kind(x.dtype)
    message = fill_message(fill, values, 1)
    seed = _seed(seed, generator, x.device, draw=training and number != 0)
    inside = torch.arange(shape[1], device=x.device) < sizes.unsqueeze(-1)
    keep, y = torch.ones(len(values), dtype=torch.bool, device=x.device), values
    if seed is not None:
        keep = _keep_mask(shape, rule, seed, _keys(keys, shape[:-1], x.device), sizes, array)[inside]
        factor = tensor.factors(shape, rule, sizes, array, x.device)[0] if scale else None
        if isinstance(factor, Tensor):
            factor = factor.expand(shape)[inside]
        y = tensor.select(values, keep, message, factor)
    y, keep = (torch.nested.nested_tensor_from_jagged(part, offsets) for part in (y, keep))
    if seed is None:
        y = x
    return (y, keep) if return_mask else y


def _keep_mask(
    shape: tuple[int, ...], rule: DropRule, seed: Tensor, keys: Tensor | None, lengths: Tensor | None, p: Tensor | None
) -> Tensor:
    """The mask in torch operations; in compiled CPU code from the kernels: compiling Philox itself takes 10 s."""
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if compiled and seed.device.type == "cpu" and not in_transform():
        return torch.ops.msgdrop_numba.keep_mask(  # type: ignore[no-any-return]
            shape, seed, keys, lengths, p, rule.p, rule.exact, rule.span, rule.min_keep
        )
    return tensor.keep_mask(shape, rule, seed, keys, lengths, p)


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


def _probabilities(p: Any, shape: tuple[int, ...], device: torch.device) -> tuple[float | None, Tensor | None]:
    """p as a number or as a float64 tensor."""
    if torch.compiler.is_compiling() and not isinstance(p, Tensor) and getattr(p, "ndim", None):
        p = _constant(p)
    if not isinstance(p, Tensor) or is_plain(p):
        number, array = arguments.split_p(p)
        if array is None:
            return number, None
        return None, torch.from_numpy(arguments.probabilities(array, shape)).to(device)
    if p.dtype == torch.bool or p.is_complex():
        raise TypeError(f"p must hold floating-point numbers, but got dtype {p.dtype}")
    if p.ndim and p.shape not in (shape[-1:], shape):
        raise ValueError(f"p must be a number or have shape {shape[-1:]} or {shape}, but got {tuple(p.shape)}")
    values = p.detach().to(device, torch.float64).nan_to_num(nan=0.0).clamp(0, 1)
    return None, values if p.ndim else values.expand(shape[-1:])


def _seed(seed: Any, generator: Any, device: torch.device, draw: bool) -> Tensor | None:
    """The seed as a 0-d int64 tensor on the device, drawn as torch draws where there is none; None if not needed."""
    if isinstance(seed, Tensor):
        arguments.check_seed_tensor(seed)
        if generator is not None:
            raise ValueError(f"give seed or generator, not both: got a seed tensor and generator={generator!r}")
        return seed.to(device) if draw else None
    seed = arguments.check_source(seed, generator, torch.Generator)
    if not draw:
        return None
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    bits = seed if seed < 2**63 else seed - 2**64
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return torch.ops.msgdrop_numba.seed(bits, device)  # type: ignore[no-any-return]
    return torch.full((), bits, dtype=torch.int64, device=device)


def _keys(keys: Any, rows: tuple[int, ...], device: torch.device) -> Tensor | None:
    """int64 keys, one a row or lacking trailing dims."""
    if keys is None:
        return None
    if torch.compiler.is_compiling():
        keys = _constant(keys)
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
    if torch.compiler.is_compiling():
        lengths = _constant(lengths)
    if not isinstance(lengths, Tensor) or is_plain(lengths):
        host = arguments.row_lengths(lengths, rows, size)
        assert host is not None
        return torch.from_numpy(host.copy()).reshape(rows).to(device)
    _check_rows("lengths", lengths)
    if lengths.shape != rows:
        raise ValueError(f"lengths must have shape {rows}, one a row, but got {tuple(lengths.shape)}")
    return lengths.to(device, torch.int64).clamp(0, size)


def _constant(values: Any) -> Tensor:
    """What the compiler follows: numbers in lists, or arrays, as a tensor; it can't look at them one by one."""
    if isinstance(values, (list, tuple)):
        return torch.stack([_constant(value) for value in values])
    return torch.as_tensor(values - 2**64 if isinstance(values, int) and values >= 2**63 else values)


def _check_rows(name: str, values: Tensor) -> None:
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} must be integers, but got dtype {values.dtype}")
