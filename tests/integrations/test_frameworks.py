"""Epochs that arrive by themselves in frameworks that take long to install or start: with `-m long` and [integrations]."""

from __future__ import annotations

import pytest
from helpers import frameworks
from helpers.epochs import STEPS, each_rank

from msgdrop_numba.pipelines.datasets import KeyedDataset

pytestmark = [
    pytest.mark.long,
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore"),  # their own
    pytest.mark.filterwarnings("error:.*comes again"),
]


@pytest.fixture(autouse=True)
def _installed(request):
    frameworks.mend_vision()
    for name in ("accelerate", "transformers", "lightning"):
        if name in request.node.name:
            pytest.importorskip(
                name, reason=f'needs {name}: pip install "msgdrop_numba[integrations]"', exc_type=ModuleNotFoundError
            )


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize(("sampler", "seedable"), [(True, True), (True, False), (False, False)])
def test_accelerate(tmp_path, sampler, seedable, dispatch):
    told = {"sampler": sampler, "seedable": seedable, "dispatch": dispatch}
    each_rank(frameworks.on_ranks(frameworks.accelerate, tmp_path, **told), whole=range(3) if sampler else (0, 2))


def test_transformers(tmp_path):
    each_rank(frameworks.on_ranks(frameworks.transformers, tmp_path, callback=True))


@pytest.mark.parametrize("callback", [False, True])
def test_transformers_on_one_process(tmp_path, callback):
    """Without the callback a run must not be resumed: the Trainer tells the loader's dataset then no more."""
    seen = frameworks.transformers(tmp_path, ranks=1, callback=callback, resumes=callback)
    each_rank([seen], ranks=1)


@pytest.mark.parametrize("sampler", [True, False])
def test_lightning(tmp_path, sampler):
    """Its resumed loader begins anew, and so gives some samples of the second epoch twice."""
    told = {"sampler": sampler, "callback": True, "left": STEPS // 2 + 1}
    each_rank(frameworks.on_ranks(frameworks.lightning, tmp_path, **told), whole=(0, 2))


def test_lightning_on_one_process(tmp_path):
    told = {"ranks": 1, "sampler": True, "callback": False, "left": 0}
    each_rank([frameworks.lightning(tmp_path, resumes=False, **told)], ranks=1)


@pytest.mark.parametrize("left", [STEPS - 1, STEPS, STEPS + 1, 2 * STEPS])
def test_lightning_resumed_at_the_edge_of_an_epoch(tmp_path, left):
    told = {"ranks": 1, "sampler": False, "callback": True, "left": left}
    each_rank([frameworks.lightning(tmp_path, **told)], ranks=1, whole=[2])


@pytest.mark.parametrize("sampler", [True, False])
def test_fabric_of_lightning(tmp_path, sampler):
    each_rank(frameworks.on_ranks(frameworks.fabric, tmp_path, sampler=sampler), whole=range(3) if sampler else (0, 2))


def test_lightning_callback_without_a_keyed_dataset():
    from msgdrop_numba.integrations.lightning import EpochCallback

    with pytest.raises(TypeError, match=r"dataset must be a KeyedDataset, or hold one, but got list: wrap"):
        EpochCallback([1])
    assert EpochCallback(KeyedDataset([1]))


def test_transformers_callback_without_a_keyed_dataset():
    from msgdrop_numba.integrations.transformers import EpochCallback

    with pytest.raises(ValueError, match="EpochCallback found no KeyedDataset to tell"):
        EpochCallback().on_train_begin(None, None, None, train_dataloader=[1])
