"""What of `make gpu` runs without a GPU: the refusal, parts and their deadlines, the record and the table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import gpu  # noqa: E402  (these need the path above)
import gpu_timings  # noqa: E402
from harness import print_table, write_record  # noqa: E402

TINY = gpu_timings.Sizes(
    layers=((128, 128),),
    tokens=(1, 128),
    sparsities=(0.5,),
    blocks=((16, 16),),
    windows=((128, 32),),
    units=(16,),
    sequences=(1, 9),
    steps=3,
)


def python(code: str, name: str = "part", seconds: float = 20, **fields) -> gpu.Part:
    return gpu.Part(name, seconds, [sys.executable, "-c", code], **fields)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU, which make gpu would use")
def test_without_a_gpu_it_says_so_in_one_line():
    result = subprocess.run([sys.executable, str(BENCH / "gpu.py")], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("make gpu: torch ")
    assert result.stderr.endswith("sees no GPU\n")
    assert result.stderr.count("\n") == 1
    assert not result.stdout


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "8.0 or later, got 7.5"), ((9, 0), "")])
def test_old_gpus_are_refused(capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert gpu.why_not().endswith(reason)
    assert bool(gpu.why_not()) == bool(reason)


def test_a_part_that_fails_or_hangs_stops_no_other(capfd):
    todo = [
        python("print('wrong'); raise SystemExit(3)", "fails"),
        gpu.Part("missing", 1, ["/no/such/program"]),
        python("import time; print('begun', flush=True); time.sleep(600)", "hangs", seconds=0),
        python("", "not here", why_skipped="no nvcc"),
        python("import os; print('{\"op\": \"a\"}', os.environ['X'])", "runs", environment={"X": "1"}),
    ]
    start = time.perf_counter()
    records = gpu.run_all(todo, seconds=25)
    assert time.perf_counter() - start < 60
    assert [record["status"] for record in records] == ["failed", "failed", "timed out", "skipped", "passed"]
    assert records[0]["tail"] == ["wrong"]
    assert "/no/such/program" in records[1]["tail"][0]
    assert "tail" not in records[4]
    printed = capfd.readouterr().out
    assert "not here: skipped (no nvcc)" in printed
    assert "    wrong" in printed


def test_parts_fit_their_time():
    todo = gpu.parts()
    assert sum(part.seconds for part in todo) <= gpu.SECONDS <= 600
    names = {part.name for part in todo}
    assert {f"{kind}: {op}" for kind in ("test", "time") for op in gpu.OPS} < names
    assert {"build: CUDA library", "build: extension", "memcheck", "racecheck"} < names
    assert set(gpu.OPS) == set(gpu_timings.CELLS)
    files = [Path(word) for part in todo for word in part.command if word.startswith(("tests/", "bench/"))]
    assert all((gpu.ROOT / file).exists() for file in files)


LOG = """tests/hardware/test_a.py::test_one[20-b8x1] PASSED                   [ 25%]
tests/hardware/test_a.py::test_two SKIPPED (torch sees no GPU)       [ 50%]
tests/hardware/test_a.py::test_three[a b] FAILED                     [ 75%]
FAILED tests/hardware/test_a.py::test_three[a b] - PASSED
tests/hardware/test_a.py::test_crashes """


def test_outcomes_of_an_interrupted_run():
    found = gpu.read_tests(LOG)
    assert found["tests"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["failures"] == ["tests/hardware/test_a.py::test_three[a b]"]


def test_a_part_without_a_test_that_ran_did_not_pass():
    line = LOG.splitlines()[1]
    assert gpu.run(python(f"print({line!r})", read=gpu.read_tests), 60)["status"] == "skipped"


def test_rows_of_an_interrupted_run():
    assert gpu.read_rows('warning\n{"op": "a", "us": {}}\n{"op": "b", "us"') == {"timings": [{"op": "a", "us": {}}]}


def fake_timer(steps):
    for step in steps.values():
        step()
    return {name: [1e-6 * i for i in range(1, 30)] for name in steps}


@pytest.mark.parametrize("op", gpu.OPS)
def test_cells(op):
    """On the CPU: every candidate that runs there computes what it is compared with."""
    rows = []
    for cell in gpu_timings.CELLS[op](TINY, "cpu"):
        here = {name: build for name, build in cell.candidates.items() if name not in ("FlexAttention", "torch BSR")}
        rows.append(gpu_timings.measure(op, replace(cell, candidates=here), fake_timer))
    assert len(rows) == {"bsr_linear": 4, "nm_linear": 2, "block_sparse_attention": 2, "sparse_lstm": 2}[op]
    for row in rows:
        assert set(row.get("errors", {})) <= {"cuSPARSELt", "CUTLASS"}
        assert row["us"][op]["median"] == pytest.approx(15)
        assert row["us"][op]["p20"] < row["us"][op]["median"] < row["us"][op]["p80"]


def test_a_wrong_candidate_is_an_error_and_not_a_time():
    cell = gpu_timings.Cell(
        {"tokens": 1},
        {"ours": lambda: lambda: torch.ones(2), "wrong": lambda: lambda: torch.zeros(2), "broken": lambda: 1 / 0},
        torch.ones(2),
    )
    row = gpu_timings.measure("ours", cell, fake_timer)
    assert list(row["us"]) == ["ours"]
    assert row["errors"]["wrong"].startswith("AssertionError: Tensor-likes are not close")
    assert row["errors"]["broken"] == "ZeroDivisionError: division by zero"


def test_table_and_record(tmp_path, capsys):
    times = {"nm_linear": 2.0, "nm_linear int8": 1.0, "cuBLAS": 3.0, "CUTLASS": 2.5}
    us = {name: {"median": median, "p20": median, "p80": median} for name, median in times.items()}
    rows = [{"op": "nm_linear", "tokens": 1, "sparsity": 0.5, "us": us, "errors": {"cuSPARSELt": "RuntimeError: no"}}]
    print_table(gpu.table("nm_linear", rows))
    header, _, line = capsys.readouterr().out.splitlines()
    assert header.startswith("| tokens | sparsity | nm_linear, us | nm_linear int8, us | cuBLAS, us | CUTLASS, us |")
    assert line == "| 1 | 50% | 2.0 | 1.0 | 3.0 | 2.5 | error | 1.25 |"
    write_record(tmp_path / "gpu.json", parts=[{"part": "a", "status": "passed"}], timings=rows)
    record = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert record["timings"] == rows
    assert {"command", "date", "machine", "parts"} < set(record)
