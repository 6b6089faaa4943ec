"""Builds the fields of a batch: each sample's kept messages go straight into their place, the others aren't read."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from msgdrop_numba import numpy_ops, outputs, torch_ops
from msgdrop_numba.arguments import address, factors, thresholds
from msgdrop_numba.kernels.cpu import COPY
from msgdrop_numba.plan import Draw
from msgdrop_numba.plan import plan as make_plan
from msgdrop_numba.rule import DropRule
from msgdrop_numba.tensors import check_number, fill_message, scaled_kind
from msgdrop_numba.threads import launch
from msgdrop_numba.torch_state import is_plain


class _Source(NamedTuple):
    """One sample's array: contiguous memory, kept alive by `owner`."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: Any


class Stack:
    """The fields of one batch, which share rule, seed, keys and lengths and thereby the mask."""

    def __init__(
        self, rule: DropRule, p: np.ndarray | None, scale: bool, fill: Any, pad: bool, pad_value: Any,
        seed: int, row_keys: np.ndarray, ids: list[int] | None,
    ) -> None:  # fmt: skip
        self.rule, self.p, self.scale, self.fill, self.pad, self.pad_value = rule, p, scale, fill, pad, pad_value
        self.seed, self.row_keys, self.ids = seed, row_keys, ids
        self.lengths: list[int] | None = None

    def build(self, field: str, samples: list[Any]) -> Tensor:
        """The batch `(samples, messages, *features)` of one field."""
        sources = [self._source(field, row, sample) for row, sample in enumerate(samples)]
        self._check(field, sources)
        _, shape, dtype, _ = sources[0]
        longest = max(source.shape[0] for source in sources)
        kind = scaled_kind(dtype) if self.scale else COPY
        pad_value: Any = check_number("pad_value", self.pad_value, dtype)
        out = _empty((len(sources), longest, *shape[1:]), dtype)
        message = fill_message(self.fill, out, 2)
        t = None if self.p is None else thresholds(self.p)
        f = factors(self.p) if self.p is not None and self.scale else None
        rule = self.rule
        for row, source in enumerate(sources):
            plan = make_plan(source.shape, dtype.itemsize, kind, 1, rule.p, rule.exact, rule.span, rule.min_keep)
            if plan.messages:
                draw = Draw(message, None, self.row_keys[row : row + 1], t, f)
                if plan.followed:
                    launch(plan, draw, self.seed, source.start, out[row].data_ptr(), 0)
                else:
                    mask = torch_ops.draw_mask(plan, draw, self.seed)
                    out[row, : plan.size] = torch_ops.where(plan, draw, source.owner, mask)
            if plan.size < longest:
                out[row, plan.size :] = pad_value
        return out

    def mask(self) -> Tensor:
        """The keep mask `(samples, messages)` of the fields built, padding kept."""
        assert self.lengths is not None
        shape, rule = (len(self.lengths), max(self.lengths)), self.rule
        p = rule.p if self.p is None else self.p[: shape[1]]
        return torch.from_numpy(
            numpy_ops.keep_mask(shape, p, rule.exact, rule.span, rule.min_keep, self.lengths, self.seed, self.row_keys)
        )

    def _source(self, field: str, row: int, sample: Any) -> _Source:
        if isinstance(sample, Tensor):
            owner: Any = sample.detach().resolve_conj().resolve_neg()
            if not is_plain(owner):
                raise TypeError(
                    f"{self._at(field, row)} must be an ordinary CPU tensor, but got {type(sample).__name__} on "
                    f"{sample.device}"
                )
            owner = owner.contiguous()
            source = _Source(owner.data_ptr(), tuple(sample.shape), sample.dtype, owner)
        elif isinstance(sample, np.ndarray) and not isinstance(sample, np.ma.MaskedArray):
            owner = np.ascontiguousarray(sample, sample.dtype.newbyteorder("="))
            source = _Source(address(owner), sample.shape, self._torch_dtype(field, row, owner.dtype), owner)
        else:
            raise TypeError(f"{self._at(field, row)} must be an array or a tensor, but got {type(sample).__name__}")
        if len(source.shape) < 2:
            raise ValueError(f"{self._at(field, row)} must be (messages, *features), but got shape {source.shape}")
        return source

    def _torch_dtype(self, field: str, row: int, dtype: np.dtype[Any]) -> torch.dtype:
        try:
            return _torch_dtype(dtype)
        except TypeError:
            raise TypeError(f"{self._at(field, row)} must have a dtype that torch has, but got {dtype}") from None

    def _check(self, field: str, sources: list[_Source]) -> None:
        """Refuse samples that don't fit together, or fields of one sample with other numbers of messages."""
        first = sources[0]
        for row, (_, shape, dtype, _) in enumerate(sources):
            if dtype != first.dtype or shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"{self._at(field, row)} must be like the batch's first, {first.dtype} with features "
                    f"{first.shape[1:]}, but got {dtype} with {shape[1:]}"
                )
            if shape[0] != first.shape[0] and not self.pad:
                raise ValueError(
                    f"{self._at(field, row)} must have {first.shape[0]} messages, as the batch's first, but got "
                    f"{shape[0]}: set pad=True to pad to the longest"
                )
            if self.lengths is not None and shape[0] != self.lengths[row]:
                raise ValueError(
                    f"{self._at(field, row)} must have {self.lengths[row]} messages, as the sample's other fields, "
                    f"but got {shape[0]}: fields share one mask"
                )
        self.lengths = [source.shape[0] for source in sources]
        if self.p is not None and max(self.lengths) > len(self.p):
            raise ValueError(
                f"p must have one probability for each of the {max(self.lengths)} messages of a sample, "
                f"but has {len(self.p)}"
            )

    def _at(self, field: str, row: int) -> str:
        key = "" if self.ids is None else f" (key {self.ids[row]})"
        return f"{field} of sample {row}{key}" if field else f"sample {row}{key}"


@lru_cache(maxsize=64)
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor; in a worker process in shared memory, so that it isn't copied again when it is sent."""
    if get_worker_info() is None:
        return outputs.empty(shape, dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize, device="cpu")
    return outputs.over(storage, shape, dtype)
