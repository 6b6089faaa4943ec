"""Ranks of a gloo world: own masks of a rank, the same ones with ids, and those of recomputed and sharded blocks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import internals, world
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from msgdrop_numba import MessageDropout, MessageSelect, MessageSubset, fold_in, message_dropout

CHECKS = "helpers.on_ranks"
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
        internals.no_plain_tensors(patch)
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


def all_held(names: list[str], ranks: int) -> None:
    found = world.run(CHECKS, names, ranks)
    assert {name: told for name, told in found.items() if not isinstance(told, int) or told == 0} == {}


@pytest.mark.processes
def test_two_ranks():
    """In one world, since to start one takes seconds."""
    all_held(["own_masks", "strangers", "global_batches", "checkpoints", "fully_sharded", "named_dims", "pipelines"], 2)


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 4])
def test_global_batches_of_any_number_of_ranks(ranks):
    all_held(["global_batches"], ranks)


@pytest.mark.long
@pytest.mark.processes
def test_compiled_code_on_two_ranks():
    all_held(["compiled_checkpoints"], 2)
