"""What a GPU alone can show of CUDA tensors. Under compute-sanitizer, set PYTORCH_NO_CUDA_MEMORY_CACHING=1."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers import internals, oracle
from helpers.cases import OPTIONS, SHAPE, equal, moved, no_gpu
from torch._dynamo.testing import EagerAndRecordGraphs

from msgdrop_numba import keep_mask, message_dropout, message_select
from msgdrop_numba.tensors import cuda as torch_cuda

pytestmark = [
    pytest.mark.gpu,
    no_gpu,
]


@pytest.fixture(autouse=True)
def kernels() -> Any:
    """Without them all would pass on torch's own operations."""
    assert torch_cuda.obstacle(torch.device("cuda:0")) == ""
    yield
    broken, loaded = internals.cuda_state()
    assert not broken
    assert loaded


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_waits_for_the_device(options):
    device = torch.device("cuda:0")
    x, told = torch.randn(SHAPE, device=device, requires_grad=True), moved(device, options)
    fill = torch.zeros(x.shape[told.get("message_dims", 2) :], device=device, requires_grad=True)
    lengths = torch.tensor([3, 7, 0]).pin_memory()
    calls = [{}, {"seed": 3}, {"seed": torch.full((), 3, device=device)}, {"fill": fill}]
    if "message_dims" not in told and not told.get("exact"):
        calls += [{"p": torch.tensor(0.3, device=device)}, {"lengths": lengths}]
    for mode in ("default", "error"):  # the first call loads kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for more in calls:
                y, _ = message_dropout(x, return_mask=True, **{"p": 0.5, **told, **more})
                y.sum().backward()
                message_dropout(x.detach(), **{"p": 0.5, **options, **more})  # host arrays too
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_graph_draws_anew_at_each_replay(options):
    device = torch.device("cuda:0")
    x, told = (
        torch.ones(64, 64, 4, device=device, requires_grad=True),
        {"p": 0.5, **options, "scale": False, "fill": 0.0},
    )
    for name in ("lengths", "keys", "protect", "positions"):  # of rows of 7
        told.pop(name, None)
    if isinstance(told["p"], np.ndarray):
        told["p"] = torch.linspace(0, 1, 64, dtype=torch.float64, device=device)
    step = lambda: torch.autograd.grad(message_dropout(x, **told).sum(), x)[0]  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = message_dropout(x, **told)
        (grad,) = torch.autograd.grad(y.sum(), x)
    seen = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, grad)
        seen.append(y.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_given_seed_in_a_graph():
    seed, x = torch.zeros((), dtype=torch.int64, device="cuda"), torch.ones(64, 64, 4, device="cuda")
    message_dropout(x, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = message_dropout(x, seed=seed), message_dropout(x, seed=9)
    for number in (4, 5):
        seed.fill_(number)
        graph.replay()
        assert torch.equal(y, message_dropout(x, seed=number))
        assert torch.equal(z, message_dropout(x, seed=9))


def test_streams_keep_their_order():
    x, streams = torch.ones(2048, 2048, 16, device="cuda"), [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            y = x * (i + 1)  # long enough to be under way when the kernel is launched
            results.append(message_dropout(y, 0.3, seed=i) / (i + 1))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert torch.equal(result, message_dropout(x, 0.3, seed=i))


@pytest.mark.processes
def test_threads_that_have_no_context_yet():
    """torch's autograd thread has none before its first kernel; nor has a new thread of the user's."""
    code = """
import threading, torch
from msgdrop_numba import message_dropout
x = torch.ones(8, 8, 4, device="cuda", requires_grad=True)
grad, seed = torch.ones_like(x), torch.zeros((), dtype=torch.int64, device="cuda")
y = message_dropout(x, seed=seed)
y.backward(grad)
assert torch.equal(x.grad, y)
with torch.no_grad():
    found = []
    thread = threading.Thread(target=lambda: found.append(message_dropout(x, seed=seed)))
    thread.start(), thread.join()
assert torch.equal(found[0], y)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no log line


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensor_s_own_device():
    x = torch.ones(64, 64, 4, device="cuda:1", requires_grad=True)
    with torch.cuda.device(0):
        y = message_dropout(x, seed=1)
        y.sum().backward()
    equal(y.detach(), oracle.dropout(torch.ones(64, 64, 4), seed=1)[0])
    assert torch.equal(x.grad, y)
    with pytest.raises(ValueError, match="cuda:0"):
        message_dropout(x, lengths=torch.ones(64, dtype=torch.int64, device="cuda:0"))


def test_large_and_odd():
    for shape in [(5, 100_000, 3), (2, 70_000, 128), (300, 3, 4096), (1, 2, 3_000_000)]:
        x = torch.randn(shape)
        for options in ({}, {"exact": True}, {"span": 7, "min_keep": 3}):
            expected = message_dropout(x, 0.3, seed=3, **options)
            assert torch.equal(message_dropout(x.cuda(), 0.3, seed=3, **options).cpu(), expected)
        start = torch.randn(x.numel() + 1).cuda()[1:].view(shape)  # 4 bytes off
        assert torch.equal(message_dropout(start, seed=3).cpu(), message_dropout(start.cpu(), seed=3))


def test_more_than_32_bits_count():
    for dtype, count in ((torch.uint8, 2**31 + 2**21), (torch.float32, 2**30 + 2**21)):
        features = 2**10
        x = torch.ones(2, count // features // 2, features, dtype=dtype, device="cuda")
        y, keep = message_dropout(x, 0.3, seed=3, return_mask=True)
        assert torch.equal(keep.cpu(), torch.from_numpy(keep_mask(tuple(x.shape[:2]), 0.3, seed=3)))
        assert torch.equal(y[..., 0].bool(), keep)
        assert torch.equal(y.amin(-1), y.amax(-1))


def test_compiled_on_the_device(compiled):
    x, recorded = torch.ones(64, 64, 4, device="cuda", requires_grad=True), EagerAndRecordGraphs()
    drop = lambda x: message_dropout(x, seed=7) * 2  # noqa: E731
    expected = drop(x)
    assert torch.equal(compiled(drop)(x), expected)
    assert torch.equal(compiled(drop, backend=recorded)(x), expected)
    assert "msgdrop_numba.keep_mask" in recorded.graphs[0].code


# ---- messages that are removed

KNOWN: list[dict[str, Any]] = [{"exact": True}, {"capacity": 64}, {"layout": "packed", "capacity": 64 * 64}]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("told", KNOWN, ids=str)
def test_removal_waits_for_nothing_where_the_room_is_known(told, scale):
    x, fill = torch.randn(64, 64, 4, device="cuda", requires_grad=True), torch.zeros(4, device="cuda")
    fill.requires_grad_()
    for mode in ("default", "error"):  # the first call loads kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for more in ({}, {"seed": 3}, {"lengths": torch.full((64,), 9).pin_memory()}):
                if "capacity" in told or "lengths" not in more:
                    y, kept = message_select(x, scale=scale, **told, **more)
                    kept.restore(kept.take(x) + y, fill).sum().backward()
                    _ = kept.indices, kept.mask, kept.cu_seqlens, kept.lengths
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("told", KNOWN, ids=str)
def test_a_graph_removes_anew_at_each_replay(told):
    x = torch.randn(64, 64, 4, device="cuda", requires_grad=True)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y, kept = message_select(x, scale=True, **told)
        return kept.restore(y.detach()), torch.autograd.grad(y, x, y)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grad = step()
    seen = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(grad, y * 2)
        seen.append(y.clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_removal_large_and_odd():
    for shape in [(5, 100_000, 3), (2, 70_000, 128), (300, 3, 4096), (1, 2, 3_000_000)]:
        x = torch.randn(shape)
        for options in ({}, {"exact": True, "scale": True}, {"layout": "packed"}, {"capacity": shape[1]}):
            expected, kept = message_select(x, 0.3, seed=3, **options)
            y, there = message_select(x.cuda(), 0.3, seed=3, **options)
            assert torch.equal(y.cpu(), expected)
            assert torch.equal(there.indices.cpu(), kept.indices)
            assert torch.equal(there.restore(y, -1.5).cpu(), kept.restore(expected, -1.5))
        start = torch.randn(x.numel() + 1).cuda()[1:].view(shape)  # 4 bytes off
        assert torch.equal(message_select(start, seed=3)[0].cpu(), message_select(start.cpu(), seed=3)[0])


def test_more_than_32_bits_count_when_removed():
    for dtype, count in ((torch.uint8, 2**32 + 2**22), (torch.float32, 2**31 + 2**22)):
        x = torch.ones(2, count // 2**11, 2**10, dtype=dtype, device="cuda")
        x[..., 0] = torch.arange(x.shape[1], device="cuda") % 251
        y, kept = message_select(x, 0.3, seed=3, layout="packed")
        assert torch.equal(y[:, 0], x[..., 0].flatten()[kept.indices])
        assert (y[:, 1:] == 1).all()
        back = kept.restore(y)
        assert torch.equal(back[..., 0], torch.where(kept.mask, x[..., 0], 0))
        assert torch.equal(back[..., 1].bool(), kept.mask)
        assert torch.equal(back[..., 1:].amin(-1), back[..., 1:].amax(-1))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_removal_on_the_tensor_s_own_device():
    x = torch.randn(64, 64, 4)
    there = x.to("cuda:1").requires_grad_()
    with torch.cuda.device(0):
        y, kept = message_select(there, seed=1)
        y.backward(torch.ones_like(y))
    assert torch.equal(y.detach().cpu(), message_select(x, seed=1)[0])
    assert torch.equal(there.grad[..., 0].bool(), kept.mask)
    with pytest.raises(ValueError, match="cuda:0"):
        kept.take(x.to("cuda:0"))
