"""The README is true: its code runs, its figures are those of the committed results, its commands those of CI."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import (
    apply,
    cold_start,
    cpu,
    curve,
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
from benchmarks.__main__ import QUESTIONS, with_tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# what torch 2.13 says of its own code on the first torch.compile
TORCHS_OWN = ["-W", "ignore:`torch.jit.script:DeprecationWarning"]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def marked(block):
    return pytest.param(block, marks=pytest.mark.ray) if "import ray" in block else block


def test_there_is_code_to_run():
    assert len(BLOCKS) == README.count("```python") == 10


@pytest.mark.processes
@pytest.mark.parametrize("block", [marked(block) for block in BLOCKS], ids=range(len(BLOCKS)))
def test_code(block, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(block)
    on_ray = "import ray" in block  # which warns and logs on its own
    done = subprocess.run(
        [sys.executable, *([] if on_ray else ["-W", "error", *TORCHS_OWN]), str(script)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert on_ray or done.stderr == ""


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


def test_the_tables_are_those_of_the_committed_runs():
    assert with_tables(README) == README
    for name in QUESTIONS:
        if not (ROOT / "benchmarks" / "results" / f"{name}.json").exists():
            assert name == "gpu"
            assert "<!-- gpu: python -m benchmarks gpu -->\nNothing has been measured on a GPU yet" in README
            continue
        table = re.search(rf"<!-- {name}: .*? -->\n\|.*\|\n<!-- end {name} -->", README, flags=re.DOTALL)
        assert table is not None, name
        changed = README.replace(table[0], re.sub(r"\d", "7", table[0]))
        assert with_tables(changed) == README != changed


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
    monkeypatch.setattr(gil, "SECONDS", 0.01)
    results = gil.run(rounds=1)
    assert all(speed > 0 for speed in results["per_second"].values())
    assert "two threads collating" in gil.table(results)


@pytest.mark.processes
def test_the_other_benchmarks_run(monkeypatch, tmp_path):
    monkeypatch.setattr(curve, "KILOBYTES", [1, 4])
    monkeypatch.setattr(overhead, "SHAPES", [(3, 5, 20)])
    monkeypatch.setattr(rules, "SHAPE", (8, 256, 64))
    monkeypatch.setattr(rules, "SMALLER", (4, 8, 16))
    monkeypatch.setattr(rules, "LARGER", (4, 8, 16))
    monkeypatch.setattr(train_step, "BATCH", (2, 3, 64))
    monkeypatch.setattr(cold_start, "CASES", {"import numba": cold_start.CASES["import numba"]})
    monkeypatch.setattr(cold_start, "COMPILED", {})
    for question in (curve, overhead, rules, train_step, cold_start):
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
    commands = re.findall(r"```sh\n(.*?)\n```", README, flags=re.DOTALL)
    assert commands == [
        'pip install torch==2.13.0 ".[demo]" && msgdrop demo',
        'pip install torch==2.13.0 -e ".[test]" && pytest',
    ]


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).is_file()
