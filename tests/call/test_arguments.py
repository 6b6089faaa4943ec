"""What bad input gets, for arrays and tensors; nothing is written before all arguments are checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.cases import both

from msgdrop_numba import fold_in, keep_mask, message_dropout, select_messages

X = np.ones((2, 3, 4), np.float32)
BAD = [
    ({"p": -0.1}, ValueError, "p must be a probability.*-0.1"),
    ({"p": 1.5}, ValueError, "p must be a probability.*1.5"),
    ({"p": float("nan")}, ValueError, "p must be.*nan"),
    ({"p": "0.5"}, TypeError, "p must be.*'0.5'"),
    ({"p": None}, TypeError, "p must be.*None"),
    ({"p": True}, TypeError, "p must be.*True"),
    ({"p": [0.5]}, TypeError, r"p must be.*\[0.5\]"),
    ({"message_dims": 0}, ValueError, "message_dims.*0"),
    ({"message_dims": 3}, ValueError, r"feature dim.*\(2, 3, 4\)"),
    ({"message_dims": -1}, ValueError, "message_dims.*-1"),
    ({"message_dims": 1.0}, TypeError, "message_dims.*1.0"),
    ({"message_dims": True}, TypeError, "message_dims.*True"),
    ({"fill": "a"}, TypeError, "fill must be.*'a'"),
    ({"fill": None}, TypeError, "fill must be.*None"),
    ({"fill": 1e39}, ValueError, "fill must be.*1e\\+39"),
    ({"fill": 1j}, ValueError, "fill must be.*1j"),
    ({"seed": -1}, ValueError, "seed must be.*-1"),
    ({"seed": 2**64}, ValueError, f"seed must be.*{2**64}"),
    ({"seed": 1.0}, TypeError, "seed must be.*1.0"),
    ({"seed": True}, TypeError, "seed must be.*True"),
    ({"seed": torch.tensor([1])}, TypeError, "seed tensor must be 0-d int64"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed tensor must be 0-d int64"),
    ({"keys": [1, 2, 3]}, ValueError, r"keys must have shape \(2,\).*\(3,\)"),
    ({"keys": [[1], [2]]}, ValueError, r"keys must have shape \(2,\).*\(2, 1\): keys name rows; number .* by positions"),
    ({"keys": [1.0, 2.0]}, TypeError, "keys must be integers.*1.0"),
    ({"keys": np.array([1.0, 2.0])}, TypeError, "keys must be integers.*float64"),
    ({"keys": torch.tensor([1.0, 2.0])}, TypeError, "keys must be integers.*float32"),
    ({"keys": np.array([True, False])}, TypeError, "keys must be integers.*bool"),
    ({"keys": ["a", 1.5]}, TypeError, "keys must be integers.*1.5"),
    ({"keys": [1, None]}, TypeError, "keys must be integers.*None"),
    ({"keys": [1, 2**64]}, ValueError, f"keys must be in.*{2**64}"),
    ({"keys": [1, -(2**63) - 1]}, ValueError, "keys must be in"),
    ({"lengths": [1]}, ValueError, r"lengths must have shape \(2,\).*\(1,\)"),
    ({"lengths": [1, 4]}, ValueError, "lengths must be from 0 to 3.*4"),
    ({"lengths": [-1, 3]}, ValueError, "lengths must be from 0 to 3.*-1"),
    ({"lengths": [1.0, 2.0]}, TypeError, "lengths must be integers"),
    ({"exact": 1}, TypeError, "exact must be.*1"),
    ({"exact": True, "span": 2}, ValueError, "exact can't be combined with span=2"),
    ({"exact": True, "p": np.full(3, 0.5)}, ValueError, "exact needs p to be a single number"),
    ({"span": 0}, ValueError, "span must be.*0"),
    ({"span": 2.0}, TypeError, "span must be.*2.0"),
    ({"span": [2]}, TypeError, r"span must be.*\[2\]"),
    ({"message_dims": [1]}, TypeError, r"message_dims must be.*\[1\]"),
    ({"min_keep": -1}, ValueError, "min_keep must be.*-1"),
    ({"min_keep": 1.5}, TypeError, "min_keep must be.*1.5"),
    ({"p": np.full(2, 0.5)}, ValueError, r"p must be a number or have shape \(3,\) or \(2, 3\).*\(2,\)"),
    ({"p": np.full((3, 2), 0.5)}, ValueError, r"p must be a number or have shape.*\(3, 2\): .* p\[..., None\], and expand"),
    ({"p": np.array([0.5, np.nan, 0.5])}, ValueError, "p must hold probabilities.*nan"),
    ({"p": torch.tensor([0.5, 1.5, 0.5])}, ValueError, "p must hold probabilities.*1.5"),
    ({"p": np.array([0.5, -0.1, 0.5])}, ValueError, "p must hold probabilities.*-0.1"),
    ({"p": np.array([True, False, True])}, TypeError, "p must hold floating-point numbers.*bool"),
    ({"p": torch.tensor([True, False, True])}, TypeError, "p must hold floating-point numbers.*bool"),
    ({"p": torch.full((3,), 0.5 + 0.1j)}, TypeError, "p must hold floating-point numbers.*complex"),
    ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths must be integers"),
    ({"lengths": torch.tensor([True, False])}, TypeError, "lengths must be integers"),
    ({"p": np.array(1.5)}, ValueError, "p must be a probability.*1.5"),
    ({"lengths": [2**63 + 1, 1]}, ValueError, "lengths must be from 0 to 3"),
    ({"generator": 3}, TypeError, "generator must be.*3"),
    ({"p": (0.6, 0.5)}, ValueError, r"p must be a range \(lo, hi\) with lo <= hi.*\(0.6, 0.5\)"),
    ({"p": (0.5,)}, TypeError, r"p must be.*range \(lo, hi\).*\(0.5,\)"),
    ({"p": (0.1, 0.2, 0.3)}, TypeError, r"p must be.*range \(lo, hi\)"),
    ({"p": (0.1, 1.5)}, ValueError, "p must be a probability.*1.5"),
    ({"p": (-0.5, 0.5)}, ValueError, "p must be a probability.*-0.5"),
    ({"p": (0.1, float("nan"))}, ValueError, "p must be a probability.*nan"),
    ({"p": (0.1, "1")}, TypeError, "p must be a number.*'1'"),
    ({"p": (False, True)}, TypeError, "p must be a number.*False"),
    ({"p": (0.1, None), "exact": True}, TypeError, "p must be a number.*None"),
    ({"p": (np.full(3, 0.1), np.full(3, 0.2)), "exact": True}, TypeError, "p must be a number"),
    ({"prefix": -1}, ValueError, "prefix must be an integer from 0.*-1"),
    ({"prefix": 4}, ValueError, "prefix must be at most 3.*4"),
    ({"prefix": 1.0}, TypeError, "prefix must be an integer.*1.0"),
    ({"prefix": True}, TypeError, "prefix must be an integer.*True"),
    ({"protect": np.zeros((2, 3))}, TypeError, "protect must be bool.*float64; a mask of 0 and -inf"),
    ({"protect": torch.zeros(3)}, TypeError, "protect must be bool.*float32; a mask of 0 and -inf"),
    ({"protect": np.zeros((2, 3), np.uint8)}, TypeError, "protect must be bool.*uint8$"),
    ({"protect": [0, 1, 0]}, TypeError, "protect must be bool.*int64$"),
    ({"protect": np.zeros((3, 2), bool)}, ValueError, r"protect must have shape \(3,\) or \(2, 3\).*\(3, 2\)"),
    ({"protect": torch.zeros(2, dtype=torch.bool)}, ValueError, r"protect must have shape \(3,\) or \(2, 3\).*\(2,\)"),
    ({"protect": np.ma.zeros((2, 3), bool)}, TypeError, "protect must be a plain array"),
    ({"lengths": np.ma.array([1, 2], mask=[0, 1])}, TypeError, "lengths must be a plain array"),
    ({"keys": np.ma.array([1, 2], mask=[0, 1])}, TypeError, "keys must be a plain array"),
    ({"positions": np.ma.array([1, 2, 3], mask=[0, 1, 0])}, TypeError, "positions must be a plain array"),
    ({"p": np.ma.array([0.1, 0.2, 0.3], mask=[0, 1, 0])}, TypeError, "p must be a plain array"),
    ({"positions": -1}, ValueError, "positions must be from 0 to.*-1"),
    ({"positions": 2**34 - 2}, ValueError, f"positions must be from 0 to.*{2**34 - 2} for the first of 3"),
    ({"positions": 1.0}, TypeError, "positions must be an integer.*1.0"),
    ({"positions": True}, TypeError, "positions must be an integer.*True"),
    ({"positions": "a"}, TypeError, "positions must be an integer.*'a'"),
    ({"positions": torch.tensor(1.5)}, TypeError, "positions must be"),
    ({"positions": np.arange(3.0)}, TypeError, "positions must be integers.*float64"),
    ({"positions": torch.ones(3)}, TypeError, "positions must be integers.*float32"),
    ({"positions": np.zeros(3, bool)}, TypeError, "positions must be integers.*bool"),
    ({"positions": [0, 1, -1]}, ValueError, "positions must be from 0 to.*-1"),
    ({"positions": [0, 1, 2**34]}, ValueError, f"positions must be from 0 to.*{2**34}"),
    ({"positions": torch.tensor([0, 2**40, 1])}, ValueError, f"positions must be from 0 to.*{2**40}"),
    ({"positions": [0, 1]}, ValueError, r"positions must have shape \(3,\) or \(2, 3\).*\(2,\)"),
    ({"positions": [[0, 1, 2]]}, ValueError, r"positions must have shape.*\(1, 3\)"),
]  # fmt: skip


@both
@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(make, options, error, message):
    out = make(np.full_like(X, 7))
    for written, more in ((out, {"out": out}), (make(X), {"inplace": True})):
        before = np.asarray(written).copy()
        with pytest.raises(error, match=message):
            message_dropout(written if more.get("inplace") else make(X), **{"seed": 0, **more, **unseed(options)})
        assert np.array_equal(np.asarray(written), before)


def unseed(options: dict) -> dict:
    return {"seed": None, **options} if "generator" in options else options


@both
def test_bad_dtypes(make):
    for dtype in (np.int32, np.bool_):
        with pytest.raises(TypeError, match=r"scale=True needs.*(int32|bool)"):
            message_dropout(make(X.astype(dtype)), scale=True)
    for fill in (0.5, 2**31, float("nan"), float("inf"), -(2**31) - 1, 1j):
        with pytest.raises(ValueError, match="fill must be"):
            message_dropout(make(X.astype(np.int32)), fill=fill)
    with pytest.raises(ValueError, match=r"fill must be.*2"):
        message_dropout(make(X.astype(bool)), fill=2)
    with pytest.raises(ValueError, match=r"feature dim.*\(5,\)"):
        message_dropout(make(np.ones(5, np.float32)))
    with pytest.raises(ValueError, match=r"feature dim.*\(\)"):
        message_dropout(make(np.ones((), np.float32)))


@both
def test_bad_targets(make):
    x = make(X)
    wrong = {
        "out must": make(np.zeros((2, 3, 5), np.float32)),
        "float64": make(np.zeros((2, 3, 4), np.float64)),
        "out must be": 3,
        "out must be a": [[1.0]],
    }
    for message, out in wrong.items():
        with pytest.raises((ValueError, TypeError), match=message):
            message_dropout(x, out=out)
    with pytest.raises(ValueError, match="inplace=True or out, not both"):
        message_dropout(x, inplace=True, out=make(X))
    store = make(np.arange(36, dtype=np.float32).reshape(3, 3, 4))
    before = np.asarray(store).copy()
    with pytest.raises(ValueError, match="out overlaps x in part"):
        message_dropout(store[:2], out=store[1:])
    assert np.array_equal(np.asarray(store), before)


@both
def test_bad_vector_fills(make):
    for fill in (np.zeros(3, np.float32), np.zeros(4, np.float64), np.zeros((1, 4), np.float32)):
        x = make(X)
        with pytest.raises(ValueError, match="fill must be a number or a"):
            message_dropout(x, fill=make(fill), inplace=True)
        assert np.array_equal(np.asarray(x), X)
    with pytest.raises(ValueError, match=r"fill must be a number or a tensor.*meta"):
        message_dropout(torch.ones(2, 3, 4), fill=torch.zeros(4, device="meta"))


def test_masked_arrays_are_refused():
    with pytest.raises(TypeError, match="masked"):
        message_dropout(np.ma.masked_array(X))


def test_bad_numpy_targets():
    locked = np.zeros_like(X)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writable"):
        message_dropout(X, out=locked)
    with pytest.raises(ValueError, match="in place, must be writable"):
        message_dropout(locked, inplace=True)
    with pytest.raises(ValueError, match="must not hold elements twice"):
        message_dropout(X, out=np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), X.shape, (0, 0, 4)))
    with pytest.raises(TypeError, match="out must be a NumPy array"):
        message_dropout(X, out=torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match=r"generator must be a numpy.*Generator"):
        message_dropout(X, generator=torch.Generator())
    with pytest.raises(ValueError, match="seed or generator, not both"):
        message_dropout(X, seed=1, generator=np.random.default_rng())


@pytest.mark.parametrize("x", [[[1.0]], "abc", None, 3.0, ((1.0,),)])
def test_other_kinds_of_x(x):
    with pytest.raises(TypeError, match="x must be a NumPy array, a torch tensor or a CuPy"):
        message_dropout(x)


@pytest.mark.parametrize("dtype", [object, "U3", "V4", "M8[s]", [("a", "f4"), ("b", "i4")]])
def test_arrays_that_hold_no_numbers(dtype):
    with pytest.raises(TypeError, match="x must be an array of numbers"):
        message_dropout(np.zeros((2, 3, 4), dtype))


@pytest.mark.parametrize("shape", [(), (2, -1), (2.0, 3), (True, 2), "ab", None])
def test_bad_mask_shapes(shape):
    with pytest.raises(ValueError, match="shape must be"):
        keep_mask(shape, seed=0)


def test_bad_mask_arguments():
    with pytest.raises(ValueError, match="a row has at most"):
        keep_mask((1, 2**34 + 1), seed=0)
    with pytest.raises(TypeError, match="seed must be"):
        keep_mask((2, 3), seed=1.5)
    with pytest.raises(TypeError, match="data must be integers"):
        fold_in(1, 2.0)
    with pytest.raises(ValueError, match="data must be in"):
        fold_in(1, 2**64)


def test_errors_that_say_where_to_go():
    """What is meant is often plain from what was given."""
    for library in (np, torch):
        with pytest.raises(ValueError, match=r"\(5,\): keys name rows; .* by positions, or .* x\[:, None\]"):
            message_dropout(library.ones((5, 3)), 0.5, keys=library.arange(5))
        with pytest.raises(TypeError, match=r"got list; stack them, or let MessageDropoutCollate\(pad=True\)"):
            message_dropout([library.ones((5, 3))] * 2, 0.5)
    for x in ([[1.0]], [], "frames"):
        with pytest.raises(TypeError, match="make it one first"):
            message_dropout(x, 0.5)


@pytest.mark.parametrize("device", ["xpu", "vulkan", "nowhere", 3.5])
def test_a_device_that_is_not_there(device, caplog):
    for draw in (keep_mask, select_messages):
        with pytest.raises(
            ValueError, match=f"^device must be one that torch has here, but got {device!r}: .{{9,200}}$"
        ):
            draw((2, 3), 0.5, seed=1, device=device)
    assert caplog.records == []
