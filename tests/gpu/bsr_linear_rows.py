"""The rows of bsr_linear and its gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from cases import TOLERANCES, BsrLinearCase
from problems import IN_REGISTERS, Mutation, Problem, Row

from sparsenlp.reference import bsr_linear as reference

PRODUCT, BACKWARD, INT8 = "bsr_linear_product.py", "bsr_linear_backward.py", "bsr_linear_int8.py"
FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN, integers of their largest value: what a planner allocates is not to be read."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def forward(case: BsrLinearCase, processors: int = 1) -> Callable[[str, str], Problem]:
    """Few processors are filled by tiles, many need the stored blocks divided in equal shares."""

    def build(package: str, target: str) -> Problem:
        weight = case.weight()
        y = torch.full(case.expected().shape, torch.nan, dtype=case.dtype)
        tensors = (weight.crow_indices, weight.col_indices, weight.values, case.bias_vector())
        module = importlib.import_module(f"{package}.bsr_linear")
        rest = (case.residual_tensor(), weight.scales, 0.0, module.Device(target, processors))
        with poisoned():
            launches = module.plan(case.x(), *tensors, case.activation, y, *rest)
        return Problem(launches, [y], [case.expected()], case.tolerance)

    return build


def gradient(case: BsrLinearCase, of: str, processors: int = 1) -> Callable[[str, str], Problem]:
    """The gradient in "x" or in "values"."""

    def build(package: str, target: str) -> Problem:
        weight, x = case.weight(), case.x()
        pattern = weight.crow_indices, weight.col_indices
        grad = torch.randn(x.shape[0], case.rows, generator=torch.Generator().manual_seed(5)).to(case.dtype)
        module = importlib.import_module(f"{package}.bsr_linear_backward")
        device = importlib.import_module(f"{package}.launch").Device(target, processors)
        if of == "x":
            dx = torch.full(x.shape, torch.nan, dtype=case.dtype)
            expected = reference.bsr_linear_dgrad(grad.double(), *pattern, weight.values.double(), case.columns)
            launches = module.plan_dgrad(grad, *pattern, weight.values, dx, device)
            return Problem(launches, [dx], [expected], case.tolerance)
        with poisoned():
            launches, dvalues = module.plan_wgrad(grad, x, *pattern, case.block, device)
        expected = reference.bsr_linear_wgrad(grad.double(), x.double(), *pattern, case.block)
        return Problem(launches, [dvalues[0]], [expected], TOLERANCES["bsr_linear_wgrad", torch.float32])

    return build


def small(tokens: int, rows: int, columns: int, block: tuple[int, int], **rest) -> BsrLinearCase:
    return BsrLinearCase((tokens,), rows, columns, block, **({"density": 0.6} | rest))


def large(tokens: int, block: tuple[int, int], **rest) -> BsrLinearCase:
    return BsrLinearCase((tokens,), 256, 256, block, **rest)


ROWS = [
    Row(
        "bsr_linear blocks float16",
        forward(small(20, 32, 64, (16, 16), dtype=FLOAT16, activation="gelu", residual=True)),
        forward(large(256, (128, 128), dtype=FLOAT16, activation="relu")),
        mutations=(
            Mutation(
                "stores tokens that are not there", PRODUCT, "mask = (token[:, None] < tokens) & (row[", "mask = (row["
            ),
            Mutation("the first block's column for all", PRODUCT, "tl.load(col_ptr + p)", "tl.load(col_ptr + start)"),
            Mutation(
                "bias of the first block row for all", PRODUCT, "tl.load(bias_ptr + column", "tl.load(bias_ptr + row"
            ),
            Mutation("loads that are not pipelined", PRODUCT, 'longest["stages"]', "1"),
            Mutation(
                "addresses of tokens in 32 bits", PRODUCT, "tl.cast(tile // row_tiles, tl.int64)", "(tile // row_tiles)"
            ),
            Mutation(
                "the residual after the activation",
                PRODUCT,
                "y += tl.cast(tl.load(residual_ptr",
                "y = _activate(y, ACTIVATION) + tl.cast(tl.load(residual_ptr",
            ),
        ),
    ),
    Row(
        "bsr_linear blocks bfloat16",
        forward(small(20, 32, 64, (16, 16), dtype=BFLOAT16, activation="gelu_tanh")),
        forward(large(256, (64, 64), dtype=BFLOAT16, activation="gelu")),
        mutations=(
            Mutation(
                "a row that is one block short",
                PRODUCT,
                "start, end = tl.load(crow_ptr + block_row), tl.load(crow_ptr + block_row + 1)\n    total",
                "start, end = tl.load(crow_ptr + block_row), tl.load(crow_ptr + block_row + 1) - 1\n    total",
            ),
        ),
    ),
    Row(
        "bsr_linear blocks float32",
        forward(small(20, 32, 64, (16, 16), activation="relu")),
        forward(large(256, (64, 64), activation="relu")),
        math="fma",
        mutations=(Mutation("TF32 where float32 was asked for", PRODUCT, 'return "ieee"', 'return "tf32"'),),
    ),
    Row(
        "bsr_linear blocks int8",
        forward(small(20, 64, 128, (32, 32), dtype=FLOAT16, int8=True)),
        forward(large(256, (64, 64), dtype=FLOAT16, int8=True)),
        aside=("_quantize_kernel",),
        mutations=(
            Mutation("the scale of the first token for all", PRODUCT, "x_scale_ptr + token", "x_scale_ptr + token * 0"),
            Mutation("truncates instead of rounding", INT8, "(v + 12582912.0) - 12582912.0", "v"),
            Mutation("the largest value, not magnitude", INT8, "tl.abs(tl.cast(x", "(tl.cast(x"),
        ),
    ),
    Row(
        "bsr_linear columns float16",
        forward(small(20, 16, 77, (8, 1), dtype=FLOAT16, activation="gelu")),
        forward(large(256, (8, 1), dtype=FLOAT16, activation="relu")),
        mutations=(
            Mutation("one column too many", PRODUCT, "exists = t < stored", "exists = t <= stored"),
            Mutation("columns of the first block only", PRODUCT, "p = start + t // K", "p = start + t % K"),
            Mutation("a stride of 2 for tokens", PRODUCT, "token[:, None] * x_stride_m", "token[:, None] * 2"),
        ),
    ),
    Row(
        "bsr_linear columns float32",
        forward(small(20, 16, 77, (8, 1), activation="gelu")),
        forward(large(256, (8, 1), activation="relu")),
        math="fma",
        mutations=(
            Mutation(
                "no mask for what a step has too much",
                PRODUCT,
                "mask=exists[:, None] & (row[None, :] < N)",
                "mask=row[None, :] < N",
            ),
        ),
    ),
    Row(
        "bsr_linear columns int8",
        forward(small(20, 16, 76, (8, 4), dtype=BFLOAT16, int8=True)),
        forward(large(256, (8, 4), dtype=BFLOAT16, int8=True)),
        aside=("_quantize_kernel",),
        mutations=(
            Mutation(
                "int8 tokens laid out as the kernel does not read them",
                INT8,
                "rounded_rows + place[None, :]",
                "rounded_rows + column[None, :]",
            ),
            Mutation("the first column of a unit for all", PRODUCT, ", t % UNIT", ", t * 0"),
            Mutation(
                "units that are not known to be contiguous",
                PRODUCT,
                "t // UNIT % (K // UNIT), t % UNIT",
                "inner // UNIT, inner % UNIT",
            ),
        ),
    ),
    Row(
        "bsr_linear 16 tokens float16",
        forward(small(9, 64, 96, (32, 32), dtype=FLOAT16)),
        forward(large(16, (32, 32), dtype=FLOAT16)),
    ),
    Row(
        "bsr_linear one token float16",
        forward(small(1, 64, 96, (32, 32), dtype=FLOAT16)),
        forward(large(1, (32, 32), dtype=FLOAT16)),
        math="fma",
        synchronous=IN_REGISTERS,
        mutations=(
            Mutation(
                "reads nothing", PRODUCT, "exists = tl.full((BLOCK_K,), True", "exists = tl.full((BLOCK_K,), False"
            ),
            Mutation("the largest, not the sum", PRODUCT, "return tl.sum(parts, 2)", "return tl.max(parts, 2)"),
            Mutation("the last block only", PRODUCT, "parts += tl.cast(x", "parts = tl.cast(x"),
        ),
    ),
    Row(
        "bsr_linear 4 tokens, columns float32",
        forward(small(3, 24, 77, (8, 1), activation="gelu")),
        forward(large(4, (8, 1), activation="relu")),
        math="fma",
        synchronous=IN_REGISTERS,
    ),
    Row(
        "bsr_linear one token int8",
        forward(small(1, 24, 76, (8, 4), dtype=FLOAT16, int8=True)),
        forward(large(1, (8, 4), dtype=FLOAT16, int8=True)),
        math="",
        synchronous=IN_REGISTERS,
    ),
    Row(
        "bsr_linear shares float16",
        forward(small(9, 96, 320, (16, 64), dtype=FLOAT16, uneven=True, residual=True, activation="relu"), 8),
        forward(large(64, (64, 64), dtype=FLOAT16, density=1.0), 108),
        aside=("_join_kernel",),
        mutations=(
            Mutation("one slot for both parts of a share", PRODUCT, "slot = tl.where(p == first, 0, 1)", "slot = 0"),
            Mutation("every row begins within a share", PRODUCT, "(start > share * share_blocks)", "(start >= 0)"),
            Mutation("the last part is left out", PRODUCT, "last_share + 1)", "last_share)"),
            Mutation("a row is finished by its first share", PRODUCT, " & (row_end <= last)", ""),
            Mutation("rows of no blocks are not finished", PRODUCT, " | (start == end)", ""),
            Mutation("begins at the row after", PRODUCT, "    return low", "    return low + 1"),
        ),
    ),
    Row(
        "bsr_linear_dgrad blocks float16",
        gradient(small(20, 32, 64, (16, 16), dtype=FLOAT16), "x"),
        gradient(large(256, (64, 64), dtype=FLOAT16), "x"),
        mutations=(
            Mutation("values in the order of W", PRODUCT, "place = tl.load(order_ptr + p)", "place = p"),
            Mutation("blocks that are not transposed", BACKWARD, "values.transpose(1, 2)", "values"),
            Mutation("rows of the blocks in the order of W", BACKWARD, "block_row.index_select(0, order)", "block_row"),
        ),
    ),
    Row(
        "bsr_linear_dgrad columns float32",
        gradient(small(20, 24, 20, (8, 1)), "x"),
        gradient(large(256, (8, 1)), "x"),
        math="fma",
    ),
    Row(
        "bsr_linear_wgrad blocks bfloat16",
        gradient(small(70, 32, 64, (16, 16), dtype=BFLOAT16), "values"),
        gradient(large(256, (64, 64), dtype=BFLOAT16), "values"),
        mutations=(
            Mutation("tokens that are not there", BACKWARD, "exists = token < last", "exists = token < last + 1"),
            Mutation("the first column for all", BACKWARD, "tl.load(col_ptr + p), tl.int64) * K", "p, tl.int64) * 0"),
            Mutation("only the last tokens", BACKWARD, "tl.dot(grad, x, total", "tl.dot(grad, x, total * 0"),
            Mutation("the row of the next block", BACKWARD, "block_rows, p)", "block_rows, p + 1)"),
        ),
    ),
    Row(
        "bsr_linear_wgrad columns float16",
        gradient(small(20, 16, 150, (8, 1), dtype=FLOAT16), "values"),
        gradient(large(256, (8, 1), dtype=FLOAT16), "values"),
        mutations=(
            Mutation("columns beyond the row's", BACKWARD, "stores = t < stored", "stores = t <= stored"),
            Mutation("the first turn only", BACKWARD, "range(turn * BLOCK_K,", "range(0,"),
            Mutation("blocks of the first row", BACKWARD, "p = start + t // K", "p = t // K"),
        ),
    ),
]
