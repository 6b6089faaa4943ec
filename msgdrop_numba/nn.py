"""MessageDropout: the layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from msgdrop_numba.call.arguments import ZERO, check_is_number, check_message_dims, probabilities, split_p
from msgdrop_numba.call.rule import DEFAULTS, DropRule
from msgdrop_numba.functional import message_dropout


class MessageDropout(torch.nn.Module):
    """Drop whole messages `x[b, s, :]` during training, each with probability p; identity in eval mode.

    Unlike `torch.nn.Dropout1d` it drops along any number of message dims, never reads what it drops, and scales only
    when asked to. Backward keeps the seed, or one byte a message where arrays decide the mask (with `scale` what
    its scales come from, too), and no copy of the data.

    Args:
        p: probability that a message is **dropped**, in [0, 1]; a range `(lo, hi)`, of which each row draws its own; or
            an array or tensor of them, one a position.
        inplace: write into the input.
        scale, exact, span, min_keep, prefix: as for `message_dropout`.
        fill: what a dropped message becomes: a number, or a tensor over the features, an `nn.Parameter` to learn it.
        message_dims: how many leading dims index messages; None: 2 where the input has 3 or more dims, else 1.

    Shape:
        - Input: `(*message dims, *features)`, by default `(N, S, *)` or `(S, F)`.
        - Output: the input's shape and dtype.

    Raises:
        TypeError, ValueError: p is no probability, or as `message_dropout` at the call.

    Example:
        >>> import torch
        >>> layer = MessageDropout(0.3)
        >>> x = torch.randn(8, 16, 128)  # 8 samples of 16 messages of 128 features
        >>> layer(x).shape
        torch.Size([8, 16, 128])

    Source: the mask contract, version 1.1 (CONTRACT.md).
    """

    __module__ = "msgdrop_numba"  # where a pickle looks for it, wherever it stands
    prefix = 0  # of layers that were pickled before there was one

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
        message_dims: int | None = None,
    ) -> None:
        super().__init__()
        number, array = split_p(p)
        rule = DropRule(number, exact, span, min_keep, prefix)
        if message_dims is not None:
            check_message_dims(message_dims)
        # An array is kept as float64 and no buffer: the mask's bits must not depend on the layer's dtype. See _apply.
        self.p: Any = rule.p if array is None else torch.from_numpy(probabilities(array, tuple(array.shape)))
        self.inplace, self.scale, self.message_dims = inplace, scale, message_dims
        self.exact, self.span, self.min_keep, self.prefix = rule.rest
        if isinstance(fill, Tensor) and not isinstance(fill, torch.nn.Parameter):
            self.register_buffer("fill", fill)
        else:
            if not isinstance(fill, Tensor):
                check_is_number("fill", fill)
            self.fill = fill

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Take an array p along to a CUDA device: copied at each call, it would break a CUDA graph."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self.p, Tensor):
            device = fn(torch.empty(0, device=self.p.device)).device
            self.p = self.p.to(device if device.type == "cuda" else "cpu")
        return self

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
        p, fill = self.p, self.fill
        if isinstance(p, Tensor) and not p.is_cpu:
            p = p.to(x.device)  # in a replica on another device
        if isinstance(fill, Tensor) and torch.is_autocast_enabled(x.device.type):
            fill = fill.to(x.dtype)
        return message_dropout(
            x, p, self.training, self.inplace, scale=self.scale, exact=self.exact, span=self.span,
            min_keep=self.min_keep, prefix=self.prefix, lengths=lengths, fill=fill, message_dims=self.message_dims,
            seed=seed, keys=keys, protect=protect, positions=positions, return_mask=return_mask,
        )  # fmt: skip

    if TYPE_CHECKING:  # torch says nothing of what a call gives back
        __call__ = forward

    def extra_repr(self) -> str:
        usual = {"scale": False, **DEFAULTS, "fill": 0.0, "message_dims": None}
        shown = {"p": self.p, "inplace": self.inplace}
        for name, default in usual.items():
            value = getattr(self, name)
            if hasattr(value, "shape") or value != default:
                shown[name] = value
        return ", ".join(f"{name}={_short(value)}" for name, value in shown.items())


def _short(value: Any) -> str:
    return f"{type(value).__name__}{tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
