"""Models that lose messages: timm's vision transformers and torch's own encoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.timm_here import timm
from msgdrop_numba import MessageSelect, MessageSubset, message_select

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])


def trained(model, loss_of, steps, rate=1e-3):
    """The loss at each step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), rate), []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm().create_model("vit_tiny_patch16_224", img_size=64, num_classes=4, depth=4, embed_dim=64, num_heads=2)


def test_a_vision_transformer_trains(vit):
    vit.patch_drop = MessageSelect(0.5, exact=True, prefix=vit.num_prefix_tokens, return_kept=False)
    seen = []
    vit.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    losses = trained(vit, lambda: nn.functional.cross_entropy(vit(IMAGES), LABELS), 12)
    assert set(seen) == {(4, 1 + 8, 64)}  # of 16 patches
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        vit.eval()(IMAGES)
    assert seen[-1] == (4, 17, 64)


def test_it_is_timms_model_with_these_indices(vit):
    """timm's own PatchDropout, told to keep what we keep, makes the same model: outputs and gradients."""
    from timm.layers.patch_dropout import PatchDropoutWithIndices

    told = {}

    class Told(PatchDropoutWithIndices):
        def forward(self, x):
            x, self.prefix_tokens = x[:, 1:], x[:, :1]
            kept = x.gather(1, told["indices"].unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            return torch.cat((self.prefix_tokens, kept), dim=1)

    layer = MessageSelect(0.5, exact=True, prefix=1, return_kept="indices")

    class Ours(nn.Module):
        def forward(self, x):
            y, told["indices"] = layer(x, seed=torch.tensor(3))
            return y

    grads = []
    for drop in (Ours(), Told(0.5)):
        vit.patch_drop = drop
        vit.zero_grad()
        out = vit(IMAGES)
        out.square().sum().backward()
        grads.append((out.detach(), vit.patch_embed.proj.weight.grad.clone()))
    assert told["indices"].shape == (4, 8)
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])  # sums of gradients in another order


def test_timms_seam_with_indices():
    from timm.layers.patch_dropout import PatchDropoutWithIndices

    x = torch.randn(2, 9, 6)
    ours = MessageSelect(0.5, exact=True, prefix=1, return_kept="indices")
    y, indices = ours(x)
    theirs = PatchDropoutWithIndices(0.5, num_prefix_tokens=1)(x)
    assert (y.shape, indices.shape, indices.dtype) == (theirs[0].shape, theirs[1].shape, theirs[1].dtype)
    assert torch.equal(y[:, 1:], x[:, 1:].gather(1, indices.unsqueeze(-1).expand(-1, -1, 6)))
    assert ours.eval()(x) == (x, None)


class Tagger(nn.Module):
    """Says of a sequence whether its messages' mean is positive."""

    def __init__(self, **rule):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.drop = MessageSelect(0.5, **rule)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 1)

    def forward(self, x, lengths=None):
        y, kept = self.drop(x, lengths=lengths)
        ignored = kept.key_padding_mask
        y = self.encoder(y, src_key_padding_mask=ignored).masked_fill(ignored.unsqueeze(-1), 0)
        return self.head(y.sum(1) / (~ignored).sum(1, keepdim=True)).squeeze(1)


@pytest.mark.parametrize("rule", [{"exact": True}, {"min_keep": 2}, {"capacity": 12, "min_keep": 2}], ids=str)
def test_torchs_encoder_trains(rule):
    torch.manual_seed(0)
    x = torch.randn(32, 12, 16)
    lengths = None if rule.get("exact") else torch.randint(4, 13, (32,))
    wanted = (x[:, :4, 0].mean(1) > 0).float()
    model = Tagger(**rule)
    losses = trained(model, lambda: nn.functional.binary_cross_entropy_with_logits(model(x, lengths), wanted), 40, 3e-3)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert model.eval()(x, lengths).isfinite().all()


def test_layerwise_token_dropping_trains(vit):
    """Random-LTD: each inner block sees half of the tokens, drawn anew; the class token passes through all."""
    for i in (1, 2):
        vit.blocks[i] = MessageSubset(vit.blocks[i], 0.5, exact=True, prefix=1)
    losses = trained(vit, lambda: nn.functional.cross_entropy(vit(IMAGES), LABELS), 12)
    assert losses[-1] < 0.5 * losses[0]


def test_a_transformer_with_rotary_tables_trains():
    """EVA-02 picks its tables of positions by the indices."""
    eva = timm().create_model("eva02_tiny_patch14_224", img_size=56, depth=2, num_classes=4, patch_drop_rate=0.5)
    eva.patch_drop = MessageSelect(0.5, exact=True, prefix=eva.num_prefix_tokens, return_kept="indices")
    loss = nn.functional.cross_entropy(eva(IMAGES[..., :56, :56]), LABELS)
    loss.backward()
    assert all(parameter.grad is not None for parameter in eva.parameters())
    assert eva.eval()(IMAGES[..., :56, :56]).shape == (4, 4)


def test_under_data_parallel_and_autocast(tmp_path):
    """The wrapped model makes the gradients of the bare one; what autocast makes of the input is what remains of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), MessageSelect(0.5, exact=True, return_kept=False))
    x = torch.randn(4, 6, 16)

    def gradient(module):
        torch.manual_seed(5)
        model.zero_grad()
        module(x).square().sum().backward()
        return model[0].weight.grad.clone()

    want = gradient(model)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert torch.equal(gradient(nn.parallel.DistributedDataParallel(model)), want)
    finally:
        torch.distributed.destroy_process_group()
    with torch.autocast("cpu", torch.bfloat16):
        inner, y = model[0](x), model[1](model[0](x), seed=3)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, message_select(inner, 0.5, exact=True, seed=3)[0])
