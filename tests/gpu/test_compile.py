"""Every kernel compiles for every target into the machine code it should: compiled, not run on hardware."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from budgets import BUDGETS
from kernel_cases import ROWS
from problems import PACKAGE

gates = pytest.importorskip("gates", reason="Triton is not installed (its wheels are for Linux)")
launches = pytest.importorskip("launches", reason="Triton is not installed (its wheels are for Linux)")
pytest.importorskip(PACKAGE, reason=f"the package {PACKAGE} is not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
gpu_model = pytest.importorskip("gpu_model")
pytestmark = pytest.mark.skipif(launches.INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")


@pytest.mark.parametrize(("row", "target"), [(row, target) for row in ROWS for target in row.targets], ids=str)
def test_machine_code(row, target, triton_cache):
    for launch in row.large(PACKAGE, target).launches:
        compiled = launches.compile_launch(launch, gates.TARGETS[target])
        assert not gates.complaints(compiled, target, row)
        used = gates.usage(compiled)
        warps = compiled.metadata.num_warps
        warps *= gpu_model.ctas_per_processor(used.registers, used.shared, warps, gpu_model.PROCESSORS[target])[0]
        budget = BUDGETS.get(row.name, {}).get(target)
        needed = f'"{target}": ({-(-used.registers // 8) * 8}, {-(-used.shared // 1024)} * KIB, {warps})'
        assert budget, f'no budget: add {needed} to "{row.name}" in budgets.py'
        assert used.registers <= budget[0], f"{used.registers} registers"
        assert used.shared <= budget[1], f"{used.shared} bytes of shared memory"
        assert warps >= budget[2], f"{warps} warps"


def test_budgets_are_of_kernels_that_are_there():
    assert set(BUDGETS) <= {row.name for row in ROWS}
    assert len({row.name for row in ROWS}) == len(ROWS)
