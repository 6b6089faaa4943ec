"""Memory for large outputs: used again only when nobody else can see it, bounded, never across a fork."""

from __future__ import annotations

import gc
import os
import threading

import numpy as np
import pytest
import torch
from helpers import internals

from msgdrop_numba import message_dropout, outputs

SHAPE = (16, 16, 256)  # 256 KB of float32


@pytest.fixture(autouse=True)
def _small(reset_outputs, monkeypatch):
    """Everything counts as large."""
    internals.large_outputs(monkeypatch, huge=0, reused=0)


def fresh() -> torch.Tensor:
    return outputs.empty(SHAPE, torch.float32)


def test_memory_of_a_dead_output_is_used_again():
    y = fresh()
    place = y.data_ptr()
    del y
    y = fresh()
    assert y.data_ptr() == place
    assert y.shape == SHAPE
    assert y.is_contiguous()
    assert y.data_ptr() != fresh().data_ptr()


def test_outputs_of_other_sizes_do_not_take_turns():
    """A model with two large outputs uses the memory of both again."""
    shapes = [SHAPE, (8, *SHAPE[1:])]
    places = [{outputs.empty(shape, torch.float32).data_ptr() for shape in shapes} for _ in range(3)]
    assert len(places[0]) == 2
    assert places[0] == places[1] == places[2]


def test_storages_that_were_emptied_do_not_pile_up(monkeypatch):
    internals.large_outputs(monkeypatch, huge=0, reused=1024)
    for _ in range(5):
        fresh().untyped_storage().resize_(0)
    assert len(internals.kept_outputs()) <= 1


def test_shared_memory_of_many_sizes_is_let_go():
    """A worker that sends outputs of ever other sizes would run out of file descriptors."""
    for size in range(1, 200):
        outputs.empty((size, 1024), torch.uint8).share_memory_()
    assert len(internals.kept_outputs()) <= 32


@pytest.mark.parametrize(
    "hold",
    [
        lambda y: y,
        lambda y: y[3:5],
        lambda y: y.detach(),
        lambda y: y.numpy(),
        lambda y: memoryview(y.numpy()),
        lambda y: y.untyped_storage(),
        lambda y: y.view(torch.int32).t() if y.ndim == 2 else y.view(torch.int32),
        lambda y: torch.utils.dlpack.to_dlpack(y),
        lambda y: (y * torch.ones(1, requires_grad=True)).grad_fn,
    ],
    ids=["tensor", "view", "detached", "array", "memoryview", "storage", "dtype view", "dlpack", "saved for backward"],
)
def test_memory_in_use_is_not_used_again(hold):
    y = fresh()
    place = y.data_ptr()
    held = hold(y)
    del y
    gc.collect()
    assert fresh().data_ptr() != place
    del held


def test_the_latest_is_taken_first_and_then_the_oldest():
    """What is freed at once is in the cache yet; a training step frees all, and takes them in their order again."""
    step = [fresh() for _ in range(6)]
    places = [y.data_ptr() for y in step]
    assert len(set(places)) == 6
    step.clear()
    assert [fresh().data_ptr() for _ in range(3)] == [places[-1]] * 3
    step = [fresh() for _ in range(6)]
    assert {y.data_ptr() for y in step} == set(places)


def test_some_that_live_long_do_not_stand_in_the_way():
    held = [fresh() for _ in range(20)]
    for _ in range(10):
        step = [fresh() for _ in range(3)]
        del step
    assert len(internals.kept_outputs()) == 23
    assert held


@pytest.mark.parametrize("first", [True, False])
def test_memory_goes_from_inference_mode_to_training_and_back(first):
    with torch.inference_mode(first):
        place = fresh().data_ptr()
    with torch.inference_mode(not first):
        y = fresh().fill_(2)  # what lay there may be NaN
        assert y.data_ptr() == place
    weight = torch.ones(SHAPE, requires_grad=True)
    (weight * y).sum().backward()  # what is made in inference mode can't be saved for backward
    assert torch.equal(weight.grad, y)


def test_an_output_has_a_version_of_its_own():
    y = fresh()
    y.zero_()
    del y
    y = fresh()
    assert y._version == 0
    assert not y._is_view()
    assert y.is_leaf


@pytest.mark.parametrize("told", [[2, 3], [3]])
def test_memory_that_gets_a_use_between_the_questions_is_not_used_again(monkeypatch, told):
    """Another thread may make a use of a reference, behind the first question and before that for references."""
    place = fresh().data_ptr()
    asked = internals.told_uses(monkeypatch, told)
    held = [fresh()]
    assert held[0].data_ptr() != place
    assert asked == told
    held.append(fresh())
    assert held[1].data_ptr() == place


def test_memory_that_an_array_has_fixed_is_given_up():
    y = fresh()
    y.numpy()
    del y
    assert fresh().resize_(1, 2, 3).shape == (1, 2, 3)


def test_what_was_resized_or_shared_is_given_up():
    for change in (lambda s: s.resize_(8), lambda s: s.share_memory_()):
        y = fresh()
        change(y.untyped_storage())
        del y
        assert fresh().untyped_storage().nbytes() == 4 * 16 * 16 * 256
        assert not fresh().is_shared()


def test_what_is_kept_is_bounded_and_can_be_turned_off(monkeypatch):
    monkeypatch.setattr(outputs, "KEPT_BYTES", 3 * 4 * 16 * 16 * 256)
    held = [fresh() for _ in range(10)]
    assert len(internals.kept_outputs()) == 3
    places = {y.data_ptr() for y in held}
    assert len(places) == 10
    monkeypatch.setattr(outputs, "KEPT_BYTES", 0)
    held.clear()
    fresh()
    assert len(internals.kept_outputs()) == 0


def test_outputs_are_right_while_their_memory_goes_round():
    x = torch.randn(SHAPE)
    want = [message_dropout(x.numpy(), 0.5, seed=seed) for seed in range(5)]
    kept = None
    for _ in range(20):
        for seed in range(5):
            y = message_dropout(x, 0.5, seed=seed)
            assert np.array_equal(y, want[seed])
            if kept is not None:
                assert np.array_equal(kept[1], want[kept[0]])
            kept = (seed, y)


def test_gradients_while_memory_goes_round():
    weight = torch.randn(256, 4, requires_grad=True)
    for seed in range(6):
        x = torch.randn(SHAPE, requires_grad=True)
        hidden = message_dropout(x, 0.5, seed=seed)
        (hidden @ weight).sum().backward()
        keep = (message_dropout(torch.ones(SHAPE), 0.5, seed=seed) != 0)[..., :1]
        torch.testing.assert_close(x.grad, keep * weight.detach().sum(1))
        weight.grad = None


def test_threads_never_get_the_same_memory():
    wrong = []

    def work(value: float) -> None:
        for _ in range(300):
            y = fresh()
            y.fill_(value)
            if not bool((y == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert wrong == []


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system never forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_starts_with_none():
    y = fresh()
    del y
    assert len(internals.kept_outputs()) == 1
    child = os.fork()
    if child == 0:
        os._exit(len(internals.kept_outputs()))
    assert os.waitpid(child, 0)[1] == 0


def test_huge_pages_are_asked_for_whole_ones_inside(monkeypatch):
    asked = internals.watch_advice(monkeypatch, 14)
    page = outputs._PAGE
    outputs.advise(page + 1, 3 * page)
    outputs.advise(page + 1, page)  # holds no whole one
    outputs.advise(page, page)
    assert asked == [(2 * page, 2 * page, 14), (page, page, 14)]
