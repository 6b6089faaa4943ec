"""Random small cases, bit for bit against naive.py: NumPy and torch, serial and parallel, compiled or not."""

from __future__ import annotations

import math
import random
from typing import Any

import naive
import numpy as np
import pytest
import torch
from helpers import internals, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from msgdrop_numba import keep_mask, message_dropout

DTYPES = [
    "float32", "float64", "float16", "complex64", "complex128",
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
]  # fmt: skip
PLACES = ("protect", "positions")
P = [0.0, 1.0, 0.5, 0.3, 0.01, 0.99, 2.0**-33, 1 - 2.0**-33]


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def numbers(rng: random.Random, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Arbitrary finite numbers; for floats, of all magnitudes."""
    draws = np.random.default_rng(rng.getrandbits(32))
    if dtype == "bool":
        return draws.random(shape) < 0.5
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        return draws.integers(info.min, info.max, shape, dtype, endpoint=True)
    with np.errstate(over="ignore"):
        values = draws.standard_normal(shape) * 10.0 ** draws.integers(-9, 5, shape)
        return (values + 1j * draws.standard_normal(shape) if dtype.startswith("c") else values).astype(dtype)


def rule(rng: random.Random, shape: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    """A probability, a range or an array of them, and the other numbers of a rule."""
    p: Any = rng.choice(P) if rng.random() < 0.5 else rng.random()
    if rng.random() < 0.25:
        p = tuple(sorted(rng.choice([*P, p, rng.random()]) for _ in range(2)))
    kind = rng.choice(["default", "default", "exact", "span", "array"])
    options: dict[str, Any] = {"min_keep": rng.randint(0, 6)} if rng.random() < 0.3 else {}
    if rng.random() < 0.25:
        options["prefix"] = rng.randint(0, min(5, shape[-1]))
    if kind == "exact":
        return p, {**options, "exact": True}
    if kind == "array":
        per = rng.choice([shape[-1:], shape])
        values = [rng.choice([*P, rng.random()]) for _ in range(math.prod(per))]
        p = np.array(values, dtype=np.float64).reshape(per)
    return p, {**options, "span": rng.randint(1, 7)} if kind != "default" else options


def per_message(rng: random.Random, shape: tuple[int, ...], values: list[int], dtype: Any) -> np.ndarray:
    """One for each message, or for each position alone."""
    per = rng.choice([shape[-1:], shape])
    return np.array([rng.choice(values) for _ in range(math.prod(per))], dtype).reshape(per)


def places(rng: random.Random, shape: tuple[int, ...]) -> dict[str, Any]:
    """Which messages take part, and the numbers that they go by."""
    options: dict[str, Any] = {}
    if rng.random() < 0.25:
        options["protect"] = per_message(rng, shape, [0, 0, 1], bool)
    if rng.random() < 0.15:
        options["positions"] = rng.choice(
            [rng.randint(0, 9), rng.randint(0, 2**34 - max(1, shape[-1])), 2**34 - max(1, shape[-1])]
        )
    elif rng.random() < 0.15:
        known = [0, 1, 2**34 - 1, *(rng.randrange(2 ** rng.randint(1, 34)) for _ in range(20))]
        options["positions"] = per_message(rng, shape, known, np.int64)
    return options


def case(rng: random.Random, size: int) -> dict[str, Any]:
    dims = rng.choice([1, 1, 2, 2, 2, 3, 4])
    shape = (*(rng.randint(0 if rng.random() < 0.1 else 1, 3) for _ in range(dims - 1)), rng.randint(0, size))
    rows = shape[:-1]
    lengths = keys = None
    if rng.random() < 0.3:
        values = [rng.randint(0, shape[-1]) for _ in range(math.prod(rows))]
        lengths = np.array(values, dtype=np.int64).reshape(rows)
    if rng.random() < 0.5:
        named = rows[: rng.randint(0, len(rows))]
        keys = np.array([rng.getrandbits(64) for _ in range(math.prod(named))], dtype=np.uint64).reshape(named)
        keys = keys.view(np.int64) if rng.random() < 0.5 else keys
    p, options = rule(rng, shape)
    told = {"shape": shape, "p": p, "seed": rng.getrandbits(64), "keys": keys, "lengths": lengths}
    return {**told, **options, **places(rng, shape)}


def laid_out(rng: random.Random, x: np.ndarray) -> tuple[np.ndarray, Any]:
    """The same numbers as a NumPy and as a torch view of some other layout: dims permuted, every second element."""
    order = list(range(x.ndim))
    if rng.random() < 0.5:
        rng.shuffle(order)
    stored = x.transpose(order)
    steps = [rng.choice([1, 1, 1, 2]) if rng.random() < 0.3 else 1 for _ in order]
    storage = np.zeros([n * step for n, step in zip(stored.shape, steps, strict=True)], x.dtype)
    every = tuple(slice(None, None, step) for step in steps)
    storage[every] = stored
    back = [order.index(dim) for dim in range(x.ndim)]
    array, tensor = storage.copy()[every].transpose(back), torch.from_numpy(storage.copy())[every].permute(back)
    if x.ndim and rng.random() < 0.3:
        dim = rng.randrange(x.ndim)
        array = np.flip(np.flip(array, dim).copy(order="K"), dim)  # a negative stride
    return array, tensor


def check(rng: random.Random, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        internals.large_outputs(patch, rng.choice([1, None]))
        check_case(rng, size)


def check_case(rng: random.Random, size: int) -> None:
    c = case(rng, size)
    shape, p, seed, keys, lengths = (c[name] for name in ("shape", "p", "seed", "keys", "lengths"))
    rules = {name: value for name, value in c.items() if name not in ("shape", "p", "seed", "keys", "lengths")}
    keep = naive.keep_mask(**c)
    assert np.array_equal(keep_mask(**c), keep), c
    dtype = rng.choice(DTYPES)
    scale = dtype[0] in "fc" and rng.random() < 0.5
    x = numbers(rng, (*shape, *rng.choice([(1,), (3,), (2, 2), (0,), (17,)])), dtype)
    fill: Any = rng.choice([0, 1, 0.0])
    if rng.random() < 0.3:
        fill = numbers(rng, x.shape[len(shape) :], dtype)
    elif dtype[0] in "fc" and rng.random() < 0.3:
        fill = rng.choice([-0.0, 2.5, float("inf")])
    options = {"scale": scale, "message_dims": len(shape), "seed": seed, "lengths": lengths, **rules}
    want, kept = oracle.dropout(x, p, keys=keys, fill=fill, **options)
    assert np.array_equal(kept, keep), c
    array, tensor = laid_out(rng, x)
    signed = None if keys is None else torch.from_numpy(keys.view(np.int64).copy())
    tensor_fill = torch.from_numpy(fill) if isinstance(fill, np.ndarray) else fill
    as_tensors = {
        name: torch.from_numpy(value.copy()) for name, value in options.items() if name in PLACES and np.ndim(value)
    }
    told = (c, dtype, options, array.strides, fill)
    with pytest.MonkeyPatch.context() as patch:
        internals.no_host_tensors(patch)
        named = {**options, **as_tensors, "keys": signed, "fill": tensor_fill}
        y, mask = message_dropout(tensor, p, return_mask=True, **named)
        assert bits(mask) == bits(keep), told
        assert bits(y) == bits(want), told
    for x_, told_ in ((array, {**options, "keys": keys, "fill": fill}), (tensor, named)):
        y, mask = message_dropout(x_, p, return_mask=True, **told_)
        assert bits(mask) == bits(keep), told
        assert bits(y) == bits(want), told
        out = laid_out(rng, np.zeros_like(x))[isinstance(x_, torch.Tensor)]
        assert message_dropout(x_, p, out=out, **told_) is out
        assert bits(out) == bits(want), told
        assert message_dropout(x_, p, inplace=True, **told_) is x_
        assert bits(x_) == bits(want), told


@pytest.mark.kernels
@pytest.mark.parametrize("seed", range(4))
def test_few_cases(seed, chunks):
    rng = random.Random(seed)
    for _ in range(10):
        check(rng, 9)


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_cases(seed, monkeypatch):
    rng = random.Random(1000 + seed)
    internals.cut_into(monkeypatch, lambda: rng.randint(1, 8))
    for _ in range(2500):
        check(rng, 40)


@pytest.mark.kernels
def test_words_and_streaming_stores(reset_plans, monkeypatch):
    """Messages that are words, and those that are written past the cache, which large outputs alone are."""
    internals.stream_everything(monkeypatch)
    rng = random.Random(9)
    for width in (1, 2, 3, 4, 8, 12, 16, 32, 64, 128, 192):
        for shape in ((3, 40), (2, 1030)):
            x = torch.from_numpy(numbers(rng, (*shape, width), "uint8"))
            keep = naive.keep_mask(shape, 0.4, seed=width)
            for fill in (0, 7, torch.from_numpy(numbers(rng, (width,), "uint8"))):
                want = np.where(keep[..., None], x, np.asarray(fill, dtype=np.uint8))
                for offset in (0, 1, 64):
                    out = torch.empty(x.numel() + 64, dtype=torch.uint8)[offset : offset + x.numel()].view_as(x)
                    assert np.array_equal(message_dropout(x, 0.4, seed=width, fill=fill, out=out), want)
                    out.copy_(x)
                    assert np.array_equal(message_dropout(out, 0.4, seed=width, fill=fill, inplace=True), want)


@pytest.mark.kernels
@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("rules", [{}, {"exact": True}, {"span": 3, "min_keep": 2}], ids=str)
def test_rows_beside_each_other(rules, stream, reset_plans, monkeypatch, chunks):
    """An RNN's outputs, batch first: more rows, and longer ones, than are written across at once."""
    if stream:
        internals.stream_everything(monkeypatch)
    rng = random.Random(5)
    for rows, size in ((3, 5), (70, 130), (9, 1030)) if internals.compiles() else ((3, 5), (9, 70)):
        keep = naive.keep_mask((rows, size), 0.4, seed=size, **rules)
        for width in (1, 3, 8, 16, 64, 192):
            x = torch.from_numpy(numbers(rng, (size, rows, width + 1), "uint8"))
            for offset, gap in ((0, 0), (0, 1), (1, 0)):
                memory = torch.empty(x.numel() + 1, dtype=torch.uint8)[offset : offset + x.numel()].view_as(x).copy_(x)
                y = memory if gap else memory.view(-1)[: size * rows * width].view(size, rows, width)
                y = y[..., :width].transpose(0, 1)
                want = np.where(keep[..., None], y, 0)
                got, mask = message_dropout(y, 0.4, seed=size, return_mask=True, **rules)
                assert np.array_equal(mask, keep)
                assert np.array_equal(got, want)
                assert np.array_equal(message_dropout(y.numpy(), 0.4, seed=size, **rules), want)
                assert np.array_equal(message_dropout(y, 0.4, seed=size, inplace=True, **rules), want)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(rng=st.randoms(use_true_random=False), parts=st.integers(1, 8))
def test_property(rng, parts):
    with pytest.MonkeyPatch.context() as patch:
        internals.cut_into(patch, parts)
        check(rng, 12)


@pytest.mark.long
@settings(max_examples=20_000, deadline=None, database=None)
@given(rng=st.randoms(use_true_random=False), parts=st.integers(1, 8))
def test_property_at_length(rng, parts):
    with pytest.MonkeyPatch.context() as patch:
        internals.cut_into(patch, parts)
        check(rng, 40)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("rules", [{}, {"exact": True}, {"span": 7}, {"min_keep": 2000}, {"span": 3, "min_keep": 1600}])
def test_rows_longer_than_a_block(start, rules, chunks):
    """Rows cross the kernel's blocks, and chunks begin at every position of a Philox counter."""
    shape = (3, 2500 + start)
    mask = keep_mask(shape, 0.4, seed=start, keys=[5, 2**63, 7], **rules)
    assert np.array_equal(mask, naive.keep_mask(shape, 0.4, seed=start, keys=[5, 2**63, 7], **rules))
    x = np.arange(3 * shape[1] * 2, dtype=np.int32).reshape(*shape, 2)
    y = message_dropout(x, 0.4, seed=start, keys=[5, 2**63, 7], **rules)
    assert np.array_equal(y, np.where(mask[..., None], x, 0))


@pytest.mark.parametrize(
    "rules", [{"exact": True}, {"min_keep": 1100}, {"span": 3, "min_keep": 1050}, {"p": (0.2, 0.9)}], ids=str
)
def test_who_takes_part_in_rows_longer_than_a_block(rules, chunks):
    shape = (2, 2501)
    told = {
        "p": 0.4, "seed": 3, "prefix": 1100, "protect": np.arange(2501) % 5 == 1, "scale": True,
        "positions": 7 * np.arange(2 * 2501)[::-1].reshape(shape) % 10_007, **rules,
    }  # fmt: skip
    x = np.random.default_rng(1).standard_normal((*shape, 1), np.float32)
    want, keep = oracle.dropout(x, message_dims=2, **told)
    y, mask = message_dropout(x, message_dims=2, return_mask=True, **told)
    assert np.array_equal(mask, keep)
    assert bits(y) == bits(want)


@pytest.mark.kernels
def test_bfloat16_is_scaled_like_torch(chunks):
    bits16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = bits16.view(torch.bfloat16).reshape(64, 16, 64)
    y, mask = message_dropout(x, 0.3, scale=True, seed=1, return_mask=True)
    want = (x.float() * torch.tensor(1 / (1 - 0.3), dtype=torch.float32)).to(torch.bfloat16)
    want = torch.where(mask[..., None], want, torch.zeros((), dtype=torch.bfloat16))
    nan = want.isnan()
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(y.view(torch.int16)[~nan], want.view(torch.int16)[~nan])


@pytest.mark.kernels
def test_float16_is_scaled_like_numpy(chunks):
    x = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(64, 16, 64)
    y, mask = message_dropout(x, 0.3, scale=True, seed=1, return_mask=True)
    with np.errstate(all="ignore"):
        want = (x.astype(np.float32) * np.float32(1 / (1 - 0.3))).astype(np.float16)
    want = np.where(mask[..., None], want, np.float16(0))
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(y), nan)
    assert np.array_equal(y.view(np.uint16)[~nan], want.view(np.uint16)[~nan])
