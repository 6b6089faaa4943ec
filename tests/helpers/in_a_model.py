"""A layer between two that torch's tensor parallelism cuts, which `tensors/test_sharded.py` runs on the ranks of a world."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from helpers.on_meshes import data, here, same
from helpers.world import RANKS, Report
from msgdrop_numba import MessageDropout, message_dropout


class Block(torch.nn.Module):
    """Two linear maps, and messages dropped in between, where they are cut by features."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = torch.nn.Linear(4, 8), MessageDropout(0.5, scale=True), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(self.up(x), seed=seed))


def in_a_model(report: Report) -> None:
    """By torch's own plan, eager and compiled: the same messages leave their mark as in one process."""
    torch.manual_seed(0)
    block, seed = Block(), torch.tensor(3)
    whole = block(data(), seed)
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    spread = parallelize_module(block, DeviceMesh("cpu", torch.arange(RANKS)), plan)
    _, mask = message_dropout(data(), 0.5, seed=3, return_mask=True)
    for call in (spread, torch.compile(spread, fullgraph=True, backend="aot_eager")):
        y = call(data(), seed)
        y.sum().backward()
        bias = spread.down.bias.to_local()
        report.expect("of what is dropped remains the bias", torch.equal((y == bias).all(-1), ~mask))
        report.expect("but for the sums' order", torch.allclose(y, whole) and spread.up.weight.grad is not None)


def inference(report: Report) -> None:
    """Where no graph can be."""
    mesh, whole = DeviceMesh("cpu", torch.arange(RANKS)), data()
    with torch.inference_mode():
        x = here(whole.clone(), mesh, [Shard(1)])
        y = message_dropout(x, seed=3, inplace=True)
        report.expect("in place", y is x and same(x, message_dropout(whole, seed=3), [Shard(1)]))
        torch.manual_seed(torch.distributed.get_rank())
        y = message_dropout(here(whole, mesh, [Shard(1)]), exact=True)
        torch.manual_seed(0)
        report.expect("drawn", same(y, message_dropout(whole, exact=True), [Shard(1)]))
