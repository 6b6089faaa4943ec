"""A program that `tensors/test_transforms.py` runs: every kind of tensor, after calls that have made guards.

TensorGuards look at sizes in C++, where an error ends the process: so each kind is tried in a process of its own.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from msgdrop_numba import MessageDropout, message_dropout, message_select

SHAPE = (3, 4, 6)
X = torch.randn(SHAPE)


class Subclass(torch.Tensor):
    pass


def leaked(transform: Callable[..., Any], *arguments: Any) -> torch.Tensor:
    """The tensor that a transform's function sees, after the transform has ended."""
    seen: list[torch.Tensor] = []

    def function(t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return (t * 1).sum()

    transform(function)(*arguments)
    return seen[0]


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(4, 6), torch.randn(2, 6)], layout=layout)


def nested_by_vmap(layout: torch.layout) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    three = torch.nested.nested_tensor([torch.randn(3, 4, 6), torch.randn(2, 4, 6)], layout=layout)
    with contextlib.suppress(RuntimeError):  # torch's own vmap knows few operations on jagged ones
        torch.vmap(lambda t: (seen.append(t), t * 1)[1])(three)
    return seen[0]


def fake() -> torch.Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(X)


def freed() -> torch.Tensor:
    x = X.clone()
    x.untyped_storage().resize_(0)
    return x


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "plain": X.clone,
    "parameter": lambda: torch.nn.Parameter(X.clone()),
    "subclass": lambda: X.clone().as_subclass(Subclass),
    "permuted": lambda: X.clone().transpose(0, 1),
    "expanded": lambda: torch.randn(1, 4, 6).expand(SHAPE),
    "with gaps": lambda: torch.randn(3, 4, 12)[..., ::2],
    "no messages": lambda: torch.empty(3, 0, 6),
    "one dim": lambda: torch.randn(3),
    "no dim": lambda: torch.tensor(1.0),
    "freed": freed,
    "meta": lambda: X.to("meta"),
    "fake": fake,
    "COO": X.to_sparse,
    "COO of messages": lambda: X.to_sparse(2),
    "CSR": X[0].to_sparse_csr,
    "CSC": X[0].to_sparse_csc,
    "BSR": lambda: X[0].to_sparse_bsr((2, 2)),
    "MKLDNN": X.to_mkldnn,
    "quantized": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "zero tensor": lambda: torch._efficientzerotensor(SHAPE),  # type: ignore[attr-defined]
    "conjugated": lambda: torch.conj(torch.randn(SHAPE, dtype=torch.complex64)),
    "negated": lambda: torch.imag(torch.conj(torch.randn(SHAPE, dtype=torch.complex64))),
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "leaked by vmap": lambda: leaked(torch.vmap, X[None].clone()),
    "leaked by grad": lambda: leaked(torch.func.grad, X.clone()),
    "leaked by vmap, nested": lambda: nested_by_vmap(torch.strided),
    "leaked by vmap, jagged": lambda: nested_by_vmap(torch.jagged),
    "leaked by functionalize": lambda: leaked(torch.func.functionalize, X.clone()),
    "inference": lambda: torch.inference_mode()(X.clone)(),
}  # fmt: skip

CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "out of place": message_dropout,
    "in place": lambda x: message_dropout(x, inplace=True),
    "out": lambda x: message_dropout(X, out=x),
    "both": lambda x: message_dropout(x, out=x),
    "layer": lambda x: MessageDropout(0.5)(x),
    "select": message_select,
    "lengths": lambda x: message_dropout(x, lengths=[4, 2, 0]),
    "collate": lambda x: torch.stack([message_dropout(X), message_dropout(x)]),
}


def leaving(kind: str, call: str) -> str:
    """What becomes of a call: "right", or the name of the error."""
    x = KINDS[kind]()
    try:
        CALLS[call](x)
    except Exception as error:
        return type(error).__name__
    return "right"


def inside() -> Iterator[str]:
    """The same where a vmap over nested tensors, a dual level or a fake mode is open."""
    for layout in (torch.strided, torch.jagged):
        three = torch.nested.nested_tensor([torch.randn(3, 4, 6), torch.randn(2, 4, 6)], layout=layout)
        for name, call in CALLS.items():
            try:
                torch.vmap(lambda t, call=call: call(t), randomness="different")(three)
                yield f"vmap over {layout}, {name}: right"
            except Exception as error:
                yield f"vmap over {layout}, {name}: {type(error).__name__}"
    with forward_ad.dual_level():
        for name, call in CALLS.items():
            try:
                call(forward_ad.make_dual(X.clone(), X.clone()))
                yield f"dual, {name}: right"
            except Exception as error:
                yield f"dual, {name}: {type(error).__name__}"


def backward_of_nested() -> str:
    """Incoming gradients of kinds that no guard was made of."""
    x = X.clone().requires_grad_()
    for _ in range(3):
        message_dropout(x, seed=1).sum().backward()
    (got,) = torch.autograd.grad(message_dropout(x, seed=1), x, torch.ones(SHAPE).to_sparse())
    (batched,) = torch.autograd.grad(message_dropout(x, seed=1), x, torch.ones(2, *SHAPE), is_grads_batched=True)
    want = (message_dropout(torch.ones(SHAPE), seed=1)).numpy()
    return "right" if np.array_equal(got, want) and np.array_equal(batched[1], want) else "wrong"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for _ in range(4):  # guards are made of what comes twice
        message_dropout(X)
        message_dropout(X.clone().requires_grad_())
        message_dropout(X, out=torch.empty(SHAPE))
    for kind in KINDS:
        for call in CALLS:
            print(f"{kind}, {call}: {leaving(kind, call)}", flush=True)
    for line in inside():
        print(line, flush=True)
    print(f"backward: {backward_of_nested()}")
    sys.stdout.write("ok\n")
