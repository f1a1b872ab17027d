"""Registers per thread and shared memory per CTA that each kernel may use: one row per kernel and target.

A row states what the compiler needs now, registers rounded up to the 8 in which they are allocated and shared memory
to a KiB; raise it only with a reason.
"""

from __future__ import annotations

KIB = 1024

# kernel: {target: (registers, shared bytes)}
BUDGETS: dict[str, dict[str, tuple[int, int]]] = {
    "bsr_linear blocks float16": {
        "sm_80": (184, 65 * KIB),
        "sm_90": (112, 97 * KIB),
        "sm_100": (104, 97 * KIB),
    },
    "bsr_linear blocks bfloat16": {
        "sm_80": (208, 49 * KIB),
        "sm_90": (160, 73 * KIB),
        "sm_100": (160, 73 * KIB),
    },
    "bsr_linear blocks float32": {
        "sm_80": (168, 33 * KIB),
        "sm_90": (128, 33 * KIB),
        "sm_100": (128, 33 * KIB),
    },
    "bsr_linear one token float16": {
        "sm_80": (48, 7 * KIB),
        "sm_90": (40, 7 * KIB),
        "sm_100": (40, 7 * KIB),
    },
    "bsr_linear columns float16": {
        "sm_80": (56, 18 * KIB),
        "sm_90": (48, 26 * KIB),
        "sm_100": (32, 26 * KIB),
    },
    "bsr_linear columns bfloat16": {
        "sm_80": (120, 21 * KIB),
        "sm_90": (80, 31 * KIB),
        "sm_100": (80, 31 * KIB),
    },
    "bsr_linear columns float32": {
        "sm_80": (40, 19 * KIB),
        "sm_90": (48, 19 * KIB),
        "sm_100": (48, 19 * KIB),
    },
}
