"""add_layer_norm against torch's sum and layer_norm: time, bytes per second and their share of the machine's.

    python bench/add_layer_norm.py [--quick] [--output bench/results]

Both run interleaved in this process, on the same x, which is warm; the result is checked before it is timed.
Writes add_layer_norm.json and prints a table.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from harness import Step
from norms import main

from sparsenlp.ops import add_layer_norm

from cases import AddLayerNormCase  # isort: skip  (found through harness)


def cell(tokens: int, hidden: int, dtype: torch.dtype) -> tuple[dict[str, Step], int]:
    """(the steps to compare, bytes that have to move)"""
    case = AddLayerNormCase((tokens,), hidden, dtype=dtype)
    arguments = case.arguments()
    x, residual, weight, bias, eps = arguments
    torch.testing.assert_close(add_layer_norm(*arguments).double(), case.expected(), **case.tolerance)
    steps = {
        "torch": lambda: F.layer_norm(x + residual, (hidden,), weight, bias, eps),
        "add_layer_norm": partial(add_layer_norm, *arguments),
    }
    return steps, 3 * tokens * hidden * dtype.itemsize


if __name__ == "__main__":
    main("add_layer_norm", __doc__, cell)
