"""What a type checker knows of the public names. Checked by mypy, never run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import assert_type

from msgdrop_numba import (
    Kept,
    MessageDropout,
    MessageSelect,
    MessageSubset,
    fold_in,
    keep_mask,
    key_padding_mask,
    message_dropout,
    message_select,
    select_messages,
)


def arrays(x: NDArray[np.float32]) -> None:
    assert_type(message_dropout(x), NDArray[np.float32])
    assert_type(message_dropout(x, 0.5, exact=True, seed=1), NDArray[np.float32])
    assert_type(message_dropout(x, 0.5, return_mask=True), tuple[NDArray[np.float32], NDArray[np.bool_]])
    assert_type(keep_mask((2, 3), 0.5, seed=1), NDArray[np.bool_])
    assert_type(message_select(x, 0.5, layout="packed"), tuple[NDArray[np.float32], Kept])
    assert_type(select_messages((2, 3), capacity=2), Kept)
    assert_type(fold_in(1, 2), int)
    assert_type(message_dropout(x, 0.5, message_dims=(0, 2)), NDArray[np.float32])
    assert_type(key_padding_mask(keep_mask((2, 3), seed=1), [1, 2]), NDArray[np.bool_])


def tensors(x: Tensor) -> None:
    assert_type(message_dropout(x, 0.5, True, True), Tensor)
    assert_type(message_dropout(x, 0.5, return_mask=True, span=2), tuple[Tensor, Tensor])
    assert_type(keep_mask((2, 3), 0.5, seed=1, min_keep=1, device="cpu"), Tensor)
    assert_type(message_select(x, 0.5, True, exact=True), tuple[Tensor, Kept])


def device_arrays(x: Any, told: bool) -> None:
    assert_type(message_dropout(x, return_mask=told), Any)


def layer(x: Tensor) -> None:
    drop = MessageDropout(0.5)
    assert_type(drop(x), Tensor)
    assert_type(drop(x, lengths=[1, 2], return_mask=True), tuple[Tensor, Tensor])
    assert_type(MessageSubset(drop, 0.5)(x, seed=1), Tensor)


def wrong(x: Tensor) -> None:
    message_dropout(x, 0.5, rate=0.5)  # type: ignore[call-overload]
    message_select(x, 0.5, return_mask=True)  # type: ignore[call-overload]
    MessageSelect(0.5)(x, layout="packed")  # type: ignore[call-arg]
    keep_mask((2, 3), seed=1, exact="yes")  # type: ignore[call-overload]
