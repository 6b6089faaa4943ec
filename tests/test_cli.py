"""The `msgdrop` command, and the demo it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from msgdrop_numba import demo
from msgdrop_numba.cli import main


def test_demo(tmp_path):
    plot = tmp_path / "plot.png"
    result = CliRunner().invoke(main, ["demo", "--epochs", "1", "--seeds", "2", "--p", "0.4", "--output", str(plot)])
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(plot.with_suffix(".json").read_text())
    assert numbers["settings"] == {"p": 0.4, "epochs": 1, "seeds": 2}
    assert len(numbers["runs"]) == len(demo.ARMS) * 2 * len(demo.LOST)
    assert all(0 <= run["accuracy"] <= 1 for run in numbers["runs"])
    for arm in demo.ARMS:
        assert arm in result.output
        shown = [f"{100 * mean:.1f}±{100 * spread:.1f}" for mean, spread in numbers["accuracy"][arm]]
        assert all(cell in result.output for cell in shown)


def test_the_demo_is_reproducible_and_leaves_torch_alone():
    import torch

    state, threads = torch.get_rng_state(), torch.get_num_threads()
    ticks: list[int] = []
    first, second = (demo.run(0.5, 1, 1, lambda: ticks.append(1)) for _ in range(2))
    assert first == second
    assert len(ticks) == 2 * len(demo.ARMS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_the_data_set():
    train, test = demo.load("train"), demo.load("test")
    assert (len(train), len(test)) == (270, 370)
    assert {speaker for _, speaker in train + test} == set(range(9))
    assert {frames.shape[1] for frames, _ in train + test} == {12}
    lengths = [len(frames) for frames, _ in train + test]
    assert (min(lengths), max(lengths)) == (7, 29)


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--p", "1.5"], "1.5"), (["--seeds", "0"], "0"), (["--epochs", "x"], "x"), (["--output", "a.pdf"], "a.pdf"),
     (["--output", "/no/such/folder/a.png"], "/no/such/folder")],
)  # fmt: skip
def test_wrong_options(options, word):
    result = CliRunner().invoke(main, ["demo", *options])
    assert result.exit_code == 2
    assert word in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "msgdrop_numba"], [str(Path(sys.executable).parent / "msgdrop")]]
)
def test_both_ways_to_call_it(command):
    done = subprocess.run([*command, "demo", "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--epochs", "--p", "--seeds", "--output"):
        assert option in done.stdout


@pytest.mark.parametrize(("missing", "arguments"), [("click", ["--help"]), ("rich", ["--help"]), ("sktime", ["demo"])])
def test_missing_packages_are_named_with_the_line_to_install_them(missing, arguments):
    code = f"import sys\nsys.modules[{missing!r}] = None\nsys.argv = ['msgdrop', *{arguments!r}]\n"
    code += "from msgdrop_numba.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert 'pip install "msgdrop_numba[demo]"' in done.stderr
    assert missing in done.stderr
    assert "Traceback" not in done.stderr
