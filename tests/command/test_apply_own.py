"""`msgdrop apply` with ranges of p, a prefix, positions, and columns that say what each row has of its own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import oracle
from helpers.jobs import X, files, invoke, job, path_keys, run, save
from pyarrow import parquet

from msgdrop_numba.command import journal
from msgdrop_numba.command.errors import JobError

rng = np.random.default_rng(8)
NAMES = [f"clip {i}" for i in range(10)]
RAGGED = [row[: 1 + i % 6] for i, row in enumerate(X)]
GUARD = [rng.random(len(row)) < 0.3 for row in RAGGED]
PLACES = [rng.integers(0, 9, len(row)) for row in RAGGED]
P = [0.0, 1.0, 0.5, 0.9, 0.25, 0.7, 0.4, 0.6, 0.1, 0.3]
COLUMNS = ["--columns", "x", "--key", "id"]


def lists(rows: Any, kind: Any) -> pa.Array:
    return pa.array([np.asarray(row).tolist() for row in rows], pa.list_(kind))


TABLE = pa.table(
    {"id": NAMES, "x": lists(RAGGED, pa.list_(pa.float32())), "guard": lists(GUARD, pa.bool_()),
     "at": lists(PLACES, pa.int32()), "much": P}
)  # fmt: skip


def write(folder: Any, table: pa.Table = TABLE) -> Any:
    folder.mkdir()
    parquet.write_table(table.slice(0, 7), folder / "a.parquet", row_group_size=3)
    parquet.write_table(table.slice(7), folder / "b.parquet")
    return folder


def dropped(folder: Any) -> list[bytes]:
    table = pa.concat_tables([parquet.ParquetFile(folder / f"{name}.parquet").read() for name in "ab"])
    assert table.drop_columns("x").equals(TABLE.drop_columns("x"))
    return [np.array(row, np.float32).tobytes() for row in table["x"].to_pylist()]


CASES = [
    (["--p", "much", "--protect", "guard", "--positions", "at"], {"p": P, "protect": GUARD, "positions": PLACES}),
    (["--p", "0.2,0.9", "--protect", "guard", "--exact"], {"p": (0.2, 0.9), "protect": GUARD, "exact": True}),
    (["--p", "0.5", "--positions", "7", "--span", "2", "--prefix", "2"], {"positions": 7, "span": 2, "prefix": 2}),
    (["--p", "0.5", "--prefix", "9"], {"prefix": 9}),
]


@pytest.mark.parametrize(("options", "told"), CASES, ids=range(len(CASES)))
def test_parquet(tmp_path, options, told):
    source = write(tmp_path / "in")
    command = ["apply", source, tmp_path / "out", "--seed", 7, "--epochs", 2, "--jobs", 1, *COLUMNS, *options]
    result = invoke(*command)
    assert (result.exit_code, result.output.split()[0]) == (0, "4"), result.output
    for epoch in range(2):
        done, _ = oracle.rows(RAGGED, NAMES, seed=7, epoch=epoch, **told)
        assert dropped(tmp_path / f"out/epoch-{epoch}") == [row.tobytes() for row in done]
    whole = files(tmp_path / "out")
    (tmp_path / "out/epoch-1/a.parquet").unlink()
    again = invoke(*command)
    assert (again.exit_code, again.output.split()[0]) == (0, "1"), again.output
    assert files(tmp_path / "out") == whole


def test_npy(tmp_path):
    save(tmp_path / "in", x=X)
    keys = path_keys("x.npy", 10)
    for number, told in enumerate(
        (
            {"p": (0.2, 0.9)},
            {"prefix": 2, "exact": True},
            {"positions": 2**34 - 6},
            {"positions": 3, "span": 2, "p": (0.0, 1.0)},
        )
    ):
        job(tmp_path / "in", tmp_path / f"{number}", epochs=2, **told)
        for epoch in range(2):
            expected, _ = oracle.dropout(X, seed=7, epoch=epoch, keys=keys, **told)
            assert np.load(tmp_path / f"{number}/epoch-{epoch}/x.npy").tobytes() == expected.tobytes()


@pytest.mark.processes
def test_the_same_command_again(tmp_path):
    """A range becomes a list in the journal, and is the same range all the same."""
    save(tmp_path / "in", x=X)
    command = [
        "apply",
        tmp_path / "in",
        tmp_path / "out",
        "--p",
        "0.2,0.9",
        "--seed",
        7,
        "--prefix",
        2,
        "--positions",
        3,
    ]
    assert run(*command).stdout.split()[0] == "1"
    header = json.loads((tmp_path / "out" / journal.NAME).read_text().splitlines()[0])
    assert header["contract"] == "1.1"
    assert header["parameters"] == {
        "p": [0.2, 0.9], "seed": 7, "exact": False, "span": 1, "min_keep": 0, "prefix": 2, "columns": None, "key": None,
        "ids": None, "lengths": None, "protect": None, "positions": 3, "remove": False, "companions": None,
        "scale": False, "fill": None, "mask": False,
    }  # fmt: skip
    assert (header["epochs"], header["files"]) == (1, 1)
    again = run(*command)
    assert (again.stdout.split()[0], again.stderr) == ("0", "")
    expected, _ = oracle.dropout(X, (0.2, 0.9), seed=7, epoch=0, keys=path_keys("x.npy", 10), prefix=2, positions=3)
    assert np.load(tmp_path / "out/epoch-0/x.npy").tobytes() == expected.tobytes()
    with pytest.raises(JobError, match=r"its p is \[0.2, 0.9\], not 0.5"):
        job(tmp_path / "in", tmp_path / "out", prefix=2, positions=3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--p", "much"], "--p much would be a column, which is for Parquet"),
        (["--p", "0.5", "--protect", "guard"], "--protect guard would be a column, which is for Parquet"),
        (["--p", "0.5", "--positions", "at"], "--positions at would be a column, which is for Parquet"),
        (["--p", "0.5", "--positions", 2**34 - 5], "x.npy: positions must be from 0 to 2**34 - 1"),
        (["--p", "0.5", "--prefix", "7"], "x.npy: prefix must be at most 6, the messages of a row, but got 7"),
    ],
)
def test_what_is_not_for_npy(tmp_path, options, said):
    save(tmp_path / "in", x=X)
    result = invoke("apply", tmp_path / "in", tmp_path / "out", "--seed", 7, *options)
    assert (result.exit_code, said in result.stderr, result.stderr.count("\n")) == (1, True, 1), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--p", "none"], "a.parquet: the file has no column 'none': it has 'id', 'x', 'guard', 'at', 'much'"),
        (["--p", "id"], "columns, key, lengths, p, protect and positions must name different columns"),
        (["--p", "guard"], "a.parquet: column 'guard' must hold numbers, but has the type list<"),
        (["--p", "0.5", "--protect", "at"], "a.parquet: column 'at': it must hold lists of bools"),
        (["--p", "0.5", "--positions", "guard"], "a.parquet: column 'guard': it must hold lists of integers"),
    ],
)
def test_bad_columns(tmp_path, options, said):
    result = invoke("apply", write(tmp_path / "in"), tmp_path / "out", "--seed", 7, *COLUMNS, *options)
    assert (result.exit_code, said in result.stderr, result.stderr.count("\n")) == (1, True, 1), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_row_that_does_not_fit_is_named(tmp_path):
    short = [GUARD[0], *GUARD[:-1]]
    table = TABLE.set_column(2, "guard", lists(short, pa.bool_()))
    with pytest.raises(
        JobError, match=r"a.parquet, epoch 0: column 'x': column 'guard' of row 1 \(key 'clip 1'\): protect"
    ):
        job(write(tmp_path / "in", table), tmp_path / "out", columns=("x",), key="id", protect="guard")
    assert not list((tmp_path / "out").rglob("*.parquet"))
