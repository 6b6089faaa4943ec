"""KeyedDataset: samples that carry their ids and epochs."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from msgdrop_numba.call.keys import row_key
from msgdrop_numba.pipelines.epochs import EpochIndex, EpochMemory, check_epoch


class _Pair(NamedTuple):
    key: Any
    sample: Any


class Keyed(_Pair):
    """A sample with the id that names its row for the random draws. The collate takes it for one by its type.

    It is the tuple (key, sample), and carries its epoch beside that: two epochs of a sample are equal.

    Args:
        key: integer in [-2**63, 2**64), string, bytes or UUID.
        sample: what the dataset gave.
        epoch: integer in [0, 2**63), or None where nobody said: then the collate's own counts.

    Example:
        >>> Keyed("clip-1", [2.5]).sample
        [2.5]
        >>> Keyed("clip-1", [2.5], 3)._replace(sample=[4.5])
        Keyed(key='clip-1', sample=[4.5], epoch=3)

    Source: the mask contract, version 1 (CONTRACT.md), on ids, keys and epochs.
    """

    __module__ = "msgdrop_numba"  # where a pickle looks for it, wherever it stands

    epoch: int | None = None

    def __new__(cls, key: Any, sample: Any, epoch: int | None = None) -> Keyed:
        self = tuple.__new__(cls, (key, sample))
        if epoch is not None:
            self.epoch = epoch
        return self

    def __repr__(self) -> str:
        epoch = "" if self.epoch is None else f", epoch={self.epoch!r}"
        return f"Keyed(key={self.key!r}, sample={self.sample!r}{epoch})"

    def _replace(self, /, **changes: Any) -> Keyed:
        epoch = changes.pop("epoch", self.epoch)
        return Keyed(*super()._replace(**changes), epoch)


class KeyedDataset(Dataset[Keyed]):
    """A dataset whose samples carry their ids and epoch, so that a sample's mask depends on nothing else.

    Samples with equal ids get equal masks, in one batch too: wrap a concatenation of datasets, not its parts, whose
    indices are the same. A dataset whose state can be saved stays one, and its state holds the epoch; a map-style one
    has a state for that in any case.

    Args:
        dataset: a map-style or iterable dataset.
        key: a function from a sample to its id: an integer, string, bytes or UUID. None: the index, which an
            iterable dataset hasn't got (counting inside workers would give other ids for other worker counts).

    Returns:
        A dataset of `Keyed(key, sample, epoch)`, iterable where `dataset` is.

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
        self._epoch = EpochMemory()
        self._offer_state()

    @property
    def epoch(self) -> int | None:
        """The epoch that was set last; None until one is."""
        return self._epoch.get()

    def set_epoch(self, epoch: int) -> None:
        """Give samples this epoch from now on: call before each epoch, as with `DistributedSampler`.

        Running workers see it too, persistent ones as well, however they are started. An index that an `EpochSampler`
        made keeps the epoch that it carries, an iteration of an iterable dataset the one in which it began. The wrapped
        dataset is told, if it has `set_epoch`. A state that is loaded, now or later, brings no earlier epoch back.

        Args:
            epoch: integer in [0, 2**63).

        Raises:
            TypeError, ValueError: it is no integer, or out of range.

        Example:
            >>> dataset = KeyedDataset([2.5, 3.5])
            >>> dataset.set_epoch(4)
            >>> dataset[1]
            Keyed(key=1, sample=3.5, epoch=4)
        """
        self._epoch.set(check_epoch(epoch))
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def _offer_state(self) -> None:
        """The state that loaders save and load, which they look for as attributes.

        None for a stream that has none: loaders skip what such a one has given.
        """
        has_state = hasattr(self.dataset, "state_dict") or not isinstance(self.dataset, IterableDataset)
        if has_state and not hasattr(type(self), "state_dict"):
            self.state_dict, self.load_state_dict = self._state_dict, self._load_state_dict

    def _state_dict(self, *where: Any, **parts: Any) -> dict[str, Any]:
        """With what a framework says of where it is, as Composer and Streaming do: the wrapped dataset's to know."""
        state = {"keyed_epoch": self.epoch}
        has_state = hasattr(self.dataset, "state_dict")
        return {**state, "dataset": self.dataset.state_dict(*where, **parts)} if has_state else state

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        if "keyed_epoch" not in state:  # the wrapped one's alone, as it was saved once
            state = {"keyed_epoch": None, "dataset": state}
        self._restore(state["keyed_epoch"])
        if "dataset" in state:
            self.dataset.load_state_dict(state["dataset"])

    def _restore(self, epoch: int | None) -> None:
        if epoch is not None and self._epoch.restore(check_epoch(epoch)) and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getstate__(self) -> dict[str, Any]:
        """The epoch's memory without its class, which a pickle needn't name."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("state_dict", "load_state_dict")}
        return {**state, "_epoch": self._epoch.numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch = EpochMemory(state.get("_epoch"))
        self._offer_state()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Keyed:
        epoch, index = self._split(index)
        return self._keyed(index, self.dataset[index], epoch)

    def __getitems__(self, indices: Sequence[Any]) -> list[Keyed]:
        epochs: Sequence[int | None]
        if EpochIndex in map(type, indices):
            epochs, indices = zip(*map(self._split, indices), strict=True)
        else:
            epochs = [self._epoch.get()] * len(indices)
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(list(indices)) if fetch else [self.dataset[index] for index in indices]
        return [self._keyed(*parts) for parts in zip(indices, samples, epochs, strict=True)]

    def _split(self, index: Any) -> tuple[int | None, Any]:
        """The epoch of the sample that is asked for, and its index alone."""
        return (index.epoch, int(index)) if type(index) is EpochIndex else (self._epoch.get(), index)

    def _keyed(self, index: Any, sample: Any, epoch: int | None) -> Keyed:
        if self.key is not None:
            return Keyed(_id_of(self.key, sample, f"the sample at index {index}"), sample, epoch)
        if type(index) is int and 0 <= index < 2**64:  # the usual one, asked first
            return Keyed(index, sample, epoch)
        if type(index) is not int:
            index = index.item() if isinstance(index, (Tensor, np.ndarray)) else index
        if isinstance(index, numbers.Integral) and index < 0:  # the same sample has the same key
            index += len(self.dataset)
        row_key(index)
        return Keyed(index, sample, epoch)


class _KeyedIterable(KeyedDataset, IterableDataset[Keyed]):
    key: Callable[[Any], Any]

    def __reduce__(self) -> Any:
        return KeyedDataset, (self.dataset, self.key), self.__getstate__()  # the public class, which makes this one

    def __iter__(self) -> Iterator[Keyed]:
        return _KeyedIterator(self)


class _KeyedIterator:
    """Keyed samples of an iterator, all of one epoch. Its state can be saved and loaded where the iterator has one."""

    def __init__(self, keyed: _KeyedIterable) -> None:
        self._keyed, self._samples, self._count = keyed, iter(keyed.dataset), 0
        self._epoch: int | None = None
        if hasattr(self._samples, "state_dict"):
            self.state_dict, self.load_state_dict = self._state_dict, self._load_state_dict

    def __iter__(self) -> _KeyedIterator:
        return self

    def __next__(self) -> Keyed:
        sample = next(self._samples)
        if self._count == 0 and self._epoch is None:
            self._epoch = self._keyed.epoch
        self._count += 1
        key = _id_of(self._keyed.key, sample, f"sample {self._count - 1} of the iteration")
        return Keyed(key, sample, self._epoch)

    def _state_dict(self) -> dict[str, Any]:
        return {"keyed_epoch": self._epoch, "samples": self._samples.state_dict()}

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        if "keyed_epoch" in state:
            self._epoch = state["keyed_epoch"]
            self._keyed._restore(self._epoch)
            state = state["samples"]
        self._samples.load_state_dict(state)


def keyed_in(data: Any) -> list[KeyedDataset]:
    """The keyed datasets in a dataset, in parts or joins of such, or in a loader."""
    if isinstance(data, KeyedDataset):
        return [data]
    inner = [data.dataset] if hasattr(data, "dataset") else getattr(data, "datasets", ())
    inner = inner.values() if isinstance(inner, Mapping) else inner
    return list({id(keyed): keyed for part in inner for keyed in keyed_in(part)}.values())


def must_hold_keyed(dataset: Any) -> list[KeyedDataset]:
    """`keyed_in` for a dataset that must hold one, so that epochs reach it."""
    found = keyed_in(dataset)
    if not found:
        raise TypeError(
            f"dataset must be a KeyedDataset, or hold one, but got {type(dataset).__name__}: wrap what it holds, "
            "KeyedDataset(dataset)"
        )
    return found


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


def split_keys(samples: list[Any]) -> tuple[list[Any] | None, list[int] | None, list[Any], list[Any]]:
    """The samples' ids, their keys, their epochs, and the samples without them."""
    if not samples:
        raise ValueError("samples must hold at least one sample, but got an empty list")
    types = list(map(type, samples))
    keyed = types.count(Keyed)
    if keyed == 0:
        return None, None, [], samples
    if keyed < len(samples):
        raise TypeError(f"samples must all be Keyed or none, but {keyed} of {len(samples)} are")
    ids, bare = map(list, zip(*samples, strict=True))
    try:
        keys = [row_key(sample_id) for sample_id in ids]
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, in a batch of samples with the keys {ids}") from None
    return ids, keys, [sample.epoch for sample in samples], bare
