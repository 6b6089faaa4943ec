"""MessageDropout, the layer."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.utils.checkpoint

from msgdrop_numba import MessageDropout, keep_mask, message_dropout


def test_train_and_eval():
    layer = MessageDropout(0.5)
    x = torch.ones(4, 64, 2)
    assert layer.train()(x).any(dim=2).float().mean() < 1
    assert layer.eval()(x) is x


def test_forward_takes_seed_keys_lengths_and_gives_the_mask():
    layer = MessageDropout(0.5)
    x = torch.ones(2, 8, 3)
    options = {"seed": 4, "keys": [10, 20], "lengths": [8, 3]}
    y, mask = layer(x, return_mask=True, **options)
    assert torch.equal(mask, keep_mask((2, 8), 0.5, device="cpu", **options))
    assert torch.equal(y, mask[..., None].expand(2, 8, 3).float())


def test_options_reach_the_function():
    x = torch.ones(64, 4, 2)
    layer = MessageDropout(0.5, inplace=True, scale=True, fill=-3, message_dims=1)
    y, mask = layer(x, return_mask=True)
    assert y is x
    assert mask.shape == (64,)
    assert set(y.unique().tolist()) == {2.0, -3.0}


def test_repr():
    assert repr(MessageDropout(0.3)) == "MessageDropout(p=0.3, inplace=False)"
    layer = MessageDropout(1, True, scale=True, fill=2.0, message_dims=3)
    assert repr(layer) == "MessageDropout(p=1.0, inplace=True, scale=True, fill=2.0, message_dims=3)"


def test_state_dict_deepcopy_and_pickle():
    layer = MessageDropout(0.3, scale=True, fill=1.5)
    assert layer.state_dict() == {}
    layer.load_state_dict({})
    x = torch.ones(4, 64, 2)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        assert torch.equal(other(x, seed=1), layer(x, seed=1))


def test_rules_and_fills_reach_the_function():
    x = torch.randn(4, 9, 2)
    token = torch.randn(2)
    for options in ({"exact": True}, {"span": 3}, {"min_keep": 5}, {"p": torch.rand(9)}, {"fill": token}):
        layer = MessageDropout(**{"p": 0.6, **options})
        assert torch.equal(layer(x, seed=1), message_dropout(x, seed=1, **{"p": 0.6, **options}))
    assert set(MessageDropout(torch.rand(9), fill=token).state_dict()) == {"fill"}
    assert (
        repr(MessageDropout(torch.arange(1, 10) / 10, fill=token))
        == "MessageDropout(p=Tensor(9,) of 0.1 to 0.9, inplace=False, fill=Tensor(2,))"
    )


def test_an_array_of_probabilities_is_a_copy_in_float64():
    p = np.linspace(0, 1, 9)
    layer = MessageDropout(p)
    want = layer(torch.ones(4, 9, 2), seed=1)
    p[:] = 0
    assert torch.equal(layer.bfloat16()(torch.ones(4, 9, 2), seed=1), want)


def test_a_mask_token_is_learnt():
    layer = MessageDropout(0.5, fill=torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    assert list(dict(layer.named_parameters())) == ["fill"]
    x = torch.randn(4, 9, 2, dtype=torch.float64)
    y, mask = layer(x, seed=1, return_mask=True)
    weight = torch.randn(4, 9, 2, dtype=torch.float64)
    (y * weight).sum().backward()
    torch.testing.assert_close(layer.fill.grad, weight[~mask].sum(0))
    for function in (
        lambda f: message_dropout(x, 0.5, seed=1, fill=f),
        lambda f: message_dropout(x * f, 0.5, seed=1, fill=f),
    ):
        fill = torch.randn(2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, fill)
        assert torch.autograd.gradgradcheck(function, fill)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpoint(use_reentrant):
    layer = MessageDropout(0.5, exact=True)
    x = torch.randn(4, 9, 2, requires_grad=True)
    torch.manual_seed(3)
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
    torch.rand(3)
    y.square().sum().backward()
    assert torch.equal(x.grad, want)


def test_in_a_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), MessageDropout(0.5), torch.nn.Linear(5, 4))
    x = torch.randn(3, 7, 6)
    torch.manual_seed(2)
    first = model(x)
    torch.manual_seed(2)
    assert torch.equal(model(x), first)
    first.sum().backward()
    assert model[0].weight.grad.any()


@pytest.mark.parametrize(
    ("p", "error"),
    [(-0.1, ValueError), (1.1, ValueError), (float("nan"), ValueError), ("a", TypeError), (None, TypeError)],
)
def test_bad_p_fails_at_construction(p, error):
    with pytest.raises(error, match="p must be"):
        MessageDropout(p)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fill": "a"}, TypeError, "fill must be.*'a'"),
        ({"message_dims": 0}, ValueError, "message_dims must be.*0"),
        ({"span": 2.5}, TypeError, "span must be.*2.5"),
        ({"exact": True, "p": torch.rand(3)}, ValueError, "exact needs p"),
        ({"p": np.array([np.nan, 0.5])}, ValueError, "p must hold probabilities.*nan"),
        ({"p": torch.tensor([-1.0, 2.0])}, ValueError, "p must hold probabilities.*-1"),
    ],
)
def test_bad_options_fail_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        MessageDropout(**options)
