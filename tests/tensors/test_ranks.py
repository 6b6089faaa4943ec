"""Ranks of a gloo world: own masks of a rank, the same ones with ids, and those of recomputed and sharded blocks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import internals
from helpers.world import held
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from msgdrop_numba import MessageDropout, MessageSelect, MessageSubset, fold_in, message_dropout, message_select

X = torch.randn(4, 9, 3)
LAYERS = {
    "drop": lambda **told: MessageDropout(0.5, **told),
    "select": lambda **told: MessageSelect(0.5, exact=True, return_kept=False, **told),
    "subset": lambda **told: MessageSubset(torch.nn.Tanh(), 0.5, exact=True, **told),
}

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no processes that talk")


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def folded(device: Any = "cpu") -> int:
    """The seed that rank 0 has where this one is drawn, which is drawn next again."""
    torch.manual_seed(3)
    drawn = int(torch.randint(0, 2**63 - 1, (), device=device))
    torch.manual_seed(3)
    return fold_in(drawn, 0)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_rank_is_folded_into_a_drawn_seed(layer, alone):
    made = LAYERS[layer](per_rank=True)
    seed = folded()
    once = made(X)
    state = torch.get_rng_state()
    assert torch.equal(once, made(X, seed=seed))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    torch.randint(0, 2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), state)  # one draw, and no other
    torch.manual_seed(3)
    assert not torch.equal(once, LAYERS[layer]()(X))  # rank 0 has its own masks, too


def test_the_rank_is_folded_in_on_a_device(alone, device):
    layer = MessageDropout(0.5, scale=True, fill=2.0, per_rank=True)
    x = X.to(device).requires_grad_()
    seed = folded(device)
    y = layer(x)
    assert torch.equal(y, layer(x, seed=seed))
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, torch.autograd.grad(layer(x, seed=seed).sum(), x)[0])


def test_the_rank_is_folded_in_by_operations(alone, monkeypatch):
    layer = MessageDropout(0.5, per_rank=True)
    want = message_dropout(X, 0.5, seed=folded())
    with monkeypatch.context() as patch:
        internals.no_host_tensors(patch)
        assert torch.equal(layer(X), want)
    torch.manual_seed(3)
    assert torch.equal(torch.vmap(layer, randomness="same")(X[None].expand(2, -1, -1, -1))[1], want)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_rank_is_folded_in_by_compiled_code(alone, layer):
    made = LAYERS[layer](per_rank=True)
    torch._dynamo.reset()
    f = torch.compile(made, backend="aot_eager", fullgraph=layer != "subset")
    seed = folded()
    assert torch.equal(f(X), made(X, seed=seed))


def test_the_rank_is_folded_in_on_dtensors(alone):
    layer = MessageDropout(0.5, per_rank=True)
    x = distribute_tensor(X, DeviceMesh("cpu", [0]), [Shard(1)])
    seed = folded()
    assert torch.equal(layer(x).full_tensor(), message_dropout(X, 0.5, seed=seed))


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Shard(2), Replicate()])
def test_a_mesh_dim_of_one_rank_cuts_nothing(alone, placement):
    """As with tensor parallelism 1."""
    mesh, whole = DeviceMesh("cpu", [0]), X.detach()  # another test may have asked for its gradient
    x = distribute_tensor(whole, mesh, [placement])
    y, kept = message_select(x, 0.5, exact=True, seed=3)
    want, there = message_select(whole, 0.5, exact=True, seed=3)
    assert torch.equal(y.full_tensor(), want)
    for other in (placement, Replicate(), Shard(1)):
        companion = distribute_tensor(whole, mesh, [other])
        assert torch.equal(kept.take(companion).full_tensor(), want)
        assert torch.equal(kept.restore(distribute_tensor(want, mesh, [other])).full_tensor(), there.restore(want))
        fill = kept.restore(y, fill=companion)
        assert torch.equal(fill.full_tensor(), there.restore(want, fill=whole))
        out = distribute_tensor(torch.zeros_like(whole), mesh, [other])
        message_dropout(x, 0.5, seed=3, out=out)
        assert torch.equal(out.full_tensor(), message_dropout(whole, 0.5, seed=3))
        protect = distribute_tensor(whole[..., 0] > 0, mesh, [other if other != Shard(2) else Replicate()])
        assert torch.equal(
            message_dropout(x, 0.5, seed=3, protect=protect).full_tensor(),
            message_dropout(whole, 0.5, seed=3, protect=whole[..., 0] > 0),
        )
    shared = distribute_tensor(torch.arange(9.0), mesh, [Shard(0)])
    assert torch.equal(kept.take(shared, dim=0).full_tensor(), there.take(torch.arange(9.0), dim=0))
    layer = MessageSubset(torch.nn.Tanh(), 0.5, exact=True)
    assert torch.equal(layer(x, seed=3).full_tensor(), layer(whole, seed=3))


@pytest.mark.parametrize("name", ["p", "fill", "lengths", "seed", "keys", "protect", "positions", "out"])
def test_a_dtensor_beside_a_plain_tensor_is_refused(name, alone):
    """As where a layer before, by torch's default, gives what lies on the rank."""
    told = {
        "p": torch.full((9,), 0.5), "fill": torch.ones(3), "lengths": torch.full((4,), 9), "seed": torch.tensor(1),
        "keys": torch.arange(4), "protect": torch.arange(9) < 2, "positions": torch.arange(9), "out": torch.zeros(4, 9, 3),
    }  # fmt: skip
    value = distribute_tensor(told[name], DeviceMesh("cpu", [0]), [Replicate()])
    with pytest.raises(ValueError, match=f"{name} is a DTensor, but x is a plain tensor: make x a DTensor"):
        message_dropout(X, **{name: value})
    if name not in ("fill", "out"):
        with pytest.raises(ValueError, match=f"{name} is a DTensor, but x is a plain tensor"):
            message_select(X, **{name: value})


def test_there_must_be_a_rank():
    layer = MessageDropout(0.5, per_rank=True)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"per_rank=True needs.*init_process_group"):
        layer(X)
    with pytest.raises(ValueError, match=r"per_rank=True needs.*init_process_group"):
        MessageSelect(0.5, per_rank=True)(X)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer(X, seed=1), message_dropout(X, 0.5, seed=1))
    assert layer.eval()(X) is X
    assert MessageDropout(0.0, per_rank=True)(X) is X


@pytest.mark.parametrize("per_rank", [None, 1, "data", "cpu", object()])
@pytest.mark.parametrize("layer", LAYERS)
def test_what_has_no_rank_is_refused(layer, per_rank):
    with pytest.raises(
        TypeError, match=r"per_rank must be True, False, a torch.distributed.ProcessGroup or a DeviceMesh"
    ):
        LAYERS[layer](per_rank=per_rank)


def test_a_mesh_has_one_dim(alone):
    with pytest.raises(ValueError, match="per_rank must be a mesh of one dim"):
        MessageDropout(0.5, per_rank=DeviceMesh("cpu", [[0]]))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_with_ranks_is_shown_copied_and_pickled(layer, alone):
    assert "per_rank" not in repr(LAYERS[layer]())
    assert "per_rank=True" in repr(LAYERS[layer](per_rank=True))
    assert "per_rank=DeviceMesh(1,)" in repr(LAYERS[layer](per_rank=DeviceMesh("cpu", [0])))
    group = distributed.new_group([0])
    for per_rank in (True, group, DeviceMesh("cpu", [0])):
        made = LAYERS[layer](per_rank=per_rank)
        copies = [copy.deepcopy(made), copy.copy(made), copy.deepcopy(torch.nn.Sequential(made))[0]]
        if per_rank is not group:
            copies.append(pickle.loads(pickle.dumps(made)))
        for other in copies:
            assert other.per_rank == per_rank
            seed = folded()
            assert torch.equal(other(X), made(X, seed=seed))


def test_a_copy_shares_the_group_alone():
    layer = MessageDropout(0.5, fill=torch.nn.Parameter(torch.zeros(3)))
    other = copy.deepcopy(layer)
    assert type(other) is MessageDropout
    assert other.fill is not layer.fill
    assert torch.equal(other.fill, layer.fill)
    assert list(dict(other.named_parameters())) == ["fill"]
    shared = torch.nn.ModuleList([layer, layer])
    first, second = copy.deepcopy(shared)
    assert first is second


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_before_have_no_ranks(layer):
    made = LAYERS[layer]()
    old = type(made).__new__(type(made))
    old.__setstate__({name: value for name, value in vars(made).items() if name != "per_rank"})
    assert repr(old) == repr(made)
    torch.manual_seed(3)
    want = made(X)
    torch.manual_seed(3)
    assert torch.equal(old(X), want)


# ---- worlds of several processes


@pytest.mark.processes
def test_two_ranks():
    """In one world, since to start one takes seconds."""
    held(
        "on_ranks.own_masks", "on_ranks.strangers", "on_ranks.global_batches", "on_ranks.checkpoints", "on_ranks.fully_sharded",
        "on_ranks.named_dims", "on_ranks.pipelines", "on_ranks.trained", ranks=2,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 4])
def test_global_batches_of_any_number_of_ranks(ranks):
    held("on_ranks.global_batches", ranks=ranks)


@pytest.mark.long
@pytest.mark.processes
def test_compiled_code_on_two_ranks():
    held("on_ranks.compiled_checkpoints", ranks=2)
