"""MessageDropout: the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.functional import message_dropout
from msgdrop_numba.rule import DropRule


class MessageDropout(torch.nn.Module):
    """Drop whole messages `x[b, s, :]` during training, each with probability p; identity in eval mode.

    Unlike `torch.nn.Dropout1d` it drops along any number of message dims, never reads what it drops, and scales only
    when asked to. Backward keeps one byte a message and no copy of the data.

    Args:
        p: probability that a message is **dropped**, in [0, 1].
        inplace: write into the input.
        scale: multiply kept messages by 1/(1-p).
        fill: number that the elements of a dropped message become.
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

    Source: the mask contract, version 1 (README).
    """

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        scale: bool = False,
        fill: complex = 0.0,
        message_dims: int | None = None,
    ) -> None:
        super().__init__()
        self.p = DropRule(p).p
        self.inplace = inplace
        self.scale = scale
        self.fill = fill
        self.message_dims = message_dims

    def forward(
        self, x: Tensor, *, lengths: Any = None, keys: Any = None, seed: Any = None, return_mask: bool = False
    ) -> Any:
        """Drop messages of x; lengths, keys, seed and return_mask as for `message_dropout`."""
        return message_dropout(
            x,
            self.p,
            self.training,
            self.inplace,
            scale=self.scale,
            lengths=lengths,
            fill=self.fill,
            message_dims=self.message_dims,
            seed=seed,
            keys=keys,
            return_mask=return_mask,
        )

    def extra_repr(self) -> str:
        shown = [f"p={self.p}", f"inplace={self.inplace}"]
        defaults = {"scale": False, "fill": 0.0, "message_dims": None}
        shown += [f"{name}={getattr(self, name)}" for name, usual in defaults.items() if getattr(self, name) != usual]
        return ", ".join(shown)
