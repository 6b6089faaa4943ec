"""The collate that removes messages: what is kept, companions and indices, against naive.py and message_select."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.columns import same
from helpers.samples import EVEN, LENGTHS, SAMPLES
from torch.utils.data import DataLoader

from msgdrop_numba import Keyed, KeyedDataset, MessageDropoutCollate, message_select
from msgdrop_numba.call.keys import row_key

rng = np.random.default_rng(6)
IDS = [f"clip-{i}" for i in range(7)]
KEYS = np.array([row_key(i) for i in IDS], np.uint64)
GUARD = [rng.random(n) < 0.3 for n in LENGTHS]
PLACES = [rng.integers(0, 9, n) for n in LENGTHS]
P = [0.0, 1.0, 0.5, 0.9, 0.25, 0.7, 0.4]
LABELS = [np.arange(n, dtype=np.int16) + 1 for n in LENGTHS]
TIMES = [torch.rand(n, 2, 3, dtype=torch.float64) for n in LENGTHS]
FLAGS = [rng.random(n) < 0.5 for n in LENGTHS]
COMPANIONS = {"labels": LABELS, "times": TIMES, "flags": FLAGS}
RULES = [{}, {"exact": True}, {"span": 2}, {"min_keep": 2}, {"prefix": 3, "scale": True}, {"p": 0.0}, {"p": 1.0},
         {"exact": True, "scale": True}, {"p": (0.2, 0.9)}, {"p": np.linspace(0, 1, 9), "scale": True}]  # fmt: skip


def keyed(samples: Any) -> list[Keyed]:
    return [Keyed(key, sample) for key, sample in zip(IDS, samples, strict=False)]


def samples(**columns: Any) -> list[Keyed]:
    return keyed([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])


def collate(p: Any = 0.5, **options: Any) -> MessageDropoutCollate:
    return MessageDropoutCollate(p, **{"seed": 3, "remove": True, **options})


def expected(rows: Any = SAMPLES, name: str | None = None, **told: Any) -> tuple[list[Any], list[Any]]:
    """What is kept of each sample, and which messages that is."""
    done, masks = oracle.rows(
        [np.asarray(row) for row in rows], IDS[: len(rows)], **{"seed": 3, "epoch": 0, "name": name, **told}
    )
    return [row[mask] for row, mask in zip(done, masks, strict=True)], masks


def padded(rows: list[Any], value: Any = 0) -> np.ndarray:
    rows = [np.asarray(row) for row in rows]
    out = np.full((len(rows), max(map(len, rows)), *rows[0].shape[1:]), value, rows[0].dtype)
    for to, row in zip(out, rows, strict=True):
        to[: len(row)] = row
    return out


def equal(tensor: torch.Tensor, array: np.ndarray) -> None:
    assert tensor.shape == array.shape
    same([tensor], [array])


def kept_of(columns: list[Any], masks: list[Any]) -> list[Any]:
    return [np.asarray(values)[mask] for values, mask in zip(columns, masks, strict=True)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ragged_samples(rule):
    kept, masks = expected(**rule)
    made = collate(**{"pad": True, "fields": "x", "return_mask": True, "return_indices": True, "pad_value": -2,
                      "companions": list(COMPANIONS)[:2], **rule})  # fmt: skip
    made.set_epoch(0)
    first = dict(list(COMPANIONS.items())[:2])
    for again in (made, pickle.loads(pickle.dumps(made))):
        for order in ({"x": SAMPLES, **first}, {**first, "x": SAMPLES}):
            got = again(samples(**order))
            assert list(got) == [*order, "lengths", "indices", "keep_mask"]
            equal(got["x"], padded(kept, -2))
            assert got["lengths"].tolist() == [len(row) for row in kept]
            equal(got["indices"], padded([np.flatnonzero(mask) for mask in masks], -1))
            equal(got["keep_mask"], padded(masks, True))
            for name, values in first.items():
                equal(got[name], padded(kept_of(values, masks), -2))
    without = MessageDropoutCollate(**{"p": 0.5, "seed": 3, "pad": True, "return_mask": True, **rule})
    assert torch.equal(without(keyed(SAMPLES))[2], got["keep_mask"])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_against_message_select(rule):
    batch = torch.nn.utils.rnn.pad_sequence(SAMPLES, batch_first=True)
    told = {"p": 0.5, **rule}
    told["p"] = told["p"][:7] if isinstance(told["p"], np.ndarray) else told["p"]
    y, kept = message_select(
        batch, **told, seed=oracle.loader_seed(3, 0), keys=torch.from_numpy(KEYS.view(np.int64)), layout="padded",
        lengths=torch.tensor(LENGTHS),
    )  # fmt: skip
    got, lengths, indices = collate(**rule, pad=True, return_indices=True)(keyed(SAMPLES))
    room = int(kept.lengths.max())
    assert torch.equal(got, y[:, :room])
    assert torch.equal(lengths, kept.lengths)
    assert torch.equal(indices, kept.indices[:, :room])


def test_the_parts_of_a_batch_depend_on_the_options_alone():
    """Whether samples of a batch happen to be equally long, or to keep as many, changes nothing."""
    for rule in ({}, {"p": 0.0}, {"p": 1.0}, {"p": (0.2, 0.3), "exact": True}, {"exact": True, "pad": True}):
        for rows in (EVEN, EVEN[:1], SAMPLES):
            _, lengths = collate(**rule)(keyed(rows))
            told = {name: value for name, value in rule.items() if name != "pad"}
            assert lengths.tolist() == [len(row) for row in expected(rows, **told)[0]]
    for p, kept in ((0.5, 3), (0.0, 5), (1.0, 0)):
        got = collate(p, exact=True)(keyed(EVEN))
        assert got.shape == (6, kept, 4)
        equal(got, np.stack(expected(EVEN, p=p, exact=True)[0]))
    with pytest.raises(ValueError, match=r"sample 1 \(key 'clip-1'\) must have 5 messages, .* set pad=True"):
        collate(exact=True)(keyed(SAMPLES))


def test_rectangular_with_everything():
    with_it = [(x, y) for x, y in zip(EVEN, np.arange(30).reshape(6, 5), strict=True)]
    got = collate(exact=True, prefix=1, companions=1, return_indices=True, return_mask=True)(keyed(with_it))
    kept, masks = expected(EVEN, exact=True, prefix=1)
    assert got[0].shape == (6, 3, 4)
    equal(got[0], np.stack(kept))
    equal(got[1], np.stack(kept_of([y for _, y in with_it], masks)))
    equal(got[2], np.stack([np.flatnonzero(mask) for mask in masks]))
    equal(got[3], np.stack(masks))


class Clip(NamedTuple):
    label: Any
    x: Any


def test_named_tuples_and_lists():
    kept, masks = expected()
    rows = list(zip(LABELS, SAMPLES, strict=True))
    for made, found in (
        (collate(fields="x", companions="label"), [Clip(*row) for row in rows]),
        (collate(fields=1, companions=(0,)), rows),
        (collate(fields=[1], companions=[0]), [list(row) for row in rows]),
    ):
        label, x, lengths = made(keyed(found))
        equal(label, padded(kept_of(LABELS, masks)))
        equal(x, padded(kept))
        assert lengths.tolist() == [len(row) for row in kept]


@pytest.mark.parametrize("argument", ["protect", "positions", "p"])
def test_what_samples_bring(argument):
    values = {"protect": GUARD, "positions": PLACES, "p": P}[argument]
    for rule in ({}, {"span": 2, "min_keep": 1}, {"prefix": 1, "scale": True}):
        kept, masks = expected(**{argument: values}, **rule)
        leaf = np.array(P) if argument == "p" else padded(kept_of(values, masks), argument == "protect")
        for where, rows in (
            ("own", samples(own=values, flags=FLAGS, x=SAMPLES)),
            (lambda sample: values[sample["i"]], samples(flags=FLAGS, x=SAMPLES, i=range(7))),
        ):
            got = collate(fields="x", companions=["flags"], **{argument: where}, **rule)(rows)
            equal(got.get("own", torch.from_numpy(leaf)), leaf)
            equal(got["x"], padded(kept))
            equal(got["flags"], padded(kept_of(FLAGS, masks)))
            assert got["lengths"].tolist() == [mask.sum() for mask in masks]
    named = collate(fields="x", companions=["own"], protect="own")(samples(x=SAMPLES, own=GUARD))
    equal(named["own"], padded(kept_of(GUARD, expected(protect=GUARD)[1]), True))
    equal(collate(positions=5)(keyed(SAMPLES))[0], padded(expected(positions=5)[0]))


def test_masks_of_several_names():
    other = [torch.rand(2 + i, 2) for i in range(7)]
    marks = [np.arange(2 + i) for i in range(7)]
    made = collate(
        fields={"x": "a", ("in", "y"): "a", "z": "b"}, return_indices=True, return_mask=True,
        companions={"labels": "a", ("in", "marks"): "b"},
    )  # fmt: skip
    inner = [{"marks": m, "y": torch.stack([x, x], 2)} for m, x in zip(marks, SAMPLES, strict=True)]
    got = made(samples(labels=LABELS, x=SAMPLES, z=other, **{"in": inner}))
    a, masks_a = expected(name="a")
    b, masks_b = expected(other, name="b")
    equal(got["x"], padded(a))
    equal(got["in"]["y"], padded([np.stack([x, x], 2) for x in a]))
    equal(got["z"], padded(b))
    equal(got["labels"], padded(kept_of(LABELS, masks_a)))
    equal(got["in"]["marks"], padded(kept_of(marks, masks_b)))
    for name, masks in (("a", masks_a), ("b", masks_b)):
        assert got["lengths"][name].tolist() == [mask.sum() for mask in masks]
        equal(got["indices"][name], padded([np.flatnonzero(mask) for mask in masks], -1))
        equal(got["keep_mask"][name], padded(masks, True))


def test_one_guard_of_two_masks():
    """It stays as it is, unless companions says with which mask it goes."""
    two = {"x": "a", "y": "b"}
    rows = samples(x=SAMPLES, y=SAMPLES, guard=GUARD)
    got = collate(fields=two, protect="guard")(rows)
    equal(got["guard"], padded(GUARD, True))
    got = collate(fields=two, protect="guard", companions={"guard": "b"})(rows)
    _, masks = expected(name="b", protect=GUARD)
    equal(got["guard"], padded(kept_of(GUARD, masks), True))


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e5m2, torch.int32, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [(3,), (70, 5), (0,)], ids=str)
def test_dtypes_and_widths(dtype, features):
    """Whatever the kernels can't scale is scaled by torch; samples that aren't contiguous are copied first."""
    rows = [torch.randn(n, *features).mul(3).to(dtype) for n in LENGTHS]
    rows[2] = torch.randn(LENGTHS[2], *reversed(features)).mul(3).to(dtype).permute(0, *range(len(features), 0, -1))
    for scale in (False, True):
        if scale and not (dtype.is_floating_point or dtype.is_complex):
            continue
        told = {"pad": True, "return_mask": True, "scale": scale}
        full, _, mask = MessageDropoutCollate(0.5, seed=3, **told)(keyed(rows))
        got, lengths, mask_too = collate(**told)(keyed(rows))
        assert torch.equal(mask, mask_too)
        for row, length, kept, dropped, n in zip(got, lengths.tolist(), mask, full, LENGTHS, strict=True):
            remaining = kept[:n].nonzero()[:, 0].tolist()  # torch before 2.13 can't index every dtype
            assert bits_of(row[:length]) == b"".join(bits_of(dropped[i]) for i in remaining)
            assert bits_of(row[length:]) == bytes(len(bits_of(row[length:])))


def bits_of(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


@pytest.mark.processes
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_workers(context):
    data = KeyedDataset([{"x": x, "labels": y} for x, y in zip(SAMPLES, LABELS, strict=True)])
    made = collate(fields="x", companions=["labels"], return_indices=True, seed=4)
    made.set_epoch(0)
    alone = [made([data[i] for i in at]) for at in ([0, 1, 2], [3, 4, 5], [6])]
    for got, other in zip(
        DataLoader(data, 3, collate_fn=made, num_workers=2, multiprocessing_context=context), alone, strict=True
    ):
        assert got.keys() == other.keys()
        assert all(torch.equal(got[name], other[name]) for name in got)
        assert got["x"].is_shared()
        assert got["labels"].is_shared()


BAD = [
    ({"companions": ["y"], "remove": False}, ValueError, r"companions=\['y'\] needs remove=True"),
    ({"return_indices": True, "remove": False}, ValueError, "return_indices=True needs remove=True"),
    ({"remove": 1}, TypeError, "remove must be True or False, but got 1"),
    ({"collate_fn": list}, ValueError, "remove=True can't be used with collate_fn"),
    ({"fill": 1.0}, ValueError, r"fill can't be used with remove=True, .* but got 1.0"),
    ({"fill": torch.ones(3)}, ValueError, r"fill can't be used with remove=True"),
    ({"companions": []}, ValueError, "companions must name at least one field"),
    ({"companions": [2.5]}, TypeError, "companions must be names, indices or tuples of them, but got 2.5"),
    ({"companions": ["x"], "fields": "x"}, ValueError, "companions must not be among fields too, but 'x' is"),
    ({"companions": ["y"], "fields": {"x": "a", "z": "b"}}, ValueError,
     r"companions must be a dict from each to the name of its mask, one of \['a', 'b'\]"),
    ({"companions": {"y": "c"}, "fields": {"x": "a"}}, ValueError,
     r"companions must go with the mask of a field, one of \['a'\], but 'y' has 'c'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "said"), BAD, ids=range(len(BAD)))
def test_bad_options(options, error, said):
    with pytest.raises(error, match=said):
        collate(**options)
    assert collate(fill=0.0, companions=None).remove


BAD_SAMPLES = [
    ([row[:-1] for row in LABELS], ValueError, r"field 'y' of sample 0 \(key 'clip-0'\) must have 5 values, .* got 4"),
    ([*LABELS[:3], LABELS[0], *LABELS[4:]], ValueError, r"field 'y' of sample 3 \(key 'clip-3'\) must have 6 values"),
    ([*LABELS[:2], LABELS[2].astype(float), *LABELS[3:]], ValueError, r"field 'y' of sample 2 .* like the batch's first"),
    ([np.int64(3)] * 7, TypeError, r"field 'y' of sample 0 .* must be an array or a tensor, but got int64"),
    ([torch.tensor(3)] * 7, ValueError, r"field 'y' of sample 0 .* must be \(messages, \*features\), but got shape \(\)"),
    ([np.array(["a"] * n) for n in LENGTHS], TypeError, r"field 'y' of sample 0 .* dtype that torch has"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "error", "said"), BAD_SAMPLES, ids=range(len(BAD_SAMPLES)))
def test_bad_companions(values, error, said):
    for order in ({"x": SAMPLES, "y": values}, {"y": values, "x": SAMPLES}):
        with pytest.raises(error, match=said):
            collate(fields="x", companions=["y"])(samples(**order))


def test_more_bad_samples():
    with pytest.raises(ValueError, match=r"companions must be among \['x'\], which a sample has, but got 'y'"):
        collate(fields="x", companions=["y"])(samples(x=SAMPLES))
    with pytest.raises(ValueError, match="companions must be None where a sample is an array"):
        collate(companions=["y"])(keyed(SAMPLES))
    with pytest.raises(ValueError, match="companions must not be among fields too, but field 0 is"):
        collate(companions=0)(keyed([(x, 1) for x in SAMPLES]))
    with pytest.raises(ValueError, match="pad_value must be"):
        collate(fields="x", companions=["y"], pad_value=0.5)(samples(x=SAMPLES, y=LABELS))
    with pytest.raises(ValueError, match=r"must not have fields named \['indices'\]"):
        collate(fields="x", return_indices=True)(samples(x=SAMPLES, indices=[1] * 7))
    uneven = samples(y=LABELS, x=SAMPLES)
    uneven[1].sample.pop("x")
    with pytest.raises(ValueError, match="sample 1 must have the fields of the first"):
        collate(fields="x", companions=["y"])(uneven)


@pytest.mark.parametrize("sizes", [(0, 0), (0, 3), (1, 0)], ids=str)
def test_samples_without_messages(sizes):
    rows, marks = [torch.ones(n, 2) for n in sizes], [np.ones(n) for n in sizes]
    told = {"fields": "x", "companions": ["y"], "return_indices": True, "return_mask": True, "protect": "z"}
    got = collate(0.0, **told)(samples(y=marks, x=rows, z=[[False] * n for n in sizes]))
    assert (got["x"].shape, got["y"].shape, got["z"].shape) == ((2, max(sizes), 2), (2, max(sizes)), (2, max(sizes)))
    assert got["lengths"].tolist() == list(sizes)
    equal(got["indices"], padded([np.arange(n) for n in sizes], -1))
    gone, lengths = collate(1.0)(keyed(rows))
    assert (gone.shape, lengths.tolist()) == ((2, 0, 2), [0, 0])


@pytest.mark.parametrize("features", [2048, 2040])
def test_a_batch_past_the_cache(features):
    """From 16 MB on kept messages are fetched ahead, and written past the cache where they are whole lines of it."""
    rows = list(torch.randn(64, 80, features).unbind())
    got = MessageDropoutCollate(0.5, exact=True, remove=True, seed=3)([Keyed(i, row) for i, row in enumerate(rows)])
    mask = torch.from_numpy(np.array(
        message_select(np.ones((64, 80, 1)), 0.5, exact=True, seed=oracle.loader_seed(3, 0), keys=np.arange(64))[1].mask
    ))  # fmt: skip
    assert torch.equal(got.flatten(0, 1), torch.stack(rows)[mask])
