"""What can be said of the GPU kernels without a GPU. Nothing here is measured.

    python bench/gpu_static.py [--only TEXT] [--targets sm_80 sm_90 sm_100 gfx942]

machine code  for each row of tests/gpu/kernel_cases.py, compiled at its large size: registers, shared memory, the CTAs
              that fit on one processor and the share of its warps that they fill, what a turn of its loop multiplies
              and reads, and how many instructions there are of each class; the CUDA kernels where nvcc has built them
roofline      for standard shapes of each op: the least time that memory and arithmetic allow, dense and at three
              sparsities (of attention: shares of the keys that a query does not see). No kernel reaches it, and a
              sparse kernel is further from it than a dense one: it bounds the gain, it does not predict it
break-even    for bsr_linear, by block and dtype: the share of the peak that its loop can reach, what bounds it, and the
              sparsity from which the layer is predicted to be faster than dense, beside the published ones of another
              kernel

gpu_model.py has the formulas, and what they leave out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

import gates  # noqa: E402  (these need the path above)
import nvcc  # noqa: E402
import torch  # noqa: E402
from bsr_linear_rows import forward, large  # noqa: E402
from gpu_loop import Loop, hot_loop  # noqa: E402
from gpu_model import (  # noqa: E402
    GPUS,
    LAYERS,
    LENGTHS,
    PROCESSORS,
    SPARSITIES,
    TOKENS,
    UNITS,
    Attention,
    Layer,
    Recurrent,
    Work,
    break_even,
    ctas_per_processor,
    efficiency,
    floor,
)
from harness import print_table  # noqa: E402
from kernel_cases import ROWS  # noqa: E402
from launches import compile_launch  # noqa: E402
from problems import PACKAGE, Row  # noqa: E402

from sparsenlp.ops import recurrent_cuda  # noqa: E402

CLASSES = {
    "tensor core": gates.TENSOR_CORE,
    "fma": gates.FMA,
    "async copy": gates.ASYNCHRONOUS,
    "global": re.compile(r"LDG(?!STS|DEPBAR)|STG|RED|ATOM|global_|buffer_"),
    "shared": re.compile(r"LDSM|LDS|STS|STSM|ds_"),
    "barrier": re.compile(r"BAR|SYNCS|s_barrier"),
}

# Of csrc/cuda/nm_linear, by kernel: rows of W and tokens of a block, for 128 bytes of each token a turn.
NM_LINEAR_TILES = {"large": (128, 128), "small": (64, 32), "few": (16, 8)}

# For csrc/cuda/persistent.h: a layer whose W_hh is in blocks of 8x1. Shared memory keeps it, so that a block of threads
# fills a multiprocessor.
RECURRENT_UNITS, RECURRENT_DENSITY = 1024, 0.1
RECURRENT_GATES = {"sparse_lstm": 4, "sparse_gru": 3}
RECURRENT_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (8, 1), (32, 1)]
DTYPES = [torch.float16, torch.float32]
PUBLISHED_LAYER = 4096, 4096  # with 4096 tokens
# Sparsity from which torch 2.1's Triton kernel for BSR was faster than torch.matmul on an A100 80GB, 4096 x 4096 by
# 4096 x 4096, read off the text of https://labs.quansight.org/blog/pytorch-2-1-quansights-improvements-to-bsr-sparse-
# matrix-multiplication (October 2023). Its float32 may have been multiplied as TF32; ours is not.
PUBLISHED = {
    (torch.float32, (16, 16)): "70%",
    (torch.float32, (32, 32)): "almost 0%",
    (torch.float32, (64, 64)): "almost 0%",
    (torch.float16, (16, 16)): "above 90%",
    (torch.float16, (32, 32)): "above 80%",
    (torch.float16, (64, 64)): "60%",
}


def occupancy(registers: int, shared: int, warps: int, target: str) -> dict[str, Any]:
    processor = PROCESSORS[target]
    ctas, limit = ctas_per_processor(registers, shared, warps, processor)
    return {"CTAs": ctas, "occupancy": f"{ctas * warps / processor.warps:.0%}", "limited by": limit}


def machine_code(row: Row, target: str) -> Iterator[dict[str, Any]]:
    """A line for each launch of a row."""
    for launch in row.large(PACKAGE, target).launches:
        compiled = compile_launch(launch, gates.TARGETS[target])
        used, warps, loop = gates.usage(compiled), compiled.metadata.num_warps, hot_loop(compiled)
        line = {"kernel": row.name, "target": target, "registers": used.registers, "shared bytes": used.shared}
        line |= {"warps": warps, **occupancy(used.registers, used.shared, warps, target)}
        if loop is not None:
            line |= {"FLOPs a turn": loop.flops, "bytes a turn": loop.bytes, "FLOPs a byte": f"{loop.intensity:.1f}"}
        line |= {name: used.count(pattern) for name, pattern in CLASSES.items()}
        yield line | {"instructions": used.instructions.total()}


def nm_linear_machine_code(target: str) -> Iterator[dict[str, Any]]:
    """A line for each kernel of nm_linear; FLOPs are those of stored values, a warp of `few` takes a turn alone."""
    for name, code in sorted(nvcc.machine_code_of("nm_linear", target).items()):
        rows, tokens = NM_LINEAR_TILES[name.split("_")[2]]
        columns = 128 if "_i8_" in name else 64
        loop = Loop(2 * rows * tokens * columns // 2, tokens * 128 + rows * (64 + columns // 8))
        yield cuda_line(name, target, code, nvcc.nm_linear_launch(name), loop)


def recurrent_machine_code(target: str) -> Iterator[dict[str, Any]]:
    """A line for each persistent kernel as on an A100, of RECURRENT_UNITS; a turn is a step of a block of threads."""
    for op, gates_of_op in RECURRENT_GATES.items():
        for name, code in sorted(nvcc.machine_code_of(op, target).items()):
            words, short_type = name.split("_")[2:]
            dtype = RECURRENT_DTYPES[short_type]
            number = [known for known, _ in recurrent_cuda.KERNELS].index(words)
            sequences = recurrent_cuda.KERNELS[number][1]
            half = RECURRENT_UNITS * sequences
            launch = nvcc.recurrent_launch(
                op,
                recurrent_cuda.Arguments(
                    B=sequences, H=RECURRENT_UNITS, n=8, k=1, half=half, dtype=recurrent_cuda.DTYPES[dtype]
                ),
            )
            rows = gates_of_op * launch.units
            products = int(rows * RECURRENT_UNITS * RECURRENT_DENSITY) * sequences
            loop = Loop(2 * products, (half + rows * sequences) * dtype.itemsize)  # the state, and what comes in
            yield cuda_line(name, target, code, launch, loop)


def cuda_line(name: str, target: str, code: Any, launch: Any, loop: Loop) -> dict[str, Any]:
    shared, warps = code.shared + launch.shared_bytes, launch.threads // 32
    line = {"kernel": name, "target": target, "registers": code.registers, "shared bytes": shared, "warps": warps}
    line |= occupancy(code.registers, shared, warps, target)
    line |= {"FLOPs a turn": loop.flops, "bytes a turn": loop.bytes, "FLOPs a byte": f"{loop.intensity:.1f}"}
    opcodes = code.opcodes.items()
    line |= {c: sum(n for o, n in opcodes if pattern.match(o)) for c, pattern in CLASSES.items()}
    return line | {"instructions": code.opcodes.total()}


def standard_shapes() -> Iterator[tuple[str, str, Work]]:
    """(op, shape, what it must do)."""
    for inputs, outputs in LAYERS:
        for tokens in TOKENS:
            yield "bsr_linear, nm_linear", f"{inputs} -> {outputs}, tokens: {tokens}", Layer(tokens, inputs, outputs)
    for length in LENGTHS:
        yield "block_sparse_attention", f"12 x 64, length {length}", Attention(length)
    for op, gates_of_op in RECURRENT_GATES.items():
        for units in UNITS:
            for sequences in (1, 16):
                shape = f"{units} units, 128 steps, sequences: {sequences}"
                yield op, shape, Recurrent(gates_of_op, units, sequences)


def roofline() -> Iterator[dict[str, Any]]:
    for gpu in GPUS:
        for op, shape, work in standard_shapes():
            line: dict[str, Any] = {"GPU": gpu.name, "op": op, "shape": shape}
            for sparsity in SPARSITIES:
                time, bound = floor(work, sparsity, gpu)
                line[f"{sparsity:.0%} sparse, us"] = f"{time:.2f} {bound}"
            yield line


def break_evens() -> Iterator[dict[str, Any]]:
    """A line for each dtype, block and GPU: by 4096 tokens and by one."""
    for dtype in DTYPES:
        for block in BLOCKS:
            for gpu in GPUS:
                line: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "block": "{}x{}".format(*block)}
                line["GPU"] = gpu.name
                for tokens in (4096, 1):
                    problem = forward(large(min(tokens, 256), block, dtype=dtype))(PACKAGE, gpu.target)
                    compiled = compile_launch(problem.launches[0], gates.TARGETS[gpu.target])
                    loop = hot_loop(compiled)
                    assert loop is not None
                    reached, bound = efficiency(loop, compiled.metadata.num_warps, dtype.itemsize, gpu)
                    layer = Layer(tokens, *PUBLISHED_LAYER, dtype.itemsize)
                    if tokens > 1:
                        line |= {"share of the peak, at most": f"{reached:.0%}", "bound by": bound}
                    line[f"break-even, tokens: {tokens}"] = f"{break_even(layer, block, reached, gpu):.0%}"
                if gpu.name.startswith("A100"):
                    line["published, another kernel"] = PUBLISHED.get((dtype, block), "")
                yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--targets", nargs="+", default=list(gates.TARGETS), choices=list(gates.TARGETS))
    arguments = parser.parse_args()
    rows = [row for row in ROWS if arguments.only in row.name]
    print("# Not measured: read off the compiled machine code\n")
    print_table([line for row in rows for t in row.targets if t in arguments.targets for line in machine_code(row, t)])
    if nvcc.WHY_NOT:
        print(f"\nCUDA kernels are left out: {nvcc.WHY_NOT}")
    else:
        print("\n# Not measured: the CUDA kernels' machine code\n")
        nvidia = [target for target in arguments.targets if target.startswith("sm_")]
        cuda = [line for t in nvidia for line in (*nm_linear_machine_code(t), *recurrent_machine_code(t))]
        print_table([line for line in cuda if arguments.only in line["kernel"]])
    print("\n# Not measured: the roofline's floor in float16, from data sheets\n")
    print_table(list(roofline()))
    print("\n# Not measured: break-even sparsity of bsr_linear, 4096 -> 4096, predicted from the compiled loop\n")
    print_table(list(break_evens()))


if __name__ == "__main__":
    main()
