"""The `msgdrop` command, and the demo it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import naive
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet

import msgdrop_numba
from msgdrop_numba.command import demo
from msgdrop_numba.command.cli import main


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
        assert all(line in result.output for line in arm.split(" p in "))  # as a narrow terminal breaks it
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


@pytest.mark.processes
@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "msgdrop_numba"], [str(Path(sys.executable).parent / "msgdrop")]]
)
def test_both_ways_to_call_it(command):
    done = subprocess.run([*command, "demo", "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--epochs", "--p", "--seeds", "--output"):
        assert option in done.stdout


HIDDEN = "import sys\nfor name in {missing!r}.split():\n    sys.modules[name] = None\nsys.argv = ['msgdrop', *{arguments!r}]\n"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("click", ["--help"], "cli"),
        ("rich", ["info"], "cli"),
        ("xxhash", ["apply", ".", "out", "--p", "0.5", "--seed", "7"], "cli"),
        ("filelock", ["verify", "."], "cli"),
        ("pyarrow", ["apply", "{parquet}", "out", "--p", "0.5", "--seed", "7", "--columns", "x", "--key", "id"], "cli"),
        ("ray", ["apply", "{npy}", "out", "--p", "0.5", "--seed", "7", "--engine", "ray"], "ray"),
        ("matplotlib", ["show", "--p", "0.5", "--seed", "7", "--output", "a.png"], "plot"),
        ("torch", ["bench"], "torch"),
        ("sktime", ["demo"], "demo"),
        ("matplotlib", ["demo"], "plot"),
    ],
)
def test_missing_packages_are_named_with_the_line_to_install_them(missing, arguments, extra, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    np.save(tmp_path / "a.npy", np.ones((2, 3, 4)))
    names = {"{parquet}": str(tmp_path / "a.parquet"), "{npy}": str(tmp_path / "a.npy")}
    code = HIDDEN.format(missing=missing, arguments=[names.get(a, a) for a in arguments])
    code += "from msgdrop_numba.__main__ import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f'Error: msgdrop needs {missing} for this: pip install "msgdrop_numba[{extra}]"'
    ]


STARTED = """
import sys
from msgdrop_numba.__main__ import main
sys.argv = ["msgdrop", *{arguments!r}]
try:
    main()
finally:
    print(*sorted({heavy!r} & sys.modules.keys()))
"""
# numba.np.arraymath stands for numba made ready to compile, numpy.ma for what NumPy imports where it is named.
HEAVY = {
    "torch", "ray", "dask", "pandas", "pyarrow", "pyarrow.dataset", "matplotlib", "rich", "scipy.linalg", "numpy.ma",
    "numba.cuda.cudadrv", "numba.np.arraymath", "concurrent.futures.process",
}  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "needed"), [("npy", ""), ("parquet", "numpy.ma pandas pyarrow")]
)  # its dtypes ask pandas
def test_a_shard_imports_what_it_needs(kind, needed, tmp_path):
    x = np.ones((2, 3, 4), np.float32)
    np.save(tmp_path / "a.npy", x)
    table = pa.table({"id": [1, 2], "x": pa.FixedShapeTensorArray.from_numpy_ndarray(x)})
    parquet.write_table(table, tmp_path / "a.parquet")
    options = ["--p", "0.5", "--seed", "7", *(["--columns", "x", "--key", "id"] if kind == "parquet" else [])]
    imported = []
    for output in ("first", "second"):  # the first one may have kernels to compile
        code = STARTED.format(arguments=["apply", f"a.{kind}", output, *options], heavy=HEAVY)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False,
            cwd=tmp_path, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        said, names = done.stdout.splitlines()
        assert said == f"1 files written, 1 in {output}"
        imported.append(names.split())
    assert "numba.np.arraymath" in imported[0]
    assert imported[1] == needed.split()


@pytest.mark.parametrize(
    "rule", [[], ["--exact"], ["--span", "4"], ["--min-keep", "9"], ["--prefix", "5"], ["--positions", "17"]], ids=str
)
def test_show(rule, tmp_path):
    picture = tmp_path / "mask.png"
    command = ["show", "--shape", "11,20", "--p", "0.4", "--seed", "3", *rule, "--output", str(picture)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    options = {
        name.strip("-").replace("-", "_"): int(value) for name, value in zip(rule[::2], rule[1::2], strict=False)
    }
    options = {"exact": True} if rule == ["--exact"] else options
    mask = naive.keep_mask((11, 20), 0.4, seed=3, **options)
    lines = [f"{key:>2} " + "".join("█" if keep else "·" for keep in row) for key, row in enumerate(mask)]
    assert result.output.splitlines() == [*lines, f"kept {mask.mean():.1%} of 220 messages", f"Picture: {picture}"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("p", [(0.2, 0.9), (0.5, 0.5), (0.0, 1.0)])
def test_show_of_a_range(p):
    command = ["show", "--shape", "9,20", "--p", f"{p[0]},{p[1]}", "--seed", "3", "--exact", "--prefix", "2"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    mask = naive.keep_mask((9, 20), p, seed=3, exact=True, prefix=2)
    assert [line.split()[1] for line in result.output.splitlines()[:-1]] == [
        "".join("█" if keep else "·" for keep in row) for row in mask
    ]


def test_the_picture_shows_the_mask(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    seen = []
    monkeypatch.setattr(Axes, "imshow", lambda self, image, **options: seen.append(image))
    command = ["show", "--p", "0.4", "--seed", "3", "--output", str(tmp_path / "a.png")]
    CliRunner().invoke(main, [*command, "--shape", "3,9"])
    assert np.array_equal(seen.pop(), ~naive.keep_mask((3, 9), 0.4, seed=3))
    CliRunner().invoke(main, [*command, "--lengths", "3,9", "--epochs", "2"])
    for epoch, image in enumerate(seen):
        mask = naive.keep_mask((2, 9), 0.4, seed=naive.fold_in(3, epoch), lengths=[3, 9])
        assert np.array_equal(image, np.where(np.arange(9) < [[3], [9]], ~mask, 0.3))
    assert len(seen) == 2


@pytest.mark.parametrize("lengths", ["0,0", "0"])
def test_show_of_no_messages(tmp_path, lengths):
    picture = tmp_path / "mask.png"
    command = ["show", "--p", "0.5", "--seed", "1", "--lengths", lengths, "--output", str(picture)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_show_of_a_collates_settings(tmp_path):
    """Ids, lengths and epochs as a collate has them; what is shown of the epochs is what it drops."""
    import torch

    from msgdrop_numba import Keyed, MessageDropoutCollate

    ids, lengths = ["a", 17, "clip-3"], [9, 0, 30]
    collate = MessageDropoutCollate(0.4, pad=True, seed=3, span=2, prefix=1, return_mask=True)
    samples = [Keyed(i, torch.ones(n, 1)) for i, n in zip(ids, lengths, strict=True)]
    expected, masks = [], []
    for epoch in range(3):
        collate.set_epoch(epoch)
        masks.append(collate(samples)[2])
        rows = ["".join("█" if keep else "·" for keep in row[:n]) for row, n in zip(masks[-1], lengths, strict=True)]
        expected += [f"epoch {epoch}", *(f"{name:>6} {row}".rstrip() for name, row in zip(ids, rows, strict=True))]
    kept = sum(int(mask.sum()) for mask in masks) - 3 * (90 - sum(lengths))
    command = ["show", "--ids", "a,17,clip-3", "--lengths", "9,0,30", "--epochs", "3", "--p", "0.4", "--seed", "3"]
    picture = tmp_path / "a.png"
    result = CliRunner().invoke(main, [*command, "--span", "2", "--prefix", "1", "--output", str(picture)])
    assert result.output.splitlines() == [
        *expected, f"kept {kept / 117:.1%} of 117 messages", "dropped 0 of 153 places of padding",
        "2 of 3 rows have another mask in each epoch", f"Picture: {picture}",
    ]  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")
    same = CliRunner().invoke(main, ["show", "--p", "0", "--seed", "3", "--epochs", "2", "--ids", "b,c"])
    assert same.output.splitlines()[-1] == "0 of 2 rows have another mask in each epoch"


@pytest.mark.processes
def test_show_without_unicode_and_without_colour():
    done = subprocess.run(
        [sys.executable, "-m", "msgdrop_numba", "show", "--shape", "1,8", "--p", "0.5", "--seed", "1"],
        capture_output=True, timeout=60, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii", "FORCE_COLOR": ""},
    )  # fmt: skip
    assert set(done.stdout.decode("ascii").splitlines()[0]) <= set("0 #.")
    assert b"\x1b" not in done.stdout


@pytest.mark.processes
def test_info():
    done = subprocess.run(
        [sys.executable, "-m", "msgdrop_numba", "info"], capture_output=True, text=True, timeout=60, check=True
    )
    facts = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert facts["msgdrop_numba"] == msgdrop_numba.__version__
    assert facts["numpy"] == np.__version__
    assert facts["threads"].endswith(f"{os.cpu_count()} CPUs")
    assert "__pycache__" in facts["compiled code"] or "NUMBA_CACHE_DIR" in os.environ
    assert set(facts) >= {"Python", "numba", "torch", "threading layer", "GPU"}
    assert "NumPy array" in done.stdout
    assert "\x1b" not in done.stdout


def test_the_paths_that_info_names_are_those_taken(monkeypatch):
    """The table that info prints, seen from which kernel is launched."""
    import torch
    from helpers import internals, stand_in

    from msgdrop_numba import message_dropout
    from msgdrop_numba.command.info import PATHS

    def taken(x):
        """What runs for x."""
        launched.clear()
        message_dropout(x, 0.5, seed=1)
        drawn = "compiled mask" if launched else "tensor operations"
        runs.append("compiled kernel" if any(launch.out for launch in launched) else drawn)
        return x

    launched, runs = internals.watch_launches(monkeypatch), []
    x = np.ones((4, 6, 8), np.float32)
    apart = np.ones((4, 6, 4, 4, 4), np.float32)[..., ::2, :3, ::2]  # unevenly
    t = torch.from_numpy(x)
    calls = {
        "NumPy array": lambda: taken(x),
        "NumPy array, other layouts": lambda: taken(apart),
        "CPU or CUDA tensor": lambda: taken(t),
        "CPU or CUDA tensor, other layouts": lambda: taken(torch.from_numpy(apart)),
        "export, vmap, jvp, fake tensors": lambda: torch.vmap(taken)(t[None]),
        "ROCm, MPS and XPU tensors": lambda: taken(t.to("meta")),
    }
    paths = {array: path for array, path, _ in PATHS}
    for array, call in calls.items():
        call()
        assert paths[array].startswith(runs[-1]), array
    kernels = stand_in.Kernels()
    stand_in.install(monkeypatch, kernels)
    message_dropout(t, 0.5)
    message_dropout(t[..., ::2], 0.5)
    assert kernels.launches == 2
    internals.unusable_devices(monkeypatch)
    message_dropout(t, 0.5)
    assert kernels.launches == 2
    assert paths["CUDA tensor without numba-cuda"] == "tensor operations"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (["8,64,128", "--dtype", "bfloat16"], "tensor: compiled kernel, 1 thread: "),
        (["8,16,128"], "NumPy array: compiled kernel, 1 thread: "),
        (["4,4,4", "--device", "meta"], "tensor: tensor operations, as x: there are no kernels for the device meta"),
        (["4,4,4", "--dtype", "float24"], "has float24 on cpu"),
        (["4"], "x must have 1 message dims and at least one feature dim"),
    ],
)
def test_info_of_a_case(case, said):
    result = CliRunner().invoke(main, ["info", "--shape", *case])
    assert said in result.output
    assert result.exit_code == (0 if "kernel" in said else 1)


def test_bench():
    result = CliRunner().invoke(main, ["bench", "--shape", "3,5,20", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1:4] for line in result.output.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == [
        "message_dropout",
        "F.dropout1d",
        "masked_fill",
        "x.clone(), drops nothing",
    ]
    times = [float(row[1].replace(",", "")) for row in rows]
    for row, time in zip(rows, times, strict=True):
        assert float(row[2]) == pytest.approx(time / times[0], abs=0.1 * time / times[0] + 0.05)  # as both are rounded


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["show", "--p", "0.5", "--seed", "1", "--shape", "8"], "8"),
        (["show", "--p", "0.5", "--seed", "1", "--shape", "8,x"], "8,x"),
        (["show", "--p", "0.5", "--seed", "1", "--shape", "8,0"], "8,0"),
        (["show", "--p", "0.5", "--seed", "1", "--ids", "a,b", "--shape", "3,4"], "one for each of 3 rows, but got 2"),
        (["show", "--p", "0.5", "--seed", "1", "--lengths", "4", "--ids", "a,b"], "one for each of 2 rows, but got 1"),
        (
            ["show", "--p", "0.5", "--seed", "1", "--lengths", "4,-1"],
            "from 0 on with commas between them, but got '4,-1'",
        ),
        (["show", "--p", "0.5", "--seed", "1", "--epochs", "0"], "0"),
        (["show", "--p", "0.5", "--seed", "-1"], "-1"),
        (["show", "--p", "nan", "--seed", "1"], "p must be a probability of dropping, from 0 to 1, but got nan"),
        (["show", "--p", "1.5", "--seed", "1"], "p must be a probability of dropping, from 0 to 1, but got 1.5"),
        (["show", "--p", "0.9,0.1", "--seed", "1"], "p must be a range (lo, hi) with lo <= hi, but got (0.9, 0.1)"),
        (["show", "--p", "0.1,nan", "--seed", "1"], "p must be a probability of dropping, from 0 to 1, but got nan"),
        (["show", "--p", "0,0.5,1", "--seed", "1"], "but got 3 numbers: (0.0, 0.5, 1.0)"),
        (["show", "--p", "often", "--seed", "1"], "must be P|LO,HI, but got 'often'"),
        (["show", "--p", "0.5", "--seed", "1", "--positions", "q"], "must be OFFSET, but got 'q'"),
        (
            ["show", "--p", "0.5", "--seed", "1", "--positions", "-1"],
            "positions must be from 0 to 2**34 - 1, but got -1",
        ),
        (["show", "--p", "0.5", "--seed", "1", "--positions", "1,2"], "positions must be an integer"),
        (["show", "--p", "0.5", "--seed", "1", "--prefix", "-1"], "-1"),
        (["show", "--p", "0.5", "--seed", "1", "--exact", "--span", "2"], "--exact can't be combined with --span"),
        (["show", "--span", "2", "--exact", "--p", "0.5", "--seed", "1"], "--exact can't be combined with --span"),
        (["show", "--p", "0.5", "--seed", "1", "--output", "a.jpg"], "a.jpg"),
        (["bench", "--shape", "8,8"], "(8, 8)"),
        (["nothing"], "nothing"),
    ],
)
def test_wrong_use(command, word):
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, word in result.stderr, "Traceback" in result.stderr) == (2, True, False)


@pytest.mark.processes
def test_a_closed_pipe_ends_it_quietly():
    command = [sys.executable, "-m", "msgdrop_numba", "show", "--shape", "4000,64", "--p", "0.5", "--seed", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.processes
@pytest.mark.parametrize("command", [["info"], ["bench", "--shape", "3,5,20", "--rounds", "1"]])
def test_plain_terminals(command):
    """Neither UTF-8 nor 200 columns."""
    done = subprocess.run(
        [sys.executable, "-m", "msgdrop_numba", *command],
        capture_output=True, timeout=60, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "60"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()


@pytest.mark.parametrize("command", ["apply", "verify", "show", "info", "bench", "demo"])
def test_help(command):
    """And in a terminal of 80 columns the list of commands says of each, in a whole sentence, what it does."""
    listed = CliRunner().invoke(main, ["--help"]).output.split("Commands:\n")[1]
    (said,) = [line.split(maxsplit=1)[1] for line in listed.splitlines() if line.split()[:1] == [command]]
    assert said.endswith(".")
    assert not said.endswith("...")
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: main {command}")
