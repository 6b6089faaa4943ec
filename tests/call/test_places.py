"""Contract 1.1 as users meet it: who takes part, where messages stand, each row its own rate."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from helpers import internals
from helpers.cases import both
from helpers.oracle import dropout

from msgdrop_numba import MessageDropout, keep_mask, message_dropout

X = np.random.default_rng(3).standard_normal((4, 9, 3)).astype(np.float32)
PROTECT = np.random.default_rng(4).random((4, 9)) < 0.4
POSITIONS = np.random.default_rng(5).integers(0, 2**34, (4, 9))


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
@pytest.mark.parametrize("rule", [{}, {"span": 5}, {"p": (0.1, 0.9)}, {"p": (0.0, 1.0), "span": 3}], ids=str)
def test_a_sequence_in_pieces_has_the_mask_of_the_whole(rule, pieces):
    """Cut where no Philox counter begins, too."""
    options = {"p": 0.4, "seed": 11, "keys": [5, -1, 2**63, 7], **rule}
    whole = keep_mask((4, 4096), **options)
    ends = np.linspace(0, 4096, pieces + 1).astype(int)
    for device in (None, "cpu", "meta"):
        cut = [
            keep_mask((4, end - start), positions=start, device=device, **options)
            for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        ]
        if device == "meta":
            assert [tuple(piece.shape) for piece in cut] == [(4, n) for n in np.diff(ends)]
        else:
            assert np.array_equal(np.concatenate(cut, axis=1), whole)
    assert np.array_equal(naive.keep_mask((4, 30), positions=int(ends[-2]), **options), whole[:, ends[-2] :][:, :30])


def test_both_directions_of_an_edge_share_a_draw():
    edges = np.array([[0, 1, 1, 2, 0, 2], [1, 0, 2, 1, 2, 0]])
    position = np.minimum(*edges) * 3 + np.maximum(*edges)
    mask = keep_mask(6, 0.5, seed=2, positions=position)
    assert np.array_equal(mask[::2], mask[1::2])
    assert 0 < mask.sum() < 6


def test_masks_agree_after_messages_were_removed_and_reordered():
    whole = keep_mask((3, 40), 0.5, seed=6, min_keep=0, span=1)
    chosen = np.random.default_rng(0).permuted(np.tile(np.arange(40), (3, 1)), axis=1)[:, :11]
    again = keep_mask((3, 11), 0.5, seed=6, positions=chosen)
    assert np.array_equal(again, np.take_along_axis(whole, chosen, axis=1))


@both
def test_protected_messages_pass_bit_for_bit(make):
    x = X.copy()
    x[PROTECT] = np.frombuffer(b"\x01\x00\xa0\x7f", np.float32)[0]  # a signalling NaN, which arithmetic would quieten
    y, mask = message_dropout(make(x), 1.0, protect=make(PROTECT), scale=True, return_mask=True)
    assert np.array_equal(np.asarray(mask), PROTECT)
    assert np.asarray(y)[PROTECT].tobytes() == x[PROTECT].tobytes()
    assert not np.asarray(y)[~PROTECT].any()
    y = message_dropout(make(x), 0.5, protect=make(PROTECT), prefix=2, exact=True, scale=True, seed=3)
    assert np.asarray(y)[PROTECT].tobytes() == x[PROTECT].tobytes()


@both
def test_a_range_of_one_number_is_that_number(make):
    for scale in (False, True):
        one = message_dropout(make(X), 0.3, seed=1, scale=scale)
        assert np.array_equal(message_dropout(make(X), (0.3, 0.3), seed=1, scale=scale), one)
    x = make(X)
    assert message_dropout(x, (0, 0)) is x
    assert message_dropout(x, (0.1, 0.9), training=False) is x
    assert np.array_equal(message_dropout(x, (1, 1)), np.zeros_like(X))


@both
def test_rows_that_are_shorter_than_the_prefix(make):
    mask = message_dropout(make(X), 1.0, prefix=5, lengths=[9, 5, 2, 0], return_mask=True)[1]
    assert np.asarray(mask).sum(axis=1).tolist() == [5, 9, 9, 9]
    assert np.asarray(message_dropout(make(X), 1.0, prefix=9)).tobytes() == X.tobytes()


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"prefix": 2}, {"prefix": 2, "exact": True}, {"protect": PROTECT}, {"protect": PROTECT[0], "exact": True},
        {"positions": 7}, {"positions": 7, "span": 3}, {"positions": POSITIONS, "min_keep": 3}, {"p": (0.2, 0.9)},
        {"p": (0.2, 0.9), "exact": True, "keys": [3, 1, -1, 2**63], "lengths": [9, 0, 4, 7]},
        {"p": (0.2, 0.9), "keys": [3, 1, -1, 2**63], "protect": PROTECT, "prefix": 1, "positions": POSITIONS[0]},
        {"p": np.linspace(0, 1, 9), "protect": PROTECT, "lengths": [9, 0, 4, 7]},
    ],
    ids=lambda options: ",".join(options),
)  # fmt: skip
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "operations"])
def test_gradients(options, scale, kernels, monkeypatch):
    """Backward is the same map, whatever becomes of the arguments meanwhile; twice, and through a learnt fill too."""
    if not kernels:
        internals.no_host_tensors(monkeypatch)
    p = options.get("p", 0.5)
    rest = {name: value for name, value in options.items() if name != "p"}
    given = {name: torch.tensor(v) if isinstance(v, np.ndarray) else v for name, v in rest.items()}
    x, grad = torch.from_numpy(X.copy()).requires_grad_(), np.random.default_rng(1).standard_normal(X.shape)
    grad, fill = grad.astype(np.float32), torch.ones(3, requires_grad=True)
    y = message_dropout(x, p, seed=4, scale=scale, fill=fill, **given)
    want, keep = dropout(X, p, seed=4, scale=scale, fill=1, **rest)
    assert y.detach().numpy().tobytes() == want.tobytes()
    for value in given.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    grad_x, grad_fill = torch.autograd.grad(y, (x, fill), torch.from_numpy(grad))
    want, _ = dropout(grad, p, seed=4, scale=scale, **rest)
    assert grad_x.numpy().tobytes() == want.tobytes()
    assert torch.allclose(grad_fill, torch.from_numpy(grad[~keep].sum(axis=0)), atol=1e-5)
    given = {name: torch.tensor(v) if isinstance(v, np.ndarray) else v for name, v in rest.items()}
    wide = torch.from_numpy(X.astype(np.float64)).requires_grad_()
    torch.autograd.gradgradcheck(lambda x: message_dropout(x, p, seed=4, scale=scale, **given), wide)


@pytest.mark.parametrize("layout", [[1, 0, 2], [0, 2, 1], [2, 1, 0]], ids=str)
@pytest.mark.parametrize("options", [{"protect": PROTECT, "exact": True}, {"p": (0.2, 0.9), "prefix": 2}], ids=str)
def test_scaled_layouts_that_kernels_cannot_follow(layout, options):
    back = np.argsort(layout)
    options = {"p": 0.5, "seed": 4, "scale": True, **options}
    want, _ = dropout(X, **options)
    array = X.transpose(layout).copy().transpose(back)
    assert message_dropout(array, **options).tobytes() == want.tobytes()
    assert message_dropout(array.astype(">f4"), **options).astype("<f4").tobytes() == want.tobytes()
    assert torch.equal(message_dropout(torch.from_numpy(array), **options), torch.from_numpy(want))
    assert torch.equal(message_dropout(torch.from_numpy(array), inplace=True, **options), torch.from_numpy(want))


def test_the_layer():
    layer = MessageDropout((0.2, 0.9), prefix=1, exact=True)
    assert repr(layer) == "MessageDropout(p=(0.2, 0.9), inplace=False, exact=True, prefix=1)"
    x = torch.from_numpy(X)
    y = layer(x, seed=3, protect=torch.from_numpy(PROTECT), positions=5)
    want, _ = dropout(X, (0.2, 0.9), prefix=1, exact=True, seed=3, protect=PROTECT, positions=5)
    assert torch.equal(y, torch.from_numpy(want))
    torch.manual_seed(0)
    drawn = layer(x)
    torch.manual_seed(0)
    assert torch.equal(MessageDropout((0.2, 0.9), prefix=1, exact=True)(x), drawn)
    for wrong in (1.5, -1, True):
        with pytest.raises((TypeError, ValueError), match="prefix must be"):
            MessageDropout(prefix=wrong)
    with pytest.raises(ValueError, match="prefix must be at most 9"):
        MessageDropout(prefix=10)(x)


def test_offsets_of_every_kind():
    want = keep_mask((4, 9), 0.5, seed=1, positions=7)
    for offset in (np.int32(7), np.array(7), torch.tensor(7), torch.tensor(7, dtype=torch.int32)):
        assert np.array_equal(keep_mask((4, 9), 0.5, seed=1, positions=offset), want)
        assert np.array_equal(keep_mask((4, 9), 0.5, seed=1, positions=offset, device="cpu"), want)
    for positions in (list(range(7, 16)), np.arange(7, 16, dtype=np.uint16), torch.arange(7, 16).expand(4, 9)):
        assert np.array_equal(keep_mask((4, 9), 0.5, seed=1, positions=positions), want)


def test_what_is_given_stays_as_it_is():
    """Even where it is the memory that is written."""
    protect = PROTECT.copy()
    for inplace in (False, True):
        x = protect[..., None]
        want, _ = dropout(PROTECT[..., None], 0.5, seed=1, protect=PROTECT)
        y = message_dropout(x, 0.5, seed=1, protect=protect, inplace=inplace)
        assert np.array_equal(y, want)
        assert np.array_equal(protect, want[..., 0] if inplace else PROTECT)
    positions = np.arange(36).reshape(4, 9)
    want, _ = dropout(positions[..., None], 0.5, seed=1, positions=positions.copy())
    assert np.array_equal(message_dropout(positions[..., None], 0.5, seed=1, positions=positions, inplace=True), want)


def test_p_that_is_certain_in_a_range():
    """A row's threshold may be 1 where the range is too small to tell its ends apart: nothing is scaled then."""
    p = (1 - 2.0**-40, 1.0)
    for rules in ({"min_keep": 3}, {"exact": True, "min_keep": 3}):
        want, _ = dropout(X, p, seed=2, scale=True, **rules)
        assert np.array_equal(message_dropout(X, p, seed=2, scale=True, **rules), want)
        assert np.array_equal(np.unique(want[want != 0]), np.unique(X[want != 0]))
