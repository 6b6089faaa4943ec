"""Fields of samples: nested ones, memory maps, masks by name, and what is pinned."""

from __future__ import annotations

import collections
import faulthandler
import mmap
import multiprocessing
import os
import signal
import types
from typing import Any, NamedTuple

import naive
import numpy as np
import pytest
import torch
from helpers import oracle
from torch.utils.data import DataLoader, default_collate

from msgdrop_numba import Keyed, KeyedDataset, MessageDropoutCollate

LENGTHS, TEXTS = (5, 7, 3, 6), (2, 4, 9, 1)
AUDIO = [torch.arange(n * 4, dtype=torch.float32).reshape(n, 4) + 100 * i + 1 for i, n in enumerate(LENGTHS)]
VIDEO = [a.double()[:, None, :2] + 0.5 for a in AUDIO]
TEXT = [np.arange(n * 3, dtype=np.int32).reshape(n, 3) + 50 * i + 1 for i, n in enumerate(TEXTS)]
NAMED = {"audio": "av", "video": "av", "text": "text"}


class Inputs(NamedTuple):
    audio: Any
    text: Any


def want(samples: list, name: str | None = None, pad_value: float = 0) -> tuple[Any, Any]:
    """The batch and keep mask of naive.py, for the seed 3 and the keys 0, 1, ..."""
    tensors = [torch.as_tensor(s) for s in samples]
    stacked = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_value)
    lengths = [len(s) for s in tensors]
    return tuple(map(torch.from_numpy, oracle.dropout(stacked, seed=3, epoch=0, name=name, lengths=lengths)))


def keyed(samples: list) -> list:
    return [Keyed(i, sample) for i, sample in enumerate(samples)]


def test_masks_of_their_own_by_name():
    samples = [{"audio": a, "video": v, "text": t, "id": 7} for a, v, t in zip(AUDIO, VIDEO, TEXT, strict=True)]
    collate = MessageDropoutCollate(0.5, fields=NAMED, pad=True, seed=3, return_mask=True)
    batch = collate(keyed(samples))
    for field, source in (("audio", AUDIO), ("video", VIDEO), ("text", TEXT)):
        data, keep = want(source, NAMED[field])
        assert torch.equal(batch[field], data)
        assert torch.equal(batch["keep_mask"][NAMED[field]], keep)
    assert {name: lengths.tolist() for name, lengths in batch["lengths"].items()} == {
        "av": list(LENGTHS), "text": list(TEXTS),
    }  # fmt: skip
    assert batch["id"].tolist() == [7] * 4
    # without a seed the masks of a batch differ all the same, and torch governs them
    free = MessageDropoutCollate(0.5, fields={"a": "a", "b": "b"}, return_mask=True)
    same = [{"a": torch.ones(64, 1), "b": torch.ones(64, 1)}] * 3
    torch.manual_seed(1)
    first = free(same)
    assert not torch.equal(first["a"], first["b"])
    torch.manual_seed(1)
    assert torch.equal(free(same)["b"], first["b"])


def test_masks_by_name_in_tuples_and_in_what_a_collate_function_returns():
    even = [(torch.ones(5, 2), torch.ones(8, 2)) for _ in range(4)]
    collate = MessageDropoutCollate(0.5, fields={0: "x", 1: "y"}, pad=True, seed=3, return_mask=True)
    x, y, lengths, keep = collate(keyed(even))
    again = MessageDropoutCollate(0.5, fields={0: "x", 1: "y"}, seed=3, return_mask=True, collate_fn=default_collate)
    x2, y2, keep2 = again(keyed(even))
    assert torch.equal(x, x2)
    assert torch.equal(y, y2)
    assert lengths["y"].tolist() == [8] * 4
    assert set(keep) == set(keep2) == {"x", "y"}
    for name in keep:
        assert torch.equal(keep[name], torch.as_tensor(keep2[name]))


def test_nested_samples():
    samples = [
        {"inputs": Inputs(a, {"ids": t, "n": i}), "video": [v], "label": i}
        for i, (a, t, v) in enumerate(zip(AUDIO, TEXT, VIDEO, strict=True))
    ]
    fields = {("inputs", "audio"): "av", ("inputs", "text", "ids"): "text", ("video", 0): "av"}
    batch = MessageDropoutCollate(0.5, fields=fields, pad=True, seed=3)(keyed(samples))
    assert type(batch["inputs"]) is Inputs
    assert torch.equal(batch["inputs"].audio, want(AUDIO, "av")[0])
    assert torch.equal(batch["inputs"].text["ids"], want(TEXT, "text")[0])
    assert batch["inputs"].text["n"].tolist() == batch["label"].tolist() == [0, 1, 2, 3]
    assert type(batch["video"]) is list
    assert torch.equal(batch["video"][0], want(VIDEO, "av")[0])
    shared = [((a, {"v": v}), 1) for a, v in zip(AUDIO, VIDEO, strict=True)]
    (audio, deeper), _, lengths = MessageDropoutCollate(0.5, fields=[(0, 0), (0, 1, "v")], pad=True, seed=3)(
        keyed(shared)
    )
    assert torch.equal(audio, want(AUDIO)[0])
    assert torch.equal(deeper["v"], want(VIDEO)[0])
    assert lengths.tolist() == list(LENGTHS)


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, types.MappingProxyType])
def test_mappings_come_back_as_torchs_collate_gives_them(kind):
    samples = [kind({"x": torch.ones(3, 2), "y": 1}) for _ in range(2)]
    assert type(MessageDropoutCollate(0.5, fields="x", pad=True)(samples)) is (
        dict if kind is types.MappingProxyType else kind
    )
    assert set(samples[0]) == {"x", "y"}


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_memory_maps(tmp_path, mode):
    np.save(tmp_path / "x.npy", np.stack([AUDIO[0]] * 6))
    mapped = np.load(tmp_path / "x.npy", mmap_mode=mode)
    batch = MessageDropoutCollate(0.5, seed=3)(keyed(list(mapped)))
    assert torch.equal(batch, want([AUDIO[0]] * 6)[0])
    assert np.array_equal(np.load(tmp_path / "x.npy")[5], AUDIO[0])


@pytest.mark.processes
def test_a_dropped_message_is_not_read(tmp_path):
    """The end of the file behind a map is gone: whoever reads the dropped message dies of SIGBUS."""
    page = mmap.PAGESIZE
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(2 * page))
    sample = np.memmap(path, np.uint8, "r", shape=(2, page))
    keeps = {s: naive.keep_mask((1, 2), 0.5, seed=naive.fold_in(s, 0))[0].tolist() for s in range(20)}
    os.truncate(path, page)

    def collate(seed: int) -> None:
        faulthandler.disable()
        batch = MessageDropoutCollate(0.5, seed=seed)([Keyed(0, sample)])
        assert batch.tolist() == [[[0] * page] * 2]

    for keep, exitcode in (([True, False], 0), ([True, True], -signal.SIGBUS)):
        seed = next(s for s in keeps if keeps[s] == keep)
        child = multiprocessing.get_context("fork").Process(target=collate, args=(seed,))
        child.start()
        child.join()
        assert child.exitcode == exitcode


def test_samples_that_need_another_layout_first():
    transposed = [a.T.contiguous().T for a in AUDIO[:1] * 3]
    mixed = [AUDIO[0], AUDIO[0].numpy(), torch.nn.Parameter(AUDIO[0]), AUDIO[0].clone().requires_grad_()]
    negative = [torch._neg_view(AUDIO[0])] * 3
    conjugate = [torch.complex(AUDIO[0], AUDIO[0]).conj()] * 3
    expanded = [AUDIO[0][:1].expand(5, 4)] * 2
    assert negative[0].is_neg()
    assert negative[0].is_contiguous()
    assert conjugate[0].is_conj()
    assert not expanded[0].is_contiguous()
    assert not transposed[0].is_contiguous()
    for samples in (transposed, mixed, negative, conjugate, expanded):
        got = MessageDropoutCollate(0.5, seed=3)(keyed(samples))
        plain = [torch.as_tensor(s).detach().resolve_conj().resolve_neg() for s in samples]
        assert torch.equal(got, want(plain)[0])
        assert not got.requires_grad


def test_a_scaled_dtype_that_the_kernels_do_not_know():
    """Float8 goes through torch's operations: padded with 4, kept messages times 2."""
    samples = [torch.ones(n, 4).to(torch.float8_e4m3fn).requires_grad_() for n in LENGTHS]
    collate = MessageDropoutCollate(0.5, scale=True, pad=True, pad_value=4, return_mask=True)
    batch, lengths, keep = collate(samples)
    inside = torch.arange(7) < lengths[:, None]
    expected = torch.where(inside, torch.where(keep, 2.0, 0.0), 4.0)
    assert not batch.requires_grad
    assert torch.equal(batch.float(), expected[..., None].expand(4, 7, 4))


def test_probabilities_by_position_in_what_a_collate_function_returns():
    collate = MessageDropoutCollate(np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.5]), collate_fn=torch.stack)
    assert collate([torch.ones(5, 1)] * 2)[..., 0].tolist() == [[1, 0, 1, 0, 0]] * 2


def test_a_named_tuple_with_lengths_is_a_plain_tuple():
    batch = MessageDropoutCollate(0.5, pad=True)([Inputs(a, i) for i, a in enumerate(AUDIO)])
    assert type(batch) is tuple
    assert batch[2].tolist() == list(LENGTHS)


def test_a_sample_without_memory():
    freed = torch.ones(5, 4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="sample 1 must have memory"):
        MessageDropoutCollate(0.5)([torch.ones(5, 4), freed])


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_pin_memory(workers):
    samples = [{"inputs": Inputs(a, i)} for i, a in enumerate(AUDIO)]
    collate = MessageDropoutCollate(0.5, fields=[("inputs", "audio")], pad=True, seed=3)
    loader = DataLoader(KeyedDataset(samples), 4, num_workers=workers, collate_fn=collate, pin_memory=True)
    (batch,) = loader
    assert torch.equal(batch["inputs"].audio, want(AUDIO)[0])
    assert batch["inputs"].audio.is_pinned() == torch.cuda.is_available()
    assert batch["lengths"].tolist() == list(LENGTHS)


SAMPLE = {"inputs": Inputs(AUDIO[0], TEXT[0]), "label": 1}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (("inputs", "none"), ValueError, r"among \['audio', 'text'\], which field 'inputs' of a sample has.*'none'"),
        ([("inputs", 2)], ValueError, r"field 'inputs' of a sample has, but got 2"),
        ([("label", 0)], ValueError, r"among \[\], which field 'label' of a sample has, but got 0"),
        ("inputs", TypeError, r"field 'inputs' of sample 0 must be an array or a tensor.*Inputs"),
        (
            [("inputs", "audio"), ("inputs", "text")],
            ValueError,
            r"\('inputs', 'text'\) of sample 0 must have 5.*got 2.*fields=",
        ),
        ([("inputs", "text"), ("inputs", 1)], ValueError, r"\('inputs', 'text'\) and field \('inputs', 1\) are one"),
        ([()], TypeError, r"fields must be names, indices or tuples of them, but got \(\)"),
        ([["a", "b"]], TypeError, r"fields must be names.*\['a', 'b'\]"),
        ({"inputs": None}, TypeError, r"fields must give each field the name of its mask.*'inputs' has None"),
        ({}, ValueError, r"fields must name at least one"),
    ],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message):
        MessageDropoutCollate(0.5, fields=fields)([SAMPLE])


def test_nested_samples_that_are_not_alike():
    other = {"inputs": (AUDIO[0], TEXT[0], 1), "label": 1}
    with pytest.raises(ValueError, match="field 'inputs' of sample 1 must have the fields of the first, Inputs of 2"):
        MessageDropoutCollate(0.5, fields=[("inputs", 0)])([SAMPLE, other])
