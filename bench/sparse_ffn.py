"""sparse_ffn at 90 % sparsity against torch's dense layers and against two bsr_linear.

    python bench/sparse_ffn.py [--quick] [--output bench/results]

Dense layers work in the dtype of the sparse weights: float32, bfloat16, dynamic int8. All run interleaved in this
process on warm weights; the result is checked before it is timed. Writes sparse_ffn.json and prints a table.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from harness import Step, dynamic_int8
from layer_parts import Shape, main
from torch import Tensor

from sparsenlp.formats import SparseProjection
from sparsenlp.ops import bsr_linear, sparse_ffn

from encoder_cases import SparseFfnCase  # isort: skip  (found through harness)

SHAPES = {  # tokens, hidden, neurons
    (32, 384, 1536): "32 x 384, 1536",
    (1, 768, 3072): "1 x 768, 3072",
    (16, 768, 3072): "16 x 768, 3072",
    (128, 768, 3072): "128 x 768, 3072",
    (2048, 768, 3072): "2048 x 768, 3072",
}
DTYPES = {  # of the weights, of x, block
    "f32": (torch.float32, torch.float32, (8, 1)),
    "bf16": (torch.bfloat16, torch.bfloat16, (8, 2)),
    "int8": (torch.int8, torch.bfloat16, (8, 4)),
}
SPARSITY = 0.9


def cell(shape: Shape, dtype: str) -> tuple[dict[str, Step], int]:
    """(the steps to compare, multiplications and additions of stored weights)"""
    tokens, hidden, neurons = shape
    weight_dtype, x_dtype, block = DTYPES[dtype]
    case = SparseFfnCase(
        (tokens,), hidden, neurons, hidden, block, 1 - SPARSITY, weight_dtype=weight_dtype, dtype=x_dtype
    )
    x, (fc1, fc2) = case.x(), case.weights()
    torch.testing.assert_close(sparse_ffn(x, fc1, fc2).double(), case.expected(), **case.tolerance)
    biases = [fc.bias.to(x_dtype) for fc in (fc1, fc2)]
    steps = {
        "torch": dense(x, fc1, fc2, dtype),
        "two bsr_linear": partial(two_linears, x, fc1, fc2, biases),
        "sparse_ffn": partial(sparse_ffn, x, fc1, fc2),
    }
    return steps, 2 * tokens * (fc1.weight.values.numel() + fc2.weight.values.numel())


def two_linears(x: Tensor, fc1: SparseProjection, fc2: SparseProjection, biases: list[Tensor]) -> Tensor:
    return bsr_linear(bsr_linear(x, fc1.weight, biases[0], "gelu"), fc2.weight, biases[1])


def dense(x: Tensor, fc1: SparseProjection, fc2: SparseProjection, dtype: str) -> Step:
    """fc2(gelu(fc1(x))) by torch's dense layers in this dtype; in bfloat16 where torch was built without int8."""
    weights = [(fc.weight.to_dense().float(), fc.bias) for fc in (fc1, fc2)]
    if dtype == "int8":
        first, second = (dynamic_int8(*pair) for pair in weights)
        if first is not None and second is not None:
            wide = x.float()
            return lambda: second(F.gelu(first(wide)))
    (w1, b1), (w2, b2) = ((weight.to(x.dtype), bias.to(x.dtype)) for weight, bias in weights)
    return lambda: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


if __name__ == "__main__":
    main("sparse_ffn", __doc__, SHAPES, tuple(DTYPES), cell)
