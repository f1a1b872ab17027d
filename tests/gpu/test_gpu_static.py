"""Arithmetic of bench/gpu_model.py and what bench/gpu_loop.py reads, by hand; bench/gpu_static.py runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from kernel_cases import ROWS
from problems import PACKAGE

pytest.importorskip("triton", reason="Triton is not installed (its wheels are for Linux)")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

gpu_loop = pytest.importorskip("gpu_loop")
gpu_model = pytest.importorskip("gpu_model")
gates = pytest.importorskip("gates")
launches = pytest.importorskip("launches")
compiles = pytest.mark.skipif(launches.INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 168, 0, 4, (3, "registers")),  # 21 units of 256 a warp: 12 warps of 65536
        ("sm_80", 32, 80 * 1024, 4, (2, "shared memory")),  # 81 KiB of 164
        ("sm_80", 32, 0, 8, (8, "registers")),  # 64 warps of 1024 registers fill both
        ("sm_80", 16, 0, 16, (4, "warps")),
        ("sm_80", 16, 0, 1, (32, "CTAs")),
        ("gfx942", 112, 0, 4, (4, "registers")),  # 4 waves of 112 in a SIMD's 512, 4 SIMDs
        ("gfx942", 64, 32 * 1024, 4, (2, "shared memory")),  # of 64 KiB
        ("gfx942", 40, 0, 4, (8, "warps")),  # 12 waves would fit, 8 may
    ],
)
def test_ctas_that_fit(target, registers, shared, warps, expected):
    assert gpu_model.ctas_per_processor(registers, shared, warps, gpu_model.PROCESSORS[target]) == expected


GPU = gpu_model.Gpu("", "sm_80", processors=10, ghz=1, half_tflops=100, float_tflops=10, gbytes=1000, l2_bytes=50)


def test_floor():
    assert gpu_model.floor(gpu_model.Layer(1, 1000, 1000), 0.5, GPU) == (pytest.approx(2 * 502000 / 1e6), "memory")
    assert gpu_model.floor(gpu_model.Layer(10000, 1000, 1000), 0.5, GPU) == (pytest.approx(1e10 / 1e8), "arithmetic")
    # 1,000 queries see 500 keys: 4 x 500,000 x 10 FLOPs by heads; q, k, v and the result are 10,000 values each.
    assert gpu_model.floor(gpu_model.Attention(1000, 2, 10), 0.5, GPU) == (pytest.approx(0.4), "arithmetic")
    assert gpu_model.Attention(1000, 2, 10).memory(0.5) == 4 * 2 * 10_000 * 2
    # 3 gates of 100 units, half of the weights, 2 x 10 steps: 3 sums in and 1 state out.
    layer = gpu_model.Recurrent(3, 100, sequences=2, steps=10)
    assert layer.flops(0.5) == 2 * 20 * 15_000
    assert gpu_model.floor(layer, 0.5, GPU) == (pytest.approx((15_000 + 20 * 400) * 2 / 1e6), "memory")


@pytest.mark.parametrize(
    ("loop", "warps", "expected"),
    [
        (gpu_loop.Loop(1_000_000, 5_000, 50), 4, (1.0, "arithmetic")),  # 100 clocks, L2 100, issue 50
        (gpu_loop.Loop(1_000_000, 10_000, 50), 4, (0.5, "L2")),
        (gpu_loop.Loop(1_000_000, 5_000, 50), 32, (0.25, "issue")),  # 8 warps a scheduler
    ],
)
def test_efficiency(loop, warps, expected):
    assert gpu_model.efficiency(loop, warps, 2, GPU) == (pytest.approx(expected[0]), expected[1])


def test_break_even():
    """4096 tokens multiply at a quarter of the peak: as long as dense with a quarter of the weights."""
    layer = gpu_model.Layer(4096, 4096, 4096)
    assert gpu_model.break_even(layer, (16, 16), 0.25, GPU) == pytest.approx(0.75)
    assert gpu_model.break_even(layer, (16, 16), 1.0, GPU) == 0
    # One token reads the weights: 4 bytes of index for 8 values of 2 bytes make a stored value 1.25 as large.
    assert gpu_model.break_even(gpu_model.Layer(1, 4096, 4096), (8, 1), 1.0, GPU) == pytest.approx(1 - 1 / 1.25)


@compiles
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_hot_loop_of_a_compiled_kernel(target, triton_cache):
    """Tiles of 128 tokens x 128 rows x 64 columns of float16, and one index; the machine code's products are those."""
    row = next(row for row in ROWS if row.name == "bsr_linear blocks float16")
    compiled = launches.compile_launch(row.large(PACKAGE, target).launches[0], gates.TARGETS[target])
    loop = gpu_loop.hot_loop(compiled)
    assert (loop.flops, loop.bytes) == (2 * 128 * 128 * 64, 2 * 2 * 128 * 64 + 4)
    if target == "sm_80":
        products = loop.flops / (2 * 16 * 8 * 16) / compiled.metadata.num_warps
        assert products < loop.issued < 10 * products
    else:  # LLVM's own word on occupancy, in waves of a SIMD
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", compiled.asm["amdgcn"])[1])
        stated = int(re.search(r"; Occupancy: (\d+)", compiled.asm["amdgcn"])[1])
        assert gpu_model.ctas_per_processor(registers, 0, 4, gpu_model.PROCESSORS["gfx942"])[0] == stated


SASS = """.LBB0:
--:-:-:-:1\tIADD3 R1, R1, 0x1, RZ;
.LBB1:
--:-:-:-:1\tHMMA.16816.F32 R4, R8, R12, R4;
--:-:-:-:1\tIADD3 R2, R2, 0x1, RZ;
--:-:-:-:1\t@P0 BRA LBB1;
--:-:-:-:1\tFFMA R1, R1, R1, R1;
--:-:-:-:1\t@!P1 BRA LBB0;
"""


def test_instructions_are_those_of_the_innermost_loop_with_the_most_products():
    assert gpu_loop.instructions(SASS) == (3, 0)
    assert gpu_loop.instructions(SASS.replace("HMMA.16816.F32", "FADD")) == (6, 1)
    assert gpu_loop.instructions("") == (0, 0)
