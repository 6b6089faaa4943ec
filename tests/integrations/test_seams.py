"""Where other libraries take a mask, a layer or a transform: each line of INTEGRATIONS.md with the real library."""

from __future__ import annotations

import pickle

import naive
import numpy as np
import pytest
import torch
from helpers import oracle
from torch import nn

from benchmarks.timm_here import timm
from msgdrop_numba import (
    MessageDropout,
    MessageSelect,
    fold_in,
    keep_mask,
    key_padding_mask,
    message_dropout,
    row_key,
    select_messages,
)

# ---- timm


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "naflexvit_base_patch16_gap"])
def test_timm_picks_its_tables_by_our_indices(name):
    """The model in training, told to remove patches, is the model in training on what those indices keep."""
    torch.manual_seed(0)
    small = (
        {"img_size": 56, "depth": 2}
        if "eva" in name
        else {"embed_dim": 32, "depth": 2, "num_heads": 2, "rope_type": "axial", "pos_embed": "none"}
    )
    model = timm().create_model(name, num_classes=4, patch_drop_rate=0.5, **small)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) or type(layer).__name__ == "DropPath":
            layer.p = layer.drop_prob = 0.0
    theirs, told = model.patch_drop, {}
    assert type(theirs).__name__ == "PatchDropoutWithIndices"
    ours = MessageSelect(0.5, exact=True, prefix=model.num_prefix_tokens, return_kept="indices")

    class Ours(nn.Module):
        def forward(self, x):
            y, told["indices"] = ours(x, seed=torch.tensor(3))
            return y, told["indices"]

    class Told(nn.Module):
        """timm's own gather, by our indices."""

        def forward(self, x):
            prefix, patches = x[:, : model.num_prefix_tokens], x[:, model.num_prefix_tokens :]
            picked = patches.gather(1, told["indices"].unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            return torch.cat([prefix, picked], dim=1), told["indices"]

    images = torch.randn(2, 3, 56, 56) if "eva" in name else torch.randn(2, 3, 64, 64)
    made = []
    for drop in (Ours(), Told()):
        model.patch_drop = drop
        made.append(model.train()(images))
    patches = 16
    assert told["indices"].shape == (2, patches // 2)
    assert torch.equal(*made)
    made[0].sum().backward()
    model.patch_drop = ours
    assert model.eval()(images).shape == (2, 4)


# ---- transformers


@pytest.mark.filterwarnings("ignore::Warning")  # of the library's own making
@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert", "WavLM"])
def test_speech_models_mask_where_we_drop(name):
    """`mask_time_indices` is True where frames are masked: ~keep, spans that never reach into padding."""
    transformers = pytest.importorskip(
        "transformers", reason='needs transformers: pip install "msgdrop_numba[integrations]"'
    )
    timm()  # transformers looks at torchvision, too
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        mask_time_prob=0.05,  # else the model has no embedding for what is masked
    )  # fmt: skip
    model = getattr(transformers, f"{name}Model")(config).train()
    audio, samples = torch.randn(3, 800), torch.tensor([800, 400, 600])
    frames, total = model._get_feat_extract_output_lengths(samples), int(model._get_feat_extract_output_lengths(800))
    keep = keep_mask((3, total), 0.4, span=4, min_keep=1, lengths=frames, seed=5, keys=["a", "b", "c"], device="cpu")
    want = naive.keep_mask(
        (3, total), 0.4, span=4, min_keep=1, lengths=frames.numpy(), seed=5, keys=[row_key(key) for key in "abc"]
    )
    assert np.array_equal(keep, want)
    seen = {}
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0].detach().clone()))
    attention = (torch.arange(800) < samples.unsqueeze(-1)).long()
    y = model(audio, attention_mask=attention, mask_time_indices=~keep).last_hidden_state
    masked = (seen["x"] == model.masked_spec_embed.detach()).all(-1)
    assert torch.equal(masked, ~keep)
    y.sum().backward()
    assert model.masked_spec_embed.grad is not None


# ---- lhotse


@pytest.fixture
def cuts(tmp_path):
    """Six cuts of 60 to 110 frames of 4 features, on disk."""
    lhotse = pytest.importorskip("lhotse", reason='needs lhotse: pip install "msgdrop_numba[integrations]"')
    made, draws = [], np.random.default_rng(0)
    with lhotse.NumpyFilesWriter(tmp_path / "features") as storage:
        for i in range(6):
            frames = 60 + 10 * i
            features = lhotse.Features(
                type="fbank", num_frames=frames, num_features=4, frame_shift=0.01, sampling_rate=16000, start=0,
                duration=frames / 100, storage_type=storage.name, storage_path=str(storage.storage_path),
                storage_key=storage.write(f"f{i}", draws.standard_normal((frames, 4)).astype(np.float32)),
                recording_id=f"r{i}", channels=0,
            )  # fmt: skip
            text = lhotse.SupervisionSegment(
                id=f"s{i}", recording_id=f"r{i}", start=0, duration=frames / 100, text="a word"
            )
            made.append(
                lhotse.MonoCut(
                    id=f"cut-{i}", start=0, duration=frames / 100, channel=0, features=features, supervisions=[text]
                )
            )
    return lhotse.CutSet.from_cuts(made)


@pytest.mark.filterwarnings("ignore::Warning")  # of the library's own making
def test_lhotse_drops_by_the_ids_of_cuts(cuts):
    from lhotse.dataset import K2SpeechRecognitionDataset, PrecomputedFeatures, SimpleCutSampler

    from msgdrop_numba.integrations.lhotse import CutDropout

    drop = CutDropout(PrecomputedFeatures(), 0.3, seed=7, span=5, fill=-1.0)
    dataset = K2SpeechRecognitionDataset(
        input_strategy=drop,
        input_transforms=[lambda x, supervision_segments=None: 2 * x, drop.transform],
        return_cuts=True,
    )

    def masks(cuts_a_batch, epoch):
        """Of each cut, which frames remain."""
        drop.set_epoch(epoch)
        sampler, found = SimpleCutSampler(cuts, max_cuts=cuts_a_batch, shuffle=True, seed=epoch), {}
        for batch in torch.utils.data.DataLoader(dataset, sampler=sampler, batch_size=None):
            told = zip(batch["inputs"], batch["supervisions"]["cut"], batch["supervisions"]["num_frames"], strict=True)
            for x, cut, frames in told:
                found[cut.id] = (x[:frames] != -1).any(-1).tolist()
                assert (x[frames:] != -1).all()  # padding, as it was
                clean = torch.from_numpy(2 * cut.load_features())
                assert torch.equal(x[:frames][found[cut.id]], clean[found[cut.id]])
        return found

    first = masks(2, 0)
    assert masks(3, 0) == first
    assert masks(2, 1) != first
    for cut in cuts:
        (want,) = naive.keep_mask(
            (1, cut.num_frames), 0.3, span=5, seed=fold_in(7, 0), keys=[naive.hash64(cut.id)]
        ).tolist()
        assert first[cut.id] == want
    with pytest.raises(ValueError, match=r"inputs must be those of \d cuts, but got 1"):
        drop.transform(torch.ones(1, 9, 4))
    with pytest.raises(TypeError, match="strategy must be an input strategy"):
        CutDropout("features", 0.3, seed=7)
    with pytest.raises(ValueError, match="seed must be"):
        CutDropout(PrecomputedFeatures(), 0.3, seed=-1)
    for epoch in (-1, 2**63):
        with pytest.raises(ValueError, match="epoch must be in"):
            drop.set_epoch(epoch)
    plain = K2SpeechRecognitionDataset(
        input_transforms=[lambda x, supervision_segments=None: MessageDropout(1.0)(x)]
    )  # without ids: one line
    assert not plain[cuts.subset(first=2)]["inputs"].any()


class Strategy:
    """An input strategy of lhotse's, as far as it is asked."""

    def supervision_intervals(self, cuts):
        return {}


def test_epochs_of_cuts():
    from msgdrop_numba.integrations.lhotse import CutDropout

    drop = CutDropout(Strategy(), 0.3, seed=7)
    drop.set_epoch(3)
    again = pickle.loads(pickle.dumps(drop))  # as in a dataset that was copied
    again.set_epoch(again._epoch.get() + 1)
    assert (again._epoch.get(), drop._epoch.get()) == (4, 3)
    assert again._epoch.numbers.is_shared()  # with workers of its own
    for epoch, error in ((-1, ValueError), (2**63, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="epoch must be"):
            drop.set_epoch(epoch)


# ---- attention, and sequences that are packed


def test_attention_ignores_padding_and_what_dropped():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, lengths = torch.randn(4, 9, 16), torch.tensor([9, 5, 1, 7])
    keep = keep_mask((4, 9), 0.6, min_keep=1, lengths=lengths, seed=3, device="cpu")
    ignored = key_padding_mask(keep, lengths)
    pad = torch.arange(9) >= lengths.unsqueeze(-1)
    assert torch.equal(ignored, pad | ~keep)
    assert np.array_equal(key_padding_mask(keep.numpy(), lengths.tolist()), ignored)
    y = encoder(x, src_key_padding_mask=ignored)
    assert y.isfinite().all()
    other = torch.where(ignored.unsqueeze(-1), torch.randn_like(x), x)
    attended = encoder(other, src_key_padding_mask=ignored)
    torch.testing.assert_close(attended[~ignored], y[~ignored])
    wrong = encoder(other, src_key_padding_mask=~keep)  # attends to padding
    assert not torch.allclose(wrong[~ignored], encoder(x, src_key_padding_mask=~keep)[~ignored])
    kept = select_messages((4, 9), 0.6, min_keep=1, lengths=lengths, seed=3, device="cpu")
    short = encoder(kept.take(x), src_key_padding_mask=kept.key_padding_mask)  # the same, and less work
    torch.testing.assert_close(short[~kept.key_padding_mask], y[~ignored])


def test_a_row_that_drops_whole_is_nan_without_min_keep():
    attention = nn.MultiheadAttention(8, 1, batch_first=True)
    x = torch.randn(1, 3, 8)
    for least in (0, 1):
        ignored = key_padding_mask(keep_mask((1, 3), 1.0, min_keep=least, seed=1, device="cpu"))
        y, _ = attention(x, x, x, key_padding_mask=ignored)
        assert y.isnan().any() == (least == 0)


def test_the_helper_refuses():
    with pytest.raises(TypeError, match="keep must be a bool array or tensor, but got float32"):
        key_padding_mask(np.ones((2, 3), np.float32))
    for keep in (np.ones((2, 3), bool), torch.ones(2, 3, dtype=torch.bool)):
        assert not key_padding_mask(keep).any()
        for lengths, said in (([1, 4], "lengths must be from 0 to 3"), ([1], r"lengths must have shape \(2,\)")):
            with pytest.raises(ValueError, match=said):
                key_padding_mask(keep, lengths)


@pytest.mark.parametrize("remove", [False, True])
def test_packed_sequences_take_dropped_and_shorter_rows(remove):
    torch.manual_seed(0)
    gru, lengths = nn.GRU(6, 5, batch_first=True), torch.tensor([7, 4, 1])
    x = torch.randn(3, 7, 6)
    if remove:
        y, kept = MessageSelect(0.5, min_keep=1)(x, lengths=lengths, seed=4)
        rows, lengths = [row[keep] for row, keep in zip(x, kept.mask, strict=True)], kept.lengths
    else:
        y, keep = MessageDropout(0.5)(x, lengths=lengths, seed=4, return_mask=True)
        rows = [(row * one.unsqueeze(-1))[:n] for row, one, n in zip(x, keep, lengths, strict=True)]
    packed = nn.utils.rnn.pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=False)
    _, last = gru(packed)
    for i, row in enumerate(rows):
        torch.testing.assert_close(gru(row)[1][0], last[0, i])


# ---- agents that talk


class Policy(nn.Module):
    """Kim et al., Message-Dropout: an agent reads its own observation, and others' messages, which drop as blocks."""

    def __init__(self, agents: int, features: int, actions: int, p: float) -> None:
        super().__init__()
        self.drop = MessageDropout(p, message_dims=3, scale=True)
        self.register_buffer("own", torch.eye(agents, dtype=torch.bool))
        self.head = nn.Sequential(nn.Linear(agents * features, 32), nn.Tanh(), nn.Linear(32, actions))

    def forward(self, observations, **told):
        batch, agents, _ = observations.shape
        heard = observations.unsqueeze(1).expand(-1, agents, -1, -1)  # (batch, receiver, sender, features)
        heard = self.drop(heard, protect=self.own.expand(batch, agents, agents), **told)
        return self.head(heard.flatten(2))


def test_agents_never_lose_their_own_observation():
    torch.manual_seed(0)
    policy, seen = Policy(3, 2, 2, 0.5), []
    policy.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    x = torch.randn(8, 3, 2)
    policy(x, seed=5)
    heard, protect = x[:, None].expand(8, 3, 3, 2), np.broadcast_to(np.eye(3, dtype=bool), (8, 3, 3))
    want, keep = oracle.dropout(heard, 0.5, seed=5, message_dims=3, scale=True, protect=protect)
    assert np.array_equal(seen[0].view(8, 3, 3, 2), want)
    assert np.array_equal(seen[0].view(8, 3, 3, 2)[:, range(3), range(3)], x)  # unscaled, too
    assert 0.3 < keep[:, ~np.eye(3, dtype=bool)].mean() < 0.7
    policy.eval()(x)
    assert torch.equal(seen[1].view(8, 3, 3, 2), heard)


def test_a_policy_learns_to_do_without_messages():
    """An agent's best action is the sign of its own number; the others' hint at it, until they are silent."""
    silent = {}
    for p in (0.0, 0.5):
        torch.manual_seed(0)
        policy = Policy(3, 1, 2, p)
        optimizer = torch.optim.Adam(policy.parameters(), 0.02)
        for _ in range(120):
            own = torch.randn(64, 1, 1)
            observations = own + torch.tensor([3.0, 0.1, 0.1]).view(1, 3, 1) * torch.randn(64, 3, 1)
            action = (own.squeeze(-1) > 0).long().expand(64, 3)
            loss = nn.functional.cross_entropy(policy(observations).flatten(0, 1), action.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        own = torch.randn(4000, 1, 1, generator=torch.Generator().manual_seed(1))
        noise = torch.tensor([3.0, 0.1, 0.1]).view(1, 3, 1)
        observations = own + noise * torch.randn(4000, 3, 1, generator=torch.Generator().manual_seed(2))
        heard = observations.unsqueeze(1) * torch.eye(3).view(1, 3, 3, 1)  # nobody hears another
        choice = policy.head(heard.flatten(2)).argmax(-1)[:, 1:]
        silent[p] = (choice == (own > 0).view(-1, 1)).float().mean().item()
    assert silent[0.5] > silent[0.0]


@pytest.mark.filterwarnings("ignore::Warning")  # of the library's own making
@pytest.mark.long
def test_torchrl_takes_the_layer_as_a_module():
    reason = 'needs torchrl: pip install "msgdrop_numba[integrations]"'
    modules, tensordict = pytest.importorskip("torchrl.modules", reason=reason), pytest.importorskip("tensordict")
    from tensordict.nn import TensorDictModule, TensorDictSequential

    drop = MessageDropout(0.5, message_dims=3, scale=True)
    net = modules.MultiAgentMLP(n_agent_inputs=6, n_agent_outputs=2, n_agents=3, centralized=False, share_params=True)
    policy = TensorDictSequential(
        TensorDictModule(lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1), ["observation"], ["heard"]),
        TensorDictModule(drop, in_keys={"x": "heard", "protect": "own"}, out_keys=["heard"]),
        TensorDictModule(lambda x: net(x.flatten(2)), ["heard"], ["action"]),
    )
    own = torch.eye(3, dtype=torch.bool).expand(4, 3, 3)
    data = tensordict.TensorDict({"observation": torch.randn(4, 3, 2), "own": own}, [4])
    torch.manual_seed(1)
    made = policy(data.clone())
    assert made["action"].shape == (4, 3, 2)
    torch.manual_seed(1)
    heard = data["observation"].unsqueeze(1).expand(-1, 3, -1, -1)
    assert torch.equal(made["heard"], drop(heard, protect=own))
    assert torch.equal(policy.eval()(data.clone())["heard"], heard)


def test_one_mask_for_a_whole_episode():
    x, episodes = torch.randn(4, 6, 3, 2, 5), [7, 8, 9, 10]  # (episodes, steps, receivers, senders, features)
    whole, keep = message_dropout(
        x, 0.5, seed=1, keys=episodes, message_dims=(0, 2, 3), return_mask=True
    )  # steps index no message: all share a mask
    assert keep.shape == (4, 3, 2)
    assert torch.equal(whole, x * keep[:, None, :, :, None])
    for step in range(6):  # and the same one at a time, where an episode is played
        assert torch.equal(message_dropout(x[:, step], 0.5, seed=1, keys=episodes, message_dims=3), whole[:, step])
