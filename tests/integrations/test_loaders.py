"""Epochs that arrive by themselves in what installs quickly: masks are a plain loop's, in three epochs and a resumed one."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from helpers.epochs import BATCH, COUNT, STEPS, collate, dataset, epoch_of, epochs_of, ids_of
from torch.utils.data import DataLoader

from benchmarks.timm_here import timm
from msgdrop_numba import EpochSampler

torchdata_warns = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # its own use of torch
WORKERS = [0, pytest.param(1, marks=pytest.mark.processes)]
EPOCHS = [epoch for epoch in range(3) for _ in range(STEPS)]
LEFT = STEPS + 2  # in the middle of the second epoch


def sampled(kind: type, workers: int, **options: Any) -> Any:
    keyed = dataset()
    sampler = EpochSampler(keyed, shuffle=True, seed=3)
    more = {"num_workers": workers, "persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
    return kind(keyed, BATCH, sampler=sampler, collate_fn=collate(), **more, **options)


def whole(batches: list[Any]) -> None:
    """Three epochs, each sample once in each."""
    assert epochs_of(batches) == EPOCHS
    for epoch in range(3):
        assert sorted(ids_of(batches[epoch * STEPS : (epoch + 1) * STEPS])) == list(range(COUNT))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_plain_loop(workers):
    loader = sampled(DataLoader, workers)
    batches = [batch for _ in range(3) for batch in loader]
    whole(batches)
    again = sampled(DataLoader, workers)
    again.sampler.set_epoch(1)
    assert epochs_of(again) == [1] * STEPS


@torchdata_warns
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("with_sampler", [True, False])
def test_stateful_data_loader(workers, with_sampler):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")

    def made() -> Any:
        if with_sampler:
            return sampled(stateful.StatefulDataLoader, workers)
        more = {"persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
        return stateful.StatefulDataLoader(dataset(), BATCH, num_workers=workers, collate_fn=collate(), **more)

    loader, batches = made(), []
    for epoch in range(2):
        if not with_sampler:
            loader.dataset.set_epoch(epoch)
        for batch in loader:
            batches.append(batch)
            if len(batches) == LEFT:
                break
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    again = made()
    again.load_state_dict(state)
    batches += list(again)  # of the epoch that was left, with nothing said
    if not with_sampler:
        assert again.dataset.epoch == 1
        again.dataset.set_epoch(2)
    whole(batches + list(again))
    after = made()
    after.load_state_dict(pickle.loads(pickle.dumps(again.state_dict())))  # of an epoch that is over
    if not with_sampler:
        after.dataset.set_epoch(3)
    assert epochs_of(after) == [3] * STEPS


@pytest.mark.parametrize("method", ["thread", pytest.param("process", marks=pytest.mark.processes)])
def test_torchdata_nodes(method):
    nodes = pytest.importorskip("torchdata.nodes", reason="needs torchdata")

    def made() -> Any:
        keyed = dataset()
        indices = nodes.SamplerWrapper(EpochSampler(keyed, shuffle=True, seed=3))
        samples = nodes.ParallelMapper(indices, keyed.__getitem__, num_workers=1, method=method)
        return nodes.Loader(nodes.Mapper(nodes.Batcher(samples, BATCH), collate()))

    loader = made()
    batches = list(loader)
    second = iter(loader)
    batches += [next(second) for _ in range(LEFT - STEPS)]
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    del second
    again = made()
    again.load_state_dict(state)
    whole(batches + list(again) + list(again))


@pytest.mark.parametrize("seedable", [True, False])
@pytest.mark.parametrize("with_sampler", [True, False])
def test_accelerate_on_two_ranks(seedable, with_sampler):
    """Both ranks in one process: what the sampler's order needs, and what is told to whom, is the same in two."""
    accelerate = pytest.importorskip("accelerate.data_loader", reason="needs accelerate")
    ranks = []
    for rank in range(2):
        keyed = dataset()
        told = {"sampler": EpochSampler(keyed, shuffle=True, seed=3)} if with_sampler else {}
        loader = DataLoader(keyed, BATCH, collate_fn=collate(), **told)
        ranks.append(
            accelerate.prepare_data_loader(
                loader, num_processes=2, process_index=rank, put_on_device=False, use_seedable_sampler=seedable
            )
        )
    batches = [[list(loader) for _ in range(3)] for loader in ranks]
    whole([batch for epoch in range(3) for rank in range(2) for batch in batches[rank][epoch]])
    resumed = accelerate.skip_first_batches(ranks[0], 1)
    resumed.set_epoch(1)
    assert epochs_of(resumed) == [1] * (STEPS // 2 - 1)


def test_accelerate_with_its_seedable_sampler_on_two_ranks():
    """It skips the dataset there, and a collate that knows of no epoch says which line to add."""
    accelerate = pytest.importorskip("accelerate.data_loader", reason="needs accelerate")
    loader = accelerate.prepare_data_loader(
        DataLoader(dataset(), BATCH, shuffle=True, collate_fn=collate()), num_processes=2, process_index=0,
        put_on_device=False, use_seedable_sampler=True,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"sampler=EpochSampler\(dataset\)"):
        assert {epoch_of(batch) for _ in range(4) for batch in loader} == {0}


@pytest.mark.parametrize("workers", WORKERS)
def test_timms_loader_that_fetches_the_next_epoch(workers):
    loader = sampled(timm().data.loader.MultiEpochsDataLoader, workers)
    batches = []
    for epoch in range(3):  # as its train.py has it
        loader.dataset.set_epoch(epoch)
        batches += list(loader)
    whole(batches)
