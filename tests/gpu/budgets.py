"""Registers per thread, shared memory per CTA and warps per processor of each kernel: one row per kernel and target.

A row states what the compiler needs now, registers rounded up to the 8 in which they are allocated and shared memory
to a KiB, and the least occupancy that follows, of 64 warps that a multiprocessor of NVIDIA's has room for, 32 of AMD's.
Raise registers or shared memory, and lower warps, only with a reason.

8 warps are 2 for each scheduler of a multiprocessor. The kernels that have no more multiply large tiles, whose sums
fill the registers. Smaller tiles would let more run, but read more for each product: by the model of
bench/gpu_model.py, int8 tiles of 64 x 64 (12 warps) would wait for L2 a quarter of the time on an A100, those of
128 x 64 hardly.
"""

from __future__ import annotations

KIB = 1024

# kernel: {target: (registers, shared bytes, warps)}
BUDGETS: dict[str, dict[str, tuple[int, int, int]]] = {
    "bsr_linear blocks float16": {
        "sm_80": (192, 65 * KIB, 8),
        "sm_90": (120, 97 * KIB, 16),
        "sm_100": (104, 97 * KIB, 16),
        "gfx942": (112, 32 * KIB, 16),
    },
    "bsr_linear blocks bfloat16": {
        "sm_80": (208, 49 * KIB, 8),
        "sm_90": (160, 73 * KIB, 12),
        "sm_100": (168, 73 * KIB, 12),
        "gfx942": (112, 24 * KIB, 8),
    },
    "bsr_linear blocks float32": {
        "sm_80": (168, 33 * KIB, 12),
        "sm_90": (152, 33 * KIB, 12),
        "sm_100": (128, 33 * KIB, 16),
        "gfx942": (88, 16 * KIB, 16),
    },
    "bsr_linear blocks int8": {
        "sm_80": (256, 25 * KIB, 8),
        "sm_90": (128, 37 * KIB, 16),
        "sm_100": (136, 37 * KIB, 12),
        "gfx942": (88, 12 * KIB, 20),
    },
    "bsr_linear columns float16": {
        "sm_80": (64, 18 * KIB, 32),
        "sm_90": (48, 26 * KIB, 32),
        "sm_100": (32, 26 * KIB, 32),
        "gfx942": (56, 9 * KIB, 28),
    },
    "bsr_linear columns float32": {
        "sm_80": (40, 19 * KIB, 32),
        "sm_90": (48, 19 * KIB, 40),
        "sm_100": (48, 19 * KIB, 40),
        "gfx942": (56, 10 * KIB, 24),
    },
    "bsr_linear columns int8": {
        "sm_80": (128, 18 * KIB, 16),
        "sm_90": (80, 26 * KIB, 24),
        "sm_100": (80, 27 * KIB, 24),
        "gfx942": (64, 9 * KIB, 28),
    },
    "bsr_linear 16 tokens float16": {
        "sm_80": (56, 7 * KIB, 36),
        "sm_90": (40, 7 * KIB, 50),
        "sm_100": (40, 7 * KIB, 50),
        "gfx942": (40, 3 * KIB, 32),
    },
    "bsr_linear one token float16": {
        "sm_80": (40, 1 * KIB, 50),
        "sm_90": (40, 1 * KIB, 50),
        "sm_100": (40, 1 * KIB, 50),
        "gfx942": (48, 1 * KIB, 32),
    },
    "bsr_linear 4 tokens, columns float32": {
        "sm_80": (64, 1 * KIB, 32),
        "sm_90": (64, 1 * KIB, 32),
        "sm_100": (64, 1 * KIB, 32),
        "gfx942": (48, 1 * KIB, 32),
    },
    "bsr_linear one token int8": {
        "sm_80": (48, 2 * KIB, 40),
        "sm_90": (56, 2 * KIB, 36),
        "sm_100": (56, 2 * KIB, 36),
        "gfx942": (40, 1 * KIB, 32),
    },
    "bsr_linear shares float16": {
        "sm_80": (160, 33 * KIB, 12),
        "sm_90": (120, 49 * KIB, 16),
        "sm_100": (120, 49 * KIB, 16),
        "gfx942": (104, 16 * KIB, 16),
    },
    "bsr_linear_dgrad blocks float16": {
        "sm_80": (168, 49 * KIB, 12),
        "sm_90": (120, 73 * KIB, 12),
        "sm_100": (96, 73 * KIB, 12),
        "gfx942": (144, 24 * KIB, 8),
    },
    "bsr_linear_dgrad columns float32": {
        "sm_80": (48, 19 * KIB, 32),
        "sm_90": (48, 19 * KIB, 40),
        "sm_100": (48, 19 * KIB, 40),
        "gfx942": (64, 10 * KIB, 24),
    },
    "bsr_linear_wgrad blocks bfloat16": {
        "sm_80": (96, 32 * KIB, 16),
        "sm_90": (64, 48 * KIB, 16),
        "sm_100": (64, 49 * KIB, 16),
        "gfx942": (88, 16 * KIB, 16),
    },
    "bsr_linear_wgrad columns float16": {
        "sm_80": (64, 18 * KIB, 32),
        "sm_90": (48, 27 * KIB, 32),
        "sm_100": (48, 28 * KIB, 32),
        "gfx942": (72, 10 * KIB, 24),
    },
    "block_sparse_attention float16": {
        "sm_80": (208, 41 * KIB, 8),
        "sm_90": (160, 57 * KIB, 8),
        "sm_100": (136, 57 * KIB, 8),
        "gfx942": (160, 32 * KIB, 8),
    },
    "block_sparse_attention bfloat16": {
        "sm_80": (200, 41 * KIB, 8),
        "sm_90": (152, 57 * KIB, 8),
        "sm_100": (128, 57 * KIB, 16),
        "gfx942": (160, 32 * KIB, 8),
    },
    "block_sparse_attention gradients float16": {
        "sm_80": (168, 23 * KIB, 12),
        "sm_90": (120, 26 * KIB, 16),
        "sm_100": (64, 33 * KIB, 24),
        "gfx942": (144, 8 * KIB, 12),
    },
    "sparse_lstm step, columns float16": {
        "sm_80": (80, 6 * KIB, 24),
        "sm_90": (88, 6 * KIB, 20),
        "sm_100": (96, 6 * KIB, 20),
        "gfx942": (88, 3 * KIB, 20),
    },
    "sparse_lstm step, blocks bfloat16": {
        "sm_80": (120, 9 * KIB, 16),
        "sm_90": (120, 9 * KIB, 16),
        "sm_100": (120, 9 * KIB, 16),
        "gfx942": (200, 4 * KIB, 8),
    },
    "sparse_lstm step, one sequence float32": {
        "sm_80": (120, 1 * KIB, 16),
        "sm_90": (128, 1 * KIB, 16),
        "sm_100": (128, 1 * KIB, 16),
        "gfx942": (104, 1 * KIB, 16),
    },
    "sparse_lstm sequence, columns float16": {
        "sm_80": (120, 6 * KIB, 16),
        "sm_90": (96, 6 * KIB, 20),
        "sm_100": (96, 6 * KIB, 20),
        "gfx942": (104, 3 * KIB, 16),
    },
    "sparse_lstm sequence, one sequence float32": {
        "sm_80": (72, 1 * KIB, 28),
        "sm_90": (72, 1 * KIB, 28),
        "sm_100": (72, 1 * KIB, 28),
        "gfx942": (104, 1 * KIB, 16),
    },
    "sparse_gru step, columns bfloat16": {
        "sm_80": (72, 6 * KIB, 28),
        "sm_90": (72, 6 * KIB, 28),
        "sm_100": (80, 6 * KIB, 24),
        "gfx942": (80, 3 * KIB, 24),
    },
    "sparse_gru sequence, blocks float32": {
        "sm_80": (128, 17 * KIB, 16),
        "sm_90": (152, 17 * KIB, 12),
        "sm_100": (152, 17 * KIB, 12),
        "gfx942": (192, 8 * KIB, 8),
    },
}
