"""The rows of bsr_linear."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from cases import BsrLinearCase
from problems import Mutation, Problem, Row


def bsr_linear(case: BsrLinearCase) -> Callable[[str, str], Problem]:
    def build(package: str, target: str) -> Problem:
        weight = case.weight()
        y = torch.full(case.expected().shape, torch.nan, dtype=case.dtype)
        tensors = (weight.crow_indices, weight.col_indices, weight.values, case.bias_vector())
        module = importlib.import_module(f"{package}.bsr_linear")
        launch = module.plan(case.x(), *tensors, case.activation, y)
        return Problem([launch], [y], [case.expected()], case.tolerance)

    return build


BSR = "bsr_linear.py"
FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
NVIDIA = ("sm_80", "sm_90", "sm_100")  # the tiles of bsr_linear want more than the 64 KiB of gfx942

ROWS = [
    Row(
        "bsr_linear blocks float16",
        bsr_linear(BsrLinearCase((20,), 32, 64, (16, 16), density=0.6, dtype=FLOAT16, activation="gelu")),
        bsr_linear(BsrLinearCase((256,), 256, 256, (128, 128), dtype=FLOAT16, activation="relu")),
        targets=NVIDIA,
        mutations=(
            Mutation("stores tokens that are not there", BSR, "mask=(token[:, None] < tokens) & (row", "mask=(row"),
            Mutation(
                "the first block's column for all", BSR, "tl.load(col_ptr + p) * K", "tl.load(col_ptr + start) * K"
            ),
            Mutation("bias of the first block row for all", BSR, "tl.load(bias_ptr + column", "tl.load(bias_ptr + row"),
            Mutation("loads that are not pipelined", BSR, "NUM_STAGES = 5", "NUM_STAGES = 1"),
            Mutation(
                "addresses of tokens in 32 bits", BSR, "tl.cast(pid // row_tiles, tl.int64)", "(pid // row_tiles)"
            ),
        ),
    ),
    Row(
        "bsr_linear blocks bfloat16",
        bsr_linear(BsrLinearCase((20,), 32, 64, (16, 16), density=0.6, dtype=BFLOAT16, activation="gelu_tanh")),
        bsr_linear(BsrLinearCase((256,), 256, 256, (64, 64), dtype=BFLOAT16, activation="gelu")),
        targets=NVIDIA,
        mutations=(Mutation("one block too few", BSR, "block_row + 1) - start", "block_row + 1) - start - 1"),),
    ),
    Row(
        "bsr_linear blocks float32",
        bsr_linear(BsrLinearCase((20,), 32, 64, (16, 16), density=0.6, activation="relu")),
        bsr_linear(BsrLinearCase((256,), 256, 256, (64, 64), activation="relu")),
        math="fma",
        targets=NVIDIA,
        mutations=(
            Mutation("TF32 where float32 was asked for", BSR, 'input_precision="ieee"', 'input_precision="tf32"'),
        ),
    ),
    Row(
        "bsr_linear one token float16",
        bsr_linear(BsrLinearCase((1,), 64, 96, (32, 32), density=0.6, dtype=FLOAT16)),
        bsr_linear(BsrLinearCase((1,), 256, 256, (32, 32), dtype=FLOAT16)),
        pipelined=False,
        targets=NVIDIA,
    ),
    Row(
        "bsr_linear columns float16",
        bsr_linear(BsrLinearCase((20,), 16, 77, (8, 1), density=0.6, dtype=FLOAT16, activation="gelu")),
        bsr_linear(BsrLinearCase((256,), 256, 256, (8, 1), dtype=FLOAT16, activation="relu")),
        targets=NVIDIA,
        mutations=(
            Mutation("one column too many", BSR, "live = t < stored", "live = t <= stored"),
            Mutation("columns of the first block only", BSR, "p = start + t // K", "p = start + t % K"),
            Mutation("blocks at the stride of columns", BSR, "[:, None] * STRIDE_P", "[:, None] * STRIDE_K"),
        ),
    ),
    Row(
        "bsr_linear columns bfloat16",
        bsr_linear(BsrLinearCase((20,), 64, 40, (32, 1), density=0.6, dtype=BFLOAT16, activation="gelu")),
        bsr_linear(BsrLinearCase((256,), 256, 256, (32, 1), dtype=BFLOAT16, activation="gelu")),
        targets=NVIDIA,
    ),
    Row(
        "bsr_linear columns float32",
        bsr_linear(BsrLinearCase((20,), 16, 77, (8, 1), density=0.6, activation="gelu")),
        bsr_linear(BsrLinearCase((256,), 256, 256, (8, 1), activation="relu")),
        math="fma",
        targets=NVIDIA,
        mutations=(
            Mutation(
                "no mask for what a step has too much",
                BSR,
                "mask=live[:, None] & (row[None, :] < N)",
                "mask=row[None, :] < N",
            ),
        ),
    ),
]
