"""`message_select`, `select_messages` and `Kept`: messages that are removed instead of filled."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from msgdrop_numba import arrays
from msgdrop_numba.call.arguments import ZERO
from msgdrop_numba.call.plan import mask_shape
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import read_rule
from msgdrop_numba.call.select import PACKED, Layout, Selection, read_layout
from msgdrop_numba.functional import library_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from typing_extensions import Unpack

    from msgdrop_numba.functional import SelectKeywords

Element = TypeVar("Element", bound=np.generic)


class Kept:
    """The messages that remain of `message_select`: `take` gathers companions, `restore` scatters messages back.

    Its arrays are NumPy's or tensors, as what was selected from. Padding is what fills up a row in layout "padded", or
    the slots behind all messages in layout "packed" with a capacity.

    Attributes:
        layout: "dense", "padded" or "packed".
        indices: int64, the position of each remaining message in its row, `(*rows, slots)`, ascending, -1 in padding;
            packed: its number among all messages in C order, `(slots,)`.
        mask: bool over the message dims, True = this message remains.
        lengths: int64 over the rows, how many messages of each remain.
        cu_seqlens: int32, one more than there are rows: where each begins in layout "packed", and the last ends.
        max_length: an integer that no entry of `lengths` is larger than.
        size: messages of a full row.
        key_padding_mask: bool `(*rows, slots)`, True = padding, as `nn.TransformerEncoder` takes it; not of layout
            "packed". Attention in a row of nothing but padding may be NaN: `min_keep=1` leaves each row a message.
        overflow: on a device, a 0-d bool tensor: whether more messages were kept than `capacity` has room for; those
            that don't fit are missing. On the host such a call raises, and this is False.

    Example:
        >>> import numpy as np
        >>> x = np.arange(24.0).reshape(2, 4, 3)
        >>> y, kept = message_select(x, 0.5, exact=True, seed=0)
        >>> kept.indices
        array([[1, 2],
               [0, 1]])
        >>> np.array_equal(kept.take(x), y)
        True
        >>> kept.restore(y, fill=-1.0)[..., 0]
        array([[-1.,  3.,  6., -1.],
               [12., 15., -1., -1.]])

    Source: the mask contract, version 1.1 (CONTRACT.md).
    """

    __module__ = "msgdrop_numba"  # where a pickle looks for it, wherever it stands

    def __init__(self, found: Selection) -> None:
        self.layout, self._shape, self._numbers, self._slots, self.lengths, self.max_length, self.overflow = found

    @property
    def _found(self) -> Selection:
        return Selection(
            self.layout, self._shape, self._numbers, self._slots, self.lengths, self.max_length, self.overflow
        )

    @property
    def _library(self) -> Any:
        return _namespace(self._numbers)

    @property
    def size(self) -> int:
        return self._shape[-1]

    @property
    def indices(self) -> Any:
        return self._numbers + 0 if self.layout == PACKED else self._within  # a copy: kernels go by what is here

    @property
    def _within(self) -> Any:
        """The position of each remaining message in its row."""
        return self._library.where(self._numbers < 0, -1, self._numbers % max(1, self.size))

    @property
    def mask(self) -> Any:
        return self._slots >= 0

    @property
    def cu_seqlens(self) -> Any:
        library, flat = self._library, self.lengths.reshape(-1)
        if (slots := math.prod(self._numbers.shape)) >= 2**31:
            raise ValueError(f"cu_seqlens are int32, but there are {slots} slots: use lengths, which are int64")
        ends = library.concatenate([library.zeros_like(flat[:1]) if len(flat) else flat.sum().reshape(1), flat]).cumsum(
            0
        )
        return ends.astype(np.int32) if library is np else ends.to(library.int32)

    @property
    def key_padding_mask(self) -> Any:
        if self.layout == PACKED:
            raise ValueError("layout 'packed' has no padding in its rows, but cu_seqlens: take layout 'padded'")
        return self._numbers < 0

    def take(self, t: Any, dim: int | None = None) -> Any:
        """The entries of a companion of x that remain: positions, labels, a rope table, an attention mask.

        Args:
            t: array or tensor of any dtype: the row dims of x first, its messages along `dim` (an `edge_index` of
                edges `(E, F)` with dim=1); or, with dim=0 where x has row dims, one row that all share.
            dim: where the messages lie in t; None: behind the row dims, as in x.

        Returns:
            t with `slots` in place of the messages, 0 or False in padding, and the row dims in front if all shared it.
            Packed: `(slots, *)`, the other dims of t behind in their order. Differentiable.

        Raises:
            TypeError, ValueError: t is no array, has other rows or another number of messages, or is on another device.

        Example:
            >>> kept = select_messages((2, 4), 0.5, exact=True, seed=0)
            >>> kept.take(np.array(["a", "b", "c", "d"]), dim=0)
            array([['b', 'c'],
                   ['a', 'b']], dtype='<U1')
        """
        library = _library_of(t)
        found, rows, size = library.as_here(self._found, t), self._shape[:-1], self.size
        at = len(rows) if dim is None else operator.index(dim)
        at += t.ndim if at < 0 else 0
        shared = at == 0 and bool(rows)
        shape = tuple(t.shape)
        if not (
            0 <= at < t.ndim and shape[at] == size and (shared or (at >= len(rows) and shape[: len(rows)] == rows))
        ):
            raise ValueError(
                f"t must have shape {(*rows, size)} and features, or its messages along another dim behind its rows, "
                f"or ({size}, features) with dim=0, but got {shape} with dim={at}"
            )
        if shared:
            return library.take_shared(t, Kept(found)._within)
        if at == len(rows):
            return library.take(t, at + 1, found)
        axes = _namespace(t)
        y = library.take(axes.moveaxis(t, at, len(rows)), len(rows) + 1, found)
        return y if self.layout == PACKED else axes.moveaxis(y, len(rows), at)

    def restore(self, y: Any, fill: Any = ZERO) -> Any:
        """Put messages back to where they were, in rows of full length.

        Args:
            y: array or tensor of any dtype and features: `(*rows, slots, *features)`, packed `(slots, *features)`.
            fill: what stands in for a removed message, and for padding: a number; or one message of y's kind and
                dtype, an `nn.Parameter` say, whose gradient is the sum over them; or an array of all messages,
                `(*message dims, *features)`, of which each stands in for itself.

        Returns:
            `(*message dims, *features)`. Differentiable in y and in a tensor `fill`.

        Raises:
            TypeError, ValueError: y or `fill` is of another shape, dtype, kind or device.

        Example:
            >>> kept = select_messages((1, 4), 0.5, exact=True, seed=0)
            >>> kept.restore(np.array([[True, True]]))
            array([[False,  True,  True, False]])
        """
        library = _library_of(y)
        found = library.as_here(self._found, y)
        self._check(y)
        return library.restore(y, fill, found)

    def _check(self, y: Any) -> None:
        slots = tuple(self._numbers.shape)
        if tuple(y.shape[: len(slots)]) != slots:
            raise ValueError(f"y must have shape {slots} and features, but got {tuple(y.shape)}")

    def to_nested(self, y: Any) -> Any:
        """The remaining messages as a jagged nested tensor: a row for each of x's, without padding.

        Args:
            y: `(*rows, slots, *features)`, packed `(slots, *features)`.

        Returns:
            `torch.nested.nested_tensor_from_jagged(values, offsets)`. Waits for the device where there may be padding.

        Raises:
            TypeError, ValueError: y is no tensor, of another shape, or on another device.

        Example:
            >>> import torch
            >>> y, kept = message_select(torch.ones(2, 4, 3), 0.5, seed=1)
            >>> [len(row) for row in kept.to_nested(y).unbind()] == kept.lengths.tolist()
            True
        """
        if _library_of(y) is arrays:
            raise TypeError("y must be a tensor, but got a NumPy array: give torch.from_numpy(y)")
        from msgdrop_numba.tensors.select import as_nested

        self._check(y)
        return as_nested(y, self._found)

    def to(self, device: Any) -> Kept:
        """This selection as tensors on a device.

        Args:
            device: a torch device, "cpu" say, which arrays become tensors on, too.

        Returns:
            Another `Kept`.
        """
        from msgdrop_numba.tensors.select import on

        return Kept(on(self._found, device))

    def __repr__(self) -> str:
        return f"Kept(layout={self.layout!r}, shape={tuple(self._shape)}, slots={tuple(self._numbers.shape)})"


def _library_of(x: Any) -> Any:
    """The module that removes messages of an array."""
    library = library_of(x)
    if hasattr(library, "message_select"):
        return library
    from torch import Tensor

    from msgdrop_numba.tensors import select

    if not isinstance(x, Tensor):
        raise TypeError(
            f"messages are removed from NumPy arrays and tensors, but got {type(x).__name__}: make it a tensor first, "
            "torch.as_tensor(x, device='cuda')"
        )
    return select


def _namespace(x: Any) -> Any:
    """NumPy or torch, for what they have in common."""
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


@overload
def message_select(
    x: NDArray[Element], p: Any = ..., training: bool = ..., **keywords: Unpack[SelectKeywords]
) -> tuple[NDArray[Element], Kept]: ...
@overload
def message_select(
    x: Tensor, p: Any = ..., training: bool = ..., **keywords: Unpack[SelectKeywords]
) -> tuple[Tensor, Kept]: ...
def message_select(
    x: Any,
    p: Any = 0.5,
    training: bool = True,
    *,
    scale: bool = False,
    exact: bool = False,
    span: int = 1,
    min_keep: int = 0,
    prefix: int = 0,
    lengths: Any = None,
    message_dims: int | tuple[int, ...] | None = None,
    seed: Any = None,
    keys: Any = None,
    protect: Any = None,
    positions: Any = None,
    generator: Any = None,
    layout: str | None = None,
    capacity: int | None = None,
) -> Any:
    """Remove whole messages `x[b, s, ...]`, each with probability p: rows get shorter, and so does all that follows.

    What `message_dropout` would drop with the same arguments is removed, and padding is. What remains keeps its order.
    A removed message is never read, one that is kept is read and written once.

    Args:
        x: NumPy array or tensor of numbers or bools, `(*message dims, *features)` with at least one feature dim. A
            jagged nested tensor is taken for a padded one with `lengths`; `kept.to_nested(y)` makes one again. Of a
            DTensor each rank must hold whole rows (RANKS.md).
        p, training, scale, exact, span, min_keep, prefix, lengths, message_dims, seed, keys, protect, positions,
            generator: as for `message_dropout`.
        layout: "dense" `(*rows, K, *features)`, where each row is known to keep as many, with `exact` and without
            `lengths` and `protect`; "padded" `(*rows, M, *features)`, M being the most that a row keeps, zeros behind;
            "packed" `(T, *features)`, T being what all rows keep, one behind the other. None: dense where that can be,
            else padded.
        capacity: M or T, which then are known beforehand: what is written has one shape, and nothing waits for a
            device. Ignored where nothing drops.

    Returns:
        `(y, kept)`, an array like x and a `Kept`. Where `message_dims` names dims, those of y are in x's order; packed,
        messages come first if several are named. Where nothing drops, y is x itself, packed its messages without
        padding. Differentiable in x; in compiled code "dense" makes one graph.

    Raises:
        TypeError, ValueError: as for `message_dropout`; `layout` is unknown, or "dense" where rows may keep different
            counts; `capacity` is too small: on the host, on a device `kept.overflow` says so. Nothing was written.

    Example:
        >>> import numpy as np
        >>> x = np.ones((2, 4, 3), np.float32)  # 2 samples of 4 messages of 3 features
        >>> y, kept = message_select(x, 0.5, exact=True, seed=0)
        >>> y.shape
        (2, 2, 3)
        >>> from msgdrop_numba import message_dropout
        >>> np.array_equal(kept.restore(y), message_dropout(x, 0.5, exact=True, seed=0))
        True

    Source: the mask contract, version 1.1 (CONTRACT.md).
    """
    rule, array = read_rule(p, exact, span, min_keep, prefix)
    request = Request(
        rule, array, scale, message_dims=message_dims, training=training, lengths=lengths, seed=seed, keys=keys,
        protect=protect, positions=positions, generator=generator,
    )  # fmt: skip
    return select(x, request, read_layout(layout, capacity))


def select(x: Any, request: Request, layout: Layout) -> tuple[Any, Kept | None]:
    """`message_select` of a request; no `Kept` where nobody asks for it."""
    y, found = _library_of(x).message_select(x, request, layout)
    return y, Kept(found) if layout.wants_kept else None


def select_messages(
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
    layout: str | None = None,
    capacity: int | None = None,
    device: Any = None,
) -> Kept:
    """The selection that `message_select` would make, without data: `kept.take` removes from any number of arrays.

    Args:
        shape: the message dims, e.g. `(batch, sequence)`; the last is the position in a row.
        p, exact, span, min_keep, prefix, lengths, seed, keys, protect, positions: as for `message_dropout`.
        layout, capacity: as for `message_select`.
        device: a torch device: it is of tensors there. None: of NumPy arrays.

    Returns:
        A `Kept`.

    Raises:
        TypeError, ValueError: as for `message_select`.
        ModuleNotFoundError: `device` is given, and torch isn't installed.

    Example:
        >>> select_messages((2, 6), 0.5, seed=0, keys=[17, -3]).indices
        array([[ 3, -1, -1],
               [ 0,  3,  5]])

    Source: the mask contract, version 1.1 (CONTRACT.md).
    """
    dims = mask_shape(shape)
    rule, array = read_rule(p, exact, span, min_keep, prefix)
    request = Request(rule, array, lengths=lengths, seed=seed, keys=keys, protect=protect, positions=positions)
    if device is None:
        return Kept(arrays.select_messages(dims, request, read_layout(layout, capacity)))
    from msgdrop_numba.tensors import select as tensors

    return Kept(tensors.select_messages(dims, request, read_layout(layout, capacity), device))
