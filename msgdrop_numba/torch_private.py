"""The one place for torch's private names, each with what it saves and what happens where another torch lacks it.

All of them are in torch 2.9 and 2.13, the oldest and the newest that are tested.

`_C._dispatch_keys`, `_C.DispatchKey`, `_C.DispatchKeySet`, `_C._len_torch_dispatch_stack`, `_C._is_tracing`,
`_C._functorch.peek_interpreter_stack`, `forward_ad._current_level`
    Tell an ordinary tensor from those whose memory may not be read by address; no public name does. Without one of them
    every tensor counts as unreadable: all tensors take torch's operations, right and slower.
`_C._functorch.CInterpreter`
    Tells a transform within compiled code, where the mask must come from torch's operations. Without it: as above.
`compiler._is_exporting_flag`
    The result of `torch.compiler.is_exporting()`, which Dynamo before torch 2.12 takes to be true in all that it
    compiles: compiling Philox takes minutes. Without it: the function.
`fx.traceback.get_current_meta`, its key "recompute", `_functorch.config.activation_memory_budget`
    Tell the compiler that a seed drawn in forward isn't drawn again in backward. Without: a memory budget below 1 draws
    another, and gradients are wrong.
`fx.experimental.proxy_tensor.get_proxy_mode`, and that a gradient's placeholder is named "tangents"
    Tell whether the graph being traced has a backward. Without: one that has none can't be compiled at a budget of 0.
`_C._cuda_getCurrentRawStream`
    1 us a launch. Without: `torch.cuda.current_stream`.
`_C._increment_version`
    0.3 us a call in place. Without: `torch.autograd.graph.increment_version`.
`autograd.Function._backward_cls`, and the base's `apply` of an `autograd.Function`
    1 us a backward and 1.2 us a call: no look for another name of `backward`, no search for transforms, which no
    readable tensor is in. Without: that look, and `apply` itself.
`_C._dynamo.guards.TensorGuards`
    Compiled code asks them whether tensors are what it was compiled for. One call recognises a whole batch, or a tensor
    like the last one, in a third of the time of the getters. Without it: `unreadable_reason` of each tensor.
`UntypedStorage._new_shared`, `Tensor._is_view`, `Tensor._base`, `NestedTensor._ragged_idx`
    Used by torch's own default collate, its in-place rules and its nested tensors. Without one, those calls raise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx import traceback
from torch.fx.experimental import proxy_tensor
from torch.utils.checkpoint import CheckpointPolicy

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)

try:
    _Key, _KeySet = torch._C.DispatchKey, torch._C.DispatchKeySet
    _READABLE = []  # the dispatch keys of ordinary tensors, and of those made in inference mode
    for _device in "CPU", "CUDA":
        _inference = _KeySet(getattr(_Key, _device)) | _KeySet(getattr(_Key, f"Autocast{_device}"))
        _autograd = _KeySet(_Key.ADInplaceOrView) | _KeySet(getattr(_Key, f"Autograd{_device}"))
        _READABLE += [_inference | _autograd, _inference]
    _dispatch_keys: Any = torch._C._dispatch_keys
    _modes = torch._C._len_torch_dispatch_stack
    _is_tracing = torch._C._is_tracing
    _transform = torch._C._functorch.peek_interpreter_stack
except AttributeError:  # another torch: nothing is known to be readable
    _dispatch_keys = None

_is_compiling = torch.compiler.is_compiling


def unreadable_reason(tensor: torch.Tensor) -> str:
    """Why kernels may not read a tensor by its address; empty: they may, on the CPU or a CUDA device.

    This one function decides and explains, for every kind of call.
    """
    if type(tensor) not in _PLAIN_TYPES:
        return f"it is a {type(tensor).__name__}, a subclass of Tensor"
    reason = watched_reason()
    if (
        not reason and _transform() is None and _dispatch_keys(tensor) in _READABLE
    ):  # few calls: small gradients feel each
        return ""
    if reason := not_eager_reason():
        return reason
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"there are no kernels for the device {tensor.device.type}"
    return "it is conjugated, negated, quantised or wrapped by a transform"


def has_memory(tensor: torch.Tensor) -> bool:
    """True if a tensor tells its own address and strides, even where operations aren't eager. Not for traced code."""
    return _dispatch_keys is not None and _dispatch_keys(tensor) in _READABLE


def not_eager_reason() -> str:
    """Why operations don't run as they are called: tracing, a mode, forward AD, a transform; empty: they do."""
    if reason := watched_reason():
        return reason
    return "" if _transform() is None else "a transform of torch.func is under way"  # a tensor from outside looks plain


def watched_reason() -> str:
    """`not_eager_reason` but for transforms of torch.func. If it is empty, a guard is enough to recognise a tensor.

    A guard compares dispatch keys, and these show a transform.
    """
    if _is_compiling():  # asked first: Dynamo can't follow the rest
        return "torch.compile or torch.export traces the call"
    if _dispatch_keys is None:
        return f"torch {torch.__version__} lacks the names that tell ordinary tensors from others"
    if _modes() > 0:
        return "a torch dispatch mode is active"
    if _is_tracing():
        return "torch.jit traces the call"
    return "a level of forward AD is open" if forward_ad._current_level >= 0 else ""


def make_guard(tensors: list[torch.Tensor], varying: bool = False) -> Any:
    """A function of as many tensors that returns True if they are like these readable ones; None: torch has no guards.

    It compares dispatch keys, dtypes, shapes, strides and requires_grad, and the thread's grad mode and autocast.
    It also fails if a tensor appears twice. Every tensor must have sizes, see `arguments.has_sizes`.

    Args:
        tensors: all of one shape, dtype and strides, or the same one several times.
        varying: the first dims may differ; the tensors are in C order.
    """
    if _TensorGuards is None:
        return None
    shape = tensors[0].shape
    sizes: list[Any] = [*shape]
    strides: list[Any] = [*tensors[0].stride()]
    if tensors[0].is_contiguous():
        strides = [None if n == 1 else math.prod(shape[dim + 1 :]) for dim, n in enumerate(shape)]
    if varying:
        sizes[0], strides[0] = None, math.prod(shape[1:])
    expected = {"dynamic_dims_sizes": [sizes] * len(tensors), "dynamic_dims_strides": [strides] * len(tensors)}
    return _TensorGuards(*tensors, **expected).check


_TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)


def in_transform() -> bool:
    """True if a transform of torch.func is under way, here or in the code that is being compiled.

    To the compiler, the object that stands for "none" isn't None.
    """
    return _dispatch_keys is None or isinstance(_transform(), torch._C._functorch.CInterpreter)


def is_exporting() -> bool:
    """True while a program is being exported, which must not need this package."""
    return torch.compiler._is_exporting_flag if _HAS_EXPORTING_FLAG else torch.compiler.is_exporting()


_HAS_EXPORTING_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


@contextmanager
def drawn_once() -> Iterator[None]:
    """Backward takes the seeds drawn within this context from forward, whatever else the partitioner computes again.

    With a memory budget of 0 it must compute all again: then it draws by the state that the generator had in forward.
    """
    meta = _current_meta()
    before = meta.get("recompute")
    again = _memory_budget(meta) == 0 and _traces_backward()
    meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE if again else CheckpointPolicy.MUST_SAVE
    try:
        yield
    finally:
        meta.pop("recompute", None)
        if before is not None:
            meta["recompute"] = before


def _memory_budget(meta: dict[str, Any]) -> float:
    """The part of its activations that the graph being traced may keep for backward, of the whole graph or a region."""
    region = (meta.get("custom") or {}).get(getattr(traceback, "MEMORY_BUDGET_ANNOTATION_KEY", ""))
    return getattr(torch._functorch.config, "activation_memory_budget", 1.0) if region is None else region


def _traces_backward() -> bool:
    """True if the graph being traced has a backward; in other graphs nothing may be computed again."""
    mode = None if _proxy_mode is None else _proxy_mode()
    nodes = () if mode is None else mode.tracer.graph.nodes
    inputs = takewhile(lambda node: node.op == "placeholder", nodes)
    return _proxy_mode is None or any(node.name.startswith("tangents") for node in inputs)


_proxy_mode: Any = getattr(proxy_tensor, "get_proxy_mode", None)
_current_meta: Any = getattr(traceback, "get_current_meta", dict)


def raw_stream(device: int) -> int:
    """The current cudaStream_t of a CUDA device."""
    if _raw_stream is not None:
        return _raw_stream(device)  # type: ignore[no-any-return]
    return torch.cuda.current_stream(device).cuda_stream


_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def quick_apply(function: type[torch.autograd.Function]) -> Any:
    """The `apply` of a function whose tensors are all readable."""
    if hasattr(function, "_backward_cls"):
        function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


increment_versions: Any = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)


def shared_storage(nbytes: int) -> Any:
    """A storage that other processes can map."""
    return torch.UntypedStorage._new_shared(nbytes, device="cpu")


def is_view(tensor: torch.Tensor) -> bool:
    """True if autograd takes it for a view."""
    return tensor._is_view()


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that it is a view of; itself, if it is none."""
    return tensor._base if tensor._base is not None else tensor


def ragged_dim(tensor: torch.Tensor) -> int:
    """The ragged dim of a nested tensor."""
    return tensor._ragged_idx  # type: ignore[attr-defined,no-any-return]
