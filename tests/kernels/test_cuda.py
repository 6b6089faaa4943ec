"""The CUDA kernels without a GPU: bit for bit against naive.py in numba's simulator.

The simulator is chosen when numba is imported: this file runs itself again in a process of its own.
"""

from __future__ import annotations

import math
import mmap
import random
from collections.abc import Callable
from typing import Any

import naive
import numpy as np
import pytest
from helpers import internals, oracle
from helpers.simulator import compiled, in_the_simulator, needs_numba_cuda, simulated
from helpers.vectors import MASKS, arguments, probability

from msgdrop_numba.call import plan as plans
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import DEFAULTS, ArrayRule, Rule
from msgdrop_numba.kernels import records
from msgdrop_numba.kernels.records import Addresses

RULES: list[dict[str, Any]] = [
    {}, {"exact": True}, {"span": 3}, {"min_keep": 4}, {"exact": True, "min_keep": 7}, {"span": 2, "min_keep": 5},
]  # fmt: skip
KINDS = {
    "float32": records.FLOAT32, "float64": records.FLOAT64, "float16": records.FLOAT16, "bfloat16": records.BFLOAT16,
    "complex64": records.FLOAT32,
}  # fmt: skip


@pytest.mark.processes
@needs_numba_cuda
@compiled
def test_in_the_simulator(tmp_path):
    assert in_the_simulator(__file__, tmp_path) > 50


def launch(*arguments: Any) -> None:
    """As the caller of `cuda_launch.launch` does."""
    from msgdrop_numba.kernels import cuda_launch

    try:
        cuda_launch.launch(*arguments)
    except cuda_launch.NotLoadedError as needed:
        cuda_launch.load(*needed.args, (9, 0))
        launch(*arguments)


def numbers(rng: random.Random, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    draws = np.random.default_rng(rng.getrandbits(32))
    values = draws.standard_normal(shape) * 10.0 ** draws.integers(-6, 4, shape)
    if dtype == "bfloat16":
        return oracle.bfloat16(values)
    if dtype == "uint8":
        return draws.integers(0, 256, shape, np.uint8)
    return (values + 1j * draws.standard_normal(shape) if dtype[0] == "c" else values).astype(dtype)


def placed(x: np.ndarray, start: int, gap: int, far: bool = False) -> np.ndarray:
    """A copy of x `start` bytes off a multiple of 64, `gap` elements between messages; far: rows in reverse."""
    *dims, size, width = x.shape
    step = (width + gap) * x.itemsize
    rows = math.prod(dims)
    storage = np.full(rows * size * step + 128, 0xA5, np.uint8)
    begin = -storage.ctypes.data % 64 + start
    strides = [size * step, step, x.itemsize]
    if far:
        begin, strides[0] = begin + (rows - 1) * size * step, -size * step
    y = np.ndarray((rows, size, width), x.dtype, storage.data, begin, strides)
    y[:] = x.reshape(y.shape)
    return y


class Call:
    """One launch on NumPy memory, and what naive.py makes of it.

    Args:
        shape: of the mask; the kernels see its rows one after another.
        keys: one for each row, or fewer: then each stands for all rows that share its place.
        options: lengths, protect, positions; the rest is the rule.
    """

    def __init__(
        self, cuda: Any, shape: tuple[int, ...], p: Any, seed: int, *, keys: Any = None, **options: Any
    ) -> None:  # fmt: skip
        self.cuda, self.shape, self.p, self.seed, self.keys, self.options = cuda, shape, p, seed, keys, options
        self.rows, self.size = math.prod(shape[:-1]), shape[-1]
        self.keep = naive.keep_mask(shape, p, seed=seed, keys=keys, **options)

    def launch(
        self, x: Any = None, out: Any = None, dtype: str = "uint8", scale: bool = False, fill: Any = None,
        given: Any = None,
    ) -> np.ndarray:  # fmt: skip
        number, array = (None, self.p) if isinstance(self.p, np.ndarray) else (self.p, None)
        kind = KINDS[dtype] if scale else records.COPY
        like = np.empty((self.rows, self.size, 1), np.uint8) if x is None else x
        target = like if out is None else out
        keywords = {name: self.options.get(name, default) for name, default in DEFAULTS.items()}
        rule = Rule(number, **keywords) if array is None else ArrayRule(None, **keywords)
        plan = plans.make_plan(like.shape, like.itemsize, kind, 2, rule, like.strides, target.strides)
        assert plan.kernel_ok
        told = {name: value for name, value in self.options.items() if name not in DEFAULTS}
        if "lengths" in told:
            told["lengths"] = told["lengths"].ravel()
        draw = plans.row_arguments(plan, array, fill, Request(rule, array, scale, **told))
        inner = 0
        if self.keys is not None:
            draw = plans.MaskArgs(fill, draw.lengths, self.keys, draw.thresholds, draw.scales, places=draw.places)
            inner = self.rows // self.keys.size if self.keys.ndim < len(self.shape) - 1 else 0
        mask = np.full(self.shape, 7, np.uint8) if given is None else given.astype(np.uint8)
        seed, limits = np.array([self.seed], np.uint64), np.empty((self.rows, 2), np.int64)
        limited = plan.numbers.count_limited and given is None
        addresses = Addresses(
            0 if x is None else x.ctypes.data, 0 if out is None else out.ctypes.data, mask.ctypes.data,
            0 if given is not None and not isinstance(number, tuple) else seed.ctypes.data, limits.ctypes.data if limited else 0,
        )  # fmt: skip
        launch(plan.numbers, draw.numbers._replace(given=given is not None), plan.messages, inner, addresses, 0, 0)
        return mask

    def check(
        self, x: np.ndarray, dtype: str, scale: bool, fill: Any, start: int, gap: int, far: bool, given: bool
    ) -> None:
        x = x.reshape(self.rows, self.size, -1)
        want, keep = oracle.dropout(
            x.reshape(*self.shape, -1), self.p, seed=self.seed, keys=self.keys, message_dims=len(self.shape),
            fill=0 if fill is None else fill, scale=scale, dtype=dtype, **self.options,
        )  # fmt: skip
        assert np.array_equal(keep, self.keep)
        keep = keep.reshape(self.rows, self.size)
        source, out = placed(x, start, gap, far), placed(np.zeros_like(x), 0, gap // 2)
        told = (self.shape, self.p, self.seed, self.options, dtype, scale, start, gap, far, given)
        before = source.base.tobytes()
        unread = source[~keep].copy()
        source[~keep] = np.frombuffer(b"\xff" * x.itemsize, x.dtype)[0]
        poisoned = source.base.tobytes()
        mask = self.launch(source, out, dtype, scale, fill, self.keep if given else None)
        assert np.array_equal(mask, self.keep), told
        assert np.ascontiguousarray(out).tobytes() == want.tobytes(), told
        assert source.base.tobytes() == poisoned, told
        source[~keep] = unread
        assert source.base.tobytes() == before
        self.launch(source, source, dtype, scale, fill, self.keep if given else None)
        assert np.ascontiguousarray(source).tobytes() == want.tobytes(), told
        source[:] = x
        assert source.base.tobytes() == before, told  # nothing between the messages was written


def each(rng: random.Random, shape: tuple[int, ...], value: Callable[[], Any]) -> np.ndarray:
    """A value for each position, or for each message."""
    per = rng.choice([shape[1:], shape])
    return np.array([value() for _ in range(math.prod(per))]).reshape(per)


def random_call(cuda: Any, rng: random.Random, rule: dict[str, Any], positions: int) -> Call:
    shape = (rng.randint(1, 4), rng.randint(1, positions))
    p: Any = rng.choice([1.0, 0.5, 0.3, 0.9, 2.0**-33, rng.random()])
    options = dict(rule)
    if not rule.get("exact") and rng.random() < 0.3:
        p = each(rng, shape, lambda: rng.choice([0.0, 1.0, rng.random()]))
    elif rng.random() < 0.3:
        p = rng.choice([(0.2, 0.9), (0.0, 1.0), (1 - 2.0**-40, 1.0)])
    if rng.random() < 0.5:
        options["lengths"] = np.array([rng.randint(0, shape[1]) for _ in range(shape[0])])
    if rng.random() < 0.5:
        options["keys"] = np.array([rng.getrandbits(64) for _ in range(shape[0])], np.uint64)
    if rng.random() < 0.4:
        options["prefix"] = rng.randint(0, min(3, shape[1]))
    if rng.random() < 0.4:
        options["protect"] = each(rng, shape, lambda: rng.random() < 0.3)
    if rng.random() < 0.5:
        some = each(rng, shape, lambda: rng.choice([rng.randrange(5), rng.randrange(2**34)]))
        options["positions"] = rng.choice([rng.randrange(2**20), 2**34 - shape[1], some])
    return Call(cuda, shape, p, rng.getrandbits(64), **options)


@simulated
@pytest.mark.parametrize("vector", MASKS)
def test_mask_vectors(vector, small):
    options = arguments(vector)
    if "keys" in options:
        options["keys"] = np.array([key % 2**64 for key in options["keys"]], np.uint64)
    for name in {"lengths", "protect"} & set(options):
        options[name] = np.array(options[name])
    mask = Call(small, tuple(vector["shape"]), probability(vector), **options).launch()
    assert ["".join(map(str, row)) for row in mask.tolist()] == vector["keep"]


@simulated
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("scale", [False, True], ids=["as it is", "scaled"])
@pytest.mark.parametrize("dtype", KINDS)
def test_random_cases(rule, scale, dtype, small):
    rng = random.Random(f"{rule}{scale}{dtype}")
    for _ in range(1 if rule.get("exact") or rule.get("min_keep") else 3):
        call = random_call(small, rng, rule, 13)
        width = rng.choice([1, 3, 4, 8, 16, 20])
        x = numbers(rng, (*call.shape, width), dtype)
        fill = rng.choice([None, numbers(rng, (width,), dtype)])
        start = rng.choice([0, 0, 16, x.itemsize])
        call.check(x, dtype, scale, fill, start, rng.choice([0, 0, 3, 16]), rng.random() < 0.3, rng.random() < 0.3)


@simulated
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_random_masks(rule, small):
    rng = random.Random(str(rule))
    for _ in range(8):
        call = random_call(small, rng, rule, 13)
        assert np.array_equal(call.launch(), call.keep), (call.shape, call.p, call.seed, call.keys, call.options)


@simulated
@pytest.mark.parametrize("start", [0, 1, 2, 4, 8, 16])
@pytest.mark.parametrize("width", [0, 1, 6, 16, 48, 100, 304])
def test_bytes_at_any_address(width, start, small):
    rng = random.Random(100 * width + start)
    call = random_call(small, rng, {}, 9)
    x = numbers(rng, (*call.shape, width), "uint8")
    call.check(x, "uint8", False, numbers(rng, (width,), "uint8"), start, rng.choice([0, 4, 16]), False, False)


@simulated
def test_nothing_but_what_drops_is_written_in_place(small, monkeypatch):
    stored = internals.watch_stores(monkeypatch)
    call = Call(small, (3, 11), 0.4, 5)
    x = placed(np.ones((3, 11, 16), np.float32), 0, 0)
    call.launch(x, x, "float32")
    dropped = {x.ctypes.data + 64 * j + at for j in np.flatnonzero(~call.keep) for at in range(0, 64, 16)}
    assert len(stored) == len(dropped)
    assert set(stored) == dropped


@simulated
@pytest.mark.parametrize("rule", [{"exact": True}, {"min_keep": 9}, {"min_keep": 8, "span": 2}], ids=str)
def test_equal_draws_drop_in_order_of_position(rule, small, monkeypatch):
    """Draws with two bits left: nearly all are tied, those of protected messages too."""
    internals.coarse_draws(monkeypatch, bits=2)
    for p in (0.3, 0.5, 0.9, 1.0):
        told = {"lengths": np.array([23, 14, 5]), "prefix": 1, "protect": np.arange(23) % 5 == 2}
        call = Call(small, (3, 23), p, 3, **told, **rule)
        assert np.array_equal(call.launch(), call.keep)


@simulated
def test_rows_that_lie_billions_of_bytes_apart(small):
    """Only the pages that are touched take memory."""
    call = Call(small, (2, 3), 0.5, 2)
    assert 0 < call.keep[1].sum() < 3
    far = np.ndarray((2, 3, 4), np.float32, mmap.mmap(-1, 2**32 + 2**20), 0, (2**32 + 64, 2**15, 4))
    out = np.zeros((2, 3, 4), np.float32)
    x = numbers(random.Random(1), (2, 3, 4), "float32")
    far[:] = x
    want = naive.drop(x, call.keep)
    call.launch(far, out, "float32")
    assert out.tobytes() == want.tobytes()
    call.launch(far, far, "float32")
    assert far.tobytes() == want.tobytes()


@simulated
def test_what_lies_on_the_device_is_clamped(small):
    call = Call(small, (3, 9), 0.5, 3, lengths=np.array([9, 0, 4]), exact=True, prefix=1)
    with pytest.MonkeyPatch.context() as patch:
        internals.unchecked_lengths(patch, np.array([11, -5, 4]))
        assert np.array_equal(call.launch(), call.keep)


@simulated
def test_the_exact_scale_of_a_mask_that_is_given(small):
    call = Call(small, (2, 10), 0.35, 3, lengths=np.array([10, 7]), exact=True, min_keep=2)
    call.check(numbers(random.Random(1), (2, 10, 5), "float64"), "float64", True, None, 0, 0, False, True)


@simulated
def test_where_everything_but_min_keep_drops_nothing_is_scaled(small):
    call = Call(small, (2, 8), 1.0, 3, exact=True, min_keep=3)
    call.check(numbers(random.Random(1), (2, 8, 4), "float32"), "float32", True, None, 0, 0, False, False)


@simulated
def test_what_takes_no_part_stays_whatever_the_mask_that_is_given_says(small):
    told = {"lengths": np.array([6, 3]), "prefix": 1, "protect": np.array([0, 0, 0, 1, 0, 0], bool)}
    call = Call(small, (2, 6), 0.5, 3, **told)
    x, out = np.ones((2, 6, 4), np.float32), np.zeros((2, 6, 4), np.float32)
    call.launch(x, out, "float32", given=call.keep & naive.part((2, 6), **told))
    assert np.array_equal(out, naive.drop(x, call.keep, **told))


@simulated
def test_large_geometry_is_what_the_device_takes():
    from msgdrop_numba.kernels import cuda_launch

    for messages in (1, 15, 1024, 32768, 2**31, 2**38):
        for width in (0, 1, 4, 16, 80, 4096, 4800, 2**30, 2**40):
            for unit in (1, 4, 16):
                (tiles, shares), (across, down) = cuda_launch.geometry(messages, width, unit)
                if messages * width <= 2**40:
                    assert tiles < 2**31
                assert 4 * down * (tiles - 1) < messages <= 4 * down * tiles
                assert 1 <= shares < 2**16
                assert 4 * down <= across * down <= cuda_launch.THREADS  # a thread decides one message at most


@simulated
def test_alignment_and_missing_memory():
    from msgdrop_numba.kernels import cuda_launch

    assert [cuda_launch.piece_size(records.COPY, n | 64) for n in (0, 8, 12, 6, 5)] == [16, 8, 4, 2, 1]
    assert [cuda_launch.piece_size(records.FLOAT32, n) for n in (32, 8, 4)] == [16, 4, 4]
    with pytest.raises(ValueError, match="off by 2"):
        cuda_launch.piece_size(records.FLOAT32, 6)
    plan, nowhere = (
        plans.make_plan((1, 4, 1), 1, records.COPY, 2, Rule(0.5, exact=True)).numbers,
        Addresses(0, 0, 1, 1, 0),
    )
    with pytest.raises(ValueError, match="limits"):
        launch(plan, plans.PLAIN.numbers, 4, 0, nowhere, 0, 0)
    assert cuda_launch.launch(plan, plans.PLAIN.numbers, 0, 0, nowhere, 0, 0) is None


@simulated
@pytest.mark.parametrize("rule", [{}, {"exact": True}, {"span": 2, "min_keep": 3}], ids=str)
@pytest.mark.parametrize("inner", [1, 3])
def test_keys_that_stand_for_several_rows(rule, inner, small):
    keys, lengths = np.array([-7, 2**62 + 1]), np.array([5, 3, 4, 0, 5, 2])[: 2 * inner].reshape(2, inner)
    call = Call(small, (2, inner, 5), 0.4, 11, lengths=lengths, keys=keys, **rule)
    x = numbers(random.Random(3), (2 * inner, 5, 3), "float32")
    call.check(x, "float32", False, None, 0, 0, False, False)
