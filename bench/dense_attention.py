"""dense_attention against torch's scaled_dot_product_attention, eager and compiled.

    python bench/dense_attention.py [--quick] [--output bench/results]

All take views of one tensor with queries, keys and values side by side, as a fused projection leaves it, and give rows
as the next projection takes them. They run interleaved in this process; the result is checked before it is
timed. Writes dense_attention.json and prints a table.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from harness import Step
from layer_parts import Shape, main
from torch import Tensor

from sparsenlp.ops import dense_attention

from encoder_cases import DenseAttentionCase  # isort: skip  (found through harness)

SHAPES = {  # batch, length, heads, head dimension
    (1, 32, 12, 32): "1 x 32, 12 x 32",
    (1, 128, 12, 64): "1 x 128, 12 x 64",
    (1, 384, 12, 64): "1 x 384, 12 x 64",
    (16, 128, 12, 64): "16 x 128, 12 x 64",
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def sdpa(heads: int, *rows: Tensor) -> Tensor:
    query, key, value = (t.unflatten(2, (heads, t.shape[2] // heads)).transpose(1, 2) for t in rows)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def cell(shape: Shape, dtype: str) -> tuple[dict[str, Step], int]:
    """(the steps to compare, multiplications and additions)"""
    batch, length, heads, width = shape
    case = DenseAttentionCase((length,) * batch, heads, width, width, views=True, dtype=DTYPES[dtype])
    arguments = case.arguments()
    rows = [arguments[name] for name in ("query", "key", "value")]
    torch.testing.assert_close(dense_attention(**arguments).double(), case.expected(), **case.tolerance)
    torch.compiler.reset()  # one cell's graphs count towards the limit of the next one's
    compiled = torch.compile(sdpa, dynamic=False)
    torch.testing.assert_close(compiled(heads, *rows).double(), case.expected(), rtol=2e-2, atol=2e-2)
    steps = {
        "torch": partial(sdpa, heads, *rows),
        "compiled": partial(compiled, heads, *rows),
        "dense_attention": partial(dense_attention, **arguments),
    }
    return steps, 4 * batch * heads * length * length * width


if __name__ == "__main__":
    main("dense_attention", __doc__, SHAPES, tuple(DTYPES), cell)
