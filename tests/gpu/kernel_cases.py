"""The kernels under test on machines without a GPU: one row per kernel and dtype, in a file per op.

A row serves the PTX interpreter (`small`), the compile matrix (`large`, with a budget per target in budgets.py) and
the mutation runner (`mutations`). CONTRIBUTING.md shows how to add one.
"""

from __future__ import annotations

import block_sparse_attention_rows
import bsr_linear_rows
import recurrent_rows
from problems import Row

ROWS: list[Row] = [*bsr_linear_rows.ROWS, *block_sparse_attention_rows.ROWS, *recurrent_rows.ROWS]
