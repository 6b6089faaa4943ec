"""Ways to hold the memory of an output whose tensor or array is gone, and how to read what lies there."""

from __future__ import annotations

import ctypes
import functools
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow
import torch


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.saved_tensors[0].sum(), None


def _graph(y: torch.Tensor) -> Callable[[], Any]:
    """Only the graph of an operation holds y, saved for backward."""
    weight = torch.ones(y.shape, requires_grad=True)
    out = (weight * y).sum()
    return lambda: torch.autograd.grad(out, weight, retain_graph=True)[0]


def _own_function(y: torch.Tensor) -> Callable[[], Any]:
    weight = torch.ones((), requires_grad=True)
    out = _Saved.apply(weight, y)
    return lambda: torch.autograd.grad(out, weight, retain_graph=True)[0]


def _local_to_a_thread(y: torch.Tensor) -> Callable[[], Any]:
    local = threading.local()
    local.y = y[1:]
    return lambda: local.y.clone()


def _in_an_error(y: torch.Tensor) -> Callable[[], Any]:
    def fail(held: torch.Tensor) -> None:
        raise ValueError(held.ndim)

    try:
        fail(y)
    except ValueError as error:
        traceback = error.__traceback__
        assert traceback is not None
        assert traceback.tb_next is not None
        frame = traceback.tb_next.tb_frame
        return lambda: frame.f_locals["held"].clone()


def _set_into(y: torch.Tensor) -> Callable[[], Any]:
    other = torch.empty(0).set_(y.untyped_storage(), 0, y.shape, y.stride())
    return lambda: other.clone()


def _module(y: torch.Tensor) -> Callable[[], Any]:
    module = torch.nn.Module()
    module.register_buffer("y", y[:, 1:])
    return lambda: module.y.clone()


def _gradient(y: torch.Tensor) -> Callable[[], Any]:
    leaf = torch.zeros(y.shape, requires_grad=True)
    leaf.grad = y
    return lambda: leaf.grad.clone()


def _read(held: Any) -> Callable[[], Any]:
    return lambda: np.array(held, copy=True)


# Each takes an output, and gives back a function that copies what it holds.
TENSORS: dict[str, Callable[[torch.Tensor], Callable[[], Any]]] = {
    "tensor": lambda y: y.clone,
    "slice": lambda y: y[3:5].clone,
    "one element": lambda y: y.view(-1)[int(y.abs().argmax())].clone,
    "detached": lambda y: y.detach().clone,
    "data": lambda y: y.data.clone,
    "transposed": lambda y: y.transpose(0, 2).clone,
    "expanded": lambda y: y[:, None].expand(-1, 3, -1, -1).clone,
    "unfolded": lambda y: y.unfold(2, 3, 2).clone,
    "chunk": lambda y: y.chunk(4)[3].clone,
    "as_strided": lambda y: y.as_strided((7,), (3,), 5).clone,
    "dtype view": lambda y: y.view(torch.int32).clone,
    "complex view": lambda y: torch.view_as_complex(y.unflatten(-1, (-1, 2))).clone,
    "storage": lambda y: _all_of(y.untyped_storage()),
    "set into another": _set_into,
    "parameter": lambda y: torch.nn.Parameter(y).detach().clone,
    "buffer of a module": _module,
    "gradient": _gradient,
    "saved for backward": _graph,
    "saved by a function": _own_function,
    "jagged": lambda y: torch.nested.nested_tensor_from_jagged(y, torch.tensor([0, 2, y.shape[0]])).values().clone,
    "sparse": lambda y: functools.partial(
        lambda sparse: sparse._values().clone(),
        torch.sparse_coo_tensor(torch.arange(len(y))[None], y, check_invariants=False),
    ),
    "array": lambda y: y.numpy().copy,
    "array slice": lambda y: y.numpy()[1:, ::2].copy,
    "memoryview": lambda y: memoryview(y.numpy()).tobytes,
    "dlpack": lambda y: torch.from_dlpack(torch.utils.dlpack.to_dlpack(y)).clone,
    "NumPy by dlpack": lambda y: np.from_dlpack(y).copy,
    "Arrow": lambda y: _read(pyarrow.array(y.numpy().ravel()).to_numpy()),
    "local to a thread": _local_to_a_thread,
    "traceback": _in_an_error,
    "partial": lambda y: functools.partial(torch.clone, y[2:]),
    "closed over": lambda y: lambda: y.flatten()[5:].clone(),
}

ARRAYS: dict[str, Callable[[np.ndarray], Callable[[], Any]]] = {
    "array": lambda y: y.copy,
    "slice": lambda y: y[3:5].copy,
    "reversed": lambda y: y[::-1, :, ::3].copy,
    "transposed": lambda y: y.T.copy,
    "dtype view": lambda y: y.view(np.int32).copy,
    "subclass": lambda y: y.view(np.recarray).copy,
    "as_strided": lambda y: np.lib.stride_tricks.as_strided(y, (7,), (12,)).copy,
    "broadcast": lambda y: np.broadcast_to(y, (2, *y.shape)).copy,
    "flat": lambda y: y.flat.copy,
    "memoryview": lambda y: memoryview(y)[2:].tobytes,
    "base": lambda y: lambda base=y.base: bytes(memoryview(base)[:4096]),  # type: ignore[misc]
    "slice of the base": lambda y: memoryview(y.base).cast("B")[8:4096].tobytes,
    "array of the base": lambda y: np.frombuffer(y.base, np.int32)[8:1024].copy,
    "tensor": lambda y: torch.from_numpy(y).clone,
    "tensor slice": lambda y: torch.from_numpy(y)[2:].clone,
    "dlpack": lambda y: np.from_dlpack(y).copy,
    "interface": lambda y: _read(np.asarray(_Interface(y))),
    "pickled out of band": lambda y: _out_of_band(y),
    "Arrow": lambda y: _read(pyarrow.array(y.ravel()).to_numpy()),
    "Arrow buffer": lambda y: pyarrow.py_buffer(y).to_pybytes,
    "ctypes": lambda y: lambda c=y.ctypes: ctypes.string_at(c.data, 4096),  # type: ignore[misc]
    "iterator": lambda y: functools.partial(_first_operand, np.nditer(y)),
    "finalizer of another": lambda y: _kept_by_finalizer(y),
}


def _all_of(storage: torch.UntypedStorage) -> Callable[[], Any]:
    return lambda: torch.empty(0).set_(storage, 0, (storage.nbytes() // 4,)).clone()  # type: ignore[call-overload]


def _first_operand(iterator: Any) -> np.ndarray:
    return iterator.operands[0].copy()


class _Interface:
    def __init__(self, y: np.ndarray) -> None:
        self._y, self.__array_interface__ = y, y.__array_interface__


def _out_of_band(y: np.ndarray) -> Callable[[], Any]:
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(y, protocol=5, buffer_callback=buffers.append)
    return lambda: pickle.loads(data, buffers=buffers).copy()


class _Thing:
    pass


def _kept_by_finalizer(y: np.ndarray) -> Callable[[], Any]:
    thing = _Thing()
    weakref.finalize(thing, lambda held: None, y).atexit = False
    return lambda thing=thing, held=y[1:]: held.copy()  # type: ignore[misc]
