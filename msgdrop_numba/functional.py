"""`message_dropout`, `keep_mask` and `fold_in`: look at the array, pick the library that handles it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

import numpy as np

from msgdrop_numba import arrays
from msgdrop_numba.call.arguments import ZERO, check_key, check_seed, is_masked, is_zero, row_lengths
from msgdrop_numba.call.keys import row_key as row_key
from msgdrop_numba.call.plan import mask_shape
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import Rule, read_rule
from msgdrop_numba.kernels import philox

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from typing_extensions import Unpack

Element = TypeVar("Element", bound=np.generic)
Mask = TypeVar("Mask")


class _Rule(TypedDict, total=False):
    """The keywords that decide a mask, for type checkers."""

    exact: bool
    span: int
    min_keep: int
    prefix: int
    lengths: Any
    keys: Any
    protect: Any
    positions: Any


class SelectKeywords(_Rule, total=False):
    """The keywords of `message_select`, for type checkers."""

    scale: bool
    message_dims: int | tuple[int, ...] | None
    seed: Any
    generator: Any
    layout: str | None
    capacity: int | None


class _Keywords(_Rule, total=False):
    """The keywords of `message_dropout` that don't change the type of its result, for type checkers."""

    scale: bool
    fill: Any
    message_dims: int | tuple[int, ...] | None
    seed: Any
    generator: Any
    out: Any


@overload
def message_dropout(
    x: NDArray[Element], p: Any = ..., training: bool = ..., inplace: bool = ..., *,
    return_mask: Literal[False] = ..., **keywords: Unpack[_Keywords],
) -> NDArray[Element]: ...  # fmt: skip
@overload
def message_dropout(
    x: NDArray[Element], p: Any = ..., training: bool = ..., inplace: bool = ..., *,
    return_mask: Literal[True], **keywords: Unpack[_Keywords],
) -> tuple[NDArray[Element], NDArray[np.bool_]]: ...  # fmt: skip
@overload
def message_dropout(
    x: Tensor, p: Any = ..., training: bool = ..., inplace: bool = ..., *,
    return_mask: Literal[False] = ..., **keywords: Unpack[_Keywords],
) -> Tensor: ...  # fmt: skip
@overload
def message_dropout(
    x: Tensor, p: Any = ..., training: bool = ..., inplace: bool = ..., *,
    return_mask: Literal[True], **keywords: Unpack[_Keywords],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def message_dropout(
    x: Any, p: Any = ..., training: bool = ..., inplace: bool = ..., *,
    return_mask: bool = ..., **keywords: Unpack[_Keywords],
) -> Any: ...  # fmt: skip
def message_dropout(
    x: Any,
    p: Any = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    scale: bool = False,
    exact: bool = False,
    span: int = 1,
    min_keep: int = 0,
    prefix: int = 0,
    lengths: Any = None,
    fill: Any = ZERO,
    message_dims: int | tuple[int, ...] | None = None,
    seed: Any = None,
    keys: Any = None,
    protect: Any = None,
    positions: Any = None,
    generator: Any = None,
    out: Any = None,
    return_mask: bool = False,
) -> Any:
    """Drop whole messages `x[b, s, ...]` of an array, each with probability p.

    A dropped message is never read, so NaN and Inf in it can't leak. The mask is a pure function of (seed, row key,
    position): the same for every array library, thread count, worker and machine.

    Args:
        x: NumPy array, tensor, or CuPy or numba device array of numbers or bools, `(*message dims, *features)` with at
            least one feature dim. Of a DTensor all below is meant of the whole, however it is sharded (RANKS.md).
        p: probability that a message is **dropped**, in [0, 1]; or a range, a tuple `(lo, hi)` with lo <= hi, of which
            each row draws its own; or an array that broadcasts to the message dims from the right: one a position, one
            a message, `(N, N)` where the message dims are `(B, N, N)`. `exact` takes no array; for tensors on other
            devices, in transforms and in traced code it needs a Python number or range. Or a `Rule`, which holds p and
            the keywords `exact`, `span`, `min_keep` and `prefix`; these must not be given beside it.
        training: True or False; with False (or p = 0) x itself comes back, unchanged.
        inplace: write into x, only what is dropped (and, scaled, what is kept).
        scale: multiply kept messages by 1/(1-p), or by n/(n-d) if exactly d of n drop; floating and complex dtypes,
            but not NumPy's `longdouble`.
        exact: drop exactly floor(n * p) of the n messages of each row that take part; p no array, without `span`.
        span: drop runs of so many neighbouring messages together.
        min_keep: keep at least so many of the messages of each row that take part.
        prefix: the first so many messages of each row take no part, class tokens say: they pass as they are, and aren't
            counted. At most the messages of a row; where `lengths` or a nested x makes a row shorter, all of it passes.
        lengths: valid messages in each row, integers of the shape of the message dims without the last. What lies
            behind is padding: left as it is, kept in the mask.
        fill: what a dropped message becomes: a number, or an array over the features, of x's kind and dtype.
        message_dims: how many leading dims index messages; None: 2 where x has 3 or more dims, else 1. Or a tuple that
            names them wherever they are: (0, 2) for channels first, (B, D, T); (1, 0) for time first, (T, B, D). The
            last of them is the position in a row, the others index rows; all other dims are features.
        seed: integer in [0, 2**64), or a 0-d int64 tensor of the same bits. None: drawn from `generator`, else from
            torch's default generator of x's device (tensors) or the system's entropy (arrays).
        keys: what names each row, of the shape of the message dims without the last or a leading part of it: integers
            in [-2**63, 2**64), or ids that `row_key` hashes (strings, bytes, UUIDs), in compiled code integers alone;
            None: the row's index.
        protect: bool, True where a message takes no part and passes as it is, as in torch's `key_padding_mask`: of the
            shape of the message dims, or of the last one alone, for all rows.
        positions: what the draws number messages by in place of their index: an integer, the position of each row's
            first message, for rows that are cut into pieces; or integers of the shape of the message dims or of the
            last one alone, each in [0, 2**34). Equal positions have equal draws; `exact` and `min_keep` count the
            messages of x, so that with them a piece hasn't the mask of the whole.
        generator: `torch.Generator` for tensors, `numpy.random.Generator` for arrays; not with `seed`.
        out: array to write into, of x's kind, shape and dtype; x itself, or memory that doesn't overlap it.
        return_mask: give back `(y, keep)`, with keep the bool mask over the message dims, True = kept.

    Returns:
        An array like x: `where(keep, x, fill)`, kept messages bit for bit as in x unless scaled; x itself if `inplace`
        or if nothing drops, `out` if given; with `return_mask` a pair. Differentiable in x and in a tensor `fill`.
        Backward keeps the seed; the keep mask, a byte a message, where arrays (keys, lengths, p, ...) decide it; and
        with `scale` what its scales come from; no copy of the data.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or value, a masked array say, whose mask
            would be lost. Nothing was written.
        ModuleNotFoundError: x is a CuPy or numba device array, and torch isn't installed.

    Example:
        >>> import numpy as np
        >>> x = np.ones((2, 4, 3), np.float32)  # 2 samples of 4 messages of 3 features
        >>> message_dropout(x, 0.5, seed=0).any(axis=-1)
        array([[False,  True,  True,  True],
               [ True,  True, False,  True]])

    Source: the mask contract, version 1.1 (CONTRACT.md), on Philox4x32-10 (Salmon et al., SC'11).
    """
    fast_path = _fast_paths.get(type(x))
    if (
        fast_path is not None and training is True and protect is None and positions is None and generator is None
        and not return_mask and (fill is ZERO or is_zero(fill)) and (type(p) is float or type(p) is Rule)
        and (seed is None or (type(seed) is int and 0 <= seed < 2**64))
    ):  # fmt: skip
        options = bool(scale), message_dims, p, exact, span, min_keep, prefix
        y = fast_path(x, options, lengths, keys, seed, inplace, out)
        if y is not None:
            return y
    rule, array = read_rule(p, exact, span, min_keep, prefix)
    request = Request(
        rule, array, scale, fill, message_dims, training=training, inplace=inplace, lengths=lengths, seed=seed,
        keys=keys, protect=protect, positions=positions, generator=generator, out=out, return_mask=return_mask,
    )  # fmt: skip
    return drop_messages(x, request)


def drop_messages(x: Any, request: Request) -> Any:
    """`message_dropout` of a request."""
    return library_of(x).message_dropout(x, request)


def library_of(x: Any) -> Any:
    """The module that handles an array: `arrays`, or one of `tensors`."""
    return _libraries.get(type(x)) or _library(x)


_libraries: dict[type, Any] = {np.ndarray: arrays}  # of exact types; torch's once a tensor has come
_fast_paths: dict[type, Any] = {np.ndarray: arrays.fast_path}  # by exact type; None: not taken


def _library(x: Any) -> Any:
    torch, spread = sys.modules.get("torch"), sys.modules.get("torch.distributed.tensor")
    if spread is not None and isinstance(x, spread.DTensor):
        from msgdrop_numba.tensors import sharded

        remember(_libraries, sharded, type(x))
        return sharded
    if torch is not None and isinstance(x, torch.Tensor):
        from msgdrop_numba.tensors import dropout

        remember(_libraries, dropout, torch.Tensor, torch.nn.Parameter)
        remember(_fast_paths, dropout.fast_path, torch.Tensor, torch.nn.Parameter)
        return dropout
    if is_masked(x):
        raise TypeError("x must be a plain NumPy array, but got a masked one, whose mask would be lost: give filled()")
    if isinstance(x, np.ndarray):
        return arrays
    if hasattr(x, "__cuda_array_interface__"):
        from msgdrop_numba.tensors import device_arrays

        return device_arrays
    advice = "stack them, or let MessageDropoutCollate(pad=True) make a batch of them" if _is_listed(x) else ""
    raise TypeError(
        f"x must be a NumPy array, a torch tensor or a CuPy or numba device array, but got {type(x).__name__}; "
        f"{advice or 'make it one first'}"
    )


def remember(known: dict[type, Any], what: Any, *types: type) -> None:
    """Cache the dispatch result. Skip this while compiling: a checkpointed region must not mutate globals."""
    if not sys.modules["torch"].compiler.is_compiling():
        known.update(dict.fromkeys(types, what))


def _is_listed(x: Any) -> bool:
    """True for a list of samples."""
    return isinstance(x, (list, tuple)) and bool(x) and all(getattr(sample, "ndim", 0) for sample in x)


@overload
def keep_mask(
    shape: int | Sequence[int], p: Any = ..., *, seed: Any = ..., device: None = ..., **rule: Unpack[_Rule]
) -> NDArray[np.bool_]: ...
@overload
def keep_mask(
    shape: int | Sequence[int], p: Any = ..., *, seed: Any = ..., device: Any, **rule: Unpack[_Rule]
) -> Tensor: ...
def keep_mask(
    shape: int | Sequence[int],
    p: Any = 0.5,
    *,
    exact: bool = False,
    span: int = 1,
    min_keep: int = 0,
    prefix: int = 0,
    lengths: Any = None,
    seed: Any = None,
    keys: Any = None,
    protect: Any = None,
    positions: Any = None,
    device: Any = None,
) -> Any:
    """The keep mask that `message_dropout` uses: bool, True = the message passes.

    Args:
        shape: the message dims, e.g. `(batch, sequence)`; the last is the position in a row.
        p: probability that a message is dropped, 0.5 by default, a range or an array of them, or a `Rule`, as for
            `message_dropout`.
        exact, span, min_keep, prefix, lengths, seed, keys, protect, positions: as for `message_dropout`.
        device: a torch device: the mask is a tensor there. None: a NumPy array.

    Returns:
        bool array or tensor of `shape`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or value.
        ModuleNotFoundError: `device` is given, and torch isn't installed.

    Example:
        >>> keep_mask((2, 6), 0.5, seed=0, keys=[17, -3])
        array([[False, False, False,  True, False, False],
               [ True, False, False,  True, False,  True]])

    Source: the mask contract, version 1.1 (CONTRACT.md).
    """
    dims = mask_shape(shape)
    rule, array = read_rule(p, exact, span, min_keep, prefix)
    request = Request(rule, array, lengths=lengths, seed=seed, keys=keys, protect=protect, positions=positions)
    if device is None:
        return arrays.keep_mask(dims, request)
    from msgdrop_numba.tensors import dropout

    return dropout.keep_mask(dims, request, device)


def key_padding_mask(keep: Mask, lengths: Any = None) -> Mask:
    """The mask of messages that attention must ignore, padding and dropped ones: torch's `src_key_padding_mask`.

    `~keep` alone would attend to padding, which is kept. Give the dropout `min_keep=1`: a row of which everything is
    ignored gives NaN in attention.

    Args:
        keep: a keep mask, bool array or tensor `(*rows, messages)`: of `message_dropout`, `keep_mask` or a collate.
        lengths: valid messages in each row, integers of the shape of the rows; None: there is no padding.

    Returns:
        bool like `keep`.

    Raises:
        TypeError, ValueError: `keep` isn't bool, or `lengths` have another shape or are out of range.

    Example:
        >>> import numpy as np
        >>> keep = np.array([[True, False, True, True]])  # of a row with two messages and padding
        >>> key_padding_mask(keep, [2])
        array([[False,  True,  True,  True]])
    """
    mask: Any = keep
    if str(getattr(keep, "dtype", "")) not in ("bool", "torch.bool"):
        raise TypeError(f"keep must be a bool array or tensor, but got {getattr(keep, 'dtype', type(keep).__name__)}")
    if lengths is None:
        return ~mask  # type: ignore[no-any-return]
    shape = tuple(mask.shape)
    if isinstance(keep, np.ndarray):
        valid: Any = row_lengths(lengths, shape[:-1], shape[-1])
        return ~mask | (np.arange(shape[-1]) >= valid.reshape(*shape[:-1], 1))  # type: ignore[no-any-return]
    import torch

    from msgdrop_numba.tensors.arguments import lengths_on

    ends: Any = lengths_on(lengths, shape, mask.device)
    return ~mask | (torch.arange(shape[-1], device=mask.device) >= ends.unsqueeze(-1))  # type: ignore[no-any-return]


def fold_in(seed: Any, data: Any) -> int:
    """A new seed from a seed and a number: an epoch, a field, a rank.

    Args:
        seed: integer in [0, 2**64), or a 0-d int64 tensor of the same bits.
        data: integer in [-2**63, 2**64); a negative one stands for its two's complement.

    Returns:
        An integer in [0, 2**64).

    Raises:
        TypeError, ValueError: an argument is no integer or out of range.

    Example:
        >>> fold_in(7, 3)
        10612791744428350474

    Source: the mask contract, version 1.1 (CONTRACT.md); the name is JAX's.
    """
    return int(philox.fold_in(np.uint64(check_seed(seed)), np.uint64(check_key("data", data))))
