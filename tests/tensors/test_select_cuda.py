"""Messages removed from CUDA tensors and put back, on a GPU where there is one, else on a stand-in for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import naive
import numpy as np
import pytest
import torch
from helpers import internals, oracle, stand_in
from helpers.cases import OPTIONS, SHAPE, equal, moved
from helpers.simulator import compiled, in_the_simulator, needs_numba_cuda

from msgdrop_numba import Kept, message_dropout, message_select, select_messages

RULES = [{name: value for name, value in options.items() if name != "fill"} for options in OPTIONS]
LAYOUTS: list[dict[str, Any]] = [{}, {"layout": "packed"}, {"capacity": 9}, {"layout": "packed", "capacity": 23}]


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return internals.watch_gathers(monkeypatch)


def messages(shape: tuple[int, ...]) -> torch.Tensor:
    """Small integers, whose sums are the same in any order."""
    return torch.randint(-8, 8, shape).float()


class Case:
    """A call with seed 5 on x, and what naive.py makes of it."""

    def __init__(self, options: dict[str, Any], laid: dict[str, Any], device: torch.device) -> None:
        self.x, self.options, self.device = torch.randn(SHAPE), options, device
        self.dropped, self.keep = oracle.dropout(self.x, seed=5, **options)
        self.dims, self.shape = self.keep.ndim, self.keep.shape
        self.told = {"p": 0.5, "seed": 5, **moved(device, options), **laid}

    def expect(self, kept: Kept) -> np.ndarray:
        """The numbers of the messages that remain, which must be those of `kept`."""
        lengths, capacity = self.options.get("lengths"), self.told.get("capacity")
        index, counts = naive.select(self.keep, kept.layout, lengths=lengths, capacity=capacity)
        equal(kept.indices, index if kept.layout == "packed" else np.where(index < 0, -1, index % self.shape[-1]))
        equal(kept.mask, self.keep & naive.part(self.shape, lengths))
        assert kept.lengths.flatten().tolist() == counts
        assert not kept.overflow
        return index

    def there(self, index: np.ndarray) -> torch.Tensor:
        """x on the device, what is removed overwritten: it is never read."""
        x = self.x.clone()
        named = np.isin(np.arange(self.keep.size), index).reshape(self.shape)
        x[torch.from_numpy(~named)] = float("nan")
        return x.to(self.device)


@pytest.mark.parametrize("laid", LAYOUTS, ids=str)
@pytest.mark.parametrize("options", RULES, ids=str)
def test_values_and_gradients(options, laid, device, gathers):
    case = Case(options, laid, device)
    index = case.expect(message_select(case.x.to(device), **case.told)[1])
    x = case.there(index).requires_grad_()
    y, kept = message_select(x, **case.told)
    equal(y.detach(), naive.removed(case.dropped, case.dims, index))
    equal(kept.take(case.x.to(device)), naive.removed(case.x.numpy(), case.dims, index))
    assert y.device == x.device

    grad = messages(SHAPE)
    full, _ = oracle.dropout(grad, seed=5, **options)
    y.backward(torch.from_numpy(naive.removed(grad.numpy(), case.dims, index)).to(device))
    back = naive.removed(full, case.dims, index)
    equal(x.grad, naive.restored(back, case.shape, index))
    assert gathers == [True] * 4


@pytest.mark.parametrize("laid", LAYOUTS, ids=str)
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"lengths": [2, 7, 0]}, {"message_dims": 1}], ids=str)
def test_put_back(options, laid, device, gathers):
    case = Case(options, laid, device)
    kept = message_select(case.x.to(device), **case.told)[1]
    index, features = case.expect(kept), SHAPE[case.dims :]
    y = messages((*index.shape, *features))
    missing = ~(case.keep & naive.part(case.shape, options.get("lengths")))
    for fill in (0.0, -2.5, messages(features), messages(SHAPE)):
        there = y.to(device, copy=True).requires_grad_()
        told = fill.to(device, copy=True).requires_grad_() if isinstance(fill, torch.Tensor) else fill
        x = kept.restore(there, told)
        want = fill.reshape(-1, *features).numpy() if isinstance(fill, torch.Tensor) and fill.shape == SHAPE else fill
        equal(x.detach(), naive.restored(y.numpy(), case.shape, index, want))
        grad = messages(SHAPE)
        x.backward(grad.to(device))
        equal(there.grad, naive.removed(grad.numpy(), case.dims, index))
        if isinstance(fill, torch.Tensor):
            each = np.where(missing.reshape(*case.shape, *(1,) * len(features)), grad.numpy(), np.float32(0))
            equal(told.grad, each if fill.shape == SHAPE else each.sum(tuple(range(case.dims))))
    assert gathers == [True] * 9


def test_companions(device, gathers):
    case = Case({"lengths": [7, 2, 4]}, {}, device)
    kept = select_messages(SHAPE[:2], seed=5, lengths=[7, 2, 4], device=device)
    index = case.expect(kept)
    labels, weights = torch.arange(21).reshape(3, 7), torch.randn(3, 5, 7)
    equal(kept.take(labels.to(device)), naive.removed(labels.numpy(), 2, index))
    want = naive.removed(weights.transpose(1, 2).contiguous().numpy(), 2, index)
    equal(kept.take(weights.to(device), dim=2).transpose(1, 2), want)
    assert gathers == [True, True]
    equal(kept.take(torch.arange(7, device=device), dim=0), np.where(index < 0, 0, index % 7))


def test_second_derivatives(device):
    x, fill = torch.randn(SHAPE, dtype=torch.float64, device=device), torch.randn(4, dtype=torch.float64, device=device)
    told: dict[str, Any] = {"seed": 3, "exact": True, "scale": True, "lengths": [7, 3, 5]}

    def there_and_back(x: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        y, kept = message_select(x, **told)
        return kept.restore(y * y, fill)

    inputs = x.requires_grad_(), fill.requires_grad_()
    assert torch.autograd.gradcheck(there_and_back, inputs)
    assert torch.autograd.gradgradcheck(there_and_back, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [False, True])
def test_dtypes(dtype, scale, device, gathers):
    x = torch.randn(SHAPE).to(dtype).to(device)
    told = {"p": 0.3, "seed": 9, "scale": scale}
    y, kept = message_select(x, **told)
    back = kept.restore(y)
    assert y.dtype == back.dtype == dtype
    assert torch.equal(back.cfloat(), message_dropout(x, **told).cfloat())
    assert gathers == ([True] if scale and dtype == torch.float8_e5m2 else [True, True])


@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # features apart: copied first
        lambda x: torch.stack([x, x], 2)[:, :, 1],
        lambda x: x[:1].expand(3, 7, 4),
        lambda x: torch.cat([x.flatten(), x.flatten()])[3:87].view(SHAPE),  # not at a multiple of 16 bytes
    ],
    ids=["rows inside", "features apart", "gaps", "one row", "off"],
)
@pytest.mark.parametrize("scale", [False, True])
def test_strides(lay, scale, device, gathers):
    x = lay(torch.randn(SHAPE))
    there = lay(x.contiguous().to(device)) if x._base is None else lay(x.clone().to(device))
    y, kept = message_select(there, seed=3, scale=scale)
    expected, keep = oracle.dropout(there.cpu(), seed=3, scale=scale)
    index, _ = naive.select(keep, "padded")
    equal(y, naive.removed(expected, 2, index))
    equal(kept.restore(y.transpose(0, 1).contiguous().transpose(0, 1)), expected)
    assert gathers == [True, True]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_what_finds_no_room_is_told(layout, device, gathers):
    x = torch.randn(SHAPE)
    keep = naive.keep_mask(SHAPE[:2], 0.3, seed=2)
    index, counts = naive.select(keep, layout)
    assert min(counts) > 2
    y, kept = message_select(x.to(device), 0.3, seed=2, layout=layout, capacity=2)
    index = np.ascontiguousarray(index[..., :2])
    assert kept.overflow
    assert kept.overflow.device == y.device
    equal(y, naive.removed(x.numpy(), 2, index))
    equal(kept.restore(y), naive.restored(y.cpu().numpy(), SHAPE[:2], index))
    equal(kept.mask, np.isin(np.arange(21), index).reshape(3, 7))
    assert kept.lengths.tolist() == ([2, 2, 2] if layout == "padded" else [2, 0, 0])
    assert gathers == [True, True]


@pytest.mark.parametrize("shape", [(0, 7, 4), (3, 0, 4), (3, 7, 0)])
def test_nothing_at_all(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    for laid in ({}, {"layout": "packed"}, {"capacity": 3}):
        y, kept = message_select(x, seed=1, **laid)
        assert kept.restore(y, 1.5).shape == shape
        y.sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("told", [{"exact": True}, {"capacity": 7}, {"layout": "packed", "capacity": 21}], ids=str)
def test_nothing_is_read_on_the_host_where_the_room_is_known(told, device):
    x, fill = torch.randn(SHAPE, device=device, requires_grad=True), torch.zeros(4, device=device, requires_grad=True)
    seed = torch.tensor(3, device=device)
    for scale in (False, True):
        with torch.autograd.profiler.profile() as seen:
            y, kept = message_select(x, seed=seed, scale=scale, **told)
            kept.restore(kept.take(x) + y, fill).sum().backward()
        called = {event.name for event in seen.function_events}
        assert "aten::cumsum" in called
        assert not called & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}


# ---- what only the stand-in can show


@pytest.mark.parametrize("why", ["none", "load fails", "capturing"])
def test_without_kernels_the_same(why, reset_cuda, monkeypatch, caplog):
    kernels = stand_in.Kernels()
    stand_in.install(monkeypatch, kernels)
    if why == "none":
        internals.unusable_devices(monkeypatch)
    elif why == "load fails":
        kernels.fails = RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
    else:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    case = Case({"scale": True, "lengths": [7, 0, 4]}, {}, torch.device("cpu"))
    with caplog.at_level(logging.WARNING, "msgdrop_numba"):
        for _ in range(2):
            x = case.x.clone().requires_grad_()
            y, kept = message_select(x, **case.told)
            index = case.expect(kept)
            equal(y.detach(), naive.removed(case.dropped, 2, index))
            equal(kept.restore(y.detach(), 2.0), naive.restored(y.detach().numpy(), SHAPE[:2], index, 2.0))
            y.backward(torch.from_numpy(naive.removed(case.x.numpy(), 2, index)))
            equal(x.grad, naive.restored(naive.removed(case.dropped, 2, index), SHAPE[:2], index))
    assert kernels.launches == 0
    assert len(caplog.records) == (why != "none")
    assert kernels.loads == (why == "load fails")  # never tried again


def test_without_kernels_what_remains_may_be_changed_in_place(reset_cuda, monkeypatch):
    stand_in.install(monkeypatch, stand_in.Kernels())
    internals.unusable_devices(monkeypatch)
    x = torch.randn(SHAPE, requires_grad=True)
    y, kept = message_select(x, 0.5, exact=True, seed=5)
    y.mul_(3).sum().backward()
    assert torch.equal(x.grad, torch.where(kept.mask.reshape(*SHAPE[:2], 1), 3.0, torch.zeros(SHAPE)))


def test_a_move_alone_that_cannot_be_loaded(reset_cuda, monkeypatch, caplog):
    kernels = stand_in.Kernels()
    stand_in.install(monkeypatch, kernels)
    x = torch.randn(SHAPE)
    kept = select_messages(SHAPE[:2], seed=5, device="cpu")
    kernels.fails = RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")
    want = naive.removed(x.numpy(), 2, naive.select(naive.keep_mask(SHAPE[:2], 0.5, seed=5), "padded")[0])
    with caplog.at_level(logging.WARNING, "msgdrop_numba"):
        equal(kept.take(x), want)
        equal(kept.take(x), want)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "OUT_OF_MEMORY" in line


def test_the_stream_and_the_device_that_are_told(monkeypatch):
    kernels = stand_in.Kernels()
    stand_in.install(monkeypatch, kernels)
    x, kept = torch.ones(SHAPE), select_messages(SHAPE[:2], seed=1, device="cpu")
    current = [1]  # another device than the tensor's, which is None here

    @contextmanager
    def device(index: Any) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    internals.stream_of(monkeypatch, lambda index: (4711, index, current[-1]))
    launches = kernels.launches
    kept.take(x)
    assert kernels.launches == launches + 1
    assert kernels.stream == (4711, None, None)
    assert current == [1]


@pytest.mark.processes
@needs_numba_cuda
@compiled
def test_the_kernels_behind_it_in_the_simulator(tmp_path):
    assert in_the_simulator(__file__, tmp_path, "-m", "not gpu", "-k", "dtypes or strides or no_room") == 22
