"""What `msgdrop apply` refuses, in one line and without touching its input."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from helpers.jobs import X, files, invoke, job, run, save, serial, settings, two_folders
from pyarrow import parquet

from msgdrop_numba.command import apply, inputs, journal, shards
from msgdrop_numba.command.cli import main
from msgdrop_numba.command.errors import JobError


@pytest.fixture
def source(tmp_path):
    return two_folders(tmp_path)


# What is refused.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"p": 0.25}, "its p is 0.5, not 0.25"),
        ({"seed": 8}, "its seed is 7, not 8"),
        ({"span": 2}, "its span is 1, not 2"),
        ({"p": (0.25, 0.5)}, r"its p is 0.5, not \[0.25, 0.5\]"),
        ({"prefix": 2}, "its prefix is 0, not 2"),
        ({"positions": 2}, "its positions is None, not 2"),
        ({"scale": True}, "its scale is False, not True"),
        ({"fill": 3}, "its fill is None, not 3"),
        ({"mask": True}, "its mask is False, not True"),
        ({"epochs": 1}, "is of 2 epochs, and can't become one of 1: give --epochs 2 or more; .* epoch-0 to epoch-0"),
    ],
)
def test_an_output_holds_one_job(source, tmp_path, change, said):
    job(source, tmp_path / "out", epochs=2)
    before = files(tmp_path / "out")
    with pytest.raises(JobError, match=said):
        job(source, tmp_path / "out", **{"epochs": 2, **change})
    assert files(tmp_path / "out") == before


def test_a_changed_input_is_another_job(source, tmp_path):
    job(source, tmp_path / "out")
    os.utime(source / "a.npy", (1, 1))
    with pytest.raises(JobError, match="its input has changed since"):
        job(source, tmp_path / "out")


def change_and_restore(path, inside):
    """Other bytes of the same length while `inside` runs, then the old ones with their old time, as by `cp -p`."""
    backup = path.with_suffix(".backup")
    shutil.copy2(path, backup)
    np.save(path, np.load(path)[::-1])
    try:
        inside()
    finally:
        shutil.copy2(backup, path)


@pytest.mark.parametrize("name", ["a.npy", "ids.npy", "lengths.npy"])
def test_an_input_that_changes_and_comes_back(tmp_path, name):
    """Its size and time are those of the start again, but what was read in between isn't."""
    source = save(tmp_path / "in", a=X, b=X[:4], ids=np.arange(14), lengths=np.arange(14) % 7)
    options = {"ids": "ids.npy", "lengths": "lengths.npy"}
    job(source, tmp_path / "expected", **options)

    def changing(tasks):
        for task in tasks:
            made = []
            if task.name == "a.npy":
                change_and_restore(source / name, lambda task=task, made=made: made.append(shards.run(task)))
            yield task, made[0] if made else shards.run(task)

    with pytest.raises(JobError, match=f"a.npy, epoch 0: {name} has changed since the job began: run the same"):
        job(source, tmp_path / "out", engine=changing, **options)
    assert not (tmp_path / "out/epoch-0/a.npy").exists()
    job(source, tmp_path / "out", **options)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_an_input_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """Changed and restored within one task: only the time at which the inode changed tells."""
    source = save(tmp_path / "in", a=X)
    read = shards.read_header

    def restored(path):
        header = read(path)
        change_and_restore(source / "a.npy", lambda: None)
        return header

    found = inputs.find(source, settings())
    monkeypatch.setattr(shards, "read_header", restored)
    with pytest.raises(JobError, match="a file changed while it was read, and came back"):
        apply.make(source, found, tmp_path / "out", settings(), 1, serial, lambda count: None)
    assert not (tmp_path / "out/epoch-0/a.npy").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("nowhere", path)], ids=["pipe", "broken link"])
def test_what_is_no_regular_file_is_refused(source, tmp_path, make):
    make(source / "x.npy")
    for given, said in (
        (source, "x.npy is no regular file: leave it out of INPUT"),
        (source / "x.npy", "no regular file|there is no"),
    ):
        with pytest.raises(JobError, match=said):
            job(given, tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_parquet_file_whose_name_is_not_utf8(tmp_path):
    table = pa.table({"id": [1, 2], "frames": [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]]})
    (tmp_path / "in").mkdir()
    parquet.write_table(table, tmp_path / "in/a.parquet")
    job(tmp_path / "in", tmp_path / "expected", columns=("frames",), key="id")
    name = os.fsdecode(b"\xff\xfe.parquet")
    (tmp_path / "in/a.parquet").rename(tmp_path / "in" / name)
    job(tmp_path / "in", tmp_path / "out", columns=("frames",), key="id")
    made = (tmp_path / "out/epoch-0" / name).read_bytes()
    assert made == (tmp_path / "expected/epoch-0/a.parquet").read_bytes()
    assert not any(apply.verify(tmp_path / "out", lambda count: None))


def test_another_version_is_another_job(source, tmp_path, monkeypatch):
    job(source, tmp_path / "out")
    monkeypatch.setattr(apply, "__version__", "7.7.7")
    with pytest.raises(JobError, match=r"its version is '.*', not '7\.7\.7'"):
        job(source, tmp_path / "out")


def parquet_file(path, **columns):
    parquet.write_table(pa.table(columns), path)


def twice(path):
    path.write_bytes(path.read_bytes() * 2)


def zipped(path):
    np.savez(path.with_suffix(".npz"), X)
    path.with_suffix(".npz").rename(path)


def spoilt_header(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


BAD_SHARDS = [
    (lambda d: save(d, a=X, b=X[:, :5]), "b.npy has rows of (5, 3) float32, but a.npy of (6, 3) float32: all shards must be alike"),
    (lambda d: save(d, a=X, b=X.astype("f8")), "b.npy has rows of (6, 3) float64, but a.npy of (6, 3) float32"),
    (lambda d: save(d, a=X[0]), "a.npy: it must be (samples, messages, features), but has the shape (6, 3)"),
    (lambda d: save(d, a=X.astype(object)), "a.npy: it is no .npy file that can be read: Array can't be memory-mapped: Python objects"),
    (lambda d: save(d, a=X.astype("S4")), "a.npy: x must be an array of numbers or bools, but got dtype |S4"),
    (lambda d: save(d, a=np.asfortranarray(X)), "a.npy: it lies in Fortran's order: save np.ascontiguousarray(x) instead"),
    (lambda d: os.truncate(save(d, a=X) / "a.npy", 500), "a.npy: it is no .npy file that can be read"),
    (lambda d: os.truncate(save(d, a=X) / "a.npy", 20), "a.npy: it is no .npy file that can be read"),
    (lambda d: os.truncate(save(d, a=X) / "a.npy", 0), "a.npy: it is no .npy file that can be read"),
    (lambda d: twice(save(d, a=X) / "a.npy"), "a.npy: it must have 848 bytes, as its header says, but has 1696"),
    (lambda d: zipped(save(d) / "a.npy"), "a.npy: it is no .npy file that can be read"),
    (lambda d: (d / "a.npy").write_text("hello"), "a.npy: it is no .npy file that can be read"),
    (lambda d: spoilt_header(save(d, a=X) / "a.npy", b"(", b"["), "a.npy: it is no .npy file that can be read"),
    (lambda d: spoilt_header(save(d, a=X) / "a.npy", b"}", b" "), "a.npy: it is no .npy file that can be read"),
    (lambda d: spoilt_header(save(d, a=X) / "a.npy", b"10, 6", b"9**99"), "a.npy: it is no .npy file that can be read"),
    (lambda d: spoilt_header(save(d, a=X) / "a.npy", b"(10, 6, 3), }     ", b"(9999999999999999)}"), "a.npy: it is no .npy file that can be read"),
    (lambda d: None, "holds no .npy or .parquet file"),
    (lambda d: (save(d, a=X), parquet_file(d / "b.parquet", a=[1])), "holds both .npy and .parquet files"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "said"), BAD_SHARDS, ids=range(len(BAD_SHARDS)))
def test_bad_shards(tmp_path, make, said):
    source = tmp_path / "in"
    source.mkdir()
    make(source)
    before = files(source)
    result = invoke("apply", source, tmp_path / "out", "--p", 0.5, "--seed", 7)
    assert result.exit_code == 1
    assert said in result.stderr
    assert (result.stderr.count("\n"), result.stderr[:7], result.stdout) == (1, "Error: ", "")
    assert not (tmp_path / "out").exists()
    assert files(source) == before


ROWS = X[:3].tolist()
BAD_PARQUET = [
    ({"id": ["a"] * 3}, "no column 'x'"),
    ({"x": ROWS}, "no column 'id'"),
    ({"id": [1.0, 2.0, 3.0], "x": ROWS}, "column 'id': sample ids must be integers or strings, but got float64"),
    ({"id": [True, False, True], "x": ROWS}, "column 'id': sample ids must be integers or strings, but got bool"),
    ({"id": ["a", None, "b"], "x": ROWS}, "column 'id' has 1 nulls"),
    ({"id": [1, 2, None], "x": ROWS}, "column 'id' has 1 nulls"),
    ({"id": ["a"] * 3, "x": ["b"] * 3}, "column 'x': it must hold tensors or lists of lists of numbers"),
    ({"id": ["a"] * 3, "x": [[1.0]] * 3}, "column 'x': it must have messages of several features"),
    ({"id": ["a"] * 3, "x": [[[1.0]], None, [[1.0]]]}, "column 'x': there are 1 nulls"),
    ({"id": ["a"] * 3, "x": [[[1.0]], [[1.0], [1.0, 2.0]], [[1.0]]]}, "column 'x': its messages must all have as many features"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "said"), BAD_PARQUET, ids=range(len(BAD_PARQUET)))
def test_bad_parquet(tmp_path, columns, said):
    (tmp_path / "in").mkdir()
    parquet_file(tmp_path / "in/a.parquet", **columns)
    with pytest.raises(JobError) as caught:
        job(tmp_path / "in", tmp_path / "out", columns=("x",), key="id")
    assert said in str(caught.value)
    assert str(caught.value).startswith("a.parquet")
    assert not [name for name in files(tmp_path / "out") if name != journal.NAME]


def test_more_bad_parquet(tmp_path):
    (tmp_path / "in").mkdir()
    parquet_file(tmp_path / "in/a.parquet", id=["a"] * 3, x=ROWS)
    parquet_file(tmp_path / "in/b.parquet", id=[1, 2, 3], x=ROWS)
    options = ["--p", 0.5, "--seed", 7, "--columns", "x", "--key", "id"]
    result = invoke("apply", tmp_path / "in", tmp_path / "out", *options)
    assert result.stderr == "Error: b.parquet has other columns than a.parquet: all shards must be alike\n"
    (tmp_path / "in/b.parquet").write_text("hello")
    result = invoke("apply", tmp_path / "in", tmp_path / "out", *options)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "b.parquet: " in result.stderr
    for some in (options[:4], options[:6], [*options, "--ids", "a.npy"]):
        result = invoke("apply", tmp_path / "in", tmp_path / "out", *some)
        assert (
            result.stderr == f"Error: {tmp_path / 'in'} holds Parquet files: give --columns and --key, and no --ids\n"
        )
    assert not (tmp_path / "out").exists()


BAD_IDS = [
    (np.arange(9), "ids.npy has 9 ids, but the shards beside it have 10 rows together"),
    (np.arange(10.0), "ids.npy must hold integers or strings, one a row, but is (10,) float64"),
    (np.ones(10, bool), "ids.npy must hold integers or strings, one a row, but is (10,) bool"),
    (np.zeros((10, 1), int), "ids.npy must hold integers or strings, one a row, but is (10, 1) int64"),
    (None, "x.npy has no ids.npy beside it"),
]


@pytest.mark.parametrize(("ids", "said"), BAD_IDS, ids=range(len(BAD_IDS)))
def test_bad_ids(tmp_path, ids, said):
    save(tmp_path / "in", x=X, **({} if ids is None else {"ids": ids}))
    result = invoke("apply", tmp_path / "in", tmp_path / "out", "--p", 0.5, "--seed", 7, "--ids", "ids.npy")
    assert (result.exit_code, said in result.stderr) == (1, True), result.stderr


@pytest.mark.processes
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="as root, and with setpriv, the rights of root can be given up",
)
def test_no_permission(source, tmp_path):
    def unprivileged(*arguments):
        rights = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
        command = [*rights, sys.executable, "-m", "msgdrop_numba", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    for mode, path, output in [
        (0o000, source / "a.npy", tmp_path / "out"),
        (0o000, source, tmp_path / "out"),
        (0o555, tmp_path / "locked", tmp_path / "locked/out"),
    ]:
        path.mkdir(exist_ok=True) if path.suffix == "" else None
        before = path.stat().st_mode
        path.chmod(mode)
        try:
            done = unprivileged("apply", source, output, "--p", 0.5, "--seed", 7)
        finally:
            path.chmod(before)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Error: Permission denied: ")
        assert done.stderr.count("\n") == 1


def test_a_link_at_the_place_of_an_epoch(source, tmp_path):
    (tmp_path / "out").mkdir()
    before = files(source)
    with pytest.raises(JobError, match="as planned"):
        job(source, tmp_path / "out", engine=stop)
    (tmp_path / "out/epoch-0/söme").rmdir()
    (tmp_path / "out/epoch-0").rmdir()
    (tmp_path / "out/epoch-0").symlink_to(source)
    with pytest.raises(JobError, match="is a link"):
        job(source, tmp_path / "out")
    assert files(source) == before


def stop(tasks):
    raise JobError("as planned")
    yield


def test_bad_places(source, tmp_path):
    options = ["--p", 0.5, "--seed", 7]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("text")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").write_text("")
    for source_, output, said in [
        (source, source, "must lie beside each other"),
        (source, source / "out", "must lie beside each other"),
        (source, tmp_path, "must lie beside each other"),
        (source, tmp_path / "link/out", "must lie beside each other"),
        (tmp_path / "none", tmp_path / "out", "there is no"),
        (source, tmp_path / "full", "isn't empty, and no job of msgdrop's began it"),
        (source, tmp_path / "file", "File exists"),
        (source, "/sys/msgdrop", "/sys/msgdrop"),
    ]:
        before = files(source)
        result = invoke("apply", source_, output, *options)
        assert (result.exit_code, said in result.stderr, result.stderr.count("\n")) == (1, True, 1), result.stderr
        assert files(source) == before
    assert files(tmp_path / "full") == {"mine.txt": b"text"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", 7], "--p"),
        (["--p", 0.5], "--seed"),
        (["--p", 1.5, "--seed", 7], "1.5"),
        (["--p", "nan", "--seed", 7], "nan"),
        (["--p", "0.9,0.1", "--seed", 7], "p must be a range (lo, hi) with lo <= hi, but got (0.9, 0.1)"),
        (["--p", "much", "--seed", 7, "--exact"], "--exact needs p to be a single number or range"),
        (["--p", 0.5, "--seed", 7, "--positions", -1], "positions must be from 0 to 2**34 - 1, but got -1"),
        (["--p", 0.5, "--seed", 7, "--exact", "--span", 2], "--exact can't be combined with --span"),
        (["--p", 0.5, "--seed", 7, "--ids", "../ids.npy"], "--ids must be the name of .npy files"),
        (["--p", 0.5, "--seed", 7, "--ray-address", "a:1"], "--ray-address needs --engine ray"),
        (["--p", 0.5, "--seed", 7, "--jobs", 0], "0"),
        (["--p", 0.5, "--seed", 7, "--engine", "dask"], "dask"),
    ],
)  # fmt: skip
def test_usage(source, tmp_path, options, said):
    result = invoke("apply", source, tmp_path / "out", *options)
    assert (result.exit_code, said in result.stderr) == (2, True)


@pytest.mark.ray
def test_nobody_answers(source, tmp_path):
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "127.0.0.1:99999"):
        result = invoke(
            "apply", source, tmp_path / "out", "--p", 0.5, "--seed", 7, "--engine", "ray", "--ray-address", address
        )
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert f"no Ray answers at {address}" in result.stderr


@pytest.mark.processes
def test_debug_shows_the_traceback(source, tmp_path):
    result = CliRunner().invoke(main, ["--debug", "apply", str(source), str(source), "--p", "0.5", "--seed", "7"])
    assert isinstance(result.exception, JobError)
    done = run("--debug", "apply", source, source, "--p", 0.5, "--seed", 7)
    assert "Traceback" in done.stderr
    assert done.returncode == 1
