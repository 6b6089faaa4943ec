"""What users may give for keys, p, seed, training and epoch: ids, arrays that broadcast, nothing at all."""

from __future__ import annotations

import uuid

import naive
import numpy as np
import pytest
import torch
from helpers.oracle import dropout

from msgdrop_numba import (
    Keyed,
    MessageDropout,
    MessageDropoutBatch,
    MessageDropoutCollate,
    fold_in,
    keep_mask,
    message_dropout,
    row_key,
)

UUIDS = [uuid.UUID(int=7), uuid.UUID(int=2**127 + 5)]
X = np.random.default_rng(3).standard_normal((2, 9, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "ids",
    [["clip-1", "söme"], ["a", 5], [b"a", b"\xff\x00"], UUIDS, np.array(["clip-1", "b"]), np.array(["x", -3], object),
     np.array([b"ab", b"c"]), (2**64 - 1, "z")],
    ids=repr,
)  # fmt: skip
def test_keys_that_are_ids(ids):
    keys = [row_key(key) for key in (ids.tolist() if isinstance(ids, np.ndarray) else ids)]
    keep = naive.keep_mask((2, 9), 0.5, seed=4, keys=keys)
    assert np.array_equal(keep_mask((2, 9), 0.5, seed=4, keys=ids), keep)
    assert np.array_equal(keep_mask((2, 9), 0.5, seed=4, keys=ids, device="cpu"), keep)
    assert np.array_equal(keep_mask((2, 9), 0.5, seed=4, keys=ids, device="meta").shape, keep.shape)
    for x in (X, torch.from_numpy(X)):
        assert np.array_equal(message_dropout(x, 0.5, seed=4, keys=ids, return_mask=True)[1], keep)
    layer = MessageDropout(0.5)
    assert np.array_equal(layer(torch.from_numpy(X), seed=4, keys=ids, return_mask=True)[1], keep)
    batched = torch.vmap(lambda x: message_dropout(x, 0.5, seed=4, keys=ids))(torch.ones(3, 2, 9, 1))
    assert np.array_equal(batched[1, ..., 0].bool(), keep)


def test_ids_that_lack_dims():
    keep = naive.keep_mask((2, 3, 5), 0.5, seed=4, keys=[row_key("a"), row_key("b")])
    assert np.array_equal(keep_mask((2, 3, 5), 0.5, seed=4, keys=["a", "b"]), keep)
    nested = [["a", "b", "c"], ["d", "e", "f"]]
    keep = naive.keep_mask((2, 3, 5), 0.5, seed=4, keys=[[row_key(key) for key in row] for row in nested])
    assert np.array_equal(keep_mask((2, 3, 5), 0.5, seed=4, keys=nested), keep)


def test_a_sample_of_a_pipeline_by_itself():
    """README says that a mask can be had again for one sample."""
    collate = MessageDropoutCollate(0.5, seed=7, return_mask=True)
    collate.set_epoch(3)
    _, masks = collate([Keyed("clip-1", X[0]), Keyed("clip-2", X[1])])
    alone = keep_mask((1, 9), 0.5, seed=fold_in(7, 3), keys=["clip-2"])
    assert np.array_equal(alone[0], masks[1])


@pytest.mark.parametrize("shape", [(1,), (4,), (3, 4), (1, 4), (3, 1), (2, 1, 1), (1, 3, 4), (2, 3, 4), (2, 1, 4)])
@pytest.mark.parametrize("scale", [False, True])
def test_p_broadcasts_from_the_right(shape, scale):
    p = np.random.default_rng(len(shape)).random(shape)
    x = np.random.default_rng(1).standard_normal((2, 3, 4, 5)).astype(np.float32)
    want, keep = dropout(x, np.broadcast_to(p, (2, 3, 4)), seed=6, message_dims=3, scale=scale)
    options = {"seed": 6, "message_dims": 3, "scale": scale, "return_mask": True}
    t = torch.from_numpy(x)
    for y, mask in (
        message_dropout(x, p, **options),
        message_dropout(t, torch.from_numpy(p), **options),
        torch.vmap(lambda t: message_dropout(t, torch.from_numpy(p), **options))(t[None]),
    ):
        assert np.array_equal(np.asarray(mask).reshape(2, 3, 4), keep)
        assert np.asarray(y).tobytes() == want.tobytes()
    assert np.array_equal(keep_mask((2, 3, 4), p, seed=6), keep)


@pytest.mark.parametrize("shape", [(2, 4), (3,), (2, 3, 4, 1), (2, 2, 4), (0,)])
def test_p_that_does_not_broadcast(shape):
    for make in (np.full, torch.full):
        with pytest.raises(ValueError, match=r"p must be a number or have shape \(4,\) or \(2, 3, 4\)"):
            keep_mask((2, 3, 4), make(shape, 0.5), seed=1)


def test_a_mask_without_a_seed():
    assert not np.array_equal(keep_mask((20, 20), 0.5), keep_mask((20, 20), 0.5))
    torch.manual_seed(5)
    mask = keep_mask((20, 20), 0.5, device="cpu")
    torch.manual_seed(5)
    assert torch.equal(mask, message_dropout(torch.ones(20, 20, 1), 0.5)[..., 0].bool())
    assert keep_mask((2, 3), 0.5, device="meta").shape == (2, 3)


@pytest.mark.parametrize("epoch", [-1, -(2**63), 2**63, 2**64 - 1, np.int64(-5)])
def test_epochs_alike_in_collate_and_batch(epoch):
    collate = MessageDropoutCollate(0.5, seed=7)
    collate.set_epoch(epoch)
    got = collate([Keyed("a", X[0]), Keyed("b", X[1])])
    batch = MessageDropoutBatch(0.5, columns="x", key="id", seed=7, epoch=epoch)({"id": ["a", "b"], "x": X})
    assert np.array_equal(got, batch["x"])
    keep = naive.keep_mask((2, 9), 0.5, seed=naive.fold_in(7, int(epoch)), keys=[row_key("a"), row_key("b")])
    assert np.array_equal(got, naive.drop(X, keep))


@pytest.mark.parametrize("training", ["train", 1, 0, None, torch.tensor(True), [True]])
def test_training_is_a_bool(training):
    for x in (X, torch.from_numpy(X), torch.from_numpy(X).to("meta")):
        for more in ({}, {"seed": 1}):
            with pytest.raises(TypeError, match="training must be True or False"):
                message_dropout(x, 0.5, training, **more)


def test_numpy_bools_are_bools():
    assert message_dropout(X, 0.5, np.bool_(False)) is X
    assert not np.array_equal(message_dropout(X, 0.5, np.bool_(True), seed=1), X)
