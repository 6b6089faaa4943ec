"""The one place for torch's private names, each with what it saves and what happens where another torch lacks it.

All of them are in torch 2.9 and 2.13, the oldest and the newest that are tested.

`_C._dispatch_keys`, `_C.DispatchKey`, `_C.DispatchKeySet`, `_C._len_torch_dispatch_stack`, `_C._is_tracing`,
`_C._functorch.peek_interpreter_stack`, `forward_ad._current_level`
    Tell an ordinary tensor from those whose memory may not be read by address; no public name does. Without one of them
    nothing is known to be ordinary: all tensors take torch's operations, right and slower.
`_C._functorch.CInterpreter`
    Tells a transform within compiled code, where the mask must come from torch's operations. Without it: as above.
`compiler._is_exporting_flag`
    What `torch.compiler.is_exporting()` returns, which Dynamo before torch 2.12 takes to be true in all that it
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
`autograd.Function._backward_cls`
    1 us a backward: no look for another name of `backward`. Without: that look.
The base's `apply` of an `autograd.Function`
    1.2 us a call: no search for transforms, which no plain tensor is in. Without: `apply` itself.
`_C._dynamo.guards.TensorGuards`
    What compiled code asks before it runs, whether tensors are what it was compiled for: all samples of a batch are
    asked in one call, in a third of the time, and so is what the usual call asks of a tensor. Without it, or where it
    says no, getters are asked; a call with `out=` takes all steps.
`UntypedStorage._new_shared`, `Tensor._is_view`, `Tensor._base`, `NestedTensor._ragged_idx`
    What torch's own default collate, its in-place rules and its nested tensors go by. Without one, those calls raise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from operator import attrgetter
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx import traceback
from torch.fx.experimental import proxy_tensor
from torch.utils.checkpoint import CheckpointPolicy

try:
    _Key, _KeySet = torch._C.DispatchKey, torch._C.DispatchKeySet

    def _ordinary(device: Any, autocast: Any, autograd: Any) -> tuple[Any, Any]:
        """The keys of an ordinary tensor, and of one made in inference mode."""
        inference = _KeySet(device) | _KeySet(autocast)
        return inference | _KeySet(_Key.ADInplaceOrView) | _KeySet(autograd), inference

    _PLAIN = _ordinary(_Key.CPU, _Key.AutocastCPU, _Key.AutogradCPU)
    _PLAIN_CUDA = _ordinary(_Key.CUDA, _Key.AutocastCUDA, _Key.AutogradCUDA)
    _dispatch_keys: Any = torch._C._dispatch_keys
    _modes = torch._C._len_torch_dispatch_stack
    _is_tracing = torch._C._is_tracing
    _transform = torch._C._functorch.peek_interpreter_stack
except AttributeError:  # another torch: nothing is known to be plain
    _dispatch_keys = None


_is_compiling = torch.compiler.is_compiling
_is_traced = torch.compiler.is_dynamo_compiling  # asked for less: what else compiles has a mode
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def in_transform() -> bool:
    """Whether a transform of torch.func is under way, here or in what is being compiled.

    To the compiler, what stands for "none" isn't None.
    """
    return _dispatch_keys is None or isinstance(_transform(), torch._C._functorch.CInterpreter)


def is_exporting() -> bool:
    """Whether a program is being exported, which must not need this package."""
    return torch.compiler._is_exporting_flag if _HAS_EXPORTING_FLAG else torch.compiler.is_exporting()


_HAS_EXPORTING_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


@contextmanager
def drawn_once() -> Iterator[None]:
    """What is traced here and draws, backward takes from forward, whatever else the partitioner has it compute again.

    Where it must compute all again, with a budget of 0, it draws by the state that the generator had in forward.
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
    """Whether the graph being traced is to be one of forward and backward; in others nothing may be computed again."""
    mode = None if _proxy_mode is None else _proxy_mode()
    nodes = () if mode is None else mode.tracer.graph.nodes
    inputs = takewhile(lambda node: node.op == "placeholder", nodes)
    return _proxy_mode is None or any(node.name.startswith("tangents") for node in inputs)


_proxy_mode: Any = getattr(proxy_tensor, "get_proxy_mode", None)
_current_meta: Any = getattr(traceback, "get_current_meta", dict)


def is_eager() -> bool:
    """Whether operations run as they are called: no tracing, vmap, forward AD or mode."""
    # Asked first: Dynamo can't follow the rest. Last: a tensor from outside a transform looks plain inside it.
    return not _is_compiling() and not is_watched() and _transform() is None


def is_watched() -> bool:
    """Whether a mode, a tracer or forward AD sees all that is asked of tensors, of which these say nothing.

    Of a transform of torch.func, their keys tell.
    """
    return (
        _is_traced() or _dispatch_keys is None or _modes() > 0 or _is_tracing() or forward_ad._current_level >= 0
    )  # fmt: skip


def not_eager_because() -> str:
    """Why `is_eager` says no; empty: it says yes."""
    if _is_compiling():
        return "torch.compile or torch.export traces the call"
    if _dispatch_keys is None:
        return f"torch {torch.__version__} lacks the names that tell ordinary tensors from others"
    if _modes():
        return "a torch dispatch mode is active"
    if _is_tracing():
        return "torch.jit traces the call"
    if forward_ad._current_level >= 0:
        return "a level of forward AD is open"
    return "" if _transform() is None else "a transform of torch.func is under way"


def all_alike(tensors: list[Any], varying: bool) -> bool:
    """Whether these are ordinary CPU tensors in C order, alike in dtype and shape, where operations are eager.

    Asked of a whole batch at once: asking each takes longer than to copy it, where it is small.

    Args:
        varying: their first dims may differ.
    """
    if {*map(type, tensors)} != {torch.Tensor} or not all(map(has_sizes, tensors)) or not is_eager():
        return False
    first = tensors[0]
    shape = first.shape
    guard_key = (
        len(tensors),
        varying,
        len(shape),
        shape[varying:],
        first.dtype,
        first.requires_grad,
        torch.is_inference_mode_enabled(),
    )
    guards = _guards.get(guard_key)
    if guards is None and _TensorGuards is not None and len(shape) and is_plain_too(first):
        if len(_guards) >= 256:
            _guards.clear()
        guards = _guards[guard_key] = _guards_of(tensors[:1] * len(tensors), varying)
    # It says no, too, where a tensor comes twice or the thread's state is another one than when it was made.
    return (guards is not None and guards.check(*tensors)) or _alike_by_getters(tensors, varying)


def has_sizes(tensor: torch.Tensor) -> bool:
    """False for nested tensors, and for the batched ones of a vmap over them, which don't say that they are nested.

    TensorGuards must not be asked about those: they look at sizes in C++, where the error ends the process.
    """
    try:
        tensor.shape  # noqa: B018
    except RuntimeError:
        return False
    return True


def _guards_of(tensors: list[Any], varying: bool, strides: tuple[int, ...] | None = None) -> Any:
    """What tells whether so many others are like these, which are alike: in C order, or with these strides."""
    shape = tensors[0].shape
    sizes: list[Any] = [*shape]
    steps: list[Any] = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))] if strides is None else [*strides]
    for dim in range(varying, len(shape)):
        if shape[dim] == 1 and strides is None:  # whatever its stride is
            steps[dim] = None
    sizes[:varying] = [None] * varying
    guard_key = {"dynamic_dims_sizes": [sizes] * len(tensors), "dynamic_dims_strides": [steps] * len(tensors)}
    return _TensorGuards(*tensors, **guard_key)


_TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
_guards: dict[Any, Any] = {}


def _alike_by_getters(tensors: list[Any], varying: bool) -> bool:
    """The same of tensors that have sizes, where operations are known to be eager.

    Of the tensors that only dispatch keys tell apart, a transform's wrappers refuse to give their address.
    """
    first = tensors[0]
    return (
        not first.is_quantized  # the others have its dtype, or are refused for that
        and all(map(_is_cpu, tensors))
        and set(map(_layout, tensors)) == {_strided}
        and set(map(_dtype, tensors)) == {first.dtype}
        and {shape[varying:] for shape in set(map(_shape, tensors))} == {first.shape[varying:]}
        and all(map(torch.Tensor.is_contiguous, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
        and not (first.is_complex() and any(map(torch.Tensor.is_conj, tensors)))
    )


_is_cpu, _layout, _dtype, _shape = map(attrgetter, ("is_cpu", "layout", "dtype", "shape"))
_strided = torch.strided


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a dense eager CPU tensor outside every transform."""
    return type(tensor) in _PLAIN_TYPES and is_eager() and _dispatch_keys(tensor) in _PLAIN


def is_plain_too(tensor: torch.Tensor) -> bool:
    """`is_plain`, where operations are known to be eager."""
    return type(tensor) in _PLAIN_TYPES and _dispatch_keys(tensor) in _PLAIN


def is_plain_cuda(tensor: torch.Tensor) -> bool:
    """The same on a CUDA device."""
    return type(tensor) in _PLAIN_TYPES and is_eager() and _dispatch_keys(tensor) in _PLAIN_CUDA


def not_plain_because(tensor: torch.Tensor) -> str:
    """Why neither `is_plain` nor `is_plain_cuda` says yes; empty: one of them does."""
    if type(tensor) not in _PLAIN_TYPES:
        return f"it is a {type(tensor).__name__}, a subclass of Tensor"
    if reason := not_eager_because():
        return reason
    if _dispatch_keys(tensor) in _PLAIN or _dispatch_keys(tensor) in _PLAIN_CUDA:
        return ""
    if tensor.is_nested or tensor.layout is not _strided:
        return f"its layout is {tensor.layout}"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"there are no kernels for the device {tensor.device.type}"
    return "it is conjugated, negated, quantised or wrapped by a transform"


def dense_address(tensor: torch.Tensor, strides: tuple[int, ...] | None = None) -> int:
    """Where the elements of a plain tensor in C order, or with these strides, lie; 0: it is none, or has none.

    Of a dtype known to be real, where operations are known to be eager. Asked by what a getter tells, in one function:
    dispatch keys cost more than a small tensor's kernel. Those without ordinary memory, which only keys tell apart,
    have no address, or refuse to be asked for it or for their order.
    """
    if type(tensor) not in _PLAIN_TYPES or not tensor.is_cpu or tensor.is_nested or tensor.is_neg():
        return 0
    try:
        lies = tensor.is_contiguous() if strides is None else tensor.stride() == strides
        return tensor.data_ptr() if lies else 0
    except RuntimeError:
        return 0


class Alike:
    """Where tensors of one shape and dtype lie, asked in one call of C what `dense_address` asks in ten.

    Attributes:
        strides: of those tensors; None: they lie in C order.
    """

    def __init__(self, strides: tuple[int, ...] | None = None) -> None:
        self.strides = strides
        # What tells those that need no gradient, and those that do; the latest first. Of several, since a tensor and a
        # parameter, or autocast and none, may take turns.
        self.checks: tuple[list[Any], list[Any]] = [], []

    def known(self, tensor: torch.Tensor) -> int:
        """The address of an eager tensor like one that `address` was asked for; 0: it is another."""
        if not has_sizes(tensor):
            return 0
        for check in self.checks[tensor.requires_grad]:
            if check(tensor):
                return tensor.data_ptr()
        return 0

    def address(self, tensor: torch.Tensor) -> int:
        """`dense_address` of a tensor of the one shape and dtype, where `is_watched` says no."""
        start = self.known(tensor)
        if start or _transform() is not None:
            return start
        start = dense_address(tensor, self.strides)
        if start and _TensorGuards is not None:
            checks = self.checks[tensor.requires_grad]
            checks[:] = [_guards_of([tensor], False, self.strides).check, *checks[: _STATES - 1]]
        return start


_STATES = 3


def raw_stream(device: int) -> int:
    """The current cudaStream_t of a CUDA device."""
    if _raw_stream is not None:
        return _raw_stream(device)  # type: ignore[no-any-return]
    return torch.cuda.current_stream(device).cuda_stream


_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def quick_apply(function: type[torch.autograd.Function]) -> Any:
    """A function's `apply` for plain tensors."""
    if hasattr(function, "_backward_cls"):
        function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


increment_versions: Any = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)


def shared_storage(nbytes: int) -> Any:
    """A storage that other processes can map."""
    return torch.UntypedStorage._new_shared(nbytes, device="cpu")


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd takes it for a view."""
    return tensor._is_view()


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that it is a view of; itself, if it is none."""
    return tensor._base if tensor._base is not None else tensor


def ragged_dim(tensor: torch.Tensor) -> int:
    """Which dim of a nested tensor is ragged."""
    return tensor._ragged_idx  # type: ignore[attr-defined,no-any-return]
