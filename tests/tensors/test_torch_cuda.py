"""CUDA tensors: the way to the kernels and back, on a GPU where there is one, else on a stand-in for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import naive
import numpy as np
import pytest
import torch
from helpers import internals, oracle, stand_in
from helpers.cases import OPTIONS, SHAPE, equal, mask_alone, moved
from helpers.simulator import compiled, in_the_simulator, needs_numba_cuda, simulated
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from msgdrop_numba import MessageDropout, keep_mask, message_dropout
from msgdrop_numba.tensors import arguments as tensors
from msgdrop_numba.tensors import cuda as torch_cuda
from msgdrop_numba.tensors.backends import HOST


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("where", ["host", "device"])
def test_values(options, where, device):
    x = torch.randn(SHAPE)
    expected, keep = oracle.dropout(x, seed=5, **options)
    told = {"p": 0.5, "seed": 5, **(moved(device, options) if where == "device" else options)}
    x[torch.from_numpy(~keep)] = float("nan")  # what drops is never read
    there = x.to(device)
    y, mask = message_dropout(there, return_mask=True, **told)
    equal(y, expected)
    equal(mask, keep)
    assert y.device == mask.device == there.device
    equal(there, x.numpy())
    equal(message_dropout(there, out=torch.empty_like(there), **told), expected)
    assert message_dropout(there, inplace=True, **told) is there
    equal(there, expected)
    if options.get("message_dims") is None:
        equal(keep_mask(SHAPE[:2], device=device, **mask_alone(told)), keep)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [False, True])
def test_dtypes(dtype, scale, device):
    x = torch.randn(SHAPE).to(dtype)
    keep = torch.from_numpy(naive.keep_mask(SHAPE[:2], 0.3, seed=9))
    s = 1 / 0.7 if dtype == torch.float64 else float(np.float32(1 / 0.7))
    wide = x if dtype in (torch.float64, torch.complex64) else x.float()
    expected = torch.where(keep[..., None], ((wide * s).to(dtype) if scale else x).cfloat(), 0)
    y = message_dropout(x.to(device), 0.3, scale=scale, seed=9)
    assert y.dtype == dtype
    assert torch.equal(y.cpu().cfloat(), expected)


@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # features apart: not what the kernels follow
        lambda x: torch.stack([x, x], 2)[:, :, 1],
        lambda x: x[:1].expand(3, 7, 4),
    ],
    ids=["rows inside", "features apart", "gaps", "one row"],
)
@pytest.mark.parametrize("scale", [False, True])
def test_strides(lay, scale, device):
    x = lay(torch.randn(SHAPE))
    there = lay(x.contiguous().to(device))
    assert there.stride() == x.stride()
    for options in ({}, {"lengths": [5, 7, 0]}):
        expected, _ = oracle.dropout(x.contiguous(), seed=3, scale=scale, **options)
        equal(message_dropout(there, seed=3, scale=scale, **options), expected)


def test_keys_that_lack_dims(device):
    x = torch.randn(2, 3, 5, 4)
    for keys in (11, [7, -7], torch.tensor([7, -7], device=device)):
        values = keys.cpu().numpy() if isinstance(keys, torch.Tensor) else np.array(keys)
        keep = naive.keep_mask((2, 3, 5), 0.5, seed=1, keys=values)
        mask = message_dropout(x.to(device), seed=1, keys=keys, message_dims=3, return_mask=True)[1]
        equal(mask, keep)
    turned = torch.arange(6, device=device).reshape(3, 2).t()
    mask = message_dropout(x.to(device), seed=1, keys=turned, message_dims=3, return_mask=True)[1]
    equal(mask, naive.keep_mask((2, 3, 5), 0.5, seed=1, keys=np.arange(6).reshape(3, 2).T))


def test_missing_dims_of_size_one_are_folded_too(device):
    for shape, keys in [((2, 1, 8), [7, -7]), ((1, 8), 11)]:
        keep = naive.keep_mask(shape, 0.5, seed=1, keys=np.array(keys))
        for given in (keys, torch.tensor(keys, device=device)):
            x = torch.ones(*shape, 2, device=device)
            equal(message_dropout(x, seed=1, keys=given, message_dims=len(shape), return_mask=True)[1], keep)


def test_clamped_on_the_device(device):
    if device.type == "cpu":
        pytest.skip("the stand-in's tensors are the host's, whose values are checked")
    lengths, p = torch.tensor([9, -3, 4], device=device), torch.tensor([2.0, -1, float("nan"), 0.5] * 2)[:7]
    positions, clamped = torch.tensor([-5, 1, 2, 3, 4, 5, 2**40], device=device), [0, 1, 2, 3, 4, 5, 2**34 - 1]
    x = torch.randn(SHAPE)
    told = {"lengths": [7, 0, 4], "positions": clamped}
    expected, _ = oracle.dropout(x, np.array([1.0, 0, 0, 0.5, 1, 0, 0]), seed=2, **told)
    equal(message_dropout(x.to(device), p.to(device), seed=2, lengths=lengths, positions=positions), expected)
    keep = naive.keep_mask(SHAPE[:2], 0.5, seed=2)
    equal(message_dropout(x.to(device), torch.tensor(0.5, device=device), seed=2, return_mask=True)[1], keep)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options, device):
    told = {"p": 0.5, "seed": 3, **options}
    x = torch.randn(SHAPE, dtype=torch.float64)
    there = x.to(device, copy=True).requires_grad_()
    y, mask = message_dropout(there, return_mask=True, **told)
    grad = torch.randn(SHAPE, dtype=torch.float64)
    expected, keep = oracle.dropout(grad, seed=3, **{**options, "fill": 0.0})
    grad[torch.from_numpy(~keep)] = float("nan")
    y.backward(grad.to(device))
    equal(there.grad, expected)
    equal(mask, keep)
    again = x.to(device, copy=True).requires_grad_()
    message_dropout(again * 1, inplace=True, **told).backward(grad.to(device))
    equal(again.grad, expected)
    f = lambda x: message_dropout(x, **told)  # noqa: E731
    assert torch.autograd.gradcheck(f, there, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, there)


def test_the_gradient_of_a_fill(device):
    x, fill = torch.randn(SHAPE, device=device), torch.randn(4, device=device, requires_grad=True)
    y, mask = message_dropout(x, seed=1, fill=fill, return_mask=True)
    grad = torch.randint(-8, 8, SHAPE, device=device).float()
    grad[mask] = float("nan")
    y.backward(grad)
    assert torch.equal(fill.grad, torch.where(mask[..., None], 0, grad).sum((0, 1)))


def test_seeds_come_from_the_device_s_generator(device):
    x = torch.ones(64, 64, 2, device=device, requires_grad=True)
    torch.manual_seed(3)
    y, z = message_dropout(x), message_dropout(x)
    torch.manual_seed(3)
    assert torch.equal(y, message_dropout(x))
    assert not torch.equal(y, z)
    generator = torch.Generator(device).manual_seed(3)
    assert torch.equal(y, message_dropout(x, generator=generator))
    (grad,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(grad, z)  # forward and backward agree
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    assert torch.equal(y, message_dropout(x, seed=seed))
    before = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
    message_dropout(x, 0.0)
    message_dropout(x, training=False)
    with pytest.raises(ValueError, match="lengths"):
        message_dropout(x, lengths=[65] * 64)
    after = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
    assert torch.equal(before, after)


def test_a_seed_tensor_may_change_after_the_call(device):
    x = torch.ones(SHAPE, device=device, requires_grad=True)
    seed = torch.tensor(-7, device=device)
    y = message_dropout(x, seed=seed)
    assert torch.equal(y, message_dropout(x, seed=2**64 - 7))
    seed.fill_(8)
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_what_is_written_may_hold_the_arguments(device):
    """The stand-in refuses arguments in the memory that is written."""
    words = torch.arange(84, device=device).reshape(SHAPE)
    expected = message_dropout(words.clone(), seed=41, keys=[0, 4, 8], lengths=[7, 5, 6], fill=words[2, 6].clone())
    told = {"seed": words[1, 3, 1], "keys": words[0, :3, 0], "fill": words[2, 6], "lengths": [7, 5, 6]}
    assert message_dropout(words, inplace=True, **told) is words
    assert torch.equal(words, expected)
    for name in ("keys", "lengths"):
        words = torch.tensor([3, 4, 5] * 28, device=device).reshape(SHAPE)
        expected = message_dropout(words.clone(), seed=1, **{name: [3, 4, 5]})
        assert torch.equal(message_dropout(words, inplace=True, seed=1, **{name: words[0, 0, :3]}), expected)
    for name, x in (
        ("positions", torch.arange(84, device=device)),
        ("protect", torch.arange(84, device=device) % 3 == 0),
    ):
        x = x.reshape(SHAPE)
        for place in (x[1, :, 0], x[:, :, 1]):
            told = {"seed": 3, "min_keep": 3, name: place}
            expected = message_dropout(x.clone(), **told)
            assert not torch.equal(expected, x)
            assert torch.equal(message_dropout(x.clone(), **{**told, name: place.tolist()}), expected)
            there = x.clone()
            place = there[1, :, 0] if place.ndim == 1 else there[:, :, 1]
            assert torch.equal(message_dropout(there, inplace=True, **{**told, name: place}), expected)


def test_transposed_arguments(device, monkeypatch):
    internals.unseen_values(monkeypatch)  # those of the stand-in are the device's too
    x, lengths = torch.ones(2, 3, 5, 4, device=device), torch.arange(6, device=device).clamp(max=5).reshape(3, 2).t()
    p = torch.linspace(0, 1, 30, dtype=torch.float64, device=device).reshape(5, 3, 2).permute(2, 1, 0)
    numbers = torch.arange(30, device=device).reshape(5, 3, 2).permute(2, 1, 0)
    protect, positions = numbers % 4 == 1, numbers * 3
    told = {"scale": True, "seed": 1, "lengths": lengths, "message_dims": 3, "protect": protect, "positions": positions}
    expected, keep = oracle.dropout(x, p, **told)
    y, mask = message_dropout(x, p, return_mask=True, **told)
    equal(mask, keep)
    equal(y, expected)


def test_an_offset_that_lies_on_the_device(device, monkeypatch):
    internals.unseen_values(monkeypatch)
    expected, keep = oracle.dropout(torch.ones(SHAPE), seed=1, positions=1000)
    told = {"seed": 1, "positions": torch.tensor(1000, device=device)}
    x = torch.ones(SHAPE, device=device, requires_grad=True)
    y, mask = message_dropout(x, return_mask=True, **told)
    equal(mask, keep)
    y.sum().backward()
    equal(x.grad, expected)


def test_the_mask_under_a_transform(device):
    keep = naive.keep_mask((4, 6), 0.5, seed=3)
    masks = torch.vmap(lambda seed: keep_mask((4, 6), seed=seed, device=device))(torch.tensor([3, 3], device=device))
    equal(masks[1], keep)
    with FakeTensorMode():
        assert isinstance(keep_mask((4, 6), seed=3, device=device), FakeTensor)


def test_the_stream_and_the_device_that_are_told(monkeypatch):
    kernels = stand_in.Kernels()
    stand_in.install(monkeypatch, kernels)
    current = [1]  # another device than the tensor's, which is None here

    @contextmanager
    def device(index: Any) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    internals.stream_of(monkeypatch, lambda index: (4711, index, current[-1]))
    message_dropout(torch.ones(SHAPE), seed=1)
    assert kernels.stream == (4711, None, None)
    assert current == [1]


def test_values_on_the_device_are_clamped(monkeypatch):
    internals.unseen_values(monkeypatch)  # as those of CUDA tensors
    cpu = torch.device("cpu")
    assert tensors.lengths_on(torch.tensor([9, -3, 4]), (3, 7), cpu).tolist() == [7, 0, 4]
    assert tensors.probabilities_on(torch.tensor([2.0, -1, float("nan")]), (5, 3), cpu).tolist() == [1, 0, 0]
    assert tensors.probabilities_on(torch.tensor(0.5), (5, 3), cpu).tolist() == [0.5, 0.5, 0.5]
    offset, positions = tensors.positions_on(torch.tensor([-1, 2**34, 5]), (5, 3), cpu)
    assert (offset, positions.tolist()) == (0, [0, 2**34 - 1, 5])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, device):
    layer, x = MessageDropout(0.5), torch.ones(16, 16, 2, device=device, requires_grad=True)
    y = checkpoint(lambda x: layer(x) * 2, x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_versions_and_leaves(device):
    x = torch.ones(SHAPE, device=device)
    version = x._version
    message_dropout(x, inplace=True, seed=1)
    assert x._version > version
    leaf = torch.ones(SHAPE, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="leaf"):
        message_dropout(leaf, inplace=True)
    view = (leaf * 1)[1:]
    message_dropout(view, inplace=True, seed=1)
    view.sum().backward()
    assert torch.equal(leaf.grad[1:], view.detach())
    assert not leaf.grad[0].any()


def test_an_array_p_follows_the_layer(device):
    layer = MessageDropout(np.array([0.1, 0.9, 0.5])).to(device)
    assert layer.p.device == torch.zeros(0, device=device).device
    assert layer.half().p.dtype == torch.float64
    assert MessageDropout(np.array([0.1, 0.9])).to("meta").p.tolist() == [0.1, 0.9]


def test_an_array_p_stays_where_it_is_read():
    layer = MessageDropout(np.array([0.1, 0.9]))
    seen = []
    layer._apply(lambda t: seen.append(t.dtype) or t.to("meta"))
    assert seen == [torch.float32]  # not every device has float64
    assert layer.p.is_cpu
    layer.p = layer.p.to("meta")  # as if on another device than x
    with pytest.raises(NotImplementedError, match="meta"):  # moved to x's, which meta tensors can't be
        layer(torch.ones(3, 2, 4))


# ---- in numba's simulator


@simulated
@pytest.mark.usefixtures("reset_cuda")
def test_the_simulator_is_never_given_addresses_of_a_device(caplog):
    assert torch_cuda.obstacle(torch.device("cuda:0"))
    assert "NUMBA_ENABLE_CUDASIM" in caplog.records[0].getMessage()


@pytest.mark.processes
@needs_numba_cuda
@compiled
def test_the_kernels_behind_it_in_the_simulator(tmp_path):
    names = "values or keys_that or missing_dims or gradient_of or a_seed_tensor or strides or simulator_is_never"
    assert in_the_simulator(__file__, tmp_path, "-m", "not gpu", "-k", names) > 30
    assert HOST.reads(torch.ones(1))  # the stand-in is gone
