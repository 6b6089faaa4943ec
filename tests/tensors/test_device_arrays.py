"""Objects with `__cuda_array_interface__`: CuPy's and numba's on a GPU, else one over host memory in CuPy's place."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import naive
import numpy as np
import pytest
import torch
from helpers import internals, oracle, stand_in
from helpers.cases import SHAPE, no_gpu

from msgdrop_numba import message_dropout
from msgdrop_numba.tensors import device_arrays


class Host:
    """NumPy memory that says it lies on a device."""

    def __init__(self, array: Any, read_only: bool = False, stream: int | None = None, **more: Any) -> None:
        self.array = np.asarray(array)
        described = self.array.__array_interface__
        self.__cuda_array_interface__ = {
            "version": 3, "shape": described["shape"], "typestr": described["typestr"],
            "strides": described["strides"], "data": (described["data"][0], read_only), "stream": stream, **more,
        }  # fmt: skip


Host.__module__ = "cupy._core"


def import_host(described: Any) -> torch.Tensor:
    interface = dict(described.__cuda_array_interface__)
    if any(step < 0 for step in interface["strides"] or ()):
        raise ValueError("negative strides")  # as torch says of memory on a device
    described.__array_interface__ = {name: interface[name] for name in ("shape", "typestr", "strides", "data")}
    described.__array_interface__["version"] = 3
    return torch.from_numpy(np.asarray(described))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> type[Host]:
    stand_in.install(monkeypatch, stand_in.Kernels())
    internals.device_arrays(monkeypatch, import_host)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(asarray=lambda tensor: Host(tensor.numpy())))
    return Host


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.int16, np.uint8, np.bool_])
def test_values(dtype, host):
    x = (np.random.default_rng(1).standard_normal(SHAPE) * 9).astype(dtype)
    keys, lengths = np.array([5, -3, 2]), np.array([7, 0, 5])
    want, keep = oracle.dropout(x, seed=3, keys=keys, lengths=lengths)
    there = host(x.copy())
    for given in ({"keys": keys, "lengths": lengths}, {"keys": host(keys), "lengths": host(lengths)}):
        y, mask = message_dropout(there, 0.5, seed=3, return_mask=True, **given)
        assert type(y) is type(mask) is Host
        assert y.array.dtype == dtype
        assert np.array_equal(y.array, want)
        assert np.array_equal(mask.array, keep)
        assert np.array_equal(there.array, x)
        out = host(np.zeros_like(x))
        assert message_dropout(there, 0.5, seed=3, out=out, **given) is out
        assert np.array_equal(out.array, want)
    assert message_dropout(there, 0.5, inplace=True, seed=3, keys=keys, lengths=lengths) is there
    assert np.array_equal(there.array, want)
    assert message_dropout(there, 0.0) is there
    assert message_dropout(there, training=False) is there


def test_p_seed_and_fill_on_the_device(host):
    x, p, fill = np.ones(SHAPE, np.float32), np.linspace(0, 1, 7), np.arange(4, dtype=np.float32)
    y = message_dropout(host(x), host(p), seed=host(np.array(9)), fill=host(fill))
    assert np.array_equal(y.array, oracle.dropout(x, p, seed=9, fill=fill)[0])


def test_who_takes_part_on_the_device(host):
    x = np.random.default_rng(1).standard_normal(SHAPE)
    told = {"protect": np.arange(7) % 3 == 0, "positions": np.arange(21).reshape(3, 7) // 2}
    y = message_dropout(host(x), (0.2, 0.9), seed=9, scale=True, **{name: host(value) for name, value in told.items()})
    assert np.array_equal(y.array, oracle.dropout(x, (0.2, 0.9), seed=9, scale=True, **told)[0])


def test_strided(host):
    base = np.random.default_rng(1).standard_normal((7, 3, 8)).astype(np.float32)
    keep = naive.keep_mask(SHAPE[:2], 0.5, seed=1)
    for x in (base.transpose(1, 0, 2)[:, :, ::2], base.transpose(1, 0, 2)[..., :4], base[:3, :, :4].swapaxes(1, 2)):
        want, _ = oracle.dropout(x, seed=1)
        assert np.array_equal(message_dropout(host(x), seed=1).array, want)
    with pytest.raises(ValueError, match=r"strides .* is not .*: copy it first"):
        message_dropout(host(base[::-1]), seed=1)
    assert keep.any()


def test_read_only(host):
    x = np.ones(SHAPE, np.float32)
    want, _ = oracle.dropout(x, seed=1)
    assert np.array_equal(message_dropout(host(x, read_only=True), seed=1).array, want)
    with pytest.raises(ValueError, match="x must be writable, but got a read-only Host"):
        message_dropout(host(x, read_only=True), inplace=True)
    with pytest.raises(ValueError, match="out must be writable"):
        message_dropout(host(x), out=host(x.copy(), read_only=True))
    assert (x == 1).all()


def test_what_is_refused(host):
    x = host(np.ones(SHAPE, np.float32))
    with pytest.raises(TypeError, match="masked"):
        message_dropout(host(np.ones(SHAPE), mask=x))
    with pytest.raises(TypeError, match="out must be a tensor"):
        message_dropout(x, out=np.ones(SHAPE, np.float32))
    other = type("Array", (Host,), {"__module__": "elsewhere"})
    with pytest.raises(TypeError, match="CuPy or numba device array, but got Array; make it a tensor first"):
        message_dropout(other(np.ones(SHAPE)))


class Stream:
    """What torch does with streams, written down."""

    log: list[str]

    def __init__(self, name: Any, device: Any = None) -> None:
        self.name = name

    def wait_stream(self, other: Any) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Stream) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


@pytest.fixture
def log(host, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Stream.log = []
    entered = [Stream("current")]

    @contextmanager
    def stream(used: Stream) -> Iterator[None]:
        entered.append(used)
        Stream.log.append(f"on {used.name}")
        yield
        entered.pop()

    internals.before_tensor_calls(monkeypatch, lambda: Stream.log.append("work"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream("default"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: entered[-1])
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return Stream.log


@pytest.mark.parametrize("stream", [None, 1, 2, 4711])
def test_the_stream_of_the_object(stream, host, log):
    message_dropout(host(np.ones(SHAPE), stream=stream), keys=host(np.arange(3), stream=stream))
    name = {1: "default"}.get(stream, stream)
    assert log == ([] if stream is None else [f"on {name}"]) + ["work"]


def test_the_streams_of_the_other_arguments(host, log):
    out = host(np.ones(SHAPE), stream=55)
    keys = host(np.arange(3), stream=99)
    message_dropout(host(np.ones(SHAPE), stream=4711), keys=keys, lengths=host(np.ones(3, int)), out=out)
    assert log[0] == "on 4711"
    assert sorted(log[1:3]) == ["4711 waits for 55", "4711 waits for 99"]
    assert log[3:] == ["work", "55 waits for 4711"]
    log.clear()
    message_dropout(host(np.ones(SHAPE)), keys=keys)
    assert log == ["current waits for 99", "work"]


def test_no_gradient_of_a_tensor_beside_it(host):
    fill = torch.ones(4, requires_grad=True)
    assert type(message_dropout(host(np.ones(SHAPE, np.float32)), seed=1, fill=fill)) is Host


def test_memory_of_another_device_is_refused(monkeypatch):
    copied = torch.ones(SHAPE)
    monkeypatch.setattr(torch, "as_tensor", lambda described, device: copied)
    with pytest.raises(ValueError, match="x must lie on the current device"):
        device_arrays.as_tensor("x", Host(np.ones(SHAPE)))


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_cupy(own_stream):
    cupy = pytest.importorskip("cupy", reason="needs CuPy")
    x = np.random.default_rng(1).standard_normal((64, 512, 128)).astype(np.float32)
    want = message_dropout(x, 0.3, seed=3, keys=np.arange(64))
    with cupy.cuda.Stream(non_blocking=True) if own_stream else nullcontext():
        there = cupy.asarray(x) * 2
        y, mask = message_dropout(there, 0.3, seed=3, keys=cupy.arange(64), return_mask=True)
        assert isinstance(y, cupy.ndarray)
        assert np.array_equal(cupy.asnumpy(y / 2), want)
        assert mask.dtype == bool
        assert message_dropout(there, 0.3, inplace=True, seed=3) is there
        assert np.array_equal(cupy.asnumpy(there), cupy.asnumpy(y))
        out = cupy.empty_like(there)
        assert message_dropout(cupy.asarray(x), 0.3, seed=3, out=out) is out
        assert np.array_equal(cupy.asnumpy(out), want)


@pytest.mark.gpu
@no_gpu
def test_numba_arrays():
    from numba import cuda

    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    there = cuda.to_device(x)
    y, mask = message_dropout(there, seed=3, return_mask=True)
    want, keep = message_dropout(x, seed=3, return_mask=True)
    assert type(y) is type(there)
    assert np.array_equal(y.copy_to_host(), want)
    assert np.array_equal(mask.copy_to_host(), keep)
    assert message_dropout(there, inplace=True, seed=3) is there
    assert np.array_equal(there.copy_to_host(), want)
