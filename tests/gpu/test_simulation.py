"""Every kernel's sm_80 PTX, executed by the interpreter in tests/gpu/ptx: simulated, not run on hardware."""

from __future__ import annotations

import ptx
import pytest
import torch
from kernel_cases import ROWS
from problems import PACKAGE

launches = pytest.importorskip("launches", reason="Triton is not installed (its wheels are for Linux)")
pytest.importorskip(PACKAGE, reason=f"the package {PACKAGE} is not installed")
pytestmark = pytest.mark.skipif(launches.INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")


@pytest.mark.parametrize("schedule", [ptx.LockStep(), ptx.Adversarial(0)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_result(row, schedule, triton_cache):
    problem = row.small(PACKAGE, "sm_80")
    assert all(torch.isnan(output).all() for output in problem.outputs)
    for launch in problem.launches:
        launches.simulate(launch, schedule)
    problem.check()


def test_tensors_that_overlap_share_a_buffer():
    """q, k and v may be views of one tensor: a pointer of one reaches the others' bytes, and no more."""
    packed, other = torch.arange(64.0), torch.arange(4.0)
    views = [packed[4:20], packed[16:32], packed[40:44], other]
    merged = launches.buffers(views)
    assert sorted(len(content) for content in merged.values()) == [4 * 4, 4 * 4, 4 * 28]
    place = launches.pointer(views[1], merged)
    assert place.offset == 4 * 12
    assert place.array is launches.pointer(views[0], merged).array
