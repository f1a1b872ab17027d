"""Every bug on purpose is caught by some check; with --all-checks, a table of which catches which ends the run."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import ptx
import pytest
from budgets import BUDGETS
from kernel_cases import ROWS
from mutants import import_mutant
from problems import PACKAGE, Mutation, Row

gates = pytest.importorskip("gates", reason="Triton is not installed (its wheels are for Linux)")
launches = pytest.importorskip("launches", reason="Triton is not installed (its wheels are for Linux)")
pytest.importorskip(PACKAGE, reason=f"the package {PACKAGE} is not installed")
pytestmark = pytest.mark.skipif(launches.INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")

PAIRS = [pytest.param(row, mutation, id=f"{row}-{mutation.name}") for row in ROWS for mutation in row.mutations]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, str | None]]:
    """What the interpreter says of each row and mutation, "" for none; None where the result is right."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    script = str(Path(__file__).with_name("interpreted.py"))
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def executed(row: Row, package: str, schedules: list) -> str | None:
    """The first complaint of the PTX interpreter or of the results; None where there is none."""
    try:
        for schedule in schedules:
            problem = row.small(package, "sm_80")
            for launch in problem.launches:
                launches.simulate(launch, schedule)
            problem.check()
    except (ptx.PtxError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return None


def compiled(row: Row, package: str) -> str | None:
    """The complaints of the compile matrix on sm_80."""
    found = []
    for launch in row.large(package, "sm_80").launches:
        kernel = launches.compile_launch(launch)
        found += gates.complaints(kernel, "sm_80", row)
        used, (registers, shared, _) = gates.usage(kernel), BUDGETS[row.name]["sm_80"]
        if used.registers > registers or used.shared > shared:
            found.append("over the budget")
    return "; ".join(found) or None


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_interpreter_accepts_the_kernels(row, interpreted):
    assert interpreted[row.name][""] is None


@pytest.mark.parametrize(("row", "mutation"), PAIRS)
def test_mutation_is_caught(row: Row, mutation: Mutation, interpreted, tmp_path, triton_cache, assert_caught):
    @functools.cache
    def package() -> str:
        return import_mutant(mutation, tmp_path)

    checks = {
        "Triton interpreter": lambda: interpreted[row.name][mutation.name],
        "compile gate": lambda: compiled(row, package()),
        "PTX lock-step": lambda: executed(row, package(), [ptx.LockStep()]),
        "PTX adversarial": lambda: executed(row, package(), [ptx.Adversarial(0), ptx.Adversarial(1)]),
    }
    assert_caught(row.name, mutation.name, checks)
