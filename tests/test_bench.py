"""The benchmarks run, and their numbers agree with each other. How fast anything is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    pytest.importorskip("matplotlib")
    output = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(BENCH / "bsr_linear.py"), "--quick", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (output / "bsr_linear.png").stat().st_size > 10_000
    return json.loads((output / "bsr_linear.json").read_text(encoding="utf-8"))


def test_record_says_what_it_was_measured_on(record):
    assert {"cpu", "isa", "cores", "torch", "sparsenlp"} <= record["machine"].keys()
    assert all(result["limits"]["read_bytes"] > 0 for result in record["results"] if "flops" in result)


def test_every_cell_has_its_baselines_and_our_block(record):
    cells = {(r["tokens"], r["sparsity"]) for r in record["results"]}
    assert len(cells) == 4
    for cell in cells:
        names = {r["name"] for r in record["results"] if (r["tokens"], r["sparsity"]) == cell}
        assert {"torch fp32", "torch bf16", "8x1"} <= names


def test_rates_follow_from_times(record):
    for result in record["results"]:
        seconds = result["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        cell = [r for r in record["results"] if all(r[key] == result[key] for key in ("tokens", "sparsity", "threads"))]
        medians = {r["name"]: r["seconds"]["median"] for r in cell if r["name"] in result["speedup"]}
        assert result["best_dense"] == min(medians, key=lambda name: medians[name])
        if "flops" in result:
            rows, columns = result["shape"]
            stored = result["flops"] * seconds["median"] / (2 * result["tokens"])
            assert stored / (rows * columns) == pytest.approx(1 - result["sparsity"], rel=0.05)
