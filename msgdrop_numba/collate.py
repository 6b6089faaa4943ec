"""MessageDropoutCollate and KeyedDataset: message dropout while a DataLoader builds its batches."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from msgdrop_numba.arguments import check_is_number, check_seed, probabilities, split_p
from msgdrop_numba.functional import fold_in, message_dropout
from msgdrop_numba.keys import sample_key
from msgdrop_numba.rule import DropRule
from msgdrop_numba.stack import Stack
from msgdrop_numba.torch_ops import fresh_seed


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

    Args:
        dataset: a map-style or iterable dataset.
        key: a function from a sample to its id: an integer, string, bytes or UUID. None: the index, which an
            iterable dataset hasn't got (counting inside workers would give other ids for other worker counts).

    Returns:
        A dataset of `Keyed(key, sample)`, iterable where `dataset` is.

    Raises:
        TypeError: an iterable dataset without `key`, or an id of another type.

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

    def _keyed(self, index: Any, sample: Any) -> Keyed:
        if self.key is not None:
            return Keyed(sample_key(self.key(sample)), sample)
        if isinstance(index, Tensor):
            index = index.item()
        if isinstance(index, numbers.Integral) and index < 0:  # the same sample has the same key
            index += len(self.dataset)
        return Keyed(sample_key(index), sample)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Keyed:
        return self._keyed(index, self.dataset[index])

    def __getitems__(self, indices: Sequence[Any]) -> list[Keyed]:
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch else [self.dataset[index] for index in indices]
        return [self._keyed(index, sample) for index, sample in zip(indices, samples, strict=True)]


class _KeyedIterable(KeyedDataset, IterableDataset[Keyed]):
    def __iter__(self) -> Iterator[Keyed]:
        return (self._keyed(None, sample) for sample in self.dataset)


class MessageDropoutCollate:
    """A `DataLoader(collate_fn=...)` that drops messages while it builds the batch: one pass, no stacked copy first.

    Samples are arrays or tensors `(messages, *features)`, or tuples, lists or dicts with such fields; all other
    leaves go through torch's `default_collate`. Without `seed` each batch draws from torch's default generator, which a
    DataLoader seeds in every worker. With `seed` a sample's mask depends on seed, epoch and its id alone, whatever the
    workers, batches and ranks are; ids come from a `KeyedDataset`.

    Args:
        p: probability that a message is **dropped**, in [0, 1]; or an array of them, one a position, for at least as
            many positions as the longest sample has.
        fields: index, name or list of them: where messages are dropped; all of them drop the same ones. None: the
            sample itself where it is an array, its first element where it is a tuple or list. A dict must name them.
        pad: pad the fields to the longest sample and add `lengths` (int64, one a sample): `(batch, lengths)` for
            arrays, appended to tuples, under `"lengths"` in dicts. Padding is never dropped.
        pad_value: number that padding holds.
        seed: integer in [0, 2**64); needs the samples' ids, without which every epoch would repeat its masks.
        collate_fn: a collate function of your own: it gets the bare samples and returns as many rows in the same
            order, in which messages are then dropped in place, its own padding too. Not with `pad`.
        scale, exact, span, min_keep, fill: as for `message_dropout`.
        return_mask: add the keep mask after the lengths, or under `"keep_mask"`.

    Raises:
        TypeError, ValueError: an argument is wrong; at a call: samples that don't fit together, naming the field, the
            sample's position and its key.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> frames = [torch.randn(n, 12) for n in (7, 9, 8)]
        >>> collate = MessageDropoutCollate(0.3, pad=True, seed=1)
        >>> batch, lengths = next(iter(DataLoader(KeyedDataset(frames), batch_size=3, collate_fn=collate)))
        >>> batch.shape, lengths
        (torch.Size([3, 9, 12]), tensor([7, 9, 8]))

    Source: the mask contract, version 1 (README).
    """

    def __init__(
        self,
        p: Any = 0.5,
        *,
        fields: Any = None,
        pad: bool = False,
        pad_value: complex = 0.0,
        seed: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        scale: bool = False,
        exact: bool = False,
        span: int = 1,
        min_keep: int = 0,
        fill: Any = 0.0,
        return_mask: bool = False,
    ) -> None:
        if pad and collate_fn is not None:
            raise ValueError("pad=True can't be used with collate_fn, which pads for itself: leave one out")
        if isinstance(fields, (str, numbers.Integral)):
            fields = [fields]
        elif fields is not None and (not isinstance(fields, (list, tuple)) or not fields):
            raise ValueError(f"fields must name at least one field, or be None, but got {fields!r}")
        number, array = split_p(p)
        self.rule = DropRule(number, exact, span, min_keep)
        if array is not None and array.ndim > 1:
            raise ValueError(f"p must be a number or have one dim, a position each, but got {tuple(array.shape)}")
        self._p = None if array is None else probabilities(array, tuple(array.shape))
        self.fields = fields
        self.pad, self.pad_value = pad, pad_value
        self.seed = None if seed is None else check_seed(seed)
        self.collate_fn = collate_fn
        self.scale, self.return_mask = scale, return_mask
        if not isinstance(fill, (Tensor, np.ndarray)):
            check_is_number("fill", fill)
        check_is_number("pad_value", pad_value)
        if isinstance(fill, np.ndarray):
            fill = torch.from_numpy(fill.copy())
        self.fill = fill.detach() if isinstance(fill, Tensor) else fill
        # Shared memory: persistent workers keep the collate that they were started with, and must see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks from the next batch on: call before each epoch, as with `DistributedSampler`.

        A running persistent worker sees it too. Copies made by deepcopy or pickle keep the epoch that they had.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, numbers.Integral):
            raise TypeError(f"epoch must be an integer in [0, 2**63), but got {epoch!r}")
        if not 0 <= epoch < 2**63:
            raise ValueError(f"epoch must be an integer in [0, 2**63), but got {epoch!r}")
        self._epoch.fill_(int(epoch))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a copy's epoch must reach that copy's workers; one sent to a worker is shared

    def __call__(self, samples: list[Any]) -> Any:
        if not isinstance(samples, list):
            raise TypeError(
                f"samples must be a list, the samples of a batch, but got {type(samples).__name__}; "
                "a DataLoader with batch_size=None has no batches to drop in"
            )
        keys, samples = _split_keys(samples)
        if self.seed is None:
            seed = 0 if self.rule.p == 0 else fresh_seed(None)  # p = 0 draws nothing, in a batch as elsewhere
        elif keys is None:
            raise ValueError(
                f"seed={self.seed} needs the samples' ids, or every batch would repeat the masks of the one before: "
                "wrap the dataset in KeyedDataset, or leave seed out"
            )
        else:
            seed = fold_in(self.seed, int(self._epoch))
        row_keys = np.arange(len(samples), dtype=np.uint64) if keys is None else np.array(keys, dtype=np.uint64)
        if self.collate_fn is not None:
            return self._drop_in(self.collate_fn(samples), seed, row_keys)
        return self._build(samples, seed, row_keys, keys)

    def _build(self, samples: list[Any], seed: int, row_keys: np.ndarray, keys: list[int] | None) -> Any:
        first = samples[0]
        names = _field_names(self.fields, first)
        stack = Stack(self.rule, self._p, self.scale, self.fill, self.pad, self.pad_value, seed, row_keys, keys)
        if names is None:
            return _extend(stack.build("", samples), self._extras(stack))
        _check_structure(samples)

        def leaf(name: Any) -> Any:
            values = [sample[name] for sample in samples]
            return stack.build(f"field {name!r}", values) if name in names else default_collate(values)

        if isinstance(first, Mapping):
            return _extend({name: leaf(name) for name in first}, self._extras(stack))
        leaves = [leaf(i) for i in range(len(first))]
        return _extend(_like(first, leaves), self._extras(stack))

    def _extras(self, stack: Stack) -> dict[str, Tensor]:
        extras: dict[str, Tensor] = {"lengths": torch.tensor(stack.lengths, device="cpu")} if self.pad else {}
        return {**extras, "keep_mask": stack.mask()} if self.return_mask else extras

    def _drop_in(self, batch: Any, seed: int, row_keys: np.ndarray) -> Any:
        names = _field_names(self.fields, batch)
        fields = {None: batch} if names is None else {name: batch[name] for name in names}
        sizes = set()
        for name, x in fields.items():
            if not isinstance(x, (Tensor, np.ndarray)) or x.ndim < 3 or len(x) != len(row_keys):
                shape = tuple(x.shape) if isinstance(x, (Tensor, np.ndarray)) else type(x).__name__
                where = "" if name is None else f" in field {name!r}"
                raise ValueError(
                    f"collate_fn must return (samples, messages, features) with {len(row_keys)} rows{where}, "
                    f"but got {shape}"
                )
            sizes.add(x.shape[1])
        if len(sizes) > 1:
            raise ValueError(
                f"fields {list(fields)} must have as many messages each, but got {sorted(sizes)}: they share one mask"
            )
        rule, p = self.rule, self.rule.p if self._p is None else self._p[: max(sizes)]
        for x in {id(x): x for x in fields.values()}.values():  # one array under two names is dropped in once
            fill = self.fill.numpy() if isinstance(self.fill, Tensor) and isinstance(x, np.ndarray) else self.fill
            _, mask = message_dropout(
                x, p, inplace=True, scale=self.scale, exact=rule.exact, span=rule.span, min_keep=rule.min_keep,
                fill=fill, message_dims=2, seed=seed, keys=row_keys, return_mask=True,
            )  # fmt: skip
        return _extend(batch, {"keep_mask": mask} if self.return_mask else {})


def _split_keys(samples: list[Any]) -> tuple[list[int] | None, list[Any]]:
    if not samples:
        raise ValueError("samples must hold at least one sample, but got an empty list")
    keyed = sum(isinstance(sample, Keyed) for sample in samples)
    if keyed == 0:
        return None, samples
    if keyed < len(samples):
        raise TypeError(f"samples must all be Keyed or none, but {keyed} of {len(samples)} are")
    return [sample_key(sample.key) for sample in samples], [sample.sample for sample in samples]


def _field_names(fields: list[Any] | None, sample: Any) -> list[Any] | None:
    """Which leaves of a sample (or batch) hold messages; None for the sample itself."""
    if isinstance(sample, (Tensor, np.ndarray)):
        if fields is not None:
            raise ValueError(f"fields must be None where a sample is an array, but got {fields!r}")
        return None
    if isinstance(sample, Mapping):
        if fields is None:
            raise ValueError(f"fields must name the fields to drop in where a sample is a dict: some of {list(sample)}")
        there: Any = list(sample)
    elif isinstance(sample, (tuple, list)):
        attributes = list(getattr(sample, "_fields", ()))
        fields = [0] if fields is None else [attributes.index(f) if f in attributes else f for f in fields]
        there = range(len(sample))
    else:
        raise TypeError(f"samples must be arrays, tensors, tuples, lists or dicts, but got {type(sample).__name__}")
    for name in fields:
        if name not in there:
            raise ValueError(f"fields must be among {list(there)}, but got {name!r}")
    return fields


def _check_structure(samples: list[Any]) -> None:
    """Refuse a sample whose fields are not those of the first: zipping them would lose some silently."""
    first = samples[0]
    for position, sample in enumerate(samples):
        same = type(sample) is type(first) and len(sample) == len(first)
        if not same or (isinstance(first, Mapping) and set(sample) != set(first)):
            raise ValueError(
                f"sample {position} must have the fields of the first, {_fields(first)}, but got {_fields(sample)}"
            )


def _fields(sample: Any) -> str:
    if isinstance(sample, Mapping):
        return f"{type(sample).__name__} with {list(sample)}"
    return f"{type(sample).__name__} of {len(sample)}" if hasattr(sample, "__len__") else type(sample).__name__


def _like(sample: Any, leaves: list[Any]) -> Any:
    """The leaves as a tuple, list or named tuple, as the sample is."""
    if hasattr(sample, "_fields"):
        return type(sample)(*leaves)
    return tuple(leaves) if isinstance(sample, tuple) else leaves


def _extend(batch: Any, extras: dict[str, Any]) -> Any:
    """The batch with lengths and keep mask behind it, or under their names."""
    if not extras:
        return batch
    if isinstance(batch, Mapping):
        if taken := set(extras) & set(batch):
            raise ValueError(f"samples must not have fields named {sorted(taken)}, which the batch adds: rename them")
        return {**batch, **extras}
    if isinstance(batch, (tuple, list)):
        return type(batch)([*batch, *extras.values()]) if not hasattr(batch, "_fields") else (*batch, *extras.values())
    return (batch, *extras.values())
