"""What an import brings along, and where compiled code goes. Each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import internals
from numba.core import caching

import msgdrop_numba

PACKAGE = Path(msgdrop_numba.__file__).parent

USE_NUMPY = """
import numpy as np
import msgdrop_numba
x = np.ones((2, 3, 4), np.float32)
y, mask = msgdrop_numba.message_dropout(x, 0.5, scale=True, fill=2.0, seed=1, keys=[3, 4], return_mask=True)
msgdrop_numba.message_dropout(x, 0.5, inplace=True, lengths=[1, 2], generator=np.random.default_rng(1))
assert msgdrop_numba.keep_mask((2, 3), 0.5, seed=1, keys=[3, 4]).tolist() == mask.tolist()
msgdrop_numba.fold_in(1, 2)
"""
CHECK = "import sys\nprint('torch' in sys.modules)"


def run(
    code: str, *options: str, cwd: Path | None = None, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", code],
        capture_output=True,
        text=True,
        env=env,
        cwd=cwd,
        timeout=120,
    )


@pytest.mark.processes
def test_numpy_use_imports_no_torch():
    done = run(USE_NUMPY + CHECK)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.processes
def test_plain_tensors_import_no_dtensor():
    done = run(
        "import sys, torch, msgdrop_numba as m\nm.message_select(m.MessageDropout()(torch.ones(2, 3, 4)), exact=True)\n"
        "print('torch.distributed.tensor' in sys.modules)"
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.processes
def test_the_proof_can_fail():
    done = run(USE_NUMPY + "msgdrop_numba.MessageDropout\n" + CHECK)
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.processes
def test_without_torch_its_names_say_what_is_missing():
    code = "import sys\nsys.modules['torch'] = None\n" + USE_NUMPY + "msgdrop_numba.MessageDropout"
    done = run(code)
    assert done.returncode == 1
    assert "msgdrop_numba[torch]" in done.stderr.splitlines()[-1]


def test_every_public_name_is_there():
    assert set(msgdrop_numba.__all__) <= set(dir(msgdrop_numba))
    for name in msgdrop_numba.__all__:
        assert getattr(msgdrop_numba, name).__doc__
    assert not hasattr(msgdrop_numba, "nothing")


@pytest.mark.processes
def test_nothing_is_compiled_at_import():
    code = """
from numba.core import event
seen = []
with event.install_recorder("numba:compile") as recorder:
    import msgdrop_numba, msgdrop_numba.nn, msgdrop_numba.pipelines.collate
print(len(recorder.buffer))
"""
    done = run(code)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.processes
def test_a_read_only_install_without_a_home(tmp_path):
    """numba raises at decoration where it finds no folder for its cache; kernels must run all the same."""
    shutil.copytree(PACKAGE, tmp_path / "msgdrop_numba", ignore=shutil.ignore_patterns("__pycache__"))
    # A file where the cache folder would be, and a HOME that is a file: nobody can write there, root included.
    for folder in (tmp_path / "msgdrop_numba", tmp_path / "msgdrop_numba" / "kernels"):
        (folder / "__pycache__").write_text("")
    nowhere = str(tmp_path / "file")
    Path(nowhere).write_text("")
    environment = {
        "HOME": nowhere, "XDG_CACHE_HOME": nowhere, "NUMBA_CACHE_DIR": None, "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(tmp_path),
    }  # fmt: skip
    check = """
import msgdrop_numba.kernels.cpu as cpu
print(msgdrop_numba.__file__, type(cpu.drop_range._cache).__name__)
"""
    done = run(USE_NUMPY + check, cwd=tmp_path, **environment)
    assert done.stderr == ""
    assert done.stdout.split() == [str(tmp_path / "msgdrop_numba" / "__init__.py"), "NullCache"]


READ = """
import sys
import msgdrop_numba.kernels.cpu as cpu
print(sum(cpu.drop_range.stats.cache_hits.values()), "numba.np.arraymath" in sys.modules)
"""


@pytest.mark.processes
def test_compiled_code_is_cached(tmp_path):
    """And read without making numba ready to compile, unless it must be."""
    folder = {"NUMBA_CACHE_DIR": str(tmp_path)}
    outputs = [run(USE_NUMPY + READ, **folder) for _ in range(2)]
    assert [done.stderr for done in outputs] == ["", ""]
    assert [done.stdout for done in outputs] == ["0 True\n", "1 False\n"]
    then_compile = "print((~msgdrop_numba.keep_mask((3, 8), 0.5, seed=1, exact=True)).sum(axis=1).tolist())"
    done = run(USE_NUMPY + READ + then_compile, **folder)
    assert (done.stdout, done.stderr) == ("1 False\n[4, 4, 4]\n", "")
    without_symbols = "import llvmlite.binding\nllvmlite.binding.address_of_symbol = lambda name: None\n"
    done = run(without_symbols + USE_NUMPY + READ, **folder)
    assert (done.stdout, done.stderr) == ("1 True\n", "")


def test_another_numba_may_read_its_cache_in_another_way(monkeypatch):
    monkeypatch.setattr(caching.Cache, "load_overload", lambda cache, *told: told)
    assert internals.kernel_cache().load_overload("signature", "target") == ("signature", "target")
