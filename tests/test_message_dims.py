"""Message dims that are named wherever they are: channels first, time first. What comes back lies as x does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import internals, oracle
from helpers.cases import both, equal
from torch import nn

from msgdrop_numba import MessageDropout, MessageSelect, MessageSubset, message_dropout, message_select

# The shape of x and the dims that are named: channels first, time first, one row, images, pieces that lie unevenly.
LAID = [((3, 4, 7), (0, 2)), ((7, 3, 4), (1, 0)), ((4, 7), (-1,)), ((2, 3, 4, 7), (0, -1)), ((2, 3, 5, 4), (0, 2, 3)),
        ((3, 5, 2, 4), (3, 1)), ((2, 3, 4, 5), (0, 1))]  # fmt: skip
RULES = [
    {}, {"scale": True}, {"exact": True, "scale": True}, {"span": 3, "min_keep": 2}, {"p": (0.2, 0.8), "scale": True},
    {"prefix": 1, "scale": True}, {"fill": -2.5}, {"positions": 100},
]  # fmt: skip


def in_front(x, dims):
    """x with the named dims in front, and how to put them back."""
    order = [dim % x.ndim for dim in dims]
    order += [dim for dim in range(x.ndim) if dim not in order]
    return np.ascontiguousarray(np.transpose(x, order)), np.argsort(order)


def expected(x, dims, **options):
    turned, back = in_front(x, dims)
    y, keep = oracle.dropout(turned, message_dims=len(dims), **options)
    return np.ascontiguousarray(np.transpose(y, back)), keep


def some(shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x.flat[3] = np.nan
    return x


@both
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("shape", "dims"), LAID, ids=str)
def test_they_equal_the_contract(make, shape, dims, rule, monkeypatch):
    x, told = some(shape), {"p": 0.5, "seed": 5, **rule}
    want, keep = expected(x, dims, **told)
    for parts in (1, 3):
        internals.cut_into(monkeypatch, parts)
        given, out = make(x), make(np.empty_like(x))
        y, mask = message_dropout(given, message_dims=dims, return_mask=True, **told)
        assert np.array_equal(np.asarray(mask), keep)
        assert message_dropout(given, message_dims=dims, out=out, **told) is out
        assert message_dropout(given, message_dims=dims, inplace=True, **told) is given
        for made in (y, out, given):
            equal(torch.as_tensor(made), want)
            assert torch.as_tensor(made).is_contiguous()


@both
def test_lengths_keys_and_vectors_go_by_the_named_dims(make):
    x, fill, protect = some((3, 4, 7)), np.arange(4, dtype=np.float32), np.arange(7) % 3 == 0
    told = {"p": 0.6, "seed": 5, "lengths": [7, 0, 4], "keys": [9, -9, 2**63], "protect": protect, "scale": True}
    want, _ = expected(x, (0, 2), fill=fill, **told)
    equal(torch.as_tensor(message_dropout(make(x), message_dims=(0, 2), fill=make(fill), **told)), want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_words_of_any_width_pass_bit_for_bit(dtype):
    x = torch.from_numpy(np.random.default_rng(1).integers(0, 200, (2, 6, 1100))).to(dtype)  # more than one block
    y, keep = message_dropout(x, 0.4, seed=1, message_dims=(0, 2), return_mask=True)
    assert torch.equal(y, torch.where(keep.unsqueeze(1), x, torch.zeros((), dtype=dtype)))
    scaled = message_dropout(x[:, ::2], 0.4, seed=1, scale=True, message_dims=(0, 2)) if dtype.is_floating_point else y
    turned = message_dropout(x[:, ::2].transpose(1, 2).contiguous(), 0.4, seed=1, scale=dtype.is_floating_point)
    assert torch.equal(scaled if dtype.is_floating_point else y[:, ::2], turned.transpose(1, 2))


@both
def test_the_kernel_writes_channels_first_in_one_pass(make, monkeypatch):
    launches = internals.watch_launches(monkeypatch)
    for x, dims in ((make(some((3, 4, 7))), (0, 2)), (make(some((3, 4, 7)).transpose(0, 2, 1)), None)):
        message_dropout(x, 0.5, seed=1, message_dims=dims)
    assert [bool(launch.out) for launch in launches] == [True, True]  # 0: the mask alone, written by operations


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("shape", "dims"), LAID[:4], ids=str)
def test_the_gradient_is_the_same_map(shape, dims, rule):
    x, told = torch.randn(shape, requires_grad=True), {"p": 0.5, "seed": 5, **rule}
    grad = torch.randn(shape)
    for leaf in (x, x * 1):
        (got,) = torch.autograd.grad(message_dropout(leaf, message_dims=dims, **told), leaf, grad)
        equal(got, expected(grad.numpy(), dims, **{**told, "fill": 0})[0])
    inner = x * 1
    y = message_dropout(inner, message_dims=dims, inplace=True, **told)
    assert y is inner
    equal(torch.autograd.grad(y, x, grad)[0], expected(grad.numpy(), dims, **{**told, "fill": 0})[0])
    fill = torch.randn([shape[dim] for dim in range(len(shape)) if dim not in [d % len(shape) for d in dims]])
    fill.requires_grad_()
    y, keep = message_dropout(x, **{**told, "fill": fill}, message_dims=dims, return_mask=True)
    (got,) = torch.autograd.grad(y, fill, grad)
    turned, _ = in_front(grad.numpy(), dims)
    np.testing.assert_allclose(got, turned[~keep.numpy()].sum(0), rtol=1e-5, atol=1e-5)  # in another order


def test_large_outputs_lie_as_x_does():
    x = torch.randn(9, 256, 4000)  # more than outputs.LENT_BYTES
    for _ in range(2):
        y, keep = message_dropout(x, 0.3, seed=2, message_dims=(0, 2), return_mask=True)
        assert y.is_contiguous()
        assert torch.equal(y, x.masked_fill(~keep.unsqueeze(1), 0))
        del y


@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
def test_operations_and_compiled_code_know_them(monkeypatch):
    x = torch.randn(3, 4, 7)
    want, seed = message_dropout(x, 0.5, seed=3, scale=True, message_dims=(0, 2)), torch.tensor(3)
    layer = MessageDropout(0.5, scale=True, message_dims=(0, 2))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x, seed=seed), want)
    assert torch.equal(torch.func.vmap(lambda x: layer(x[None], seed=seed)[0])(x[:1]), want[:1])
    internals.no_host_tensors(monkeypatch)
    assert torch.equal(layer(x, seed=seed), want)


@both
@pytest.mark.parametrize(("shape", "dims"), LAID, ids=str)
def test_removal_gives_back_the_same_order_of_dims(make, shape, dims):
    x = some(shape)
    turned, back = in_front(x, dims)
    y, kept = message_select(make(x), 0.5, exact=True, seed=4, message_dims=dims)
    want, there = message_select(turned, 0.5, exact=True, seed=4, message_dims=len(dims))
    equal(torch.as_tensor(y), np.transpose(want, back))
    assert np.array_equal(np.asarray(kept.indices), there.indices)
    packed, _ = message_select(make(x), 0.5, exact=True, seed=4, message_dims=dims, layout="packed")
    if len(dims) > 1:
        equal(
            torch.as_tensor(packed),
            message_select(turned, 0.5, exact=True, seed=4, message_dims=len(dims), layout="packed")[0],
        )
    passed, _ = message_select(given := make(x), 0.0, message_dims=dims)
    assert passed is given


def test_layers_of_convolutions():
    x, seed = torch.randn(3, 4, 10), torch.tensor(1)
    seen = []
    subset = MessageSubset(nn.Conv1d(4, 4, 1), 0.5, exact=True, message_dims=(0, 2))
    subset.module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    y = subset(x, seed=seed)
    _, kept = MessageSelect(0.5, exact=True, message_dims=(0, -1))(x, seed=seed)
    assert seen == [(3, 4, 5)]
    assert torch.equal(torch.where(kept.mask.unsqueeze(1), x, y), x)
    torch.testing.assert_close(torch.where(kept.mask.unsqueeze(1), subset.module(x), x), y)
    assert repr(MessageDropout(0.5, message_dims=(0, 2))) == "MessageDropout(p=0.5, inplace=False, message_dims=(0, 2))"


@pytest.mark.parametrize(
    ("dims", "error", "said"),
    [
        ((), ValueError, r"message_dims must name one dim or more.*\(\)"),
        ((0, 0), ValueError, r"none of them twice.*\(0, 0\)"),
        ((0, -3), ValueError, r"each once.*\(0, -3\)"),
        ((0, 3), ValueError, r"dims of x, which has 3.*\(0, 3\)"),
        ((0, 1.5), TypeError, r"a tuple of dims.*\(0, 1.5\)"),
        ((0, True), TypeError, r"a tuple of dims.*\(0, True\)"),
        ((0, 1, 2), ValueError, "3 message dims and at least one feature dim"),
    ],
)
@both
def test_what_is_refused(make, dims, error, said):
    x = make(some((3, 4, 7)))
    for call in (message_dropout, message_select):
        with pytest.raises(error, match=said):
            call(x, 0.5, message_dims=dims)
    for bad, what in ((np.empty((3, 7, 4), np.float32), "out must have x's shape"), ("nothing", "out must be")):
        with pytest.raises((TypeError, ValueError), match=what):
            message_dropout(x, 0.5, message_dims=(0, 2), out=bad if isinstance(bad, str) else make(bad))


def test_a_view_of_a_leaf_is_refused_as_the_leaf_is():
    leaf = torch.zeros(3, 4, 7, requires_grad=True)
    with pytest.raises(ValueError, match="can't change a leaf that requires grad"):
        message_dropout(leaf, 0.5, inplace=True, message_dims=(0, 2))
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="a nested x must be"):
        message_dropout(nested, 0.5, message_dims=(0, 2))
