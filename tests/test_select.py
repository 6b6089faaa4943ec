"""`message_select` and `Kept` on arrays and tensors: what comes back, companions, and bad input."""

from __future__ import annotations

import pickle
from typing import Any

import naive
import numpy as np
import pytest
import torch
from helpers import internals, oracle
from helpers.cases import both, tensor

from msgdrop_numba import Kept, keep_mask, message_dropout, message_select, select_messages

LAYOUTS = pytest.mark.parametrize("layout", ["padded", "packed"])
X = np.random.default_rng(0).standard_normal((3, 7, 4)).astype(np.float32)
RULES: list[dict[str, Any]] = [
    {}, {"exact": True}, {"exact": True, "prefix": 2, "min_keep": 3}, {"span": 3, "min_keep": 2}, {"p": (0.2, 0.9)},
    {"p": 1.0, "min_keep": 2, "prefix": 1}, {"protect": np.arange(7) % 3 == 0, "positions": 5},
    {"scale": True, "exact": True, "prefix": 1}, {"scale": True, "p": np.linspace(0, 1, 7)}, {"message_dims": 1},
]  # fmt: skip


def equal(got: Any, want: Any) -> None:
    """Bit for bit."""
    assert str(got.dtype).removeprefix("torch.") == str(want.dtype).removeprefix("torch.")
    assert tuple(got.shape) == tuple(want.shape)
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(want).tobytes()


@both
@pytest.mark.parametrize("fill", [0, 2.5])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("layout", [None, "padded", "packed"])
def test_put_back_it_is_message_dropout(make, rule, fill, layout):
    x = make(X)
    y, kept = message_select(x, **{"p": 0.5, "seed": 9, **rule}, layout=layout)
    equal(kept.restore(y, fill), message_dropout(x, **{"p": 0.5, "seed": 9, **rule}, fill=fill))


@both
@LAYOUTS
def test_what_is_removed_never_leaks(make, layout, monkeypatch):
    keep = keep_mask(X.shape[:2], 0.5, seed=3, lengths=[7, 5, 0])
    valid = keep & naive.part(keep.shape, [7, 5, 0])
    x = make(np.where(valid[..., None], X, np.nan).astype(np.float32))
    for _ in range(2):
        y, kept = message_select(x, 0.5, seed=3, lengths=[7, 5, 0], layout=layout, scale=True)
        assert not np.isnan(np.asarray(y)).any()
        assert not np.isnan(np.asarray(kept.restore(y))).any()
        if make is not tensor:
            break
        x = x.requires_grad_()
        y, kept = message_select(x, 0.5, seed=3, lengths=[7, 5, 0], layout=layout, scale=True)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad[..., 0] != 0, kept.mask)
        x = x.detach()
        internals.no_host_tensors(monkeypatch)


@both
@pytest.mark.parametrize("nothing", [{"training": False}, {"p": 0.0}, {"p": (0, 0)}], ids=str)
def test_where_nothing_drops_x_comes_back(make, nothing):
    x = make(X)
    for layout in (None, "dense", "padded"):
        y, kept = message_select(x, **{"p": 0.5, **nothing}, layout=layout)
        assert y is x
        assert kept.layout == (layout or "dense")
        equal(kept.indices, np.broadcast_to(np.arange(7), (3, 7)))
        equal(kept.take(x), X)
        equal(kept.restore(x, 5.0), X)
    y, kept = message_select(x, **{"p": 0.5, **nothing}, layout="packed", capacity=2)
    equal(y, X.reshape(21, 4))
    equal(kept.restore(y), X)


@both
def test_where_nothing_drops_padding_goes(make):
    x, lengths = make(X), [7, 2, 0]
    inside = naive.part(X.shape[:2], lengths)
    y, kept = message_select(x, 0.5, False, lengths=lengths)
    assert y is x
    assert kept.layout == "padded"
    equal(kept.mask, inside)
    equal(kept.key_padding_mask, ~inside)
    equal(kept.restore(y, 1.0), np.where(inside[..., None], X, np.float32(1)))
    y, kept = message_select(x, 0.5, False, lengths=lengths, layout="packed")
    equal(y, X[inside])
    equal(kept.restore(y), np.where(inside[..., None], X, np.float32(0)))
    assert np.asarray(kept.cu_seqlens).tolist() == [0, 7, 9, 9]
    with pytest.raises(ValueError, match="but got lengths"):
        message_select(x, 0.5, False, lengths=lengths, layout="dense")


def test_dense_is_what_can_be_known_beforehand():
    for options in ({"exact": True}, {"p": 1.0, "min_keep": 2}, {"exact": True, "prefix": 5, "min_keep": 1}):
        assert message_select(X, **{"p": 0.9, "seed": 1, **options})[1].layout == "dense"
    for options in ({}, {"exact": True, "lengths": [7, 7, 7]}, {"exact": True, "capacity": 7},
                    {"exact": True, "protect": np.zeros(7, bool)}, {"p": (0.5, 0.9), "exact": True}):  # fmt: skip
        assert message_select(X, **{"p": 0.9, "seed": 1, **options})[1].layout == "padded"


@pytest.mark.parametrize("size", [1, 2, 7, 100, 4097])
@pytest.mark.parametrize("p", [0.29, 0.5, 2.0**-33, 1 - 2.0**-33, 1.0])
def test_every_row_keeps_as_many_as_is_said(size, p):
    for rule in ({}, {"min_keep": 3}, {"prefix": min(2, size)}):
        y, kept = message_select(np.ones((2, size, 1)), p, exact=True, seed=5, **rule)
        mask = keep_mask((2, size), p, exact=True, seed=5, **rule)
        assert mask.sum(-1).tolist() == [y.shape[1]] * 2 == kept.lengths.tolist()
        equal(kept.mask, mask)


@both
@LAYOUTS
def test_a_capacity_is_kept_to(make, layout):
    x = make(X)
    _, free = message_select(x, 0.5, seed=4, layout=layout)
    needed = free.indices.shape[-1]
    y, kept = message_select(x, 0.5, seed=4, layout=layout, capacity=needed + 3)
    assert kept.indices.shape[-1] == needed + 3
    assert not np.asarray(y)[..., needed:, :].any()
    equal(kept.cu_seqlens, free.cu_seqlens)
    equal(kept.restore(y), message_dropout(x, 0.5, seed=4))
    with pytest.raises(ValueError, match=f"capacity must be at least {needed}, .* but got {needed - 1}"):
        message_select(x, 0.5, seed=4, layout=layout, capacity=needed - 1)


@both
@pytest.mark.parametrize("layout", [None, "padded", "packed"])
def test_companions(make, layout):
    p, rule = (0.5, {"exact": True}) if layout is None else (0.5, {})
    kept = select_messages((3, 7), p, seed=2, layout=layout, device=None if make is not tensor else "cpu", **rule)
    index, _ = naive.select(np.asarray(kept.mask), kept.layout)
    rng = np.random.default_rng(1)
    for array in (rng.integers(0, 9, (3, 7)), rng.random((3, 7, 2, 3)), rng.random((3, 7)) < 0.5, X[:, :, :0]):
        equal(kept.take(make(array)), naive.removed(array, 2, index))
    within = np.where(index < 0, -1, index % 7)
    table = rng.random((7, 5))
    equal(kept.take(make(table), 0), naive.removed(table, 1, within))
    attention = rng.random((3, 2, 7, 7))
    taken = naive.removed(np.moveaxis(attention, 2, 1), 2, index)
    if layout == "packed":
        equal(kept.take(make(attention), dim=2), taken)
        return
    rows = kept.take(make(attention), dim=2)
    equal(rows, np.moveaxis(taken, 1, 2))
    both_ways = naive.removed(np.moveaxis(np.moveaxis(taken, 1, 2), -1, 1), 2, index)
    equal(kept.take(rows, dim=-1), np.moveaxis(both_ways, 1, -1))


@both
def test_companions_of_one_row(make):
    kept = select_messages(7, 0.5, seed=2)
    equal(kept.take(make(X[0])), X[0][np.asarray(kept.mask)])


def test_companions_of_any_kind():
    kept = select_messages((2, 5), 0.5, seed=2)
    index, _ = naive.select(kept.mask, "padded")
    names = np.array([[f"{row}{i}" for i in range(5)] for row in range(2)])
    for array in (names, names.astype(object), names.astype("S3"), X[:2, :5].astype(">f4"), X[:2, :5].astype("M8[s]")):
        taken = kept.take(array)
        assert taken.dtype == array.dtype
        assert np.array_equal(taken[index >= 0], array.reshape(10, *array.shape[2:])[index[index >= 0]])
        back = kept.restore(taken)
        assert np.array_equal(back[kept.mask], array[kept.mask])
        if array.dtype != object:
            equal(kept.restore(taken, fill=array), array)


@both
@pytest.mark.parametrize("layout", [None, "packed"])
def test_indices_are_the_callers_own(make, layout):
    """To be changed, by an offset say: what was kept stays."""
    y, kept = message_select(make(X), 0.5, seed=6, layout=layout)
    before = np.asarray(kept.indices).copy()
    indices = kept.indices
    indices += 2**40
    equal(kept.indices, before)
    equal(kept.take(make(X)), y)


def test_companions_of_objects_without_features():
    kept = select_messages((2, 5), 0.5, seed=2)
    assert kept.take(np.empty((2, 5, 0), object)).shape == (2, 2, 0)


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="NumPy 2 has strings of any length")
def test_padding_among_strings_is_empty():
    kept = select_messages((2, 5), 0.5, seed=2)
    words = np.array([["a", "b", "c", "d", "e"]] * 2).astype(np.dtypes.StringDType())
    taken = kept.take(words)
    assert taken.dtype == words.dtype
    assert taken.tolist() == [["c", ""], ["a", "b"]]
    assert np.array_equal(kept.restore(taken), np.where(kept.mask, words.astype("U1"), ""))


def test_arrays_and_tensors_may_meet_on_the_host():
    array, host = (select_messages((3, 7), 0.5, seed=2, device=device) for device in (None, "cpu"))
    equal(array.take(tensor(X)), host.take(X))
    assert isinstance(array.take(tensor(X)), torch.Tensor)
    moved = array.to("meta")
    assert moved.take(torch.empty(3, 7, 4, device="meta")).shape == array.take(X).shape
    with pytest.raises(ValueError, match=r"is on meta: kept.to\('cpu'\)"):
        moved.take(X)
    with pytest.raises(ValueError, match=r"is on meta, but the tensor on cpu: kept.to\('cpu'\)"):
        moved.take(tensor(X))


@both
@LAYOUTS
def test_what_is_put_back_may_be_anything(make, layout):
    _, kept = message_select(make(X), 0.5, seed=6, layout=layout)
    index, _ = naive.select(np.asarray(kept.mask), layout)
    rng = np.random.default_rng(1)
    for dtype, fill in (("float64", rng.random((2, 2))), ("int16", -7), ("bool", True), ("float16", 0.0)):
        y = rng.integers(0, 2, (*index.shape, 2, 2)).astype(dtype)
        given = make(fill) if isinstance(fill, np.ndarray) else fill
        equal(kept.restore(make(y), given), naive.restored(y, (3, 7), index, fill))
    y, x = (rng.random(shape) for shape in ((*index.shape, 5), (3, 7, 5)))
    equal(
        kept.restore(make(y), make(x)), np.where(np.asarray(kept.mask)[..., None], naive.restored(y, (3, 7), index), x)
    )


@both
@LAYOUTS
def test_what_was_kept_pickles(make, layout):
    y, kept = message_select(make(X), 0.5, seed=6, layout=layout)
    again = pickle.loads(pickle.dumps(kept))
    assert type(again) is Kept
    equal(again.indices, kept.indices)
    equal(again.restore(y), kept.restore(y))
    assert repr(again) == repr(kept) == f"Kept(layout={layout!r}, shape=(3, 7), slots={tuple(kept.indices.shape)})"


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"layout": "sparse"}, ValueError, "layout must be 'dense', 'padded', 'packed' or None, but got 'sparse'"),
    ({"layout": "dense"}, ValueError, "known to keep as many each, but got exact=False: give exact"),
    ({"layout": "dense", "exact": True, "protect": np.zeros(7, bool)}, ValueError, "but got protect: give none"),
    ({"layout": "dense", "exact": True, "p": (0.1, 0.5)}, ValueError, r"got p=\(0.1, 0.5\) of each row: give one"),
    ({"layout": "dense", "exact": True, "capacity": 3}, ValueError, "capacity goes with layout 'padded' or 'packed'"),
    ({"capacity": 0}, ValueError, "capacity must be at least 1, but got 0"),
    ({"capacity": 2.0}, TypeError, "capacity must be an integer or None, but got 2.0"),
    ({"capacity": True}, TypeError, "capacity must be an integer or None, but got True"),
    ({"prefix": 8}, ValueError, "prefix must be at most 7"),
    ({"p": 1.5}, ValueError, "p must be a probability"),
    ({"lengths": [1, 2]}, ValueError, "lengths must have shape"),
    ({"training": 1}, TypeError, "training must be True or False"),
]


@both
@pytest.mark.parametrize(("options", "error", "said"), WRONG, ids=str)
def test_bad_input_draws_nothing(make, options, error, said):
    state = torch.random.get_rng_state()
    with pytest.raises(error, match=said):
        message_select(make(X), **{"p": 0.5, **options})
    if "training" not in options:
        with pytest.raises(error, match=said):
            select_messages((3, 7), **{"p": 0.5, **options})
    assert torch.equal(torch.random.get_rng_state(), state)


@both
def test_bad_companions(make):
    y, kept = message_select(make(X), 0.5, seed=1)
    for wrong, dim in ((X[:, :6], None), (X[:2], None), (X[0], None), (X, 2), (X, 9), (X[0, :6], 0), (X[0, 0], 1)):
        with pytest.raises(ValueError, match="t must have shape"):
            kept.take(make(wrong), dim)
    for wrong in (X, X[:2], np.asarray(y)[:, :-1]):
        with pytest.raises(ValueError, match=r"y must have shape \(3, \d\) and features, but got"):
            kept.restore(make(wrong))
    for fill in (X[0, 0, :3], X[:, :6], X.astype(np.float64)):
        with pytest.raises(ValueError, match="fill"):
            kept.restore(y, make(fill))
    with pytest.raises(TypeError, match="must be a NumPy array"):
        kept.take([[1] * 7] * 3)
    if make is not tensor:
        with pytest.raises(TypeError, match="y must be a tensor, but got a NumPy array"):
            kept.to_nested(y)
    with pytest.raises(ValueError, match="layout 'packed' has no padding"):
        _ = message_select(make(X), 0.5, layout="packed")[1].key_padding_mask


def test_device_arrays_are_refused():
    class Device:
        __cuda_array_interface__ = ()

    with pytest.raises(TypeError, match=r"got Device: make it a tensor first"):
        message_select(Device(), 0.5)


@pytest.mark.kernels
@both
@pytest.mark.parametrize("width", [1, 3, 16, 17, 48, 64, 128, 256, 1024, 1088, 4096, 8192])
def test_stores_past_the_cache(make, width, chunks, monkeypatch):
    """Which large outputs alone are written by."""
    internals.stream_everything(monkeypatch)
    for dtype in ("uint8", "float32"):
        features = max(1, width // np.dtype(dtype).itemsize)
        x = np.random.default_rng(width).integers(0, 99, (3, 20, features)).astype(dtype)
        options = {"seed": width, "scale": dtype == "float32", "prefix": 2}
        want, keep = oracle.dropout(x, 0.5, **options)
        y, kept = message_select(make(x), 0.5, **options)
        equal(y, naive.removed(want, 2, naive.select(keep, "padded")[0]))
        equal(kept.restore(y), want)


def test_scaled_bytes_in_another_order():
    x = X.astype(">f4")
    y, kept = message_select(x, 0.5, seed=3, scale=True)
    assert y.dtype == x.dtype
    assert np.array_equal(kept.restore(y), message_dropout(x, 0.5, seed=3, scale=True))


@both
def test_long_messages_and_rows(make, chunks):
    """Wide enough for the processor to be told what comes next."""
    x = np.random.default_rng(0).random((2, 1500, 450))
    y, kept = message_select(make(x), 0.5, seed=3, exact=True)
    mask = keep_mask((2, 1500), 0.5, seed=3, exact=True)
    equal(y, x[mask].reshape(2, 750, 450))
    equal(kept.restore(y, fill=make(x)), x)
