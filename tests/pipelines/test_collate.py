"""MessageDropoutCollate: batches, masks, keys, seeds and epochs."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import naive
import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.samples import EVEN, LENGTHS, SAMPLES
from torch.utils.data import DataLoader

from msgdrop_numba import Keyed, KeyedDataset, MessageDropoutCollate, fold_in, keep_mask, message_dropout


class Clip(NamedTuple):
    audio: Any
    label: int


def padded(samples: list, pad_value: float = 0.0) -> Any:
    return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=pad_value)


# ---- batches


@pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.numpy(), lambda t: t.numpy().astype(">f4")])
def test_arrays(convert):
    batch = MessageDropoutCollate(0.5, seed=3)([Keyed(i, convert(s)) for i, s in enumerate(EVEN)])
    keep = keep_mask((6, 5), 0.5, seed=fold_in(3, 0))
    assert torch.equal(batch, torch.where(torch.from_numpy(keep)[..., None], torch.stack(EVEN), 0))


def test_padding_lengths_and_mask():
    collate = MessageDropoutCollate(0.5, seed=3, pad=True, pad_value=-7, fill=9, return_mask=True)
    keys = [50 + i for i in range(len(SAMPLES))]
    batch, lengths, mask = collate([Keyed(k, s) for k, s in zip(keys, SAMPLES, strict=True)])
    assert lengths.dtype == torch.int64
    assert lengths.tolist() == list(LENGTHS)
    assert np.array_equal(mask, naive.keep_mask((7, 7), 0.5, seed=fold_in(3, 0), keys=keys, lengths=LENGTHS))
    assert torch.equal(batch, torch.where(mask[..., None], padded(SAMPLES, -7), 9))


def test_scale():
    batch, mask = MessageDropoutCollate(0.5, scale=True, return_mask=True)(EVEN)
    assert torch.equal(batch, torch.where(mask[..., None], 2 * torch.stack(EVEN), 0))


def test_tuples_named_tuples_and_lists():
    samples = [(s, i) for i, s in enumerate(SAMPLES)]
    batch, labels, lengths = MessageDropoutCollate(0.0, pad=True)(samples)
    assert torch.equal(batch, padded(SAMPLES))
    assert torch.equal(labels, torch.arange(7))
    assert lengths.tolist() == list(LENGTHS)
    even = [(i, s) for i, s in enumerate(EVEN)]
    result = MessageDropoutCollate(0.0, fields=1)(even)
    assert isinstance(result, tuple)
    assert torch.equal(result[1], torch.stack(EVEN))
    assert isinstance(MessageDropoutCollate(0.0, fields=1)([list(s) for s in even]), list)
    clips = [Clip(s, i) for i, s in enumerate(EVEN)]
    for fields in (None, "audio", ["audio"], 0):
        result = MessageDropoutCollate(0.0, fields=fields)(clips)
        assert isinstance(result, Clip)
        assert torch.equal(result.audio, torch.stack(EVEN))


def test_dicts_and_several_fields_share_one_mask():
    samples = [{"id": i, "audio": s, "video": s[:, :2].double()} for i, s in enumerate(SAMPLES)]
    collate = MessageDropoutCollate(0.5, fields=["audio", "video"], pad=True, return_mask=True)
    batch = collate(samples)
    assert set(batch) == {"id", "audio", "video", "lengths", "keep_mask"}
    assert torch.equal(batch["id"], torch.arange(7))
    keep = batch["keep_mask"][..., None]
    assert torch.equal(batch["audio"], torch.where(keep, padded(SAMPLES), 0))
    assert torch.equal(batch["video"], torch.where(keep, padded([s[:, :2].double() for s in SAMPLES]), 0))
    assert not keep.all()


def test_keyed_samples_give_the_same_structure():
    for samples in (EVEN, [(s, 1) for s in EVEN], [Clip(s, 1) for s in EVEN]):
        plain = MessageDropoutCollate(0.0)(samples)
        keyed = MessageDropoutCollate(0.0)([Keyed(i, s) for i, s in enumerate(samples)])
        assert type(plain) is type(keyed)
    # an (int, tensor) sample is no Keyed: its first leaf is collated, not taken for a key
    labels, batch = MessageDropoutCollate(0.0, fields=1)([(i, s) for i, s in enumerate(EVEN)])
    assert torch.equal(labels, torch.arange(6))
    assert torch.equal(batch, torch.stack(EVEN))


def test_no_dropped_message_leaks_and_the_samples_stay():
    samples = [torch.full((5, 4), float("nan")) for _ in range(6)]
    batch, mask = MessageDropoutCollate(0.5, return_mask=True)(samples)
    assert torch.equal(batch.isnan().all(dim=2), mask)
    assert torch.equal(batch.isnan().any(dim=2), mask)
    assert all(s.isnan().all() for s in samples)


def test_a_collate_function_of_ones_own():
    def own(samples):
        return torch.stack([s for s, _ in samples]), [label for _, label in samples]

    samples = [Keyed(i + 9, (s, "abcdef"[i])) for i, s in enumerate(EVEN)]
    batch, labels, mask = MessageDropoutCollate(0.5, collate_fn=own, seed=3, return_mask=True)(samples)
    assert labels == list("abcdef")
    assert np.array_equal(mask, keep_mask((6, 5), 0.5, seed=fold_in(3, 0), keys=[i + 9 for i in range(6)]))
    assert torch.equal(batch, torch.where(mask[..., None], torch.stack(EVEN), 0))
    with pytest.raises(ValueError, match=r"collate_fn must return.*6 rows.*\(3, 5, 4\)"):
        MessageDropoutCollate(0.5, collate_fn=lambda s: torch.stack(EVEN[:3]))(EVEN)
    two = {"x": torch.ones(6, 5, 4), "y": torch.ones(6, 3, 4)}
    with pytest.raises(ValueError, match=r"must have as many messages each.*\[3, 5\]"):
        MessageDropoutCollate(0.5, fields=["x", "y"], collate_fn=lambda s: two)(EVEN)
    assert two["x"].all()

    def twice(samples):
        x = torch.ones(6, 5, 4)
        return {"x": x, "y": x.view(6, 5, 4)}

    once = MessageDropoutCollate(0.5, fields=["x", "y"], scale=True, collate_fn=twice)
    assert once(EVEN)["x"].unique().tolist() == [0, 2]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.float64, torch.float32]
)
@pytest.mark.parametrize("scale", [False, True])
def test_dtypes(dtype, scale):
    samples = [s.clamp(max=300).to(dtype) for s in EVEN]  # which float8 holds, scaled too: torch 2.13 saturates
    batch, mask = MessageDropoutCollate(0.3, scale=scale, return_mask=True)(samples)
    want = torch.stack(samples)
    if scale:
        want = (
            want.to(torch.complex64 if dtype.is_complex else torch.float64 if dtype == torch.float64 else torch.float32)
            / 1
        )
        want = (want * torch.tensor(1 / 0.7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)).to(
            dtype
        )
    assert torch.equal(batch.to(torch.complex128), torch.where(mask[..., None], want.to(torch.complex128), 0))


def test_a_vector_fill_in_what_a_collate_function_returns():
    samples = [s.numpy() for s in EVEN]
    fill = np.arange(4, dtype=np.float32)
    batch, mask = MessageDropoutCollate(0.5, fill=fill, collate_fn=np.stack, return_mask=True)(samples)
    assert np.array_equal(batch, np.where(mask[..., None], np.stack(samples), fill))
    token = torch.nn.Parameter(torch.ones(4))
    assert not MessageDropoutCollate(0.5, fill=token, collate_fn=torch.stack)(EVEN).requires_grad


# ---- keys, seeds, epochs


def epoch_of(loader: Any) -> dict[int, bytes]:
    """Each sample's bytes, by its first element's hundreds: which sample it was."""
    rows = {}
    for batch, ids in loader:
        for row, i in zip(batch, ids.tolist(), strict=True):
            rows[i] = row.numpy().tobytes()
    return rows


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.processes)])
@pytest.mark.parametrize(("batch_size", "shuffle"), [(2, False), (4, True)])
def test_a_sample_keeps_its_mask_whatever_the_loader(workers, batch_size, shuffle):
    dataset = KeyedDataset([(s, i) for i, s in enumerate(EVEN)])
    collate = MessageDropoutCollate(0.5, seed=11)
    loader = DataLoader(
        dataset, batch_size, shuffle, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
    )
    epochs = []
    for epoch in range(3):
        collate.set_epoch(epoch)
        epochs.append(epoch_of(loader))
    for epoch, got in enumerate(epochs):
        want, _ = oracle.dropout(torch.stack(EVEN), seed=11, epoch=epoch)
        assert got == {i: want[i].tobytes() for i in range(6)}
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.processes
def test_without_a_seed_torch_governs():
    collate = MessageDropoutCollate(0.5)
    torch.manual_seed(3)
    first = [collate(EVEN) for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(collate(EVEN), first[0])
    assert torch.equal(collate(EVEN), first[1])
    assert not torch.equal(*first)
    state = torch.get_rng_state()
    assert torch.equal(MessageDropoutCollate(0.0)(EVEN), torch.stack(EVEN))
    assert torch.equal(torch.get_rng_state(), state)
    # workers draw differently, from their own seeds
    loader = DataLoader([EVEN[0]] * 2, batch_size=1, num_workers=2, collate_fn=MessageDropoutCollate(0.5))
    batches = [list(loader) for _ in range(10)]
    assert any(not torch.equal(*pair) for pair in batches)


@pytest.mark.processes
def test_batches_of_a_worker_are_in_shared_memory():
    loader = DataLoader(EVEN, batch_size=3, num_workers=1, collate_fn=_IsShared())
    assert list(loader) == [True, True]


class _IsShared:
    def __init__(self):
        self.collate = MessageDropoutCollate(0.5)

    def __call__(self, samples):
        return self.collate(samples).is_shared()


def epochs_reach_a_persistent_worker(dataset: Any, collate: Any, told: Any, method: str) -> None:
    loader = DataLoader(
        dataset, 6, num_workers=1, persistent_workers=True, collate_fn=collate, multiprocessing_context=method
    )
    for epoch in range(3):
        told.set_epoch(epoch)
        keep = torch.from_numpy(keep_mask((6, 5), 0.5, seed=fold_in(11, epoch)))
        assert torch.equal(next(iter(loader)), torch.where(keep[..., None], torch.stack(EVEN), 0))


@pytest.mark.processes
@pytest.mark.parametrize(("method", "which"), [("fork", 1), ("spawn", 0)])
def test_epochs_reach_persistent_workers_through_files(method, which):
    """A spawned worker doesn't know of the other sharing strategy, and must not share again what it was sent."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        pair = KeyedDataset(EVEN), MessageDropoutCollate(0.5, seed=11)
        epochs_reach_a_persistent_worker(*pair, pair[which], method)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("copied", "method", "which"),
    [
        (copy.deepcopy, "fork", 0),
        (copy.deepcopy, "fork", 1),
        (lambda o: pickle.loads(pickle.dumps(o)), "spawn", 1),
        (lambda o: pickle.loads(pickle.dumps(o)), "forkserver", 0),
    ],
)
def test_epochs_reach_the_persistent_workers_of_a_copy(copied, method, which):
    pair = copied(KeyedDataset(EVEN)), copied(MessageDropoutCollate(0.5, seed=11))
    epochs_reach_a_persistent_worker(*pair, pair[which], method)


@pytest.mark.parametrize("rules", [{"exact": True}, {"span": 2}, {"min_keep": 2}, {"p": np.linspace(0, 1, 9)}])
def test_rules(rules):
    p = rules.pop("p", 0.6)
    collate = MessageDropoutCollate(p, seed=3, pad=True, fill=torch.arange(4.0), scale=True, return_mask=True, **rules)
    batch, lengths, mask = collate([Keyed(i, s) for i, s in enumerate(SAMPLES)])
    options = {"lengths": lengths, "seed": fold_in(3, 0), **rules}
    p = p if isinstance(p, float) else p[:7]
    want, keep = message_dropout(padded(SAMPLES), p, fill=torch.arange(4.0), scale=True, return_mask=True, **options)
    assert torch.equal(mask, keep)
    assert torch.equal(batch, want)


def test_a_collate_made_in_other_surroundings():
    with torch.inference_mode(), torch.device("meta"):
        collate = MessageDropoutCollate(0.5, seed=3, pad=True, return_mask=True)
        batch, lengths, mask = collate([Keyed(i, s) for i, s in enumerate(SAMPLES)])
    collate.set_epoch(1)
    assert lengths.tolist() == list(LENGTHS)
    assert batch.device == mask.device == torch.device("cpu")
