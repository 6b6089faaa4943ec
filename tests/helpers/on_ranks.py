"""What `tensors/test_ranks.py` checks on the ranks of a world: own masks of a rank, and sharded or recomputed blocks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import distributed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from helpers.recomputing import Block, Stack, equals_the_masks_seen
from helpers.world import Report
from msgdrop_numba import (
    KeyedDataset,
    MessageDropout,
    MessageSelect,
    MessageSubset,
    fold_in,
    message_dropout,
    message_select,
)

X = torch.ones(4, 9, 8, dtype=torch.float64)


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What each rank has."""
    each = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(each, tensor.contiguous())
    return each


def drawn(seed: int) -> int:
    """What is drawn where ranks are seeded so."""
    torch.manual_seed(seed)
    return int(torch.randint(0, 2**63 - 1, ()))


# ---- data parallel ranks


def own_masks(report: Report) -> None:
    """Ranks that are seeded alike drop alike, or each its own; a seed that is given stays as it is."""
    rank = distributed.get_rank()
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("tensor", "data"))
    alone = distributed.new_subgroups(1)[0]
    ranks = {"all": (True, rank), "group": (distributed.group.WORLD, rank), "mesh": (mesh["data"], rank),
             "group of one": (alone, 0), "mesh of one": (mesh["tensor"], 0), "none": (False, None)}  # fmt: skip
    seed = drawn(3)
    for name, (per_rank, folded) in ranks.items():
        want = message_dropout(X, 0.5, seed=seed if folded is None else fold_in(seed, folded))
        layer = MessageDropout(0.5, per_rank=per_rank)
        model = DistributedDataParallel(Block(layer, torch.Generator().manual_seed(1)))
        for each in (layer, copy.deepcopy(layer), model.module.layer):
            torch.manual_seed(3)
            report.expect(f"{name}: as folded", torch.equal(each(X), want))
        torch.manual_seed(3)
        y, keep = model(X)
        report.expect(f"{name}: in a model", torch.equal(keep, (want != 0).any(-1)))
        y.sum().backward()
        report.expect(
            f"{name}: equal", torch.equal(*gathered(keep)) == (name in ("none", "group of one", "mesh of one"))
        )
        report.expect(f"{name}: given", torch.equal(layer(X, seed=5), message_dropout(X, 0.5, seed=5)))
        for other in (MessageSelect(0.5, per_rank=per_rank), MessageSubset(torch.nn.Tanh(), 0.5, per_rank=per_rank)):
            torch.manual_seed(3)
            got = other(X)
            kept = got[1].mask if isinstance(got, tuple) else (got != X).any(-1)
            report.expect(f"{name}: {type(other).__name__}", torch.equal(kept, (want != 0).any(-1)))
        state = torch.get_rng_state()
        layer.eval()(X), MessageDropout(0.0, per_rank=per_rank)(X)
        report.expect(f"{name}: nothing is drawn", torch.equal(torch.get_rng_state(), state))


def strangers(report: Report) -> None:
    """A process that isn't in the group has no rank, and draws nothing."""
    rank = distributed.get_rank()
    layer = MessageDropout(0.5, per_rank=DeviceMesh("cpu", [0]))
    state = torch.get_rng_state()
    if rank == 0:
        report.expect("in", layer(X).shape == X.shape)
    else:
        report.refuses(ValueError, "this process isn't in per_rank=DeviceMesh", lambda: layer(X))
        report.expect("nothing is drawn", torch.equal(torch.get_rng_state(), state))
        report.expect("given", torch.equal(layer(X, seed=5), message_dropout(X, 0.5, seed=5)))


def global_batches(report: Report) -> None:
    """With ids for keys the global batch has the masks, and the bytes, that one process would have given it."""
    ranks, size, seed = distributed.get_world_size(), 8, 7
    samples = torch.arange(1.0, 24 * 18 + 1).reshape(24, 9, 2)
    dataset, drop = KeyedDataset(samples), MessageDropout(0.4, min_keep=2, scale=True)
    sampler = DistributedSampler(dataset)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = DistributedSampler(dataset, 1, 0)
        order.set_epoch(epoch)
        all_ids = torch.tensor(list(order)).split(size)
        for step, (ids, x) in enumerate(DataLoader(dataset, size // ranks, sampler=sampler)):
            y = drop(x, keys=ids, seed=fold_in(seed, epoch))
            found, together = torch.cat(gathered(ids)).sort()
            report.expect((epoch, step, "ids"), torch.equal(found, all_ids[step].sort()[0]))
            want = drop(samples[found], keys=found, seed=fold_in(seed, epoch))
            report.expect((epoch, step, "bytes"), torch.equal(torch.cat(gathered(y))[together], want))
    report.expect("epochs differ", not torch.equal(*(drop(samples, seed=fold_in(seed, epoch)) for epoch in (0, 1))))


# ---- recomputed and sharded blocks, by drawn seeds


class Filling(MessageDropout):
    """The parameter that a layer fills with is whole while it runs, wherever its parts lie."""

    def forward(self, x: torch.Tensor, **told: Any) -> Any:
        assert not isinstance(self.fill, DTensor)
        return super().forward(x, **told)


def layers() -> dict[str, Callable[[], torch.nn.Module]]:
    """Layers that draw: alike, each rank its own, with a fill to be learnt."""
    return {
        "alike": lambda: MessageDropout(0.5),
        "own": lambda: MessageDropout(0.5, per_rank=True),
        "fill": lambda: Filling(0.5, per_rank=True, fill=torch.nn.Parameter(torch.arange(1.0, 9, dtype=torch.float64))),
        "select": lambda: MessageSelect(0.5, exact=True, per_rank=True),
    }


def checkpoints(report: Report) -> None:
    for name in ("own", "select"):
        for reentrant in (False, True):
            stack = Stack(layers()[name], partial(checkpoint, use_reentrant=reentrant))
            equals_the_masks_seen(stack, stack)
            report.expect(name, True)


def compiled_checkpoints(report: Report) -> None:
    rank = distributed.get_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own, see setup.cfg
        for name in ("own", "select"):
            for run in (None, partial(checkpoint, use_reentrant=False)):
                stack = Stack(layers()[name], run)
                torch._dynamo.reset()
                equals_the_masks_seen(stack, torch.compile(stack, backend="aot_eager", fullgraph=True))
                report.expect(name, True)
        layer = MessageDropout(0.5, per_rank=True)
        seed = drawn(3)
        torch.manual_seed(3)
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(X)
        report.expect("as in eager code", torch.equal(y, message_dropout(X, 0.5, seed=fold_in(seed, rank))))


def named_dims(report: Report) -> None:
    """Channels first, (B, D, T), however it is cut: the whole's masks, and placements of x's own dims."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    x, told = torch.arange(1.0, 4 * 6 * 8 + 1).reshape(4, 6, 8), {"message_dims": (0, 2), "seed": 5}
    want, keep = message_dropout(x, 0.5, return_mask=True, **told)
    removed = message_select(x, 0.5, exact=True, **told)[0]
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        cut = distribute_tensor(x, mesh, [placement])
        y, mask = message_dropout(cut, 0.5, return_mask=True, **told)
        report.expect(f"{placement}: placed", y.placements == cut.placements)
        report.expect(f"{placement}: values", torch.equal(y.full_tensor(), want))
        report.expect(f"{placement}: mask", torch.equal(mask.full_tensor(), keep))
        if placement != Shard(2):
            left = message_select(cut, 0.5, exact=True, **told)[0]
            report.expect(f"{placement}: removed", torch.equal(left.full_tensor(), removed))
        report.expect(f"{placement}: in place", message_dropout(cut, 0.5, inplace=True, **told) is cut)
        report.expect(f"{placement}: written", torch.equal(cut.full_tensor(), want))


def fully_sharded(report: Report) -> None:
    """FSDP2: gradients, gathered, are the mean of those that each rank's masks give the whole model."""
    rank = distributed.get_rank()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for name, make in layers().items():
        for wrapped in (False, True):
            whole = Stack(make)
            sharded = copy.deepcopy(whole)
            for i, block in enumerate(sharded.blocks):
                sharded.blocks[i] = fully_shard(checkpoint_wrapper(block) if wrapped else block, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            torch.manual_seed(3)
            x = torch.randint(-2, 3, (6, 9, 8), dtype=torch.float64) + rank
            y, seen = sharded(x)
            torch.rand(3)
            y.sum().backward()
            whole(x, [keep.clone() for keep in seen])[0].sum().backward()
            label = f"{name}, {'checkpointed' if wrapped else 'plain'}"
            report.expect(f"{label}: masks", torch.equal(*gathered(seen[0])) == (name == "alike"))
            report.expect(f"{label}: sharded", all(isinstance(each, DTensor) for each in sharded.parameters()))
            for got, want in zip(sharded.parameters(), whole.parameters(), strict=True):
                distributed.all_reduce(want.grad)
                mean = want.grad / distributed.get_world_size()
                report.expect(f"{label}: gradients", torch.equal(got.grad.full_tensor(), mean) and bool(mean.any()))


class Stage(torch.nn.Module):
    """A block as a stage of a pipeline, which notes its masks."""

    def __init__(self, block: Block, again: bool) -> None:
        super().__init__()
        self.block, self.again = block, again
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, keep = checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)
        self.seen.append(keep)
        return y  # type: ignore[no-any-return]


def pipelines(report: Report) -> None:
    """Stages of a pipeline, two and more microbatches under way: gradients are those of each microbatch's masks."""
    rank = distributed.get_rank()
    parts = 4
    for name in ("alike", "own", "select"):
        for schedule, again in ((ScheduleGPipe, False), (Schedule1F1B, True)):
            whole = Stack(layers()[name])
            stage = Stage(copy.deepcopy(whole.blocks[rank]), again)
            run = schedule(
                PipelineStage(stage, rank, 2, torch.device("cpu")),
                parts,
                loss_fn=lambda y, _: y.sum(),
                scale_grads=False,
            )
            torch.manual_seed(3 + rank)
            x = torch.randint(-2, 3, (8, 9, 8), generator=torch.Generator().manual_seed(2)).double()
            run.step(*([x] if rank == 0 else []), target=torch.zeros(8))
            label = f"{name}, {schedule.__name__}"
            masks = gathered(torch.cat(stage.seen[-parts:]))  # the first call may be for the shapes
            whole(x, masks)[0].sum().backward()
            for got, want in zip(stage.block.parameters(), whole.blocks[rank].parameters(), strict=True):
                report.expect(f"{label}: gradients", torch.equal(got.grad, want.grad) and bool(want.grad.any()))
            report.expect(f"{label}: microbatches differ", not torch.equal(*masks[rank].chunk(parts)[:2]))
