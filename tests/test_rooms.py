"""The rooms of the package, and what must never be: imports point down, and private names stand in one file."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import msgdrop_numba

PACKAGE = Path(msgdrop_numba.__file__).parent
NAME = "msgdrop_numba"

# Each room, and the rooms that it may import from; what isn't here may import from none.
BELOW = {
    "call": {"kernels"},
    "arrays": {"call", "kernels", "outputs"},
    "tensors": {"call", "kernels", "outputs", "torch_private"},
    "functional": {"arrays", "call", "kernels", "tensors"},
    "select": {"arrays", "call", "functional", "tensors"},
    "nn": {"call", "functional", "select", "tensors"},
    "subset": {"call", "nn", "select"},
    "pipelines": {"call", "functional", "kernels", "outputs", "select", "tensors", "torch_private"},
    "__init__": {"call", "functional", "nn", "pipelines", "select", "subset", "version"},
    "integrations": {"call", "functional", "nn", "pipelines", "select", "tensors", "torch_private"},
    "command": {"__init__", "arrays", "call", "functional", "pipelines", "select", "tensors", "version"},
    "__main__": {"command"},
}  # fmt: skip
WITHOUT_TORCH = {"kernels", "call", "arrays", "outputs", "version"}
PRIVATE_FILE = "torch_private"
PRIVATE = {
    "_C", "_functorch", "_new_shared", "_is_view", "_base", "_ragged_idx", "_current_level",
    "_dispatch_keys", "_subclasses", "_is_exporting_flag",
}  # fmt: skip


def sources() -> dict[str, str]:
    """The text of every module, by its name below the package."""
    files = {p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): p for p in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__") if "." in name else name: p.read_text() for name, p in files.items()}


@cache
def nodes(text: str) -> list[ast.AST]:
    """All nodes of a module; most texts are the same in every test."""
    return list(ast.walk(ast.parse(text)))


def imported(text: str, modules: set[str]) -> Iterator[tuple[str, bool]]:
    """Each name that a module imports, ours below the package, and whether it is one of ours."""
    for node in nodes(text):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != NAME:
                yield name, False
            else:  # the module itself, or the one that has the name; the package, where none has
                found = [m for m in (rest, rest.rpartition(".")[0]) if m in modules]
                yield found[0] if found else "__init__", True


def wrong(modules: dict[str, str]) -> list[str]:
    """What must never be, in words."""
    found, names = [], set(modules)
    graph: dict[str, set[str]] = {}
    for module, text in modules.items():
        room = module.partition(".")[0]
        graph[module] = set()
        for name, ours in imported(text, names):
            target = name.partition(".")[0]
            if ours:
                graph[module].add(name)
                if target != room and target not in BELOW.get(room, set()):
                    found.append(f"{module} imports {name}: {room} may not know {target}")
            elif target == "torch" and room in WITHOUT_TORCH:
                found.append(f"{module} imports {name}: {room} does without torch")
        if module != PRIVATE_FILE:
            for node in nodes(text):
                told = node.attr if isinstance(node, ast.Attribute) else node.value if _is_text(node) else None
                if told in PRIVATE:
                    found.append(f"{module}, line {node.lineno}: {told} belongs into {PRIVATE_FILE}")  # type: ignore[attr-defined]
                hidden = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__")
                if hidden and _is_torch(node.value):
                    found.append(f"{module}, line {node.lineno}: torch's {node.attr} belongs into {PRIVATE_FILE}")
                if isinstance(node, ast.Attribute) and node.attr == "apply" and _is_super(node.value):
                    found.append(f"{module}, line {node.lineno}: the short cut of apply belongs into {PRIVATE_FILE}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' -> '.join(error.args[1])}")
    return found


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_torch(node: ast.AST) -> bool:
    """Whether it is torch, or a module of its own."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "torch"


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def test_imports_point_down():
    assert wrong(sources()) == []


def test_nothing_guesses_from_counts_whether_memory_is_free():
    """Another thread may change them between two looks."""
    for module, text in sources().items():
        assert not re.search(r"_storage_Use_Count|getrefcount|use_count", text), module


def test_every_module_has_a_room():
    rooms = {name.partition(".")[0] for name in sources()}
    assert rooms == {*BELOW, "kernels", "outputs", "torch_private", "version"}


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("kernels.rules", "from msgdrop_numba.call import rule", "kernels may not know call"),
        ("kernels.cpu", "def f():\n    import torch.nn", "kernels does without torch"),
        ("call.plan", "from msgdrop_numba.tensors.cuda import launch", "call may not know tensors"),
        ("call.plan", "from torch import Tensor", "call does without torch"),
        ("arrays", "import msgdrop_numba.tensors.backends", "arrays may not know tensors"),
        ("tensors.backends", "from msgdrop_numba import arrays", "tensors may not know arrays"),
        ("tensors.backends", "from msgdrop_numba import message_dropout", "tensors may not know __init__"),
        ("tensors.backends", "from msgdrop_numba.pipelines import stack", "tensors may not know pipelines"),
        ("nn", "from msgdrop_numba.pipelines.collate import Stack", "nn may not know pipelines"),
        ("pipelines.collate", "from msgdrop_numba import nn", "pipelines may not know nn"),
        (
            "pipelines.sampler",
            "from msgdrop_numba.integrations import lightning",
            "pipelines may not know integrations",
        ),
        ("command.info", "from msgdrop_numba.kernels.cpu import drop_range", "command may not know kernels"),
        ("functional", "from msgdrop_numba.command.errors import JobError", "functional may not know command"),
        ("call.rule", "from msgdrop_numba.call import plan", "a circle: "),
        ("tensors.backends", "import torch\ntorch._C._get_tracing_state()", "_C belongs into torch_private"),
        ("nn", "import torch\ntorch.compiler._anything", "torch's _anything belongs into torch_private"),
        ("tensors.memory", 'f = getattr(x, "_new_shared")', "_new_shared belongs into torch_private"),
        ("outputs", "import torch", "outputs does without torch"),
        ("tensors.autograd", "f = super(A, B).apply", "the short cut of apply belongs into torch_private"),
    ],
)
def test_what_is_forbidden_is_found(module, line, said):
    modules = sources()
    modules[module] += f"\n{line}\n"
    assert [found for found in wrong(modules) if said in found]
