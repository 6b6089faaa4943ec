"""`msgdrop apply`: every byte of what it makes, against naive.py."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from helpers import internals, oracle
from helpers.jobs import X, files, job, path_keys, rng, run, save, two_folders
from pyarrow import parquet

from msgdrop_numba.command.errors import JobError


@pytest.fixture
def source(tmp_path):
    return two_folders(tmp_path)


@pytest.mark.parametrize("rule", [{}, {"exact": True}, {"span": 3}, {"min_keep": 4}], ids=str)
def test_shards(tmp_path, monkeypatch, rule):
    internals.small_reads(monkeypatch, 200)  # two rows and a half
    x = rng.standard_normal((7, 9, 2)).astype(np.float32)
    save(tmp_path / "in", **{"deep__er__x": x, "y": x[:1], "z": x[:0]})
    job(tmp_path / "in", tmp_path / "out", epochs=2, **rule)
    for epoch in range(2):
        for name, array in {"deep/er/x": x, "y": x[:1], "z": x[:0]}.items():
            got = np.load(tmp_path / "out" / f"epoch-{epoch}" / f"{name}.npy")
            keys = path_keys(f"{name}.npy", len(array))
            expected, _ = oracle.dropout(array, seed=7, epoch=epoch, keys=keys, **rule)
            assert got.dtype == expected.dtype
            assert got.tobytes() == expected.tobytes()
            assert got.shape == expected.shape


@pytest.mark.parametrize("dtype", ["f2", ">f4", "f8", "c8", "?", "i1", ">u8"])
def test_dtypes(tmp_path, dtype):
    x = rng.integers(0, 2, (4, 6, 3, 2)).astype(dtype)
    save(tmp_path / "in", x=x)
    job(tmp_path / "in", tmp_path / "out")
    got = (tmp_path / "out/epoch-0/x.npy").read_bytes()
    np.save(
        tmp_path / "expected.npy", oracle.dropout(x, seed=7, epoch=0, keys=path_keys("x.npy", 4), message_dims=2)[0]
    )
    assert got == (tmp_path / "expected.npy").read_bytes()


@pytest.mark.parametrize(
    "ids", [np.array([9, -4, 9, 2**40, 5]), np.array(["a", "bé", "c", "d", "a"]), np.arange(5, dtype="u2")], ids=str
)
def test_ids(tmp_path, monkeypatch, ids):
    internals.small_reads(monkeypatch, 100)
    x = rng.standard_normal((5, 4, 2))
    save(tmp_path / "in", a=x[:2], b=x[2:], ids=ids, **{"sub__c": x, "sub__ids": ids[::-1]})
    job(tmp_path / "in", tmp_path / "out", ids="ids.npy")
    out = tmp_path / "out/epoch-0"
    expected, backwards = (oracle.dropout(x, seed=7, epoch=0, keys=keys)[0] for keys in (ids, ids[::-1]))
    assert np.concatenate([np.load(out / "a.npy"), np.load(out / "b.npy")]).tobytes() == expected.tobytes()
    assert np.load(out / "sub/c.npy").tobytes() == backwards.tobytes()
    for name in ("ids.npy", "sub/ids.npy"):
        assert (out / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    with pytest.raises(JobError, match=r"ids\.npy has rows of \(\) .* must be alike"):
        job(tmp_path / "in", tmp_path / "other")  # without --ids they are shards that don't fit


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
    for epoch in range(2):
        path = tmp_path / f"out/epoch-{epoch}/year=1/a.parquet"
        got, before = parquet.read_table(path, partitioning=None), parquet.ParquetFile(tmp_path / "in/year=1/a.parquet")
        assert got.schema.equals(before.schema_arrow, check_metadata=True)
        assert got.schema.metadata == {b"made": b"by hand"}
        assert got.drop_columns("x").equals(table.drop_columns("x"))
        for row, value in enumerate(table["x"].combine_chunks().to_pylist()):
            x = np.array(value, np.float32).reshape(1, -1, 3)
            expected, _ = oracle.dropout(x, seed=7, epoch=epoch, keys=NAMES[row : row + 1], min_keep=1)
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
    assert (
        np.load(tmp_path / "two/epoch-0/b.npy").tobytes()
        == oracle.dropout(X, seed=7, epoch=0, keys=path_keys("b.npy", 10))[0].tobytes()
    )


def test_links_are_what_they_are_called(tmp_path):
    """As caches of downloads lay them out: names that link to blobs without a suffix."""
    blobs = tmp_path / "blobs"
    parquet_path, source = tmp_path / "table", tmp_path / "in"
    for folder in (blobs, parquet_path, source):
        folder.mkdir()
    np.save(blobs / "ids.npy", X)
    np.save(blobs / "b.npy", np.arange(10))
    parquet.write_table(pa.table({"id": NAMES, "x": LISTS}), blobs / "c")
    for link, blob in ((source / "a.npy", "ids.npy"), (source / "ids.npy", "b.npy"), (parquet_path / "a.parquet", "c")):
        link.symlink_to(blobs / blob)
    job(source, tmp_path / "out", ids="ids.npy")
    assert (
        np.load(tmp_path / "out/epoch-0/a.npy").tobytes()
        == oracle.dropout(X, seed=7, epoch=0, keys=range(10))[0].tobytes()
    )
    assert np.load(tmp_path / "out/epoch-0/ids.npy").tolist() == list(range(10))
    job(parquet_path, tmp_path / "out2", columns=("x",), key="id")
    assert parquet.read_table(tmp_path / "out2/epoch-0/a.parquet").num_rows == 10


def test_what_is_left_out(source, tmp_path):
    for name in ("notes.txt", "._a.npy", "_part.npy", ".hidden/x.npy", "_temporary/x.npy"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"no array")
    assert job(source, tmp_path / "out") == 4
    assert sorted(files(tmp_path / "out/epoch-0")) == ["a.npy", "b.npy", "söme/c.npy", "söme/d.npy"]


@pytest.mark.processes
def test_processes_give_the_same_bytes(source, tmp_path):
    job(source, tmp_path / "expected", epochs=3, mask=True)
    for jobs in (1, 2):
        done = run(
            "apply", source, tmp_path / f"{jobs}", "--p", 0.5, "--seed", 7, "--epochs", 3, "--jobs", jobs, "--mask"
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"24 files written, 24 in {tmp_path / str(jobs)}\n"
        assert files(tmp_path / f"{jobs}") == files(tmp_path / "expected")
    done = run("apply", source, tmp_path / "1", "--p", 0.5, "--seed", 7, "--epochs", 3, "--mask")
    assert (done.returncode, done.stdout.split()[0]) == (0, "0")
    done = run("verify", tmp_path / "2")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / '2'} is as its journal says\n", "")


@pytest.mark.processes
def test_torch_is_not_imported(source, tmp_path):
    code = f"""
import sys
from pathlib import Path
from msgdrop_numba.command import apply
from msgdrop_numba.command import cli
from msgdrop_numba.command import inputs
from msgdrop_numba.command import shards
from msgdrop_numba.call.rule import Rule
settings = shards.Settings(0.5, 7, Rule(0.5), None, None, None)
source, output = Path({str(source)!r}), Path({str(tmp_path / "out")!r})
serial = lambda tasks: ((task, shards.run(task)) for task in tasks)
apply.make(source, inputs.find(source, settings), output, settings, 1, serial, print)
assert not {{"torch", "ray", "pyarrow"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.processes
@pytest.mark.long
def test_memory_stays_small(tmp_path):
    """4 GB of zeros in a sparse file; a job takes less than 300 MB."""
    source = tmp_path / "in"
    source.mkdir()
    np.lib.format.open_memmap(source / "a.npy", "w+", np.float32, (16384, 64, 1024))
    command = ["apply", source, tmp_path / "out", "--p", 0.5, "--seed", 7, "--jobs", 1]
    process = psutil.Popen([sys.executable, "-m", "msgdrop_numba", *map(str, command)])
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
