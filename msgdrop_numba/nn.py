"""The layers that drop messages, and remove them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from msgdrop_numba.call.arguments import (
    ZERO,
    check_is_number,
    check_message_dims,
    probabilities,
    split_rule,
)
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import DEFAULTS, KEYWORDS, Rule, read_rule
from msgdrop_numba.call.select import read_layout
from msgdrop_numba.call.shown import short
from msgdrop_numba.functional import drop_messages, message_dropout
from msgdrop_numba.select import select
from msgdrop_numba.tensors.seeds import PerRank, check_ranks

ALWAYS = object()  # marks arguments that are always printed


class Layer(torch.nn.Module):
    """The base of all layers: their rule, an array p that goes along to devices, and the printed arguments.

    The fields of a rule are attributes, which may be changed between calls. Layers that were pickled before there was a
    field have its default.
    """

    __module__ = "msgdrop_numba"  # where a pickle looks for a layer, wherever it stands
    per_rank = False
    exact: bool
    prefix: int
    _shown: ClassVar[dict[str, Any]]  # the arguments that are printed, if they aren't at this value

    def _set_options(
        self, p: Any, exact: Any, span: Any, min_keep: Any, prefix: Any, message_dims: Any, per_rank: Any
    ) -> None:
        rule, array = split_rule(p, exact, span, min_keep, prefix)
        if message_dims is not None:
            check_message_dims(message_dims)
        # An array is kept as float64 and no buffer: the mask's bits must not depend on the layer's dtype. See _apply.
        self.p: Any = rule.p if array is None else torch.from_numpy(probabilities(array, tuple(array.shape)))
        for name in KEYWORDS:
            setattr(self, name, getattr(rule, name))
        self.message_dims, self.per_rank = message_dims, check_ranks(per_rank)

    def _rule(self, x: Tensor) -> tuple[Rule, Any]:
        """The rule, and an array p or None."""
        p = self.p  # asked for its type first: torch's isinstance takes half a microsecond
        if type(p) is not float and isinstance(p, Tensor) and not p.is_cpu:
            p = p.to(x.device)  # in a replica on another device
        return read_rule(p, *[getattr(self, name) for name in KEYWORDS])

    def _request(self, x: Tensor, seed: Any, **own: Any) -> Request:
        """The request of a call that removes."""
        return Request(*self._rule(x), training=self.training, seed=seed, generator=self._generator(x, seed), **own)

    def _generator(self, x: Any, seed: Any) -> Any:
        """A PerRank if the layer has per_rank and x, a tensor, gets no seed; else None."""
        if self.per_rank is False or seed is not None or not isinstance(x, Tensor):
            return None
        return PerRank(self.per_rank)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """With the same group of processes, which can't be copied."""
        memo[id(self.per_rank)] = self.per_rank
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Take an array p along to a CUDA device: copied at each call, it would break a CUDA graph."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self.p, Tensor):
            device = fn(torch.empty(0, device=self.p.device)).device
            self.p = self.p.to(device if device.type == "cuda" else "cpu")
        return self

    def extra_repr(self) -> str:
        shown = {"p": self.p}
        for name, default in self._shown.items():
            value = getattr(self, name)
            if default is ALWAYS or hasattr(value, "shape") or value != default:
                shown[name] = value
        return ", ".join(f"{name}={short(value, name)}" for name, value in shown.items())


for _name in KEYWORDS:
    setattr(Layer, _name, DEFAULTS[_name])


class MessageDropout(Layer):
    """Drop whole messages `x[b, s, :]` during training, each with probability p; identity in eval mode.

    Unlike `torch.nn.Dropout1d` it drops along any number of message dims, never reads what it drops, and scales only
    when asked to. Backward keeps the seed, or one byte a message where arrays decide the mask (with `scale` what
    its scales come from, too), and no copy of the data.

    Args:
        p: probability that a message is **dropped**, in [0, 1]; a range `(lo, hi)`, of which each row draws its own; an
            array or tensor of them, one a position; or a `Rule`, which holds `exact` to `prefix` too.
        inplace: write into the input.
        scale, exact, span, min_keep, prefix: as for `message_dropout`.
        fill: what a dropped message becomes: a number, or a tensor over the features, an `nn.Parameter` to learn it.
        message_dims: how many leading dims index messages; None: 2 where the input has 3 or more dims, else 1. Or a
            tuple that names them, (0, 2) for channels first, (B, D, T).
        per_rank: whether ranks that are seeded alike drop each their own. False: they drop the same, as with torch's
            dropout. True: this process's rank is folded (`fold_in`) into each seed that is drawn, so that rank 0 has
            other masks than without, too. A `torch.distributed.ProcessGroup` or a `DeviceMesh` of one dim: its rank
            in there, so that masks differ along data parallel ranks, say, and are the same along all others. A seed
            that is given stays as it is.

    Shape:
        - Input: `(*message dims, *features)`, by default `(N, S, *)` or `(S, F)`; or as `message_dims` names them.
        - Output: the input's shape and dtype.

    Raises:
        TypeError, ValueError: p is no probability, per_rank nothing that has ranks; or, at the call, as
            `message_dropout`, and where a seed is to be drawn and this process has no rank.

    Example:
        >>> import torch
        >>> layer = MessageDropout(0.3)
        >>> x = torch.randn(8, 16, 128)  # 8 samples of 16 messages of 128 features
        >>> layer(x).shape
        torch.Size([8, 16, 128])

    Source: the mask contract, version 1.1 (CONTRACT.md).
    """

    __module__ = "msgdrop_numba"
    _shown: ClassVar = {
        "inplace": ALWAYS, "scale": False, **DEFAULTS, "fill": 0.0, "message_dims": None, "per_rank": False,
    }  # fmt: skip

    def __init__(
        self,
        p: Any = 0.5,
        inplace: bool = False,
        *,
        scale: bool = False,
        exact: bool = False,
        span: int = 1,
        min_keep: int = 0,
        prefix: int = 0,
        fill: Any = ZERO,
        message_dims: int | tuple[int, ...] | None = None,
        per_rank: Any = False,
    ) -> None:
        super().__init__()
        self._set_options(p, exact, span, min_keep, prefix, message_dims, per_rank)
        self.inplace, self.scale = inplace, scale
        if isinstance(fill, Tensor) and not isinstance(fill, torch.nn.Parameter):
            self.register_buffer("fill", fill)
        else:
            if not isinstance(fill, Tensor):
                check_is_number("fill", fill)
            self.fill = fill

    @overload
    def forward(
        self, x: Tensor, *, lengths: Any = ..., keys: Any = ..., seed: Any = ..., protect: Any = ...,
        positions: Any = ..., return_mask: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, x: Tensor, *, lengths: Any = ..., keys: Any = ..., seed: Any = ..., protect: Any = ...,
        positions: Any = ..., return_mask: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def forward(
        self, x: Tensor, *, lengths: Any = None, keys: Any = None, seed: Any = None, protect: Any = None,
        positions: Any = None, return_mask: bool = False,
    ) -> Any:  # fmt: skip
        """Drop messages of x.

        Args:
            x: `(*message dims, *features)`.
            lengths, keys, seed, protect, positions, return_mask: as for `message_dropout`.

        Returns:
            A tensor like x, or `(y, keep)` with `return_mask`.
        """
        fill = self.fill
        if type(fill) is not float and isinstance(fill, Tensor) and torch.is_autocast_enabled(x.device.type):
            fill = fill.to(x.dtype)
        options = {
            "scale": self.scale, "lengths": lengths, "fill": fill, "message_dims": self.message_dims, "seed": seed,
            "keys": keys, "protect": protect, "positions": positions, "generator": self._generator(x, seed),
            "return_mask": return_mask,
        }  # fmt: skip
        rule, array = self._rule(x)
        if array is None:
            return message_dropout(x, rule, self.training, self.inplace, **options)
        return drop_messages(x, Request(rule, array, training=self.training, inplace=self.inplace, **options))

    if TYPE_CHECKING:  # torch says nothing of what a call gives back
        __call__ = forward


class MessageSelect(Layer):
    """Remove whole messages `x[b, s, :]` during training, each with probability p; identity in eval mode.

    What comes after computes what remains alone: of a transformer with half of its tokens removed, half. In timm:
    `vit.patch_drop = MessageSelect(0.5, exact=True, prefix=vit.num_prefix_tokens, return_kept=False)`.

    Args:
        p: probability that a message is **removed**, in [0, 1]; a range `(lo, hi)`, of which each row draws its own; an
            array or tensor of them, one a position; or a `Rule`, which holds `exact` to `prefix` too.
        scale, exact, span, min_keep, prefix, message_dims, layout, capacity: as for `message_select`.
        per_rank: as for `MessageDropout`.
        return_kept: whether `(y, kept)` comes back, or y alone. "indices", with `exact`, for where timm has
            `PatchDropoutWithIndices`: `(y, indices)` of what remains behind the prefix, counted from there, None where
            nothing drops.

    Shape:
        - Input: `(*message dims, *features)`, by default `(N, S, *)` or `(S, F)`.
        - Output: `(*rows, K, *features)`, or `(T, *features)` in layout "packed".

    Raises:
        TypeError, ValueError: an argument is wrong, or as `message_select` at the call.

    Example:
        >>> import torch
        >>> layer = MessageSelect(0.5, exact=True, prefix=1)
        >>> y, kept = layer(torch.randn(8, 197, 64))
        >>> y.shape, kept.take(torch.arange(197), dim=0).shape
        (torch.Size([8, 99, 64]), torch.Size([8, 99]))

    Source: the mask contract, version 1.1 (CONTRACT.md).
    """

    __module__ = "msgdrop_numba"
    _shown: ClassVar = {
        "scale": False, **DEFAULTS, "message_dims": None, "layout": None, "capacity": None, "per_rank": False,
        "return_kept": True,
    }  # fmt: skip

    def __init__(
        self,
        p: Any = 0.5,
        *,
        scale: bool = False,
        exact: bool = False,
        span: int = 1,
        min_keep: int = 0,
        prefix: int = 0,
        message_dims: int | tuple[int, ...] | None = None,
        layout: str | None = None,
        capacity: int | None = None,
        per_rank: Any = False,
        return_kept: Any = True,
    ) -> None:
        super().__init__()
        self._set_options(p, exact, span, min_keep, prefix, message_dims, per_rank)
        if return_kept not in (True, False, "indices"):
            raise ValueError(f"return_kept must be True, False or 'indices', but got {return_kept!r}")
        if return_kept == "indices":
            if not self.exact or layout not in (None, "dense"):
                raise ValueError(
                    f"return_kept='indices' needs rows of one length, but got exact={self.exact}, layout={layout!r}: "
                    "give exact=True"
                )
            layout = "dense"
        read_layout(layout, capacity)
        self.scale, self.layout, self.capacity, self.return_kept = scale, layout, capacity, return_kept

    def forward(
        self, x: Tensor, *, lengths: Any = None, keys: Any = None, seed: Any = None, protect: Any = None,
        positions: Any = None,
    ) -> Any:  # fmt: skip
        """Remove messages of x.

        Args:
            x: `(*message dims, *features)`.
            lengths, keys, seed, protect, positions: as for `message_select`.

        Returns:
            `(y, kept)`, or as `return_kept` says.
        """
        request = self._request(
            x, seed, scale=self.scale, message_dims=self.message_dims, lengths=lengths, keys=keys, protect=protect,
            positions=positions,
        )  # fmt: skip
        y, kept = select(x, request, read_layout(self.layout, self.capacity, self.return_kept is not False))
        if self.return_kept == "indices":
            return y, None if y is x else kept.indices[..., self.prefix :] - self.prefix  # type: ignore[union-attr]
        return (y, kept) if self.return_kept else y

    if TYPE_CHECKING:
        __call__ = forward
