"""What samples bring of their own to a collate: p, protected messages, positions; all against naive.py."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.columns import same
from helpers.samples import EVEN, LENGTHS, SAMPLES
from torch.utils.data import DataLoader, default_collate

from msgdrop_numba import Keyed, KeyedDataset, MessageDropoutBatch, MessageDropoutCollate, message_dropout

rng = np.random.default_rng(4)
IDS = [f"clip-{i}" for i in range(7)]
GUARD = [torch.from_numpy(rng.random(n) < 0.3) for n in LENGTHS]
PLACES = [torch.from_numpy(rng.integers(0, 9, n)) for n in LENGTHS]
P = [0.0, 1.0, 0.5, 0.9, 0.25, 0.7, 0.4]
TOLD = {"protect": GUARD, "positions": PLACES, "p": P}
ALL = {"p": "p", "protect": "guard", "positions": "places"}
RULES = [{}, {"exact": True}, {"span": 2}, {"min_keep": 2}, {"prefix": 3, "scale": True}]


class Clip(NamedTuple):
    audio: Any
    guard: Any
    places: Any
    p: Any


def samples(kind: Any = dict, x: Any = SAMPLES, **change: Any) -> list[Any]:
    told = {"audio": x, "guard": GUARD, "places": PLACES, "p": P, **change}
    told = {name: values for name, values in told.items() if values is not None}
    return [kind(**dict(zip(told, values, strict=True))) for values in zip(*told.values(), strict=True)]


def keyed(made: list[Any]) -> list[Keyed]:
    return [Keyed(key, sample) for key, sample in zip(IDS, made, strict=True)]


def collate(**options: Any) -> MessageDropoutCollate:
    return MessageDropoutCollate(
        **{"p": 0.5, "fields": "audio", "pad": True, "seed": 3, "return_mask": True, **options}
    )


def expected(rows: Any = SAMPLES, name: str | None = None, **told: Any) -> tuple[list[Any], list[Any]]:
    return oracle.rows([np.asarray(row) for row in rows], IDS, **{"seed": 3, "epoch": 0, "name": name, **told})


def cut(batch: Any, lengths: Any = LENGTHS) -> list[np.ndarray]:
    """The rows of a batch without their padding."""
    return [np.asarray(row)[:n] for row, n in zip(batch, lengths, strict=True)]


def loud(sample: Any) -> Any:
    return sample["audio"][:, 0] % 8 == 5


ALONE = [(name, rule) for name in TOLD for rule in RULES if name != "p" or "exact" not in rule]


@pytest.mark.parametrize(("argument", "rule"), ALONE, ids=str)
def test_each_alone(argument, rule):
    field, told = ALL[argument], TOLD[argument]
    done, masks = expected(**{argument: told}, **rule)
    with_it = [{"audio": x, field: value} for x, value in zip(SAMPLES, told, strict=True)]
    without = [{"audio": x, "i": i} for i, x in enumerate(SAMPLES)]
    for where, made in (
        (field, with_it), ((field,), with_it), (lambda sample: told[sample["i"]], without),
        (lambda sample: np.asarray(told[sample["i"]]), without),
    ):  # fmt: skip
        got = collate(**{argument: where}, **rule)(keyed(made))
        same(cut(got["audio"]), done)
        same(cut(got["keep_mask"]), masks)
        assert got["lengths"].tolist() == list(LENGTHS)


@pytest.mark.parametrize("rule", [{}, {"span": 3, "min_keep": 1}, {"prefix": 6, "scale": True}], ids=str)
def test_all_at_once(rule):
    done, masks = expected(**TOLD, **rule)
    made = collate(**ALL, **rule)
    for again in (made, pickle.loads(pickle.dumps(made))):
        got = again(keyed(samples()))
        same(cut(got["audio"]), done)
        same(cut(got["keep_mask"]), masks)
    for kind in (Clip, dict):
        places = {name: (where,) for name, where in ALL.items()} if kind is dict else ALL
        got = collate(**places, **rule)(keyed(samples(kind)))
        same(cut(got[0] if kind is Clip else got["audio"]), done)


def test_nested_ones_by_their_paths():
    nested = [(sample["audio"], {"of": [sample["guard"], sample["places"], sample["p"]]}) for sample in samples()]
    made = collate(fields=None, protect=(1, "of", 0), positions=(1, "of", 1), p=(1, "of", 2))
    got = made(keyed(nested))
    same(cut(got[0]), expected(**TOLD)[0])
    assert (got[1]["of"][0].shape, got[1]["of"][1].shape, got[1]["of"][2].tolist()) == ((7, 7), (7, 7), P)


@pytest.mark.parametrize(
    "read", [np.asarray, torch.Tensor.tolist, lambda leaf: leaf], ids=["arrays", "lists", "tensors"]
)
def test_padded_leaves(read):
    """protect as torch's key_padding_mask, positions as int64."""
    made = samples(guard=[read(leaf) for leaf in GUARD], places=[read(leaf) for leaf in PLACES])
    got = collate(**ALL)(keyed(made))
    pad = torch.nn.utils.rnn.pad_sequence
    assert torch.equal(got["guard"], pad(GUARD, batch_first=True, padding_value=True))
    assert torch.equal(got["places"], pad(PLACES, batch_first=True))
    assert (got["guard"].dtype, got["places"].dtype) == (torch.bool, torch.int64)
    assert got["p"].tolist() == P
    same(cut(got["audio"]), expected(**TOLD)[0])
    attention = torch.nn.MultiheadAttention(4, 1, batch_first=True)
    y, _ = attention(got["audio"], got["audio"], got["audio"], key_padding_mask=got["guard"])
    assert y.shape == got["audio"].shape


def test_without_padding_leaves_are_default_collates():
    even = [{"audio": EVEN[0], "guard": leaf, "places": where.int(), "p": p}
            for leaf, where, p in zip([GUARD[0]] * 7, [PLACES[0]] * 7, P, strict=True)]  # fmt: skip
    got, plain = collate(**ALL, pad=False)(keyed(even)), default_collate(even)
    told = {"protect": [GUARD[0]] * 7, "positions": [PLACES[0]] * 7, "p": P}
    same(list(got["audio"].numpy()), expected([EVEN[0]] * 7, **told)[0])
    for name in ("guard", "places", "p"):
        assert torch.equal(got[name], plain[name])
        assert got[name].dtype == plain[name].dtype


@pytest.mark.parametrize("offset", [1, 5, 2**34 - 7])
def test_an_offset(offset):
    for rule in RULES:
        got = collate(fields=None, positions=offset, **rule)(keyed(SAMPLES))
        same(cut(got[0]), expected(positions=offset, **rule)[0])
    got = collate(fields=None, positions=np.int64(5), pad=False)(keyed([EVEN[0]] * 7))
    same(list(got[0].numpy()), expected([EVEN[0]] * 7, positions=5)[0])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_range_of_p(rule):
    got = collate(fields=None, p=(0.2, 0.9), **rule)(keyed(SAMPLES))
    done, masks = expected(p=(0.2, 0.9), **rule)
    same(cut(got[0]), done)
    same(cut(got[2]), masks)


@pytest.mark.parametrize("prefix", [5, 7, 20])
def test_samples_shorter_than_the_prefix_are_left_alone(prefix):
    for rule in ({}, {"exact": True, "scale": True}):
        got = collate(fields=None, prefix=prefix, **rule)(keyed(SAMPLES))
        same(cut(got[0]), expected(prefix=prefix, **rule)[0])
        stacked = collate(fields=None, prefix=prefix, pad=False, collate_fn=torch.stack, **rule)(keyed([EVEN[0]] * 7))
        same(list(stacked[0].numpy()), expected([EVEN[0]] * 7, prefix=prefix, **rule)[0])


def test_one_serves_all_masks():
    video = [sample.double()[:, None] for sample in SAMPLES]
    made = samples(video=video)
    got = collate(**ALL, fields={"audio": "a", "video": "v"})(keyed(made))
    for field, rows, name in (("audio", SAMPLES, "a"), ("video", video, "v")):
        done, masks = expected(rows, name, **TOLD)
        same(cut(got[field]), done)
        same(cut(got["keep_mask"][name]), masks)
    assert not torch.equal(got["keep_mask"]["a"], got["keep_mask"]["v"])
    both = collate(**ALL, fields=["audio", "video"])(keyed(made))
    same(cut(both["video"]), expected(video, **TOLD)[0])
    text = samples(text=[torch.ones(2, 3)] * 7, places=None)
    with pytest.raises(
        ValueError,
        match=r"field 'guard' of sample 0 \(key 'clip-0'\): protect must have 2 values, one a message of field 'text', but has 5",
    ):
        collate(protect="guard", fields={"audio": "a", "text": "t"})(keyed(text))


def test_dtypes_that_the_kernels_can_not_scale():
    """Float8 goes through torch's operations: kept messages that take part times 2, others as they are."""
    eights = [torch.ones(n, 4).to(torch.float8_e4m3fn) for n in LENGTHS]
    got = collate(protect="guard", positions="places", scale=True)(keyed(samples(x=eights)))
    _, masks = expected([np.ones((n, 4), np.float32) for n in LENGTHS], protect=GUARD, positions=PLACES)
    for row, keep, guard in zip(cut(got["audio"].float()), masks, GUARD, strict=True):
        assert row[:, 0].tolist() == np.where(guard, 1, np.where(keep, 2, 0)).tolist()


# ---- with a collate function of one's own


def own(given: list[Any]) -> Any:
    return {"audio": torch.nn.utils.rnn.pad_sequence([s["audio"] for s in given], batch_first=True), "n": len(given)}


@pytest.mark.parametrize("convert", [torch.as_tensor, np.asarray], ids=["torch", "numpy"])
def test_what_a_collate_function_returned(convert):
    def converted(given: list[Any]) -> Any:
        return {"audio": convert(own(given)["audio"])}

    size = max(LENGTHS)
    rows = list(np.asarray(own(samples())["audio"]))
    guard = [np.pad(leaf, (0, size - len(leaf)), constant_values=True) for leaf in GUARD]
    places = [np.pad(leaf, (0, size - len(leaf))) for leaf in PLACES]
    for rule in ({}, {"span": 2, "scale": True}, {"prefix": 2, "min_keep": 1}):
        got = collate(**ALL, pad=False, collate_fn=converted, **rule)(keyed(samples()))
        done, masks = expected(rows, protect=guard, positions=places, p=P, **rule)
        same(list(np.asarray(got["audio"])), done)
        same(list(np.asarray(got["keep_mask"])), masks)


def test_nothing_is_written_where_a_mask_does_not_fit():
    x = torch.ones(7, 7, 4)
    made = collate(
        protect="guard", pad=False, fields={"x": "x", "y": "y"}, collate_fn=lambda s: {"x": x, "y": torch.ones(7, 2, 4)}
    )
    with pytest.raises(
        ValueError,
        match=r"field 'guard' of sample 0 .*must have 2 values at most, one a message of field 'y', but has 5",
    ):
        made(keyed(samples()))
    assert x.all()


# ---- the same in all three


def test_the_same_mask_wherever_a_sample_is_dropped():
    batch = {"id": IDS, "audio": [s.numpy() for s in SAMPLES], "guard": GUARD, "places": PLACES, "p": P}
    whole = MessageDropoutBatch("p", columns="audio", key="id", seed=3, protect="guard", positions="places")(batch)
    for dataset in (samples(), samples()[::-1]):
        order = IDS if torch.equal(dataset[0]["audio"], SAMPLES[0]) else IDS[::-1]
        ids = {id(sample): key for sample, key in zip(dataset, order, strict=True)}
        loader = DataLoader(
            KeyedDataset(dataset, key=lambda sample, ids=ids: ids[id(sample)]), 3, collate_fn=collate(**ALL, return_mask=False)
        )  # fmt: skip
        got = [row for part in loader for row in cut(part["audio"], part["lengths"].tolist())]
        same(got if order == IDS else got[::-1], whole["audio"])
    for i, key in enumerate(IDS):
        alone = message_dropout(
            SAMPLES[i][None], torch.tensor([[P[i]]]).double(), seed=oracle.loader_seed(3, 0), keys=[key],
            protect=GUARD[i][None], positions=PLACES[i][None],
        )  # fmt: skip
        same([alone[0].numpy()], [whole["audio"][i]])


@pytest.mark.processes
def test_workers():
    loader = DataLoader(
        KeyedDataset(samples(guard=None), key=_key), 7, num_workers=1, multiprocessing_context="spawn",
        collate_fn=collate(protect=loud, positions="places", p="p", return_mask=False),
    )  # fmt: skip
    (got,) = loader
    same(cut(got["audio"]), expected(**{**TOLD, "protect": [loud({"audio": x}) for x in SAMPLES]})[0])
    assert got["places"].is_shared()


def _key(sample: Any) -> str:
    return IDS[next(i for i, s in enumerate(SAMPLES) if torch.equal(s, sample["audio"]))]


# ---- what is refused


def other(leaf: str, row: int, value: Any) -> list[Any]:
    made = samples()
    made[row][leaf] = value
    return made


def without(leaf: str, row: int) -> list[Any]:
    made = samples()
    del made[row][leaf]
    return made


FIVE = r"of sample 1 \(key 'clip-1'\): "
BAD = [
    ({"protect": "none"}, samples(), ValueError, "protect must be among .*'guard'.*, which a sample has, but got 'none'"),
    ({"protect": "guard", "fields": None}, SAMPLES, ValueError, r"protect must be among \[\], which a sample has, but got 'guard'"),
    ({"protect": "guard"}, other("guard", 1, GUARD[1][:3]), ValueError, rf"field 'guard' {FIVE}protect must have 7 values, one a message of field 'audio', but has 3"),
    ({"protect": "guard"}, other("guard", 1, PLACES[1]), TypeError, rf"field 'guard' {FIVE}protect must be bool.*int64"),
    ({"protect": "guard"}, other("guard", 1, torch.zeros(7)), TypeError, rf"field 'guard' {FIVE}protect must be bool.*float32; a mask of 0 and -inf"),
    ({"protect": "guard"}, other("guard", 1, torch.ones(7, 1).bool()), ValueError, rf"field 'guard' {FIVE}protect must be \(messages,\), but got shape \(7, 1\)"),
    ({"protect": "guard"}, other("guard", 1, True), ValueError, rf"field 'guard' {FIVE}protect must be \(messages,\), but got shape \(\)"),
    ({"protect": "guard"}, other("guard", 1, {}), TypeError, rf"field 'guard' {FIVE}protect must be bool.*object"),
    ({"protect": "guard"}, other("guard", 1, [[1], [1, 2]]), ValueError, rf"field 'guard' {FIVE}"),
    ({"protect": "guard"}, without("guard", 1), ValueError, rf"field 'guard' {FIVE}protect must be there for every sample, but got KeyError"),
    ({"protect": "audio"}, samples(), TypeError, r"field 'audio' of sample 0 \(key 'clip-0'\): protect must be bool"),
    ({"protect": lambda sample: sample["guards"]}, samples(), ValueError, r"what protect gives for sample 0 \(key 'clip-0'\): .*KeyError"),
    ({"protect": lambda sample: None}, samples(), TypeError, r"what protect gives for sample 0 \(key 'clip-0'\): protect must be bool.*object"),
    ({"positions": "places"}, other("places", 1, PLACES[1] - 9), ValueError, rf"field 'places' {FIVE}positions must be from 0 to 2\*\*34 - 1, but got -"),
    ({"positions": "places"}, other("places", 1, GUARD[1]), TypeError, rf"field 'places' {FIVE}positions must be integers.*bool"),
    ({"positions": "places"}, other("places", 1, PLACES[1][:2]), ValueError, rf"field 'places' {FIVE}positions must have 7 values"),
    ({"positions": 2**34 - 5}, samples(), ValueError, r"positions must be from 0 to 2\*\*34 - 1"),
    ({"p": "p"}, other("p", 1, 1.5), ValueError, rf"field 'p' {FIVE}p must be a probability, from 0 to 1, but got 1.5"),
    ({"p": "p"}, other("p", 1, torch.tensor(float("nan"))), ValueError, rf"field 'p' {FIVE}p must be a probability.*nan"),
    ({"p": "p"}, other("p", 1, True), TypeError, rf"field 'p' {FIVE}p must be a number.*True"),
    ({"p": "p"}, other("p", 1, (0.1, 0.2)), TypeError, rf"field 'p' {FIVE}p must be a number"),
    ({"p": "p"}, other("p", 1, torch.ones(1)), TypeError, rf"field 'p' {FIVE}p must be a number"),
    ({"p": lambda sample: "much"}, samples(), TypeError, "what p gives for sample 0 .*p must be a number.*'much'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "made", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_leaves(options, made, error, words):
    with pytest.raises(error, match=words):
        collate(**options)(keyed(made))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"protect": True}, TypeError, "protect must be a field's name, index or path, or a function.*True"),
        ({"protect": ()}, TypeError, r"protect must be a field's name.*\(\)"),
        ({"protect": torch.ones(3).bool()}, TypeError, "protect must be a field's name"),
        ({"positions": 1.5}, TypeError, "positions must be an integer.*1.5"),
        ({"positions": -1}, ValueError, "positions must be from 0.*-1"),
        ({"positions": (0, 1)}, TypeError, r"positions must be an integer, or say where.*\(0, 1\)"),
        ({"positions": ("places", 1.5)}, TypeError, "positions must be a field's name"),
        ({"p": ("p", None)}, TypeError, "p must be a field's name"),
        ({"p": "p", "exact": True}, ValueError, "exact needs p to be a single number or range"),
        ({"p": (0.9, 0.1)}, ValueError, "lo <= hi"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        collate(**options)
