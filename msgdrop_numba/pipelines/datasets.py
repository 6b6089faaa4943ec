"""KeyedDataset: samples that carry their ids."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from msgdrop_numba.call.keys import row_key


class Keyed(NamedTuple):
    """A sample with the id that names its row for the random draws. The collate takes it for one by its type.

    Fields:
        key: integer in [-2**63, 2**64), string, bytes or UUID.
        sample: what the dataset gave.

    Example:
        >>> Keyed("clip-1", [2.5]).sample
        [2.5]

    Source: the mask contract, version 1 (CONTRACT.md), on ids and keys.
    """

    key: Any
    sample: Any


Keyed.__module__ = "msgdrop_numba"  # where a pickle looks for it, wherever it stands


class KeyedDataset(Dataset[Keyed]):
    """A dataset whose samples carry their ids, so that a sample's mask depends on nothing else.

    Samples with equal ids get equal masks, in one batch too: wrap a concatenation of datasets, not its parts, whose
    indices are the same. A dataset whose state can be saved stays one.

    Args:
        dataset: a map-style or iterable dataset.
        key: a function from a sample to its id: an integer, string, bytes or UUID. None: the index, which an
            iterable dataset hasn't got (counting inside workers would give other ids for other worker counts).

    Returns:
        A dataset of `Keyed(key, sample)`, iterable where `dataset` is.

    Raises:
        TypeError: `dataset` is no dataset, `key` no function or missing for an iterable one; at a sample: an id of
            another type.
        ValueError: an id out of range; or `key` raised, which is the cause of this error.

    Example:
        >>> KeyedDataset([2.5, 3.5])[1]
        Keyed(key=1, sample=3.5)

    Source: the mask contract, version 1 (CONTRACT.md), on ids and keys.
    """

    __module__ = "msgdrop_numba"  # where a pickle looks for it, wherever it stands

    def __new__(cls, dataset: Any = None, key: Callable[[Any], Any] | None = None) -> KeyedDataset:
        if isinstance(dataset, IterableDataset) and not issubclass(cls, IterableDataset):
            if cls is not KeyedDataset:
                raise TypeError(f"{cls.__name__} must inherit from IterableDataset too, as its dataset does")
            cls = _KeyedIterable
        return super().__new__(cls)

    def __init__(self, dataset: Any, key: Callable[[Any], Any] | None = None) -> None:
        if not isinstance(dataset, IterableDataset) and not hasattr(dataset, "__getitem__"):
            raise TypeError(f"dataset must be a map-style dataset or an IterableDataset, but got {dataset!r}")
        if key is None and isinstance(dataset, IterableDataset):
            raise TypeError("key must be given for an iterable dataset: a function from a sample to its id")
        if key is not None and not callable(key):
            raise TypeError(f"key must be a function from a sample to its id, but got {key!r}")
        self.dataset = dataset
        self.key = key
        _offer_state(self, dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Keyed:
        return self._keyed(index, self.dataset[index])

    def __getitems__(self, indices: Sequence[Any]) -> list[Keyed]:
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch else [self.dataset[index] for index in indices]
        return [self._keyed(index, sample) for index, sample in zip(indices, samples, strict=True)]

    def _keyed(self, index: Any, sample: Any) -> Keyed:
        if self.key is not None:
            return Keyed(_id_of(self.key, sample, f"the sample at index {index}"), sample)
        if type(index) is not int:
            index = index.item() if isinstance(index, (Tensor, np.ndarray)) else index
        if isinstance(index, numbers.Integral) and index < 0:  # the same sample has the same key
            index += len(self.dataset)
        row_key(index)
        return Keyed(index, sample)


class _KeyedIterable(KeyedDataset, IterableDataset[Keyed]):
    def __reduce__(self) -> Any:
        return KeyedDataset, (self.dataset, self.key), self.__dict__  # the public class, which makes this one

    def __iter__(self) -> Iterator[Keyed]:
        return _KeyedIterator(iter(self.dataset), self.key)


class _KeyedIterator:
    """Keyed samples of an iterator, whose own state can be saved and loaded where it has one."""

    def __init__(self, samples: Iterator[Any], key: Any) -> None:
        self._samples, self._key, self._count = samples, key, 0
        _offer_state(self, samples)

    def __iter__(self) -> _KeyedIterator:
        return self

    def __next__(self) -> Keyed:
        sample = next(self._samples)
        self._count += 1
        return Keyed(_id_of(self._key, sample, f"sample {self._count - 1} of the iteration"), sample)


def _offer_state(keyed: Any, wrapped: Any) -> None:
    """The state that loaders save and load is the wrapped one's, where it has one; they look for it as an attribute."""
    for name in ("state_dict", "load_state_dict"):
        if hasattr(wrapped, name):
            setattr(keyed, name, getattr(wrapped, name))


def _id_of(key: Callable[[Any], Any], sample: Any, which: str) -> Any:
    try:
        sample_id = key(sample)
    except Exception as error:
        raise ValueError(f"key must give the id of every sample, but for {which} it raised {error!r}") from error
    try:
        row_key(sample_id)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, for {which}") from None
    return sample_id
