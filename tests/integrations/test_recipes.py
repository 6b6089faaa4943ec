"""INTEGRATIONS.md: its blocks run, in one process, and its table of shapes says what is so."""

from __future__ import annotations

import ast
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import msgdrop_numba
from msgdrop_numba import message_dropout

TEXT = (Path(msgdrop_numba.__file__).parent / "INTEGRATIONS.md").read_text()
# Each block, by the bold words before it.
RECIPES = re.findall(
    r"^\*\*([^*]+)\*\*(?:(?!```)[^`]|`[^`]+`)*```python\n(.*?)```", TEXT, flags=re.DOTALL | re.MULTILINE
)
SHAPES = re.findall(r"^\| (\([A-Z], .*?\))[^|]*\| ([^|]+) \|[^|]*\|[^|]*\| (\(.*?\)) \|$", TEXT, flags=re.MULTILINE)
SIZES = {"B": 2, "S": 5, "F": 3, "D": 4, "T": 6, "E": 7, "H": 8, "W": 9, "N": 10, "M": 11}


def test_every_block_is_a_recipe():
    assert len(RECIPES) == TEXT.count("```python") > 5
    assert len(SHAPES) == 10


@pytest.mark.parametrize(("name", "block"), RECIPES, ids=[name for name, _ in RECIPES])
def test_recipes(name, block):
    for module in re.findall(r"^(?:import|from) (\w+)", block, flags=re.MULTILINE):
        if find_spec(module) is None:
            pytest.skip(f"the block imports {module}, which isn't installed")
    assert "assert " in block
    exec(compile(block, name, "exec"), {})


@pytest.mark.parametrize(("shape", "dims", "mask"), SHAPES, ids=[f"{shape} {dims}" for shape, dims, _ in SHAPES])
def test_shapes(shape, dims, mask):
    sizes, want = (tuple(SIZES[letter] for letter in re.findall("[A-Z]", told)) for told in (shape, mask))
    _, keep = message_dropout(np.ones(sizes), 0.5, message_dims=ast.literal_eval(dims), return_mask=True)
    assert keep.shape == want


def test_versions_are_those_that_are_tested():
    """What the table of seams says of a library is what the tests of it run with, where it is installed."""
    said = dict(
        re.findall(
            r"^\| (timm|transformers|torch_geometric|lhotse|TorchRL)\b.*\| ([\d.]+) \|$", TEXT, flags=re.MULTILINE
        )
    )
    assert set(said) == {"timm", "transformers", "torch_geometric", "lhotse", "TorchRL"}
    for name, version in said.items():
        if find_spec(name.lower()) is not None:
            installed = metadata.version(name.lower()).split("+")[0]
            assert installed.split(".")[0] == version.split(".")[0], (
                f"{name} {installed}: run the long tests, then say so"
            )
