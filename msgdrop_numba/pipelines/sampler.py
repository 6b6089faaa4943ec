"""EpochSampler: where a framework says a sampler's epoch, and whose indices carry it to a KeyedDataset."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler

from msgdrop_numba.call.arguments import check_seed
from msgdrop_numba.functional import fold_in
from msgdrop_numba.pipelines.datasets import must_hold_keyed
from msgdrop_numba.pipelines.epochs import EpochIndex, check_epoch


class EpochSampler(Sampler[Any]):
    """A `DataLoader(sampler=...)` through which epochs reach a KeyedDataset where nothing calls its `set_epoch`.

    Frameworks call `set_epoch` on a loader's sampler; this one hands it on to the dataset. A pass that nobody
    announces is the next epoch, the first one 0, so that a plain loop needs no call at all. Indices carry the epoch of
    their pass: whatever is fetched ahead, and whenever an epoch is announced, a pass has one epoch, that of its first
    index.

    Args:
        dataset: a map-style KeyedDataset, or a part or join of such (`Subset`, `ConcatDataset`), which then read the
            epoch from shared memory: torch hands them bare indices.
        sampler: a sampler whose indices are taken, in its order; it is told of each epoch if it has `set_epoch`. None:
            all indices. On several processes that share a pass, it must give each the same order, or each its part.
        shuffle: with no sampler, a new order in each epoch, which depends on seed and epoch alone: on no process, and
            not on where a resumed run begins.
        seed: of that order, integer in [0, 2**64).

    It has the length and the indices of what it samples. In a `StatefulDataLoader` a resumed pass goes on with its
    epoch; samplers without such an order are only skipped in.

    Raises:
        TypeError, ValueError: no KeyedDataset is in sight, the dataset is iterable, or an argument is wrong.

    Example:
        >>> from msgdrop_numba import KeyedDataset
        >>> dataset = KeyedDataset([2.5, 3.5])
        >>> sampler = EpochSampler(dataset)
        >>> [[dataset[index].epoch for index in sampler] for _ in range(2)]
        [[0, 0], [1, 1]]

    Source: `torch.utils.data.DistributedSampler`, whose `set_epoch` this is.
    """

    __module__ = "msgdrop_numba"  # where a pickle looks for it, wherever it stands

    def __init__(
        self, dataset: Any, sampler: Iterable[Any] | None = None, *, shuffle: bool = False, seed: int = 0
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise TypeError(f"dataset must be map-style, but got {dataset!r}: call its own set_epoch before each epoch")
        self._keyed = must_hold_keyed(dataset)
        if sampler is not None and not hasattr(sampler, "__iter__"):
            raise TypeError(f"sampler must give indices, but got {sampler!r}")
        if sampler is not None and shuffle:
            raise ValueError("shuffle=True can't be used with sampler, which has an order of its own: leave one out")
        self.dataset, self.sampler, self.shuffle, self.seed = dataset, sampler, shuffle, check_seed(seed)
        self._passed: tuple[int, int] | None = None  # the last pass: its epoch, and how often one had been set

    @property
    def epoch(self) -> int | None:
        """The epoch that was set last; None until one is."""
        return self._keyed[0].epoch

    def set_epoch(self, epoch: int) -> None:
        """Give the next pass this epoch; one that has begun keeps its own.

        Args:
            epoch: integer in [0, 2**63).

        Raises:
            TypeError, ValueError: it is no integer, or out of range.

        Example:
            >>> from msgdrop_numba import KeyedDataset
            >>> EpochSampler(KeyedDataset([2.5, 3.5])).set_epoch(4)
        """
        check_epoch(epoch)
        for keyed in self._keyed:
            keyed.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset if self.sampler is None else self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return _Pass(self)

    def _times(self) -> int:
        return sum(keyed._epoch.times for keyed in self._keyed)

    def _begin(self, epoch: int | None) -> tuple[int, Iterator[Any]]:
        """The epoch of a pass, announced or next where None is given, and its indices."""
        if epoch is None and self._passed is not None and self._passed[1] == self._times():
            epoch = self._passed[0] + 1
        epoch = (self.epoch or 0) if epoch is None else epoch
        if any(keyed.epoch != epoch for keyed in self._keyed):
            self.set_epoch(epoch)
        self._passed = epoch, self._times()
        if self.sampler is not None:
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            return epoch, iter(self.sampler)
        if not self.shuffle:
            return epoch, iter(range(len(self.dataset)))
        generator = torch.Generator().manual_seed(fold_in(self.seed, epoch))
        return epoch, iter(torch.randperm(len(self.dataset), generator=generator).tolist())


class _Pass:
    """One pass over a sampler. It begins with its first index: what is announced until then counts."""

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler, self._yielded = sampler, 0
        self._begun: tuple[int, Iterator[Any]] | None = None

    def __iter__(self) -> _Pass:
        return self

    def __next__(self) -> Any:
        if self._begun is None:
            self._begun = self._sampler._begin(None)
        epoch, indices = self._begun
        index = next(indices)
        self._yielded += 1
        single = isinstance(index, numbers.Integral) or (isinstance(index, Tensor) and index.ndim == 0)
        return EpochIndex(int(index), epoch) if single else index

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": None if self._begun is None else self._begun[0], "yielded": self._yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["epoch"] is None:
            return
        self._begun, self._yielded = self._sampler._begin(check_epoch(state["epoch"])), state["yielded"]
        for _ in range(self._yielded):
            next(self._begun[1])
