"""Removal of tensors: gradients, compiled code, transforms, devices that aren't looked at, dtypes."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
import torch
from helpers import internals
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from msgdrop_numba import Kept, MessageSelect, keep_mask, message_dropout, message_select, select_messages

X = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LAYOUTS = pytest.mark.parametrize("layout", [None, "padded", "packed"])
TOLD: list[dict[str, Any]] = [
    {"exact": True}, {"exact": True, "scale": True, "prefix": 2}, {"scale": True, "p": (0.2, 0.8)},
    {"lengths": [9, 0, 4, 5], "min_keep": 2}, {"keys": [1, -2, 3, 4], "span": 2}, {"capacity": 9},
    {"layout": "packed"}, {"layout": "packed", "capacity": 30},
]  # fmt: skip


def both_ways(x: torch.Tensor, **options: Any) -> Any:
    """Removed and put back, with what tells of it."""
    y, kept = message_select(x, **{"p": 0.5, "seed": 3, **options})
    return y, kept.indices, kept.mask, kept.lengths, kept.cu_seqlens, kept.restore(y, 2.0), kept.take(x[..., 0])


def same(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@LAYOUTS
@pytest.mark.parametrize("operations", [False, True])
def test_gradients(layout, operations, monkeypatch):
    """Of removing, putting back and companions, twice, by numbers."""
    if operations:
        internals.no_host_tensors(monkeypatch)
    x, (fill, each) = X.clone().requires_grad_(), (torch.randn(s).double().requires_grad_() for s in (3, (4, 9, 3)))
    table = torch.randn(9, 2).double().requires_grad_()
    _, kept = message_select(X, 0.5, seed=3, layout=layout)
    y = torch.randn_like(kept.take(X)).requires_grad_()
    cases: list[tuple[Any, Any]] = [
        (lambda x: message_select(x, 0.5, seed=3, layout=layout, scale=True, prefix=1)[0], (x,)),
        (kept.take, (x,)),
        (lambda table: kept.take(table, dim=0), (table,)),
        (kept.restore, (y, fill)),
        (kept.restore, (y, each)),
    ]
    for function, inputs in cases:
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, inputs)


@LAYOUTS
def test_the_gradient_of_removed_messages_is_zero(layout, chunks):
    x = X.clone().requires_grad_()
    y, kept = message_select(x, 0.5, seed=3, layout=layout, scale=True)
    weights = torch.randn(y.shape, dtype=y.dtype)
    (grad,) = torch.autograd.grad(y, x, weights)
    index, _ = naive.select(kept.mask.numpy(), kept.layout)
    assert np.array_equal(grad, naive.restored(weights.numpy() * 2.0, (4, 9), index))
    fill = torch.zeros(3, dtype=y.dtype, requires_grad=True)
    grad_y, grad_fill = torch.autograd.grad(kept.restore(y, fill), (y, fill), X)
    assert np.array_equal(grad_y, naive.removed(X.numpy(), 2, index))
    assert torch.allclose(grad_fill, X[~kept.mask].sum(0), rtol=1e-15)


@pytest.mark.parametrize(
    "lying", [torch.sum, lambda y: (y.transpose(0, 1) * torch.arange(3)).sum(), lambda y: y[..., 1:].sum()]
)
def test_gradients_that_lie_anyhow(lying):
    x = X.clone().requires_grad_()
    y, kept = message_select(x, 0.5, exact=True, seed=1)
    (grad,) = torch.autograd.grad(lying(y), x)
    gathered = x.gather(1, kept.indices.unsqueeze(-1).expand(-1, -1, 3))
    assert torch.equal(grad, torch.autograd.grad(lying(gathered), x)[0])


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, where a graph breaks
@pytest.mark.parametrize("told", [TOLD[1], TOLD[3], TOLD[5], TOLD[6], {"training": False}], ids=str)
def test_compiled_code_gives_the_same(told, compiled):
    whole = "capacity" in told or told.get("exact") or "training" in told
    run = torch.compile(lambda x: both_ways(x, **told), fullgraph=bool(whole))
    same(run(X), both_ways(X, **told))
    x, again = X.clone().requires_grad_(), X.clone().requires_grad_()
    for each, function in ((x, run), (again, lambda x: both_ways(x, **told))):
        (function(each)[0] * 3).sum().backward()
    assert torch.equal(x.grad, again.grad)


def test_compiled_code_hands_out_what_was_kept(compiled):
    run = compiled(lambda x: message_select(x, 0.5, exact=True, seed=5), dynamic=True)
    for size in (9, 12, 13):
        x = torch.randn(4, size, 3)
        (y, kept), (want, told) = run(x), message_select(x, 0.5, exact=True, seed=5)
        assert type(kept) is Kept
        same((y, kept.indices, kept.restore(y)), (want, told.indices, told.restore(want)))
        assert kept.max_length == told.max_length


@pytest.mark.parametrize("told", TOLD, ids=str)
def test_operations_give_the_same(told, monkeypatch):
    want = both_ways(X, **told)
    mask = select_messages(
        (4, 9), **{"p": 0.5, "seed": 3, **{k: v for k, v in told.items() if k != "scale"}}, device="cpu"
    )
    assert torch.equal(mask.mask, want[2])
    internals.no_host_tensors(monkeypatch)
    same(both_ways(X, **told), want)


def test_transforms():
    told: dict[str, Any] = {"exact": True, "scale": True, "prefix": 1}
    batch = torch.randn(5, 4, 9, 3)
    mapped = torch.func.vmap(lambda x: both_ways(x, **told))(batch)
    same(mapped, [torch.stack(each) for each in zip(*(both_ways(x, **told) for x in batch), strict=True)])
    drawn = torch.func.vmap(lambda x: message_select(x, 0.5, exact=True)[1].mask, randomness="different")(batch)
    assert len({tuple(mask.flatten().tolist()) for mask in drawn}) == 5
    primal, tangent = torch.func.jvp(lambda x: both_ways(x, **told)[0], (X,), (3 * X,))
    assert torch.allclose(tangent, 3 * primal)
    grad = torch.func.grad(lambda x: both_ways(x, **told)[0].pow(2).sum())(X)
    x = X.clone().requires_grad_()
    both_ways(x, **told)[0].pow(2).sum().backward()
    assert torch.equal(grad, x.grad)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_under_vmap_the_room_must_be_known(layout):
    batch = torch.randn(5, 4, 9, 3)
    with pytest.raises(ValueError, match=r"can't be counted under vmap.* capacity"):
        torch.func.vmap(lambda x: message_select(x, layout=layout)[0], randomness="different")(batch)
    mapped = torch.func.vmap(lambda x: both_ways(x, layout=layout, capacity=36)[0])(batch)
    assert torch.equal(mapped, torch.stack([both_ways(x, layout=layout, capacity=36)[0] for x in batch]))


def test_tensors_without_data():
    with FakeTensorMode() as mode:
        for x in (torch.empty((4, 9, 3), device="meta"), mode.from_tensor(X)):
            y, kept = message_select(x, 0.5, exact=True, prefix=1)
            assert y.shape == (4, 5, 3)
            assert kept.restore(y).shape == x.shape
            y, kept = message_select(x, 0.5, layout="packed", capacity=11)
            assert y.shape == (11, 3)
            assert kept.take(x[..., 0]).shape == (11,)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_what_is_not_looked_at_overflows(layout, monkeypatch):
    """As on a device: the first that there is room for are there, and `overflow` says that there were more."""
    internals.no_host_tensors(monkeypatch)
    keep = keep_mask((4, 9), 0.5, seed=3)
    index, counts = naive.select(keep, layout)
    needed = index.shape[-1]
    for capacity in (needed - 2, needed, needed + 2):
        y, kept = message_select(X, 0.5, seed=3, layout=layout, capacity=capacity)
        assert isinstance(kept.overflow, torch.Tensor)
        assert kept.overflow.shape == ()
        assert kept.overflow.item() == (capacity < needed)
        room = np.full((*index.shape[:-1], capacity), -1)
        room[..., :needed] = index[..., :capacity]
        assert np.array_equal(y, naive.removed(X.numpy(), 2, room))
        assert np.array_equal(kept.restore(y), naive.restored(y.numpy(), (4, 9), room))
        assert kept.mask.sum().item() == (room >= 0).sum() == kept.lengths.sum().item()
        assert kept.cu_seqlens[-1].item() == (room >= 0).sum()
        assert kept.max_length >= max(kept.lengths.tolist())
    assert sum(counts) == keep.sum()


def test_checkpoints_and_inference():
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    y = checkpoint(lambda x: message_select(x, 0.5)[0].exp(), x, use_reentrant=False)
    y.sum().backward()
    torch.manual_seed(0)
    _, kept = message_select(X, 0.5)
    assert torch.equal(x.grad, torch.where(kept.mask[..., None], X.exp(), 0.0))
    with torch.inference_mode():
        y, kept = message_select(X, 0.5, seed=3)
        assert torch.equal(kept.restore(y), message_dropout(X, 0.5, seed=3))


def test_export():
    class Removing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return both_ways(x, exact=True, prefix=1)

    same(torch.export.export(Removing(), (X,)).module()(X), both_ways(X, exact=True, prefix=1))


@LAYOUTS
def test_nested_tensors_of_what_remains(layout):
    told: dict[str, Any] = {"exact": True} if layout is None else {"capacity": 25 if layout == "packed" else 8}
    y, kept = message_select(X, 0.5, seed=3, layout=layout, **told)
    nested = kept.to_nested(y)
    assert nested.layout == torch.jagged
    for row, x, keep in zip(nested.unbind(), X, kept.mask, strict=True):
        assert torch.equal(row, x[keep])
    with pytest.raises(ValueError, match="y must have shape"):
        kept.to_nested(X[:1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_nested_x(layout, training):
    """As message_dropout takes it: a row for each sample, as long as it is."""
    values = X[0].clone().requires_grad_()
    x = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 2, 2, 9]))
    y, kept = message_select(x, 0.5, training, seed=5, layout=layout, prefix=1)
    _, mask = message_dropout(x, 0.5, training, seed=5, prefix=1, return_mask=True)
    rows = [row[keep].tolist() for row, keep in zip(x.unbind(), mask.unbind(), strict=True)]
    assert [row.tolist() for row in kept.to_nested(y).unbind()] == rows
    assert kept.lengths.tolist() == [int(keep.sum()) for keep in mask.unbind()]
    y.sum().backward()
    assert torch.equal(values.grad[:, 0] > 0, mask.values())
    assert message_select(x, 1.0, prefix=20)[1].lengths.tolist() == [2, 0, 7]
    with pytest.raises(ValueError, match="has lengths of its own"):
        message_select(x, 0.5, lengths=[2, 0, 7])


DTYPES = ["bool", "uint8", "int64", "uint16", "uint64", "bfloat16", "float8_e4m3fn", "complex32", "complex64"]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("operations", [False, True])
def test_every_dtype(name, operations, monkeypatch):
    dtype = getattr(torch, name)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.randint(0, 2, (3, 7, 4)).to(words)
    _, kept = message_select(bits, 0.5, seed=1)
    want = kept.take(bits)
    if operations:
        internals.no_host_tensors(monkeypatch)
    x = bits.view(dtype)
    y, kept = message_select(x, 0.5, seed=1)
    assert y.dtype == dtype
    assert torch.equal(y.view(words), want)
    assert torch.equal(kept.restore(y).view(words), torch.where(kept.mask[..., None], bits, 0))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e5m2", "complex32"])
def test_scaled_like_message_dropout(name):
    x = torch.randn(3, 7, 4).to(torch.complex64 if name == "complex32" else torch.float32).to(getattr(torch, name))
    y, kept = message_select(x, 0.3, seed=1, scale=True, exact=True, prefix=1)
    want = message_dropout(x, 0.3, seed=1, scale=True, exact=True, prefix=1)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    assert torch.equal(kept.restore(y).view(words), want.view(words))


def test_memory_that_was_freed():
    x = torch.randn(2, 5, 3)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="x has no memory"):
        message_select(x, 0.5)


@pytest.mark.parametrize("told", [TOLD[0], TOLD[5], TOLD[7]], ids=str)
def test_what_all_rows_share_has_its_gradient_in_compiled_code(told, compiled):
    """Positions that are learned, say: many rows take the same message."""

    def weighted(table):
        taken = message_select(X, 0.5, seed=3, **told)[1].take(table, dim=0)
        return (taken * torch.arange(taken.numel()).reshape(taken.shape)).sum()

    table = torch.ones(9, 2, requires_grad=True)
    (want,) = torch.autograd.grad(weighted(table), table)
    (got,) = torch.autograd.grad(compiled(weighted)(table), table)
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_conjugated_halves_and_their_gradient():
    x = torch.randn(3, 7, 4, dtype=torch.complex64).to(torch.complex32)
    for lying in (torch.conj, torch._neg_view):
        y, kept = message_select(lying(x), 0.5, seed=1)
        want = message_dropout(lying(x), 0.5, seed=1)
        assert torch.equal(torch.view_as_real(kept.restore(y)), torch.view_as_real(want.resolve_conj().resolve_neg()))
    x.requires_grad_()
    message_select(x.conj(), 0.5, seed=1)[0].backward(torch.ones_like(y))
    assert torch.equal(x.grad[..., 0] != 0, kept.mask)


def test_a_layer_compiled_for_all_sizes(compiled):
    """Whose p the compiler takes for a symbol too."""
    layer = MessageSelect(0.3, exact=True, prefix=1, scale=True)
    run = compiled(layer, dynamic=True)
    for size in (9, 12):
        x, seed = torch.randn(4, size, 3), torch.tensor(5)
        (y, kept), (want, told) = run(x, seed=seed), layer(x, seed=seed)
        same((y, kept.indices), (want, told.indices))


def test_a_capacity_is_kept_to_on_the_host_without_kernels():
    """Conjugated, say: nothing is cut where it costs nothing to look."""
    x = torch.randn(4, 9, 3, dtype=torch.complex64).conj()
    for layout, needed in (("padded", 6), ("packed", 21)):
        _, kept = message_select(x, 0.5, seed=3, layout=layout, capacity=needed)
        assert not kept.overflow
        with pytest.raises(ValueError, match=f"capacity must be at least {needed}, .* but got {needed - 1}"):
            message_select(x, 0.5, seed=3, layout=layout, capacity=needed - 1)
