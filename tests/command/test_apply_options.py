"""`msgdrop apply` with lengths, scale, fill and keep masks, and with more epochs than an output has."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import internals, oracle
from helpers.jobs import X, files, invoke, job, path_keys, save, serial
from pyarrow import parquet

from msgdrop_numba.command import engines, journal

rng = np.random.default_rng(10)
NAMES = [f"clip {i}" for i in range(10)]
LENGTHS = rng.integers(0, 7, 10)
RAGGED = [row[: 1 + i % 6] for i, row in enumerate(X)]
OF_RAGGED = [int(rng.integers(0, len(row) + 1)) for row in RAGGED]
COLUMNS = ["--columns", "x", "--key", "id"]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "local", lambda jobs: serial)


def apply(source: Any, output: Any, *options: Any) -> str:
    result = invoke("apply", source, output, "--seed", 7, "--jobs", 1, *options)
    assert result.exit_code == 0, result.output
    return result.output


NPY = [
    (["--p", "0.5", "--scale", "--fill", "-1.5"], {"scale": True, "fill": -1.5}),
    (["--p", "0.2,0.9", "--exact", "--scale"], {"p": (0.2, 0.9), "exact": True, "scale": True}),
    (["--p", "0", "--fill", "3"], {"p": 0.0}),
    (["--p", "0.5", "--span", "2", "--prefix", "1", "--fill", "nan"], {"span": 2, "prefix": 1, "fill": np.nan}),
]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "whole"])
def test_npy(tmp_path, lengths):
    """What it writes is the function's, the mask's file the mask's."""
    save(tmp_path / "in", x=X[:4], y=X[4:], **({"lengths": LENGTHS.astype("u1")} if lengths else {}))
    told = {"lengths": LENGTHS} if lengths else {}
    keys = path_keys("x.npy", 4) + path_keys("y.npy", 6)
    for number, (options, rule) in enumerate(NPY):
        out = tmp_path / f"{number}"
        options = [*options, "--mask", *(["--lengths", "lengths.npy"] if lengths else [])]
        assert apply(tmp_path / "in", out, *options) == f"{4 + lengths} files written, {4 + lengths} in {out}\n"
        expected, mask = oracle.dropout(X, seed=7, epoch=0, keys=keys, **told, **rule)
        for first, name in ((0, "x"), (4, "y")):
            got, kept = (np.load(out / f"epoch-0/{file}.npy") for file in (name, f"{name}.keep_mask"))
            assert got.tobytes() == expected[first:][: len(got)].tobytes()
            assert (kept.dtype, kept.tolist()) == (bool, mask[first:][: len(got)].tolist())
        if lengths:
            assert (out / "epoch-0/lengths.npy").read_bytes() == (tmp_path / "in/lengths.npy").read_bytes()
        assert apply(tmp_path / "in", out, *options).split()[0] == "0"  # a fill of NaN is the same fill, too


def test_npy_in_pieces_with_ids_and_lengths_in_two_folders(tmp_path, monkeypatch):
    internals.small_reads(monkeypatch, 100)
    save(tmp_path / "in", a=X[:4], b=X[4:], ids=np.array(NAMES), n=LENGTHS, **{"sub__c": X, "sub__ids": NAMES[::-1], "sub__n": LENGTHS[::-1]})  # fmt: skip
    job(tmp_path / "in", tmp_path / "out", ids="ids.npy", lengths="n.npy", mask=True)
    out = tmp_path / "out/epoch-0"
    forth, back = (oracle.dropout(X, seed=7, epoch=0, keys=NAMES[::way], lengths=LENGTHS[::way]) for way in (1, -1))
    for number, end in enumerate((".npy", ".keep_mask.npy")):
        parts = [np.load(out / f"{name}{end}") for name in "ab"]
        assert np.concatenate(parts).tobytes() == forth[number].tobytes()
        assert np.load(out / f"sub/c{end}").tobytes() == back[number].tobytes()


def test_npy_with_masks_where_messages_are_removed(tmp_path):
    save(tmp_path / "in", x=X)
    job(tmp_path / "in", tmp_path / "out", remove=True, exact=True, scale=True, mask=True)
    expected, mask = oracle.dropout(X, seed=7, epoch=0, keys=path_keys("x.npy", 10), exact=True, scale=True)
    assert np.load(tmp_path / "out/epoch-0/x.npy").tobytes() == expected[mask].tobytes()
    assert np.load(tmp_path / "out/epoch-0/x.keep_mask.npy").tolist() == mask.tolist()


def table() -> pa.Table:
    lists = pa.array([row.tolist() for row in RAGGED], pa.list_(pa.list_(pa.float32())))
    return pa.table({"id": NAMES, "x": lists, "n": pa.array(OF_RAGGED, pa.int16())}, metadata={"kept": "too"})


PARQUET = [
    ({"scale": True, "fill": 2.5}, {"scale": True, "fill": 2.5}),
    ({"lengths": "n"}, {"lengths": np.array(OF_RAGGED)}),
    ({"lengths": "n", "remove": True, "scale": True}, {"lengths": np.array(OF_RAGGED), "scale": True}),
]


@pytest.mark.parametrize(("options", "told"), PARQUET, ids=range(len(PARQUET)))
def test_parquet(tmp_path, options, told):
    (tmp_path / "in").mkdir()
    for name, rows in (("a", table().slice(0, 7)), ("empty", table().slice(0, 0)), ("b", table().slice(7))):
        parquet.write_table(rows, tmp_path / f"in/{name}.parquet", row_group_size=3)
    job(tmp_path / "in", tmp_path / "out", columns=("x",), key="id", mask=True, **options)
    out = pa.concat_tables(parquet.read_table(tmp_path / f"out/epoch-0/{name}.parquet") for name in ("a", "empty", "b"))
    expected, masks = oracle.rows(RAGGED, NAMES, seed=7, epoch=0, **told)
    valid = told.get("lengths", [len(row) for row in RAGGED])
    if "remove" in options:
        expected = [row[:n][mask[:n]] for row, n, mask in zip(expected, valid, masks, strict=True)]
        valid = list(map(len, expected))
    assert [np.array(row, np.float32).tobytes() for row in out["x"].to_pylist()] == [row.tobytes() for row in expected]
    assert out["keep_mask"].to_pylist() == [mask.tolist() for mask in masks]
    assert (out["n"].type, out["n"].to_pylist()) == (pa.int16(), list(valid) if "lengths" in told else OF_RAGGED)
    assert (out.schema.metadata[b"kept"], out["id"].to_pylist()) == (b"too", NAMES)


# More epochs


def test_an_output_goes_on_with_more_epochs(tmp_path):
    save(tmp_path / "in", x=X, y=X[:3], n=np.append(LENGTHS, [1, 2, 3]))
    told = {"lengths": "n.npy", "mask": True}
    assert job(tmp_path / "in", tmp_path / "expected", epochs=5, **told) == 25
    assert job(tmp_path / "in", tmp_path / "out", epochs=3, **told) == 15
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
    assert json.loads((tmp_path / "out" / journal.NAME).read_text().splitlines()[0])["epochs"] == 3
    assert job(tmp_path / "in", tmp_path / "out", epochs=5, **told) == 10
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert job(tmp_path / "in", tmp_path / "out", epochs=5, **told) == 0


# What is refused


BAD = [
    ({}, ["--lengths", "n"], "--lengths n would be a column, which is for Parquet"),
    ({}, ["--lengths", "n.npy"], "x.npy has no n.npy beside it, which --lengths names"),
    ({"n": LENGTHS[:9]}, ["--lengths", "n.npy"], "n.npy has 9 lengths, but the shards beside it have 10 rows"),
    ({"n": LENGTHS * 1.0}, ["--lengths", "n.npy"], "n.npy must hold integers, one a row, but is (10,) float64"),
    ({"n": LENGTHS + 1 - LENGTHS[0] + 6}, ["--lengths", "n.npy"], "n.npy must hold lengths from 0 to 6, a row's mess"),
    ({"n": LENGTHS - 7}, ["--lengths", "n.npy"], "n.npy must hold lengths from 0 to 6, a row's messages, but row 0"),
    ({"n": LENGTHS}, ["--lengths", "n.npy", "--ids", "n.npy"], "--ids and --lengths must name different files"),
    ({"n": LENGTHS}, ["--lengths", "n.npy", "--remove", "--exact"], "give --exact and one number as --p, and no --len"),
    ({"sub__n": LENGTHS, "n": LENGTHS}, ["--lengths", "n.npy"], "n.npy has 10 lengths, but the shards beside it have"),
    ({"x.keep_mask": X}, ["--mask"], "--mask would write x.keep_mask.npy, but there is such a shard"),
    ({}, ["--fill", "1e99"], "x.npy: fill must be a number that float32 can hold, but got 1e+99"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "options", "said"), BAD, ids=range(len(BAD)))
def test_what_npy_refuses(tmp_path, more, options, said):
    save(tmp_path / "in", x=X, **more)
    result = invoke("apply", tmp_path / "in", tmp_path / "out", "--p", 0.5, "--seed", 7, *options)
    assert (result.exit_code, said in result.stderr, result.stderr.count("\n")) == (1, True, 1), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--lengths", "m"], 1, "a.parquet: the file has no column 'm': it has 'id', 'x', 'n', 'keep_mask'"),
        (["--lengths", "id"], 1, "must name different columns"),
        (["--lengths", "keep_mask"], 1, "a.parquet: column 'keep_mask' must hold integers, but has the type double"),
        (["--mask"], 1, "a.parquet: it has a column 'keep_mask' already: rename it, or leave --mask out"),
        (["--fill", "zero"], 2, "must be a number, but got 'zero'"),
        (["--fill", "1", "--remove"], 2, "--fill can't be used with --remove"),
    ],
)
def test_what_parquet_refuses(tmp_path, options, code, said):
    parquet.write_table(table().append_column("keep_mask", pa.array([0.5] * 10)), tmp_path / "a.parquet")
    result = invoke("apply", tmp_path / "a.parquet", tmp_path / "out", "--p", 0.5, "--seed", 7, *COLUMNS, *options)
    assert (result.exit_code, said in result.stderr) == (code, True), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("one_process")
def test_a_length_that_does_not_fit_is_refused(tmp_path):
    parquet.write_table(table().set_column(2, "n", pa.array([9] * 10)), tmp_path / "a.parquet")
    result = invoke(
        "apply",
        tmp_path / "a.parquet",
        tmp_path / "out",
        "--p",
        0.5,
        "--seed",
        7,
        "--jobs",
        1,
        *COLUMNS,
        "--lengths",
        "n",
    )
    assert "a.parquet, epoch 0: column 'x': lengths must be from 0 to 1" in result.stderr
