"""The documents are true: their code runs, their figures are those of the committed results, their links lead there."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import (
    apply,
    cache,
    cold_start,
    cpu,
    curve,
    documents,
    edges,
    gil,
    gpu,
    loader,
    measure,
    overhead,
    peers,
    ray_data,
    rules,
    train_step,
)
from benchmarks.documents import FILLED, QUESTIONS, with_tables
from benchmarks.ranks import TOLERANCE
from msgdrop_numba import __version__

ROOT = Path(__file__).parents[1]
# Each document, and how many blocks of code it has.
CODE = {
    "README.md": 5, "benchmarks/README.md": 0, "msgdrop_numba/ARCHITECTURE.md": 0, "msgdrop_numba/CONTRACT.md": 3,
    "msgdrop_numba/LIMITS.md": 2, "msgdrop_numba/RANKS.md": 4,
}  # fmt: skip
TEXTS = {name: (ROOT / name).read_text() for name in CODE}
INTEGRATIONS = "msgdrop_numba/INTEGRATIONS.md"  # whose code runs in tests/integrations/test_recipes.py
README, MEASUREMENTS, LIMITS, RANKS = (
    TEXTS[name] for name in ("README.md", "benchmarks/README.md", "msgdrop_numba/LIMITS.md", "msgdrop_numba/RANKS.md")
)
MEASURED = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
# what torch 2.13 says of its own code on the first torch.compile
TORCHS_OWN = ["-W", "ignore:`torch.jit.script:DeprecationWarning"]
BLOCKS = {
    f"{name}, {number}": block
    for name, text in TEXTS.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
}


def test_no_document_is_forgotten():
    there = [path for folder in (".", "benchmarks", "msgdrop_numba") for path in (ROOT / folder).glob("*.md")]
    assert {path.relative_to(ROOT).as_posix() for path in there} == {*CODE, INTEGRATIONS, "CHANGELOG.md"}


@pytest.mark.parametrize("name", CODE)
def test_there_is_code_to_run(name):
    own = [block for block in BLOCKS if block.startswith(f"{name}, ")]
    assert len(own) == TEXTS[name].count("```python") == CODE[name]
    assert all(
        fence in ("```", "```sh", "```python") for fence in re.findall(r"^```.*", TEXTS[name], flags=re.MULTILINE)
    )


def scripts():
    """The code of each document: what starts Ray has a process of its own, all else one, a block after the other."""
    for name in CODE:
        own = {label: block for label, block in BLOCKS.items() if label.startswith(f"{name}, ")}
        on_ray = {label: block for label, block in own.items() if "import ray" in block}
        if len(own) > len(on_ray):
            yield pytest.param([own[label] for label in own if label not in on_ray], id=name)
        for label, block in on_ray.items():
            yield pytest.param([block], id=label, marks=pytest.mark.ray)


@pytest.mark.processes
@pytest.mark.parametrize("blocks", [*scripts()])
def test_code(blocks, tmp_path):
    for number, block in enumerate(blocks):
        (tmp_path / f"block{number}.py").write_text(block)
    script = tmp_path / "script.py"
    script.write_text("import runpy\n" + "".join(
        f"runpy.run_path({str(tmp_path / f'block{number}.py')!r}, run_name='__main__')\n" for number in range(len(blocks))
    ))  # fmt: skip
    on_ray = "import ray" in blocks[0]  # which warns and logs on its own
    done = subprocess.run(
        [sys.executable, *([] if on_ray else ["-W", "error", *TORCHS_OWN]), str(script)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert on_ray or done.stderr == ""


def test_names_in_architecture_are_there():
    """Each name in backticks that looks like one of ours stands somewhere in the package, the tests or the benchmarks."""
    sources = [*(ROOT / "msgdrop_numba").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / ".ci").iterdir()]
    text = "\n".join(path.read_text() for path in sources)
    for told in re.findall(r"`([^`]+)`", TEXTS["msgdrop_numba/ARCHITECTURE.md"]):
        if "/" in told and " " not in told:
            module, _, name = told.removesuffix("/").partition(".")
            there = [told.removesuffix("/"), *([f"{module}.py"] if re.search(rf"def {name}\b", text) else [])]
            assert any((ROOT / folder / path).exists() for folder in (".", "msgdrop_numba") for path in there), told
            continue
        for name in re.findall(r"[A-Za-z_][\w.]*[A-Za-z_]\w*", told if re.fullmatch(r"[\w.]+", told) else ""):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", text) or (ROOT / name).exists(), told


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert max(len(line) for line in lines if not line.startswith("|")) <= 150


def test_the_demo_table_is_that_of_the_committed_run():
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    rows = ["| frames lost | " + " | ".join(f"{lost:.0%}" for lost in results["lost"]) + " |", "|---" * 6 + "|"]
    for arm, row in results["accuracy"].items():
        cells = (f"{100 * mean:.1f} ± {100 * spread:.1f}" for mean, spread in row)
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    table = re.search(r"<!-- demo: .*? -->\n(.*?)\n<!-- end demo -->", README, flags=re.DOTALL)
    assert table is not None
    assert table[1] == "\n".join(rows)
    assert results["settings"] == {"p": 0.5, "epochs": 30, "seeds": 5}


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_tables_are_those_of_the_committed_runs(name):
    if name not in MEASURED and name != "gpu":
        assert f"<!-- {name}: " not in MEASUREMENTS  # nothing is said that wasn't measured
        return
    if name not in MEASURED:
        assert "<!-- gpu: python -m benchmarks gpu -->\nNothing has been measured on a GPU yet" in MEASUREMENTS
        assert "Nothing ran on a GPU yet" in README
        return
    check_table(
        MEASUREMENTS, name, rf"<!-- {name}: from benchmarks/results/{name}\.json -->\n\|.*?\|\n<!-- end {name} -->"
    )
    assert f"](results/{name}.png)" in MEASUREMENTS


def check_table(text: str, name: str, pattern: str) -> None:
    """The table stands there once, is what would be made, and would be made anew if it was changed."""
    (table,) = re.findall(pattern, text, flags=re.DOTALL)
    assert text.count(f"<!-- {name}: ") == 1
    changed = text.replace(table, re.sub(r"[\d|]", "7", table))
    assert with_tables(changed) == text != changed
    assert with_tables(text) == text


def test_the_summary_is_that_of_the_committed_runs():
    check_table(README, "summary", r"<!-- summary: from benchmarks/results -->\n\|.*?\.\n<!-- end summary -->")
    rows = re.findall(r"^\| .* \| (\d+\.\d\d) +\|$", documents.summary(), flags=re.MULTILINE)
    assert len(rows) == 10
    assert min(map(float, rows)) < 1 < max(map(float, rows))  # it doesn't hide where ours is slower
    # Its figures stand in the tables of benchmarks/README.md too.
    assert all(f" {row} " in MEASUREMENTS or f", {row} " in MEASUREMENTS for row in rows)


def test_the_ways_are_those_that_info_names():
    check_table(LIMITS, "ways", r"<!-- ways: from msgdrop info -->\n\|.*?\|\n<!-- end ways -->")
    assert f"<!-- ways: from msgdrop info -->\n{documents.ways()}\n<!-- end ways -->" in LIMITS


def test_the_training_on_ranks_is_that_of_the_committed_run():
    check_table(
        RANKS, "trained", r"<!-- trained: from benchmarks/results/ranks\.json -->\n\|.*?\|\n<!-- end trained -->"
    )
    for case in documents.results("ranks")["trained"]:  # and shows what the text says of it
        masks = {found["same_masks"] for found in case["sizes"].values()}
        if case["layer"] in ("none", "MessageDropout"):
            assert masks == {case["masks"]}
            assert max(found["difference"] for found in case["sizes"].values()) <= TOLERANCE[case["dtype"]]
        elif (case["layer"], case["seeded"]) != ("nn.Dropout1d", "alike"):
            assert masks == {case["masks"], 0}


def test_one_command_makes_them_all(monkeypatch, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", results, ignore=shutil.ignore_patterns("*.png"))
    monkeypatch.setattr(documents, "RESULTS", results)
    monkeypatch.setattr(command, "ROOT", tmp_path)
    for name in FILLED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(re.sub(r"^\|.*\|$", "| 7 |", TEXTS[name], flags=re.MULTILINE))
    done = CliRunner().invoke(command.main, ["readme"])
    assert done.exit_code == 0, done.output
    for name in FILLED:
        marked = re.findall(r"<!-- (?!demo)(\w+): .*? -->\n.*?<!-- end \1 -->", TEXTS[name], flags=re.DOTALL)
        assert marked
        for mark in marked:
            own = rf"<!-- {mark}: .*?<!-- end {mark} -->"
            made, committed = (
                re.findall(own, text, flags=re.DOTALL) for text in ((tmp_path / name).read_text(), TEXTS[name])
            )
            assert made == committed
    assert {path.stem for path in results.glob("*.png")} == MEASURED - {"demo"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in results.glob("*.png"))


@pytest.mark.processes
def test_the_benchmarks_run(monkeypatch):
    monkeypatch.setattr(cpu, "SHAPES", [(3, 5, 20)])
    monkeypatch.setattr(peers, "TENSORS", [peer for peer in peers.TENSORS if "compiled" not in peer.__name__])
    results = cpu.run(rounds=1)
    assert all(time > 0 for time in results["rows"][0]["microseconds"].values())
    assert "| 3 × 5 × 20 |" in cpu.table(results)
    monkeypatch.setattr(loader, "SIZES", {"tiny": (4, 6, 8, 3)})
    results = loader.run(rounds=1)
    assert [row["workers"] for row in results["rows"]] == [0, 2, 0, 2]
    assert "| tiny, padded |" in loader.table(results)
    monkeypatch.setattr(gil, "SECONDS", 0.05)
    results = gil.run(rounds=1)
    assert all(speed > 0 for speed in results["per_second"].values())
    assert "two threads collating" in gil.table(results)


@pytest.mark.processes
def test_the_other_benchmarks_run(monkeypatch, tmp_path):
    monkeypatch.setattr(curve, "KILOBYTES", [1, 4])
    monkeypatch.setattr(cache, "KILOBYTES", [1])
    monkeypatch.setattr(cache, "FEATURES", [64])
    monkeypatch.setattr(overhead, "SHAPES", [(3, 5, 20)])
    monkeypatch.setattr(rules, "SHAPE", (8, 256, 64))
    monkeypatch.setattr(rules, "SMALLER", (4, 8, 16))
    monkeypatch.setattr(rules, "LARGER", (4, 8, 16))
    monkeypatch.setattr(train_step, "BATCH", (2, 3, 64))
    monkeypatch.setattr(cold_start, "CASES", {"import numba": cold_start.CASES["import numba"]})
    monkeypatch.setattr(cold_start, "COMPILED", {})
    monkeypatch.setattr(edges, "EDGES", [100])
    monkeypatch.setattr(edges, "CHANNELS_FIRST", [(2, 3, 4)])
    for question in (
        curve,
        cache,
        overhead,
        rules,
        train_step,
        cold_start,
        *([edges] if find_spec("torch_geometric") else []),
    ):
        results = question.run(rounds=1)
        assert question.table(results).count("\n") >= 2
        measure.draw(tmp_path / "chart.png", question, results)
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.processes
def test_the_cluster_benchmarks_run(monkeypatch, tmp_path):
    monkeypatch.setattr(apply, "PLACES", {"disk": str(tmp_path)})
    monkeypatch.setattr(apply, "SHARDS", 2)
    monkeypatch.setattr(apply, "ROWS", 3)
    results = apply.run(rounds=1)
    assert set(results["seconds"]) == {"disk"}
    assert apply.table(results).count("\n") == 6
    assert all(seconds > 0 for seconds in results["seconds"]["disk"].values())


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_the_benchmark_on_ray_runs(monkeypatch):
    for name in ("BLOCKS", "ROWS", "MESSAGES", "FEATURES"):
        monkeypatch.setattr(ray_data, name, 2)
    results = ray_data.run(rounds=1)
    assert ray_data.table(results).count("\n") == 6


def test_the_benchmark_for_gpus_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "CASES", [(0.01, 8, "bfloat16", 0.5)])
    monkeypatch.setattr(gpu, "LEAST", 0.001)
    monkeypatch.setattr(gpu, "PEERS", {name: gpu.PEERS[name.removeprefix("compiled ")] for name in gpu.PEERS})
    results = gpu.run(rounds=1)
    assert gpu.table(results).count("\n") == 5
    assert all(time > 0 for row in results["rows"] + results["small"] for time in row["microseconds"].values())
    measure.draw(tmp_path / "chart.png", gpu, results)


def test_the_two_commands_are_there():
    (commands,) = re.findall(r"```sh\n(.*?)\n```", README, flags=re.DOTALL)
    assert commands.splitlines() == [
        'pip install torch==2.13.0 ".[demo]" && msgdrop demo',
        'pip install torch==2.13.0 -e ".[test]" && pytest',
    ]


@pytest.mark.parametrize("name", [*CODE, INTEGRATIONS])
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (ROOT / name).read_text()):
        file = (folder / target).resolve() if target else ROOT / name
        assert file.is_file()
        if name.startswith("msgdrop_numba/"):  # in the wheel there is nothing else
            assert file.is_relative_to(ROOT / "msgdrop_numba")
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_what_says_who_made_it():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, flags=re.MULTILINE)[1] == __version__
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    assert re.search(r'^  - name: "(.*)"$', citation, flags=re.MULTILINE)[1] == setup["metadata"]["author"]
    assert re.search(r"^license: (.*)$", citation, flags=re.MULTILINE)[1] == setup["metadata"]["license"]
    assert "*.md" in setup["options.package_data"]["msgdrop_numba"]
