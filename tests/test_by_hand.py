"""Rows cut into pieces by hand, as Megatron and context parallelism cut them: each piece is told where it lies.

Ranks are a loop here: a piece knows nothing of the others. RANKS.md gives these recipes.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers.oracle import dropout
from torch import nn
from torch.utils.checkpoint import checkpoint

from msgdrop_numba import MessageDropout, keep_mask, message_dropout

ROWS, MESSAGES, SEED = 3, 24, 11
LENGTHS = torch.tensor([24, 9, 14])
PROTECT = torch.arange(ROWS * MESSAGES).reshape(ROWS, MESSAGES) % 5 == 0
# What is the same on all ranks. p a message is cut as x is, below.
RULES = {
    "p": {"p": 0.5},
    "span": {"p": 0.4, "span": 5},
    "range": {"p": (0.2, 0.9)},
    "range, spans": {"p": (0.2, 0.9), "span": 3},
    "array": {"p": torch.linspace(0, 1, ROWS * MESSAGES).reshape(ROWS, MESSAGES)},
    "scale": {"p": (0.1, 0.6), "scale": True},
    "fill": {"p": 0.5, "fill": torch.arange(4.0)},
}


def batch():
    return torch.randn(ROWS, MESSAGES, 4, generator=torch.Generator().manual_seed(1))


def whole(x, **told):
    """The oracle's answer, a tensor."""
    return torch.from_numpy(dropout(x, seed=SEED, **told)[0])


def cut(rule, at):
    """A rule for the positions `at`: an array of p goes along with x."""
    p = rule["p"]
    return {**rule, "p": p[:, at] if isinstance(p, torch.Tensor) else p}


def runs(ranks):
    """The positions of each rank, a run of them: the last ranks may have fewer."""
    return torch.arange(MESSAGES).chunk(ranks)


def zigzag(ranks):
    """The positions of each rank where work is balanced: its part from the front, and one from the back."""
    parts = torch.arange(MESSAGES).chunk(2 * ranks)
    return [torch.cat((parts[rank], parts[-1 - rank])) for rank in range(ranks)]


def joined(pieces, positions):
    y = torch.empty(ROWS, MESSAGES, *pieces[0].shape[2:], dtype=pieces[0].dtype)
    for piece, at in zip(pieces, positions, strict=True):
        y[:, at] = piece
    return y


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_runs_of_positions_by_their_offset(ranks, rule):
    x = batch()
    pieces = [message_dropout(x[:, at], seed=SEED, positions=int(at[0]), **cut(rule, at)) for at in runs(ranks)]
    assert torch.cat(pieces, dim=1).equal(whole(x, **rule))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_prefix_and_lengths_are_cut_with_the_rows(ranks):
    """By the offset: clamped to the piece."""
    x, prefix, pieces = batch(), 7, []
    for at in runs(ranks):
        offset, size = int(at[0]), len(at)
        pieces.append(
            message_dropout(
                x[:, at], (0.3, 0.8), seed=SEED, span=2, positions=offset, scale=True,
                prefix=min(max(prefix - offset, 0), size), lengths=(LENGTHS - offset).clamp(0, size),
            )
        )  # fmt: skip
    told = {"p": (0.3, 0.8), "span": 2, "scale": True, "prefix": prefix, "lengths": LENGTHS}
    assert torch.cat(pieces, dim=1).equal(whole(x, **told))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_zigzag_by_an_array_of_positions(ranks, rule):
    x, positions = batch(), zigzag(ranks)
    pieces = [message_dropout(x[:, at], seed=SEED, positions=at, **cut(rule, at)) for at in positions]
    assert joined(pieces, positions).equal(whole(x, **rule))


@pytest.mark.parametrize("positions", [runs(3), zigzag(3)], ids=["runs", "zigzag"])
def test_whoever_takes_no_part_is_protected_by_position(positions):
    """Any pieces: prefix and padding are protected messages."""
    x, prefix = batch(), 7
    pieces = [
        message_dropout(
            x[:, at], 0.6, seed=SEED, scale=True, positions=at,
            protect=PROTECT[:, at] | (at < prefix) | (at >= LENGTHS[:, None]),
        ) for at in positions
    ]  # fmt: skip
    told = {"p": 0.6, "scale": True, "prefix": prefix, "protect": PROTECT, "lengths": LENGTHS}
    assert joined(pieces, positions).equal(whole(x, **told))


@pytest.mark.parametrize("rule", [{"exact": True}, {"min_keep": 9}, {"min_keep": 9, "span": 4}], ids=str)
@pytest.mark.parametrize("positions", [runs(3), zigzag(3)], ids=["runs", "zigzag"])
def test_rules_that_count_take_the_mask_of_the_whole_row(positions, rule):
    x, told = batch(), {"p": 0.7, "lengths": LENGTHS, **rule}
    keep = keep_mask((ROWS, MESSAGES), seed=SEED, device="cpu", **told)
    pieces = [torch.where(keep[:, at, None], x[:, at], 0) for at in positions]
    assert joined(pieces, positions).equal(whole(x, **told))
    alone = [message_dropout(x[:, at], 0.7, seed=SEED, positions=at, **rule) for at in positions]
    assert not joined(alone, positions).equal(whole(x, **told))  # a piece counts its own messages


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_megatrons_layout_is_turned(ranks):
    """(S, B, H), pieces of S: the positions become the last message dim by a view, and y lies as x did."""
    x = batch().transpose(0, 1).contiguous()
    pieces = []
    for piece, at in zip(x.chunk(ranks), runs(ranks), strict=True):
        y = message_dropout(piece.transpose(0, 1), 0.5, seed=SEED, positions=int(at[0]), scale=True).transpose(0, 1)
        assert y.is_contiguous()
        pieces.append(y)
    assert torch.cat(pieces).transpose(0, 1).equal(whole(batch(), p=0.5, scale=True))


def test_features_that_are_cut_share_their_masks():
    pieces = [message_dropout(part, 0.5, seed=SEED) for part in batch().chunk(2, dim=-1)]
    assert torch.cat(pieces, dim=-1).equal(whole(batch(), p=0.5))


# ---- Megatron's generators


class Tracker:
    """What Megatron's `get_cuda_rng_tracker()` does, with the CPU's generator: each name has a state of its own."""

    def __init__(self):
        self.states = {}

    def add(self, name, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.states[name] = torch.get_rng_state()

    @contextlib.contextmanager
    def fork(self, name="model-parallel-rng"):
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states[name])
        try:
            yield
        finally:
            self.states[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def started(rank):
    """A tensor-parallel rank as `model_parallel_cuda_manual_seed(7)` leaves it."""
    torch.manual_seed(7)
    tracker = Tracker()
    tracker.add("model-parallel-rng", 7 + 2718 + rank)
    return tracker


def pieces_of(step, ranks=2):
    """What `step(piece, positions, tracker)` makes on each rank, and of the whole row on one rank."""
    x, made = batch(), []
    with torch.random.fork_rng():
        for rank, at in enumerate(runs(ranks)):
            made.append(step(x[:, at], int(at[0]), started(rank)))
        return torch.cat(made, dim=1), step(x, 0, started(0))


drop = MessageDropout(0.5)


def outside(x, offset, tracker):
    return drop(x, positions=offset)


def inside(x, offset, tracker):
    with tracker.fork():
        return drop(x, positions=offset)


def drawn_outside(x, offset, tracker):
    seed = torch.randint(2**63 - 1, (), device=x.device)
    with tracker.fork():
        return drop(drop(x, positions=offset, seed=seed), positions=offset, seed=seed + 1)


def recomputed(x, offset, tracker):
    seed = torch.randint(2**63 - 1, (), device=x.device)
    x = x.clone().requires_grad_()
    with tracker.fork():
        y = checkpoint(lambda x: drop(x * x, positions=offset, seed=seed), x, use_reentrant=False)
    with tracker.fork():  # the generators have moved on
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad != 0).equal(y != 0)
    return grad


@pytest.mark.parametrize("step", [outside, drawn_outside, recomputed])
def test_a_seed_that_the_ranks_share(step):
    pieces, alone = pieces_of(step)
    assert pieces.equal(alone)
    assert (alone == 0).any()


def test_what_is_drawn_inside_of_a_fork_differs_between_ranks():
    pieces, alone = pieces_of(inside)
    assert not pieces.equal(alone)
    assert pieces[:, :12].equal(alone[:, :12])  # rank 0 draws what it drew


def test_a_step_and_the_number_of_a_layer_need_no_generator():
    """In another stage, in another micro-batch, recomputed: what is given stays the same."""
    from msgdrop_numba import fold_in

    seed, x = fold_in(SEED, 1000), batch()
    blocks = nn.ModuleList(MessageDropout(0.3) for _ in range(4))

    def stage(x, numbers):
        for number in numbers:
            x = blocks[number](x, seed=fold_in(seed, number), keys=torch.arange(10, 10 + len(x)))
        return x

    at_once = stage(x, range(4))
    torch.manual_seed(99)
    assert stage(stage(x, range(2)), range(2, 4)).equal(at_once)
    assert not at_once.equal(stage(x, [3, 3, 3, 3]))
