"""DTensors on the ranks of a gloo world: each has the messages, masks and gradients of one process, bit for bit."""

from __future__ import annotations

import pytest
from helpers.world import held

pytestmark = pytest.mark.processes


def test_four_ranks():
    """In one world, since to start one takes seconds: pieces have the masks of the whole; all else of a call."""
    held(
        "on_meshes.some_cases", "on_a_mesh.seeds", "on_a_mesh.communication", "on_a_mesh.different_seeds", "on_a_mesh.refusals",
        "on_a_mesh.targets", "on_a_mesh.gradients", "on_a_mesh.layers", "on_a_mesh.selected", "on_a_mesh.select_more",
        "on_a_mesh.compiled", "on_a_mesh.without_a_group",
    )  # fmt: skip


@pytest.mark.long
def test_every_piece_has_the_masks_of_the_whole():
    held("on_meshes.every_case", limit=500)


@pytest.mark.long
def test_compiled_calls_on_a_mesh():
    held("on_a_mesh.compiled_more", limit=500)


@pytest.mark.long
def test_tensor_parallelism():
    held("in_a_model.in_a_model", "in_a_model.inference")
