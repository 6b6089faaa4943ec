"""Backward that computes forward again has the masks of forward: memory budgets and checkpoints in compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import internals
from helpers.recomputing import LAYERS, Stack, equals_the_masks_seen
from torch._functorch import config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def compiled(function: Any, backend: str, dynamic: bool = False) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


@pytest.mark.parametrize(("layer", "budget"), [("drop", 0.1), ("select", 0.0)])
def test_a_memory_budget_changes_no_gradient(layer, budget):
    stack = Stack(LAYERS[layer])
    with config.patch(activation_memory_budget=budget):
        equals_the_masks_seen(stack, compiled(stack, "aot_eager"))


@pytest.mark.parametrize("grad", [False, True])
def test_no_memory_budget_where_there_is_no_backward(grad):
    x, layer = torch.ones(6, 9, 8), LAYERS["drop"]()
    with config.patch(activation_memory_budget=0.0), torch.set_grad_enabled(grad):
        torch.manual_seed(3)
        y = compiled(layer, "aot_eager")(x)
    torch.manual_seed(3)
    assert y.equal(layer(x))


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("budget", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_no_memory_budget_changes_a_gradient(backend, budget, layer, dynamic):
    stack = Stack(LAYERS[layer])
    shapes = [(6, 9, 8), (5, 7, 8)] if dynamic else [(6, 9, 8)]
    with config.patch(activation_memory_budget=budget):
        equals_the_masks_seen(stack, compiled(stack, backend, dynamic), shapes)


@pytest.mark.long
@pytest.mark.parametrize("fallback", [False, True])
def test_where_inductor_draws_as_eager_code_does(fallback):
    from torch._inductor import config as inductor

    stack = Stack(LAYERS["drop"])
    with config.patch(activation_memory_budget=0.1), inductor.patch(fallback_random=fallback):
        equals_the_masks_seen(stack, compiled(stack, "inductor"))


@pytest.mark.long
@pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "region_activation_memory_budget"), reason="this torch has no budgets of regions"
)
@pytest.mark.parametrize("budget", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_memory_budget_of_a_region(backend, budget):
    stack = Stack(LAYERS["drop"])

    def f(x):
        with torch.autograd.graph.region_activation_memory_budget(budget):
            return stack(x)

    equals_the_masks_seen(stack, compiled(f, backend))


def saving(*operators: Any) -> Any:
    """A way to run a block: these operators' results are saved, the others' computed again."""

    def policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        saved = operator in operators
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    return lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def again(block: torch.nn.Module, x: torch.Tensor) -> Any:
    return checkpoint(block, x, use_reentrant=False)


RUNS = {"checkpoint": again, "selective": saving(torch.ops.aten.mm.default)}


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_in_compiled_code(run):
    stack = Stack(LAYERS["drop"], RUNS[run])
    equals_the_masks_seen(stack, compiled(stack, "aot_eager"))


def test_the_first_call_may_be_in_a_checkpoint(monkeypatch):
    internals.no_tensors_yet(monkeypatch)
    stack = Stack(LAYERS["drop"], again)
    equals_the_masks_seen(stack, compiled(stack, "aot_eager"))


@pytest.mark.long
@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_checkpoint_in_compiled_code(backend, run, layer, budget):
    stack = Stack(LAYERS[layer], RUNS[run])
    with config.patch(activation_memory_budget=budget):
        equals_the_masks_seen(stack, compiled(stack, backend))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_checkpoint_in_eager_code(layer, reentrant):
    stack = Stack(LAYERS[layer], lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    equals_the_masks_seen(stack, stack)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_compiled_code(reentrant):
    stack = Stack(LAYERS["drop"])
    f = compiled(stack, "aot_eager")
    equals_the_masks_seen(stack, lambda x: checkpoint(f, x, use_reentrant=reentrant))


def test_compiled_draws_follow_torchs_seed():
    """One draw a layer, from the state that `manual_seed` sets."""
    stack = Stack(LAYERS["drop"])
    f = compiled(stack, "aot_eager")
    x = torch.ones(6, 9, 8, dtype=torch.float64)
    torch.manual_seed(3)
    first, second = f(x)[1], f(x)[1]
    torch.manual_seed(3)
    assert all(map(torch.equal, first, f(x)[1]))
    assert all(map(torch.equal, second, f(x)[1]))
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(3)
    for _ in range(4):
        torch.randint(0, 2**63 - 1, ())
    state = torch.get_rng_state()
    torch.manual_seed(3)
    f(x), f(x)
    assert torch.equal(torch.get_rng_state(), state)
