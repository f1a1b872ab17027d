"""Arithmetic of bench/gpu_static.py, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (its wheels are for Linux)")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

gpu_static = pytest.importorskip("gpu_static")


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (168, 0, 4, (3, "registers")),  # 21 units of 256 a warp: 12 warps of 65536
        (32, 80 * 1024, 4, (2, "shared memory")),  # 81 KiB of 164
        (32, 0, 8, (8, "registers")),  # 64 warps of 1024 registers fill both
        (16, 0, 16, (4, "warps")),
        (16, 0, 1, (32, "CTAs")),
    ],
)
def test_ctas_that_fit(registers, shared, warps, expected):
    assert gpu_static.ctas_per_processor(registers, shared, warps, gpu_static.PROCESSORS["sm_80"]) == expected


def test_floor():
    gpu = gpu_static.Gpu("", half_tflops=100, float_tflops=10, gbytes=1000)
    assert gpu_static.floor(1, 1000, 1000, 0.5, gpu) == (pytest.approx(2 * 502000 / 1e6), "memory")
    assert gpu_static.floor(10000, 1000, 1000, 0.5, gpu) == (pytest.approx(1e10 / 1e8), "arithmetic")
