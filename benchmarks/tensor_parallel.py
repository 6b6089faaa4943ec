"""A small transformer, cut over ranks as torch's tutorial on tensor parallelism cuts one, and its training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F  # noqa: N812

LAYERS, WIDTH, HEADS, TOKENS, BATCH = 2, 64, 4, 32, (8, 32)


class Attention(nn.Module):
    """Causal attention; its heads lie on several ranks."""

    def __init__(self, drop: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.drop = drop()  # whole on each rank
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """What each message hears."""
        x = self.drop(x)
        q, k, v = (part(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(heard.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers; the features between them lie on several ranks."""

    def __init__(self, drop: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(WIDTH, 4 * WIDTH), drop(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The same of each message alone."""
        return self.down(self.drop(F.silu(self.up(x))))


class Block(nn.Module):
    """Attention and feed forward, with dropout behind both; the positions lie on several ranks."""

    def __init__(self, drop: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm, self.attention, self.drop = nn.LayerNorm(WIDTH), Attention(drop), drop()
        self.second_norm, self.feed_forward, self.second_drop = nn.LayerNorm(WIDTH), FeedForward(drop), drop()

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream, a block further."""
        x = x + self.drop(self.attention(self.norm(x)))
        return x + self.second_drop(self.feed_forward(self.second_norm(x)))


class Model(nn.Module):
    """Tells the next token."""

    def __init__(self, drop: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.tokens, self.drop = nn.Embedding(TOKENS, WIDTH), drop()
        self.blocks = nn.ModuleList(Block(drop) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of what comes next."""
        x = self.drop(self.tokens(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cut(model: Model, mesh: DeviceMesh, local: bool) -> None:
    """Cut the model over a mesh. `local`: between its parts go plain tensors, as by torch's defaults, not DTensors."""
    along, whole = Shard(1), Replicate()
    ends = {
        "tokens": RowwiseParallel(input_layouts=whole, output_layouts=along, use_local_output=local),
        "norm": SequenceParallel(use_local_output=local),
        "head": ColwiseParallel(input_layouts=along, output_layouts=whole),
    }
    parallelize_module(model, mesh, ends)
    gather = PrepareModuleInput(input_layouts=(along,), desired_input_layouts=(whole,), use_local_output=local)
    gives = RowwiseParallel(output_layouts=along, use_local_output=local)
    for block in model.blocks:
        inside = {
            "norm": SequenceParallel(use_local_output=local),
            "attention": gather,
            **{f"attention.{part}": ColwiseParallel() for part in "qkv"},
            "attention.out": gives,
            "second_norm": SequenceParallel(use_local_output=local),
            "feed_forward": gather,
            "feed_forward.up": ColwiseParallel(use_local_output=local),
            "feed_forward.down": gives,
        }
        parallelize_module(block, mesh, inside)


def drops(model: Model) -> Iterator[tuple[nn.Module, Placement]]:
    """Each layer of dropout, and how what it sees is cut."""
    yield model.drop, Shard(1)
    for block in model.blocks:
        yield from (
            (block.attention.drop, Replicate()), (block.drop, Shard(1)),
            (block.feed_forward.drop, Shard(2)), (block.second_drop, Shard(1)),
        )  # fmt: skip


def batches(steps: int) -> Iterator[Tensor]:
    """Sequences in which 9 of 10 tokens follow from the one before."""
    draw = torch.Generator().manual_seed(0)
    follows = torch.randperm(TOKENS, generator=draw)
    for _ in range(steps):
        tokens = torch.randint(TOKENS, (BATCH[0], BATCH[1] + 1), generator=draw)
        guessed = torch.rand(tokens.shape, generator=draw) < 0.1
        for i in range(1, tokens.shape[1]):
            tokens[:, i] = torch.where(guessed[:, i], tokens[:, i], follows[tokens[:, i - 1]])
        yield tokens


class Trained(NamedTuple):
    """What a training came to."""

    losses: list[float]
    masks: list[str]  # a digest of each step's mask of each layer, as this rank sees them


def train(drop: Callable[[], nn.Module], mesh: DeviceMesh, steps: int, local: bool, dtype: torch.dtype) -> Trained:
    """Train from the same weights on the same data; dropout draws from where torch's default generator stands."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(drop).to(dtype)
    cut(model, mesh, local)
    masks: list[str] = []
    for layer, placement in drops(model):
        if not isinstance(layer, nn.Identity):
            layer.register_forward_hook(_look(masks, mesh, placement))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), []
    for tokens in batches(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Trained(losses, masks)


def _look(masks: list[str], mesh: DeviceMesh, placement: Placement) -> Callable[..., None]:
    def look(layer: nn.Module, _: Any, y: Tensor) -> None:
        pieces = y if isinstance(y, DTensor) else DTensor.from_local(y, mesh, [placement], run_check=False)
        kept = pieces.detach().full_tensor() != 0
        if not isinstance(layer, nn.Dropout):  # which drops single elements
            kept = kept.any(-1)
        masks.append(hashlib.blake2b(kept.numpy().tobytes(), digest_size=8).hexdigest())

    return look
