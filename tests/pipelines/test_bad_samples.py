"""What MessageDropoutCollate refuses: bad samples, bad options, bad epochs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import internals
from helpers.samples import EVEN, SAMPLES
from torch.utils.data import DataLoader, default_collate

from msgdrop_numba import Keyed, KeyedDataset, MessageDropoutCollate

BAD = [
    (
        {},
        [(EVEN[0], 1), (EVEN[1], 2, "x")],
        ValueError,
        "sample 1 must have the fields of the first, tuple of 2.*tuple of 3",
    ),
    (
        {"fields": "x"},
        [{"x": EVEN[0]}, (EVEN[0],)],
        ValueError,
        "sample 1 must have the fields of the first.*tuple of 1",
    ),
    ({}, [(EVEN[0], 1), EVEN[1]], ValueError, "sample 1 must have the fields of the first.*Tensor"),
    ({"p": np.full(4, 0.5)}, EVEN, ValueError, "p must have one probability for each of the 5.*4"),
    ({}, [EVEN[0].to("meta")], TypeError, "sample 0 must be an ordinary CPU tensor.*meta"),
    ({}, [np.ma.masked_array(EVEN[0].numpy())], TypeError, "sample 0 must be an array or a tensor.*MaskedArray"),
    ({}, SAMPLES, ValueError, "sample 1 must have 5 messages.*7.*pad=True"),
    ({}, [{"x": s} for s in EVEN], ValueError, r"fields must name the fields.*\['x'\]"),
    ({"fields": "y"}, [{"x": s} for s in EVEN], ValueError, r"fields must be among \['x'\].*'y'"),
    ({"fields": 2}, [(s, 1) for s in EVEN], ValueError, r"fields must be among \[0, 1\].*2"),
    ({"fields": -1}, [(s, 1) for s in EVEN], ValueError, r"fields must be among \[0, 1\].*-1"),
    ({"fields": 0}, EVEN, ValueError, "fields must be None where a sample is an array"),
    ({"fields": 1}, [(s, 1) for s in EVEN], TypeError, "field 1 of sample 0 must be an array or a tensor.*int"),
    (
        {"fields": "x"},
        [{"x": EVEN[0]}, {"z": EVEN[0]}],
        ValueError,
        r"sample 1 must have the fields of the first, dict with \['x'\].*\['z'\]",
    ),
    ({}, [EVEN[0], EVEN[1].double()], ValueError, "sample 1 must be like.*float64"),
    ({}, [EVEN[0], EVEN[1][:, :3]], ValueError, r"sample 1 must be like.*\(3,\)"),
    ({}, [torch.ones(3)], ValueError, r"sample 0 must be \(messages, \*features\).*\(3,\)"),
    ({}, [1.0, 2.0], TypeError, "a sample must be an array, tensor.*float"),
    ({}, [], ValueError, "at least one sample"),
    ({}, EVEN[0], TypeError, "samples must be a list.*Tensor.*batch_size=None"),
    ({}, Keyed(1, EVEN[0]), TypeError, "samples must be a list.*Keyed"),
    ({}, [Keyed(1, EVEN[0]), EVEN[1]], TypeError, "all be Keyed or none, but 1 of 2"),
    ({}, [Keyed(1, EVEN[0]), Keyed(1.5, EVEN[1])], TypeError, r"a sample's key must be.*1.5.*with the keys \[1, 1.5\]"),
    ({"seed": 3}, EVEN, ValueError, "seed=3 needs the samples' ids.*KeyedDataset"),
    ({"pad": True, "fields": "x"}, [{"x": s, "lengths": 1} for s in EVEN], ValueError, r"fields named \['lengths'\]"),
    ({"fields": [0, 1], "pad": True}, [(EVEN[0], EVEN[0][:2])], ValueError, "field 1 of sample 0.*share one mask"),
    ({"scale": True}, [s.int() for s in EVEN], TypeError, "scale=True needs.*int32"),
    ({"fill": 0.5}, [s.int() for s in EVEN], ValueError, "fill must be.*int32.*0.5"),
    ({"pad": True, "pad_value": 0.5}, [s.int() for s in EVEN], ValueError, "pad_value must be.*int32.*0.5"),
    ({}, [np.array([["a"]])], TypeError, "sample 0 must have a dtype that torch has.*<U1"),
    (
        {"collate_fn": default_collate, "fields": "y"},
        [{"x": s} for s in EVEN],
        ValueError,
        r"fields must be among \['x'\], which what collate_fn returned has, but got 'y'",
    ),
    (
        {"collate_fn": default_collate},
        [{"x": s} for s in EVEN],
        ValueError,
        "fields must name the fields to drop in where what collate_fn returned is a dict",
    ),
    (
        {},
        [(EVEN[0], EVEN[0]), (EVEN[1], EVEN[0][:2])],
        RuntimeError,
        "field 1, which isn't among fields.*stack expects",
    ),
    ({}, [(EVEN[0], {1})] * 2, TypeError, "field 1, which isn't among fields.*set"),
    ({}, [EVEN[0].to_sparse()] * 2, TypeError, "sample 0 must be an ordinary CPU tensor"),
]


@pytest.mark.parametrize(("options", "samples", "error", "message"), BAD)
def test_bad_samples(options, samples, error, message):
    with pytest.raises(error, match=message):
        MessageDropoutCollate(**{"p": 0.5, **options})(samples)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning", "ignore:.*nested tensors:UserWarning")
def test_tensors_of_other_kinds():
    """What torch warns of is that it makes such tensors at all."""
    for make in (
        lambda: torch.quantize_per_tensor(EVEN[0], 1.0, 0, torch.quint8),
        lambda: torch.nested.nested_tensor([EVEN[0]]),
    ):
        with pytest.raises(TypeError, match="sample 0 must be an ordinary CPU tensor"):
            MessageDropoutCollate(0.5)([make()] * 2)
    with pytest.raises(TypeError, match="sample 1 must be an ordinary CPU tensor"):
        MessageDropoutCollate(0.5)([EVEN[0], torch.nested.nested_tensor([EVEN[0]])])


@pytest.mark.parametrize("guards", [True, False])
def test_samples_that_are_asked_together(guards, monkeypatch):
    """What is known of some doesn't hold for others: of other dims, orders, places in memory, or signs."""
    if not guards:
        internals.torch_without_guards(monkeypatch)
    collate = MessageDropoutCollate(0.5, seed=1)
    collate.set_epoch(0)
    labels = MessageDropoutCollate(0.5, remove=True, companions=1, pad=True)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match="field 1 of sample 0"):
            labels([(sample, torch.tensor(1.0)) for sample in EVEN])
        labels([(sample, torch.ones(len(sample))) for sample in EVEN])
        want = collate([Keyed(i, sample) for i, sample in enumerate(EVEN)])
        turned = [sample.t().contiguous().t() for sample in EVEN]
        apart = [torch.stack([sample, sample], 2)[..., 0] for sample in EVEN]
        negated = [torch._neg_view(-sample) for sample in EVEN]
        for others in (
            turned,
            apart,
            negated,
            [sample.clone().requires_grad_() for sample in EVEN],
            EVEN[:1] + turned[1:],
        ):
            assert torch.equal(collate([Keyed(i, sample) for i, sample in enumerate(others)]), want)
        with torch.inference_mode():
            assert torch.equal(collate([Keyed(i, sample.clone()) for i, sample in enumerate(EVEN)]), want)


@pytest.mark.processes
def test_errors_name_the_sample_and_its_key():
    for key in (31, "clip-31"):
        with pytest.raises(ValueError, match=rf"field 0 of sample 1 \(key {key!r}\)"):
            MessageDropoutCollate(0.5)([Keyed(30, (EVEN[0], 1)), Keyed(key, (SAMPLES[1], 1))])
    loader = DataLoader(KeyedDataset(SAMPLES), 2, num_workers=1, collate_fn=MessageDropoutCollate(0.5))
    with pytest.raises(ValueError, match=r"sample 1 \(key 1\) must have 5 messages"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"p": 1.5}, ValueError, "p must be"),
        ({"seed": -1}, ValueError, "seed must be.*-1"),
        ({"seed": 1.5}, TypeError, "seed must be.*1.5"),
        ({"pad": True, "collate_fn": default_collate}, ValueError, "pad=True can't be used with collate_fn"),
        ({"fields": []}, ValueError, "fields must name at least one"),
        ({"fields": 1.5}, TypeError, "fields must be a name, an index.*1.5"),
        ({"fields": {"a", "b"}}, TypeError, "fields must be a name, an index"),
        ({"fields": True}, TypeError, "fields must be names.*True"),
        ({"collate_fn": 5}, TypeError, "collate_fn must be a function.*5"),
        ({"fill": "a"}, TypeError, "fill must be.*'a'"),
        ({"pad_value": None}, TypeError, "pad_value must be.*None"),
        ({"span": 0}, ValueError, "span must be.*0"),
        ({"p": np.full((2, 3), 0.5)}, ValueError, r"p must be a number or have one dim.*\(2, 3\)"),
    ],
)
def test_bad_construction(options, error, message):
    with pytest.raises(error, match=message):
        MessageDropoutCollate(**options)


@pytest.mark.parametrize(
    ("epoch", "error"), [(-(2**63) - 1, ValueError), (2**64, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_bad_epochs(epoch, error):
    with pytest.raises(error, match="epoch must be"):
        MessageDropoutCollate().set_epoch(epoch)
