"""Blocks whose backward may compute forward again, and whether it then has forward's masks.

Values are small integers in float64, so that gradients equal those of the masks seen bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch

from msgdrop_numba import MessageDropout, MessageSelect

LAYERS = {"drop": lambda: MessageDropout(0.5), "select": lambda: MessageSelect(0.5, exact=True)}


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
            x = torch.where(keep[..., None], x, getattr(self.layer, "fill", 0))
        return (x * x) @ self.after, keep

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
            assert all(gradient.any() for gradient in want)
            assert not torch.equal(*seen)  # each layer draws its own
            assert 0 < sum(int(keep.sum()) for keep in seen) < 2 * seen[0].numel()
