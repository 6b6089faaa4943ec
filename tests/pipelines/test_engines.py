"""MessageDropoutBatch and `msgdrop apply` on the engines themselves: Ray, Hugging Face datasets, Dask."""

from __future__ import annotations

import os
import signal

import numpy as np
import pyarrow as pa
import pytest
from helpers import clusters
from helpers.jobs import files, job, run
from pyarrow import parquet

from msgdrop_numba import MessageDropoutBatch

ROWS = 24
IDS = [f"clip-{i}" for i in range(ROWS)]
X = np.random.default_rng(2).standard_normal((ROWS, 6, 3)).astype(np.float32)
RAGGED = [X[i, : 1 + i % 6] for i in range(ROWS)]
OPTIONS = {"p": 0.5, "columns": "x", "key": "id", "seed": 7, "min_keep": 1}


def expected(rows):
    """By id, in one batch, without any engine; test_batches.py compares that with naive.py."""
    batch = {"id": IDS, "x": rows}
    return {
        i: np.asarray(row).tobytes() for i, row in zip(IDS, MessageDropoutBatch(**OPTIONS)(batch)["x"], strict=True)
    }


def by_id(records):
    return {record["id"]: rows_of(record["x"]).tobytes() for record in records}


def rows_of(value):
    """Lists of lists come as arrays of arrays, or as lists."""
    return np.stack([np.asarray(row, np.float32) for row in value])


@pytest.fixture(scope="module")
def ray():
    with clusters.connected(num_cpus=2, include_dashboard=False) as started:
        yield started


def killed_once(drop, mark):
    """Ends its process by SIGKILL in the middle of a job, the first time that a batch holds this id."""

    def call(batch):
        if "clip-13" in list(batch["id"]) and not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return drop(batch)

    return call


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
class TestRay:
    def test_tensor_columns(self, ray):
        data = ray.data.from_items([{"id": i, "x": x} for i, x in zip(IDS, X, strict=True)])
        for blocks, size in ((1, None), (5, 4), (24, 1)):
            done = data.repartition(blocks).random_shuffle(seed=blocks)
            done = done.map_batches(MessageDropoutBatch(**OPTIONS), batch_format="numpy", batch_size=size)
            assert by_id(done.take_all()) == expected(X)

    @pytest.mark.parametrize("form", ["numpy", "pandas", "pyarrow"])
    def test_ragged_columns(self, ray, form):
        lists = pa.array([row.tolist() for row in RAGGED], pa.list_(pa.list_(pa.float32())))
        for data in (
            ray.data.from_items([{"id": i, "x": x} for i, x in zip(IDS, RAGGED, strict=True)]),
            ray.data.from_arrow(pa.table({"id": IDS, "x": lists})),
        ):
            done = data.repartition(3).map_batches(MessageDropoutBatch(**OPTIONS), batch_format=form)
            assert by_id(done.take_all()) == expected(RAGGED)

    def test_actors_and_a_killed_worker(self, ray, tmp_path):
        drop = killed_once(MessageDropoutBatch(**OPTIONS), tmp_path / "killed")
        data = ray.data.from_items([{"id": i, "x": x} for i, x in zip(IDS, X, strict=True)], override_num_blocks=12)
        assert by_id(data.map_batches(drop, batch_format="numpy").take_all()) == expected(X)
        assert int((tmp_path / "killed").read_text()) != os.getpid()
        done = data.map_batches(MessageDropoutBatch, fn_constructor_kwargs=OPTIONS, batch_format="numpy", concurrency=2)
        assert by_id(done.take_all()) == expected(X)

    def test_apply(self, ray, tmp_path):
        (tmp_path / "in").mkdir()
        for i in range(4):
            np.save(tmp_path / f"in/{i}.npy", X[6 * i : 6 * i + 6])
        np.save(tmp_path / "in/n.npy", np.arange(24) % len(X[0]))
        told = {"lengths": "n.npy", "scale": True, "fill": -2, "mask": True}
        job(tmp_path / "in", tmp_path / "here", epochs=2, **told)
        job(tmp_path / "in", tmp_path / "there", epochs=1, **told)  # begun here, and gone on with there
        done = run(
            "apply", tmp_path / "in", tmp_path / "there", "--p", 0.5, "--seed", 7, "--epochs", 2, "--engine", "ray",
            "--lengths", "n.npy", "--scale", "--fill", -2, "--mask",
            "--ray-address", ray.get_runtime_context().gcs_address, warnings="ignore",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert files(tmp_path / "here") == files(tmp_path / "there") != {}

    def test_an_error_in_a_task_is_one_line(self, ray, tmp_path):
        (tmp_path / "in").mkdir()
        parquet.write_table(pa.table({"id": ["a", None], "x": [[[1.0]], [[2.0]]]}), tmp_path / "in/a.parquet")
        done = run(
            "apply", tmp_path / "in", tmp_path / "out", "--p", 0.5, "--seed", 7, "--columns", "x", "--key", "id",
            "--engine", "ray", "--ray-address", ray.get_runtime_context().gcs_address, warnings="ignore",
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "Error: a.parquet, epoch 0: column 'id' has 1 nulls: filter those rows out before\n"


@pytest.mark.parametrize("rows", [X, RAGGED], ids=["fixed", "ragged"])
@pytest.mark.filterwarnings("ignore")  # of datasets itself
def test_hugging_face_datasets(rows, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"id": datasets.Value("string"), "x": datasets.Sequence(datasets.Sequence(datasets.Value("float32")))}
    )
    data = datasets.Dataset.from_dict({"id": IDS, "x": [row.tolist() for row in rows]}, features=features)
    drop = MessageDropoutBatch(**OPTIONS)
    for size in (1, 5, 24):
        done = data.with_format("numpy").map(drop, batched=True, batch_size=size)
        assert by_id(done) == expected(rows)
        done = data.with_format("arrow").map(drop, batched=True, batch_size=size)
        assert by_id(done.with_format("numpy")) == expected(rows)
    with pytest.raises(TypeError, match="with_format"):
        data.map(drop, batched=True)
    empty = data.select(range(0)).with_format("numpy")
    assert len(empty.map(drop, batched=True)) == 0


@pytest.mark.filterwarnings("ignore")  # of datasets itself
def test_hugging_face_datasets_in_arrow_format_keep_all_else():
    """Its NumPy format makes float64 float32, and nulls NaN."""
    import datasets

    features = datasets.Features(
        {"id": datasets.Value("int64"), "x": datasets.Array2D((6, 3), "float64"), "f": datasets.Value("float64"),
         "fixed": datasets.Sequence(datasets.Sequence(datasets.Value("float32"), length=3), length=6),
         "n": datasets.Sequence(datasets.Value("int64"))}
    )  # fmt: skip
    x = X.astype(np.float64) + 1e-12
    data = datasets.Dataset.from_dict(
        {"id": list(range(ROWS)), "x": list(x), "f": [0.1] * ROWS, "fixed": X.tolist(), "n": [[1, None]] * ROWS},
        features,
    )
    drop = MessageDropoutBatch(0.5, columns=["x", "fixed"], key="id", seed=7)
    wanted = drop({"id": np.arange(ROWS), "x": x, "fixed": X})
    done = data.with_format("arrow").map(drop, batched=True, batch_size=7).with_format(None)
    assert done.features == data.features
    assert np.array(done["x"]).tobytes() == wanted["x"].tobytes()
    assert np.array(done["fixed"], np.float32).tobytes() == wanted["fixed"].tobytes()
    assert (list(done["f"]), list(done["n"])) == ([0.1] * ROWS, [[1, None]] * ROWS)


def test_dask_delayed():
    from dask import compute, delayed

    drop = MessageDropoutBatch(**OPTIONS)
    parts = [{"id": IDS[i : i + 5], "x": X[i : i + 5]} for i in range(0, ROWS, 5)]
    for part in compute(*(delayed(drop)(part) for part in parts), scheduler="threads"):
        assert {i: x.tobytes() for i, x in zip(part["id"], part["x"], strict=True)}.items() <= expected(X).items()
