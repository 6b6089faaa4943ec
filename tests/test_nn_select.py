"""MessageSelect and MessageSubset: what the layers do with a module behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from msgdrop_numba import MessageSelect, MessageSubset, Rule, message_select

X = torch.randn(6, 9, 8, generator=torch.Generator().manual_seed(0))


class Noted(nn.Module):
    """Doubles what it is given, and remembers it."""

    def forward(self, x: torch.Tensor, *companions: torch.Tensor, **told: Any) -> torch.Tensor:
        self.seen, self.companions, self.told = x, companions, told
        return 2 * x


def test_select_is_the_function():
    for options in ({}, {"exact": True, "prefix": 2}, {"layout": "packed", "scale": True}, {"capacity": 9, "span": 2}):
        layer = MessageSelect(0.4, **options)
        told = {"seed": 3, "keys": [1, 2, 3, 4, 5, 6], "lengths": None if options.get("exact") else [9, 8, 7, 6, 5, 4]}
        (y, kept), (want, found) = layer(X, **told), message_select(X, 0.4, **options, **told)
        assert torch.equal(y, want)
        assert torch.equal(kept.indices, found.indices)
        assert layer.eval()(X)[1].mask.all()


def test_select_alone():
    layer = MessageSelect(0.5, exact=True, prefix=1, return_kept=False)
    assert torch.equal(layer(X, seed=4), message_select(X, 0.5, exact=True, prefix=1, seed=4)[0])
    assert layer.eval()(X) is X


def test_select_with_indices():
    """Those of timm's PatchDropoutWithIndices: of what is behind the prefix, counted from there."""
    layer = MessageSelect(0.5, exact=True, prefix=2, return_kept="indices")
    y, indices = layer(X)
    assert indices.shape == (6, 4)
    behind = X[:, 2:].gather(1, indices.unsqueeze(-1).expand(-1, -1, 8))
    assert torch.equal(y, torch.cat([X[:, :2], behind], 1))
    assert layer.eval()(X) == (X, None)
    with pytest.raises(ValueError, match="but got lengths"):
        layer.train()(X, lengths=[9] * 6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: MessageSelect(0.5, return_kept="mask"),
            "return_kept must be True, False or 'indices', but got 'mask'",
        ),
        (lambda: MessageSelect(0.5, return_kept="indices"), "needs rows of one length, but got exact=False"),
        (lambda: MessageSelect(0.5, layout="rows"), "layout must be"),
        (lambda: MessageSelect(0.5, capacity=-1), "capacity must be at least 1"),
        (lambda: MessageSelect(1.5), "p must be a probability"),
        (lambda: MessageSubset(Noted(), 0.5, per="row"), "per must be 'message' or 'sample', but got 'row'"),
        (lambda: MessageSubset(Noted(), 0.5, per="sample", message_dims=2), "message_dims goes with per='message'"),
        (lambda: MessageSubset(Noted(), 0.5, min_keep=-1), "min_keep must be"),
        (lambda: MessageSubset(nn.Linear(8, 4), 0.5, exact=True)(X), r"the shape \(6, 5, 8\) that it got, but got"),
    ],
)
def test_bad_arguments(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_what_is_no_module_or_no_whole_tensor():
    with pytest.raises(TypeError, match=r"module must be an nn.Module, but got 0.5"):
        MessageSubset(0.5, nn.Linear(8, 8))
    nested = torch.nested.as_nested_tensor([X[0], X[1, :3]], layout=torch.jagged)
    with pytest.raises(ValueError, match="x must not be nested: pad it"):
        MessageSubset(nn.Linear(8, 8), 0.5)(nested)


def test_what_is_printed():
    assert repr(MessageSelect(0.5, exact=True, layout="padded")) == "MessageSelect(p=0.5, exact=True, layout='padded')"
    assert "(module): Noted()" in repr(MessageSubset(Noted(), 0.5, per="sample"))
    assert "p=0.5, per='sample'" in repr(MessageSubset(Noted(), 0.5, per="sample"))


@pytest.mark.parametrize("options", [{"exact": True, "prefix": 1}, {}, {"min_keep": 9}], ids=str)
def test_messages_that_are_not_kept_pass_by(options):
    layer = MessageSubset(Noted(), 0.5, pass_kept=True, **options)
    table = torch.arange(6 * 9).reshape(6, 9)
    _, kept = message_select(X, 0.5, seed=7, **options)
    out = layer(X, table, seed=7)
    assert torch.equal(out, torch.where(kept.mask[..., None], 2 * X, X))
    assert torch.equal(layer.module.seen, kept.take(X))
    assert torch.equal(layer.module.companions[0], kept.take(table))
    assert torch.equal(layer.module.told["kept"].indices, kept.indices)
    assert torch.equal(layer.eval()(X, table), 2 * X)
    assert layer.module.seen is X


@pytest.mark.parametrize("per", ["message", "sample"])
def test_a_module_is_not_called_without_messages(per):
    """A GRU or attention raises if it gets a sequence of none."""
    layer = MessageSubset(nn.GRU(8, 8, batch_first=True), 1.0, per=per)
    x = X.clone().requires_grad_()
    out = layer(x)
    assert torch.equal(out, X)
    out.backward(X)
    assert torch.equal(x.grad, X)
    attention = MessageSubset(nn.TransformerEncoderLayer(8, 2, batch_first=True, dropout=0.0), 0.9, per=per)
    small = X[:2, :3]
    skipped = sum(torch.equal(attention(small, seed=seed), small) for seed in range(60))
    assert 0 < skipped < 60


def test_gradients_of_what_passes_by():
    x = X.clone().requires_grad_()
    layer = MessageSubset(Noted(), 0.5, exact=True)
    layer(x, seed=7).backward(X)
    _, kept = message_select(X, 0.5, exact=True, seed=7)
    assert torch.equal(x.grad, torch.where(kept.mask[..., None], 2 * X, X))


def test_a_module_may_change_the_dtype():
    layer = MessageSubset(nn.Linear(8, 8), 0.5, exact=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(X, seed=7)
    _, kept = message_select(X, 0.5, exact=True, seed=7)
    assert out.dtype == torch.float32
    assert torch.equal(out[~kept.mask], X[~kept.mask])


def test_samples_that_are_not_kept_skip_the_module():
    layer = MessageSubset(Noted(), 0.5, exact=True, per="sample")
    out = layer(X, torch.arange(6), seed=7)
    kept = layer.module.companions[0]
    assert kept.tolist() == message_select(X, 0.5, exact=True, seed=7, message_dims=1)[1].indices.tolist()
    assert torch.equal(layer.module.seen, X[kept])
    want = X.clone()
    want[kept] += 2 * (2 * X[kept])  # 3 of 6 are kept
    assert torch.equal(out, want)
    assert torch.equal(layer.eval()(X, torch.arange(6)), X + 2 * X)
    all_skip = MessageSubset(Noted(), 1.0, per="sample")
    assert torch.equal(all_skip(X), X)
    assert not hasattr(all_skip.module, "seen")


def test_indices_with_a_rule_that_is_exact():
    layer = MessageSelect(Rule(0.5, exact=True, prefix=1), return_kept="indices")
    same = MessageSelect(0.5, exact=True, prefix=1, return_kept="indices")
    x = torch.randn(2, 7, 3)
    for got, want in zip(layer(x, seed=3), same(x, seed=3), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="exact=False"):
        MessageSelect(Rule(0.5), return_kept="indices")


def test_whole_graphs(compiled):
    layers = [
        MessageSelect(0.5, exact=True, prefix=1, return_kept=False),
        MessageSubset(nn.Linear(8, 8), 0.5, exact=True),
        MessageSubset(nn.Linear(8, 8), 0.5, exact=True, per="sample"),
    ]
    for layer in layers:
        run = compiled(layer)
        torch.testing.assert_close(run(X, seed=3), layer(X, seed=3))
        layer.eval()
        torch.testing.assert_close(run(X), layer(X))


def test_a_transformer_trains_on_what_remains():
    """With padding that its attention doesn't see: each sample's result is that of its messages alone."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1)
    select = MessageSelect(0.5, min_keep=1)
    y, kept = select(X, seed=1, lengths=[9, 7, 5, 3, 2, 1])
    out = encoder(y, src_key_padding_mask=kept.key_padding_mask)
    for sample, result, mask in zip(X, out, kept.mask, strict=True):
        torch.testing.assert_close(result[: int(mask.sum())], encoder(sample[mask][None])[0])
    (out * ~kept.key_padding_mask[..., None]).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
