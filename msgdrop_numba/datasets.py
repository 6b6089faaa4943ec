"""KeyedDataset: samples that carry their ids."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from msgdrop_numba.keys import sample_key


class Keyed(NamedTuple):
    """A sample with the id that names its row for the random draws.

    Fields:
        key: integer, string, bytes or UUID; `KeyedDataset` gives the 64-bit integer made of it.
        sample: what the dataset gave.
    """

    key: Any
    sample: Any


class KeyedDataset(Dataset[Keyed]):
    """A dataset whose samples carry their ids, so that a sample's mask depends on nothing else.

    What else the dataset offers (`state_dict`, attributes of your own) is there too. Samples with equal ids get equal
    masks, in one batch too.

    Args:
        dataset: a map-style or iterable dataset.
        key: a function from a sample to its id: an integer, string, bytes or UUID. None: the index, which an
            iterable dataset hasn't got (counting inside workers would give other ids for other worker counts).

    Returns:
        A dataset of `Keyed(key, sample)`, iterable where `dataset` is.

    Raises:
        TypeError: an iterable dataset without `key`, or an id of another type.
        ValueError: an id out of range; or `key` raised, which is the cause of this error.

    Example:
        >>> KeyedDataset([2.5, 3.5])[1]
        Keyed(key=1, sample=3.5)

    Source: the mask contract, version 1 (README), on ids and keys.
    """

    def __new__(cls, dataset: Any, key: Callable[[Any], Any] | None = None) -> KeyedDataset:
        if cls is KeyedDataset and isinstance(dataset, IterableDataset):
            cls = _KeyedIterable
        return super().__new__(cls)

    def __init__(self, dataset: Any, key: Callable[[Any], Any] | None = None) -> None:
        if key is None and isinstance(dataset, IterableDataset):
            raise TypeError("key must be given for an iterable dataset: a function from a sample to its id")
        self.dataset = dataset
        self.key = key

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.dataset, self.key)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # of a copy that isn't filled yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

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
            return Keyed(_key_of(self.key, sample, f"the sample at index {index}"), sample)
        if type(index) is not int:
            index = index.item() if isinstance(index, Tensor) else index
        if isinstance(index, numbers.Integral) and index < 0:  # the same sample has the same key
            index += len(self.dataset)
        return Keyed(sample_key(index), sample)


class _KeyedIterable(KeyedDataset, IterableDataset[Keyed]):
    def __iter__(self) -> Iterator[Keyed]:
        return _KeyedIterator(iter(self.dataset), self.key)


class _KeyedIterator:
    """Keyed samples of an iterator, whose own state can be saved and loaded where it has one."""

    def __init__(self, samples: Iterator[Any], key: Any) -> None:
        self._samples, self._key, self._count = samples, key, 0

    def __iter__(self) -> _KeyedIterator:
        return self

    def __next__(self) -> Keyed:
        sample = next(self._samples)
        self._count += 1
        return Keyed(_key_of(self._key, sample, f"sample {self._count - 1} of the iteration"), sample)

    def __getattr__(self, name: str) -> Any:
        if name not in ("state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self._samples, name)


def _key_of(key: Callable[[Any], Any], sample: Any, which: str) -> int:
    try:
        sample_id = key(sample)
    except Exception as error:
        raise ValueError(f"key must give the id of every sample, but for {which} it raised {error!r}") from error
    try:
        return sample_key(sample_id)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, for {which}") from None
