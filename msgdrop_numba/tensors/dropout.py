"""message_dropout and keep_mask on tensors: the usual call, and all others by the way that `ways` names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.request import Request, perform, prepare_mask, turned
from msgdrop_numba.call.threads import team
from msgdrop_numba.call.usual import Usual, row_address, seed_bits
from msgdrop_numba.kernels._jit import direct
from msgdrop_numba.kernels.usual import lengths_fit
from msgdrop_numba.tensors import nested, traced, ways
from msgdrop_numba.tensors.arguments import check_device
from msgdrop_numba.tensors.autograd import run_usual
from msgdrop_numba.tensors.memory import dense
from msgdrop_numba.tensors.seeds import fresh_seed
from msgdrop_numba.tensors.usual import find, latest
from msgdrop_numba.tensors.write import draw_mask
from msgdrop_numba.torch_private import dense_address, increment_versions, is_watched


def short(
    x: Tensor, rule_arguments: tuple[Any, ...], scale: Any, message_dims: Any, inplace: Any, lengths: Any, seed: Any,
    keys: Any, out: Any,
) -> Tensor | None:  # fmt: skip
    """The usual call, see `call.usual`; None: it is another, and nothing was done. What the plan refuses is raised.

    Args:
        rule_arguments: those of `read_rule`.
    """
    if is_watched() or not x.is_cpu:
        return None
    scale = bool(scale)
    try:
        x.shape  # noqa: B018  # raises where a guard would end the process, see `has_sizes`
        fast_path: Usual | None
        for is_like, known in latest(scale, message_dims, *rule_arguments):
            if is_like(x):
                fast_path = known
                break
        else:
            fast_path = find(x, scale, message_dims, *rule_arguments)
    except (TypeError, RuntimeError):  # what is wrong is said elsewhere
        return None
    if fast_path is None or not (start := x.data_ptr()):
        return None
    tracked, target = x.requires_grad and torch.is_grad_enabled(), None
    if inplace or out is not None:
        target, to = _target(x, start, fast_path, inplace, out)
        if not to or tracked:
            return None
    at_lengths = at_keys = 0
    if lengths is not None or keys is not None:
        at_lengths = 0 if lengths is None else _row_address(lengths, fast_path.rows)
        at_keys = 0 if keys is None else _row_address(keys, fast_path.rows)
        if tracked or (lengths is not None and not at_lengths) or (keys is not None and not at_keys):
            return None
    if seed is not None:
        seed = seed_bits(seed)
        if seed is None:
            return None
    elif at_lengths and not direct(lengths_fit)(
        at_lengths, fast_path.plan.messages // fast_path.plan.size, fast_path.plan.size
    ):
        return None
    else:
        seed = fresh_seed(None)
    if tracked:
        return run_usual(x, (fast_path, seed, start))  # type: ignore[no-any-return]
    result = target
    if target is None:
        result = dense(x, fast_path.nbytes, fast_path.strides)
        to = result.data_ptr()
    if not fast_path.drop(fast_path.address, at_lengths, at_keys, seed, start, to, *team(fast_path.nbytes)):
        return None
    if target is not None:
        increment_versions((target,))  # torch can't see a write through a pointer
    return result


def _target(x: Tensor, start: int, fast_path: Usual, inplace: Any, out: Any) -> tuple[Any, int]:
    """The tensor to write and its address; 0: all there is to know of it must be asked."""
    if inplace:
        return (None, 0) if out is not None or x.is_inference() else (x, start)
    if type(out) is not Tensor or out.is_inference():
        return None, 0
    to = fast_path.alike.known(out)
    if (
        not to
        or (out.requires_grad and torch.is_grad_enabled())
        or (to != start and abs(to - start) < fast_path.nbytes)
    ):
        return None, 0
    return out, to


def _row_address(values: Any, rows: tuple[int, ...] | None) -> int:
    """Where int64 lie, one a row; 0: they are others."""
    if type(values) is not Tensor:
        return row_address(values, rows)
    return dense_address(values) if values.dtype is torch.int64 and values.shape == rows else 0


explain = ways.explain


def message_dropout(x: Tensor, request: Request) -> Any:
    """`functional.message_dropout` for a tensor."""
    if x.is_nested:
        return nested.message_dropout(x, request)
    nested.check_sizes(x)
    return turned(_perform, Tensor, Tensor.permute, x, request)


def _perform(x: Tensor, request: Request) -> Any:
    return perform(ways.library(x, request), x, request)


def keep_mask(shape: tuple[int, ...], request: Request, device: Any) -> Tensor:
    """`functional.keep_mask` on a device."""
    device = check_device(device)
    library = ways.mask_library(device, request)
    job = prepare_mask(library, shape, request, device)
    return traced.draw_mask(job) if library is traced.TRACED else draw_mask(job)
