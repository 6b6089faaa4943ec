"""CUDA tensors where there are no kernels, which take torch's operations, and what bad input gets."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import internals, oracle, stand_in
from helpers.cases import OPTIONS, SHAPE, equal, mask_alone

from msgdrop_numba import keep_mask, message_dropout
from msgdrop_numba.tensors import arguments as tensors
from msgdrop_numba.tensors import cuda as torch_cuda


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("why", ["none", "load fails", "capturing"])
def test_without_kernels_the_same(options, why, device, monkeypatch, caplog):
    if why == "none":
        internals.cuda_kernels(monkeypatch, None)
    elif device.type != "cpu":
        pytest.skip("the stand-in's kernels are told to fail")
    elif why == "load fails":
        kernels = stand_in.Kernels()
        kernels.fails = RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
        internals.cuda_kernels(monkeypatch, kernels)
    else:
        kernels = stand_in.Kernels()
        internals.cuda_kernels(monkeypatch, kernels)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = torch.randn(SHAPE)
    expected, keep = oracle.dropout(x, seed=5, **options)
    there = x.to(device, copy=True).requires_grad_()
    with caplog.at_level(logging.WARNING, "msgdrop_numba"):
        for _ in range(2):
            there.grad = None
            y, mask = message_dropout(there, return_mask=True, **{"p": 0.5, "seed": 5, **options})
            equal(y.detach(), expected)
            equal(mask, keep)
            y.backward(x.to(device))
            equal(there.grad, oracle.dropout(x, seed=5, **{**options, "fill": 0.0})[0])
            if "message_dims" not in options:
                told = {"p": 0.5, **mask_alone(options)}
                equal(keep_mask(SHAPE[:2], seed=5, device=device, **told), keep)
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


@pytest.mark.usefixtures("reset_cuda")
def test_the_log_line_without_numba_cuda(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "msgdrop_numba.kernels.cuda_launch", None)  # importing it fails
    monkeypatch.delattr(sys.modules["msgdrop_numba.kernels"], "cuda_launch", raising=False)
    with caplog.at_level(logging.WARNING, "msgdrop_numba"):
        assert torch_cuda.obstacle(torch.device("cuda:0"))
        assert torch_cuda.obstacle(torch.device("cuda:0"))
    (record,) = caplog.records
    assert "numba-cuda is missing or too old" in record.getMessage()
    assert 'pip install "msgdrop_numba[cuda]"' in record.getMessage()


@pytest.mark.usefixtures("reset_cuda")
def test_no_log_line_on_rocm(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert torch_cuda.obstacle(torch.device("cuda:0"))
    assert not caplog.records


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lengths": torch.ones(3, dtype=torch.int64, device="meta")}, ValueError, "lengths must be on .* meta"),
        ({"keys": torch.ones(3, dtype=torch.int64, device="meta")}, ValueError, "keys must be on .* meta"),
        ({"protect": torch.ones(7, dtype=torch.bool, device="meta")}, ValueError, "protect must be on .* meta"),
        ({"positions": torch.ones(7, dtype=torch.int64, device="meta")}, ValueError, "positions must be on .* meta"),
        ({"protect": torch.ones(7)}, TypeError, "protect must"),
        ({"positions": torch.ones(7)}, TypeError, "positions must be integers"),
        ({"positions": torch.ones(3, dtype=torch.int64)}, ValueError, "positions must"),
        ({"prefix": 8}, ValueError, "prefix must be at most 7"),
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
    ids=[*"abcdefghijklmnopqrstu"],
)
def test_bad_input_leaves_all_as_it_was(options, error, match, device):
    x = torch.randn(SHAPE, device=device)
    before = x.clone()
    with pytest.raises(error, match=match):
        message_dropout(x, **{"p": 0.5, "inplace": "out" not in options, **options})
    assert torch.equal(x, before)


def test_generators_of_another_device():
    for other in ("cpu", "cuda:1"):
        with pytest.raises(ValueError, match=f"generator must be on cuda:0, as x is, but it is on {other}"):
            tensors.check_generator(SimpleNamespace(device=torch.device(other)), torch.device("cuda:0"))
    tensors.check_generator(SimpleNamespace(device=torch.device("cuda:0")), torch.device("cuda:0"))


def test_arguments_on_another_device():
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"lengths must be on cpu, as x is, or on the CPU, but it is on meta: move it"):
        message_dropout(x, lengths=torch.ones(3, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="generator must be on meta"):
        message_dropout(x.to("meta"), generator=torch.Generator())
    with pytest.raises(ValueError, match="keys must be on cpu"):
        keep_mask((3, 7), seed=1, keys=torch.ones(3, dtype=torch.int64, device="meta"), device="cpu")


def test_host_arrays_are_refused_while_a_graph_is_captured(monkeypatch):
    internals.captured_device(monkeypatch, 0)
    with pytest.raises(ValueError, match="lengths must be on cuda:0 while a CUDA graph is captured"):
        tensors.lengths_on([1, 2, 3], (3, 7), torch.device("cuda:0"))
