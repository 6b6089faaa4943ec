"""`msgdrop apply` and `verify`: every byte against naive.py, and what becomes of it when something goes wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet

from msgdrop_numba import apply, inputs, journal, shards
from msgdrop_numba.cli import main
from msgdrop_numba.errors import JobError
from tests import naive

rng = np.random.default_rng(5)


def serial(tasks):
    """An engine in this process."""
    return ((task, shards.run(task)) for task in tasks)


def settings(p=0.5, seed=7, exact=False, span=1, min_keep=0, columns=None, key=None, ids=None):
    return shards.Settings(p, seed, exact, span, min_keep, columns, key, ids)


def job(source, output, epochs=1, engine=serial, **options):
    chosen = settings(**options)
    return apply.make(source, inputs.find(source, chosen), output, chosen, epochs, engine, lambda count: None)


def save(folder, **arrays):
    for name, array in arrays.items():
        path = folder / f"{name.replace('__', '/')}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    return folder


def files(folder, but=(apply.LOCK,)):
    """All bytes of a folder, by relative path."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in but
    }


def made(x, keys, *, epoch=0, p=0.5, seed=7, **rule):
    keep = naive.keep_mask(x.shape[:2], p, seed=naive.fold_in(seed, epoch), keys=keys, **rule)
    return naive.drop(x, keep)


def path_keys(name, rows):
    return [naive.fold_in(naive.hash64(name), row) for row in range(rows)]


@pytest.fixture
def source(tmp_path):
    """Shards in two folders, one with a name that isn't ASCII."""
    x = rng.standard_normal((3, 5, 7, 2)).astype(np.float32)
    return save(tmp_path / "in", a=x[0], b=x[1][:2], **{"söme__c": x[2], "söme__d": x[0][:0]})


@pytest.mark.parametrize("rule", [{}, {"exact": True}, {"span": 3}, {"min_keep": 4}], ids=str)
def test_shards(tmp_path, monkeypatch, rule):
    monkeypatch.setattr(shards, "CHUNK", 200)  # two rows and a half
    x = rng.standard_normal((7, 9, 2)).astype(np.float32)
    save(tmp_path / "in", **{"deep__er__x": x, "y": x[:1], "z": x[:0]})
    job(tmp_path / "in", tmp_path / "out", epochs=2, **rule)
    for epoch in range(2):
        for name, array in {"deep/er/x": x, "y": x[:1], "z": x[:0]}.items():
            got = np.load(tmp_path / "out" / f"epoch-{epoch}" / f"{name}.npy")
            expected = made(array, path_keys(f"{name}.npy", len(array)), epoch=epoch, **rule)
            assert got.dtype == expected.dtype
            assert got.tobytes() == expected.tobytes()
            assert got.shape == expected.shape


@pytest.mark.parametrize("dtype", ["f2", ">f4", "f8", "c8", "?", "i1", ">u8"])
def test_dtypes(tmp_path, dtype):
    x = rng.integers(0, 2, (4, 6, 3, 2)).astype(dtype)
    save(tmp_path / "in", x=x)
    job(tmp_path / "in", tmp_path / "out")
    got = (tmp_path / "out/epoch-0/x.npy").read_bytes()
    np.save(tmp_path / "expected.npy", made(x, path_keys("x.npy", 4)))
    assert got == (tmp_path / "expected.npy").read_bytes()


@pytest.mark.parametrize(
    "ids", [np.array([9, -4, 9, 2**40, 5]), np.array(["a", "bé", "c", "d", "a"]), np.arange(5, dtype="u2")], ids=str
)
def test_ids(tmp_path, monkeypatch, ids):
    monkeypatch.setattr(shards, "CHUNK", 100)
    x = rng.standard_normal((5, 4, 2))
    save(tmp_path / "in", a=x[:2], b=x[2:], ids=ids, **{"sub__c": x, "sub__ids": ids[::-1]})
    job(tmp_path / "in", tmp_path / "out", ids="ids.npy")
    out = tmp_path / "out/epoch-0"
    keys = [naive.hash64(i) if isinstance(i, str) else i for i in ids.tolist()]
    assert np.concatenate([np.load(out / "a.npy"), np.load(out / "b.npy")]).tobytes() == made(x, keys).tobytes()
    assert np.load(out / "sub/c.npy").tobytes() == made(x, keys[::-1]).tobytes()
    for name in ("ids.npy", "sub/ids.npy"):
        assert (out / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    with pytest.raises(JobError, match=r"ids\.npy has rows of \(\) .* must be alike"):
        job(tmp_path / "in", tmp_path / "other")  # without --ids they are shards that don't fit


X = rng.standard_normal((10, 6, 3)).astype(np.float32)
NAMES = [f"clip {i}" for i in range(10)]
LISTS = pa.array([row[: 1 + i % 6].tolist() for i, row in enumerate(X)], pa.list_(pa.list_(pa.float32())))
COLUMNS = {
    "tensors": pa.FixedShapeTensorArray.from_numpy_ndarray(X),
    "lists": LISTS,
    "fixed lists": pa.array(X.tolist(), pa.list_(pa.list_(pa.float32(), 3), 6)),
}


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_parquet(tmp_path, column, codec):
    table = pa.table({"id": NAMES, "x": column, "label": range(10)}).replace_schema_metadata({"made": "by hand"})
    (tmp_path / "in/year=1").mkdir(parents=True)
    parquet.write_table(
        table, tmp_path / "in/year=1/a.parquet", row_group_size=4, compression=codec, use_dictionary=["id"]
    )
    parquet.write_table(table.slice(2, 3), tmp_path / "in/b.parquet", compression=codec)
    parquet.write_table(table.slice(0, 0), tmp_path / "in/empty.parquet")
    job(tmp_path / "in", tmp_path / "out", epochs=2, columns=("x",), key="id", min_keep=1)
    keys = [naive.hash64(name) for name in NAMES]
    for epoch in range(2):
        path = tmp_path / f"out/epoch-{epoch}/year=1/a.parquet"
        got, before = parquet.read_table(path, partitioning=None), parquet.ParquetFile(tmp_path / "in/year=1/a.parquet")
        assert got.schema.equals(before.schema_arrow, check_metadata=True)
        assert got.schema.metadata == {b"made": b"by hand"}
        assert got.drop_columns("x").equals(table.drop_columns("x"))
        for row, value in enumerate(table["x"].combine_chunks().to_pylist()):
            x = np.array(value, np.float32).reshape(1, -1, 3)
            expected = made(x, keys[row : row + 1], epoch=epoch, min_keep=1)
            assert np.array(got["x"].combine_chunks().to_pylist()[row], np.float32).tobytes() == expected.tobytes()
        after = parquet.ParquetFile(path).metadata
        for group in range(3):
            assert after.row_group(group).num_rows == before.metadata.row_group(group).num_rows
            for i in range(after.num_columns):
                ours, theirs = after.row_group(group).column(i), before.metadata.row_group(group).column(i)
                assert (ours.compression, ours.encodings) == (theirs.compression, theirs.encodings)
        part = parquet.read_table(tmp_path / f"out/epoch-{epoch}/b.parquet", partitioning=None)
        assert part["x"].to_pylist() == got["x"].slice(2, 3).to_pylist()
        assert parquet.read_table(tmp_path / f"out/epoch-{epoch}/empty.parquet").num_rows == 0


def test_a_single_file_is_an_input(tmp_path):
    parquet.write_table(pa.table({"id": NAMES, "x": LISTS}), tmp_path / "a.parquet")
    save(tmp_path, b=X)
    job(tmp_path / "a.parquet", tmp_path / "one", columns=("x",), key="id")
    job(tmp_path / "b.npy", tmp_path / "two")
    assert list(files(tmp_path / "one/epoch-0")) == ["a.parquet"]
    assert np.load(tmp_path / "two/epoch-0/b.npy").tobytes() == made(X, path_keys("b.npy", 10)).tobytes()


def test_what_is_left_out(source, tmp_path):
    for name in ("notes.txt", "._a.npy", "_part.npy", ".hidden/x.npy", "_temporary/x.npy"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"no array")
    assert job(source, tmp_path / "out") == 4
    assert sorted(files(tmp_path / "out/epoch-0")) == ["a.npy", "b.npy", "söme/c.npy", "söme/d.npy"]


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "msgdrop_numba", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, **options,
    )  # fmt: skip


def test_processes_give_the_same_bytes(source, tmp_path):
    job(source, tmp_path / "expected", epochs=3)
    for jobs in (1, 2):
        done = run("apply", source, tmp_path / f"{jobs}", "--p", 0.5, "--seed", 7, "--epochs", 3, "--jobs", jobs)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"12 files written, 12 in {tmp_path / str(jobs)}\n"
        assert files(tmp_path / f"{jobs}") == files(tmp_path / "expected")
    done = run("apply", source, tmp_path / "1", "--p", 0.5, "--seed", 7, "--epochs", 3)
    assert (done.returncode, done.stdout.split()[0]) == (0, "0")
    done = run("verify", tmp_path / "2")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / '2'} is as its journal says\n", "")


def test_torch_is_not_imported(source, tmp_path):
    code = f"""
import sys
from pathlib import Path
from msgdrop_numba import apply, cli, inputs, shards
settings = shards.Settings(0.5, 7, False, 1, 0, None, None, None)
source, output = Path({str(source)!r}), Path({str(tmp_path / "out")!r})
serial = lambda tasks: ((task, shards.run(task)) for task in tasks)
apply.make(source, inputs.find(source, settings), output, settings, 1, serial, print)
assert not {{"torch", "ray", "pyarrow"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# What a killed or failed job leaves behind.


def failing(after):
    """An engine that fails when it has made `after` files."""

    def engine(tasks):
        for number, task in enumerate(tasks):
            if number == after:
                raise JobError("as planned")
            yield task, shards.run(task)

    return engine


def test_a_job_goes_on_where_it_was(source, tmp_path):
    job(source, tmp_path / "expected", epochs=2)
    for left in (8, 6, 3):
        with pytest.raises(JobError, match="as planned"):
            job(source, tmp_path / "out", epochs=2, engine=failing(8 - left if left == 8 else 2))
        assert len(files(tmp_path / "out", but=(apply.LOCK, journal.NAME))) >= 8 - left - 1
    assert job(source, tmp_path / "out", epochs=2) == 4
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "epoch-0/a.npy").unlink(),
        lambda out: (out / "epoch-1/a.npy").write_bytes(b"short"),
        lambda out: (out / journal.NAME).write_text((out / journal.NAME).read_text()[:-20]),
        lambda out: (out / journal.NAME).write_text((out / journal.NAME).read_text()[:20]),
        lambda out: (out / "epoch-0" / f".{uuid.uuid4().hex}{shards.PARTIAL}").write_bytes(b"left by a killed process"),
        lambda out: (out / f".{journal.NAME}{shards.PARTIAL}").write_text("left by a killed process"),
    ],
    ids=["missing", "cut", "half a line", "half a header", "a partial file", "half a journal"],
)
def test_a_run_again_heals(source, tmp_path, damage):
    job(source, tmp_path / "out", epochs=2)
    whole = files(tmp_path / "out")
    damage(tmp_path / "out")
    if (tmp_path / "out" / journal.NAME).stat().st_size > 20:
        job(source, tmp_path / "out", epochs=2)
        assert files(tmp_path / "out") == whole
    else:
        with pytest.raises(JobError, match="can't be read as a journal"):
            job(source, tmp_path / "out", epochs=2)


def command(source, output):
    return [
        sys.executable,
        "-m",
        "msgdrop_numba",
        "apply",
        str(source),
        str(output),
        "--p",
        "0.5",
        "--seed",
        "7",
        "--epochs",
        "2",
        "--jobs",
        "2",
    ]


def marked(mark):
    """The living processes with this environment variable."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MSGDROP_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(mark, seconds=10):
    """Whether all of them end by themselves."""
    end = time.monotonic() + seconds
    while marked(mark):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_moment(tmp_path, kills):
    source = save(
        tmp_path / "in", **{f"{i:02d}": rng.standard_normal((64, 32, 128)).astype(np.float32) for i in range(20)}
    )
    job(source, tmp_path / "expected", epochs=2)
    expected, moments = files(tmp_path / "expected"), random.Random(kills)
    mark, hit = uuid.uuid4().hex, 0
    for number in range(kills):
        process = subprocess.Popen(
            command(source, tmp_path / "out"), env={**os.environ, "MSGDROP_TEST": mark}, stderr=subprocess.DEVNULL
        )
        until = len(files(tmp_path / "out")) + 1 + moments.randrange(6)
        end = time.monotonic() + (60 if number % 2 else moments.uniform(0.2, 2.5))  # by progress, and by the clock
        while process.poll() is None and len(files(tmp_path / "out")) < until and time.monotonic() < end:
            time.sleep(0.001)
        process.kill()
        hit += process.wait() == -signal.SIGKILL
        assert gone(mark)
        for name, data in files(tmp_path / "out").items():
            assert name == journal.NAME or name.endswith(shards.PARTIAL) or data == expected[name]
        if hit and number % 4 == 3:
            shutil.rmtree(tmp_path / "out")
    assert hit
    done = subprocess.run(command(source, tmp_path / "out"), check=True, capture_output=True, timeout=120)
    assert done.stderr == b""
    assert files(tmp_path / "out") == expected


def test_an_interrupt_ends_all_processes(tmp_path):
    source = save(tmp_path / "in", **{f"{i:02d}": np.ones((64, 32, 128), np.float32) for i in range(40)})
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command(source, tmp_path / "out"),
        env={**os.environ, "MSGDROP_TEST": mark},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and len(files(tmp_path / "out")) < 3:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (1, "Aborted!")
    assert gone(mark)
    assert not list((tmp_path / "out").rglob(f".*{shards.PARTIAL}"))


def test_a_dead_process_of_the_pool_is_an_error(source, tmp_path):
    def kill_one(tasks):
        for number, done in enumerate(apply.local(1)(tasks * 200)):
            if number == 1:
                for child in psutil.Process().children():
                    if "--multiprocessing-fork" in child.cmdline():
                        child.kill()
            yield done

    with pytest.raises(JobError, match="a process of the job died"):
        job(source, tmp_path / "out", engine=kill_one)


def test_one_job_at_a_time(source, tmp_path):
    def meanwhile(tasks):
        done = run("apply", source, tmp_path / "out", "--p", 0.5, "--seed", 7)
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            done.stderr == f"Error: another msgdrop writes to {tmp_path / 'out'}: wait for it, or give another OUTPUT\n"
        )
        return serial(tasks)

    job(source, tmp_path / "out", engine=meanwhile)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="only root may mount a small file system"
)
def test_a_full_disk_is_an_error_that_another_run_heals(tmp_path):
    source = save(tmp_path / "in", a=np.ones((8, 32, 128), np.float32), b=np.ones((8, 32, 128), np.float32))
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", small], check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        done = run("apply", source, small / "out", "--p", 0.5, "--seed", 7, "--jobs", 1)
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            done.stderr == "Error: b.npy, epoch 0: No space left on device; make room and run the same command again\n"
        )
        assert sorted(files(small / "out")) == ["epoch-0/a.npy", journal.NAME]
        subprocess.run(["mount", "-o", "remount,size=1m", small], check=True)
        assert run("apply", source, small / "out", "--p", 0.5, "--seed", 7, "--jobs", 1).returncode == 0
        job(source, tmp_path / "expected")
        assert files(small / "out") == files(tmp_path / "expected")
    finally:
        subprocess.run(["umount", small], check=True)


# What is refused.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"p": 0.25}, "its p is 0.5, not 0.25"),
        ({"seed": 8}, "its seed is 7, not 8"),
        ({"span": 2}, "its span is 1, not 2"),
        ({"epochs": 3}, "its files is 8, not 12"),
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


def test_another_version_is_another_job(source, tmp_path, monkeypatch):
    job(source, tmp_path / "out")
    monkeypatch.setattr(apply, "__version__", "7.7.7")
    with pytest.raises(JobError, match=r"its version is '.*', not '7\.7\.7'"):
        job(source, tmp_path / "out")


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def parquet_file(path, **columns):
    parquet.write_table(pa.table(columns), path)


def twice(path):
    path.write_bytes(path.read_bytes() * 2)


def zipped(path):
    np.savez(path.with_suffix(".npz"), X)
    path.with_suffix(".npz").rename(path)


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


def test_nobody_answers(source, tmp_path):
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "127.0.0.1:99999"):
        result = invoke(
            "apply", source, tmp_path / "out", "--p", 0.5, "--seed", 7, "--engine", "ray", "--ray-address", address
        )
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert f"no Ray answers at {address}" in result.stderr


def test_debug_shows_the_traceback(source, tmp_path):
    result = CliRunner().invoke(main, ["--debug", "apply", str(source), str(source), "--p", "0.5", "--seed", "7"])
    assert isinstance(result.exception, JobError)
    done = run("--debug", "apply", source, source, "--p", 0.5, "--seed", 7)
    assert "Traceback" in done.stderr
    assert done.returncode == 1


# verify


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda out: (out / "epoch-0/a.npy").unlink(), "epoch-0/a.npy is missing"),
        (lambda out: (out / "epoch-0/more.npy").write_bytes(b""), "epoch-0/more.npy is not in the journal"),
        (lambda out: (out / "epoch-0/a.npy").write_bytes(b"short"), "epoch-0/a.npy has changed: 5 bytes"),
        (lambda out: flip(out / "epoch-0/b.npy", -1), "epoch-0/b.npy has changed: 240 bytes"),
        (lambda out: flip(out / "epoch-0/b.npy", 0), "epoch-0/b.npy has changed: 240 bytes"),
        (
            lambda out: (out / "epoch-0/söme/c.npy").write_bytes((out / "epoch-0/a.npy").read_bytes()),
            "epoch-0/söme/c.npy has changed",
        ),
    ],
)
def test_verify(source, tmp_path, damage, said):
    job(source, tmp_path / "out")
    assert apply.verify(tmp_path / "out", lambda count: None) == []
    damage(tmp_path / "out")
    result = invoke("verify", tmp_path / "out")
    assert result.exit_code == 1
    assert said in result.stderr.splitlines()[0]
    assert len(result.stderr.splitlines()) == 2


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def test_verify_of_what_is_not_whole(source, tmp_path):
    with pytest.raises(JobError, match="as planned"):
        job(source, tmp_path / "out", engine=failing(1))
    result = invoke("verify", tmp_path / "out")
    assert (result.exit_code, "1 of 4 files are there: run msgdrop apply again" in result.stderr) == (1, True)
    for other in (tmp_path, tmp_path / "nothing"):
        result = invoke("verify", other)
        assert (result.exit_code, "is no output of msgdrop apply" in result.stderr) == (1, True)
    (tmp_path / journal.NAME).write_text("no JSON\n")
    assert "can't be read as a journal" in invoke("verify", tmp_path).stderr


def test_the_journal_says_what_was_done(source, tmp_path):
    job(source, tmp_path / "out", p=0.25, min_keep=1)
    header, *lines = map(json.loads, (tmp_path / "out" / journal.NAME).read_text().splitlines())
    assert header["contract"] == 1
    assert header["parameters"]["p"] == 0.25
    assert [line["file"] for line in lines] == sorted(line["file"] for line in lines)
    assert {line["file"]: line["bytes"] for line in lines} == {
        name: len(data) for name, data in files(tmp_path / "out", but=(apply.LOCK, journal.NAME)).items()
    }


@pytest.mark.long
def test_memory_stays_small(tmp_path):
    """4 GB of zeros in a sparse file; a job takes less than 300 MB."""
    source = tmp_path / "in"
    source.mkdir()
    np.lib.format.open_memmap(source / "a.npy", "w+", np.float32, (16384, 64, 1024))
    process = psutil.Popen([*command(source, tmp_path / "out")[:-4], "--jobs", "1"])
    peak = 0
    while process.poll() is None:
        for one in (process, *process.children(recursive=True)):
            try:
                status = Path(f"/proc/{one.pid}/status").read_text()
                peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) // 1024)
            except (OSError, IndexError):  # it has just ended
                continue
        time.sleep(0.1)
    assert process.returncode == 0
    assert 50 < peak < 300
