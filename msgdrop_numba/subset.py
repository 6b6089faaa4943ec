"""MessageSubset: a module that sees a part of the messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from msgdrop_numba.call.arguments import message_order, order_back
from msgdrop_numba.call.rule import DEFAULTS
from msgdrop_numba.call.select import read_layout
from msgdrop_numba.nn import Layer
from msgdrop_numba.select import select


class MessageSubset(Layer):
    """Let a module see a part of the messages, drawn anew at each call: the others pass by. In eval mode it sees all.

    With `per="message"` a kept message becomes what the module makes of it, any other stays what it is: random
    layerwise token dropping, for a transformer's inner layers. With `per="sample"` the module is the branch f of a
    residual connection, and of B samples each that is kept becomes `x + f(x) * B / kept`, any other stays x: stochastic
    depth that doesn't compute what it throws away.

    A small p doesn't pay, nor does a small module: choosing and putting back cost time too. Of a transformer layer's
    time on the CPU, forward and backward, it takes at p = 0.05, 0.1, 0.2 and 0.5 on 8 x 256 x 256 messages 0.96, 0.92,
    0.79 and 0.49; on 32 x 64 x 128 1.05, 0.99, 0.88 and 0.57; of a layer of 1 ms, 16 x 16 x 64, 1.25, 1.27, 1.14, 0.98.

    Args:
        module: what is called with the kept messages, `(*rows, K, *features)`, and gives back as many of as many
            features; with `per="sample"` with the kept samples, `(K, *)`. Where nothing is kept it isn't called.
        p: probability that a message, or sample, passes by, as for `message_select`.
        exact, span, min_keep, prefix, message_dims: as for `message_select`. Without `exact` rows keep different
            counts: the module then sees zeros behind those of a shorter row, and needs `pass_kept` where messages mix.
            With neither `exact` nor `min_keep`, all messages or samples may pass by. Then the module isn't called and
            its parameters get no gradient, as `DistributedDataParallel` must be told by `find_unused_parameters`.
        per: "message" or "sample".
        pass_kept: call `module(y, ..., kept=kept)`, whose `key_padding_mask` tells what is padding.
        per_rank: as for `MessageDropout`.

    Shape:
        - Input: `(*message dims, *features)`, by default `(N, S, *)` or `(S, F)`; with `per="sample"` `(B, *)`.
        - Output: the input's shape.

    Raises:
        TypeError, ValueError: an argument is wrong, x is nested, or the module gives back another shape than it got.

    Example:
        >>> import torch
        >>> block = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> layer = MessageSubset(block, 0.5, exact=True, prefix=1)
        >>> layer(torch.randn(8, 197, 64)).shape  # 99 of 197 messages went through the block
        torch.Size([8, 197, 64])

    Source: the mask contract, version 1.1 (CONTRACT.md); random-LTD is Yao et al., 2022; batched stochastic depth is
    DINOv2's.
    """

    __module__ = "msgdrop_numba"
    _shown: ClassVar = {**DEFAULTS, "message_dims": None, "per": "message", "pass_kept": False, "per_rank": False}

    def __init__(
        self,
        module: torch.nn.Module,
        p: Any = 0.5,
        *,
        exact: bool = False,
        span: int = 1,
        min_keep: int = 0,
        prefix: int = 0,
        message_dims: int | tuple[int, ...] | None = None,
        per: str = "message",
        pass_kept: bool = False,
        per_rank: Any = False,
    ) -> None:
        super().__init__()
        if not callable(module):
            raise TypeError(f"module must be an nn.Module, but got {module!r}")
        if per not in ("message", "sample"):
            raise ValueError(f"per must be 'message' or 'sample', but got {per!r}")
        if per == "sample" and message_dims is not None:
            raise ValueError(f"message_dims goes with per='message', but got {message_dims} with per='sample'")
        self._set_options(p, exact, span, min_keep, prefix, message_dims, per_rank)
        self.module, self.per, self.pass_kept = module, per, pass_kept

    def forward(
        self, x: Tensor, *companions: Tensor, lengths: Any = None, keys: Any = None, seed: Any = None,
        protect: Any = None, positions: Any = None,
    ) -> Tensor:  # fmt: skip
        """Call the module on a part of x.

        Args:
            x: `(*message dims, *features)`.
            companions: what the module takes beside x, and loses the same messages, as `Kept.take` does it.
            lengths, keys, seed, protect, positions: as for `message_select`; with `per="sample"` of the samples, which
                are then the messages of one row.

        Returns:
            A tensor of x's shape.
        """
        if x.is_nested:
            raise ValueError("x must not be nested: pad it, torch.nested.to_padded_tensor(x, 0.0), and give lengths")
        whole = self.per == "sample"
        request = self._request(
            x, seed, message_dims=1 if whole else self.message_dims, lengths=lengths, keys=keys, protect=protect,
            positions=positions,
        )  # fmt: skip
        y, kept = select(x, request, read_layout(None, None))
        if y is not x:
            companions = tuple(kept.take(companion) for companion in companions)  # type: ignore[union-attr]
        if y is not x and kept.max_length == 0 < kept.mask.numel():  # type: ignore[union-attr]  # nothing to see
            return x
        made = self.module(y, *companions, **({"kept": kept} if self.pass_kept else {}))
        if made.shape != y.shape:
            raise ValueError(
                f"module must give back the shape {tuple(y.shape)} that it got, but got {tuple(made.shape)}"
            )
        if not whole:
            return made if y is x else _put_back(made, x, kept, self.message_dims)
        if y is x:
            return x + made  # type: ignore[no-any-return]
        made = made.to(x.dtype)
        return torch.index_add(x, 0, kept.indices, made, alpha=len(x) / len(y))  # type: ignore[union-attr]

    if TYPE_CHECKING:
        __call__ = forward


def _put_back(made: Tensor, x: Tensor, kept: Any, message_dims: Any) -> Tensor:
    """Among the messages of x, in the wider of both types: autocast may have changed what the module made."""
    dtype = torch.promote_types(made.dtype, x.dtype)
    made, x = made.to(dtype), x.to(dtype)
    if not isinstance(message_dims, tuple):
        return kept.restore(made, fill=x)  # type: ignore[no-any-return]
    order = message_order(x.ndim, message_dims)
    y: Tensor = kept.restore(made.permute(order), fill=x.permute(order))
    return y.permute(order_back(order))
