"""What `tensors/test_sharded.py` checks on the ranks of a world beside the masks: seeds, refusals, targets, the compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.checkpoint import checkpoint

from helpers.cases import SHAPE
from helpers.on_meshes import FEATURES, SEED, data, here, same
from helpers.world import RANKS, Report
from msgdrop_numba import MessageDropout, MessageSelect, MessageSubset, message_dropout, message_select
from msgdrop_numba.tensors.pieces import agreed

FLAT, SQUARE = (RANKS,), (2, 2)


def mesh_of(shape: tuple[int, ...] = FLAT) -> DeviceMesh:
    return DeviceMesh("cpu", torch.arange(RANKS).reshape(shape))


def seeds(report: Report) -> None:
    """The first rank's generator governs, whatever the others hold, and all of them advance."""
    rank, x = distributed.get_rank(), data()
    for mesh, placed in ((mesh_of(), [Shard(1)]), (mesh_of(SQUARE), [Shard(0), Replicate()])):
        first = int(mesh.mesh.flatten()[0])
        for exact in (False, True):
            torch.manual_seed(7 if rank == first else 100 + rank)
            got = [message_dropout(here(x, mesh, placed), exact=exact) for _ in range(2)]
            torch.manual_seed(7)
            want = [message_dropout(x, exact=exact) for _ in range(2)]
            report.expect(f"drawn {exact}", all(map(same, got, want, [placed] * 2)) and not want[0].equal(want[1]))
            generator = torch.Generator().manual_seed(9 if rank == first else rank)
            got = [message_dropout(here(x, mesh, placed), exact=exact, generator=generator)]
            want = [message_dropout(x, exact=exact, generator=torch.Generator().manual_seed(9))]
            report.expect(f"generator {exact}", same(got[0], want[0], placed))
        report.expect("an integer", agreed(2**63 + rank, mesh) == 2**63 + first)
        report.expect("a tensor", agreed(torch.tensor(rank - 5), mesh).equal(torch.tensor(first - 5)))
    for ranks in ([3, 1, 0, 2], [[3, 1], [0, 2]]):  # not sorted, as torch's groups are
        mesh = DeviceMesh("cpu", torch.tensor(ranks))
        report.expect(f"the first of {ranks}", agreed(rank, mesh) == 3)
    torch.manual_seed(rank)
    state = torch.get_rng_state()
    message_dropout(here(x, mesh_of(), [Shard(0)]), 0.0)
    message_dropout(here(x, mesh_of(), [Shard(0)]), training=False)
    report.expect("nothing to drop, nothing drawn", state.equal(torch.get_rng_state()))


def communication(report: Report) -> None:
    """A seed given costs none, one that is drawn a sum for each dim of the mesh."""
    x = data()
    for shape in (FLAT, SQUARE):
        mesh = mesh_of(shape)
        for placed in ([Shard(1)] * len(shape), [Replicate()] * len(shape)):
            told = here(x, mesh, placed)
            for options in ({"seed": 1}, {"seed": torch.tensor(1), "exact": True}, {"training": False}, {"p": 0.0}):
                with CommDebugMode() as counted:
                    message_dropout(told, return_mask=True, **options)
                report.expect(f"{shape} {placed} {options}", counted.get_total_counts() == 0)
            with CommDebugMode() as counted:
                message_dropout(told)
            report.expect(f"{shape} {placed} drawn", counted.get_total_counts() == len(shape))
    alone = [DeviceMesh("cpu", torch.tensor([rank])) for rank in range(RANKS)][distributed.get_rank()]
    with CommDebugMode() as counted:
        message_dropout(here(x, alone, [Shard(0)]))
    report.expect("one rank", counted.get_total_counts() == 0)


def different_seeds(report: Report) -> None:
    """Ranks that were given different ones are told so where torch.distributed debugs."""
    rank, x = distributed.get_rank(), here(data(), mesh_of(), [Shard(0)])
    message_dropout(x, seed=rank)
    distributed.set_debug_level(distributed.DebugLevel.INFO)
    try:
        message_dropout(x, seed=SEED)
        message_dropout(x, training=False, seed=rank)
        for seed in (2**63 + rank, torch.tensor(rank - 2**63)):
            seeds = [2**63 + r for r in range(RANKS)]
            report.refuses(ValueError, f"they were given {seeds}", lambda s=seed: message_dropout(x, seed=s))
    finally:
        distributed.set_debug_level(distributed.DebugLevel.OFF)


def refusals(report: Report) -> None:
    """Bad input is refused on all ranks alike, and nothing is sent: these would hang, or be gathered with the next."""
    mesh, square, whole = mesh_of(), mesh_of(SQUARE), data()
    x, along, leaf = (here(whole, mesh, [Shard(dim)]) for dim in (0, 1, 0))
    leaf.requires_grad_()

    def wrong(kind: type[Exception], said: str, x: Any = x, p: Any = 0.5, **options: Any) -> None:
        report.refuses(kind, said, lambda: message_dropout(x, p, **options))

    def spread(value: torch.Tensor, *placed: Any, on: DeviceMesh = mesh) -> DTensor:
        return here(value, on, placed)

    with CommDebugMode() as counted:
        partial = DTensor.from_local(whole, mesh, [Partial()])
        wrong(ValueError, "redistribute it first", partial)
        strided = DTensor.from_local(torch.ones(1, 7, 4), square, [_StridedShard(0, split_factor=2), Shard(0)])
        wrong(ValueError, "x must be placed by Replicate() and Shard(dim)", strided)
        on_meta = DTensor.from_local(torch.ones(SHAPE, device="meta"), mesh, [Replicate()])
        wrong(ValueError, "x must lie where its mesh does, on cpu, but it is on meta", on_meta)
        uneven = DTensor.from_local(torch.ones(2, 7, 4), mesh, [Shard(0)], shape=torch.Size(SHAPE), stride=(28, 4, 1))
        wrong(ValueError, "x must be cut as torch.chunk cuts", uneven)
        along = here(whole, mesh, [Shard(1)])
        wrong(ValueError, "lengths must have shape (3,), one a row, but got (1,)", lengths=torch.tensor([7]))
        wrong(ValueError, "lengths must have shape (3,), as x's dims", lengths=spread(torch.ones(4).long(), Shard(0)))
        wrong(ValueError, "lengths must be from 0 to 7", along, lengths=[3, 8, 1])
        wrong(ValueError, "keys must be placed as x is", along, keys=spread(torch.arange(3), Shard(0)))
        wrong(ValueError, "keys must be on x's mesh", keys=spread(torch.arange(3), Replicate(), Replicate(), on=square))
        wrong(ValueError, "protect must be placed as x is", protect=spread(torch.ones(7) > 0, Shard(0)))
        wrong(ValueError, "positions must be placed as x is", positions=spread(torch.arange(7), Shard(0)))
        wrong(ValueError, "p must be placed as x is", p=spread(torch.full((3, 7), 0.5), Shard(1)))
        half = DTensor.from_local(torch.tensor(0.5), mesh, [Partial()])
        wrong(ValueError, "p must be placed by Replicate() and Shard(dim)", p=half)
        wrong(ValueError, "fill must be placed as x is", fill=spread(FEATURES, Shard(0)))
        wrong(ValueError, "fill must be a number or a tensor like one message of x", fill=torch.ones(1))
        wrong(ValueError, "seed must be replicated", seed=spread(torch.arange(4), Shard(0)))
        wrong(ValueError, "p must be a probability", p=1.5)
        wrong(ValueError, "give seed or generator", seed=1, generator=torch.Generator())
        wrong(TypeError, "out must be a DTensor", out=torch.empty(SHAPE))
        wrong(ValueError, "out must be placed as x is", out=along)
        wrong(ValueError, "out must be like x", out=here(whole.double(), mesh, [Shard(0)]))
        wrong(ValueError, "not both", out=x, inplace=True)
        wrong(ValueError, "leaf that requires grad", leaf, inplace=True)
        wrong(ValueError, "out can't be used where a gradient is needed", leaf, out=x)
        integers = here(whole.int(), mesh, [Shard(1)])
        wrong(TypeError, "scale=True needs a floating or complex dtype", integers, scale=True, exact=True)
    report.expect("nothing was sent", counted.get_total_counts() == 0)
    wrong(ValueError, "prefix", along, prefix=8)  # unchecked where a mode is active


def targets(report: Report) -> None:
    """In place, into another DTensor, and under autograd."""
    mesh, whole = mesh_of(), data()
    for placed in ([Shard(0)], [Shard(1)], [Shard(2)]):
        for options in ({}, {"exact": True, "scale": True}, {"fill": FEATURES}):
            want = message_dropout(whole, seed=3, **options)
            x = here(whole.clone(), mesh, placed)
            version = x._version
            y = message_dropout(x, seed=3, inplace=True, **options)
            report.expect(f"in place {placed} {options}", y is x and same(x, want, placed) and x._version > version)
            x, out = here(whole.clone(), mesh, placed), here(torch.zeros(SHAPE), mesh, placed)
            y = message_dropout(x, seed=3, out=out, **options)
            report.expect(f"out {placed} {options}", y is out and same(out, want, placed) and same(x, whole, placed))
            leaf = here(whole.clone(), mesh, placed).requires_grad_()
            x = leaf * 2
            y = message_dropout(x, seed=3, inplace=True, **options)
            y.backward(here(torch.ones(SHAPE), mesh, placed))
            plain = whole.clone().requires_grad_()
            doubled = message_dropout(plain * 2, seed=3, **options)
            doubled.backward(torch.ones(SHAPE))
            report.expect(
                f"under autograd {placed} {options}",
                y is x and same(y, doubled.detach(), placed) and same(leaf.grad, plain.grad, placed),
            )
        x = here(whole.clone(), mesh, placed)
        report.expect(
            "x itself", message_dropout(x, 0.0) is x and message_dropout(x, training=False, inplace=True) is x
        )
        out = here(torch.zeros(SHAPE), mesh, placed)
        report.expect("a copy", message_dropout(x, 0.0, out=out) is out and same(out, whole, placed))


def gradients(report: Report) -> None:
    """Twice, from a tensor that is still on its way, recomputed, and through torch's own sums of what is sharded otherwise."""
    mesh, whole = mesh_of(), data()
    ones, plain = torch.ones(SHAPE), whole.clone().requires_grad_()
    (first,) = torch.autograd.grad(message_dropout(plain, seed=3, scale=True) ** 3, plain, ones, create_graph=True)
    first.backward(ones)
    for placed in ([Shard(0)], [Shard(1)], [Replicate()]):
        x, g = here(whole, mesh, placed).requires_grad_(), here(ones, mesh, placed)
        (again,) = torch.autograd.grad(message_dropout(x, seed=3, scale=True) ** 3, x, g, create_graph=True)
        again.backward(g)
        report.expect(f"twice {placed}", same(again, first.detach(), placed) and same(x.grad, plain.grad, placed))
    for exact in (False, True):
        x = here(whole, mesh, [Shard(0)]).requires_grad_()
        y = message_dropout(x.redistribute(placements=[Shard(1)], async_op=True), seed=3, exact=exact)
        y.sum().backward()
        want, mask = message_dropout(whole, seed=3, exact=exact, return_mask=True)
        report.expect(
            "on its way", same(y, want, [Shard(1)]) and same(x.grad, mask[..., None].expand(SHAPE).float(), [Shard(0)])
        )
        torch.manual_seed(distributed.get_rank())  # drawn in forward, and agreed on again in backward
        x = here(whole, mesh, [Shard(1)]).requires_grad_()
        y = checkpoint(lambda x, exact=exact: message_dropout(x * x, exact=exact), x, use_reentrant=False)
        torch.manual_seed(99)
        y.backward(here(ones, mesh, [Shard(1)]))
        kept = y.full_tensor() != 0
        report.expect(
            f"recomputed {exact}", same(x.grad, torch.where(kept, 2 * whole, 0), [Shard(1)]) and 0 < kept.sum() < 84
        )
    signed, g = data().requires_grad_(), -torch.arange(84.0).reshape(SHAPE) % 5
    message_dropout(signed, seed=3, exact=True, scale=True, prefix=1).backward(-g)
    x = here(whole, mesh, [Shard(1)]).requires_grad_()
    message_dropout(x, seed=3, exact=True, scale=True, prefix=1).backward(here(-g, mesh, [Shard(1)]))
    report.expect("zeros of either sign", same(x.grad, signed.grad, [Shard(1)]))
    last = {"seed": 3, "positions": 2**34 - 6}  # on the last rank lies nothing
    report.expect(
        "positions",
        same(
            message_dropout(here(whole[0, :6], mesh, [Shard(0)]), **last),
            message_dropout(whole[0, :6], **last),
            [Shard(0)],
        ),
    )
    apart = here(whole.transpose(0, 1).contiguous().transpose(0, 1), mesh, [Shard(2)])
    y = message_dropout(apart, seed=3)
    report.expect("strides", y.full_tensor().equal(message_dropout(whole, seed=3)) and y.stride() == apart.stride())


def layers(report: Report) -> None:
    """The layers, a fill that is learned too."""
    mesh, whole = mesh_of(SQUARE), data()
    placed = [Shard(0), Shard(2)]
    fill = torch.nn.Parameter(FEATURES.clone())
    layer = MessageDropout(0.5, scale=True, fill=fill)
    x = here(whole, mesh, placed).requires_grad_()
    y = layer(x, seed=5)
    y.backward(here(torch.ones(SHAPE), mesh, placed))
    got, fill.grad = fill.grad, None
    want = layer(whole, seed=5)
    want.backward(torch.ones(SHAPE))
    report.expect("a layer", same(y, want.detach(), placed) and got.equal(fill.grad) and layer.eval()(x) is x)


def selected(report: Report) -> None:
    """What remains, its companions, and back."""
    for mesh, placed in (
        (mesh_of(), [Shard(0)]), (mesh_of(), [Shard(2)]), (mesh_of(SQUARE), [Shard(0), Shard(2)]), (mesh_of(SQUARE), [Shard(0), Shard(0)]),
    ):  # fmt: skip
        for options in (
            {"exact": True}, {"exact": True, "scale": True, "prefix": 1}, {"capacity": 7, "lengths": [7, 0, 3]},
            {"training": False},
        ):  # fmt: skip
            report.attempt(select_case, mesh, placed, options)


def select_case(report: Report, mesh: DeviceMesh, placed: Any, options: dict[str, Any]) -> None:
    label, rows = f"{placed} {options}", [p if p == Shard(0) else Replicate() for p in placed]
    whole, x = data().requires_grad_(), here(data(), mesh, placed).requires_grad_()
    want, wanted = message_select(whole, seed=SEED, **options)
    y, kept = message_select(x, seed=SEED, **options)
    report.expect(f"y: {label}", same(y, want.detach(), placed))
    for name in ("indices", "mask", "lengths", "key_padding_mask"):
        report.expect(f"{name}: {label}", same(getattr(kept, name), getattr(wanted, name), rows))
    report.expect(f"told: {label}", (kept.layout, kept.size, kept.max_length) == (wanted.layout, 7, wanted.max_length))
    labels, table = torch.arange(21).reshape(3, 7), torch.arange(7.0).reshape(7, 1).requires_grad_()
    report.expect(f"taken: {label}", same(kept.take(here(labels, mesh, rows)), wanted.take(labels), rows))
    taken = kept.take(here(labels.reshape(3, 1, 7), mesh, rows), dim=2)
    report.expect(f"along another dim: {label}", same(taken, wanted.take(labels.reshape(3, 1, 7), dim=2), rows))
    ours = here(table.detach(), mesh, [Replicate()] * mesh.ndim).requires_grad_()
    shared, known = kept.take(ours, dim=0), wanted.take(table, dim=0)
    known.sum().backward()
    shared.sum().backward()
    gathered = ours.grad.full_tensor()
    report.expect(f"shared: {label}", same(shared, known.detach(), rows))
    report.expect(f"gradient of what is shared: {label}", gathered.equal(table.grad))
    learned, everywhere = FEATURES.clone().requires_grad_(), here(FEATURES, mesh, [Replicate()] * mesh.ndim)
    for fill in (-1.0, learned, everywhere, -data(), here(-data(), mesh, placed)):
        plain = fill.full_tensor() if isinstance(fill, DTensor) else fill
        if isinstance(plain, torch.Tensor):
            plain = plain.detach().clone().requires_grad_()
        back, known = kept.restore(y, fill=fill), wanted.restore(want, fill=plain)
        report.expect(f"back: {label}", same(back, known.detach(), placed))
    back.backward(here(data(), mesh, placed))
    known.backward(data())
    report.expect(f"gradient: {label}", same(x.grad, whole.grad, placed))


def select_more(report: Report) -> None:
    """The layers, and what is refused."""
    mesh, whole = mesh_of(), data()
    x = here(whole, mesh, [Shard(0)])
    rank = distributed.get_rank()
    torch.manual_seed(rank)
    y, kept = message_select(x, exact=True)
    torch.manual_seed(0)
    report.expect("drawn", same(y, message_select(whole, exact=True)[0], [Shard(0)]))
    got = MessageSelect(0.5, exact=True, return_kept="indices")(x, seed=1)
    want = MessageSelect(0.5, exact=True, return_kept="indices")(whole, seed=1)
    report.expect("a layer", all(map(same, got, want, [[Shard(0)]] * 2)))
    subset = MessageSubset(torch.nn.Tanh(), 0.5, exact=True)
    report.expect("a subset", same(subset(x, seed=1), subset(whole, seed=1), [Shard(0)]))
    for said, call in (
        ("redistribute it, with no Shard(1)", lambda: message_select(here(whole, mesh, [Shard(1)]), exact=True)),
        ("redistribute it, with no Shard(0)", lambda: MessageSubset(torch.nn.Tanh(), 0.5, per="sample")(x)),
        ("give exact=True, or capacity", lambda: message_select(x)),
        ("take 'dense' or 'padded'", lambda: message_select(x, layout="packed", capacity=21)),
        ("layout 'dense' needs rows", lambda: message_select(x, layout="dense")),
        ("t must be placed by its rows as x was", lambda: kept.take(here(whole, mesh, [Replicate()]))),
        ("y must be placed by its rows as x was", lambda: kept.restore(here(torch.ones(3, 4), mesh, [Shard(1)]))),
        ("goes with DTensors alone", lambda: kept.take(whole)),
        ("goes with DTensors alone", lambda: kept.restore(torch.ones(3, 4))),
        ("goes with DTensors alone", lambda: kept.to_nested(y)),
        ("is of a plain tensor", lambda: message_select(whole, exact=True)[1].take(x)),
        ("t must be replicated where x's rows are sharded", lambda: kept.take(here(torch.ones(7, 4), mesh, [Shard(1)]), dim=0)),
        ("a fill of all messages must be", lambda: kept.restore(y, fill=here(whole[:, :6], mesh, [Shard(0)]))),
    ):  # fmt: skip
        report.refuses(ValueError, said, call)
    first = here(whole, DeviceMesh("cpu", torch.arange(2)), [Shard(0)])
    if first.device_mesh.get_coordinate() is None:
        report.refuses(ValueError, "outside of x's mesh", lambda: message_select(first, exact=True))


def compiled(report: Report) -> None:
    """One graph of it, forward and backward, of a rank that isn't the first."""
    mesh, whole = mesh_of(), data()
    if distributed.get_rank() != 1:
        return
    for placed, options in (
        ([Shard(0)], {"scale": True}), ([Shard(1)], {"exact": True, "lengths": torch.tensor([7, 0, 5])}),
    ):  # fmt: skip
        torch._dynamo.reset()
        call = torch.compile(message_dropout, fullgraph=True, backend="aot_eager")
        x, plain = here(whole, mesh, placed).requires_grad_(), whole.clone().requires_grad_()
        got, mask = call(x, 0.5, seed=torch.tensor(3), return_mask=True, **options)
        want, keep = message_dropout(plain, 0.5, seed=3, return_mask=True, **options)
        got.backward(here(whole, mesh, placed))
        want.backward(whole)
        report.expect(f"{placed} {options}", same(got, want.detach(), placed) and same(x.grad, plain.grad, placed))
        report.expect(f"mask {placed} {options}", same(mask, keep, placed))


def compiled_more(report: Report) -> None:
    """Seeds that are drawn, shapes that change, targets, removal; by Inductor."""
    mesh, rank = mesh_of(), distributed.get_rank()
    for backend in ("aot_eager", "inductor"):
        for placed in ([Shard(0)], [Shard(1)], [Shard(2)], [Replicate()]):
            torch._dynamo.reset()
            drop = torch.compile(lambda x, **told: message_dropout(x, 0.5, **told), fullgraph=True, backend=backend)
            for size in (7, 9, 14):  # what lies on each rank must change, too: else torch itself takes the last shape
                whole = data((3, size, 4))
                torch.manual_seed(rank)
                y = drop(here(whole, mesh, placed)).full_tensor()
                kept = (y != 0).any(-1)
                report.expect(
                    f"drawn {backend} {placed} {size}",
                    y.equal(torch.where(kept[..., None], whole, 0)) and 0 < kept.sum() < kept.numel(),
                )
                got = drop(here(whole, mesh, placed), seed=torch.tensor(3), lengths=torch.tensor([5, 0, 7]), min_keep=2)
                want = message_dropout(whole, 0.5, seed=3, lengths=torch.tensor([5, 0, 7]), min_keep=2)
                report.expect(f"{backend} {placed} {size}", same(got, want, placed))
        twice = torch.compile(
            lambda x: message_dropout(x, 0.5, return_mask=True)[1] ^ message_dropout(x, 0.5, return_mask=True)[1],
            fullgraph=True,
            backend=backend,
        )
        report.expect(f"two draws {backend}", twice(here(data(), mesh, [Replicate()])).to_local().any())
        torch._dynamo.reset()
        select = torch.compile(
            lambda x, seed: message_select(x, exact=True, seed=seed)[0], fullgraph=True, backend=backend
        )
        got = select(here(data(), mesh, [Shard(0)]), torch.tensor(3))
        report.expect(f"removal {backend}", same(got, message_select(data(), exact=True, seed=3)[0], [Shard(0)]))


def without_a_group(report: Report) -> None:
    """The last of all checks in its world."""
    x = here(data(), mesh_of(), [Shard(0)])
    distributed.destroy_process_group()
    report.refuses(ValueError, "call init_process_group first", lambda: message_dropout(x))
    report.expect("a seed", message_dropout(x, seed=1).to_local().shape == x.to_local().shape)
