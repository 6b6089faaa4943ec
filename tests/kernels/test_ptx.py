"""The CUDA kernels compiled without a GPU: their PTX for every architecture, and their machine code."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
from helpers.simulator import compiled, needs_numba_cuda

from msgdrop_numba.kernels import records

ARCHITECTURES = [(7, 5), (8, 0), (9, 0), (10, 0)]
pytestmark = [needs_numba_cuda, compiled]


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


def takes_numbers_alone(ptx: str, kernel: Any) -> bool:
    """Whether a kernel takes the fields of its tuples one by one, 64 bits each, as it is launched with them."""
    from msgdrop_numba.kernels import cuda

    entry = ptx[ptx.index(".entry") :]
    kinds = cuda.parameters(kernel).values()
    wanted = [kind for kind in kinds for _ in getattr(kind, "_fields", "1")]
    passed = re.findall(r"\.param (.*?) ", entry[: entry.index(")")])
    return passed == [".f64" if kind is float else ".u64" for kind in wanted]


KINDS = [
    *((unit, records.COPY) for unit in (16, 8, 4, 2, 1)),
    *((16, kind) for kind in (records.FLOAT32, records.FLOAT64, records.FLOAT16, records.BFLOAT16)),
    (4, records.FLOAT32), (8, records.FLOAT64), (2, records.FLOAT16), (2, records.BFLOAT16),
]  # fmt: skip
# Each unit and each kind once or more between both kernels; a second or two for each.
ALWAYS = {
    "drop": {(16, records.COPY), (4, records.COPY), (1, records.COPY), (16, records.FLOAT32), (2, records.BFLOAT16)},
    "gather": {(16, records.COPY), (8, records.FLOAT64), (2, records.FLOAT16)},
}


@pytest.mark.parametrize(
    ("name", "unit", "kind"),
    [
        pytest.param(name, *each, marks=() if each in ALWAYS[name] else pytest.mark.long)
        for name in ALWAYS
        for each in KINDS
    ],
)
def test_ptx_of_what_copies(name, unit, kind):
    from msgdrop_numba.kernels import cuda

    word = r"(v4\.[bu]32|v2\.[bu]64)" if unit == 16 else rf"[bu]{8 * unit}"  # sm_100 multiplies two floats at once
    kernel = cuda.function(name, unit, kind)
    for (major, minor), ptx in ptx_of(kernel, cuda.signature(kernel)).items():
        assert f".target sm_{major}{minor}" in ptx
        assert takes_numbers_alone(ptx, kernel)
        assert ".local" not in ptx
        assert "fma." not in ptx
        loop = copy_loop(ptx, rf"st\.global\.{word}\b")
        moves = "".join(m[1] for line in loop if (m := re.search(rf"(ld|st)\.global\.{word}\b", line)))
        assert re.fullmatch(f"({'ld' * 4}{'st' * 4})+", moves)  # four in flight together
        assert not re.search(r"\b(div|rem|call)\b", "\n".join(loop))
        assert any("mul" in line and ".f" in line for line in loop) == (kind != records.COPY)
        assert registers(ptx, major, minor) <= (80 if major == 7 else 64)  # 3 and 4 blocks on a multiprocessor


def test_ptx_of_select():
    from msgdrop_numba.kernels import cuda

    for (major, minor), ptx in ptx_of(cuda.select, cuda.signature(cuda.select)).items():
        assert f".target sm_{major}{minor}" in ptx
        assert takes_numbers_alone(ptx, cuda.select)
        assert ".local" not in ptx
        assert registers(ptx, major, minor) <= 85  # three blocks of 512 threads
        assert re.search(r"atom\.\S*shared", ptx)


@pytest.mark.parametrize(("kernel", "unit"), [("select", 0), ("drop", 16), ("gather", 16)])
def test_machine_code_is_linked_under_its_name(kernel, unit):
    from msgdrop_numba.kernels import cuda_launch

    name, code = cuda_launch._machine_code(kernel, unit, records.COPY, (9, 0))
    assert code.code.startswith(b"\x7fELF")
    assert name.encode() in code.code
