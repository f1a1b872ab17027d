"""block_sparse_attention against torch's attention, dense and masked, and compiled FlexAttention on the same blocks.

    python bench/block_sparse_attention.py [--quick] [--output bench/results]

12 heads x 64, length and share of blocks as given: a sliding window. All take the same queries, keys and values and run
interleaved in this process; the result is checked before it is timed. Operations are those of the blocks that are
stored. Targets: at least 1.6 times FlexAttention, and within 1.3 of the density times the time of dense attention
("torch"), whose own share of the peak is printed. Writes block_sparse_attention.json and prints a table.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from harness import Step
from layer_parts import Shape, main
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparsenlp.formats import BlockMask
from sparsenlp.ops import block_sparse_attention

from cases import TOLERANCES, normal  # isort: skip  (found through harness)

HEADS, WIDTH, BLOCK = 12, 64, 64
SHAPES = {  # length, keys that a query attends to on its left and right
    (512, 64, 0): "512, 1/4",
    (1024, 128, 0): "1024, 1/5",
    (2048, 256, 0): "2048, 1/7",
    (4096, 512, 0): "4096, 1/7",
    (1024, 1024, 1024): "1024, all",
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def flex_mask(length: int, left: int, right: int) -> FlexMask:
    """The same window for FlexAttention, in blocks of the same size."""

    def window(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= query - left) & (key <= query + right)

    return create_block_mask(window, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)


def cell(shape: Shape, dtype: str) -> tuple[dict[str, Step], int]:
    """(the steps to compare, multiplications and additions)"""
    length, left, right = shape
    query, key, value = (normal(seed, 1, HEADS, length, WIDTH).to(DTYPES[dtype]) for seed in range(3))
    mask = BlockMask.sliding_window(length, left, right, block=(BLOCK, BLOCK))
    dense = mask.to_dense()[0]
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), dense)
    steps = {
        "torch": partial(F.scaled_dot_product_attention, query, key, value),
        "torch, mask": partial(F.scaled_dot_product_attention, query, key, value, dense),
        "block_sparse_attention": partial(block_sparse_attention, query, key, value, mask),
    }
    torch.compiler.reset()  # one cell's graphs count towards the limit of the next one's
    compiled = torch.compile(flex_attention, dynamic=False)
    flex = partial(compiled, query, key, value, block_mask=flex_mask(length, left, right))
    torch.testing.assert_close(flex().double(), expected, rtol=2e-2, atol=2e-2)
    steps["FlexAttention"] = flex
    tolerance = TOLERANCES["block_sparse_attention", DTYPES[dtype]]
    torch.testing.assert_close(steps["block_sparse_attention"]().double(), expected, **tolerance)
    return steps, 4 * HEADS * WIDTH * BLOCK * BLOCK * mask.nnz_blocks


if __name__ == "__main__":
    main("block_sparse_attention", __doc__, SHAPES, tuple(DTYPES), cell)
