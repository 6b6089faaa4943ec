"""A transformer trained on several ranks: the masks of one rank, bit for bit, and its losses but for the order of sums.

By the benchmark itself, in minutes; `helpers/on_ranks.py` trains for three steps.
"""

from __future__ import annotations

import pytest

from benchmarks import measure, ranks
from benchmarks.ranks import TOLERANCE

pytestmark = [pytest.mark.long, pytest.mark.processes]


def by_case(results):
    return {(case["layer"], case["seeded"], case["dtype"]): case for case in results["trained"]}


def check(cases):
    for (layer, _, dtype), case in cases.items():
        for found in case["sizes"].values():
            if layer in ("none", "MessageDropout"):
                assert found["same_masks"] == case["masks"]
                assert found["difference"] <= TOLERANCE[dtype]
    for size, found in cases["MessageDropout", "apart", "float32"]["sizes"].items():
        alike = cases["MessageDropout", "alike", "float32"]["sizes"][size]  # the mesh's first rank governs both
        assert found["losses"] == pytest.approx(alike["losses"], rel=0, abs=TOLERANCE["float32"])
    mistake = cases["nn.Dropout1d on local tensors", "alike", "float32"]["sizes"]["2"]  # the comparison can fail
    assert mistake["same_masks"] == 0
    assert mistake["difference"] > 1e-3


def test_two_ranks_train_as_one(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "SIZES", (1, 2))
    monkeypatch.setattr(ranks, "STEPS", 3)
    monkeypatch.setattr(ranks, "SHAPES", {(2, 3, 4): 1})
    here = ("MessageDropout", "nn.Dropout1d on local tensors")
    monkeypatch.setattr(ranks, "CASES", tuple(case for case in ranks.CASES if case.layer in here))
    results = ranks.run(rounds=1)
    cases = by_case(results)
    check(cases)
    assert cases["MessageDropout", "apart", "float32"]["masks"] == 3 * 9
    assert [row["placement"] for row in results["rows"]] == ["Shard(0)", "Shard(1)", "Replicate()"]
    assert all(time > 0 for row in results["rows"] for time in row["microseconds"].values())
    assert "| 27 of 27 " in ranks.table(results)
    assert "| 2 × 3 × 4 " in ranks.table(results)
    measure.draw(tmp_path / "chart.png", ranks, results)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_four_ranks_train_as_one(monkeypatch):
    monkeypatch.setattr(ranks, "SHAPES", {})
    cases = by_case(ranks.run(rounds=1))
    check(cases)
    dropped, none = (cases[layer, "alike", "float32"]["sizes"]["1"]["losses"] for layer in ("MessageDropout", "none"))
    assert dropped != pytest.approx(none, rel=0, abs=1e-3)
    assert cases["MessageDropout", "apart", "float32"]["masks"] == 20 * 9
    assert set(cases["MessageDropout", "apart", "float32"]["sizes"]) == {"1", "2", "4"}
