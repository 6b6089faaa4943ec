"""torch.func, forward AD, fake and meta tensors, subclasses, nested tensors: the same masks."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cases import TRACED_IDS as IDS
from helpers.cases import TRACED_OPTIONS as OPTIONS
from helpers.cases import TRACED_X as X
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from msgdrop_numba import MessageDropout, keep_mask, message_dropout

# ---- torch.func and forward AD


def f(x):
    return message_dropout(x, 0.3, seed=3, scale=True)


def test_func_transforms():
    ones = torch.ones_like(X)
    assert torch.equal(torch.func.grad(lambda x: f(x).sum())(X), f(ones))
    assert torch.equal(torch.func.jvp(f, (X,), (ones,))[1], f(ones))
    assert torch.equal(torch.func.vjp(f, X)[1](ones)[0], f(ones))
    small = X[:2, :3]
    jacobian = torch.func.jacrev(f)(small)
    assert torch.equal(jacobian.sum(dim=(3, 4, 5)), f(torch.ones_like(small)))
    assert torch.equal(torch.func.jacfwd(f)(small), jacobian)
    hessian = torch.func.hessian(lambda x: f(x).square().sum())(small)
    assert torch.equal(hessian.sum(dim=(3, 4, 5)), 2 * f(torch.ones_like(small)).square())


def test_vmap():
    x = torch.ones(5, 4, 9, 3)
    same = torch.func.vmap(message_dropout, randomness="same")(x)
    assert all(torch.equal(y, same[0]) for y in same)
    different = torch.func.vmap(message_dropout, randomness="different")(x)
    assert len({y.numpy().tobytes() for y in different}) == 5
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(message_dropout)(x)
    seeds = torch.arange(5)
    got = torch.func.vmap(lambda x, seed: message_dropout(x, seed=seed))(x, seeds)
    assert torch.equal(got, torch.stack([message_dropout(x[i], seed=i) for i in range(5)]))


def test_tensors_from_outside_a_transform():
    leaf = torch.randn(3, 5, 4, requires_grad=True)
    want = message_dropout(leaf, seed=1)
    assert torch.equal(torch.vmap(lambda i: message_dropout(leaf, seed=1) + i)(torch.zeros(2))[1], want)
    layer = MessageDropout(0.5, fill=torch.nn.Parameter(torch.ones(4)))
    got = torch.func.grad(lambda w: (layer(leaf, seed=1) * w).sum())(torch.tensor(2.0))
    torch.testing.assert_close(got, layer(leaf, seed=1).sum())
    different = torch.vmap(lambda i: message_dropout(X) + i, randomness="different")(torch.zeros(3))
    assert len({y.numpy().tobytes() for y in different}) == 3
    masks = torch.func.vmap(lambda seed: keep_mask((3, 4), seed=seed, device="cpu"))(torch.arange(3))
    assert np.array_equal(masks, np.stack([keep_mask((3, 4), seed=i) for i in range(3)]))


def test_forward_ad():
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(X, torch.ones_like(X)))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, f(torch.ones_like(X)))


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_gradcheck_of_every_kind(options):
    x = torch.randn(4, 9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: message_dropout(x, 0.3, seed=3, **options), x,
        check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(lambda x: message_dropout(x, 0.3, seed=3, **options), x)


# ---- other tensors


class Tagged(torch.Tensor):
    pass


class Spy(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_subclasses_modes_and_bits():
    want = message_dropout(X, seed=1)
    y = message_dropout(X.as_subclass(Tagged), seed=1)
    assert type(y) is Tagged
    assert torch.equal(y, want)
    with Spy():
        assert torch.equal(message_dropout(X, seed=1), want)
    z = torch.complex(X, X + 1)
    for bit in (z.conj(), torch._neg_view(X)):
        for scale in (False, True):
            assert torch.equal(
                message_dropout(bit, 0.3, seed=1, scale=scale),
                message_dropout(bit.clone().resolve_conj().resolve_neg(), 0.3, seed=1, scale=scale),
            )


def test_meta_and_fake():
    y, mask = message_dropout(X.to("meta"), 0.3, return_mask=True, lengths=[1, 2, 3, 4])
    assert (y.shape, mask.shape, y.device.type) == ((4, 9, 3), (4, 9), "meta")
    with FakeTensorMode():
        assert message_dropout(torch.empty(4, 9, 3), scale=True, exact=True).shape == (4, 9, 3)


def test_values_inside_tensors_are_clamped_where_nobody_may_look():
    lengths, p = torch.tensor([-3, 100, 4, 9]), torch.tensor([float("nan"), -1.0, 2.0, *[0.5] * 6])
    with Spy():
        got = message_dropout(X, p, seed=1, lengths=lengths)
    assert torch.equal(got, message_dropout(X, p.nan_to_num().clamp(0, 1), seed=1, lengths=lengths.clamp(0, 9)))


def test_inplace_and_out_in_torch_operations():
    want = message_dropout(X, seed=1)
    with Spy():
        x = X.clone()
        assert message_dropout(x, seed=1, inplace=True) is x
        out = torch.empty_like(X)
        assert message_dropout(X, seed=1, out=out) is out
        assert message_dropout(X, 0.0, out=torch.empty_like(X)).equal(X)
        assert message_dropout(X, 0.0) is X
    assert torch.equal(x, want)
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    "options", [{}, {"scale": True, "exact": True}, {"fill": 7.0, "keys": [5, 6, 7]}, {"span": 2, "min_keep": 2}]
)
def test_nested_tensors(options):
    parts = [torch.randn(n, 3, requires_grad=True) for n in (5, 2, 7)]
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    y, mask = message_dropout(x, 0.5, seed=4, return_mask=True, **options)
    assert y.layout == torch.jagged
    assert torch.equal(y.offsets(), x.offsets())
    assert (x + y).is_nested  # the same raggedness
    padded = torch.zeros(3, 7, 3)
    for row, part in enumerate(parts):
        padded[row, : len(part)] = part.detach()
    want, keep = message_dropout(padded, 0.5, seed=4, lengths=[5, 2, 7], return_mask=True, **options)
    for row, (got, flags) in enumerate(zip(y.unbind(), mask.unbind(), strict=True)):
        assert torch.equal(got.detach(), want[row, : len(got)])
        assert torch.equal(flags, keep[row, : len(got)])
    y.values().sum().backward()
    assert torch.equal((parts[0].grad != 0).all(dim=1), keep[0, :5])
    assert message_dropout(x, 0.0) is x
    with pytest.raises(ValueError, match="p must hold probabilities"):  # in plain tensors values are looked at
        message_dropout(x, torch.full((7,), 2.0))
    for wrong in (
        x.transpose(1, 2),
        torch.nested.nested_tensor_from_jagged(torch.randn(10, 4), torch.tensor([0, 3, 8])),
    ):
        with pytest.raises(ValueError, match="nested x must"):
            message_dropout(wrong)
    for bad in ({"inplace": True}, {"lengths": [1, 2, 3]}, {"message_dims": 1}):
        with pytest.raises(ValueError, match="nested x"):
            message_dropout(x, **bad)


@pytest.mark.parametrize("exact", [False, True])
def test_who_takes_part_in_nested_tensors(exact):
    """Jagged as x is, or padded; rows may be shorter than the prefix."""
    sizes, options = [5, 2, 7], {"p": (0.2, 0.9), "prefix": 3, "exact": exact, "scale": True, "seed": 4}
    padded, positions = torch.randn(3, 7, 3), torch.randint(0, 100, (3, 7))
    protect = torch.rand(3, 7) < 0.3
    want = message_dropout(padded, lengths=sizes, protect=protect, positions=positions, **options)
    x, jagged_protect, jagged_positions = (
        torch.nested.as_nested_tensor([row[:n] for row, n in zip(each, sizes, strict=True)], layout=torch.jagged)
        for each in (padded, protect, positions)
    )
    offsets = x.offsets()
    for told in ({"protect": protect, "positions": positions}, {
        "protect": torch.nested.nested_tensor_from_jagged(jagged_protect.values(), offsets),
        "positions": torch.nested.nested_tensor_from_jagged(jagged_positions.values(), offsets),
    }):  # fmt: skip
        for got, row in zip(message_dropout(x, **told, **options).unbind(), want, strict=True):
            assert torch.equal(got, row[: len(got)])
    assert torch.equal(want[1], padded[1])
    short = torch.nested.as_nested_tensor([torch.ones(n, 3) for n in (1, 2)], layout=torch.jagged)
    assert torch.equal(message_dropout(short, 1.0, prefix=5).values(), short.values())
    with pytest.raises(ValueError, match="one value for each message"):
        message_dropout(x, protect=short.bool())


def test_save_and_replicate():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), MessageDropout(0.5, fill=torch.nn.Parameter(torch.zeros(3))))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.manual_seed(1)
    want = model(X)
    torch.manual_seed(1)
    assert torch.equal(loaded(X), want)
    replica = model._replicate_for_data_parallel()  # as DataParallel does on each device
    replica._modules = {name: child._replicate_for_data_parallel() for name, child in model._modules.items()}
    for name, child in replica._modules.items():
        child._parameters = dict(model._modules[name]._parameters)
    torch.manual_seed(1)
    assert torch.equal(replica(X), want)


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = MessageDropout(0.5)(torch.nn.functional.linear(X, torch.ones(3, 3)))
        assert y.dtype == torch.nn.Dropout(0.5)(torch.nn.functional.linear(X, torch.ones(3, 3))).dtype == torch.bfloat16
        assert MessageDropout(0.5)(X).dtype == torch.nn.Dropout(0.5)(X).dtype == torch.float32
        token = MessageDropout(1.0, fill=torch.nn.Parameter(torch.full((3,), 1 / 3)))
        y = token(torch.nn.functional.linear(X, torch.ones(3, 3)))
        assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert torch.equal(token.fill.grad, torch.full((3,), 36.0))


# ---- every kind of tensor


@pytest.mark.processes
def test_no_kind_of_tensor_ends_the_process():
    """What guards look at in C++ may throw there: each kind is right, or refused by an exception of Python's."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.tensor_kinds"], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["backward: right", "ok"]
    for kind in (
        "plain",
        "parameter",
        "subclass",
        "permuted",
        "expanded",
        "with gaps",
        "no messages",
        "conjugated",
        "negated",
    ):
        assert f"{kind}, out of place: right" in lines
    for call in ("out of place", "in place", "layer", "select", "both"):
        assert f"leaked by vmap, nested, {call}: ValueError" in lines
        assert f"leaked by vmap, jagged, {call}: ValueError" in lines
        assert f"vmap over torch.strided, {call}: ValueError" in lines
        assert f"vmap over torch.jagged, {call}: ValueError" in lines
