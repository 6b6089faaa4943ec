"""The CUDA kernels without a GPU: bit for bit against naive.py in numba's simulator, and as PTX.

The simulator is chosen when numba is imported: this file runs itself again in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import math
import mmap
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import naive
import numpy as np
import pytest

from msgdrop_numba.call import arguments
from msgdrop_numba.call import plan as plans
from msgdrop_numba.kernels import records
from msgdrop_numba.kernels.records import Addresses

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
VECTORS = json.loads((Path(__file__).parent / "mask_vectors.json").read_text())["keep_masks"]
RULES: list[dict[str, Any]] = [
    {}, {"exact": True}, {"span": 3}, {"min_keep": 4}, {"exact": True, "min_keep": 7}, {"span": 2, "min_keep": 5},
]  # fmt: skip
ARCHITECTURES = [(7, 5), (8, 0), (9, 0), (10, 0)]
KINDS = {
    "float32": records.FLOAT32, "float64": records.FLOAT64, "float16": records.FLOAT16, "bfloat16": records.BFLOAT16,
    "complex64": records.FLOAT32,
}  # fmt: skip

needs_numba_cuda = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason='numba-cuda isn\'t installed: pip install "numba-cuda[cu13]"'
)
simulated = pytest.mark.skipif(not SIMULATED, reason="runs in the process that test_in_the_simulator starts")
compiled = pytest.mark.skipif(SIMULATED, reason="the simulator has no compiler")


def of_itself(*arguments: str, simulator: bool) -> str:
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": str(int(simulator))}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@needs_numba_cuda
@compiled
def test_in_the_simulator():
    out = of_itself("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__, simulator=True)
    assert int(re.search(r"(\d+) passed", out).group(1)) > 50, out[-4000:]  # type: ignore[union-attr]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The kernels with so small a launch geometry that a handful of messages crosses threads, tiles and blocks."""
    from msgdrop_numba.kernels import cuda, cuda_launch

    monkeypatch.setattr(cuda_launch, "_loaded", cuda_launch._Loaded())
    cuda_launch.geometry.cache_clear()
    for module, name, value in [
        (cuda, "THREADS", 8), (cuda_launch, "THREADS", 8), (cuda_launch, "SELECT_THREADS", 3),
        (cuda_launch, "BLOCKS", 4), (cuda_launch, "MAX_GRID", (3, 2)), (cuda, "BITS", 4), (cuda, "BINS", 16),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, value)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # the simulator's threads are Python's, and its manager polls them
    yield cuda
    sys.setswitchinterval(interval)
    cuda_launch.geometry.cache_clear()


def launch(*arguments: Any) -> None:
    """As the caller of `cuda_launch.launch` does."""
    from msgdrop_numba.kernels import cuda_launch

    try:
        cuda_launch.launch(*arguments)
    except cuda_launch.NotLoadedError as needed:
        cuda_launch.load(*needed.args, (9, 0))
        launch(*arguments)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits nearest to float32 numbers, ties to even, worked out with exact fractions of two."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def numbers(rng: random.Random, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    draws = np.random.default_rng(rng.getrandbits(32))
    values = draws.standard_normal(shape) * 10.0 ** draws.integers(-6, 4, shape)
    if dtype == "bfloat16":
        return bfloat16(values)
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


def expected(x: np.ndarray, keep: np.ndarray, dtype: str, fill: Any, **options: Any) -> np.ndarray:
    if dtype != "bfloat16" or not options["scale"]:
        return naive.drop(x, keep, fill=fill, **options)
    wide = (x.astype(np.uint32) << 16).view(np.float32)
    s = naive.scales(keep, *(options[name] for name in ("p", "lengths")), options.get("exact", False),
                     options.get("min_keep", 0))[..., None]  # fmt: skip
    n = keep.shape[-1] if options["lengths"] is None else options["lengths"][:, None, None]
    inside = np.arange(keep.shape[-1])[:, None] < n
    y = np.where(inside, bfloat16(wide * s.astype(np.float32)), x)
    return np.where(keep[..., None], y, fill)


class Call:
    """One launch on NumPy memory, and what naive.py makes of it."""

    def __init__(self, cuda: Any, shape: tuple[int, int], p: Any, seed: int, **rule: Any) -> None:
        self.cuda, self.shape, self.p, self.seed = cuda, shape, p, seed
        self.lengths, self.keys, self.inner = rule.pop("lengths", None), rule.pop("keys", None), 0
        self.rule = rule
        self.keep = naive.keep_mask(shape, p, seed=seed, keys=self.keys, lengths=self.lengths, **rule)

    def launch(
        self, x: Any = None, out: Any = None, dtype: str = "uint8", scale: bool = False, fill: Any = None,
        given: Any = None,
    ) -> np.ndarray:  # fmt: skip
        number = self.p if isinstance(self.p, float) else None
        kind = KINDS[dtype] if scale else records.COPY
        like = np.empty((*self.shape, 1), np.uint8) if x is None else x
        target = like if out is None else out
        numbers = [self.rule.get(name, default) for name, default in (("exact", False), ("span", 1), ("min_keep", 0))]
        plan = plans._make(like.shape, like.itemsize, kind, 2, number, *numbers, like.strides, target.strides)
        assert plan.followed
        draw = plans.row_arguments(plan, None if number is not None else self.p, scale, fill, self.lengths, None)
        if self.keys is not None:
            draw = plans.Draw(fill, draw.lengths, self.keys, draw.thresholds, draw.factors)
        mask = np.full(self.shape, 7, np.uint8) if given is None else given.astype(np.uint8)
        seed, limits = np.array([self.seed], np.uint64), np.empty((self.shape[0], 2), np.int64)
        limited = plan.numbers.limited and given is None
        addresses = Addresses(
            0 if x is None else x.ctypes.data, 0 if out is None else out.ctypes.data, mask.ctypes.data,
            0 if given is not None else seed.ctypes.data, limits.ctypes.data if limited else 0,
        )  # fmt: skip
        launch(plan.numbers, draw.numbers._replace(given=given is not None), plan.messages, self.inner, addresses, 0, 0)
        return mask

    def check(
        self, x: np.ndarray, dtype: str, scale: bool, fill: Any, start: int, gap: int, far: bool, given: bool
    ) -> None:
        want = expected(x, self.keep, dtype, 0 if fill is None else fill, p=self.p, scale=scale, lengths=self.lengths,
                        **self.rule)  # fmt: skip
        source, out = placed(x, start, gap, far), placed(np.zeros_like(x), 0, gap // 2)
        told = (self.shape, self.p, self.seed, self.lengths, self.rule, dtype, scale, start, gap, far, given)
        before = source.base.tobytes()
        unread = source[~self.keep].copy()
        source[~self.keep] = np.frombuffer(b"\xff" * x.itemsize, x.dtype)[0]
        poisoned = source.base.tobytes()
        mask = self.launch(source, out, dtype, scale, fill, self.keep if given else None)
        assert np.array_equal(mask, self.keep), told
        assert np.ascontiguousarray(out).tobytes() == want.tobytes(), told
        assert source.base.tobytes() == poisoned, told
        source[~self.keep] = unread
        assert source.base.tobytes() == before
        self.launch(source, source, dtype, scale, fill, self.keep if given else None)
        assert np.ascontiguousarray(source).tobytes() == want.tobytes(), told
        source[:] = x.reshape(source.shape)
        assert source.base.tobytes() == before, told  # nothing between the messages was written


def random_call(cuda: Any, rng: random.Random, rule: dict[str, Any], positions: int) -> Call:
    shape = (rng.randint(1, 4), rng.randint(1, positions))
    p: Any = rng.choice([1.0, 0.5, 0.3, 0.9, 2.0**-33, rng.random()])
    options = dict(rule)
    if not rule.get("exact") and rng.random() < 0.3:
        per = rng.choice([shape[1:], shape])
        p = np.array([rng.choice([0.0, 1.0, rng.random()]) for _ in range(math.prod(per))]).reshape(per)
    if rng.random() < 0.5:
        options["lengths"] = np.array([rng.randint(0, shape[1]) for _ in range(shape[0])])
    if rng.random() < 0.5:
        options["keys"] = np.array([rng.getrandbits(64) for _ in range(shape[0])], np.uint64)
    return Call(cuda, shape, p, rng.getrandbits(64), **options)


@simulated
@pytest.mark.parametrize("vector", VECTORS)
def test_mask_vectors(vector, small):
    options = {name: value for name, value in vector.items() if name not in ("shape", "p", "keep", "seed")}
    if "keys" in options:
        options["keys"] = np.array([key % 2**64 for key in options["keys"]], np.uint64)
    if "lengths" in options:
        options["lengths"] = np.array(options["lengths"])
    p = np.array(vector["p"]) if isinstance(vector["p"], list) else vector["p"]
    mask = Call(small, tuple(vector["shape"]), p, vector["seed"], **options).launch()
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
@pytest.mark.parametrize("start", [0, 1, 2, 4, 8, 16])
@pytest.mark.parametrize("width", [0, 1, 6, 16, 48, 100, 304])
def test_bytes_at_any_address(width, start, small):
    rng = random.Random(100 * width + start)
    call = random_call(small, rng, {}, 9)
    x = numbers(rng, (*call.shape, width), "uint8")
    call.check(x, "uint8", False, numbers(rng, (width,), "uint8"), start, rng.choice([0, 4, 16]), False, False)


@simulated
def test_nothing_but_what_drops_is_written_in_place(small, monkeypatch):
    stored = []
    number = small.number

    def watched(dtype: Any) -> Any:
        load, store = number(dtype)
        return load, lambda address, value: (stored.append(address), store(address, value))[1]

    monkeypatch.setattr(small, "number", watched)
    call = Call(small, (3, 11), 0.4, 5)
    x = placed(np.ones((3, 11, 16), np.float32), 0, 0)
    call.launch(x, x, "float32")
    dropped = {x.ctypes.data + 64 * j + at for j in np.flatnonzero(~call.keep) for at in range(0, 64, 16)}
    assert len(stored) == len(dropped)
    assert set(stored) == dropped


@simulated
@pytest.mark.parametrize("rule", [{"exact": True}, {"min_keep": 9}, {"min_keep": 8, "span": 2}], ids=str)
def test_equal_draws_drop_in_order_of_position(rule, small, monkeypatch):
    """Draws with two bits left: nearly all are tied."""
    fine, coarse = naive.draw, small._draw
    monkeypatch.setattr(naive, "draw", lambda *arguments, **stream: fine(*arguments, **stream) >> 30 << 30)
    monkeypatch.setattr(small, "_draw", lambda *arguments: coarse(*arguments) >> np.uint64(30) << np.uint64(30))
    for p in (0.3, 0.5, 0.9, 1.0):
        call = Call(small, (3, 23), p, 3, lengths=np.array([23, 14, 5]), **rule)
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
    call = Call(small, (3, 9), 0.5, 3, lengths=np.array([9, 0, 4]), exact=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "row_lengths", lambda *_: np.array([11, -5, 4]))
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
def test_padding_of_a_mask_that_is_given_stays(small):
    call = Call(small, (2, 6), 0.5, 3, lengths=np.array([6, 2]))
    x, out = np.ones((2, 6, 4), np.float32), np.zeros((2, 6, 4), np.float32)
    call.launch(x, out, "float32", given=np.where(np.arange(6) < call.lengths[:, None], call.keep, False))
    assert np.array_equal(out, naive.drop(x, call.keep, lengths=call.lengths))


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
    plan, nowhere = plans.plan((1, 4, 1), 1, records.COPY, 2, 0.5, True, 1, 0).numbers, Addresses(0, 0, 1, 1, 0)
    with pytest.raises(ValueError, match="limits"):
        launch(plan, plans.PLAIN.numbers, 4, 0, nowhere, 0, 0)
    assert cuda_launch.launch(plan, plans.PLAIN.numbers, 0, 0, nowhere, 0, 0) is None


@simulated
@pytest.mark.parametrize("rule", [{}, {"exact": True}, {"span": 2, "min_keep": 3}], ids=str)
@pytest.mark.parametrize("inner", [1, 3])
def test_keys_that_stand_for_several_rows(rule, inner, small):
    keys, lengths = np.array([-7, 2**62 + 1]), np.array([5, 3, 4, 0, 5, 2])[: 2 * inner]
    keep = naive.keep_mask((2, inner, 5), 0.4, seed=11, keys=keys, lengths=lengths.reshape(2, inner), **rule)
    call = Call(small, (2 * inner, 5), 0.4, 11, lengths=lengths, **rule)
    call.keys, call.inner, call.keep = keys, inner, keep.reshape(-1, 5)
    x = numbers(random.Random(3), (2 * inner, 5, 3), "float32")
    call.check(x, "float32", False, None, 0, 0, False, False)


def ptx_of(function: Any, signature: Any) -> dict[tuple[int, int], str]:
    """PTX for every architecture. Numba's part, which they share, takes 20 times as long as NVVM's."""
    from numba import cuda
    from numba.cuda.cudadrv import nvvm

    made, compile_ir = {}, nvvm.compile_ir

    def for_all(ir: Any, arch: str, **options: Any) -> Any:
        for major, minor in ARCHITECTURES:
            made[major, minor] = compile_ir(ir, arch=f"compute_{major}{minor}", **options).decode()
        return compile_ir(ir, arch=arch, **options)

    with mock.patch.object(nvvm, "compile_ir", for_all):
        plain, _ = cuda.compile_ptx(function, signature, cc=(9, 0))
    assert plain.strip("\0").strip() == made[9, 0].strip("\0").strip()
    return made


def registers(ptx: str, major: int, minor: int) -> int:
    """Registers of a thread in the machine code, which must spill none."""
    from cuda import core

    options = core.LinkerOptions(arch=f"sm_{major}{minor}", verbose=True, ptxas_options=["-v"])
    linker = core.Linker(core.ObjectCode.from_ptx(ptx.strip("\0").encode()), options=options)
    linker.link("cubin")
    told = linker.get_info_log()
    assert re.findall(r"(\d+) bytes spill", told) == ["0", "0"]
    return int(re.search(r"Used (\d+) registers", told)[1])  # type: ignore[index]


def copy_loop(ptx: str, store: str) -> list[str]:
    """The smallest loop with all four stores of a thread: from a label to the branch back to it."""
    lines = ptx.splitlines()
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if re.match(r"\s*\$L\w+:", line)}
    back = [(labels[m[1]], i) for i, line in enumerate(lines) if (m := re.search(r"bra(?:\.uni)?\s+(\$L\w+);", line))]
    loops = [lines[first:last] for first, last in back if first < last]
    return min((loop for loop in loops if sum(bool(re.search(store, line)) for line in loop) >= 4), key=len)


@needs_numba_cuda
@compiled
@pytest.mark.parametrize(
    ("unit", "kind"),
    [(unit, records.COPY) for unit in (16, 8, 4, 2, 1)]
    + [(16, kind) for kind in (records.FLOAT32, records.FLOAT64, records.FLOAT16, records.BFLOAT16)]
    + [(4, records.FLOAT32), (8, records.FLOAT64), (2, records.FLOAT16), (2, records.BFLOAT16)],
)
def test_ptx_of_drop(unit, kind):
    from msgdrop_numba.kernels import cuda

    word = r"(v4\.[bu]32|v2\.[bu]64)" if unit == 16 else rf"[bu]{8 * unit}"  # sm_100 multiplies two floats at once
    drop = cuda.function(unit, kind)
    for (major, minor), ptx in ptx_of(drop, cuda.signature(drop)).items():
        assert f".target sm_{major}{minor}" in ptx
        assert ".local" not in ptx
        assert "fma." not in ptx
        loop = copy_loop(ptx, rf"st\.global\.{word}\b")
        moves = "".join(m[1] for line in loop if (m := re.search(rf"(ld|st)\.global\.{word}\b", line)))
        assert re.fullmatch(f"({'ld' * 4}{'st' * 4})+", moves)  # four in flight together
        assert not re.search(r"\b(div|rem|call)\b", "\n".join(loop))
        assert any("mul" in line and ".f" in line for line in loop) == (kind != records.COPY)
        assert registers(ptx, major, minor) <= (80 if major == 7 else 64)  # 3 and 4 blocks on a multiprocessor


@needs_numba_cuda
@compiled
def test_ptx_of_select():
    from msgdrop_numba.kernels import cuda

    for (major, minor), ptx in ptx_of(cuda.select, cuda.signature(cuda.select)).items():
        assert f".target sm_{major}{minor}" in ptx
        assert ".local" not in ptx
        assert registers(ptx, major, minor) <= 85  # three blocks of 512 threads
        assert re.search(r"atom\.\S*shared", ptx)


@needs_numba_cuda
@compiled
@pytest.mark.parametrize("unit", [0, 16])
def test_machine_code_is_linked_under_its_name(unit):
    from msgdrop_numba.kernels import cuda_launch

    name, code = cuda_launch._machine_code(unit, records.COPY, (9, 0))
    assert code.code.startswith(b"\x7fELF")
    assert name.encode() in code.code
