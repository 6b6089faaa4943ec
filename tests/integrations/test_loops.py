"""Epochs in training loops that few install, or that tell nobody: with `-m long`, each skips itself without its library."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
from helpers import clusters, loops
from helpers.epochs import each_rank
from helpers.frameworks import on_ranks

pytestmark = [pytest.mark.long, pytest.mark.processes, pytest.mark.filterwarnings("ignore")]  # their own


@pytest.fixture(autouse=True)
def _installed(request):
    """Looked for, not imported: some change torch for a whole process."""
    names = {"timm": "timm", "speechbrain": "speechbrain", "composer": "mosaicml", "streaming": "mosaicml-streaming"}
    for name, package in {**names, "ray": "ray[train]"}.items():
        if f"test_{name}" in request.node.name and importlib.util.find_spec(name) is None:
            pytest.skip(f'needs {name}: pip install "{package}"')


def test_timm(tmp_path):
    each_rank(on_ranks(loops.timm, tmp_path))


def test_speechbrain(tmp_path):
    each_rank(on_ranks(loops.speechbrain, tmp_path), first=1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_composer(tmp_path, ranks):
    each_rank(on_ranks(loops.composer, tmp_path, ranks), ranks)


def test_streaming(tmp_path):
    each_rank(on_ranks(loops.streaming, tmp_path))


@pytest.mark.ray
@pytest.mark.parametrize("sampler", [False, True])
def test_ray_train(tmp_path, sampler):
    """Of a loader without a DistributedSampler it makes a new one, which has one, and no persistent workers."""
    there = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    with clusters.connected(num_cpus=4, include_dashboard=False, runtime_env=there):
        each_rank(loops.ray(tmp_path, sampler))
