"""Tensors: gradients, versions, generators, checkpointing, what is refused."""

from __future__ import annotations

import contextlib
import threading
import weakref

import numpy as np
import pytest
import torch
from helpers import internals
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from msgdrop_numba import keep_mask, message_dropout

OPTIONS = [
    {},
    {"scale": True},
    {"fill": 2.5},
    {"message_dims": 1},
    {"scale": True, "lengths": [1, 4], "keys": [7, -7]},
    {"scale": True, "exact": True, "lengths": [3, 4]},
    {"span": 2, "min_keep": 2},
    {"scale": True, "p": torch.tensor([0.1, 0.9, 0.5, 0.3])},
    {"scale": True, "p": torch.linspace(0.1, 0.9, 8).reshape(2, 4)},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradcheck(options, dtype):
    x = torch.randn(2, 4, 3, dtype=dtype, requires_grad=True)

    def f(x):
        return message_dropout(x, **{"p": 0.3, "seed": 3, **options})

    def g(x):
        return message_dropout(x * 1, **{"p": 0.3, "inplace": True, "seed": 3, **options})

    for function in (f, g):
        assert torch.autograd.gradcheck(function, x, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_is_the_same_map(options, chunks):
    x = torch.randn(2, 4, 3, requires_grad=True)
    y, mask = message_dropout(x, **{"p": 0.5, "seed": 3, "return_mask": True, **options})
    grad = torch.randn(2, 4, 3)
    grad[~mask] = float("nan")  # where a message is dropped, no NaN may come back
    assert not mask.all()
    y.backward(grad)
    want = message_dropout(grad, **{"p": 0.5, "seed": 3, **options, "fill": 0.0})
    assert torch.equal(x.grad, want)
    assert not x.grad.isnan().any()


def test_the_gradient_of_a_sum_takes_the_kernel(monkeypatch):
    """Its strides are all 0, which no kernel follows: it is copied, and dropped in in place."""
    x, launches = torch.randn(2, 4, 3, requires_grad=True), internals.watch_launches(monkeypatch)
    y = message_dropout(x, seed=3, scale=True)
    y.sum().backward()
    assert [launch.x == launch.out != 0 for launch in launches] == [False, True]
    assert torch.equal(x.grad, message_dropout(torch.ones(2, 4, 3), seed=3, scale=True))


def test_gradients_of_any_layout():
    x = torch.randn(2, 4, 3, requires_grad=True)
    keep = torch.from_numpy(keep_mask((2, 4), seed=3))[..., None].expand(2, 4, 3)
    message_dropout(x, seed=3).sum().backward()  # all strides 0
    assert torch.equal(x.grad, keep.float())
    (grad,) = torch.autograd.grad(message_dropout(x, seed=3).transpose(0, 2).contiguous().sum(), x)
    assert torch.equal(grad, keep.float())


def test_mean_of_a_conjugate_gradient():
    x = torch.randn(2, 4, 3, dtype=torch.complex64, requires_grad=True)
    keep = torch.from_numpy(keep_mask((2, 4), seed=3))[..., None]
    (got,) = torch.autograd.grad(
        message_dropout(x, seed=3).conj(), x, torch.ones(2, 4, 3, dtype=torch.complex64).conj()
    )
    (want,) = torch.autograd.grad(torch.where(keep, x, 0).conj(), x, torch.ones(2, 4, 3, dtype=torch.complex64).conj())
    assert torch.equal(got, want)


def test_lengths_and_keys_may_change_before_backward():
    x = torch.randn(2, 4, 3, requires_grad=True)
    keys, lengths = torch.tensor([5, 6]), torch.tensor([4, 2])
    y = message_dropout(x, 0.5, scale=True, seed=3, keys=keys, lengths=lengths)
    want = message_dropout(torch.ones(2, 4, 3), 0.5, scale=True, seed=3, keys=keys, lengths=lengths)
    keys.zero_(), lengths.zero_()
    y.backward(torch.ones(2, 4, 3))
    assert torch.equal(x.grad, want)
    lengths = np.array([4, 2])
    y = message_dropout(x, 0.5, scale=True, seed=3, keys=[5, 6], lengths=lengths)
    lengths[:] = 0
    assert torch.equal(torch.autograd.grad(y, x, torch.ones(2, 4, 3))[0], want)


@pytest.mark.parametrize(
    "options", [{}, {"exact": True}, {"span": 4}, {"min_keep": 3}, {"scale": True, "keys": range(8)}]
)
def test_backward_keeps_one_byte_a_message(options):
    saved = []

    def pack(t):
        saved.append(t.numel() * t.element_size())
        return t

    x = torch.randn(8, 16, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        message_dropout(x, 0.5, **options)
    assert saved == ([8 * 16] if "keys" in options else [])  # the seed alone says the mask, or arrays help


def test_nothing_holds_the_data():
    x = torch.randn(8, 16, 128, requires_grad=True)
    inner = x * 2
    data = weakref.ref(inner.untyped_storage())
    y = message_dropout(inner, 0.5)
    del inner
    gone = y.grad_fn
    assert y.shape == x.shape
    assert gone is not None
    assert data() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"lengths": [9, 5]}, {"exact": True, "lengths": [9, 5]}])
def test_views_and_batched_gradients_equal_the_kernels(dtype, options):
    """What torch's own operations write, bit for bit what the kernels do: infinities, padding, rounding of the scale."""
    x = torch.randn(2, 9, 3, dtype=dtype) / 3
    x[0, 8] = float("inf") if not dtype.is_complex else complex(float("inf"), 1)
    options = {"scale": True, "seed": 3, **options}
    want = message_dropout(x, 0.3, **options)
    real = torch.view_as_real if dtype.is_complex else torch.clone
    base = torch.stack([x, x]).requires_grad_().clone()
    assert torch.equal(real(message_dropout(base[1], 0.3, inplace=True, **options)), real(want))
    leaf = torch.zeros_like(x, requires_grad=True)
    grads = torch.stack([x, x.conj()])
    (batched,) = torch.autograd.grad(message_dropout(leaf, 0.3, **options), leaf, grads, is_grads_batched=True)
    for got, grad in zip(batched, grads, strict=True):
        (single,) = torch.autograd.grad(message_dropout(leaf, 0.3, **options), leaf, grad)
        assert torch.equal(real(got.resolve_conj()), real(single.resolve_conj()))


def test_a_sparse_gradient():
    x = torch.randn(2, 4, 3, requires_grad=True)
    index = torch.zeros(2, 4, 1, dtype=torch.int64)
    torch.gather(message_dropout(x, 0.5, seed=1), 2, index, sparse_grad=True).sum().backward()
    keep = torch.from_numpy(keep_mask((2, 4), seed=1))
    assert torch.equal(x.grad[..., 0], keep.float())


def test_freed_storage_is_refused():
    x = torch.ones(2, 4, 3)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="x has no memory"):
        message_dropout(x)
    state = torch.get_rng_state()
    for out in (torch.empty(2, 4, 3), torch.empty(4, 2, 3).transpose(0, 1)):
        out.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"out has no memory, though its shape is \(2, 4, 3\)"):
            message_dropout(torch.ones(2, 4, 3), out=out)
    with pytest.raises(ValueError, match="x, to be changed in place, has no memory"):
        message_dropout(x, inplace=True)
    assert torch.equal(torch.get_rng_state(), state)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "within", [contextlib.nullcontext, _Mode, forward_ad.dual_level], ids=["eager", "mode", "dual"]
)
def test_expanded_memory_is_refused_before_a_seed_is_drawn(within):
    expanded, freed, both = torch.randn(1, 4, 3).expand(2, 4, 3), torch.empty(2, 4, 3), torch.randn(3, 4, 3)
    before, state = expanded.clone(), torch.get_rng_state()
    with within():
        with pytest.raises(ValueError, match="x, to be changed in place, must not hold elements twice"):
            message_dropout(expanded, inplace=True)
        with pytest.raises(ValueError, match="out must not hold elements twice"):
            message_dropout(before, out=expanded)
        overlapping = torch.zeros(30).as_strided((2, 4, 3), (3, 3, 1))
        with pytest.raises(ValueError, match="out must not hold elements twice"):
            message_dropout(before, out=overlapping)
        with pytest.raises(ValueError, match="out overlaps x in part"):
            message_dropout(both[1:], out=both[:-1])
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="out has no memory"):
            message_dropout(before, out=freed)
        with pytest.raises(ValueError, match="x, to be changed in place, has no memory"):
            message_dropout(freed, inplace=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(expanded, before)


def test_inference_tensors_are_not_changed_outside():
    with torch.inference_mode():
        x = torch.ones(2, 4, 3)
    for options in ({"inplace": True}, {"out": x}):
        with pytest.raises(ValueError, match="inference tensor"):
            message_dropout(x if "inplace" in options else torch.ones(2, 4, 3), **options)
    assert x.all()


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_float8(dtype):
    x = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(2, 8, 16)
    y, mask = message_dropout(x, 0.5, seed=1, fill=2.0, return_mask=True)
    kept, two = x.view(torch.uint8), torch.tensor(2.0).to(dtype).view(torch.uint8)
    assert torch.equal(y.view(torch.uint8), torch.where(mask[..., None], kept, two))
    y = message_dropout(x, 0.3, seed=1, scale=True)
    mask = torch.from_numpy(keep_mask((2, 8), 0.3, seed=1))
    want = torch.where(mask[..., None], x.float() * torch.tensor(1 / 0.7), 0.0).to(dtype)
    nan = want.float().isnan()
    assert torch.equal(y.float().isnan(), nan)
    assert torch.equal(y.view(torch.uint8)[~nan], want.view(torch.uint8)[~nan])
    if not torch.tensor(float("inf")).to(dtype).float().isinf():
        with pytest.raises(ValueError, match=r"fill must be a number that torch\.float8"):
            message_dropout(x, fill=float("inf"))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex32, torch.float8_e4m3fn, torch.uint16, torch.uint64])
@pytest.mark.parametrize("permute", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_dtypes_that_numpy_has_not(dtype, permute):
    """A message is bytes: the same as for the integers of the same bits, in every layout."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    words = torch.randint(-128, 127, (5, 6, 7), dtype=integers)
    x = words.permute(permute)
    y = message_dropout(words.view(dtype).permute(permute), 0.5, seed=1)
    assert torch.equal(y.view(integers), message_dropout(x, 0.5, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        internals.no_host_tensors(patch)
        y = message_dropout(words.view(dtype).permute(permute), 0.5, seed=1)
    assert torch.equal(y.contiguous().view(integers), message_dropout(x, 0.5, seed=1).contiguous())


def test_float8_without_zero():
    x = torch.ones(2, 4, 3).to(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match="fill must be a number that"):
        message_dropout(x)
    assert (message_dropout(x, 1.0, fill=2.0).float() == 2).all()


def test_a_returned_mask_may_change_before_backward():
    x = torch.randn(2, 4, 3, requires_grad=True)
    y, mask = message_dropout(x, 0.5, return_mask=True)
    assert not mask.requires_grad
    want = mask[..., None].expand(2, 4, 3).float()
    mask.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)
    y, mask = message_dropout(x, 0.5, keys=[1, 2], return_mask=True)  # this one is saved
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("how", ["inplace", "out"])
def test_writes_are_seen_by_autograd(how):
    w = torch.randn(2, 4, 3, requires_grad=True)
    x = torch.randn(2, 4, 3)
    y = w * x  # saves x
    with torch.no_grad():
        if how == "inplace":
            message_dropout(x, 0.5, inplace=True)
        else:
            message_dropout(torch.randn(2, 4, 3), 0.5, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inplace_keeps_the_graph():
    w = torch.randn(2, 4, 3, requires_grad=True)
    keep = torch.from_numpy(keep_mask((2, 4), seed=3))[..., None]
    x = w * 2
    y = message_dropout(x, seed=3, inplace=True)
    assert y is x
    y.sum().backward()
    assert torch.equal(w.grad, keep * torch.full((2, 4, 3), 2.0))


@pytest.mark.parametrize("scale", [False, True])
def test_inplace_on_a_view_that_needs_a_gradient(scale):
    w = torch.randn(3, 2, 4, 3, requires_grad=True)
    want, mask = message_dropout(w.detach()[1] * 2, seed=3, scale=scale, return_mask=True)
    base = w * 2
    y, got = message_dropout(base[1], seed=3, inplace=True, scale=scale, return_mask=True)
    assert torch.equal(got, mask)
    assert torch.equal(base[1], want)
    assert torch.equal(y, want)
    base.sum().backward()
    assert torch.equal(w.grad[0], torch.full((2, 4, 3), 2.0))
    assert torch.equal(w.grad[1], mask[..., None] * torch.full((2, 4, 3), 4.0 if scale else 2.0))


def test_leaves_are_refused_before_anything_is_written():
    x = torch.ones(2, 4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="leaf that requires grad"):
        message_dropout(x, inplace=True)
    with pytest.raises(ValueError, match="out can't be used where a gradient is needed"):
        message_dropout(x, out=torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="out can't be used where a gradient is needed"):
        message_dropout(x.detach(), out=x)
    out = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="out can't be used where a gradient is needed"):
        message_dropout(out, fill=torch.ones(3, requires_grad=True), out=out)
    assert not out.any()
    assert x.detach().all()
    with torch.no_grad():
        assert message_dropout(x, 1.0, inplace=True) is x
    assert not x.detach().any()


def test_expanded_tensors():
    x = torch.ones(4, 1, 3).expand(4, 5, 3)
    y, mask = message_dropout(x, seed=1, return_mask=True)
    assert torch.equal(y, mask[..., None].expand(4, 5, 3).float())
    with pytest.raises(ValueError, match="must not hold elements twice"):
        message_dropout(x, inplace=True)
    with pytest.raises(ValueError, match="out must not hold elements twice"):
        message_dropout(y, out=x)


def test_refused_targets():
    x = torch.ones(2, 4, 3)
    with pytest.raises(ValueError, match=r"out must be like x.*cpu.*meta"):
        message_dropout(x, out=x.to("meta"))
    with pytest.raises(TypeError, match=r"generator must be a torch.*Generator"):
        message_dropout(x, generator=np.random.default_rng())
    with pytest.raises(ValueError, match="seed or generator, not both"):
        message_dropout(x, seed=1, generator=torch.Generator())
    base = torch.arange(40, dtype=torch.float32)
    windows = base.as_strided((2, 4, 3), (3, 3, 1))  # rows that overlap
    for options in ({"inplace": True}, {"out": windows}):
        with pytest.raises(ValueError, match="must not hold elements twice"):
            message_dropout(windows if "inplace" in options else x, **options)
    assert torch.equal(base, torch.arange(40, dtype=torch.float32))


def test_inference_mode():
    x = torch.ones(2, 4, 3)
    want = message_dropout(x, seed=1)
    with torch.inference_mode():
        assert torch.equal(message_dropout(x, seed=1), want)
        inside = torch.ones(2, 4, 3)
        assert torch.equal(message_dropout(inside, seed=1, inplace=True), want)
        message_dropout(inside)  # the first unseeded call of a thread may be here
    assert torch.equal(message_dropout(inside, 0.0), want)


# ---- seeds


def test_manual_seed_governs():
    x = torch.ones(4, 64, 2)
    torch.manual_seed(5)
    first = [message_dropout(x) for _ in range(2)]
    torch.manual_seed(5)
    second = [message_dropout(x) for _ in range(2)]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])
    with torch.random.fork_rng():
        inner = message_dropout(x)
    assert torch.equal(inner, message_dropout(x))


def test_a_seed_is_one_draw_of_63_bits():
    x = torch.ones(4, 64, 2)
    torch.manual_seed(5)
    seed = int(torch.randint(0, 2**63 - 1, ()))
    torch.manual_seed(5)
    assert torch.equal(message_dropout(x), message_dropout(x, seed=seed))
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    state = torch.get_rng_state()
    assert torch.equal(message_dropout(x, generator=generators[0]), message_dropout(x, generator=generators[1]))
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_draw_different_seeds():
    masks: list = []

    def work():
        for _ in range(200):
            masks.append(message_dropout(torch.ones(1, 64, 1)).numpy().tobytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(set(masks)) == 800


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    weight = torch.randn(3, 3)

    def block(x):
        return message_dropout(torch.tanh(message_dropout(x @ weight, 0.5)), 0.3, scale=True)

    x = torch.randn(2, 16, 3, requires_grad=True)
    torch.manual_seed(1)
    want = torch.autograd.grad(block(x).sum(), x)[0]
    torch.manual_seed(1)
    y = checkpoint(block, x, use_reentrant=use_reentrant)
    torch.randn(5)  # the generator moves on before backward
    y.sum().backward()
    assert torch.equal(x.grad, want)


def test_large_tensors_in_another_order(monkeypatch):
    """As from an RNN with batch_first: what comes back lies like x, and is no view that autograd guards."""
    internals.large_outputs(monkeypatch, 1)
    x = torch.randn(6, 4, 3).transpose(0, 1).requires_grad_()
    y, keep = message_dropout(x, seed=3, return_mask=True)
    assert y.stride() == x.stride()
    assert torch.equal(y, message_dropout(x.detach().contiguous(), seed=3))
    assert torch.equal(keep, torch.from_numpy(keep_mask((4, 6), seed=3)))
    y.add_(1.0).backward(torch.ones(6, 4, 3).transpose(0, 1))
    assert torch.equal(x.grad, keep[..., None].expand(4, 6, 3).float())
    assert x.grad.stride() == x.stride()
