"""Ray on a cluster of three nodes on this machine, of one CPU each: what comes of it is what one process makes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow as pa
import pytest
from helpers import clusters, oracle
from helpers.jobs import files, lines, rng, run, save
from pyarrow import parquet

from msgdrop_numba import MessageDropoutBatch

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray's own

ROWS, NODES = 24, 3
IDS = [f"clip-{i}" for i in range(ROWS)]
RAGGED = [rng.standard_normal((1 + i % 6, 3)).astype(np.float32) for i in range(ROWS)]
FIXED = rng.standard_normal((ROWS, 6, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def cluster():
    with clusters.cluster(NODES) as started:
        yield started


@pytest.fixture(scope="module")
def ray(cluster):
    with clusters.connected(cluster.address) as connected:
        yield connected


# Ray Data and Ray Train


def meeting(drop, folder, nodes):
    """A drop whose first calls wait for each other, until so many nodes are at work."""

    def call(batch):
        import ray

        (folder / ray.get_runtime_context().get_node_id()).touch()
        end = time.monotonic() + 120
        while len(list(folder.iterdir())) < nodes:
            assert time.monotonic() < end, "the other nodes got no work"
            time.sleep(0.01)
        return drop(batch)

    return call


@pytest.mark.parametrize("remove", [False, True], ids=["zeroed", "removed"])
@pytest.mark.parametrize("form", ["numpy", "pandas", "pyarrow"])
@pytest.mark.parametrize("rows", [FIXED, RAGGED], ids=["fixed", "ragged"])
def test_ray_data(ray, tmp_path, rows, form, remove):
    zeroed, masks = oracle.rows(rows, IDS, 0.8, seed=7, epoch=3)
    assert not all(mask.any() for mask in masks)  # some rows keep nothing
    wanted = [row[mask] for row, mask in zip(rows, masks, strict=True)] if remove else zeroed
    drop = MessageDropoutBatch(0.8, columns="x", key="id", seed=7, epoch=3, remove=remove)
    lists = pa.array([row.tolist() for row in rows], pa.list_(pa.list_(pa.float32())))
    given = ray.data.from_items([{"id": i, "x": x} for i, x in zip(IDS, rows, strict=True)])
    for number, (data, blocks, size) in enumerate(
        [(given, 1, None), (given, 5, 4), (ray.data.from_arrow(pa.table({"id": IDS, "x": lists})), 24, 1)]
    ):
        (tmp_path / str(number)).mkdir()
        met = meeting(drop, tmp_path / str(number), min(blocks, NODES))
        data = data.repartition(blocks).random_shuffle(seed=number)
        done = data.map_batches(met, batch_format=form, batch_size=size).take_all()
        got = {row["id"]: b"".join(np.asarray(message, np.float32).tobytes() for message in row["x"]) for row in done}
        assert got == {i: row.tobytes() for i, row in zip(IDS, wanted, strict=True)}


RATE, EPOCHS = 2.0**-8, 2
INTEGERS = rng.integers(-1, 2, (ROWS, 6, 3)).astype(np.float32)
WEIGHT = rng.integers(-2, 3, (2, 3)).astype(np.float32)


def training(folder):
    """What each worker runs: steps on all of its rows, and a file of what came of them."""
    rate, epochs, weight = RATE, EPOCHS, WEIGHT

    def train():
        import ray.train.torch
        import torch

        from msgdrop_numba import MessageDropout, fold_in

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.drop, self.linear = MessageDropout(0.5), torch.nn.Linear(3, 2, bias=False)
                self.linear.weight.data = torch.tensor(weight)

            def forward(self, x, ids, seed):
                y = self.drop(x, keys=ids, seed=seed)
                return y, self.linear(y)

        context, model = ray.train.get_context(), ray.train.torch.prepare_model(Net())
        optimizer = torch.optim.SGD(model.parameters(), rate)
        told = {"node": ray.get_runtime_context().get_node_id(), "model": type(model).__name__}
        for epoch in range(epochs):
            (batch,) = ray.train.get_dataset_shard("train").iter_torch_batches(batch_size=1000)
            x = batch["x"].requires_grad_()
            y, out = model(x, batch["id"], fold_in(7, epoch))
            loss = out.square().sum() * context.get_world_size()  # the workers' gradients are averaged
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gradient = x.grad / context.get_world_size()
            arrays = {"id": batch["id"], "y": y.detach(), "gradient": gradient, "weight": next(model.parameters()).data}
            told.update({f"{name} {epoch}": array.numpy().copy() for name, array in arrays.items()})
        np.savez(folder / f"{context.get_world_rank()}.npz", **told)

    return train


def test_ray_train(ray, tmp_path):
    """Of small integers and powers of two, all sums are exact, in whatever order: weights are equal, too."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        training(tmp_path),
        scaling_config=ScalingConfig(num_workers=2, placement_strategy="STRICT_SPREAD"),
        run_config=RunConfig(storage_path=str(tmp_path / "ray"), name="run"),
        datasets={"train": ray.data.from_items([{"id": i, "x": x} for i, x in enumerate(INTEGERS)])},
    ).fit()
    told = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    assert len({str(of_rank["node"]) for of_rank in told}) == 2
    assert {str(of_rank["model"]) for of_rank in told} == {"DistributedDataParallel"}
    weight, masks = WEIGHT.astype(np.float64), []
    for epoch in range(EPOCHS):
        y, keep = oracle.dropout(INTEGERS, seed=7, epoch=epoch, keys=np.arange(ROWS))
        out = 2 * y.astype(np.float64) @ weight.T
        gradient = np.where(keep[..., None], out @ weight, 0)
        weight = weight - RATE * np.einsum("bso,bsi->oi", out, y)
        assert np.array_equal(weight, weight.astype(np.float32))
        ids = [of_rank[f"id {epoch}"] for of_rank in told]
        assert sorted(np.concatenate(ids)) == list(range(ROWS))
        assert min(map(len, ids)) > 0
        for of_rank, own in zip(told, ids, strict=True):
            assert of_rank[f"y {epoch}"].tobytes() == y[own].tobytes()
            assert np.array_equal(of_rank[f"gradient {epoch}"], gradient[own])
            assert np.array_equal(of_rank[f"weight {epoch}"], weight)
        masks.append(keep)
    assert not np.array_equal(*masks)


# msgdrop apply


@pytest.fixture(scope="module", params=["npy", "parquet"])
def made(request, tmp_path_factory):
    """A folder with an input, the options for it, and what comes of it here."""
    folder, options = tmp_path_factory.mktemp(request.param), ["--p", "0.5", "--seed", "7", "--epochs", "2"]
    if request.param == "npy":
        save(folder / "in", **{f"{i:02d}": rng.standard_normal((64, 64, 512)).astype(np.float32) for i in range(16)})
    else:
        options += ["--columns", "x", "--key", "id", "--remove"]
        (folder / "in").mkdir()
        for i in range(12):
            x = pa.FixedShapeTensorArray.from_numpy_ndarray(rng.standard_normal((256, 32, 64)).astype(np.float32))
            table = pa.table({"id": [f"{i}-{row}" for row in range(256)], "x": x})
            parquet.write_table(table, folder / f"in/{i:02d}.parquet", row_group_size=100)
    done = run("apply", "in", "here", *options, "--jobs", 1, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, options, files(folder / "here")


def command(cluster, options, output):
    return ["apply", "in", output, *options, "--engine", "ray", "--ray-address", cluster.address]


def whole(done, output, expected):
    """The job has ended well, and said so; Ray may tell of nodes that died before."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f" files written, {len(expected) - 1} in {output.name}\n")
    assert done.stdout.count("\n") == 1
    assert files(output) == expected


def processes(node):
    """A node's process of Ray's, and those of tasks."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return raylet, raylet.children()


def killed(cluster, options, folder, output, **environment):
    """What a command says whose node dies, all at once, in the middle of a task."""
    process = subprocess.Popen(
        [sys.executable, "-m", "msgdrop_numba", *command(cluster, options, output)], text=True, cwd=folder,
        env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    node = next(iter(cluster.worker_nodes), cluster.head_node)
    while process.poll() is None:
        raylet, workers = processes(node)
        if lines(folder / output) > 3 and any("".join(worker.cmdline()).startswith("ray::run") for worker in workers):
            break
    assert process.poll() is None, process.communicate()
    for dying in (raylet, *workers):
        dying.kill()
    cluster.remove_node(node, allow_graceful=False)
    if cluster.head_node is not None:
        cluster.add_node(**clusters.NODE)
    said, warned = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, said, warned)


def test_apply(cluster, made):
    folder, options, expected = made
    done = run(*command(cluster, options, "there"), cwd=folder, warnings="ignore")
    whole(done, folder / "there", expected)


def test_a_node_killed_in_mid_job(cluster, made):
    folder, options, expected = made
    done = killed(cluster, options, folder, "killed")
    whole(done, folder / "killed", expected)
    assert "Task run failed" in done.stderr  # the node died with a task


def test_a_node_killed_and_nothing_tried_again(cluster, made):
    folder, options, expected = made
    done = killed(cluster, options, folder, "ended", RAY_TASK_MAX_RETRIES="0")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Error: Ray gave a task up: run the same command again (" in done.stderr
    assert len(files(folder / "ended")) < len(expected)
    whole(run(*command(cluster, options, "ended"), cwd=folder, warnings="ignore"), folder / "ended", expected)


def test_a_cluster_that_dies_in_mid_job(made):
    """Ray waits for its head for a minute, here for 5 s, and ends the process."""
    folder, options, expected = made
    with clusters.cluster(1) as alone:
        done = killed(alone, options, folder, "alone", RAY_gcs_rpc_server_reconnect_timeout_s="5")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Failed to connect to GCS within 5 seconds" in done.stderr
    whole(run("apply", "in", "alone", *options, "--jobs", 1, cwd=folder), folder / "alone", expected)
