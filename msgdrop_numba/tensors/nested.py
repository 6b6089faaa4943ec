"""message_dropout on nested tensors of jagged layout, (batch, messages, *features): values and offsets in and out.

They synchronise, for the length of the longest row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.request import Job, Request, perform
from msgdrop_numba.call.rule import Rule
from msgdrop_numba.tensors import operations
from msgdrop_numba.tensors.arguments import fill_message, has_sizes
from msgdrop_numba.tensors.backends import Outline, Traced
from msgdrop_numba.torch_private import ragged_dim


def check_sizes(x: Tensor) -> None:
    """Refuse what vmap makes of a nested tensor: it doesn't say that it is nested."""
    if not has_sizes(x):
        raise ValueError(
            "x must have sizes, but it is a nested tensor under vmap: call this on the jagged nested tensor itself, "
            "without vmap"
        )


def message_dropout(x: Tensor, request: Request) -> Any:
    """`functional.message_dropout` for a nested tensor."""
    values, offsets, shape, padded_request = _rows(x, request)
    result = perform(_Ragged(shape), values, padded_request)
    y, keep = result if request.return_mask else (result, None)
    if y is not values:
        x = torch.nested.nested_tensor_from_jagged(y, offsets)
    return x if keep is None else (x, torch.nested.nested_tensor_from_jagged(keep, offsets))


def padded(x: Tensor, request: Request) -> tuple[Tensor, Request]:
    """A nested tensor padded with zeros, and the request of it."""
    values, offsets, shape, padded_request = _rows(x, request)
    wide = values.new_zeros((*shape, *values.shape[1:]))
    padded_request = replace(
        padded_request, rule=padded_request.rule.for_rows(shape[1])
    )  # rows may be shorter than the prefix
    return wide.index_put((_inside(offsets.diff(), shape[1]),), values), padded_request


def _rows(x: Tensor, request: Request) -> tuple[Tensor, Tensor, tuple[int, int], Request]:
    """The values of a nested tensor, its offsets, its shape if it were padded, and the request of that."""
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
    places = {name: _padded(name, getattr(request, name), offsets, shape) for name in ("protect", "positions")}
    return values, offsets, shape, replace(request, lengths=sizes, **places)


def _padded(name: str, each: Any, offsets: Tensor, shape: tuple[int, int]) -> Any:
    """An argument that is jagged as x is, padded with zeros; anything else as it is."""
    if not isinstance(each, Tensor) or not each.is_nested:
        return each
    if each.ndim != 2 or not torch.equal(each.offsets(), offsets):  # type: ignore[attr-defined]
        raise ValueError(
            f"a nested {name} must have one value for each message of x, whose offsets are {offsets.tolist()}, "
            f"but has {each.ndim} dims and offsets {each.offsets().tolist()}"  # type: ignore[attr-defined]
        )
    padded = torch.zeros(shape, dtype=each.dtype, device=each.device)
    padded[_inside(offsets.diff(), shape[1])] = each.values()
    return padded


def _inside(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)


class _Ragged(Traced):
    """The values of rows of different lengths: their mask is that of a tensor padded to `shape`, less the padding."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def plan(self, x: Tensor, kind: int, message_dims: Any, rule: Rule) -> Outline:
        return Outline(self.shape, rule)  # rows may be shorter than the prefix

    def fill(self, fill: Any, x: Tensor, message_dims: int) -> Tensor | None:
        return fill_message(fill, x, 1)

    def kept(self, x: Tensor, plan: Outline) -> Tensor:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)

    def run(self, x: Tensor, job: Job, request: Request) -> Any:
        inside = _inside(job.args.rows.lengths, self.shape[1])
        keep = self.draw_mask(job)[inside]
        scale, eligible = self.scales(job) if request.scale else (None, None)
        if isinstance(scale, Tensor):
            scale = scale.expand(self.shape)[inside]
        y = operations.where(x, keep, job.args.fill, scale, None if eligible is None else eligible[inside])
        return (y, keep) if request.return_mask else y
