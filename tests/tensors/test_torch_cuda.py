"""CUDA tensors: the way to the kernels and back, on a GPU where there is one, else on a stand-in for it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import naive
import numpy as np
import pytest
import torch
from helpers import stand_in
from helpers.simulator import SIMULATED, in_the_simulator, needs_numba_cuda
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from msgdrop_numba import MessageDropout, keep_mask, message_dropout
from msgdrop_numba.tensors import arguments as tensors
from msgdrop_numba.tensors import cuda as torch_cuda
from msgdrop_numba.tensors import dropout as torch_ops

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch finds none")
SHAPE = (3, 7, 4)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"exact": True},
    {"span": 3},
    {"min_keep": 3},
    {"exact": True, "min_keep": 5, "scale": True, "lengths": [7, 0, 4]},
    {"span": 2, "min_keep": 2, "lengths": [1, 7, 5], "keys": [2**63 + 5, -1, 0]},
    {"scale": True, "fill": -2.5},
    {"scale": True, "lengths": [2, 7, 0]},
    {"p": np.array([0.1, 0.9, 0.0, 1.0, 0.3, 0.5, 0.7]), "scale": True},
    {"p": np.linspace(0, 1, 21).reshape(3, 7), "min_keep": 1},
    {"p": 1.0, "min_keep": 2, "scale": True},
    {"message_dims": 1},
]


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    torch_cuda._say.cache_clear()
    if request.param == "cuda":
        return torch.device("cuda:0")
    kernels: Any = stand_in.Kernels()
    if SIMULATED:
        request.getfixturevalue("small")
        from msgdrop_numba.kernels import cuda_launch as kernels
    stand_in.install(monkeypatch, kernels)
    return torch.device("cpu")


def want(x: torch.Tensor, seed: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """What naive.py makes of a call, and its mask."""
    options = {"p": 0.5, **options}
    p = options["p"]
    dims, fill, scale = options.pop("message_dims", 2), options.pop("fill", 0.0), options.pop("scale", False)
    for name in ("lengths", "keys"):
        if name in options:
            options[name] = np.array([value % 2**64 for value in options[name]], np.uint64).astype(np.int64)
    keep = naive.keep_mask(tuple(x.shape[:dims]), seed=seed, **options)
    told = {name: options[name] for name in ("exact", "min_keep") if name in options}
    flat = x.detach().numpy().reshape(*x.shape[:dims], -1)
    y = naive.drop(flat, keep, p=p, scale=scale, fill=fill, lengths=options.get("lengths"), **told)
    return y.reshape(x.shape), keep


def on(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """The same options with their arrays as tensors on the device."""
    moved = dict(options)
    for name in ("p", "lengths", "keys"):
        if np.ndim(moved.get(name, 0)):
            values = np.array([value % 2**64 for value in moved[name]], np.uint64) if name == "keys" else moved[name]
            moved[name] = torch.from_numpy(np.array(values)).to(device)
    return moved


def equal(got: torch.Tensor, expected: np.ndarray) -> None:
    host = got.cpu().numpy()
    assert host.dtype == expected.dtype
    assert np.ascontiguousarray(host).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("where", ["host", "device"])
def test_values(options, where, device):
    x = torch.randn(SHAPE)
    expected, keep = want(x, 5, **options)
    told = {"p": 0.5, "seed": 5, **(on(device, options) if where == "device" else options)}
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
    only = {name: value for name, value in told.items() if name not in ("scale", "fill", "message_dims")}
    if options.get("message_dims") is None:
        equal(keep_mask(SHAPE[:2], device=device, **only), keep)


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
        expected, _ = want(x.contiguous(), 3, scale=scale, **options)
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
    x = torch.randn(SHAPE)
    expected, _ = want(x, 2, lengths=[7, 0, 4], p=np.array([1.0, 0, 0, 0.5, 1, 0, 0]))
    equal(message_dropout(x.to(device), p.to(device), seed=2, lengths=lengths), expected)
    keep = naive.keep_mask(SHAPE[:2], 0.5, seed=2)
    equal(message_dropout(x.to(device), torch.tensor(0.5, device=device), seed=2, return_mask=True)[1], keep)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options, device):
    told = {"p": 0.5, "seed": 3, **options}
    x = torch.randn(SHAPE, dtype=torch.float64)
    there = x.to(device, copy=True).requires_grad_()
    y, mask = message_dropout(there, return_mask=True, **told)
    grad = torch.randn(SHAPE, dtype=torch.float64)
    expected, keep = want(grad, 3, **{**options, "fill": 0.0})
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


def test_transposed_arguments(device, monkeypatch):
    monkeypatch.setattr(tensors, "is_plain", lambda _: False)  # those of the stand-in are the device's too
    x, lengths = torch.ones(2, 3, 5, 4, device=device), torch.arange(6, device=device).clamp(max=5).reshape(3, 2).t()
    p = torch.linspace(0, 1, 30, dtype=torch.float64, device=device).reshape(5, 3, 2).permute(2, 1, 0)
    keep = naive.keep_mask((2, 3, 5), p.cpu().numpy(), seed=1, lengths=lengths.cpu().numpy())
    y, mask = message_dropout(x, p, scale=True, seed=1, lengths=lengths, message_dims=3, return_mask=True)
    equal(mask, keep)
    expected = naive.drop(
        np.ones((2, 3, 5, 4), np.float32), keep, p=p.cpu().numpy(), scale=True, lengths=lengths.cpu().numpy()
    )
    equal(y, expected)


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
    monkeypatch.setattr(torch_cuda, "raw_stream", lambda index: (4711, index, current[-1]))
    message_dropout(torch.ones(SHAPE), seed=1)
    assert kernels.stream == (4711, None, None)
    assert current == [1]


def test_values_on_the_device_are_clamped(monkeypatch):
    monkeypatch.setattr(tensors, "is_plain", lambda _: False)  # as those of CUDA tensors
    cpu = torch.device("cpu")
    assert tensors.lengths_on(torch.tensor([9, -3, 4]), (3, 7), cpu).tolist() == [7, 0, 4]
    assert tensors.probabilities_on(torch.tensor([2.0, -1, float("nan")]), (5, 3), cpu)[1].tolist() == [1, 0, 0]
    assert tensors.probabilities_on(torch.tensor(0.5), (5, 3), cpu)[1].tolist() == [0.5, 0.5, 0.5]


def test_generators_of_another_device():
    for other in ("cpu", "cuda:1"):
        with pytest.raises(ValueError, match=f"generator must be on cuda:0, as x is, but it is on {other}"):
            tensors.check_generator(SimpleNamespace(device=torch.device(other)), torch.device("cuda:0"))
    tensors.check_generator(SimpleNamespace(device=torch.device("cuda:0")), torch.device("cuda:0"))


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


# ---- where there are no kernels


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("why", ["none", "load fails", "capturing"])
def test_without_kernels_the_same(options, why, device, monkeypatch, caplog):
    if why == "none":
        monkeypatch.setattr(torch_cuda, "_kernels", lambda: None)
    elif device.type != "cpu":
        pytest.skip("the stand-in's kernels are told to fail")
    elif why == "load fails":
        kernels = stand_in.Kernels()
        kernels.fails = RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
        monkeypatch.setattr(torch_cuda, "_kernels", lambda: kernels)
    else:
        kernels = stand_in.Kernels()
        monkeypatch.setattr(torch_cuda, "_kernels", lambda: kernels)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = torch.randn(SHAPE)
    expected, keep = want(x, 5, **options)
    there = x.to(device, copy=True).requires_grad_()
    with caplog.at_level(logging.WARNING, "msgdrop_numba"):
        for _ in range(2):
            there.grad = None
            y, mask = message_dropout(there, return_mask=True, **{"p": 0.5, "seed": 5, **options})
            equal(y.detach(), expected)
            equal(mask, keep)
            y.backward(x.to(device))
            equal(there.grad, want(x, 5, **{**options, "fill": 0.0})[0])
            told = {k: v for k, v in options.items() if k not in ("scale", "fill", "message_dims")}
            if "message_dims" not in options:
                equal(keep_mask(SHAPE[:2], seed=5, device=device, **{"p": 0.5, **told}), keep)
    said = [record.getMessage() for record in caplog.records]
    if why == "none":
        assert said == []
        return
    (line,) = said
    if why == "load fails":
        assert "UNSUPPORTED_PTX" in line
        assert 'update the driver, or pip install "msgdrop_numba[cuda]"' in line
        assert kernels.loads == 1  # never tried again
    else:
        assert "make the same calls once before capturing" in line


def test_the_log_line_without_numba_cuda(monkeypatch, caplog):
    torch_cuda._kernels.cache_clear()
    torch_cuda._say.cache_clear()
    monkeypatch.setitem(sys.modules, "msgdrop_numba.kernels.cuda_launch", None)  # importing it fails
    monkeypatch.delattr(sys.modules["msgdrop_numba.kernels"], "cuda_launch", raising=False)
    with caplog.at_level(logging.WARNING, "msgdrop_numba"):
        assert not torch_cuda.usable(torch.device("cuda:0"))
        assert not torch_cuda.usable(torch.device("cuda:0"))
    (record,) = caplog.records
    assert "numba-cuda is missing or too old" in record.getMessage()
    assert 'pip install "msgdrop_numba[cuda]"' in record.getMessage()
    torch_cuda._kernels.cache_clear()


@pytest.mark.skipif(not SIMULATED, reason="runs in the process that the last test here starts")
def test_the_simulator_is_never_given_addresses_of_a_device(caplog):
    assert not torch_cuda.usable(torch.device("cuda:0"))
    assert "NUMBA_ENABLE_CUDASIM" in caplog.records[0].getMessage()


def test_no_log_line_on_rocm(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    torch_cuda._kernels.cache_clear()
    assert not torch_cuda.usable(torch.device("cuda:0"))
    assert not caplog.records
    torch_cuda._kernels.cache_clear()


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lengths": torch.ones(3, dtype=torch.int64, device="meta")}, ValueError, "lengths must be on .* meta"),
        ({"keys": torch.ones(3, dtype=torch.int64, device="meta")}, ValueError, "keys must be on .* meta"),
        ({"p": torch.ones(7, device="meta")}, ValueError, "p must be on .* meta"),
        ({"seed": torch.tensor(3, device="meta")}, ValueError, "seed must be on .* meta"),
        ({"fill": torch.ones(4, device="meta")}, ValueError, "fill must be .* meta"),
        ({"out": torch.ones(SHAPE, device="meta")}, ValueError, "out must be like x.* meta"),
        ({"lengths": [8, 1, 1]}, ValueError, "from 0 to 7"),
        ({"lengths": torch.ones(3)}, TypeError, "lengths must be integers"),
        ({"keys": torch.ones(4, dtype=torch.int64)}, ValueError, r"keys must have shape \(3,\)"),
        ({"p": torch.ones(6)}, ValueError, "p must be a number or have shape"),
        ({"seed": torch.tensor(3.0)}, TypeError, "0-d int64"),
        ({"seed": 2**64}, ValueError, "seed must be"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "not both"),
        ({"exact": True, "span": 2}, ValueError, "exact"),
        ({"fill": "0"}, TypeError, "fill"),
    ],
    ids=[*"abcdefghijklmno"],
)
def test_bad_input_leaves_all_as_it_was(options, error, match, device):
    x = torch.randn(SHAPE, device=device)
    before = x.clone()
    with pytest.raises(error, match=match):
        message_dropout(x, **{"p": 0.5, "inplace": "out" not in options, **options})
    assert torch.equal(x, before)


def test_arguments_on_another_device():
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"lengths must be on cpu, as x is, or on the CPU, but it is on meta: move it"):
        message_dropout(x, lengths=torch.ones(3, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="generator must be on meta"):
        message_dropout(x.to("meta"), generator=torch.Generator())
    with pytest.raises(ValueError, match="keys must be on cpu"):
        keep_mask((3, 7), seed=1, keys=torch.ones(3, dtype=torch.int64, device="meta"), device="cpu")


def test_host_arrays_are_refused_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(tensors, "_is_capturing", lambda device: device.index == 0)
    with pytest.raises(ValueError, match="lengths must be on cuda:0 while a CUDA graph is captured"):
        tensors.lengths_on([1, 2, 3], (3, 7), torch.device("cuda:0"))


# ---- in numba's simulator


@needs_numba_cuda
@pytest.mark.skipif(SIMULATED, reason="this is the process that it starts")
def test_the_kernels_behind_it_in_the_simulator(tmp_path):
    names = "values or keys_that or missing_dims or gradient_of or a_seed_tensor or strides or simulator_is_never"
    assert in_the_simulator(__file__, tmp_path, "-m", "not gpu", "-k", names) > 30
    assert torch_ops.is_plain(torch.ones(1))
