"""Do 1, 2 and 4 ranks train a model with the same masks, and what does a call on a DTensor cost? By gloo."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks import tensor_parallel
from benchmarks.measure import machine, markdown
from msgdrop_numba import MessageDropout, message_dropout
from msgdrop_numba.command.bench import medians

P_TRAINED, P = 0.1, 0.3
SIZES, STEPS = (1, 2, 4), 20
# How far the losses of several ranks may be from those of one, as RANKS.md says: they add up in another order.
TOLERANCE = {"float32": 1e-5, "float64": 1e-13}
SHAPES = {(8, 16, 128): 50, (32, 64, 256): 20, (64, 256, 512): 1}  # and calls a round, the same on both ranks
PLACEMENTS = {"Shard(0)": Shard(0), "Shard(1)": Shard(1), "Replicate()": Replicate()}
_seeded, _drawn = partial(message_dropout, p=P, seed=1), partial(message_dropout, p=P)
DROPS: dict[str, Callable[[Any], Any]] = {
    "seed given, local": _seeded,
    "seed given, DTensor": _seeded,
    "seed drawn, local": _drawn,
    "seed drawn, DTensor": _drawn,
    "F.dropout1d, DTensor": partial(F.dropout1d, p=P),
    "F.dropout, DTensor": partial(F.dropout, p=P),
}


class Case(NamedTuple):
    """A training, repeated on every number of ranks."""

    layer: str
    seeded: str  # "alike", or "apart": rank r by 1 + r
    dtype: str = "float32"


LAYERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # and whether they see plain tensors
    "none": (nn.Identity, False),
    "MessageDropout": (partial(MessageDropout, P_TRAINED, scale=True), False),
    "nn.Dropout1d": (partial(nn.Dropout1d, P_TRAINED), False),
    "nn.Dropout1d on local tensors": (partial(nn.Dropout1d, P_TRAINED), True),
    "nn.Dropout": (partial(nn.Dropout, P_TRAINED), False),
}
CASES = (
    Case("none", "alike"),
    Case("none", "alike", "float64"),
    Case("MessageDropout", "alike"),
    Case("MessageDropout", "alike", "float64"),
    Case("MessageDropout", "apart"),
    Case("nn.Dropout1d", "alike"),
    Case("nn.Dropout1d", "apart"),
    Case("nn.Dropout1d on local tensors", "alike"),
    Case("nn.Dropout", "alike"),
)


class Told(NamedTuple):
    """What each process is told: the names above, as they are in the first process."""

    sizes: tuple[int, ...]
    steps: int
    cases: tuple[Case, ...]
    shapes: dict[tuple[int, ...], int]
    rounds: int
    folder: str


def run(rounds: int) -> dict[str, Any]:
    """Train every case on every number of ranks, then time calls on two of them."""
    world = max(SIZES)
    with tempfile.TemporaryDirectory() as folder:
        told = Told(SIZES, STEPS, CASES, SHAPES, rounds, folder)
        torch.multiprocessing.spawn(_work, (world, told), nprocs=world)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    trained = [_compared(case, [of_rank["trained"][i] for of_rank in found]) for i, case in enumerate(CASES)]
    return {
        "machine": machine() | {"threads": 1}, "p": {"trained": P_TRAINED, "calls": P}, "steps": STEPS,
        "rounds": rounds, "trained": trained, "rows": found[0]["rows"],
    }  # fmt: skip


def _work(rank: int, world: int, told: Told) -> None:
    warnings.simplefilter("ignore")  # that torch's random operations on a mesh of CPUs aren't complete
    torch.set_num_threads(1)
    store = dist.FileStore(f"{told.folder}/store", world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    try:
        meshes = {size: DeviceMesh("cpu", list(range(size))) for size in told.sizes}
        trained = [_trained(case, meshes, rank, told.steps) for case in told.cases]
        rows = _rows(meshes[2], told) if rank < 2 else []
        (Path(told.folder) / f"{rank}.json").write_text(json.dumps({"trained": trained, "rows": rows}))
        dist.barrier()  # nobody leaves while another still asks
    finally:
        dist.destroy_process_group()


# ---- training


def _trained(case: Case, meshes: dict[int, DeviceMesh], rank: int, steps: int) -> dict[str, Any]:
    make, local = LAYERS[case.layer]
    results, start = {}, time.perf_counter()
    for size, mesh in meshes.items():
        if rank < size:
            torch.manual_seed(1 + (rank if case.seeded == "apart" else 0))
            found = tensor_parallel.train(make, mesh, steps, local, getattr(torch, case.dtype))
            results[size] = found._asdict()
        dist.barrier()
    if rank == 0:
        print(case.layer, case.seeded, case.dtype, f"{time.perf_counter() - start:.1f} s", flush=True)
    return results


def _compared(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses, and how many of the masks are those of one rank, on all ranks that took part."""
    alone = ranks[0]["1"]
    sizes = {}
    for size in ranks[0]:
        masks = zip(alone["masks"], *(of_rank[size]["masks"] for of_rank in ranks if size in of_rank), strict=True)
        losses = ranks[0][size]["losses"]
        sizes[size] = {
            "losses": losses,
            "difference": max(abs(loss - other) for loss, other in zip(losses, alone["losses"], strict=True)),
            "same_masks": sum(len(set(digests)) == 1 for digests in masks),
        }
    return case._asdict() | {"masks": len(alone["masks"]), "sizes": sizes}


# ---- calls


def _rows(mesh: DeviceMesh, told: Told) -> list[dict[str, Any]]:
    rows = []
    for shape, calls in told.shapes.items():
        for name, placement in PLACEMENTS.items():
            x = distribute_tensor(torch.randn(shape), mesh, [placement])
            cases: dict[str, Callable[[], float]] = {}
            for label, drop in DROPS.items():
                on = (x.to_local() if label.endswith("local") else x).detach()
                tracked = on.clone().requires_grad_()
                both_ways = partial(_both_ways, drop, tracked, torch.ones_like(on))
                cases[f"{label}, forward"] = partial(_mean, partial(drop, on), calls, mesh)
                cases[f"{label}, both ways"] = partial(_mean, both_ways, calls, mesh)
            times = {label: 1e6 * t for label, t in medians(cases, told.rounds).items()}
            rows.append({"shape": shape, "placement": name, "microseconds": times})
            if mesh.get_rank() == 0:
                print(shape, name, {label: round(t, 1) for label, t in times.items()}, flush=True)
    return rows


def _both_ways(drop: Callable[[Any], Any], x: torch.Tensor, grad: torch.Tensor) -> None:
    torch.autograd.grad(drop(x), x, grad)


def _mean(call: Callable[[], Any], calls: int, mesh: DeviceMesh) -> float:
    """Seconds of a call; both ranks begin together, and make as many: a drawn seed is agreed on by all."""
    dist.barrier(group=mesh.get_group())
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


# ---- what the documents show


def table(results: dict[str, Any]) -> str:
    """The tables of benchmarks/README.md: the trainings, and the calls."""
    return f"{trained_table(results)}\n\n{_calls_table(results)}"


def trained_table(results: dict[str, Any]) -> str:
    """RANKS.md's table, too: which masks are the same as on one rank, and how far the losses get from its."""
    sizes = [size for size in results["trained"][0]["sizes"] if size != "1"]
    rows = []
    for case in results["trained"]:
        cells = []
        for size in sizes:
            found = case["sizes"][size]
            cells += [
                f"{found['same_masks']} of {case['masks']}" if case["masks"] else "–",
                f"{found['difference']:.1e}",
            ]
        rows.append([f"{case['layer']}, {case['dtype']}", case["seeded"], *cells])
    heads = [f"{size} ranks: {what}" for size in sizes for what in ("same masks", "loss differs by")]
    return markdown(["dropout", "generators seeded", *heads], rows)


def _calls_table(results: dict[str, Any]) -> str:
    rows = []
    for row in results["rows"]:
        times = row["microseconds"]
        cells = [f"{times[f'{label}, forward']:.3g}, {times[f'{label}, both ways']:.3g}" for label in DROPS]
        rows.append([" × ".join(map(str, row["shape"])), row["placement"], *cells])
    return markdown(["µs: forward, both ways", "placement", *DROPS], rows)


def chart(results: dict[str, Any], axes: Any) -> None:
    """How far the losses are from those of one rank, step by step."""
    for case in results["trained"]:
        *_, largest = case["sizes"]
        alone, cut = (case["sizes"][size]["losses"] for size in ("1", largest))
        apart = [abs(loss - other) or float("nan") for loss, other in zip(cut, alone, strict=True)]
        label = f"{case['layer']}, {case['dtype']}, seeded {case['seeded']}"
        axes.semilogy(range(1, len(apart) + 1), apart, marker=".", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(f"|loss on {largest} ranks - loss on one|")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
