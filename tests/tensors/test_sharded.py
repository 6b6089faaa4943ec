"""DTensors on the ranks of a gloo world: each has the messages, masks and gradients of one process, bit for bit."""

from __future__ import annotations

import pytest
from helpers import in_a_model, on_a_mesh, on_meshes, world


def held(module: object, *checks: object, limit: int = 150) -> None:
    """That all checks hold on all ranks, and that each was made on all of them."""
    names = [check.__name__ for check in checks]
    found = world.run(module.__name__, names, limit=limit)
    assert {name: said for name, said in found.items() if isinstance(said, list)} == {}
    assert all(found[name] for name in names)


@pytest.mark.processes
def test_pieces_have_the_masks_of_the_whole():
    held(  # one world for all, which takes seconds to start
        on_a_mesh, on_a_mesh.some_cases, on_a_mesh.seeds, on_a_mesh.communication, on_a_mesh.different_seeds,
        on_a_mesh.refusals, on_a_mesh.targets, on_a_mesh.gradients, on_a_mesh.layers, on_a_mesh.selected,
        on_a_mesh.select_more, on_a_mesh.compiled, on_a_mesh.without_a_group,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.processes
def test_every_piece_has_the_masks_of_the_whole():
    held(on_meshes, on_meshes.every_case, limit=500)


@pytest.mark.long
@pytest.mark.processes
def test_compiled_calls_on_a_mesh():
    held(on_a_mesh, on_a_mesh.compiled_more, limit=500)


@pytest.mark.long
@pytest.mark.processes
def test_tensor_parallelism():
    held(in_a_model, in_a_model.in_a_model, in_a_model.inference)
