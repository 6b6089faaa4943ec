"""message_dropout and keep_mask: edge values, targets and layouts, for arrays and tensors."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.cases import both

from msgdrop_numba import fold_in, keep_mask, message_dropout

ODD_FLOATS = [
    0x80000000,
    0x00000001,
    0x807FFFFF,
    0x7F800000,
    0xFF800000,
    0x7FC00001,
    0x7F800001,
    0xFFC12345,
    0x3F800000,
]


def odd_array(rows: int, size: int) -> np.ndarray:
    """-0.0, denormals, infinities, quiet and signalling NaNs of several payloads in every message."""
    words = np.array(ODD_FLOATS, np.uint32)
    return np.tile(words, (rows, size, 1)).view(np.float32)


# ---- edge values


@both
def test_p_zero_gives_x_itself_and_draws_no_seed(make):
    x = make(np.ones((2, 3, 4), np.float32))
    before = torch.get_rng_state()
    assert message_dropout(x, 0.0) is x
    assert message_dropout(x, 0) is x
    assert message_dropout(x, 0.9, training=False) is x
    y, mask = message_dropout(x, 0.9, False, return_mask=True)
    assert y is x
    assert np.asarray(mask).all()
    assert mask.shape == (2, 3)
    out = make(np.zeros((2, 3, 4), np.float32))
    assert message_dropout(x, 0.0, out=out) is out
    assert np.asarray(out).all()
    assert torch.equal(torch.get_rng_state(), before)


@both
@pytest.mark.parametrize("scale", [False, True])
def test_p_one_fills_everything(make, scale):
    x = make(np.full((2, 3, 4), np.nan, np.float32))
    y, mask = message_dropout(x, 1.0, scale=scale, fill=-1.5, return_mask=True)
    assert not np.asarray(mask).any()
    assert (np.asarray(y) == -1.5).all()


@both
@pytest.mark.parametrize("inplace", [False, True])
def test_kept_messages_pass_bit_for_bit_and_dropped_ones_never_leak(make, inplace, chunks):
    x = odd_array(16, 33)
    y, mask = message_dropout(make(x), 0.5, inplace=inplace, seed=3, return_mask=True)
    want = np.where(np.asarray(mask)[..., None], x.view(np.uint32), np.uint32(0))
    assert np.array_equal(np.asarray(y).view(np.uint32), want)


@both
def test_scaled_infinities_and_nans_do_not_leak(make):
    x = odd_array(16, 33)
    y, mask = message_dropout(make(x), 0.5, scale=True, seed=3, return_mask=True)
    assert not np.asarray(y)[~np.asarray(mask)].any()
    assert np.isnan(np.asarray(y)[np.asarray(mask)]).any()


@both
def test_fill_values_bit_for_bit(make):
    nan = struct.unpack("f", struct.pack("I", 0x7FC00000))[0]
    for fill, word in ((-0.0, 0x80000000), (nan, 0x7FC00000), (float("-inf"), 0xFF800000), (1, 0x3F800000)):
        y = message_dropout(make(np.ones((2, 3, 5), np.float32)), 1.0, fill=fill)
        assert (np.asarray(y).view(np.uint32) == word).all()


@both
def test_fill_of_other_dtypes(make):
    assert (np.asarray(message_dropout(make(np.zeros((2, 3, 5), np.int8)), 1.0, fill=-128)) == -128).all()
    assert np.asarray(message_dropout(make(np.zeros((2, 3, 5), bool)), 1.0, fill=True)).all()
    assert (np.asarray(message_dropout(make(np.zeros((2, 3, 5), np.complex64)), 1.0, fill=2 - 1j)) == 2 - 1j).all()


@both
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 4)])
def test_empty_arrays(make, shape):
    x = make(np.zeros(shape, np.float32))
    y, mask = message_dropout(x, 0.5, seed=1, return_mask=True)
    assert tuple(y.shape) == shape
    dims = 2 if len(shape) == 3 else 1
    assert np.array_equal(np.asarray(mask), keep_mask(shape[:dims], 0.5, seed=1))


@both
def test_two_dims_are_one_row_and_message_dims_choose(make):
    x = make(np.ones((6, 4), np.float32))
    _, mask = message_dropout(x, 0.5, seed=1, return_mask=True)
    assert np.array_equal(np.asarray(mask), keep_mask(6, 0.5, seed=1, keys=0))
    x = make(np.ones((2, 3, 4, 5), np.float32))
    for dims in (1, 2, 3):
        _, mask = message_dropout(x, 0.5, seed=1, message_dims=dims, return_mask=True)
        assert np.array_equal(np.asarray(mask), keep_mask((2, 3, 4)[:dims], 0.5, seed=1))


@both
def test_keys_of_any_kind_name_the_same_rows(make):
    x = make(np.ones((3, 8, 1), np.float32))
    want = np.asarray(message_dropout(x, 0.5, seed=1, keys=np.array([2**64 - 5, 2**63, 7], np.uint64)))
    for keys in ([-5, 2**63, 7], (2**64 - 5, -(2**63), np.int8(7)), torch.tensor([-5, -(2**63), 7])):
        assert np.array_equal(np.asarray(message_dropout(x, 0.5, seed=1, keys=keys)), want)
    small = np.array([1, 2, 3], ">i2")
    assert np.array_equal(keep_mask((3, 8), seed=1, keys=small), keep_mask((3, 8), seed=1, keys=[1, 2, 3]))


def test_keys_may_lack_trailing_dims():
    mask = keep_mask((2, 3, 8), 0.5, seed=9, keys=[4, -4])
    for b, key in enumerate((4, -4)):
        for r in range(3):
            assert np.array_equal(mask[b, r], keep_mask(8, 0.5, seed=9, keys=fold_in(key % 2**64, r)))


def test_seeds_of_any_kind():
    want = keep_mask((3, 8), seed=2**64 - 3)
    assert np.array_equal(keep_mask((3, 8), seed=np.uint64(2**64 - 3)), want)
    assert np.array_equal(keep_mask((3, 8), seed=torch.tensor(-3)), want)
    assert fold_in(torch.tensor(-3), 1) == fold_in(2**64 - 3, 1)


def test_numpy_seeds_come_from_the_generator_or_fresh_entropy():
    x = np.ones((4, 64, 1), np.float32)
    first, second = (message_dropout(x, generator=np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(first, second)
    state = np.random.get_state()[1].copy()
    assert not np.array_equal(message_dropout(x), message_dropout(x))
    assert np.array_equal(np.random.get_state()[1], state)


@both
def test_lengths_protect_padding(make, chunks):
    x = odd_array(3, 2100)
    lengths = np.array([2100, 1500, 0])
    y, mask = message_dropout(make(x), 1.0, scale=True, lengths=lengths, return_mask=True)
    valid = np.arange(2100) < lengths[:, None]
    assert np.array_equal(np.asarray(mask), ~valid)
    assert np.array_equal(np.asarray(y).view(np.uint32), np.where(valid[..., None], 0, x.view(np.uint32)))


@both
@pytest.mark.parametrize(
    ("dtype", "fill"),
    [("int64", 2**63 - 1), ("int64", -(2**63)), ("uint64", 2**64 - 1), ("uint64", np.uint64(2**63 + 5)), ("int8", np.float32(-3)),
     ("float32", np.float64(0.1)), ("float64", Fraction(1, 3)), ("complex64", np.complex64(3 + 1j))],
)  # fmt: skip
def test_fills_are_exact(make, dtype, fill):
    y = np.asarray(message_dropout(make(np.zeros((2, 3, 5), dtype)), 1.0, fill=fill))
    want = np.full((2, 3, 5), float(fill) if isinstance(fill, Fraction) else fill, dtype)
    assert y.tobytes() == want.tobytes()


@both
def test_nothing_is_checked_for_writing_where_nothing_is_written(make):
    x = make(np.ones((2, 3, 4), np.float32))
    if isinstance(x, np.ndarray):
        x.flags.writeable = False
    else:
        x = x[:, :1].expand(2, 3, 4).requires_grad_()
    assert message_dropout(x, 0.0, inplace=True) is x
    assert message_dropout(x, 0.5, training=False, inplace=True) is x


@both
def test_arguments_may_share_the_memory_that_is_written(make):
    x = np.arange(128).reshape(8, 8, 2)
    for name, index in (("keys", slice(16, 24)), ("lengths", slice(0, 8))):
        want = message_dropout(make(x), 0.9, seed=1, **{name: x.ravel()[index].copy()})
        y = make(x)
        message_dropout(y, 0.9, seed=1, inplace=True, **{name: y.reshape(-1)[index]})
        assert np.array_equal(np.asarray(y), np.asarray(want))
    y = make(x)
    message_dropout(y, 1.0, inplace=True, fill=y[0, 3])
    assert (np.asarray(y) == x[0, 3]).all()


# ---- where it is written


@both
def test_layouts(make):
    base = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    layouts = [base.transpose(1, 0, 2), base.transpose(0, 2, 1), base[::2], base[:, :, ::2], base[:, 1:3]]
    for view in layouts:
        want = message_dropout(np.ascontiguousarray(view), 0.5, seed=2)
        # the same strides for both kinds: the layout of a view of a copy
        x = make(base) if isinstance(make(base), np.ndarray) else torch.from_numpy(base.copy())
        strided = torch.as_strided if not isinstance(x, np.ndarray) else np.lib.stride_tricks.as_strided
        offset = (view.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // 4
        steps = tuple(s // 4 for s in view.strides)
        if isinstance(x, np.ndarray):
            x = strided(x.ravel()[offset:], view.shape, view.strides, writeable=True)
        else:
            x = strided(x, view.shape, steps, offset)
        assert np.array_equal(np.asarray(message_dropout(x, 0.5, seed=2)), want)
        out = make(np.zeros(view.shape, np.float32))
        assert np.array_equal(np.asarray(message_dropout(x, 0.5, seed=2, out=out)), want)
        assert message_dropout(x, 0.5, True, True, seed=2) is x
        assert np.array_equal(np.asarray(x), want)


def test_outputs_keep_the_strides_that_dropout_keeps():
    dense = torch.randn(5, 4, 6, 3)
    views = [
        dense,
        dense.transpose(0, 1),
        dense.transpose(1, 3),
        dense.to(memory_format=torch.channels_last),
        dense[:, ::2],
    ]
    for view in [*views, dense[:, :1].expand(5, 4, 6, 3)]:
        for x in (view, view.detach().requires_grad_()):
            assert message_dropout(x, 0.5).stride() == torch.nn.functional.dropout(x).stride()
    for view in views:
        x = view.numpy()
        assert message_dropout(x, 0.5).strides == np.empty_like(x).strides


@pytest.mark.long
def test_more_than_two_to_the_31_elements():
    x = np.ones((3, 2**20 + 3, 700), np.uint8)
    assert x.size > 2**31
    y, mask = message_dropout(x, 0.5, seed=1, return_mask=True)
    assert np.array_equal(mask, keep_mask(x.shape[:2], 0.5, seed=1))
    for feature in (0, 350, 699):
        assert np.array_equal(y[..., feature], mask)
    t = torch.from_numpy(x)
    message_dropout(t, 0.5, seed=1, inplace=True)
    assert np.array_equal(x, y)


def test_numpy_negative_strides_and_foreign_byte_order():
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    want = message_dropout(base[::-1, ::-1].copy(), 0.5, seed=2, scale=True)
    assert np.array_equal(message_dropout(base[::-1, ::-1], 0.5, seed=2, scale=True), want)
    foreign = base[::-1, ::-1].astype(">f4")
    y = message_dropout(foreign, 0.5, seed=2, scale=True)
    assert y.dtype == foreign.dtype
    assert np.array_equal(y, want)
    assert message_dropout(foreign, 0.5, inplace=True, seed=2, scale=True) is foreign
    assert np.array_equal(foreign, want)
    for scale in (False, True):
        assert (message_dropout(foreign, 1.0, fill=3.0, scale=scale) == 3.0).all()


@both
def test_out_may_be_strided_or_x_itself(make):
    x = make(np.ones((4, 5, 6), np.float32))
    want = np.asarray(message_dropout(x, 0.5, seed=2))
    store = make(np.full((4, 2, 5, 6), 7, np.float32))
    assert np.array_equal(np.asarray(message_dropout(x, 0.5, seed=2, out=store[:, 1])), want)
    assert (np.asarray(store)[:, 0] == 7).all()
    assert np.array_equal(np.asarray(message_dropout(x, 0.5, seed=2, out=x[:])), want)
    assert np.array_equal(np.asarray(x), want)
    one = make(np.ones((3, 4), np.float32))  # the same memory, but for strides of dims of size 1
    message_dropout(one[None], 1.0, out=one.reshape(1, 3, 4))
    assert not np.asarray(one).any()
    # interleaved with x, without an element in common
    store = make(np.ones((4, 2, 5, 6), np.float32))
    message_dropout(store[:, 0], 0.5, seed=2, out=store[:, 1])
    assert np.array_equal(np.asarray(store)[:, 1], want)
    assert np.asarray(store)[:, 0].all()
