"""Backward that computes forward again has the masks of forward: memory budgets and checkpoints in compiled code.

Values are small integers in float64, so that gradients equal those of the masks seen bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._functorch import config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from msgdrop_numba import MessageDropout, MessageSelect


class Block(torch.nn.Module):
    """Activations that backward needs, around a layer; the layer's mask, which tells what it dropped."""

    def __init__(self, layer: torch.nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        draw = {"generator": generator, "dtype": torch.float64}
        self.layer = layer
        self.before = torch.nn.Parameter(torch.randint(-1, 2, (8, 8), **draw))
        self.after = torch.nn.Parameter(torch.randint(-1, 2, (8, 8), **draw))

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x = (x @ self.before).relu() + 1  # no message is 0 but one that drops
        if keep is None:
            x, keep = self.drop(x)
        else:
            x = torch.where(keep[..., None], x, 0)
        return ((x * x) @ self.after).sign() * x, keep

    def drop(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.layer, MessageSelect):
            y, kept = self.layer(x)
            x = kept.restore(y)
            return x, (x != 0).any(-1)
        return self.layer(x, return_mask=True)


class Stack(torch.nn.Module):
    """Two such blocks, each run by `run`."""

    def __init__(self, layer: Any, run: Any = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.blocks = torch.nn.ModuleList(Block(layer(), generator) for _ in range(2))
        self.run = run or (lambda block, x: block(x))

    def forward(self, x: torch.Tensor, given: Any = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        seen = []
        for i, block in enumerate(self.blocks):
            x, keep = self.run(block, x) if given is None else block(x, given[i])
            seen.append(keep)
        return x, seen

    def gradients(self, f: Any, x: torch.Tensor, *given: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        y, seen = f(x, *given)
        before = torch.get_rng_state()
        y.sum().backward()
        assert torch.equal(torch.get_rng_state(), before)  # backward leaves no trace
        gradients = []
        for tensor in (x, *self.parameters()):
            gradients.append(tensor.grad)
            tensor.grad = None
        return gradients, seen


def equals_the_masks_seen(stack: Stack, f: Any, shapes: Any = ((6, 9, 8),)) -> None:
    """Whether the gradients of f are those of the masks that it says it had, twice for each shape."""
    for shape in shapes:
        for _ in range(2):
            x = torch.randint(-2, 3, shape, dtype=torch.float64).requires_grad_()
            got, seen = stack.gradients(f, x)
            want, _ = stack.gradients(stack, x, [keep.clone() for keep in seen])
            assert all(map(torch.equal, got, want))
            assert any(gradient.any() for gradient in want)
            assert not torch.equal(*seen)  # each layer draws its own
            assert 0 < sum(int(keep.sum()) for keep in seen) < 2 * seen[0].numel()


LAYERS = {"drop": lambda: MessageDropout(0.5), "select": lambda: MessageSelect(0.5, exact=True)}


def compiled(function: Any, backend: str, dynamic: bool = False) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


@pytest.mark.parametrize(("layer", "budget"), [("drop", 0.1), ("select", 0.0)])
def test_a_memory_budget_changes_no_gradient(layer, budget):
    stack = Stack(LAYERS[layer])
    with config.patch(activation_memory_budget=budget):
        equals_the_masks_seen(stack, compiled(stack, "aot_eager"))


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
