"""Epochs: what they may be, the memory in which workers see them, indices that carry them."""

from __future__ import annotations

import numbers
import warnings
from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.arguments import signed

_TIMES, _EPOCH, _NOTED, _KEY = range(4)  # what the memory holds
_SAID = 2  # noted, and said
_REPEATED = (
    "comes again, though no epoch was ever set, and loses the same messages as before: call dataset.set_epoch(epoch) "
    "before each epoch, or give the DataLoader sampler=EpochSampler(dataset). Where it is meant, as in sampling with "
    "replacement, call set_epoch(0) once"
)


def check_epoch(epoch: Any) -> int:
    """The epoch of samples, an integer in [0, 2**63)."""
    if isinstance(epoch, bool) or not isinstance(epoch, numbers.Integral):
        raise TypeError(f"epoch must be an integer, but got {epoch!r}")
    if not 0 <= int(epoch) < 2**63:
        raise ValueError(f"epoch must be in [0, 2**63), but got {epoch!r}: count epochs from 0")
    return int(epoch)


class EpochMemory:
    """An epoch in shared memory: persistent workers keep what they were started with, and must see a new one.

    Its owner pickles `numbers` alone, which stay shared on their way to a worker. A copy gets memory of its own.
    """

    __slots__ = ("_view", "numbers")

    def __init__(self, numbers: Tensor | None = None) -> None:
        with torch.inference_mode(False):
            numbers = torch.zeros(4, dtype=torch.int64, device="cpu") if numbers is None else numbers
            self.numbers = numbers if numbers.is_shared() else numbers.share_memory_()
            self._view = memoryview(self.numbers.numpy())  # type: ignore[arg-type]  # read for every sample

    @property
    def times(self) -> int:
        """The number of times it was set."""
        return self._view[_TIMES]

    def get(self) -> int | None:
        """The epoch, as 64 bits with a sign; None until it is set."""
        return self._view[_EPOCH] if self._view[_TIMES] else None

    def set(self, epoch: int) -> None:
        self._view[_EPOCH] = signed(epoch)
        self._view[_TIMES] += 1

    def restore(self, epoch: int) -> bool:
        """Set it from a saved state, which every worker may do: that says of no new epoch. Whether it was.

        A later one stays: loaders load the state of an epoch that is over when the next one, announced, begins.
        """
        times = self.times
        if times and self._view[_EPOCH] > epoch:
            return False
        self.set(epoch)
        self._view[_TIMES] = max(1, times)
        return True

    def of_batch(self, epochs: list[Any], ids: list[Any]) -> int | None:
        """The epoch that all samples of a batch bring, else the one that was set here, or None; checked."""
        own, epoch = self.get(), epochs[0]
        if epochs.count(epoch) < len(epochs):
            raise ValueError(
                f"samples of one batch must be of one epoch, but have {epochs}, with the keys {ids}: call the "
                "dataset's set_epoch between two passes, or give its loader sampler=EpochSampler(dataset)"
            )
        if epoch is None:
            return own
        if check_epoch(epoch) != own is not None:
            raise ValueError(
                f"epoch must be said once, but the samples bring {epoch} and set_epoch of the collate said {own}: call "
                "the dataset's set_epoch alone"
            )
        return int(epoch)

    def warn_of_repeats(self, keys: list[int], ids: list[Any]) -> None:
        """Say, once, that the sample that was noted first comes again, if it does: call where no epoch was ever set."""
        again = self._again(keys)
        if again is not None:
            warnings.warn(f"the sample with the key {ids[again]!r} {_REPEATED}", stacklevel=4)

    def _again(self, keys: list[int]) -> int | None:
        """The place of the first noted key among these, if it comes again. Answered once, in one of all processes."""
        noted = self._view[_NOTED]
        if noted == 0:
            self._view[_KEY] = signed(keys[0])
            self._view[_NOTED] = 1
        if noted != 1 or (key := self._view[_KEY] % 2**64) not in keys:
            return None
        self._view[_NOTED] = _SAID
        return keys.index(key)


class EpochIndex(int):
    """An index that carries its epoch, through batch samplers, queues and pickles, to the dataset."""

    epoch: int

    def __new__(cls, index: int, epoch: int) -> EpochIndex:
        self = super().__new__(cls, index)
        self.epoch = epoch
        return self

    def __reduce__(self) -> Any:
        return EpochIndex, (int(self), self.epoch)
