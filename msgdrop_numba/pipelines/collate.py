"""MessageDropoutCollate: message dropout while a DataLoader builds its batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msgdrop_numba.call import select
from msgdrop_numba.call.arguments import ZERO, check_is_number, check_key, check_seed
from msgdrop_numba.call.keys import hash64
from msgdrop_numba.call.request import Options
from msgdrop_numba.call.threads import load
from msgdrop_numba.functional import fold_in
from msgdrop_numba.pipelines.datasets import split_keys
from msgdrop_numba.pipelines.epochs import EpochMemory
from msgdrop_numba.pipelines.explain import Explanation, explained
from msgdrop_numba.pipelines.fields import (
    Field,
    Path,
    at,
    collate,
    column,
    companions_of,
    extend,
    find,
    leaves,
    requested,
    source,
)
from msgdrop_numba.pipelines.removal import Removal
from msgdrop_numba.pipelines.returned import drop_in, request_in
from msgdrop_numba.pipelines.rows import Each, Own, check_removal, read_each, read_p, sources
from msgdrop_numba.pipelines.shown import of_collate
from msgdrop_numba.pipelines.stack import Padding, Stack, called, padded
from msgdrop_numba.tensors.seeds import fresh_seed


class MessageDropoutCollate:
    """A `DataLoader(collate_fn=...)` that drops messages while it builds the batch: one pass, no stacked copy first.

    Dropped messages are filled, or with `remove` left out: the batch then is as small as what is kept.

    Samples are arrays or tensors `(messages, *features)`, or tuples, lists or dicts with such fields; all other
    leaves go through torch's `default_collate`. Without `seed` each batch draws from torch's default generator, which a
    DataLoader seeds in every worker. With `seed` a sample's mask depends on seed, epoch and its id alone, whatever the
    workers, batches and ranks are; ids and epochs come from a `KeyedDataset`. There is no eval mode: for validation
    make another collate with p=0 and the same options, which drops and draws nothing, and whose batches have the same
    parts.

    Args:
        p: probability that a message is **dropped**, in [0, 1]; or a range, a tuple `(lo, hi)`, of which each sample
            draws its own; or an array, one a position, for at least as many positions as the longest sample has; or
            where each sample's own p is, a number in it: a field's name, a path with a name in it, or a function of the
            (bare) sample. `exact` takes no array and no samples' own. Or a `Rule`, which holds `exact` to `prefix` too.
        fields: index, name or list of them: where messages are dropped; all of them drop the same ones. A tuple is a
            path into nested samples, `("inputs", "audio")`. None: the sample itself where it is an array, its first
            element where it is a tuple or list. A dict sample must name them. For fields with masks of their own, a
            dict from each to the name of its mask, `{"audio": "av", "video": "av", "text": "text"}`.
        pad: pad the fields to the longest sample and add `lengths` (int64, one a sample): `(batch, lengths)` for
            arrays, appended to tuples (a named one becomes a plain one), under `"lengths"` in dicts; where masks have
            names, a dict of them by name. Padding is never dropped.
        pad_value: number that padding holds.
        seed: integer in [0, 2**64); needs the samples' ids, without which every epoch would repeat its masks.
        collate_fn: a collate function of your own: it gets the bare samples and returns as many rows in the same
            order, in which messages are then dropped in place, its own padding too, and the dataset itself if it
            returns the samples' own memory. Not with `pad`.
        scale, exact, span, min_keep, fill: as for `message_dropout`; a vector fill may be an array or a tensor.
        prefix: the first so many messages of each sample take no part, all where it has fewer.
        protect: where each sample says which of its messages take no part: the name, index or path of a field of bools
            `(messages,)`, True = takes no part, or a function of the (bare) sample that gives such. The field stays in
            the batch; with `pad` it is padded with True, and so is what torch calls a `key_padding_mask`. One serves
            all masks. With `collate_fn` it may be shorter than what that returned: what lies behind takes no part.
        positions: what the draws number messages by in place of their index: an integer, the position of each sample's
            first message; or where each sample has its own, integers `(messages,)` in [0, 2**34): a field's name, a
            path with a name in it, or a function of the sample. With `pad` the field is padded with 0, as int64.
        return_mask: add the keep mask after the lengths, or under `"keep_mask"`, as the lengths are: a tensor, or an
            array where `collate_fn` returned arrays. With `remove` it is over the samples' own messages all the same.
        remove: take kept messages alone, in their order, by the same masks: `(batch, slots, *features)`. Samples may
            be of different lengths without `pad` then, and those that keep fewer than the longest are padded with
            `pad_value`; `lengths` are added as with `pad`, the counts of what is kept. But with `exact`, p one number,
            and no `protect`, equally long samples keep as many each: then they must be equally long, and no lengths are
            added, unless `pad=True`. Not with `collate_fn` nor `fill`.
        companions: with `remove`, further fields that lose the same messages, named as `fields` are: arrays or tensors
            `(messages, *features)` or `(messages,)` of any dtype, labels or times, padded with `pad_value`. Where
            fields have masks of several names, a dict from each to the name of its mask. The fields that `protect` and
            `positions` name are companions too, padded with True and 0 (int64); where there are several masks, of the
            one that `companions` gives them, else they stay as they are without `remove`.
        return_indices: with `remove`, add `indices` after the lengths or under `"indices"`, as the lengths are: int64
            `(batch, slots)`, the place that each message had in its sample, -1 in padding.

    Samples that aren't contiguous, or not in the machine's byte order, are copied before messages are dropped. In
    workers the fields and the keep mask are made in shared memory; lengths and other leaves are what torch makes of
    them. Functions go to spawned workers by pickle, which takes those that a module defines, no lambdas.

    Raises:
        TypeError, ValueError: an argument is wrong; at a call: samples that don't fit together, naming the field, the
            sample's position and its key.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from msgdrop_numba import KeyedDataset
        >>> frames = [torch.randn(n, 12) for n in (7, 9, 8)]
        >>> collate = MessageDropoutCollate(0.3, pad=True, seed=1)
        >>> batch, lengths = next(iter(DataLoader(KeyedDataset(frames), batch_size=3, collate_fn=collate)))
        >>> batch.shape, lengths
        (torch.Size([3, 9, 12]), tensor([7, 9, 8]))

        Half of each sample's messages removed, and of their labels:

        >>> samples = [(torch.randn(8, 12), torch.arange(8)) for _ in range(4)]
        >>> batch, labels = MessageDropoutCollate(0.5, exact=True, remove=True, companions=1)(samples)
        >>> batch.shape, labels.shape
        (torch.Size([4, 4, 12]), torch.Size([4, 4]))

        Nested samples, two of whose fields share a mask:

        >>> import operator
        >>> samples = [{"id": f"clip-{n}", "in": {"audio": torch.ones(n, 40), "video": torch.ones(n, 3, 8, 8)},
        ...             "text": torch.ones(9, 16)} for n in (120, 80)]
        >>> fields = {("in", "audio"): "av", ("in", "video"): "av", "text": "text"}  # each with the name of its mask
        >>> collate = MessageDropoutCollate(0.3, fields=fields, pad=True, seed=1)
        >>> dataset = KeyedDataset(samples, key=operator.itemgetter("id"))  # workers that are spawned take no lambda
        >>> batch = next(iter(DataLoader(dataset, batch_size=2, collate_fn=collate)))
        >>> batch["in"]["video"].shape, batch["lengths"], batch["id"]
        (torch.Size([2, 120, 3, 8, 8]), {'av': tensor([120,  80]), 'text': tensor([9, 9])}, ['clip-120', 'clip-80'])

    Source: the mask contract, version 1.1 (CONTRACT.md).
    """

    __module__ = "msgdrop_numba"  # where a pickle looks for it, wherever it stands

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
        prefix: int = 0,
        protect: Any = None,
        positions: Any = None,
        fill: Any = ZERO,
        return_mask: bool = False,
        remove: bool = False,
        companions: Any = None,
        return_indices: bool = False,
    ) -> None:
        if pad and collate_fn is not None:
            raise ValueError("pad=True can't be used with collate_fn, which pads for itself: leave one out")
        if remove and collate_fn is not None:
            raise ValueError("remove=True can't be used with collate_fn, which has copied all messages: leave one out")
        if collate_fn is not None and not callable(collate_fn):
            raise TypeError(f"collate_fn must be a function from the samples to a batch, but got {collate_fn!r}")
        keywords = exact, span, min_keep, prefix
        rule, array, self._offset, self._own = sources(p, keywords, protect, positions, source)
        self._masks = requested(fields)
        self.seed = None if seed is None else check_seed(seed)
        self.collate_fn = collate_fn
        self.return_mask = return_mask
        check_removal(remove, companions, return_indices, fill)
        self.remove, self.return_indices = remove, return_indices
        self._companions = companions_of(companions, self._masks)
        if not isinstance(fill, (Tensor, np.ndarray)):
            check_is_number("fill", fill)
        check_is_number("pad_value", pad_value)
        if isinstance(fill, np.ndarray):
            fill = torch.from_numpy(fill.copy())
        fill = fill.detach() if isinstance(fill, Tensor) else fill
        self._options = Options(rule, array, scale, fill, message_dims=2)
        self._draws = rule.p != 0
        # Not by what the samples of one batch are: all batches have the same parts.
        even = rule.exact and not rule.ranged and "protect" not in self._own
        self._padding = Padding(pad or (remove and not even), pad_value)
        load()  # workers made by fork inherit the compiled kernels
        if remove:
            select.load()
        self._epoch = EpochMemory()

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks from the next batch on: call before each epoch, as with `DistributedSampler`.

        Where the dataset's own `set_epoch` is called, this one isn't needed: samples that bring their epoch have it
        counted, and what is set here must be the same. A running persistent worker sees it too: the workers of a
        DataLoader, however they are started, follow their collate. Copies made by deepcopy or pickle keep the epoch
        that they had, and have one of their own from then on.

        Args:
            epoch: integer in [-2**63, 2**64); 0 until it is set. No loader saves it, as a `StatefulDataLoader` does the
                dataset's: set it again in a resumed run.

        Raises:
            TypeError, ValueError: it is no integer, or out of range.

        Example:
            >>> MessageDropoutCollate(0.3, seed=1).set_epoch(5)
        """
        self._epoch.set(check_key("epoch", epoch))

    def explain(self, sample: Any) -> Any:
        """Why messages of a sample drop in this epoch.

        Args:
            sample: what the `KeyedDataset` gives, `dataset[17]` say.

        Returns:
            An object that prints it: the sample's key, the epoch's seed, which messages drop and by which rule. Its
            fields, `keep`, `draws`, `p`, `takes_part` and so on, hold the same as numbers. Where masks have names, a
            dict of such by name.

        Raises:
            TypeError, ValueError: there is no seed, so that each batch draws anew; or as at a call.

        Example:
            >>> dataset = KeyedDataset([torch.ones(9, 4)])
            >>> MessageDropoutCollate(0.3, seed=1).explain(dataset[0])
            sample 0, row key 0; seed 1, epoch 0: draws from 5061141740306754273
            2 of 9 messages drop: 2-3
            because a message drops where its draw lies below p = 0.3
        """
        if self.seed is None:
            raise ValueError("explain needs a collate with a seed: without one each batch draws anew")
        ids, row_keys, epochs, samples = split_keys([sample])
        seed = self._seed(row_keys, ids, epochs, watched=False)
        assert ids is not None  # else it has been refused
        given, keys = (self.seed, self._epoch.of_batch(epochs, ids) or 0), np.array(row_keys, np.uint64)
        own = self._read_own(samples, ids)[0] if self._own or self._offset else None
        batch = samples[0] if self.collate_fn is None else self.collate_fn(samples)
        found: dict[str | None, Explanation] = {}
        for path, (label, mask) in self._find(batch).items():
            x, of_mask = at(batch, path), _mask_seed(seed, mask)
            if self.collate_fn is None:
                request, size = Stack(self._options, self._padding, of_mask, ids, keys, own).request(label, x)
            else:
                request, size = request_in(self._options, {label: x}, of_mask, keys, own), x.shape[1]
            found[mask] = explained(ids[0], given, request, size)
        return found.get(None, found)

    def __repr__(self) -> str:
        return of_collate(self)

    def __getstate__(self) -> dict[str, Any]:
        """The paths as plain tuples: a pickle names no inner class."""
        masks = None if self._masks is None else {path: tuple(field) for path, field in self._masks.items()}
        companions = {path: tuple(field) for path, field in self._companions.items()}
        plain = {
            "_masks": masks, "_companions": companions, "_options": self._options.state(),
            "_padding": tuple(self._padding), "_epoch": self._epoch.numbers,
        }  # fmt: skip
        return {**self.__dict__, **plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._options, self._padding = Options.of_state(state["_options"]), Padding(*self._padding)
        if self._masks is not None:
            self._masks = {path: Field(*field) for path, field in self._masks.items()}
        self._companions = {path: Field(*field) for path, field in self._companions.items()}
        self._epoch = EpochMemory(state["_epoch"])

    def __call__(self, samples: list[Any]) -> Any:
        if not isinstance(samples, list):
            raise TypeError(
                f"samples must be a list, the samples of a batch, but got {type(samples).__name__}; "
                "a DataLoader with batch_size=None has no batches to drop in"
            )
        ids, row_keys, epochs, samples = split_keys(samples)
        seed = self._seed(row_keys, ids, epochs)
        keys = None if row_keys is None else np.array(row_keys, np.uint64)
        own, brought = self._read_own(samples, ids) if self._own or self._offset else (None, {})
        extras: dict[str, dict[str | None, Any]] = {}
        if self.collate_fn is None:
            fields = self._find(samples[0])
            kind: type[Stack] = Removal if self.remove else Stack
            stacks: dict[str | None, Any] = {}
            for field in fields.values():
                if field.mask not in stacks:
                    seed_of = _mask_seed(seed, field.mask)
                    stacks[field.mask] = kind(self._options, self._padding, seed_of, ids, keys, own)
            build = self._beside(samples, fields, brought, stacks) if brought or self._companions else {}
            for path, field in fields.items():
                build[path] = partial(stacks[field.mask].build, field.label)
            batch = collate(samples, build)
            if self._padding.wanted:
                extras["lengths"] = {mask: torch.tensor(stack.counts(), device="cpu") for mask, stack in stacks.items()}
            if self.return_indices:
                extras["indices"] = {mask: stack.indices() for mask, stack in stacks.items()}
            if self.return_mask:
                extras["keep_mask"] = {mask: stack.mask() for mask, stack in stacks.items()}
        else:
            batch, sharing = self.collate_fn(samples), {}
            keys = np.arange(len(samples), dtype=np.uint64) if keys is None else keys
            fields = self._find(batch)
            for mask in dict.fromkeys(field.mask for field in fields.values()):
                found = {field.label: at(batch, path) for path, field in fields.items() if field.mask == mask}
                sharing[mask] = found, request_in(self._options, found, _mask_seed(seed, mask), keys, own)
            keep = {mask: drop_in(*fields_and_request) for mask, fields_and_request in sharing.items()}
            if self.return_mask:
                extras["keep_mask"] = keep
        return extend(batch, {name: by_mask.get(None, by_mask) for name, by_mask in extras.items()})

    def _find(self, sample: Any) -> dict[Path, Field]:
        """The fields in a sample, or in what collate_fn returned."""
        if self.collate_fn is None:
            return find(self._masks, sample, "a sample", even=not self._padding.wanted)
        return find(self._masks, sample, "what collate_fn returned", dims=3, even=False)

    def _beside(
        self, samples: list[Any], fields: dict[Path, Field], brought: dict[Path, Each], stacks: dict[str | None, Any]
    ) -> dict[Path, Callable[[list[Any]], Any]]:
        """Build the leaves beside the fields that are as long as those: companions, and samples' own values."""
        companion_fields = find(self._companions, samples[0], "a sample", "companions") if self._companions else {}
        if both := [companion_fields[path].label for path in companion_fields if path in fields]:
            raise ValueError(f"companions must not be among fields too, but {both[0]} is: leave it out")
        alone = list(stacks) if self.remove and len(stacks) == 1 else []
        masks = {path: mask for path in brought for mask in alone}
        masks |= {path: companion.mask for path, companion in companion_fields.items()}
        firsts = {field.mask: (field.label, path) for path, field in reversed(fields.items())}

        def build(path: Path, values: list[Any]) -> Any:
            if path not in masks:
                return padded(brought[path])
            stack = stacks[masks[path]]
            if stack.lengths is None:  # it lies before the first field in the sample
                label, first = firsts[masks[path]]
                stack.look(label, column(samples, first))
            return (
                stack.own_leaf(brought[path].name)
                if path in brought
                else stack.companion(companion_fields[path].label, values)
            )

        left = brought if self._padding.wanted else {}
        return {path: partial(build, path) for path in {**left, **masks}}

    def _seed(self, keys: list[int] | None, ids: list[Any] | None, epochs: list[Any], watched: bool = True) -> int:
        if self.seed is None:
            return fresh_seed(None) if self._draws else 0
        if keys is None or ids is None:
            raise ValueError(
                f"seed={self.seed} needs the samples' ids, or every batch would repeat the masks of the one before: "
                "wrap the dataset in KeyedDataset, or leave seed out"
            )
        epoch = self._epoch.of_batch(epochs, ids)
        if epoch is None and watched and self._draws:
            self._epoch.warn_of_repeats(keys, ids)
        return _epoch_seed(self.seed, epoch or 0)

    def _read_own(self, samples: list[Any], ids: list[Any] | None) -> tuple[Own, dict[Path, Each]]:
        """The samples' own values, and their leaves with a value for each message, by path."""

        def name(row: int) -> str:
            return called(row, ids)

        read: dict[str, Any] = {"p": None, "protect": None, "positions": self._offset}
        found: dict[Path, Each] = {}
        for argument, where in self._own.items():
            path, place, values = leaves(argument, where, samples, name)
            if argument == "p":
                read["p"] = read_p(values, place, name)
                continue
            read[argument] = read_each(argument, values, place, name)
            if path is not None:
                found[path] = read[argument]
        return Own(name, **read), found


_epoch_seed = lru_cache(maxsize=64)(fold_in)  # the same for all batches of an epoch


def _mask_seed(seed: int, mask: str | None) -> int:
    """The seed of the mask of this name, or of the one that has none."""
    return seed if mask is None else fold_in(seed, hash64(mask.encode()))
