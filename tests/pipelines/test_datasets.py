"""KeyedDataset and Keyed: ids of samples, copies, resumed epochs, and the loaders of torchdata."""

from __future__ import annotations

import copy
import operator
import pickle
import uuid
from typing import Any

import naive
import numpy as np
import pytest
import torch
from helpers import oracle
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchdata import nodes
from torchdata.stateful_dataloader import StatefulDataLoader

from msgdrop_numba import Keyed, KeyedDataset, MessageDropoutCollate

EVEN = [torch.arange(20, dtype=torch.float32).reshape(5, 4) + 100 * i + 1 for i in range(6)]
LABELLED = [(s, i) for i, s in enumerate(EVEN)]


def rows_of(batches: Any) -> dict[int, bytes]:
    """Each sample's bytes, by its label."""
    return {
        i: row.numpy().tobytes() for batch, labels in batches for row, i in zip(batch, labels.tolist(), strict=True)
    }


def dropped(seed: int, epoch: int = 0) -> dict[int, bytes]:
    """What every loader must give."""
    want, _ = oracle.dropout(torch.stack(EVEN), seed=seed, epoch=epoch)
    return {i: want[i].tobytes() for i in range(6)}


class Stream(IterableDataset):
    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return iter([(s, i) for i, s in enumerate(EVEN)][start::step])


def name_of(sample: Any) -> str:
    return f"clip-{sample[1]}"


@pytest.mark.processes
def test_keyed_iterable_datasets():
    dataset = KeyedDataset(Stream(), key=name_of)
    assert isinstance(dataset, IterableDataset)
    assert isinstance(dataset, KeyedDataset)
    results = []
    for workers in (0, 2):
        loader = DataLoader(dataset, 2, num_workers=workers, collate_fn=MessageDropoutCollate(0.5, seed=11))
        results.append(rows_of(loader))
    assert results[0] == results[1]
    assert len(results[0]) == 6
    with pytest.raises(TypeError, match="key must be given for an iterable dataset"):
        KeyedDataset(Stream())


def test_keys_of_datasets():
    data = list("abc")
    dataset = KeyedDataset(data)
    assert dataset[1] == Keyed(1, "b")
    assert dataset[-1] == Keyed(2, "c")
    assert dataset[torch.tensor(2)] == Keyed(2, "c")
    assert dataset[np.int64(-1)] == Keyed(2, "c")
    assert KeyedDataset(np.arange(3))[np.array(2)] == Keyed(2, 2)
    assert len(dataset) == 3
    assert dataset.__getitems__([2, 0]) == [Keyed(2, "c"), Keyed(0, "a")]
    an_id = uuid.UUID(int=5)
    for sample_id, key in (
        (-1, 2**64 - 1), (2**64 - 1, 2**64 - 1), ("clip-0001", naive.hash64("clip-0001")),
        (an_id, naive.hash64(an_id.bytes)), (b"\xff", naive.hash64(b"\xff")),
    ):  # fmt: skip
        sample = KeyedDataset([torch.ones(40, 1)], lambda s, sample_id=sample_id: sample_id)[0]
        assert sample.key == sample_id
        batch = MessageDropoutCollate(0.5, seed=1)([sample])
        assert (
            batch[0, :, 0].tolist() == naive.keep_mask((1, 40), 0.5, seed=naive.fold_in(1, 0), keys=[key])[0].tolist()
        )
    for bad in (1.0, None, True, (1,)):
        with pytest.raises(TypeError, match="a sample's key must be"):
            KeyedDataset(data, lambda s, bad=bad: bad)[0]


def test_datasets_and_collates_can_be_copied():
    dataset = KeyedDataset(Stream(), key=name_of)
    collate = MessageDropoutCollate(0.5, seed=3)
    collate.set_epoch(4)
    want = collate(list(dataset))
    for copied in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        assert torch.equal(copied(collate)(list(copied(dataset)))[0], want[0])


def test_a_key_function_that_fails_is_named():
    with pytest.raises(ValueError, match=r"key must give the id.*the sample at index 1.*TypeError"):
        KeyedDataset(list("ab"), lambda s: s + 1)[1]
    with pytest.raises(TypeError, match=r"a sample's key must be.*1.5, for the sample at index 1"):
        KeyedDataset(list("ab"), lambda s: 1.5)[1]
    loader = DataLoader(KeyedDataset(Stream(), operator.itemgetter(5)), 2)
    with pytest.raises(ValueError, match=r"key must give the id.*sample 0 of the iteration.*IndexError"):
        next(iter(loader))


def test_datasets_that_are_none():
    with pytest.raises(TypeError, match="dataset must be a map-style dataset"):
        KeyedDataset(i for i in range(3))
    with pytest.raises(TypeError, match=r"key must be a function.*'id'"):
        KeyedDataset(list("ab"), key="id")

    class Own(KeyedDataset):
        pass

    assert Own("ab")[1] == Keyed(1, "b")
    with pytest.raises(TypeError, match="Own must inherit from IterableDataset"):
        Own(Stream(), key=name_of)


def test_a_dataset_that_fetches_batches_is_asked_for_them():
    class Fetching(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitems__(self, indices):
            return [LABELLED[i] for i in indices]

        def __getitem__(self, index):
            raise AssertionError("one by one")

    assert rows_of(DataLoader(KeyedDataset(Fetching()), 4, collate_fn=MessageDropoutCollate(0.5, seed=11))) == dropped(
        11
    )


def test_ranks_that_share_a_dataset():
    rows: dict = {}
    for rank in range(2):
        sampler = DistributedSampler(LABELLED, num_replicas=2, rank=rank, shuffle=True, seed=3)
        collate = MessageDropoutCollate(0.5, seed=11)
        for thing in (sampler, collate):
            thing.set_epoch(4)
        loader = DataLoader(KeyedDataset(LABELLED), 2, sampler=sampler, collate_fn=collate)
        rows |= rows_of(loader)
    assert rows == dropped(11, 4)


def test_parts_of_a_keyed_dataset_keep_their_ids():
    subset = torch.utils.data.Subset(KeyedDataset(LABELLED), [4, 1])
    rows = rows_of(DataLoader(subset, 2, collate_fn=MessageDropoutCollate(0.5, seed=11)))
    assert rows == {i: dropped(11)[i] for i in (1, 4)}


def test_equal_ids_in_a_batch_get_equal_masks():
    dataset = KeyedDataset([(torch.ones(64, 1), i) for i in range(4)], key=lambda s: s[1] // 2)
    batch, _ = MessageDropoutCollate(0.5, seed=1)(dataset.__getitems__(range(4)))
    assert torch.equal(batch[0], batch[1])
    assert torch.equal(batch[2], batch[3])
    assert not torch.equal(batch[0], batch[2])


def test_state_is_offered_where_there_is_one():
    """As attributes of the object: from Python 3.12 on, a protocol isn't met by what __getattr__ gives."""
    names = {"state_dict", "load_state_dict"}
    for stream in (Stream(), Resumable()):  # a dataset that had a state of no place would not be skipped in
        assert not names & vars(KeyedDataset(stream, key=name_of)).keys()
    assert not names & vars(iter(KeyedDataset(Stream(), key=name_of))).keys()
    for thing in (KeyedDataset(list("abc")), iter(KeyedDataset(Resumable(), key=operator.itemgetter(1)))):
        assert names <= vars(thing).keys()


# ---- other loaders

torchdata_warns = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # its own use of torch


class Resumable(IterableDataset):
    """A stream whose place can be saved: the iterator's, as torchdata asks for it."""

    def __iter__(self):
        return Place(torch.utils.data.get_worker_info())


class Place:
    def __init__(self, worker: Any) -> None:
        self.at, self.step = (worker.id, worker.num_workers) if worker else (0, 1)

    def __next__(self) -> Any:
        if self.at >= len(LABELLED):
            raise StopIteration
        self.at += self.step
        return LABELLED[self.at - self.step]

    def __iter__(self) -> Place:
        return self

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = state["at"]


@torchdata_warns
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.processes)])
@pytest.mark.parametrize("iterable", [False, True])
def test_a_stateful_loader_resumes_in_mid_epoch(workers, iterable):
    keyed = KeyedDataset(Resumable(), key=operator.itemgetter(1)) if iterable else KeyedDataset(LABELLED)

    def loader() -> Any:
        collate = MessageDropoutCollate(0.5, seed=11)
        collate.set_epoch(2)
        return StatefulDataLoader(keyed, 1, num_workers=workers, collate_fn=collate, shuffle=not iterable)

    torch.manual_seed(0)
    first = loader()
    batches, batch_iterator = [], iter(first)
    for _ in range(3):
        batches.append(next(batch_iterator))
    state = pickle.loads(pickle.dumps(first.state_dict()))
    del batch_iterator, first
    again = loader()
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == 3
    assert rows_of(batches) | rows_of(rest) == dropped(11, 2)


@pytest.mark.parametrize("method", ["thread", pytest.param("process", marks=pytest.mark.processes)])
def test_torchdata_nodes(method):
    def pipeline() -> Any:
        source = nodes.MapStyleWrapper(KeyedDataset(LABELLED), torch.utils.data.SequentialSampler(LABELLED))
        batches = nodes.Batcher(source, 2)
        collate = MessageDropoutCollate(0.5, seed=11)
        collate.set_epoch(0)
        return nodes.Loader(nodes.ParallelMapper(batches, collate, num_workers=2, method=method))

    loader = pipeline()
    assert rows_of(loader) == dropped(11)
    batches = iter(loader)
    one = [next(batches)]
    state = loader.state_dict()
    del batches
    again = pipeline()
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == 2
    assert rows_of(one) | rows_of(rest) == dropped(11)
