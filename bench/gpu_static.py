"""What can be said of the GPU kernels without a GPU. Nothing here is measured.

    python bench/gpu_static.py [--only TEXT] [--targets sm_80 sm_90 sm_100 gfx942]

machine code  for each row of tests/gpu/kernel_cases.py, compiled at its large size: registers, shared memory, the CTAs
              that fit on one processor and the share of its warps that they fill, and how many instructions there are
              of each class
roofline      for standard layers: the least time that memory and arithmetic allow, dense and at three sparsities.
              No kernel reaches it, and a sparse kernel is further from it than a dense one: it bounds the gain, it
              does not predict it
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

import gates  # noqa: E402  (these need the path above)
from harness import print_table  # noqa: E402
from kernel_cases import ROWS  # noqa: E402
from launches import compile_launch  # noqa: E402
from problems import PACKAGE, Row  # noqa: E402


@dataclass(frozen=True)
class Processor:
    """What the CTAs of one multiprocessor share. Source: CUDA C++ Programming Guide, "Technical Specifications"."""

    warps: int
    ctas: int
    registers: int = 65536
    shared: int = 0  # bytes
    reserved: int = 1024  # bytes of shared memory that each CTA loses


PROCESSORS = {
    "sm_80": Processor(64, 32, shared=164 * 1024),
    "sm_90": Processor(64, 32, shared=228 * 1024),
    "sm_100": Processor(64, 32, shared=228 * 1024),
}


@dataclass(frozen=True)
class Gpu:
    """Peaks of the data sheet: dense tensor cores with float32 sums, float32 FMA, memory."""

    name: str
    half_tflops: float
    float_tflops: float
    gbytes: float  # per second


GPUS = [Gpu("A100 80GB", 312, 19.5, 2039), Gpu("H100 SXM", 989, 67, 3350), Gpu("RTX 4090", 165, 82.6, 1008)]
LAYERS = [(768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 14336)]  # K -> N
TOKENS = [1, 128, 4096]
SPARSITIES = [0.0, 0.5, 0.75, 0.9]

CLASSES = {
    "tensor core": gates.TENSOR_CORE,
    "fma": gates.FMA,
    "async copy": gates.ASYNCHRONOUS,
    "global": re.compile(r"LDG(?!STS|DEPBAR)|STG|RED|ATOM|global_|buffer_"),
    "shared": re.compile(r"LDSM|LDS|STS|STSM|ds_"),
    "barrier": re.compile(r"BAR|SYNCS|s_barrier"),
}


def ctas_per_processor(registers: int, shared: int, warps: int, processor: Processor) -> tuple[int, str]:
    """How many CTAs fit, and what limits them. Registers are allocated by warp, in units of 256."""
    per_warp = -(-registers * 32 // 256) * 256
    limits = {
        "registers": processor.registers // per_warp // warps,
        "shared memory": processor.shared // (-(-shared // 128) * 128 + processor.reserved),
        "warps": processor.warps // warps,
        "CTAs": processor.ctas,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def machine_code(row: Row, target: str) -> Iterator[dict[str, Any]]:
    """A line for each launch of a row."""
    for launch in row.large(PACKAGE, target).launches:
        compiled = compile_launch(launch, gates.TARGETS[target])
        used = gates.usage(compiled)
        line = {"kernel": row.name, "target": target, "registers": used.registers, "shared bytes": used.shared}
        line["warps"] = warps = compiled.metadata.num_warps
        if target in PROCESSORS:
            processor = PROCESSORS[target]
            ctas, limit = ctas_per_processor(used.registers, used.shared, warps, processor)
            line |= {"CTAs": ctas, "occupancy": f"{ctas * warps / processor.warps:.0%}", "limited by": limit}
        line |= {name: used.count(pattern) for name, pattern in CLASSES.items()}
        yield line | {"instructions": used.instructions.total()}


def floor(tokens: int, inputs: int, outputs: int, sparsity: float, gpu: Gpu) -> tuple[float, str]:
    """Least microseconds of y = x Wᵀ in float16, and whether memory or arithmetic bounds it; indices are left out."""
    stored = inputs * outputs * (1 - sparsity)
    memory = 2 * (tokens * (inputs + outputs) + stored) / (gpu.gbytes * 1e3)
    arithmetic = 2 * tokens * stored / (gpu.half_tflops * 1e6)
    return max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic"


def roofline() -> Iterator[dict[str, Any]]:
    for gpu in GPUS:
        for inputs, outputs in LAYERS:
            for tokens in TOKENS:
                line: dict[str, Any] = {"GPU": gpu.name, "layer": f"{inputs} -> {outputs}", "tokens": tokens}
                for sparsity in SPARSITIES:
                    time, bound = floor(tokens, inputs, outputs, sparsity, gpu)
                    line[f"{sparsity:.0%} sparse, us"] = f"{time:.2f} {bound}"
                yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--targets", nargs="+", default=list(gates.TARGETS), choices=list(gates.TARGETS))
    arguments = parser.parse_args()
    rows = [row for row in ROWS if arguments.only in row.name]
    print("# Not measured: read off the compiled machine code\n")
    print_table([line for row in rows for t in row.targets if t in arguments.targets for line in machine_code(row, t)])
    print("\n# Not measured: the roofline's floor, from data sheets\n")
    print_table(list(roofline()))


if __name__ == "__main__":
    main()
