"""`msgdrop apply --remove`: shorter rows in Parquet, shorter shards of .npy where all rows keep as many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import oracle
from helpers.jobs import X, files, invoke, job, path_keys, save
from pyarrow import parquet

from msgdrop_numba.command.errors import JobError

rng = np.random.default_rng(9)
NAMES = [f"clip {i}" for i in range(10)]
RAGGED = [row[: 1 + i % 6] for i, row in enumerate(X)]
GUARD = [rng.random(len(row)) < 0.3 for row in RAGGED]
WORDS = [[f"{i}-{j}" for j in range(len(row))] for i, row in enumerate(RAGGED)]
COLUMNS = ["--seed", 7, "--jobs", 1, "--columns", "x", "--key", "id", "--remove"]
FIXED = pa.list_(pa.list_(pa.float32(), 3), 6)
TABLE = pa.table(
    {"id": NAMES, "x": pa.array([row.tolist() for row in RAGGED], pa.list_(pa.list_(pa.float32()))),
     "guard": pa.array([row.tolist() for row in GUARD]), "words": pa.array(WORDS)},
    metadata={"kept": "too"},
)  # fmt: skip


def write(folder: Any, table: pa.Table = TABLE) -> Any:
    folder.mkdir()
    parquet.write_table(table.slice(0, 7), folder / "a.parquet", row_group_size=3, compression="zstd")
    parquet.write_table(table.slice(7), folder / "b.parquet")
    return folder


def expected(rows: Any, epoch: int, ids: Any = NAMES, **told: Any) -> tuple[list[bytes], list[Any]]:
    done, masks = oracle.rows(rows, ids, seed=7, epoch=epoch, **told)
    return [row[mask].tobytes() for row, mask in zip(done, masks, strict=True)], masks


CASES = [
    (["--p", "0.5", "--protect", "guard"], {"protect": GUARD}),
    (["--p", "0.2,0.9", "--exact"], {"p": (0.2, 0.9), "exact": True}),
    (["--p", "0.7", "--min-keep", "1", "--prefix", "1"], {"p": 0.7, "min_keep": 1, "prefix": 1}),
]


@pytest.mark.parametrize(("options", "told"), CASES, ids=range(len(CASES)))
def test_parquet(tmp_path, options, told):
    source = write(tmp_path / "in")
    companions = "words" if "protect" in told else "words, guard"
    command = ["apply", source, tmp_path / "out", "--epochs", 2, *COLUMNS, "--companions", companions, *options]
    result = invoke(*command)
    assert (result.exit_code, result.output.split()[0]) == (0, "4"), result.output
    for epoch in range(2):
        kept, masks = expected(RAGGED, epoch, **told)
        parts = [parquet.ParquetFile(tmp_path / f"out/epoch-{epoch}/{name}.parquet") for name in "ab"]
        table = pa.concat_tables([part.read() for part in parts])
        assert table.schema.equals(TABLE.schema, check_metadata=False)
        assert table.schema.metadata[b"kept"] == b"too"
        assert table["id"].to_pylist() == NAMES
        assert [np.array(row, np.float32).tobytes() for row in table["x"].to_pylist()] == kept
        for name, values in (("words", WORDS), ("guard", GUARD)):
            assert table[name].to_pylist() == [
                np.array(v)[mask].tolist() for v, mask in zip(values, masks, strict=True)
            ]
        assert {part.metadata.row_group(0).column(1).compression for part in parts} == {"ZSTD", "SNAPPY"}
    whole = files(tmp_path / "out")
    (tmp_path / "out/epoch-1/a.parquet").unlink()
    assert invoke(*command).output.split()[0] == "1"
    assert files(tmp_path / "out") == whole


@pytest.mark.parametrize("kind", ["fixed", "tensor"])
def test_rows_of_a_fixed_size_become_lists(tmp_path, kind):
    x = pa.FixedShapeTensorArray.from_numpy_ndarray(X) if kind == "tensor" else pa.array(X.tolist(), FIXED)
    job(
        write(tmp_path / "in", pa.table({"id": NAMES, "x": x})), tmp_path / "out", columns=("x",), key="id", remove=True
    )
    table = pa.concat_tables([parquet.read_table(tmp_path / f"out/epoch-0/{name}.parquet") for name in "ab"])
    assert table.schema.field("x").type.equals(pa.list_(pa.list_(pa.float32(), 3)))
    assert [np.array(row, np.float32).tobytes() for row in table["x"].to_pylist()] == expected(X, 0)[0]


NPY = [{"exact": True}, {"p": 0.3, "exact": True, "prefix": 2, "positions": 4}, {"p": 0.0}, {"p": 1.0, "prefix": 1}]


@pytest.mark.parametrize("told", NPY, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ">f8", np.int64])
def test_npy(tmp_path, told, dtype):
    x = X.astype(dtype) * 3
    save(tmp_path / "in", x=x, **{"in__y": x[:0]})
    job(tmp_path / "in", tmp_path / "out", epochs=2, remove=True, **told)
    for epoch in range(2):
        kept, masks = expected(x, epoch, path_keys("x.npy", 10), **told)
        got = np.load(tmp_path / f"out/epoch-{epoch}/x.npy")
        assert (got.dtype, got.shape) == (x.dtype, (10, int(masks[0].sum()), 3))
        assert got.tobytes() == b"".join(kept)
        assert np.load(tmp_path / f"out/epoch-{epoch}/in/y.npy").shape == (0, *got.shape[1:])


def test_npy_in_many_pieces_with_ids(tmp_path, monkeypatch):
    monkeypatch.setattr("msgdrop_numba.command.shards.CHUNK", 200)
    save(tmp_path / "in", a=X[:4], b=X[4:], ids=np.array(NAMES))
    job(tmp_path / "in", tmp_path / "out", ids="ids.npy", remove=True, exact=True)
    kept, _ = expected(X, 0, exact=True)
    got = np.concatenate([np.load(tmp_path / f"out/epoch-0/{name}.npy") for name in "ab"])
    assert got.tobytes() == b"".join(kept)
    assert (tmp_path / "out/epoch-0/ids.npy").read_bytes() == (tmp_path / "in/ids.npy").read_bytes()


def test_an_output_without_removal_is_another_job(tmp_path):
    save(tmp_path / "in", x=X)
    job(tmp_path / "in", tmp_path / "out", exact=True)
    with pytest.raises(JobError, match="its remove is False, not True"):
        job(tmp_path / "in", tmp_path / "out", exact=True, remove=True)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--p", "0.5", "--remove"], 1, "x.npy: --remove of .npy shards needs rows that keep as many messages each"),
        (["--p", "0.2,0.3", "--exact", "--remove"], 1, "give --exact and one number as --p"),
        (["--p", "0.5", "--exact", "--remove", "--companions", "y"], 1, "columns, key and companions are for Parquet"),
        (["--p", "0.5", "--companions", "y"], 2, "--companions needs --remove"),
    ],
)
def test_what_is_not_for_npy(tmp_path, options, code, said):
    save(tmp_path / "in", x=X)
    result = invoke("apply", tmp_path / "in", tmp_path / "out", "--seed", 7, *options)
    assert (result.exit_code, said in result.stderr) == (code, True), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("companions", "said"),
    [
        ("none", "a.parquet: the file has no column 'none'"),
        ("x", "companions must name different columns"),
        ("id", "companions must name different columns"),
        (
            "deep",
            "a.parquet: column 'deep': its messages must hold integers or floating-point numbers, but hold string",
        ),
    ],
)
def test_bad_companions(tmp_path, companions, said):
    table = TABLE.append_column("deep", pa.array([[[word] for word in row] for row in WORDS]))
    result = invoke(
        "apply", write(tmp_path / "in", table), tmp_path / "out", *COLUMNS, "--p", 0.5, "--companions", companions
    )
    assert (result.exit_code, said in result.stderr, result.stderr.count("\n")) == (1, True, 1), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_row_that_does_not_fit_is_named(tmp_path):
    table = TABLE.set_column(3, "words", pa.array([["a"], *WORDS[:-1]]))
    with pytest.raises(
        JobError, match=r"a.parquet, epoch 0: column 'words': row 1 \(key 'clip 1'\) must have 2 values"
    ):
        job(
            write(tmp_path / "in", table),
            tmp_path / "out",
            columns=("x",),
            key="id",
            remove=True,
            companions=("words",),
        )
    assert not list((tmp_path / "out").rglob("*.parquet"))
