"""Builds the fields of a batch: each sample's kept messages go straight into their place, the others aren't read."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from msgdrop_numba.call.arguments import scales, split_positions, thresholds
from msgdrop_numba.call.plan import PLAIN, MaskArgs, Plan, RowPointers, make_plan, row_places
from msgdrop_numba.call.request import Job, Options, Request
from msgdrop_numba.call.threads import launch
from msgdrop_numba.kernels.records import COPY
from msgdrop_numba.pipelines.rows import Each, Own, RowValues, laid_out
from msgdrop_numba.pipelines.samples import Samples, read, torch_dtype
from msgdrop_numba.tensors import memory
from msgdrop_numba.tensors.arguments import check_number, fill_message, scaled_kind
from msgdrop_numba.tensors.backends import HOST


class Padding(NamedTuple):
    """The padding of samples to the longest."""

    wanted: bool
    value: Any


class Stack:
    """The fields of one batch that share a mask, by sharing rule, seed, keys, lengths and what samples bring.

    Attributes:
        lengths: each sample's messages; None until a field is known.
        size: the longest sample's.
    """

    size: int

    def __init__(
        self, options: Options, padding: Padding, seed: int, ids: list[Any] | None, keys: np.ndarray | None,
        own: Own | None,
    ) -> None:  # fmt: skip
        self.options, self.padding, self.seed, self.ids, self.keys = options, padding, seed, ids, keys
        self.own, self.row_values = own, RowValues()
        self.lengths: list[int] | None = None

    def build(self, field: str, samples: list[Any]) -> Tensor:
        """The batch `(samples, messages, *features)` of one field."""
        options, rows = self.options, self.look(field, samples)
        shape = (len(samples), self.size, *rows.features)
        out = new(shape, rows.dtype)
        plan = self._plan(shape, rows.dtype.itemsize, scaled_kind(rows.dtype) if options.scale else COPY)
        starts = RowPointers(rows.starts, self._pad_message(out))
        args = self._mask_args(plan, fill_message(options.fill, out, 2), starts)
        if plan.messages and plan.kernel_ok:
            launch(plan, args, self.seed, 0, out.data_ptr(), 0)
        elif plan.messages:
            self._by_torch(plan, args, rows, out)
        return out

    def look(self, field: str, samples: list[Any]) -> Samples:
        """The samples of a field, held to those of fields before; the first also tells what samples bring."""
        rows, first = self._rows(field, samples), self.lengths is None
        self._check_lengths(field, rows.lengths)
        if first and self.own is not None:
            self.row_values = self.own.row_values(rows.lengths, self.size, f" of {field}" if field else "")
        return rows

    def request(self, field: str, sample: Any) -> tuple[Request, int]:
        """The request of one sample, and its number of messages."""
        (size,) = self.look(field, [sample]).lengths
        request = Request.of(self.options.for_rows(size), seed=self.seed, keys=self.keys)
        return request if self.own is None else self.own.requested(request, [size], size), size

    def counts(self) -> list[int]:
        """The number of messages of each sample in the batch."""
        assert self.lengths is not None
        return self.lengths

    def _pad_message(self, out: Tensor) -> Tensor | None:
        """The message behind a sample's last one; None: zeros."""
        wanted, value = self.padding
        return fill_message(check_number("pad_value", value, out.dtype), out, 2) if wanted else None

    @torch.no_grad()
    def _by_torch(self, plan: Plan, args: MaskArgs, rows: Samples, out: Tensor) -> None:
        """Write the batch in torch's operations, for dtypes that kernels can't scale."""
        if self.padding.wanted:
            out.fill_(self.padding.value)
        for row, (owner, length) in enumerate(zip(rows.owners, rows.lengths, strict=True)):
            out[row, :length] = owner
        job = Job(HOST, plan, args, self.seed)
        out.copy_(HOST.where(job, out, HOST.draw_mask(job)))

    def mask(self) -> Tensor:
        """The keep mask `(samples, messages)` of the fields built, padding kept."""
        assert self.lengths is not None
        plan = self._mask_plan()
        return HOST.draw_mask(Job(HOST, plan, self._mask_args(plan), self.seed, mask=new(plan.shape, torch.bool)))

    def _mask_plan(self) -> Plan:
        assert self.lengths is not None
        return self._plan((len(self.lengths), self.size, 0), 0, COPY)

    def _plan(self, shape: tuple[int, ...], itemsize: int, kind: int) -> Plan:
        return make_plan(shape, itemsize, kind, 2, self.options.rule.for_rows(shape[1]))

    def _mask_args(self, plan: Plan, fill: Any = None, rows: RowPointers | None = None) -> MaskArgs:
        assert self.lengths is not None
        full = self.lengths.count(plan.size) == len(self.lengths)
        lengths = None if full else np.array(self.lengths, np.int64)
        p, row_thresholds, row_scales, places = self.options.p, None, None, PLAIN.places
        if self.own is not None:
            p = p if self.row_values.p is None else self.row_values.p.repeat(plan.size, axis=1)
            places = row_places(
                plan, lengths, self.row_values.protect, *split_positions(self.row_values.positions, plan.size)
            )
        if isinstance(p, np.ndarray):
            row_thresholds = thresholds(p[..., : plan.size])
            row_scales = scales(p[..., : plan.size]) if self.options.scale else None
        return MaskArgs(fill, lengths, self.keys, row_thresholds, row_scales, rows=rows, places=places)

    def _rows(self, field: str, samples: list[Any], dims: int = 2) -> Samples:
        return read(samples, dims, self.padding.wanted, lambda row: self._at(field, row))

    def _check_lengths(self, field: str, lengths: list[int]) -> None:
        if not self.padding.wanted and lengths.count(lengths[0]) < len(lengths):
            row = next(row for row, length in enumerate(lengths) if length != lengths[0])
            raise ValueError(
                f"{self._at(field, row)} must have {lengths[0]} messages, as the batch's first, but got "
                f"{lengths[row]}: set pad=True to pad to the longest"
            )
        if self.lengths is not None and lengths != self.lengths:
            row = next(row for row, length in enumerate(lengths) if length != self.lengths[row])
            raise ValueError(
                f"{self._at(field, row)} must have {self.lengths[row]} messages, as the sample's other fields, but got "
                f"{lengths[row]}: they share one mask; give it one of its own with fields={{name: mask name, ...}}"
            )
        self.lengths, self.size = lengths, max(lengths)
        p = self.options.p
        if isinstance(p, np.ndarray) and self.size > len(p):
            raise ValueError(
                f"p must have one probability for each of the {self.size} messages of a sample, but has {len(p)}"
            )

    def _at(self, field: str, row: int) -> str:
        return f"{field} of {called(row, self.ids)}" if field else called(row, self.ids)


def called(row: int, ids: list[Any] | None) -> str:
    """The name of a sample in an error."""
    return f"sample {row}" if ids is None else f"sample {row} (key {ids[row]!r})"


def padded(each: Each) -> Tensor:
    """The samples' own values of an argument as a leaf of the batch, padded to the longest."""
    array = laid_out(each, None, max(map(len, each.rows)), str)
    return sent(array)


def sent(array: np.ndarray) -> Tensor:
    """A copy of an array as a part of the batch."""
    return new(array.shape, torch_dtype(array.dtype)).copy_(torch.from_numpy(array))


def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor; in a worker process in shared memory, so that it isn't copied again when it is sent."""
    return memory.empty(shape, dtype) if get_worker_info() is None else memory.shared(shape, dtype)
