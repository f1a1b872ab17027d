"""Registers per thread and shared memory per CTA that each kernel may use: one row per kernel and target.

A row states what the compiler needs now, registers rounded up to the 8 in which they are allocated and shared memory
to a KiB; raise it only with a reason.
"""

from __future__ import annotations

KIB = 1024

# kernel: {target: (registers, shared bytes)}
BUDGETS: dict[str, dict[str, tuple[int, int]]] = {
    "bsr_linear blocks float16": {
        "sm_80": (192, 65 * KIB),
        "sm_90": (120, 97 * KIB),
        "sm_100": (104, 97 * KIB),
        "gfx942": (112, 32 * KIB),
    },
    "bsr_linear blocks bfloat16": {
        "sm_80": (208, 49 * KIB),
        "sm_90": (160, 73 * KIB),
        "sm_100": (168, 73 * KIB),
        "gfx942": (112, 24 * KIB),
    },
    "bsr_linear blocks float32": {
        "sm_80": (168, 33 * KIB),
        "sm_90": (152, 33 * KIB),
        "sm_100": (128, 33 * KIB),
        "gfx942": (88, 16 * KIB),
    },
    "bsr_linear blocks int8": {
        "sm_80": (256, 25 * KIB),
        "sm_90": (128, 37 * KIB),
        "sm_100": (136, 37 * KIB),
        "gfx942": (88, 12 * KIB),
    },
    "bsr_linear columns float16": {
        "sm_80": (64, 18 * KIB),
        "sm_90": (48, 26 * KIB),
        "sm_100": (32, 26 * KIB),
        "gfx942": (56, 9 * KIB),
    },
    "bsr_linear columns float32": {
        "sm_80": (40, 19 * KIB),
        "sm_90": (48, 19 * KIB),
        "sm_100": (48, 19 * KIB),
        "gfx942": (56, 10 * KIB),
    },
    "bsr_linear columns int8": {
        "sm_80": (72, 9 * KIB),
        "sm_90": (72, 5 * KIB),
        "sm_100": (72, 13 * KIB),
        "gfx942": (56, 5 * KIB),
    },
    "bsr_linear 16 tokens float16": {
        "sm_80": (56, 7 * KIB),
        "sm_90": (40, 7 * KIB),
        "sm_100": (40, 7 * KIB),
        "gfx942": (40, 3 * KIB),
    },
    "bsr_linear one token float16": {
        "sm_80": (40, 1 * KIB),
        "sm_90": (40, 1 * KIB),
        "sm_100": (40, 1 * KIB),
        "gfx942": (48, 1 * KIB),
    },
    "bsr_linear 4 tokens, columns float32": {
        "sm_80": (64, 1 * KIB),
        "sm_90": (64, 1 * KIB),
        "sm_100": (64, 1 * KIB),
        "gfx942": (48, 1 * KIB),
    },
    "bsr_linear one token int8": {
        "sm_80": (48, 2 * KIB),
        "sm_90": (56, 2 * KIB),
        "sm_100": (56, 2 * KIB),
        "gfx942": (40, 1 * KIB),
    },
    "bsr_linear shares float16": {
        "sm_80": (160, 33 * KIB),
        "sm_90": (120, 49 * KIB),
        "sm_100": (120, 49 * KIB),
        "gfx942": (104, 16 * KIB),
    },
    "bsr_linear_dgrad blocks float16": {
        "sm_80": (168, 49 * KIB),
        "sm_90": (120, 73 * KIB),
        "sm_100": (96, 73 * KIB),
        "gfx942": (144, 24 * KIB),
    },
    "bsr_linear_dgrad columns float32": {
        "sm_80": (48, 19 * KIB),
        "sm_90": (48, 19 * KIB),
        "sm_100": (48, 19 * KIB),
        "gfx942": (64, 10 * KIB),
    },
    "bsr_linear_wgrad blocks bfloat16": {
        "sm_80": (96, 32 * KIB),
        "sm_90": (64, 48 * KIB),
        "sm_100": (64, 49 * KIB),
        "gfx942": (88, 16 * KIB),
    },
    "bsr_linear_wgrad columns float16": {
        "sm_80": (64, 18 * KIB),
        "sm_90": (48, 27 * KIB),
        "sm_100": (48, 28 * KIB),
        "gfx942": (72, 10 * KIB),
    },
    "block_sparse_attention float16": {
        "sm_80": (208, 41 * KIB),
        "sm_90": (160, 57 * KIB),
        "sm_100": (136, 57 * KIB),
        "gfx942": (160, 32 * KIB),
    },
    "block_sparse_attention bfloat16": {
        "sm_80": (200, 41 * KIB),
        "sm_90": (152, 57 * KIB),
        "sm_100": (128, 57 * KIB),
        "gfx942": (160, 32 * KIB),
    },
    "block_sparse_attention gradients float16": {
        "sm_80": (168, 23 * KIB),
        "sm_90": (120, 26 * KIB),
        "sm_100": (64, 33 * KIB),
        "gfx942": (144, 8 * KIB),
    },
    "sparse_lstm step, columns float16": {
        "sm_80": (96, 4 * KIB),
        "sm_90": (80, 4 * KIB),
        "sm_100": (80, 4 * KIB),
        "gfx942": (88, 3 * KIB),
    },
    "sparse_lstm step, blocks bfloat16": {
        "sm_80": (120, 9 * KIB),
        "sm_90": (120, 9 * KIB),
        "sm_100": (120, 9 * KIB),
        "gfx942": (200, 4 * KIB),
    },
    "sparse_lstm step, one sequence float32": {
        "sm_80": (120, 1 * KIB),
        "sm_90": (128, 1 * KIB),
        "sm_100": (128, 1 * KIB),
        "gfx942": (104, 1 * KIB),
    },
    "sparse_lstm sequence, columns float16": {
        "sm_80": (96, 4 * KIB),
        "sm_90": (80, 4 * KIB),
        "sm_100": (72, 4 * KIB),
        "gfx942": (112, 3 * KIB),
    },
    "sparse_gru step, columns bfloat16": {
        "sm_80": (80, 4 * KIB),
        "sm_90": (80, 4 * KIB),
        "sm_100": (72, 4 * KIB),
        "gfx942": (80, 3 * KIB),
    },
    "sparse_gru sequence, blocks float32": {
        "sm_80": (128, 17 * KIB),
        "sm_90": (144, 17 * KIB),
        "sm_100": (144, 17 * KIB),
        "gfx942": (192, 8 * KIB),
    },
}
