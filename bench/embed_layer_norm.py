"""embed_layer_norm against torch's embeddings, sums and layer_norm: time, bytes per second, share of the machine's.

    python bench/embed_layer_norm.py [--quick] [--output bench/results]

The table has 30522 rows, as BERT's, and every call has other ids, so that its rows come from memory. Both run
interleaved in this process, and the result is checked before it is timed. Writes embed_layer_norm.json and prints
a table.
"""

from __future__ import annotations

from itertools import cycle

import torch
import torch.nn.functional as F
from harness import COLD_BYTES, Step
from norms import main

from sparsenlp.ops import embed_layer_norm

WORDS = 30522
POSITIONS = 512


def cell(tokens: int, hidden: int, dtype: torch.dtype) -> tuple[dict[str, Step], int]:
    """(the steps to compare, bytes that have to move): one sequence, or several of at most 128 tokens"""
    batch, length = max(1, tokens // 128), min(tokens, 128)
    torch.manual_seed(0)
    word, position, types = (torch.randn(rows, hidden).to(dtype) for rows in (WORDS, POSITIONS, 2))
    weight, bias = torch.rand(hidden).to(dtype), torch.randn(hidden).to(dtype)
    moved = (2 * batch + 1) * length * hidden * dtype.itemsize
    token_type_ids, position_ids = torch.zeros(batch, length, dtype=torch.int64), torch.arange(length)[None]
    sets = [torch.randint(WORDS, (batch, length)) for _ in range(COLD_BYTES // moved + 1)]

    def dense(ids: torch.Tensor) -> torch.Tensor:
        total = F.embedding(ids, word) + F.embedding(token_type_ids, types) + F.embedding(position_ids, position)
        return F.layer_norm(total, (hidden,), weight, bias, 1e-12)

    def fused(ids: torch.Tensor) -> torch.Tensor:
        return embed_layer_norm(ids, word, position, types, weight, bias, 1e-12, token_type_ids=token_type_ids)

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(fused(sets[0]), dense(sets[0]), **tolerance)
    rings = {"torch": cycle(sets), "embed_layer_norm": cycle(sets)}
    steps = {
        "torch": lambda: dense(next(rings["torch"])),
        "embed_layer_norm": lambda: fused(next(rings["embed_layer_norm"])),
    }
    return steps, moved


if __name__ == "__main__":
    main("embed_layer_norm", __doc__, cell)
