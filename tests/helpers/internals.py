"""The package's inner names that tests patch, watch or clear, each in one place: what follows a change of theirs.

Nothing of the package is imported before it is asked for: the simulator's tests need no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

# ---- the CPU's kernels


def cut_into(patch: pytest.MonkeyPatch, parts: int | Callable[[], int]) -> None:
    """Every kernel call is cut into so many parts, however small it is."""
    from msgdrop_numba.call import threads

    patch.setattr(threads, "_budget", parts if callable(parts) else lambda: parts)
    patch.setattr(threads, "PARALLEL_BYTES", 0)


def thread_layer(patch: pytest.MonkeyPatch, *, usable: bool, forked: bool, threads: int) -> None:
    """What the process knows of its threading layer, and how many threads numba has."""
    from msgdrop_numba.call import threads as module

    layer = module._Layer(forked)
    if not forked:
        layer.usable = usable
    patch.setattr(module, "_layer", layer)
    patch.setattr(module.config, "NUMBA_NUM_THREADS", threads)


def compiles() -> bool:
    """Whether kernels are compiled: else they take a thousand times as long."""
    from numba import config

    return not config.DISABLE_JIT


def kernel_cache() -> Any:
    """A cache of compiled code that lacks all private names."""
    from msgdrop_numba.kernels import _jit

    return _jit._Cache.__new__(_jit._Cache)


def unchecked_lengths(patch: pytest.MonkeyPatch, lengths: Any) -> None:
    """Lengths reach the kernels as nobody who looks at them would let them."""
    from msgdrop_numba.call import arguments

    patch.setattr(arguments, "row_lengths", lambda *_: lengths)


def stream_everything(patch: pytest.MonkeyPatch) -> None:
    """Write all outputs past the cache; with `reset_plans`."""
    from msgdrop_numba.call import plan

    patch.setattr(plan, "STREAM_BYTES", 0)


def reset_plans() -> None:
    """Forget plans that were made, the recent ones too."""
    from msgdrop_numba.call import plan

    plan.reset()


def watch_launches(patch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows with each call of a kernel that drops, by its arguments' names."""
    from msgdrop_numba import arrays
    from msgdrop_numba.call import threads
    from msgdrop_numba.tensors.backends import HOST

    seen: list[Any] = []
    names = inspect.signature(threads.launch)

    def watched(*arguments: Any) -> Any:
        seen.append(SimpleNamespace(**names.bind(*arguments).arguments))
        return threads.launch(*arguments)

    patch.setattr(arrays, "launch", watched)
    patch.setattr(HOST, "launch", watched, raising=False)
    return seen


# ---- which backend takes a tensor


def no_tensors_yet(patch: pytest.MonkeyPatch) -> None:
    """Call as if no tensor had come before."""
    import torch

    from msgdrop_numba import functional

    for known in (functional._libraries, functional._fast_paths):
        for kind in (torch.Tensor, torch.nn.Parameter):
            patch.delitem(known, kind, raising=False)


def no_host_tensors(patch: pytest.MonkeyPatch) -> None:
    """The host's kernels read no tensor: all take torch's operations."""
    from msgdrop_numba.tensors.backends import HOST

    no_fast_path(patch)
    patch.setattr(HOST, "reads", lambda _: False, raising=False)


def no_fast_path(patch: pytest.MonkeyPatch) -> None:
    """Every call takes all steps."""
    import torch

    from msgdrop_numba import functional

    functional._library(torch.empty(0))  # before what notes it is patched
    patch.setattr(functional, "_fast_paths", {})


def torch_without_guards(patch: pytest.MonkeyPatch) -> None:
    """A torch without TensorGuards."""
    from msgdrop_numba import torch_private

    patch.setattr(torch_private, "_TensorGuards", None)
    reset_plans()  # which hold guards


def unseen_values(patch: pytest.MonkeyPatch, module: Any = None) -> None:
    """Values in CPU tensors aren't looked at, as those on a device aren't."""
    from msgdrop_numba.tensors import arguments

    patch.setattr(module or arguments, "can_look_at", lambda _: False)


def no_plain_edges(patch: pytest.MonkeyPatch) -> None:
    """Edges are dropped by torch's operations alone, as on a device."""
    from msgdrop_numba.integrations import pyg

    unseen_values(patch, pyg)


def only_fast_path(patch: pytest.MonkeyPatch) -> None:
    """A call that the fast path doesn't take fails."""
    import torch

    from msgdrop_numba import arrays, functional
    from msgdrop_numba.tensors import dropout

    functional._library(torch.empty(0))  # torch's fast path is noted with the first tensor
    for module in (arrays, dropout):
        patch.setattr(module, "message_dropout", None)


# ---- CUDA


def cuda_tensors(patch: pytest.MonkeyPatch, kernels: Any) -> None:
    """CPU tensors take the way of CUDA tensors, with these kernels."""
    from msgdrop_numba.tensors import cuda
    from msgdrop_numba.tensors.backends import DEVICE, HOST

    reads = HOST.reads
    no_host_tensors(patch)
    patch.setattr(DEVICE, "reads", reads, raising=False)
    patch.setattr(cuda, "_broken", {})
    patch.setattr(cuda, "obstacle", lambda device: cuda._broken.get(device.index, ""))
    cuda_kernels(patch, kernels)
    stream_of(patch, lambda _: 0)


def cuda_kernels(patch: pytest.MonkeyPatch, kernels: Any) -> None:
    """These kernels in the place of numba-cuda's; None: they can't be had."""
    from msgdrop_numba.tensors import cuda

    patch.setattr(cuda, "_kernels", lambda: kernels)


def unusable_devices(patch: pytest.MonkeyPatch) -> None:
    """No device has kernels."""
    from msgdrop_numba.tensors import cuda

    cuda_kernels(patch, None)
    patch.setattr(cuda, "obstacle", lambda _: "no device has kernels")


def stream_of(patch: pytest.MonkeyPatch, handle: Callable[[Any], Any]) -> None:
    """What a device's current stream is said to be."""
    from msgdrop_numba.tensors import cuda

    patch.setattr(cuda, "raw_stream", handle)


def captured_device(patch: pytest.MonkeyPatch, index: int) -> None:
    """A graph is captured on that device."""
    from msgdrop_numba.tensors import arguments

    patch.setattr(arguments, "_is_capturing", lambda device: device.index == index)


def cuda_state() -> tuple[dict[int, str], Any]:
    """The devices that a kernel couldn't be brought to, and the kernels that are loaded."""
    from msgdrop_numba.tensors import cuda

    return cuda._broken, cuda._kernels()._loaded


def watch_gathers(patch: pytest.MonkeyPatch) -> list[bool]:
    """A list that grows with each move on a device: whether kernels made it."""
    from msgdrop_numba.tensors import cuda

    seen, gather = [], cuda.gather
    patch.setattr(cuda, "gather", lambda *told: (seen.append(gather(*told)), seen[-1])[1])
    return seen


def reset_cuda() -> None:
    """Ask again whether there are kernels, say again why not."""
    from msgdrop_numba.tensors import cuda

    cuda.reset()


def reset_launches(patch: pytest.MonkeyPatch) -> None:
    """No kernel is loaded, no geometry known."""
    from msgdrop_numba.kernels import cuda_launch

    patch.setattr(cuda_launch, "_loaded", cuda_launch._Loaded())
    cuda_launch.geometry.cache_clear()


def watch_stores(patch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each address that a kernel in the simulator writes features to."""
    from msgdrop_numba.kernels import cuda

    stored, number = [], cuda.number

    def watched(dtype: Any) -> Any:
        load, store = number(dtype)
        return load, lambda address, value: (stored.append(address), store(address, value))[1]

    patch.setattr(cuda, "number", watched)
    return stored


def coarse_draws(patch: pytest.MonkeyPatch, bits: int) -> None:
    """The simulator's kernels, and naive.py, see only so many leading bits of a draw: nearly all are tied."""
    import naive

    from msgdrop_numba.kernels import cuda_rules

    fine, ours, rest = naive.draw, cuda_rules._draw, 32 - bits
    patch.setattr(naive, "draw", lambda *arguments, **stream: fine(*arguments, **stream) >> rest << rest)
    patch.setattr(cuda_rules, "_draw", lambda *arguments: ours(*arguments) >> np.uint64(rest) << np.uint64(rest))


def device_arrays(patch: pytest.MonkeyPatch, as_tensor: Callable[[Any], Any]) -> None:
    """How objects with `__cuda_array_interface__` become tensors."""
    from msgdrop_numba.tensors import device_arrays

    patch.setattr(device_arrays, "_import", as_tensor)


def before_tensor_calls(patch: pytest.MonkeyPatch, note: Callable[[], Any]) -> None:
    """Called before each call on a tensor, those that stand for device arrays among them."""
    from msgdrop_numba.tensors import dropout

    dropped = dropout.message_dropout

    def noted(*arguments: Any, **options: Any) -> Any:
        note()
        return dropped(*arguments, **options)

    patch.setattr(dropout, "message_dropout", noted)


# ---- memory for outputs


def large_outputs(patch: pytest.MonkeyPatch, nbytes: int | None) -> None:
    """Outputs of this size and more are lent, ask for huge pages, and lie in memory order. None: as it is."""
    from msgdrop_numba import outputs

    for name in ("LENT_BYTES", "HUGE_BYTES") if nbytes is not None else ():
        patch.setattr(outputs, name, nbytes)


def reset_outputs() -> None:
    """Unmap all idle blocks of outputs."""
    from msgdrop_numba import outputs

    outputs.reset()


def lent_blocks() -> list[int]:
    """What tells the blocks apart that are lent now."""
    from msgdrop_numba import outputs

    return [id(block) for _, block in outputs._loans.values()]


def when_a_block_is_lent(patch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Call `act` in the middle of `outputs.lend`: a block is taken, and not noted as lent yet."""
    from msgdrop_numba import outputs

    ref = outputs.weakref.ref
    patch.setattr(outputs.weakref, "ref", lambda *arguments: (act(), ref(*arguments))[1])


# ---- the command


def small_reads(patch: pytest.MonkeyPatch, nbytes: int) -> None:
    """A shard is read by so many bytes at a time."""
    from msgdrop_numba.command import shards

    patch.setattr(shards, "CHUNK", nbytes)
