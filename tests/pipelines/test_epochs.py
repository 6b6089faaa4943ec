"""Epochs that arrive by themselves: of datasets, samples, indices and samplers, and a collate that was told of none."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers.epochs import BATCH, COUNT, DATA, STEPS, collate, dataset, epoch_of, epochs_of, ids_of
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Subset,
    WeightedRandomSampler,
)

from msgdrop_numba import EpochSampler, Keyed, KeyedDataset, MessageDropoutCollate
from msgdrop_numba.pipelines.epochs import EpochIndex


class Told:
    """A dataset that wants to know, and has a state."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def __getitem__(self, index: int) -> Any:
        assert type(index) is int
        return DATA[index]

    def __len__(self) -> int:
        return COUNT

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": list(self.epochs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = list(state["epochs"])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(DATA)


def id_of(sample: dict[str, Any]) -> int:
    return sample["id"]


BAD = [(-1, ValueError), (2**63, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError), ("1", TypeError)]


# ---- datasets and samples


def test_a_sample_carries_its_epoch_beside_the_pair():
    told = Keyed("a", 1, 3)
    key, sample = told
    assert (key, sample, told.epoch, Keyed("a", 1).epoch) == ("a", 1, 3, None)
    assert repr(told) == "Keyed(key='a', sample=1, epoch=3)"
    assert repr(Keyed("a", 1)) == "Keyed(key='a', sample=1)"
    for again in (copy.deepcopy(told), pickle.loads(pickle.dumps(told)), told._replace(key="a")):
        assert (type(again), again, again.epoch) == (Keyed, told, 3)
    assert told._replace(sample=2, epoch=4).epoch == 4
    assert torch.utils.data.default_collate([told, told]).sample.tolist() == [1, 1]


def test_a_dataset_gives_its_epoch_and_tells_the_wrapped_one():
    keyed = KeyedDataset(Told())
    assert (keyed.epoch, keyed[0].epoch) == (None, None)
    keyed.set_epoch(0)
    keyed.set_epoch(np.int64(2))
    assert (keyed.epoch, keyed[1].epoch, keyed.__getitems__([0, 1])[1].epoch) == (2, 2, 2)
    assert keyed.dataset.epochs == [0, 2]
    carried = [EpochIndex(1, 5), EpochIndex(2, 6)]
    assert [sample.epoch for sample in keyed.__getitems__(carried)] == [5, 6]
    assert type(keyed[carried[0]].key) is int
    assert keyed.__getitems__([]) == []
    stream = KeyedDataset(Stream(), id_of)
    first = iter(stream)
    stream.set_epoch(1)  # before its first sample
    assert next(first).epoch == 1
    stream.set_epoch(2)
    assert (next(first).epoch, next(iter(stream)).epoch) == (1, 2)


@pytest.mark.parametrize(("epoch", "error"), BAD)
def test_bad_epochs_of_datasets(epoch, error):
    keyed = dataset()
    keyed.set_epoch(1)
    for told in (keyed, KeyedDataset(Stream(), id_of), EpochSampler(keyed)):
        with pytest.raises(error, match="epoch must be"):
            told.set_epoch(epoch)
    assert keyed.epoch == 1
    if epoch is not None:
        with pytest.raises(error, match="epoch must be"):
            collate()([Keyed(0, DATA[0], epoch)])


def test_the_state_of_a_dataset_holds_its_epoch():
    keyed = KeyedDataset(Told())
    keyed.set_epoch(3)
    state = pickle.loads(pickle.dumps(keyed.state_dict()))
    again, later = KeyedDataset(Told()), KeyedDataset(Told())
    later.set_epoch(4)  # announced before a loader hands on the state of the epoch that is over
    later.load_state_dict(state)
    assert (later.epoch, later.dataset.epochs) == (4, [3])
    again.load_state_dict(state)
    assert (again.epoch, again.dataset.epochs) == (3, [3])
    again.load_state_dict({"epochs": [7]})  # the wrapped one's alone, as it was saved once
    assert (again.epoch, again.dataset.epochs) == (3, [7])
    untold = dataset()
    untold.load_state_dict(dataset().state_dict())
    assert untold.epoch is None

    class Counted(Told):
        def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
            return {"epochs": [num_samples, from_beginning]}

    for counted in (
        KeyedDataset(Counted()).state_dict(6, True),
        KeyedDataset(Counted()).state_dict(6, from_beginning=1),
    ):
        assert counted == {"keyed_epoch": None, "dataset": {"epochs": [6, True]}}
    assert untold.state_dict(6, True) == {"keyed_epoch": None}

    class Own(KeyedDataset):
        def state_dict(self) -> dict[str, Any]:
            return {"own": 1}

    assert Own(DATA).state_dict() == {"own": 1}


def test_copies_of_a_dataset_have_an_epoch_of_their_own():
    keyed = dataset()
    keyed.set_epoch(3)
    for again in (copy.deepcopy(keyed), pickle.loads(pickle.dumps(keyed))):
        assert again.epoch == 3
        again.set_epoch(2)
        assert keyed.epoch == 3
        again.load_state_dict(keyed.state_dict())
        assert again.epoch == 3


# ---- the collate


def test_the_samples_epoch_counts():
    keyed, dropping = dataset(), collate()
    for epoch in (2, 0, 1):
        keyed.set_epoch(epoch)
        assert epoch_of(dropping(keyed.__getitems__(range(4)))) == epoch
    dropping.set_epoch(1)
    assert epoch_of(dropping(keyed.__getitems__(range(4)))) == 1
    dropping.set_epoch(2)
    with pytest.raises(ValueError, match="the samples bring 1 and set_epoch of the collate said 2"):
        dropping(keyed.__getitems__(range(4)))


def test_explaining_a_sample_takes_its_epoch_and_is_no_batch():
    keyed, dropping = dataset(), collate()
    for _ in range(2):
        assert "seed 11, epoch 0: " in str(dropping.explain(keyed[0]))
    dropping(keyed.__getitems__(range(4)))
    keyed.set_epoch(2)
    assert "seed 11, epoch 2: " in str(dropping.explain(keyed[0]))


@pytest.mark.parametrize("epochs", [(1, 2), (None, 1), (1, None)])
def test_a_batch_is_of_one_epoch(epochs):
    samples = [Keyed(i, DATA[i], epoch) for i, epoch in enumerate(epochs)]
    with pytest.raises(ValueError, match=r"of one epoch, but have \[.*\], with the keys \[0, 1\]"):
        collate()(samples)
    assert len(MessageDropoutCollate(0.5, fields="x")(samples)["x"]) == 2  # no seed, no epoch


# ---- samplers


def made(sampler: Any, data: Any, **options: Any) -> DataLoader:
    return DataLoader(data, BATCH, sampler=sampler, collate_fn=collate(), **options)


def test_every_pass_is_an_epoch():
    keyed = dataset()
    loader = made(EpochSampler(keyed, shuffle=True, seed=3), keyed)
    passes = [list(loader) for _ in range(3)]
    assert [epochs_of(batches) for batches in passes] == [[epoch] * STEPS for epoch in range(3)]
    orders = [ids_of(batches) for batches in passes]
    assert all(sorted(order) == list(range(COUNT)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epoch_of(next(iter(loader))) == 3  # one that is broken off, too
    assert epoch_of(next(iter(loader))) == 4
    again = EpochSampler(dataset(), shuffle=True, seed=3)
    again.set_epoch(1)
    assert list(again) == orders[1]  # of seed and epoch alone
    other = EpochSampler(dataset(), shuffle=True, seed=4)
    other.set_epoch(0)
    assert list(other) != orders[1]  # not of their sum


def test_an_announced_epoch_is_the_next_passs():
    keyed = dataset()
    sampler = EpochSampler(keyed)
    early = iter(sampler)
    sampler.set_epoch(2)
    first = next(early)  # until the first index is asked for
    keyed.set_epoch(5)
    assert (first.epoch, next(early).epoch, sampler.epoch) == (2, 2, 5)
    for told in (4, 4):
        keyed.set_epoch(told)  # the same again, said by the dataset
        assert {index.epoch for index in sampler} == {4}
    assert {index.epoch for index in sampler} == {5}
    assert len(sampler) == COUNT
    assert len(EpochSampler(keyed, [3, 1])) == 2


def test_samplers_of_all_kinds():
    keyed = dataset()
    ranks = [EpochSampler(keyed, DistributedSampler(keyed, 2, rank, seed=3)) for rank in range(2)]
    for epoch in (0, 1):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        batches = [batch for sampler in ranks for batch in made(sampler, keyed)]
        assert epochs_of(batches) == [epoch] * STEPS
        want = []
        for rank in range(2):
            theirs = DistributedSampler(keyed, 2, rank, seed=3)
            theirs.set_epoch(epoch)
            want += list(theirs)
        assert ids_of(batches) == want
    weighted = EpochSampler(keyed, WeightedRandomSampler([1.0] * COUNT, 6))
    assert [epochs_of(made(weighted, keyed)) for _ in range(2)] == [[1] * 3, [2] * 3]
    batches = BatchSampler(EpochSampler(keyed, np.arange(COUNT)), 3, drop_last=True)
    loader = DataLoader(keyed, batch_sampler=batches, collate_fn=collate())
    assert epochs_of(loader) == [2, 2]
    tensors = EpochSampler(keyed, torch.arange(COUNT))
    assert [index.epoch for index in tensors] == [2] * COUNT
    whole = EpochSampler(keyed, BatchSampler(range(COUNT), 4, False))  # no indices, lists of them: by the dataset
    loader = DataLoader(keyed, batch_size=None, sampler=whole)
    keyed.set_epoch(3)
    assert [sample.epoch for sample in keyed.__getitems__(next(iter(whole)))] == [3] * 4
    assert loader.sampler is whole


def test_parts_and_joins_of_keyed_datasets():
    keyed = dataset()
    part = Subset(keyed, [5, 2, 7])
    loader = DataLoader(part, 2, sampler=EpochSampler(part), collate_fn=collate())
    assert [epochs_of(loader) for _ in range(2)] == [[0, 0], [1, 1]]
    joined = ConcatDataset([KeyedDataset(DATA[:3], id_of), Subset(KeyedDataset(DATA[3:], id_of), [0, 1])])
    loader = DataLoader(joined, 2, sampler=EpochSampler(joined, shuffle=True), collate_fn=collate())
    assert [epochs_of(loader) for _ in range(2)] == [[0] * 3, [1] * 3]
    loader.sampler.set_epoch(4)
    assert epochs_of(loader) == [4] * 3


def test_bad_samplers():
    for data in (DATA, Subset(DATA, [1])):
        with pytest.raises(
            TypeError, match=r"dataset must be a KeyedDataset, or hold one, but got (list|Subset): wrap"
        ):
            EpochSampler(data)
    with pytest.raises(TypeError, match="dataset must be map-style"):
        EpochSampler(KeyedDataset(Stream(), id_of))
    with pytest.raises(TypeError, match="sampler must give indices, but got 3"):
        EpochSampler(dataset(), 3)
    with pytest.raises(ValueError, match="shuffle=True can't be used with sampler"):
        EpochSampler(dataset(), range(3), shuffle=True)
    with pytest.raises(ValueError, match="seed must be"):
        EpochSampler(dataset(), seed=-1)


def test_indices_survive_what_loaders_do_to_them():
    index = EpochIndex(3, 7)
    for again in (pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        assert (type(again), again, again.epoch) == (EpochIndex, 3, 7)
    assert DATA[index]["id"] == 3
    sampler = pickle.loads(pickle.dumps(EpochSampler(dataset(), shuffle=True, seed=3)))
    assert list(sampler) == list(EpochSampler(dataset(), shuffle=True, seed=3))


@pytest.mark.processes
def test_nothing_that_is_fetched_ahead_is_of_another_epoch():
    """Both epochs' indices are on their way at once; the dataset alone would give all of them the second."""
    keyed = dataset()
    sampler = EpochSampler(keyed)
    loader = made(sampler, keyed, num_workers=1, prefetch_factor=4)
    first = iter(loader)
    head = [next(first)]
    second = iter(loader)
    rest = [next(second)]
    assert epochs_of(head + list(first)) == [0] * STEPS
    assert epochs_of(rest + list(second)) == [1] * STEPS


# ---- told of none


def test_a_sample_that_comes_again_is_said_once():
    keyed, dropping = KeyedDataset(DATA, lambda sample: f"clip-{sample['id']}"), collate()
    batches = [[0, 1, 2], [3, 4, 5]]
    for at in batches:
        dropping(keyed.__getitems__(at))
    with pytest.warns(UserWarning, match=r"key 'clip-0' comes again.*dataset.set_epoch\(epoch\).*EpochSampler") as said:
        dropping(keyed.__getitems__([5, 2, 0]))
    assert len(said) == 1
    assert said[0].filename == __file__
    for at in batches:
        dropping(keyed.__getitems__(at))


@pytest.mark.parametrize(
    "quiet",
    [
        lambda keyed, dropping: keyed.set_epoch(0),
        lambda keyed, dropping: dropping.set_epoch(0),
        lambda keyed, dropping: setattr(dropping, "seed", None),
    ],
)
def test_nothing_is_said_where_an_epoch_was_set_or_none_matters(quiet):
    keyed, dropping = dataset(), collate()
    quiet(keyed, dropping)
    for _ in range(3):
        dropping(keyed.__getitems__(range(4)))


def test_a_collate_that_drops_nothing_says_nothing():
    for dropping in (MessageDropoutCollate(0.0, fields="x", seed=1), MessageDropoutCollate(0, fields="x", seed=1)):
        for _ in range(3):
            dropping(dataset().__getitems__(range(4)))
    dropping = MessageDropoutCollate(0.5, fields="x", seed=1)
    for key in (-1, 2**64 - 2, 2**63, 0):  # other samples
        dropping([Keyed(key, DATA[0])])
    with pytest.warns(UserWarning, match="key -1 comes again"):
        dropping([Keyed(5, DATA[0]), Keyed(-1, DATA[0])])


@pytest.mark.processes
def test_it_is_seen_where_each_epoch_has_workers_of_its_own():
    """Counted, not raised: a pass that raised lives on with its traceback, and its workers are waited for."""
    said = torch.zeros(3, dtype=torch.int64).share_memory_()
    current = torch.zeros(1, dtype=torch.int64).share_memory_()

    def count(worker: int) -> None:
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *others: said[int(current)].add_("comes again" in str(message))

    loader = DataLoader(
        dataset(), BATCH, shuffle=True, num_workers=2, collate_fn=collate(), worker_init_fn=count,
        multiprocessing_context="fork",
    )  # fmt: skip
    for epoch in range(3):
        current.fill_(epoch)
        list(loader)
    assert said.tolist() == [0, 1, 0]
