"""message_dropout on nested tensors of jagged layout, (batch, messages, *features): values and offsets in and out.

They synchronise, for the length of the longest row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.request import Job, Request
from msgdrop_numba.tensors import operations
from msgdrop_numba.tensors.traced import TRACED, draw_mask, row_scales
from msgdrop_numba.torch_private import ragged_dim


def message_dropout(x: Tensor, request: Request) -> Any:
    """`functional.message_dropout` for a nested tensor."""
    ragged = x
    even = x.layout == torch.jagged and ragged.lengths() is None and ragged_dim(x) == 1  # type: ignore[attr-defined]
    if not even or request.message_dims not in (None, 2) or x.ndim < 3:
        raise ValueError(
            f"a nested x must be (batch, messages, *features), jagged and without holes, with message_dims 2, "
            f"but got {x.ndim} dims, layout {x.layout}, message_dims={request.message_dims}"
        )
    if request.inplace or request.out is not None or request.lengths is not None:
        raise ValueError("a nested x can't be changed in place or written to out, and has lengths of its own")
    values, offsets = ragged.values(), ragged.offsets()  # type: ignore[attr-defined]
    sizes = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(values):
        raise ValueError(f"a nested x must use all its {len(values)} values, but has offsets {offsets.tolist()}")
    shape = (len(sizes), int(sizes.max()) if len(sizes) else 0)
    y, keep = _values(values, sizes, shape, request)
    if y is not values:
        x = torch.nested.nested_tensor_from_jagged(y, offsets)
    return (x, torch.nested.nested_tensor_from_jagged(keep, offsets)) if request.return_mask else x


def _values(values: Tensor, sizes: Tensor, shape: tuple[int, int], request: Request) -> tuple[Tensor, Tensor]:
    """The values with messages dropped, themselves where nothing drops, and their keep mask."""
    device = values.device
    TRACED.kind(values, request.scale)
    number, p = TRACED.split_p(request.p)
    plan = TRACED.mask_plan(shape, (number, *request.rule))
    fill = TRACED.fill(request.fill, values, 1)
    seed = TRACED.check_seed(request.seed, request.generator, device)
    draw = TRACED.draw(plan, p, fill, request._replace(lengths=sizes), device)
    if not request.training or number == 0:
        return values, TRACED.kept((len(values),), device)
    job = Job(plan, draw, TRACED.seed(seed, request.generator, device))
    inside = torch.arange(shape[1], device=device) < sizes.unsqueeze(-1)
    scale, _ = row_scales(job, device) if request.scale else (None, None)
    if isinstance(scale, Tensor):
        scale = scale.expand(shape)[inside]
    keep = draw_mask(job)[inside]
    return operations.select(values, keep, fill, scale), keep
