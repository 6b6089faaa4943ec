"""Builds the fields of a batch without what drops: each sample's kept messages go straight into their slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from msgdrop_numba.call.arguments import address
from msgdrop_numba.call.request import Job
from msgdrop_numba.call.select import PADDED, Form, Selection, Source, move, moving, of_slots, place, slot_scales
from msgdrop_numba.kernels.records import COPY, OTHER
from msgdrop_numba.pipelines.rows import PADDING
from msgdrop_numba.pipelines.samples import Samples
from msgdrop_numba.pipelines.stack import Stack, new, sent
from msgdrop_numba.tensors import operations
from msgdrop_numba.tensors.arguments import scaled_kind
from msgdrop_numba.tensors.backends import HOST


class Removal(Stack):
    """A stack of which kept messages alone remain, with their companions."""

    _found: Selection | None = None
    _scales: np.ndarray | None = None

    def build(self, field: str, samples: list[Any]) -> Tensor:
        """The batch `(samples, slots, *features)` of one field."""
        return self._moved(self.look(field, samples), self.options.scale)

    def companion(self, field: str, samples: list[Any]) -> Tensor:
        """The batch of a companion, which has a value for each message."""
        rows, lengths = self._rows(field, samples, dims=1), self._lengths
        for row, (count, wanted) in enumerate(zip(rows.lengths, lengths, strict=True)):
            if count != wanted:
                raise ValueError(
                    f"{self._at(field, row)} must have {wanted} values, one for each of the sample's messages, but got "
                    f"{count}: companions lose the messages that fields lose"
                )
        return self._moved(rows, False)

    def own_leaf(self, argument: str) -> Tensor:
        """The samples' own values of an argument, of kept messages alone."""
        values, index = getattr(self.row_values, argument), self._selected().index
        picked = values.ravel().take(index, mode="clip") if values.size else np.empty(index.shape, values.dtype)
        return sent(np.where(index < 0, values.dtype.type(PADDING[argument]), picked))

    def counts(self) -> list[int]:
        """The number of messages that each sample keeps."""
        return self._selected().lengths.tolist()  # type: ignore[no-any-return]

    def indices(self) -> Tensor:
        """int64 `(samples, slots)`, the place of each kept message in its sample, -1 in padding."""
        found = self._selected()
        return sent(np.where(found.index < 0, -1, found.index % max(1, found.shape[-1])))

    @property
    def _lengths(self) -> list[int]:
        assert self.lengths is not None
        return self.lengths

    def _selected(self) -> Selection:
        """The selection, drawn once."""
        if self._found is None:
            plan = self._mask_plan()
            args = self._mask_args(plan)
            mask = HOST.draw_mask(Job(HOST, plan, args, self.seed))
            self._found = place(Form(PADDED, None), None, plan.shape, mask.data_ptr(), args.lengths)
            if self.options.scale:
                index = self._found.index
                self._scales = np.where(index < 0, 0.0, of_slots(slot_scales(plan, args, self.seed), index))
        return self._found

    def _moved(self, rows: Samples, scale: bool) -> Tensor:
        """The kept messages of rows anywhere in memory, padded to the longest."""
        index, kind = self._selected().index, scaled_kind(rows.dtype) if scale else COPY
        out = new((*index.shape, *rows.features), rows.dtype)
        padding = self._pad_message(out)
        width = int(np.prod(rows.features, dtype=np.int64)) * rows.dtype.itemsize
        source = Source(0, max(1, self.size), 0, width, address(rows.starts))
        scales = self._scales if kind not in (COPY, OTHER) else None
        move(moving(source, out.data_ptr(), index, width, (address(padding), 0), scales, kind), index.size)
        if kind == OTHER and self._scales is not None:  # a dtype that kernels can't multiply
            with torch.no_grad():
                out.copy_(operations.scaled(out, torch.from_numpy(self._scales)))
        return out
