"""`explain` of collate and batch, held against the oracle, how both are printed, and batches of validation."""

from __future__ import annotations

import operator
import pickle

import naive
import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.samples import EVEN, LENGTHS, SAMPLES
from torch.utils.data import default_collate

from msgdrop_numba import Keyed, KeyedDataset, MessageDropoutBatch, MessageDropoutCollate

N, KEY, SEED, EPOCH = 40, "clip-3", 7, -2
ROW_KEY, DRAWN_FROM = naive.hash64(KEY), naive.fold_in(SEED, EPOCH)
X = torch.arange(4.0 * N).reshape(N, 4)
GUARD, PLACES = np.arange(N) % 7 == 2, np.arange(N)[::-1] * 3
SPAN_PHASE = naive.draw(DRAWN_FROM, ROW_KEY, 0, stream=1) * 3 >> 32
RANGED = (naive.row_threshold((0.2, 0.9), DRAWN_FROM, ROW_KEY)) / 2**32

# Options, p of the row, the positions of its draws, words.
CASES = [
    ({"p": 0.3}, 0.3, range(N), "a message drops where its draw lies below p = 0.3"),
    ({"p": (0.2, 0.9)}, RANGED, range(N), f"p = {RANGED:g}, which the row drew from (0.2, 0.9)"),
    ({"p": 0.5, "span": 3}, 0.5, [(i + SPAN_PHASE) // 3 for i in range(N)], "runs of 3 neighbours share a draw"),
    ({"p": 0.5, "positions": 9, "prefix": 4}, 0.5, range(9, 9 + N), "p = 0.5"),
    ({"p": np.linspace(0, 1, N)}, np.linspace(0, 1, N), range(N), "its own p"),
    ({"p": 0.9, "min_keep": 12}, 0.9, range(N), "at least 12 stay"),
    ({"p": 0.3, "exact": True}, 0.3, range(N), "the 12 smallest of 40 draws drop (exact, p = 0.3)"),
]


@pytest.mark.parametrize(("options", "p", "positions", "words"), CASES, ids=range(len(CASES)))
def test_it_says_what_the_mask_came_from(options, p, positions, words):
    collate = MessageDropoutCollate(**options, seed=SEED, return_mask=True)
    collate.set_epoch(EPOCH)
    batch = MessageDropoutBatch(**options, columns="x", key="id", seed=SEED, epoch=EPOCH)
    table = {"id": ["other", KEY], "x": np.stack([X.numpy()] * 2)}
    _, mask = collate([Keyed(KEY, X)])
    for told in (collate.explain(Keyed(KEY, X)), batch.explain(table, row=1)):
        assert (told.key, told.row_key, told.seed, told.drawn_from) == (KEY, ROW_KEY, SEED, DRAWN_FROM)
        assert np.array_equal(told.keep, mask[0])
        assert told.draws.tolist() == [naive.draw(DRAWN_FROM, ROW_KEY, i) / 2**32 for i in positions]
        assert np.array_equal(told.p, p)
        assert told.takes_part.tolist() == [i >= options.get("prefix", 0) for i in range(N)]
        if "exact" in options:
            assert np.array_equal(~told.keep, told.draws <= np.sort(told.draws)[11])
        else:
            assert np.array_equal(~told.keep | told.saved, (told.draws < p) & told.takes_part)
        assert told.saved.any() == ("min_keep" in options)
        said = repr(told)
        assert words in said
        assert f"sample 'clip-3', row key {ROW_KEY}; seed 7, epoch -2: draws from {DRAWN_FROM}\n" in said
        assert f"{(~mask).sum()} of 40 messages drop: " in said
        assert ("\nsaved by min_keep: " in said, "\nprotected or padding: 0-3" in said) == (
            "min_keep" in options, "prefix" in options
        )  # fmt: skip


def test_what_samples_bring_and_names_of_masks():
    sample = {"a": X, "guard": torch.from_numpy(GUARD), "at": torch.from_numpy(PLACES.copy()), "p": 0.4, "b": X[:5]}
    only = {name: value for name, value in sample.items() if name != "b"}
    collate = MessageDropoutCollate("p", fields={"a": "long"}, protect="guard", positions="at", seed=SEED, pad=True)
    told = collate.explain(Keyed(KEY, only))["long"]
    seed = oracle.loader_seed(SEED, 0, "long")
    keep = naive.keep_mask((1, N), 0.4, seed=seed, keys=[ROW_KEY], protect=GUARD[None], positions=PLACES[None])[0]
    assert (told.drawn_from, told.p, told.keep.tolist()) == (seed, 0.4, keep.tolist())
    assert told.draws.tolist() == [naive.draw(seed, ROW_KEY, int(i)) / 2**32 for i in PLACES]
    assert np.array_equal(told.takes_part, ~GUARD)
    two = MessageDropoutCollate(0.5, fields={"a": "long", "b": "short"}, seed=SEED).explain(Keyed(KEY, sample))
    assert {name: len(told.keep) for name, told in two.items()} == {"long": N, "short": 5}


def test_of_what_collate_fn_returns_and_of_lengths():
    collate = MessageDropoutCollate(0.5, seed=SEED, collate_fn=default_collate)
    keep = naive.keep_mask((1, N), 0.5, seed=naive.fold_in(SEED, 0), keys=[ROW_KEY])[0]
    assert np.array_equal(collate.explain(Keyed(KEY, X)).keep, keep)
    batch = MessageDropoutBatch(0.5, columns="x", key="id", lengths="n", seed=SEED)
    told = batch.explain({"id": [KEY], "x": X[None].numpy(), "n": np.array([30])})
    assert np.array_equal(told.keep, keep | (np.arange(N) >= 30))
    assert np.array_equal(told.takes_part, np.arange(N) < 30)


def test_what_can_not_be_explained():
    with pytest.raises(ValueError, match="explain needs a collate with a seed"):
        MessageDropoutCollate(0.5).explain(Keyed(KEY, X))
    with pytest.raises(ValueError, match="seed=7 needs the samples' ids"):
        MessageDropoutCollate(0.5, seed=7).explain(X)
    with pytest.raises(TypeError, match=r"field 1 of sample 0 \(key 'clip-3'\) must be an array or a tensor"):
        MessageDropoutCollate(0.5, seed=7, fields=1).explain(Keyed(KEY, (X, 3)))
    with pytest.raises(ValueError, match="row must be from 0 to 0, a row of the batch, but got 1"):
        MessageDropoutBatch(0.5, columns="x", key="id", seed=7).explain({"id": [1], "x": X[None].numpy()}, row=1)


SHOWN = [
    (MessageDropoutCollate(), "MessageDropoutCollate(p=0.5)"),
    (MessageDropoutCollate(0.3, pad=True, seed=1), "MessageDropoutCollate(p=0.3, pad=True, seed=1)"),
    (
        MessageDropoutCollate(
            "p", fields={"a": "m", ("b", 1): "n"}, prefix=2, protect=("g", 0), positions=4, remove=True, companions={"c": "n"},
        ),
        "MessageDropoutCollate(p='p', fields={'a': 'm', ('b', 1): 'n'}, prefix=2, protect=('g', 0), positions=4, "
        "remove=True, companions={'c': 'n'})",
    ),
    (
        MessageDropoutCollate(np.arange(3) / 4, fields=["x", "y"], fill=torch.ones(40), collate_fn=default_collate),
        "MessageDropoutCollate(p=[0, 0.25, 0.5], fields=['x', 'y'], collate_fn=default_collate, fill=Tensor(40,))",
    ),
    (
        MessageDropoutBatch(0.5, columns="x", key="id", seed=3, epoch=-1, exact=True, passthrough=False),
        "MessageDropoutBatch(p=0.5, columns='x', key='id', seed=3, epoch=-1, passthrough=False, exact=True)",
    ),
    (
        MessageDropoutBatch((0.1, 0.5), columns=["x", "y"], key="id", seed=3, protect="g", positions="at", lengths="n"),
        "MessageDropoutBatch(p=(0.1, 0.5), columns=['x', 'y'], key='id', seed=3, lengths='n', protect='g', "
        "positions='at')",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("made", "shown"), SHOWN, ids=range(len(SHOWN)))
def test_what_is_printed(made, shown):
    assert repr(made) == shown
    assert repr(pickle.loads(pickle.dumps(made))) == shown


def test_the_epoch_is_printed_where_one_was_set():
    collate = MessageDropoutCollate(0.3, seed=1)
    collate.set_epoch(5)
    assert repr(collate) == "MessageDropoutCollate(p=0.3, seed=1, epoch=5)"


@pytest.mark.parametrize("remove", [False, True])
def test_p_of_0_is_for_validation(remove):
    """The batches have the same parts as in training; nothing drops, no id is needed, nothing is drawn."""
    options = {"pad": True, "return_mask": True, "remove": remove, "prefix": 1, "min_keep": 2}
    samples, state = [(x, i) for i, x in enumerate(SAMPLES)], torch.get_rng_state()
    x, labels, lengths, mask = MessageDropoutCollate(0, **options)(samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert (lengths.tolist(), labels.tolist()) == (list(LENGTHS), list(range(len(SAMPLES))))
    assert torch.equal(x, torch.nn.utils.rnn.pad_sequence(SAMPLES, batch_first=True))
    assert mask.all()
    assert len(MessageDropoutCollate(0.5, **options)(samples)) == 4


# Messages that are not where they are looked for

LABEL = torch.ones(1, 9)
WRONG = [
    ((3, EVEN[0]), {}, r"field 0 of a sample must hold messages where fields=None, but is int: set fields=1, where .* \(5, 4\)"),
    (("a", 1, EVEN[0]), {"pad": True}, "but is str: set fields=2"),
    ((torch.tensor(3), EVEN[0]), {}, r"but is of shape \(\): set fields=1"),
    ([np.ones(9), EVEN[0].numpy()], {"remove": True}, r"but is of shape \(9,\): set fields=1"),
    ((LABEL, EVEN[0]), {}, r"one message alone, shape \(1, 9\), where field 1 has 5, \(5, 4\): set fields=1, or fields=0"),
    ((3, EVEN[0]), {"collate_fn": default_collate}, r"of what collate_fn returned .* of shape \(2,\): set fields=1"),
]  # fmt: skip


@pytest.mark.parametrize(("sample", "options", "said"), WRONG, ids=range(len(WRONG)))
def test_a_first_element_that_is_a_label(sample, options, said):
    with pytest.raises(ValueError, match=said):
        MessageDropoutCollate(0.5, **options)([sample, sample])


def test_a_first_element_of_one_message_may_be_meant():
    for options, samples in (
        ({"fields": 0}, [(LABEL, EVEN[0])]),
        ({"pad": True}, [(LABEL, EVEN[0])]),  # it may be the shortest of samples
        ({}, [(LABEL, LABEL)]),
        ({"collate_fn": default_collate}, [(LABEL, EVEN[0])]),
    ):
        assert MessageDropoutCollate(1.0, **options)(samples)[0].tolist() == [[[0.0] * 9]]


def test_a_key_that_spawned_workers_take():
    """README and CONTRACT.md name ids so: a lambda can't be pickled."""
    dataset = pickle.loads(pickle.dumps(KeyedDataset([{"id": "a", "x": 1}], key=operator.itemgetter("id"))))
    assert dataset[0] == Keyed("a", {"id": "a", "x": 1})
